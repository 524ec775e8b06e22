"""Activations in 8 bits: how far a number moves, what becomes of special ones, and the kernel."""

from __future__ import annotations

import pytest
import torch
from by_rows import DTYPES, LAYOUTS, SHAPES, assert_same_bits, poison, takes
from logitmill.kernels.quantize import (
    FP8_MAX,
    GROUP,
    INT8_MAX,
    Activations,
    Layout,
    dequantize,
    quantize,
)

gpu = pytest.importorskip("logitmill.kernels.gpu.quantize")

NARROW = [layout for layout in LAYOUTS if layout != Layout.PLAIN]
FP8 = [Layout.FP8_ROWS, Layout.FP8_GROUPS]
TOP = {Layout.FP8_ROWS: FP8_MAX, Layout.FP8_GROUPS: FP8_MAX, Layout.INT8_ROWS: INT8_MAX}


def draw(num_rows: int, num_columns: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Rows of sizes from 1e-4 to 1e4 with an outlier each."""
    generator = torch.Generator().manual_seed(num_rows * num_columns)
    x = torch.randn(num_rows, num_columns, generator=generator)
    x *= 10 ** torch.linspace(-4, 4, num_rows)[:, None]
    x[torch.arange(num_rows), torch.arange(num_rows) % num_columns] *= 20
    return x.clamp(-6e4, 6e4).to(dtype)


def widest(x_TK: torch.Tensor, layout: Layout) -> torch.Tensor:
    """max |x| of what shares a scale with each element, float64 [T, K]."""
    size = GROUP if layout == Layout.FP8_GROUPS else x_TK.shape[1]
    parts = x_TK.double().abs().unflatten(1, (-1, size))
    return parts.amax(-1, keepdim=True).expand_as(parts).flatten(1)


def run(device: torch.device | None, x: torch.Tensor, layout: Layout) -> Activations:
    """The kernel where it runs, or the definition; results on the CPU."""
    if device is None:
        return quantize(x, layout)
    out = gpu.quantize(x.to(device), layout)
    return Activations(*(None if part is None else part.cpu() for part in out))


@pytest.fixture(params=["definition", "kernel"])
def where(request: pytest.FixtureRequest) -> torch.device | None:
    return None if request.param == "definition" else request.getfixturevalue("device")


@pytest.mark.parametrize("layout", NARROW)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_number_moves_by_half_a_step(layout: Layout, dtype: torch.dtype) -> None:
    x = draw(11, 640, dtype)
    out = quantize(x, layout)
    assert out.scales is not None and out.scales.dtype == torch.float32
    assert out.scales.shape == (11, 5 if layout == Layout.FP8_GROUPS else 1)
    exact, top = x.double(), widest(x, layout)
    moved = (dequantize(out).double() - exact).abs()
    if layout == Layout.INT8_ROWS:
        bound = 0.5 * top / INT8_MAX
    else:
        # Three bits behind the point; below 2^-6, steps of 2^-9.
        bound = torch.maximum(exact.abs() * 2**-4, top / FP8_MAX * 2**-10)
    assert (moved <= bound + 1e-6 * top).all()


@pytest.mark.parametrize("layout", NARROW)
def test_the_largest_number_becomes_the_largest_code(
    where: torch.device | None, layout: Layout
) -> None:
    x = draw(64, 256)
    values = run(where, x, layout).values_TK.float()
    top = x.abs().double() == widest(x, layout)
    assert top.any(1).all()
    assert torch.equal(values[top], TOP[layout] * x[top].sign())
    assert (values.abs() <= TOP[layout]).all()


@pytest.mark.parametrize("layout", NARROW)
def test_zeros_stay_zeros(where: torch.device | None, layout: Layout) -> None:
    x = torch.zeros(3, 128)
    x[1, 5] = 1e-40
    x[2] = -0.0
    out = run(where, x, layout)
    assert out.scales is not None and (out.scales > 0).all()
    assert not out.values_TK.float().any()


@pytest.mark.parametrize("layout", FP8)
def test_ties_go_to_the_even_code_of_e4m3(where: torch.device | None, layout: Layout) -> None:
    least = 2**-9
    pairs = [(17, 16), (19, 20), (-17, -16), (1.0625, 1), (1.1875, 1.25), (400, 384), (432, 448)]
    pairs += [(steps * least, code * least) for steps, code in [(0.5, 0), (1.5, 2), (2.5, 2)]]
    # The last tie below the smallest normal number, 2^-6, goes up to it.
    pairs += [(-3.5 * least, -4 * least), (7.5 * least, 2**-6), (0.51 * least, least)]
    x = torch.zeros(1, 128)
    x[0, : len(pairs)] = torch.tensor([number for number, _ in pairs])
    x[0, -1] = FP8_MAX  # So that the scale is 1.
    out = run(where, x, layout)
    assert out.scales is not None and out.scales.item() == 1.0
    assert out.values_TK.float()[0, : len(pairs)].tolist() == [code for _, code in pairs]


def test_ties_go_to_the_even_integer(where: torch.device | None) -> None:
    x = torch.zeros(1, 128)
    x[0, :8] = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, 125.5, 126.5, -126.5])
    x[0, -1] = INT8_MAX
    out = run(where, x, Layout.INT8_ROWS)
    assert out.scales is not None and out.scales.item() == 1.0
    assert out.values_TK[0, :8].tolist() == [0, 2, 2, 0, -2, 126, 126, -126]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of the interpreter
@pytest.mark.parametrize("layout", NARROW)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_bad_number_is_never_made_good(
    where: torch.device | None, layout: Layout, bad: float
) -> None:
    """Its row or group means nothing afterwards; the others are as without it."""
    x = draw(5, 256)
    x[2, 40] = bad
    out = run(where, x, layout)
    assert out.scales is not None
    spoilt = torch.zeros(5, out.scales.shape[1], dtype=torch.bool)
    spoilt[2, 0] = True
    assert torch.equal(~out.scales.isfinite(), spoilt)
    x[2, 40] = 0.0
    good = quantize(x, layout)
    same = ~spoilt.repeat_interleave(256 // out.scales.shape[1], 1)
    assert good.scales is not None
    assert_same_bits(out.scales[~spoilt], good.scales[~spoilt])
    assert_same_bits(out.values_TK[same], good.values_TK[same])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_kernel_to_the_bit(
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
    shape: tuple[int, int],
    dtype: torch.dtype,
    layout: Layout,
) -> None:
    if not takes(layout, shape[1]):
        pytest.skip("groups are whole")
    x = draw(*shape, dtype)
    x[-1, ::2] = 0.0
    expected = quantize(x, layout)
    poison(monkeypatch)
    out = gpu.quantize(x.to(device), layout)
    assert_same_bits(out.values_TK, expected.values_TK)
    if expected.scales is not None:
        assert_same_bits(out.scales, expected.scales)
        assert out.scales.t().is_contiguous(), "as the products of the library take them"


@pytest.mark.parametrize("layout", NARROW)
def test_what_is_meant_is_values_times_scales(layout: Layout) -> None:
    out = quantize(draw(4, 256), layout)
    assert out.scales is not None
    scales = out.scales.repeat_interleave(256 // out.scales.shape[1], 1)
    assert torch.equal(dequantize(out), out.values_TK.float() * scales)


def test_plain_activations_are_the_tensor_itself() -> None:
    x = draw(2, 8, torch.bfloat16)
    out = quantize(x, Layout.PLAIN)
    assert out.values_TK is x and out.scales is None
    assert torch.equal(dequantize(out), x.float())
