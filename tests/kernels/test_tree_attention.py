"""Attention over sequences that share rows: the textbook of each, and the bits of each alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from logitmill.engine.blocks import Blocks, agree, powers
from logitmill.kernels import attention, tree_attention
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


def grow(branches: Sequence[tuple[int, int]]) -> tuple[list[np.ndarray], list[int]]:
    """Paths of sequences, each (tokens it shares with the one before, tokens of its own)."""
    paths: list[np.ndarray] = []
    first = 0
    for shared, own in branches:
        begun = paths[-1][:shared] if shared else np.zeros(0, np.int64)
        assert len(begun) == shared
        paths.append(np.concatenate([begun, np.arange(first, first + own)]))
        first += own
    return paths, [shared for shared, _ in branches]


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
    for path in paths:
        for length in {len(path), max(1, len(path) - 3), max(1, len(path) // 2)}:
            own = [x[path[:length]] for x in qkv]
            alone = TreeAttention([np.arange(length)], [0], out.device)
            found = alone(*own, rows=rows, scale=0.3, **options)
            if rows is None and out.device.type == "cpu":
                # numpy, which interprets the kernel, gives a row other bits in other places.
                torch.testing.assert_close(found, out[path[:length]], atol=1e-3, rtol=1e-2)
            else:
                assert torch.equal(found, out[path[:length]])


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("tree", TREES)
def test_each_sequence_is_the_textbook_of_itself_and_keeps_its_bits(
    tree: list[tuple[int, int]], options: dict[str, Any], rows: Blocks
) -> None:
    paths, shared = grow(tree)
    total = sum(own for _, own in tree)
    qkv = draw(total + 5)
    out = TreeAttention(paths, shared, torch.device("cpu"))(*qkv, rows=rows, scale=0.3, **options)
    assert not out[total:].any(), "rows of padding are zeros"
    assert_each_is_the_textbook(out, qkv, paths, options, 1e-5)
    assert_each_keeps_its_bits(out, qkv, paths, rows, options)


def test_sixteen_bits_are_computed_in_float32(rows: Blocks) -> None:
    paths, shared = grow(TREES[1])
    qkv = draw(1000, torch.bfloat16)
    out = TreeAttention(paths, shared, torch.device("cpu"))(*qkv, rows=rows, scale=0.3)
    wide = tuple(x.float() for x in qkv)
    expected = TreeAttention(paths, shared, torch.device("cpu"))(*wide, rows=rows, scale=0.3)
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
    paths, shared = grow([(0, 70), (66, 3), (66, 1), (40, 60), (100, 0), (64, 2), (0, 5)])
    total = sum(len(p) - n for p, n in zip(paths, shared, strict=True))
    qkv = tuple(x.to(device) for x in draw(total + 3, torch.bfloat16))
    options = {n: x.to(device) if n == "sinks_H" else x for n, x in options.items()}
    tree = TreeAttention(paths, shared, device)
    out = tree(*qkv, rows=None, scale=0.3, **options)
    assert torch.equal(tree(*qkv, rows=None, scale=0.3, **options), out), "of the next layer"
    assert not out[total:].any()
    assert_each_keeps_its_bits(out, qkv, paths, None, options)
    here = tuple(x.cpu() for x in qkv)
    options = {n: x.cpu() if n == "sinks_H" else x for n, x in options.items()}
    assert_each_is_the_textbook(out.cpu(), here, paths, options, 2e-2)
