"""Rows sorted by expert, multiplied and put together again; kernels against their definitions."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from by_rows import LAYOUTS, assert_same_bits, poison, takes
from logitmill.kernels import experts
from logitmill.kernels.quantize import Activations, Layout, dequantize, quantize

gpu = pytest.importorskip("logitmill.kernels.gpu.experts")

FORMATS = ["plain", "fp8", "fp8_blocks", "fp8_groups", "int8"]
LAYOUT = {
    "plain": Layout.PLAIN,
    "fp8": Layout.FP8_ROWS,
    "fp8_blocks": Layout.FP8_GROUPS,
    "fp8_groups": Layout.FP8_GROUPS,
    "int8": Layout.INT8_ROWS,
}
# Rows of each expert.
COUNTS = {
    "some": [7, 0, 33, 1, 0],
    "one expert": [0, 0, 41, 0, 0],
    "the last": [0, 0, 0, 0, 5],
    "a whole tile": [16, 32, 0, 48, 16],
}
# (N, K): multiples of nothing, and less than a tile.
SIZES = {"fp8_blocks": (200, 384), "fp8_groups": (136, 256)}


def offsets_of(counts: list[int]) -> torch.Tensor:
    return torch.tensor([0, *counts]).cumsum(0).to(torch.int32)


def draw(
    name: str,
    num_experts: int,
    num_rows: int,
    num_columns: int,
    depth: int,
    dtype: torch.dtype = torch.bfloat16,
) -> tuple[Activations, torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor]:
    """x, weight [E, N, K], its scales, a bias, and the weight as it is meant in float64."""
    generator = torch.Generator().manual_seed(num_rows)
    x = torch.randn(num_rows, depth, generator=generator)
    x *= torch.logspace(-1, 1, num_rows)[:, None]
    weight = torch.randn(num_experts, num_columns, depth, generator=generator)
    bias = torch.randn(num_experts, num_columns, generator=generator).to(dtype)
    if name == "plain":
        x, weight = x.to(dtype), weight.to(dtype)
        return Activations(x), weight, None, bias, weight.double()
    rows = Layout.INT8_ROWS if name == "int8" else Layout.FP8_ROWS
    values, scales = quantize(weight.flatten(0, 1), rows)
    assert scales is not None
    weight, scales = values.view(weight.shape), scales.view(num_experts, num_columns)
    meant = weight.double()
    if name in ("fp8", "int8"):
        return quantize(x, LAYOUT[name]), weight, scales, bias, meant * scales[..., None].double()
    blocks = math.ceil(num_columns / 128) if name == "fp8_blocks" else num_columns
    shape = (num_experts, blocks, depth // 128)
    scales = 0.01 + torch.rand(shape, generator=generator)
    wide = scales.repeat_interleave(128 if name == "fp8_blocks" else 1, 1)[:, :num_columns]
    meant = meant * wide.repeat_interleave(128, 2).double()
    return quantize(x, LAYOUT[name]), weight, scales, bias, meant


def multiply(
    name: str,
    x: Activations,
    weight: torch.Tensor,
    scales: torch.Tensor | None,
    offsets: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
    **more: Any,
) -> torch.Tensor:
    """The product of one format, as `kernels.experts` has it."""
    if name == "plain":
        return experts.multiply(x.values_TK, weight, offsets, bias, **more)
    function = {
        "fp8": experts.multiply_fp8,
        "int8": experts.multiply_int8,
        "fp8_blocks": experts.multiply_fp8_groups,
        "fp8_groups": experts.multiply_fp8_groups,
    }[name]
    assert scales is not None
    return function(x, weight, scales, offsets, bias, dtype, **more)


def exact(x: Activations, meant: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """The product in float64."""
    wide = dequantize(x).double()
    bounds = list(pairwise(offsets.tolist()))
    return torch.cat([wide[a:b] @ meant[e].T for e, (a, b) in enumerate(bounds)])


def check(out: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    """Within what rounding to `dtype` once allows, and the sums of float32, row by row."""
    assert out.dtype == dtype and out.shape == expected.shape
    step = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 1e-6}[dtype]
    size = expected.square().mean(1, keepdim=True).sqrt()
    # The tensor cores of a GPU keep about 14 bits of a sum of e4m3 products.
    sums = 1e-3 if out.is_cuda else 2e-6
    error = (out.cpu().double() - expected).abs()
    assert (error <= 1.01 * step * expected.abs() + sums * size).all()


# ---- the definitions -------------------------------------------------------------------------


@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("name", FORMATS)
def test_rows_meet_their_own_expert(
    name: str, biased: bool, counts: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    offsets = offsets_of(COUNTS[counts])
    shape = SIZES.get(name, (72, 96))
    x, weight, scales, bias, meant = draw(name, 5, int(offsets[-1]), *shape, torch.float32)
    poison(monkeypatch)
    out = multiply(name, x, weight, scales, offsets, bias if biased else None, torch.float32)
    monkeypatch.undo()
    expected = exact(x, meant, offsets)
    if biased:
        expected += bias.double().repeat_interleave(torch.tensor(COUNTS[counts]), 0)
    check(out, expected, torch.float32)


@pytest.mark.parametrize("name", FORMATS)
def test_a_row_has_the_same_bits_alone(name: str) -> None:
    offsets = offsets_of([4, 30])
    x, weight, scales, bias, _ = draw(name, 2, 34, *SIZES.get(name, (72, 96)), torch.float32)
    whole = multiply(name, x, weight, scales, offsets, bias, torch.float32)
    for row, alone in ((2, [1, 0]), (20, [0, 1])):
        few = Activations(*(None if part is None else part[row : row + 1] for part in x))  # type: ignore[arg-type]
        out = multiply(name, few, weight, scales, offsets_of(alone), bias, torch.float32)
        assert_same_bits(out, whole[row : row + 1])


@pytest.mark.parametrize("name", FORMATS)
def test_experts_can_be_multiplied_a_few_at_a_time(name: str) -> None:
    offsets = offsets_of([4, 0, 9, 3])
    x, weight, scales, bias, _ = draw(name, 4, 16, *SIZES.get(name, (72, 96)), torch.float32)
    whole = multiply(name, x, weight, scales, offsets, bias, torch.float32)
    out = torch.full_like(whole, torch.nan)
    for few in (slice(0, 1), slice(1, 4)):
        part = None if scales is None else scales[few]
        within = offsets[few.start : few.stop + 1]
        multiply(name, x, weight[few], part, within, bias[few], torch.float32, out=out)
    assert_same_bits(out, whole)


def test_tokens_are_sorted_by_expert_in_their_own_order() -> None:
    ids = torch.randint(0, 6, (40, 3), generator=torch.Generator().manual_seed(0))
    ids[ids == 4] = 5
    order = experts.sort(ids, 6)
    assert order.offsets.dtype == torch.int32
    assert order.offsets.diff().tolist() == ids.flatten().bincount(minlength=6).tolist()
    for expert, (start, end) in enumerate(pairwise(order.offsets.tolist())):
        assert order.tokens_R[start:end].tolist() == (ids == expert).nonzero()[:, 0].tolist()
        assert (order.rows_TK[ids == expert] < end).all()
        assert (order.rows_TK[ids == expert] >= start).all()
    assert torch.equal(order.tokens_R[order.rows_TK], torch.arange(40)[:, None].expand(-1, 3))


def draw_choices(
    num_tokens: int, num_choices: int, num_columns: int, dtype: torch.dtype
) -> tuple[torch.Tensor, ...]:
    """y, rows, weights, shared and its gate."""
    generator = torch.Generator().manual_seed(num_columns)
    num_rows = num_tokens * num_choices
    y = torch.randn(num_rows, num_columns, generator=generator).to(dtype)
    rows = torch.randperm(num_rows, generator=generator).view(num_tokens, num_choices)
    weights = torch.rand(num_tokens, num_choices, generator=generator)
    shared = torch.randn(num_tokens, num_columns, generator=generator).to(dtype)
    return y, rows, weights, shared, torch.rand(num_tokens, generator=generator)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_what_experts_gave_is_added_and_rounded_once(dtype: torch.dtype) -> None:
    y, rows, weights, shared, gate = draw_choices(30, 4, 80, dtype)
    expected = (y.double()[rows] * weights.double()[..., None]).sum(1)
    step = 2.0**-8 if dtype == torch.bfloat16 else 1e-6
    for more, further in (
        ((), 0),
        ((shared,), shared.double()),
        ((shared, gate), shared.double() * gate.double()[:, None]),
    ):
        out = experts.combine(y, rows, weights, *more)
        assert out.dtype == dtype
        torch.testing.assert_close(out.double(), expected + further, atol=2e-6, rtol=step)


def test_scores_are_float32() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50, 96, generator=generator).bfloat16()
    weight, bias = torch.randn(7, 96, generator=generator), torch.randn(7, generator=generator)
    for held in (weight, weight.bfloat16()):
        out = experts.score(x, held, bias)
        assert out.dtype == torch.float32
        expected = x.double() @ held.double().T + bias.double()
        torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=1e-5)
        assert torch.equal(experts.score(x[3:4], held, bias), out[3:4])


# ---- the kernels -----------------------------------------------------------------------------


# Small tiles, of which an expert takes several; the interpreter's time goes by their number.
POINTERS = gpu.Tiles(16, 32, 32, warps=4, stages=2, band=2)
TMA = POINTERS._replace(tma=True)
TILES = {
    "pointers": POINTERS,
    "tma": TMA,
    "persistent": TMA._replace(persistent=True),
}


def run(
    name: str,
    operands: tuple[Any, ...],
    offsets: torch.Tensor,
    dtype: torch.dtype,
    device: torch.device,
    tiles: Any = None,
) -> torch.Tensor:
    """The kernel's product, over outputs that were NaN."""
    x, weight, scales, bias, _ = operands
    out = torch.full((len(x.values_TK), weight.shape[1]), torch.nan, dtype=dtype, device=device)
    gpu.multiply(
        Activations(*(None if part is None else part.to(device) for part in x)),
        weight.to(device),
        None if scales is None else scales.to(device),
        offsets.to(device),
        None if bias is None else bias.to(device),
        out,
        tiles=tiles,
    )
    return out


def fit(name: str, tiles: Any) -> Any:
    return tiles._replace(depth=128) if name in SIZES else tiles


@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("tiles", TILES)
@pytest.mark.parametrize("name", FORMATS)
def test_the_kernel_multiplies_rows_by_their_expert(
    device: torch.device, name: str, tiles: str, counts: str
) -> None:
    offsets = offsets_of(COUNTS[counts])
    # Lines of whole 16 bytes, as the accelerator moves them.
    shape = SIZES.get(name, (72, 80))
    dtype = torch.float32 if name == "int8" else torch.bfloat16
    x, weight, scales, bias, meant = draw(name, 5, int(offsets[-1]), *shape)
    biased = counts != "some"
    operands = (x, weight, scales, bias if biased else None, meant)
    out = run(name, operands, offsets, dtype, device, fit(name, TILES[tiles]))
    if name == "int8":
        expected = multiply(name, x, weight, scales, offsets, operands[3], dtype)
        assert_same_bits(out, expected)
        return
    expected = exact(x, meant, offsets)
    if biased:
        expected += bias.double().repeat_interleave(torch.tensor(COUNTS[counts]), 0)
    check(out, expected, dtype)


@pytest.mark.parametrize("name", FORMATS)
def test_a_kernels_own_tiles(device: torch.device, name: str) -> None:
    """As they ship, at sizes around one tile."""
    offsets = offsets_of([130, 0, 3])
    x, weight, scales, bias, meant = draw(name, 3, 133, *SIZES.get(name, (264, 144)))
    out = run(name, (x, weight, scales, bias, meant), offsets, torch.bfloat16, device)
    expected = exact(x, meant, offsets)
    check(out, expected + bias.double().repeat_interleave(offsets.diff(), 0), torch.bfloat16)


@pytest.mark.parametrize(("num_columns", "depth"), [(37, 51), (5, 9)])
@pytest.mark.parametrize("name", ["plain", "int8", "fp8"])
def test_odd_sizes_take_no_accelerator(
    device: torch.device, name: str, num_columns: int, depth: int
) -> None:
    offsets = offsets_of([3, 0, 20])
    x, weight, scales, bias, meant = draw(name, 3, 23, num_columns, depth)
    out = run(name, (x, weight, scales, bias, meant), offsets, torch.float16, device)
    expected = exact(x, meant, offsets)
    check(out, expected + bias.double().repeat_interleave(offsets.diff(), 0), torch.float16)


@pytest.mark.parametrize("wide", [False, True])
def test_the_kernel_scores_in_float32(device: torch.device, wide: bool) -> None:
    """A router's weights, in the dtype of its input or in float32."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(70, 80, generator=generator).bfloat16()
    weight = torch.randn(1, 9, 80, generator=generator)
    weight = weight if wide else weight.bfloat16()
    bias = torch.randn(1, 9, generator=generator)
    operands = (Activations(x), weight, None, bias, None)
    out = run("plain", operands, offsets_of([70]), torch.float32, device)
    expected = x.double() @ weight[0].double().T + bias.double()
    torch.testing.assert_close(out.cpu().double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("tiles", TILES)
@pytest.mark.parametrize("name", FORMATS)
def test_a_kernel_gives_a_row_the_same_bits_alone(
    device: torch.device, name: str, tiles: str
) -> None:
    shape = SIZES.get(name, (72, 80))
    x, weight, scales, bias, _ = draw(name, 2, 34, *shape)
    own = fit(name, TILES[tiles])
    whole = run(
        name, (x, weight, scales, bias, None), offsets_of([4, 30]), torch.float32, device, own
    )
    for row, alone in ((2, [1, 0]), (20, [0, 1])):
        few = Activations(*(None if part is None else part[row : row + 1] for part in x))  # type: ignore[arg-type]
        operands = (few, weight, scales, bias, None)
        out = run(name, operands, offsets_of(alone), torch.float32, device, own)
        assert_same_bits(out, whole[row : row + 1])


def test_a_kernel_keeps_the_rows_of_other_experts(device: torch.device) -> None:
    x, weight, _, bias, _ = draw("plain", 4, 40, 72, 80)
    offsets = offsets_of([4, 0, 29, 7])
    whole = run("plain", (x, weight, None, bias, None), offsets, torch.bfloat16, device)
    x_there = Activations(x.values_TK.to(device))
    for tiles in (None, POINTERS, TMA):
        out = torch.full_like(whole, 3.0)
        few = (weight[1:3].to(device), None, offsets[1:4].to(device), bias[1:3].to(device))
        gpu.multiply(x_there, *few, out, tiles=tiles)
        torch.testing.assert_close(out[4:33], whole[4:33], atol=0.1, rtol=0.01)
        assert (out[:4] == 3).all() and (out[33:] == 3).all()


@pytest.mark.parametrize("num_columns", [80, 256, 77])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_kernel_gathers_rows_and_scales(
    device: torch.device, layout: Layout, num_columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not takes(layout, num_columns):
        pytest.skip("no groups of columns")
    generator = torch.Generator().manual_seed(0)
    x = quantize(torch.randn(9, num_columns, generator=generator).bfloat16(), layout)
    rows = torch.randint(0, 9, (30,), generator=generator)
    expected = experts.gather(x, rows)
    there = Activations(*(None if part is None else part.to(device) for part in x))
    poison(monkeypatch)
    out = gpu.gather(there, rows.to(device))
    monkeypatch.undo()
    assert_same_bits(out.values_TK, expected.values_TK)
    if layout != Layout.PLAIN:
        assert_same_bits(out.scales.contiguous(), expected.scales.contiguous())  # type: ignore[union-attr]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("num_choices", "num_columns"), [(1, 70), (4, 1100), (8, 64)])
def test_the_kernel_combines_to_the_same_bits(
    device: torch.device, num_choices: int, num_columns: int, dtype: torch.dtype
) -> None:
    y, rows, weights, shared, gate = draw_choices(11, num_choices, num_columns, dtype)
    for more in ((None, None), (shared, None), (shared, gate)):
        expected = experts.combine(y, rows, weights, *more)
        there = [None if part is None else part.to(device) for part in (y, rows, weights, *more)]
        assert_same_bits(gpu.combine(*there), expected)
