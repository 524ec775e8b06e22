"""Attention over sequences that share rows: the textbook of each, and the bits of each alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from logitmill.engine.blocks import Blocks, agree, powers
from logitmill.kernels import attention, tree_attention
from logitmill.kernels.branches import Branches
from logitmill.kernels.choice import Choice
from logitmill.kernels.tree_attention import LEAST_ROWS, TreeAttention, most_rows, products
from test_attention import mix, weigh

pytest.importorskip("logitmill.kernels.gpu.attention")
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

HEADS, GROUPS, SIZE = 4, 2, 64
OPTIONS: list[dict[str, Any]] = [
    {},
    {"window": 20},
    {"soft_cap": 5.0},
    {"sinks_H": torch.tensor([-3.0, 0.5, 4.0, 1.0])},
    {"window": 70, "soft_cap": 2.0, "sinks_H": torch.tensor([-3.0, 0.5, 4.0, 1.0])},
]


def grow(branches: Sequence[tuple[int, int]]) -> Branches:
    """Sequences, each (tokens it shares with the one before, tokens of its own)."""
    shared, own = np.array(branches, np.int64).T
    return Branches(shared, own)


def paths_of(branches: Branches) -> list[np.ndarray]:
    """Of each sequence the rows of its tokens."""
    paths: list[np.ndarray] = []
    first = 0
    for shared, own in zip(branches.num_shared, branches.num_own, strict=True):
        begun = paths[-1][:shared] if shared else np.zeros(0, np.int64)
        assert len(begun) == shared
        paths.append(np.concatenate([begun, np.arange(first, first + own)]))
        first += own
    return paths


# A lone one, a context with endings, one of them cut short by the next, the same one twice, and
# lengths around the tiles of keys.
TREES = [
    [(0, 1)],
    [(0, 300), (290, 17), (290, 1), (150, 200), (350, 0), (128, 1), (127, 2)],
    [(0, 130), (0, 256), (256, 1), (255, 130), (16, 1000)],
]


@pytest.fixture(scope="module")
def rows() -> Blocks:
    most = most_rows(HEADS, GROUPS)
    return agree(
        products(SIZE),
        powers(most, LEAST_ROWS),
        dtype=torch.float32,
        device=torch.device("cpu"),
        standard=most,
    )


def draw(num_rows: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(num_rows)
    heads = torch.randn(num_rows, HEADS + 2 * GROUPS, SIZE, generator=generator).to(dtype)
    return heads.split([HEADS, GROUPS, GROUPS], dim=1)


def assert_each_is_the_textbook(
    out: torch.Tensor,
    qkv: tuple[torch.Tensor, ...],
    paths: Sequence[np.ndarray],
    options: dict[str, Any],
    bound: float,
) -> None:
    q, k, v = qkv
    for path in paths:
        weights = weigh(
            q[path],
            k[path],
            0.3,
            options.get("window"),
            options.get("soft_cap"),
            options.get("sinks_H"),
        )
        expected = mix(weights, v[path])
        torch.testing.assert_close(out[path].double(), expected, atol=bound, rtol=bound)


def assert_each_keeps_its_bits(
    out: torch.Tensor,
    qkv: tuple[torch.Tensor, ...],
    paths: Sequence[np.ndarray],
    rows: Blocks | None,
    options: dict[str, Any],
) -> None:
    """Alone, and when it goes on otherwise."""
    # numpy, which interprets the kernel, gives a row other bits in other places.
    interpreted = rows is None and out.device.type == "cpu"
    for path in paths:
        lengths = {len(path), max(1, len(path) - 3), max(1, len(path) // 2)}
        for length in {len(path)} if interpreted else lengths:
            own = [x[path[:length]] for x in qkv]
            alone = TreeAttention(grow([(0, length)]), out.device)
            found = alone(*own, rows=rows, scale=0.3, **options)
            if interpreted:
                torch.testing.assert_close(found, out[path[:length]], atol=1e-3, rtol=1e-2)
            else:
                assert torch.equal(found, out[path[:length]])


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("tree", TREES)
def test_each_sequence_is_the_textbook_of_itself_and_keeps_its_bits(
    tree: list[tuple[int, int]], options: dict[str, Any], rows: Blocks
) -> None:
    branches = grow(tree)
    paths, total = paths_of(branches), branches.num_rows
    qkv = draw(total + 5)
    out = TreeAttention(branches, torch.device("cpu"))(*qkv, rows=rows, scale=0.3, **options)
    assert not out[total:].any(), "rows of padding are zeros"
    assert_each_is_the_textbook(out, qkv, paths, options, 1e-5)
    assert_each_keeps_its_bits(out, qkv, paths, rows, options)


def test_sixteen_bits_are_computed_in_float32(rows: Blocks) -> None:
    branches = grow(TREES[1])
    qkv = draw(1000, torch.bfloat16)
    out = TreeAttention(branches, torch.device("cpu"))(*qkv, rows=rows, scale=0.3)
    wide = tuple(x.float() for x in qkv)
    expected = TreeAttention(branches, torch.device("cpu"))(*wide, rows=rows, scale=0.3)
    assert torch.equal(out, expected.bfloat16())


@pytest.fixture
def _with_the_kernel(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "choose", lambda device: Choice(True, "triton"))
    if device.type == "cpu":
        monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: x)


@pytest.mark.usefixtures("_with_the_kernel")
@pytest.mark.parametrize("options", OPTIONS)
def test_the_kernel_over_a_tree(
    device: torch.device, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    # In three chunks, of which one holds nothing of its own.
    monkeypatch.setattr(tree_attention, "_MAX_KEYS", 160)
    branches = grow([(0, 70), (66, 3), (66, 1), (40, 60), (100, 0), (64, 2), (0, 5)])
    paths, total = paths_of(branches), branches.num_rows
    qkv = tuple(x.to(device) for x in draw(total + 3, torch.bfloat16))
    options = {n: x.to(device) if n == "sinks_H" else x for n, x in options.items()}
    tree = TreeAttention(branches, device)
    out = tree(*qkv, rows=None, scale=0.3, **options)
    assert torch.equal(tree(*qkv, rows=None, scale=0.3, **options), out), "of the next layer"
    assert not out[total:].any()
    assert_each_keeps_its_bits(out, qkv, paths, None, options)
    here = tuple(x.cpu() for x in qkv)
    options = {n: x.cpu() if n == "sinks_H" else x for n, x in options.items()}
    assert_each_is_the_textbook(out.cpu(), here, paths, options, 2e-2)


def assert_what_overflows_is_seen_alone(
    device: torch.device, dtype: torch.dtype, rows: Blocks | None, options: dict[str, Any]
) -> None:
    """Sequence 0 goes on with an infinity, sequences 1 and 3 do not, 2 and 4 end with one."""
    branches = grow([(0, 70), (66, 3), (68, 3), (40, 90), (120, 11)])
    paths, window = paths_of(branches), options.get("window") or 1000
    options = {n: x.to(device) if n == "sinks_H" else x for n, x in options.items()}
    q, k, v = (x.to(device) for x in draw(branches.num_rows, dtype))
    tree = TreeAttention(branches, device)
    expected = tree(q, k, v, rows=rows, scale=0.3, **options)
    bad = [int(paths[0][67]), int(paths[2][70]), int(paths[4][120])]
    k[bad[1]] = torch.nan
    v[bad, 1, 5] = torch.tensor([torch.inf, torch.nan, -torch.inf], dtype=dtype, device=device)
    out = tree(q, k, v, rows=rows, scale=0.3, **options)
    lost = torch.zeros(len(out), dtype=torch.bool)
    for path in paths:
        for place in np.flatnonzero(np.isin(path, bad)):
            lost[path[place : place + window]] = True
    assert 0 < lost.sum() < len(lost) / 2
    # Heads of the key head whose value is not finite.
    heads = slice(HEADS // GROUPS, None)
    assert out[lost][:, heads].isnan().any(2).all()
    assert torch.equal(out[~lost], expected[~lost])


@pytest.mark.parametrize("options", OPTIONS)
def test_what_overflows_is_lost_on_those_that_see_it_alone(
    options: dict[str, Any], rows: Blocks
) -> None:
    assert_what_overflows_is_seen_alone(torch.device("cpu"), torch.float32, rows, options)


@pytest.mark.usefixtures("_with_the_kernel")
@pytest.mark.parametrize("options", OPTIONS)
def test_the_kernel_keeps_what_overflows(device: torch.device, options: dict[str, Any]) -> None:
    assert_what_overflows_is_seen_alone(device, torch.bfloat16, None, options)


@pytest.mark.usefixtures("_with_the_kernel")
@pytest.mark.parametrize(
    ("tree", "times"),
    [
        # One header for all, and questions of their own below it.
        ([(0, 8010), *[(8000, 10)] * 999], 1),
        ([(0, 8310), *[*[(8300, 10)] * 3, (8000, 310)] * 200], 4),
        # Questions that have nothing in common.
        ([(0, 510), *[*[(500, 10)] * 3, (0, 510)] * 100], 1),
        # Each goes on from all of the one before it.
        ([(100 * i, 100) for i in range(200)], 8),
    ],
)
def test_keys_are_not_laid_out_for_every_sequence(tree: list[tuple[int, int]], times: int) -> None:
    branches = grow(tree)
    chunks = list(TreeAttention(branches, torch.device("cpu"))._lay_out(SIZE))
    assert sum(c.own.stop - c.own.start for c in chunks) == branches.num_rows
    # Of every sequence besides the block of keys in which it parts with another.
    assert sum(len(c.rows_S) for c in chunks) <= times * (branches.num_rows + 64 * len(tree))
    assert all(len(c.rows_S) <= tree_attention._MAX_KEYS for c in chunks)
