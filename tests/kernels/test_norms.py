"""Normalisation against its formula in float64, and the kernel against the definition."""

from __future__ import annotations

import pytest
import torch
from by_rows import (
    DTYPES,
    LAYOUTS,
    SHAPES,
    assert_near_activations,
    assert_same_bits,
    poison,
    takes,
)
from logitmill.kernels.norms import NormWeights, add_norm, normalise
from logitmill.kernels.quantize import Layout, dequantize

gpu = pytest.importorskip("logitmill.kernels.gpu.norms")


def formula(x: torch.Tensor, norm: NormWeights) -> torch.Tensor:
    wide = x.double()
    if norm.centred:
        wide = wide - wide.mean(-1, keepdim=True)
    normed = wide / (wide.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight.double()
    return normed if norm.bias is None else normed + norm.bias.double()


def draw(num_rows: int, num_columns: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """x, delta and a weight near 1."""
    generator = torch.Generator().manual_seed(num_rows * num_columns)
    x, delta = torch.randn(2, num_rows, num_columns, generator=generator)
    weight = 1 + 0.3 * torch.randn(num_columns, generator=generator)
    return (3 * x).to(dtype), delta.to(dtype), weight.to(dtype)


@pytest.mark.parametrize("shape", [(5, 72), (5, 3, 80), (1, 1)])
@pytest.mark.parametrize("eps", [1e-6, 1e-2])
def test_formula(shape: tuple[int, ...], eps: float) -> None:
    generator = torch.Generator().manual_seed(0)
    x = 3 * torch.randn(*shape, generator=generator)
    weight = torch.randn(shape[-1], generator=generator)
    for norm in (NormWeights(weight, eps), NormWeights(weight, eps, weight.flip(0), centred=True)):
        expected = formula(x, norm)
        torch.testing.assert_close(normalise(x, norm).double(), expected, atol=2e-6, rtol=1e-6)


def test_transformers_agree() -> None:
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    x, _, weight = draw(7, 96, torch.float32)
    module = LlamaRMSNorm(96, eps=1e-5)
    module.weight.data.copy_(weight)
    with torch.no_grad():
        expected = module(x)
    norm = NormWeights(weight, 1e-5)
    torch.testing.assert_close(normalise(x, norm), expected, atol=1e-6, rtol=1e-6)
    bias = weight - 1
    expected = torch.nn.functional.layer_norm(x, (96,), weight, bias, 1e-5)
    norm = NormWeights(weight, 1e-5, bias, centred=True)
    torch.testing.assert_close(normalise(x, norm), expected, atol=1e-6, rtol=1e-6)


def test_narrow_rows_are_averaged_wide() -> None:
    """300^2 is beyond float16: the mean square must not be taken there."""
    x = torch.full((2, 64), 300.0, dtype=torch.float16)
    out = normalise(x, NormWeights(torch.ones(64, dtype=torch.float16), 1e-6))
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, torch.ones(2, 64))


def test_a_row_of_zeros_stays_zero() -> None:
    assert not normalise(torch.zeros(2, 8), NormWeights(torch.ones(8), 1e-6)).any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_sum_is_stored_and_its_norm_rounded_once(dtype: torch.dtype) -> None:
    x, delta, weight = draw(7, 256, dtype)
    total = (x.double() + delta.double()).to(dtype)
    norm = NormWeights(weight, 1e-5)
    expected = formula(total, norm)
    stream = x.clone()
    out = add_norm(stream, delta, norm, Layout.PLAIN).values_TK
    assert_same_bits(stream, total)
    assert out.dtype == dtype
    torch.testing.assert_close(
        out.double(), expected, atol=1e-6, rtol=max(1e-6, torch.finfo(dtype).eps / 2 * 1.001)
    )
    # Rounded to bfloat16 on its way, the largest number alone would move by a quarter of a step.
    codes = add_norm(x.clone(), delta, norm, Layout.INT8_ROWS)
    step = expected.abs().amax(-1, keepdim=True) / 127
    assert ((dequantize(codes).double() - expected).abs() <= 0.501 * step).all()


def test_without_a_sum_the_stream_is_left_alone() -> None:
    x, _, weight = draw(3, 64, torch.bfloat16)
    stream = x.clone()
    norm = NormWeights(weight, 1e-5)
    out = add_norm(stream, None, norm, Layout.PLAIN).values_TK
    assert_same_bits(stream, x)
    assert_same_bits(out, normalise(x, norm).bfloat16())


def test_without_a_norm_it_is_the_sum() -> None:
    """And a copy of it: the stream goes on."""
    x, delta, _ = draw(3, 64, torch.bfloat16)
    stream = x.clone()
    out = add_norm(stream, delta, None, Layout.PLAIN, scale=0.5).values_TK
    assert_same_bits(out, (x.float() + 0.5 * delta.float()).bfloat16())
    assert_same_bits(out, stream)
    stream += 1
    assert not torch.equal(out, stream)


def make(weight: torch.Tensor, kind: str) -> NormWeights | None:
    if kind == "none":
        return None
    if kind == "layer":
        return NormWeights(weight, 1e-5, weight.flip(0) - 1, centred=True)
    return NormWeights(weight, 1e-5, centred=kind == "layer without bias")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("summed", "kind"),
    [(False, "rms"), (True, "rms"), (True, "layer"), (False, "layer without bias"), (True, "none")],
)
def test_the_kernel(
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
    summed: bool,
    kind: str,
    shape: tuple[int, int],
    dtype: torch.dtype,
    layout: Layout,
) -> None:
    if not takes(layout, shape[1]):
        pytest.skip("groups are whole")
    x, delta, weight = draw(*shape, dtype)
    x[0], delta[0] = 0.0, 0.0
    there, delta_there, weight_there = (part.to(device, copy=True) for part in (x, delta, weight))
    scale = 0.25 if kind == "layer" else 1.0
    norm, norm_there = make(weight, kind), make(weight_there, kind)
    expected = add_norm(x, delta if summed else None, norm, layout, scale=scale)
    poison(monkeypatch)
    out = gpu.add_norm(there, delta_there if summed else None, norm_there, layout, scale)
    assert_same_bits(there, x)
    assert_same_bits(delta_there, delta)
    # Where the mean is taken off, and a bias added, what is left may be small.
    assert_near_activations(out, expected, atol=2e-6 if kind.startswith("layer") else 0.0)


def test_the_kernel_averages_narrow_rows_wide(device: torch.device) -> None:
    x = torch.full((2, 96), 300.0, dtype=torch.float16, device=device)
    out = gpu.add_norm(x, None, NormWeights(torch.ones_like(x[0]), 1e-6), Layout.PLAIN).values_TK
    assert_same_bits(out, torch.ones(2, 96, dtype=torch.float16))


def test_the_kernel_takes_a_weight_of_another_dtype(device: torch.device) -> None:
    x, delta, _ = draw(3, 80, torch.bfloat16)
    weight = draw(3, 80, torch.float32)[2]
    there = x.to(device, copy=True)
    expected = add_norm(x, delta, NormWeights(weight, 1e-5), Layout.PLAIN)
    norm = NormWeights(weight.to(device), 1e-5)
    out = gpu.add_norm(there, delta.to(device), norm, Layout.PLAIN)
    assert_near_activations(out, expected)
