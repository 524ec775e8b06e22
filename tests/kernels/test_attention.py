"""Attention over packed sequences against the textbook, and the kernel against both."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from logitmill.kernels import attention
from logitmill.kernels.attention import attend
from logitmill.kernels.choice import Choice

gpu = pytest.importorskip("logitmill.kernels.gpu.attention")
cudnn = pytest.importorskip("logitmill.kernels.gpu.cudnn")

# The interpreter's numpy warns of every NaN and overflow.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def weigh(
    q: torch.Tensor,
    k: torch.Tensor,
    scale: float,
    window: int | None,
    soft_cap: float | None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """softmax over the keys that each query may see, in float64; [H, queries, keys].

    The last query faces the last key. A sink takes its share and gives nothing.
    """
    keys = k.double().repeat_interleave(q.shape[1] // k.shape[1], 1)
    scores = torch.einsum("qhd,khd->hqk", q.double(), keys) * scale
    if soft_cap is not None:
        scores = soft_cap * (scores / soft_cap).tanh()
    at = torch.arange(len(k) - len(q), len(k))[:, None]
    key = torch.arange(len(k))[None]
    seen = key <= at
    if window is not None:
        seen &= key > at - window
    scores = scores.masked_fill(~seen, -torch.inf)
    if sinks is not None:
        nothing = sinks.double()[:, None, None].expand(-1, len(q), 1)
        return torch.cat([scores, nothing], -1).softmax(-1)[..., :-1]
    return scores.softmax(-1)


def mix(weights_HQK: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """float64 [queries, H, D]."""
    values = v.double().repeat_interleave(len(weights_HQK) // v.shape[1], 1)
    return torch.einsum("hqk,khd->qhd", weights_HQK, values)


def textbook(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, window: int | None
) -> torch.Tensor:
    return mix(weigh(q, k, scale, window, None), v)


def parts(lengths: Sequence[int]) -> list[slice]:
    """The rows of each packed sequence."""
    return [slice(*ends) for ends in pairwise(accumulate(lengths, initial=0))]


def draw(num_rows: int, heads: int, kv_heads: int, dim: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(num_rows * dim)
    return tuple(
        torch.randn(num_rows, n, dim, generator=generator) for n in (heads, kv_heads, kv_heads)
    )


@pytest.mark.parametrize("window", [None, 1, 4, 9, 40])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(3, 1, 64), (6, 2, 80), (4, 4, 16)])
def test_each_sequence_is_the_textbook_of_itself(
    heads: int, kv_heads: int, dim: int, window: int | None
) -> None:
    lengths = [1, 9, 30, 9, 9, 2]
    q, k, v = draw(sum(lengths) + 4, heads, kv_heads, dim)
    out = attend(q, k, v, lengths, scale=0.3, window=window)
    for rows in parts(lengths):
        expected = textbook(q[rows], k[rows], v[rows], 0.3, window)
        torch.testing.assert_close(out[rows].double(), expected, atol=2e-6, rtol=1e-5)
    assert not out[sum(lengths) :].any(), "rows of padding are zeros"


def test_long_windows_in_blocks_are_the_mask_as_a_whole() -> None:
    q, k, v = draw(2500, 2, 1, 8)
    out = attend(q, k, v, [2500], scale=0.3, window=700)
    expected = textbook(q, k, v, 0.3, 700)
    torch.testing.assert_close(out.double(), expected, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("window", [None, 16])
def test_a_sequence_keeps_its_bits_whatever_it_is_packed_with(window: int | None) -> None:
    q, k, v = draw(300, 6, 2, 64)
    rows = slice(100, 163)
    alone = attend(q[rows], k[rows], v[rows], [63], scale=0.125, window=window)
    for lengths in ([100, 63, 137], [37, 63, 63, 63, 5], [50, 50, 63, 1]):
        packed = attend(q, k, v, lengths, scale=0.125, window=window)
        assert torch.equal(packed[rows], alone)


@pytest.mark.parametrize("sinks", [None, torch.tensor([-3.0, 0.5, 4.0, 1.0])])
@pytest.mark.parametrize("soft_cap", [None, 0.5, 20.0])
@pytest.mark.parametrize("window", [None, 1, 9, 300])
def test_caps_and_sinks_are_the_textbook(
    window: int | None, soft_cap: float | None, sinks: torch.Tensor | None
) -> None:
    lengths = [1, 9, 300, 9]
    q, k, v = draw(sum(lengths) + 4, 4, 2, 16)
    options = {"scale": 0.3, "window": window, "soft_cap": soft_cap, "sinks_H": sinks}
    out = attend(q, k, v, lengths, **options)
    for rows in parts(lengths):
        expected = mix(weigh(q[rows], k[rows], 0.3, window, soft_cap, sinks), v[rows])
        torch.testing.assert_close(out[rows].double(), expected, atol=2e-6, rtol=1e-5)
        n = rows.stop - rows.start
        assert torch.equal(attend(q[rows], k[rows], v[rows], [n], **options), out[rows])
    assert not out[sum(lengths) :].any(), "rows of padding are zeros"


def test_the_future_is_not_seen() -> None:
    q, k, v = draw(20, 2, 2, 16)
    before = attend(q, k, v, [20], scale=0.25)
    k[10:] += 5.0
    v[10:] -= 5.0
    after = attend(q, k, v, [20], scale=0.25)
    assert torch.equal(before[:10], after[:10])
    assert not torch.equal(before[10:], after[10:])


# ---- the kernel ------------------------------------------------------------------------------

# Queries and keys of a tile, warps, stages: small, for the interpreter.
SMALL = (32, 32, 4, 2)
BF16, FP16 = torch.bfloat16, torch.float16


def pack(
    num_queries: Sequence[int],
    num_keys: Sequence[int],
    heads: int,
    kv_heads: int,
    size: int,
    dtype: torch.dtype = BF16,
) -> tuple[torch.Tensor, ...]:
    """q, k, v of packed sequences with NaN in the rows behind them."""
    generator = torch.Generator().manual_seed(size + sum(num_keys))
    rows = (num_queries, heads), (num_keys, kv_heads), (num_keys, kv_heads)
    drawn = [torch.randn(sum(n) + 40, h, size, generator=generator).to(dtype) for n, h in rows]
    for x, (n, _) in zip(drawn, rows, strict=True):
        x[sum(n) :] = torch.nan
    return tuple(drawn)


def launch(
    device: torch.device,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    num_queries: Sequence[int],
    num_keys: Sequence[int] | None = None,
    *,
    scale: float = 0.3,
    config: tuple[int, int, int, int] = SMALL,
    **options: Any,
) -> torch.Tensor:
    """The kernel's rows; NaN where it wrote none."""
    tiles = gpu.lay_out_tiles(num_queries, num_keys or num_queries, config[0])
    out = torch.full(q.shape, torch.nan, dtype=q.dtype, device=device)
    q, k, v = (x.to(device) for x in (q, k, v))
    there = torch.from_numpy(tiles).to(device)
    gpu.attend(q, k, v, there, out, scale=scale, config=config, **options)
    return out.cpu()


def assert_attends(
    out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    scale: float = 0.3,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks_H: torch.Tensor | None = None,
) -> None:
    """Of one sequence: weights and results are rounded once to the dtype, sums are float32."""
    weights = weigh(q, k, scale, window, soft_cap, sinks_H)
    bound = torch.finfo(out.dtype).eps * mix(weights, v.double().abs()) + 2e-5
    error = (out.double() - mix(weights, v)).abs()
    assert (error <= bound).all(), f"{(error / bound).max().item():.2f} of the bound"


def assert_kept_from_neighbours(
    attend_packed: Callable[..., torch.Tensor], size: int, lengths: Sequence[int], bad: float
) -> None:
    """Each sequence has its bits beside others that hold nothing but `bad` numbers."""
    q, k, v = pack(lengths, lengths, 2, 2, size)
    clean = attend_packed(q, k, v, lengths)
    rows = parts(lengths)
    for i in range(len(lengths)):
        spoilt = [x.clone() for x in (q, k, v)]
        for j, others in enumerate(rows):
            if j != i:
                for x in spoilt:
                    x[others] = bad
        out = attend_packed(*spoilt, lengths)
        assert torch.equal(out[rows[i]], clean[rows[i]]), i


HEADS = [(1, 1, 64), (4, 1, 64), (3, 3, 80), (4, 2, 96), (2, 2, 128), (2, 1, 192), (2, 1, 256)]


@pytest.mark.parametrize(("heads", "kv_heads", "size"), HEADS)
@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_the_kernel_for_groups_and_sizes_of_heads(
    device: torch.device, heads: int, kv_heads: int, size: int, dtype: torch.dtype
) -> None:
    lengths = [1, 45, 32]
    q, k, v = pack(lengths, lengths, heads, kv_heads, size, dtype)
    out = launch(device, q, k, v, lengths, scale=size**-0.5)
    for rows in parts(lengths):
        assert_attends(out[rows], q[rows], k[rows], v[rows], scale=size**-0.5)
    assert out[sum(lengths) :].isnan().all(), "rows of no tile are left alone"


@pytest.mark.parametrize("length", [1, 2, 31, 32, 33, 64, 65, 100])
@pytest.mark.parametrize("window", [None, 1, 32, 40, 1000])
def test_the_kernel_for_lengths_and_windows(
    device: torch.device, length: int, window: int | None
) -> None:
    q, k, v = pack([length], [length], 2, 1, 64)
    out = launch(device, q, k, v, [length], window=window)[:length]
    assert_attends(out, q[:length], k[:length], v[:length], window=window)


@pytest.mark.parametrize("soft_cap", [0.5, 5.0, 50.0])
@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("scale", [0.125, 30.0])
def test_the_kernel_for_soft_caps(
    device: torch.device, scale: float, window: int | None, soft_cap: float
) -> None:
    """With the large scale the caps' exponentials overflow."""
    q, k, v = pack([70], [70], 2, 1, 64)
    options = {"scale": scale, "window": window, "soft_cap": soft_cap}
    out = launch(device, q, k, v, [70], **options)[:70]
    assert_attends(out, q[:70], k[:70], v[:70], **options)


@pytest.mark.parametrize("window", [None, 1, 20])
@pytest.mark.parametrize("soft_cap", [None, 5.0])
def test_the_kernel_for_sinks(
    device: torch.device, window: int | None, soft_cap: float | None
) -> None:
    q, k, v = pack([70], [70], 4, 2, 64)
    sinks = torch.tensor([-8.0, 0.0, 2.0, 9.0])
    options = {"window": window, "soft_cap": soft_cap}
    out = launch(device, q, k, v, [70], sinks_H=sinks.to(device), **options)[:70]
    assert_attends(out, q[:70], k[:70], v[:70], sinks_H=sinks, **options)


@pytest.mark.parametrize("window", [None, 5, 50])
def test_the_kernel_for_fewer_queries_than_keys(device: torch.device, window: int | None) -> None:
    """The last query faces the last key."""
    num_queries, num_keys = [1, 33, 40, 2], [1, 97, 40, 66]
    q, k, v = pack(num_queries, num_keys, 2, 1, 64)
    out = launch(device, q, k, v, num_queries, num_keys, window=window)
    for rows, seen in zip(parts(num_queries), parts(num_keys), strict=True):
        assert_attends(out[rows], q[rows], k[seen], v[seen], window=window)


@pytest.mark.parametrize("size", [64, 80])
def test_the_kernel_reads_views(device: torch.device, size: int) -> None:
    """Queries, keys and values of a token lie side by side as one product leaves them."""
    heads = torch.randn(50, 2 + 1 + 1, size, generator=torch.Generator().manual_seed(0)).to(BF16)
    q, k, v = heads.to(device).split([2, 1, 1], dim=1)
    tiles = torch.from_numpy(gpu.lay_out_tiles([50], [50], SMALL[0])).to(device)
    out = torch.empty(50, 2, size, dtype=BF16, device=device)
    gpu.attend(q, k, v, tiles, out, scale=0.3, config=SMALL)
    assert_attends(out.cpu(), q.cpu(), k.cpu(), v.cpu())


@pytest.mark.parametrize("size", [64, 80, 128, 256])
def test_the_kernel_as_it_ships(device: torch.device, size: int) -> None:
    config = gpu.CONFIGS[max(64, 1 << (size - 1).bit_length())]
    assert gpu.block_of(size) == config[0]
    length = config[0] + 3
    q, k, v = pack([length], [length], 1, 1, size)
    out = launch(device, q, k, v, [length], scale=size**-0.5, config=config)[:length]
    assert_attends(out, q[:length], k[:length], v[:length], scale=size**-0.5)


OPTIONS = [{}, {"window": 20}, {"soft_cap": 5.0}]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("length", [1, 33, 64, 70])
def test_the_kernel_keeps_the_bits_of_a_sequence(
    device: torch.device, length: int, options: dict[str, Any]
) -> None:
    """Alone, first, last, or between others."""
    q, k, v = pack([length], [length], 2, 1, 64)
    alone = launch(device, q, k, v, [length], **options)[:length]
    for before, after in [([], [40, 3]), ([40, 3], []), ([31], [32]), ([1, length], [length])]:
        lengths = [*before, length, *after]
        packed = pack(lengths, lengths, 2, 1, 64)
        rows = parts(lengths)[len(before)]
        for x, own in zip(packed, (q, k, v), strict=True):
            x[rows] = own[:length]
        assert torch.equal(launch(device, *packed, lengths, **options)[rows], alone)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("size", [64, 80])
def test_the_kernel_keeps_a_sequence_from_its_neighbours(
    device: torch.device, size: int, bad: float, options: dict[str, Any]
) -> None:
    assert_kept_from_neighbours(partial(launch, device, **options), size, [5, 37, 32, 9], bad)


# ---- tiles -----------------------------------------------------------------------------------


@given(
    sequences=st.lists(st.tuples(st.integers(0, 70), st.integers(0, 50)), max_size=12),
    block=st.sampled_from([1, 7, 16, 64]),
)
def test_tiles_hold_every_query_once(sequences: list[tuple[int, int]], block: int) -> None:
    queries = [n for n, _ in sequences]
    keys = [n + more for n, more in sequences]
    tiles = gpu.lay_out_tiles(queries, keys, block)
    assert tiles.dtype == np.int32 and tiles.shape[1:] == (4,)
    assert tiles.flags.c_contiguous
    assert (np.diff(tiles[:, 3]) <= 0).all(), "long tiles come first"
    held = sorted(
        (first + i, first_key, place + i)
        for first, count, first_key, place in tiles.tolist()
        for i in range(count)
    )
    expected = [
        (rows.start + i, seen.start, n - m + i)
        for rows, seen, m, n in zip(parts(queries), parts(keys), queries, keys, strict=True)
        for i in range(m)
    ]
    assert held == expected
    # A sequence is cut at every `block` of its keys, wherever it lies.
    starts = {rows.start: rows for rows in parts(queries) if rows.start < rows.stop}
    for first, count, _, place in tiles.tolist():
        rows = starts[max(start for start in starts if start <= first)]
        assert first == rows.start or place % block == 0
        assert count == min(block - place % block, rows.stop - first)


# ---- which one computes ----------------------------------------------------------------------


@pytest.fixture
def _on_a_gpu(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The kernel is chosen for every device, and cuDNN for heads above 80."""
    line = Choice(triton=True, attention="triton", cudnn_above=80)
    monkeypatch.setattr(attention, "choose", lambda device: line)
    if device.type == "cpu":
        monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: x)
    attention._tiles.cache_clear()
    yield
    attention._tiles.cache_clear()


@pytest.mark.usefixtures("_on_a_gpu")
@pytest.mark.parametrize("is_there", [True, False])
@pytest.mark.parametrize(
    ("size", "options"),
    [
        (128, {}),
        (128, {"window": 16}),
        (128, {"soft_cap": 5.0}),
        (128, {"sinks_H": torch.tensor([0.5, -1.0])}),
        (64, {}),
        (80, {}),
        (264, {}),
    ],
)
def test_cudnn_is_taken_where_it_is_there_and_faster(
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
    size: int,
    options: dict[str, Any],
    is_there: bool,
) -> None:
    sent: list[dict[str, Any]] = []

    def stand_in(*given: Any, **options: Any) -> None:
        sent.append(options | {"lengths": given[3]})
        given[4][: sum(given[3])] = 7.0

    monkeypatch.setattr(cudnn, "suits", lambda *_, **__: is_there)
    monkeypatch.setattr(cudnn, "attend", stand_in)
    lengths = [3, 70, 40]
    q, k, v = pack(lengths, lengths, 2, 1, size)
    there = {n: x.to(device) if n == "sinks_H" else x for n, x in options.items()}
    out = attend(*(x.to(device) for x in (q, k, v)), lengths, scale=0.3, **there).cpu()
    if is_there and size == 128 and not {"soft_cap", "sinks_H"} & set(options):
        assert sent == [{"lengths": (3, 70, 40), "scale": 0.3, "window": options.get("window")}]
        assert (out[: sum(lengths)] == 7.0).all()
    else:
        assert not sent
        for rows in parts(lengths):
            assert_attends(out[rows], q[rows], k[rows], v[rows], **options)
    assert not out[sum(lengths) :].any(), "rows of padding are zeros"


# ---- cuDNN -----------------------------------------------------------------------------------


@pytest.fixture
def _cudnn() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")
    if cudnn.find_version() is None:
        pytest.skip("needs cuDNN's front end")


CUDNN_HEADS = [
    *((4, 1, size) for size in (64, 72, 80, 96, 112, 160, 192, 224, 256)),
    (1, 1, 64),
    (6, 2, 128),
]


def run_cudnn(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lengths: Sequence[int],
    *,
    scale: float = 0.3,
    window: int | None = None,
) -> torch.Tensor:
    """cuDNN's rows; NaN where it wrote none."""
    out = torch.full(q.shape, torch.nan, dtype=q.dtype, device="cuda")
    there = (x.cuda() for x in (q, k, v))
    cudnn.attend(*there, tuple(lengths), out, scale=scale, window=window)
    return out.cpu()


@pytest.mark.gpu
@pytest.mark.usefixtures("_cudnn")
@pytest.mark.parametrize(("heads", "kv_heads", "size"), CUDNN_HEADS)
@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("window", [None, 1, 20, 64, 300])
def test_cudnn_is_the_textbook(
    heads: int, kv_heads: int, size: int, dtype: torch.dtype, window: int | None
) -> None:
    lengths = [1, 45, 32, 513, 128]
    q, k, v = pack(lengths, lengths, heads, kv_heads, size, dtype)
    out = run_cudnn(q, k, v, lengths, scale=size**-0.5, window=window)
    for rows in parts(lengths):
        assert_attends(out[rows], q[rows], k[rows], v[rows], scale=size**-0.5, window=window)
    assert out[sum(lengths) :].isnan().all(), "rows of no sequence are left alone"


@pytest.mark.gpu
@pytest.mark.usefixtures("_cudnn")
@pytest.mark.parametrize("window", [None, 200])
@pytest.mark.parametrize("size", [64, 96, 128, 192, 256])
def test_cudnn_keeps_the_bits_of_a_sequence(size: int, window: int | None) -> None:
    """Alone, between others, with views of rows that are wider, and in plans of other sizes."""
    for length in (1, 63, 64, 129, 1000, 4097):
        q, k, v = pack([length], [length], 4, 2, size)
        alone = run_cudnn(q, k, v, [length], window=window)[:length]
        for before, after in [
            ([], [40, 3]),
            ([31], [32]),
            ([5] * 90, [length]),
            ([7], [9000]),
            ([20000], []),
            ([1] * 5000, [70_000]),
        ]:
            lengths = [*before, length, *after]
            packed = torch.cat(pack(lengths, lengths, 4, 4, size), 1)[:, :8]
            rows = parts(lengths)[len(before)]
            views = packed.split([4, 2, 2], 1)
            for x, own in zip(views, (q, k, v), strict=True):
                x[rows] = own[:length]
            wide = [x.cuda() for x in packed.cuda().split([4, 2, 2], 1)]
            out = torch.full((len(packed), 4, size), torch.nan, dtype=BF16, device="cuda")
            cudnn.attend(*wide, tuple(lengths), out, scale=0.3, window=window)
            assert torch.equal(out[rows].cpu(), alone), (length, len(before), len(after))


@pytest.mark.gpu
@pytest.mark.usefixtures("_cudnn")
def test_heads_that_cudnn_does_not_take_are_said_to_be_so(caplog: pytest.LogCaptureFixture) -> None:
    for size, suits in ((64, True), (256, True), (100, False)):
        q, k, v = (x.cuda() for x in pack([3], [3], 2, 1, size))
        assert cudnn.suits(q, k, v, scale=0.3, window=None) is suits
    assert "cuDNN has none for heads of 100" in caplog.text


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (91900, 91900),
        (92000, 92000),
        (91001, None),
        (ImportError(), None),
        (OSError("no libcudnn"), None),
        (AssertionError("two of them"), None),
    ],
)
def test_cudnn_is_asked_for_its_version(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    found: int | Exception,
    expected: int | None,
) -> None:
    def backend_version() -> int:
        if isinstance(found, Exception):
            raise found
        return found

    frontend = None if isinstance(found, ImportError) else types.ModuleType("cudnn")
    if frontend is not None:
        frontend.backend_version = backend_version  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "cudnn", frontend)
    cudnn.find_version.cache_clear()
    try:
        assert cudnn.find_version() == expected
    finally:
        cudnn.find_version.cache_clear()
    assert bool(caplog.records) == (expected is None and frontend is not None)


@pytest.mark.gpu
@pytest.mark.usefixtures("_cudnn")
@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("size", [64, 72, 96, 128, 192, 256])
def test_cudnn_keeps_a_sequence_from_its_neighbours(
    size: int, bad: float, window: int | None
) -> None:
    lengths = [5, 37, 300, 32, 9]
    assert_kept_from_neighbours(partial(run_cudnn, window=window), size, lengths, bad)
