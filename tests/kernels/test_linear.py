"""Matrix products: what is rounded where."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from logitmill.kernels import linear
from logitmill.kernels.linear import (
    lay_out_block_scales,
    lay_out_group_scales,
    multiply,
    multiply_fp8,
    multiply_fp8_blocks,
    multiply_fp8_groups,
    multiply_int8,
    multiply_wide,
)
from logitmill.kernels.quantize import Activations, Layout, dequantize, quantize

gpu = pytest.importorskip("logitmill.kernels.gpu.linear")


def draw(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple(  # type: ignore[return-value]
        torch.randn(*shape, generator=generator).to(dtype) for shape in ((9, 200), (33, 200), (33,))
    )


def test_product_and_bias() -> None:
    x, weight, bias = draw(torch.float32)
    expected = x.double() @ weight.double().T + bias.double()
    torch.testing.assert_close(multiply(x, weight, bias).double(), expected, atol=1e-4, rtol=1e-5)
    plain = multiply(x, weight).double()
    torch.testing.assert_close(plain, expected - bias.double(), atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_wide_product_is_never_rounded_to_the_operands_dtype(dtype: torch.dtype) -> None:
    """A bfloat16 head matmul adds 2.5e-3 to a loss (marin#8217)."""
    x, weight, _ = draw(dtype)
    out = multiply_wide(x, weight.float())
    assert out.dtype == torch.float32
    expected = x.double() @ weight.double().T
    torch.testing.assert_close(out.double(), expected, atol=1e-4, rtol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_gpu_multiplies_narrow_weights_into_float32(dtype: torch.dtype) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")
    x, weight, _ = draw(dtype)
    out = multiply_wide(x.cuda(), weight.cuda())
    assert out.dtype == torch.float32
    expected = x.double() @ weight.double().T
    torch.testing.assert_close(out.cpu().double(), expected, atol=1e-3, rtol=1e-4)


def assert_same_bits(out: torch.Tensor, expected: torch.Tensor) -> None:
    assert out.dtype == expected.dtype and out.shape == expected.shape
    assert torch.equal(out.cpu().view(torch.uint8), expected.cpu().view(torch.uint8))


def draw_quantized(
    layout: Layout, num_rows: int, num_columns: int, depth: int
) -> tuple[Activations, Activations, torch.Tensor]:
    """x, a weight by rows, and a bias."""
    generator = torch.Generator().manual_seed(num_rows)
    x = torch.randn(num_rows, depth, generator=generator)
    weight = torch.randn(num_columns, depth, generator=generator)
    rows = Layout.FP8_ROWS if layout == Layout.FP8_GROUPS else layout
    bias = torch.randn(num_columns, generator=generator)
    return quantize(x, layout), quantize(weight, rows), bias


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("biased", [False, True])
def test_fp8_rows(biased: bool, dtype: torch.dtype) -> None:
    x, weight, bias = draw_quantized(Layout.FP8_ROWS, 9, 48, 64)
    assert weight.scales is not None
    out = multiply_fp8(x, weight.values_TK, weight.scales[:, 0], bias if biased else None, dtype)
    expected = dequantize(x).double() @ dequantize(weight).double().T + biased * bias.double()
    assert out.dtype == dtype
    rounding = 4e-3 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(out.double(), expected, atol=1e-4, rtol=rounding)


def draw_blocks(num_rows: int, num_columns: int, depth: int) -> tuple[Any, ...]:
    """x, weight e4m3, its scales a block, bias, and the product in float64."""
    x, weight, bias = draw_quantized(Layout.FP8_GROUPS, num_rows, num_columns, depth)
    blocks = (math.ceil(num_columns / 128), depth // 128)
    scales = 0.01 + torch.rand(*blocks, generator=torch.Generator().manual_seed(1))
    wide = scales.repeat_interleave(128, 0)[:num_columns].repeat_interleave(128, 1)
    meant = weight.values_TK.double() * wide
    return x, weight.values_TK, scales, bias, dequantize(x).double() @ meant.T + bias.double()


@pytest.mark.parametrize(("num_columns", "depth"), [(128, 128), (200, 640), (72, 384)])
def test_fp8_blocks(num_columns: int, depth: int) -> None:
    x, weight, scales, bias, expected = draw_blocks(7, num_columns, depth)
    out = multiply_fp8_blocks(x, weight, lay_out_block_scales(scales), bias, torch.float32)
    scale = expected.abs().mean().item()
    torch.testing.assert_close(out.double(), expected, atol=1e-6 * scale, rtol=1e-4)


@pytest.mark.parametrize(("num_columns", "depth"), [(128, 128), (200, 640), (72, 384)])
@pytest.mark.parametrize("biased", [False, True])
def test_the_kernel_of_fp8_blocks(
    device: torch.device, num_columns: int, depth: int, biased: bool
) -> None:
    x, weight, scales, bias, expected = draw_blocks(135, num_columns, depth)
    out = gpu.multiply_fp8_blocks(
        Activations(*(part.to(device) for part in x)),
        weight.to(device),
        lay_out_block_scales(scales).to(device),
        bias.to(device) if biased else None,
        torch.float32,
    )
    expected -= 0 if biased else bias.double()
    scale = expected.abs().mean().item()
    # The tensor cores of Hopper keep about 14 bits of a sum of 128 products.
    torch.testing.assert_close(out.cpu().double(), expected, atol=1e-3 * scale, rtol=1e-3)


def test_block_scales_are_laid_out_once() -> None:
    scales = torch.rand(3, 7)
    laid_out = lay_out_block_scales(scales)
    assert laid_out.shape == (3, 8) and torch.equal(laid_out[:, :7], scales)
    assert torch.equal(lay_out_block_scales(laid_out), laid_out)


def draw_groups(num_rows: int, num_columns: int, depth: int) -> tuple[Any, ...]:
    """x, weight e4m3, its scales [N, K / 128], bias, and the product in float64."""
    x, weight, bias = draw_quantized(Layout.FP8_GROUPS, num_rows, num_columns, depth)
    generator = torch.Generator().manual_seed(1)
    scales = 0.01 + torch.rand(num_columns, depth // 128, generator=generator)
    meant = weight.values_TK.double() * scales.double().repeat_interleave(128, 1)
    return x, weight.values_TK, scales, bias, dequantize(x).double() @ meant.T + bias.double()


@pytest.mark.parametrize(("num_columns", "depth"), [(16, 128), (208, 640)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("biased", [False, True])
def test_fp8_groups(biased: bool, dtype: torch.dtype, num_columns: int, depth: int) -> None:
    x, weight, scales, bias, expected = draw_groups(7, num_columns, depth)
    expected -= 0 if biased else bias.double()
    size = expected.abs().mean().item()
    rounding = 4e-3 if dtype == torch.bfloat16 else 1e-4
    for laid_out in (scales, lay_out_group_scales(scales)):
        out = multiply_fp8_groups(x, weight, laid_out, bias if biased else None, dtype)
        assert out.dtype == dtype
        torch.testing.assert_close(out.double(), expected, atol=1e-6 * size, rtol=rounding)


@pytest.mark.gpu
@pytest.mark.parametrize("num_rows", [1, 135, 512])
@pytest.mark.parametrize(("num_columns", "depth"), [(16, 128), (208, 640), (4096, 4096)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("biased", [False, True])
def test_hopper_multiplies_fp8_groups(
    biased: bool, dtype: torch.dtype, num_columns: int, depth: int, num_rows: int
) -> None:
    if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("needs an NVIDIA GPU of compute capability 9.x")
    x, weight, scales, bias, expected = draw_groups(num_rows, num_columns, depth)
    expected -= 0 if biased else bias.double()
    size = expected.abs().mean().item()
    rounding = 4e-3 if dtype == torch.bfloat16 else 2e-3
    there = Activations(*(part.cuda() for part in x))
    for laid_out in (scales.cuda(), lay_out_group_scales(scales.cuda())):
        out = multiply_fp8_groups(
            there, weight.cuda(), laid_out, bias.cuda() if biased else None, dtype
        )
        assert out.dtype == dtype
        torch.testing.assert_close(out.cpu().double(), expected, atol=2e-3 * size, rtol=rounding)


@pytest.mark.parametrize("num_groups", [1, 5])
@pytest.mark.parametrize("num_rows", [1, 7, 8])
def test_the_library_is_given_what_it_takes(
    num_rows: int, num_groups: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows by fours, and scales group after group whatever they came as."""
    depth = 128 * num_groups
    x, weight, scales, bias, expected = draw_groups(num_rows, 48, depth)
    size = expected.abs().mean().item()

    def scaled_mm(
        left: torch.Tensor,
        right: torch.Tensor,
        left_scales: torch.Tensor,
        left_scaling: Any,
        right_scales: torch.Tensor,
        right_scaling: Any,
        *,
        output_dtype: torch.dtype,
    ) -> torch.Tensor:
        padded = len(left)
        assert padded % 4 == 0 and left.is_contiguous() and right.t().is_contiguous()
        assert left_scaling == right_scaling == F.ScalingType.BlockWise1x128  # type: ignore[attr-defined]
        for given, length in ((left_scales, padded), (right_scales, 48)):
            assert given.shape == (length, num_groups) and given.stride() == (1, length)
            assert given.dtype == torch.float32
        wide = left.float() * left_scales.repeat_interleave(128, 1)
        meant = right.t().float() * right_scales.repeat_interleave(128, 1)
        return (wide @ meant.T).to(output_dtype)

    monkeypatch.setattr(F, "scaled_mm", scaled_mm)
    monkeypatch.setattr(linear, "_is_hopper", lambda tensor: True)
    # As kernels leave the scales of activations, and as the plain definition does.
    assert x.scales is not None
    for own in (x.scales, lay_out_group_scales(x.scales)):
        out = multiply_fp8_groups(x._replace(scales=own), weight, scales, bias, torch.float32)
        torch.testing.assert_close(out.double(), expected, atol=1e-6 * size, rtol=1e-4)


def test_group_scales_are_laid_out_once() -> None:
    for scales in (torch.rand(48, 7), torch.rand(48, 1), torch.rand(48, 2)[:, 1:].half()):
        laid_out = lay_out_group_scales(scales)
        assert torch.equal(laid_out, scales.float()) and laid_out.stride() == (1, 48)
        assert lay_out_group_scales(laid_out).data_ptr() == laid_out.data_ptr()


def test_int8_is_exact_and_rounded_in_float32() -> None:
    x, weight, bias = draw_quantized(Layout.INT8_ROWS, 9, 33, 200)
    assert x.scales is not None and weight.scales is not None
    total = x.values_TK.double() @ weight.values_TK.double().T
    expected = total.float() * x.scales * weight.scales[:, 0] + bias
    out = multiply_int8(x, weight.values_TK, weight.scales[:, 0], bias, torch.bfloat16)
    assert_same_bits(out, expected.bfloat16())


INT8_TILES = [
    gpu.Tiles(128, 256, 128, warps=8, stages=3, tma=True, persistent=True, parts=2),
    gpu.Tiles(128, 128, 128, warps=8, stages=3, tma=True, persistent=False),
    gpu.Tiles(128, 256, 64, warps=8, stages=3),
    None,
]


@pytest.mark.parametrize("tiles", INT8_TILES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("biased", [False, True])
def test_the_kernel_of_int8(
    device: torch.device, biased: bool, dtype: torch.dtype, tiles: Any
) -> None:
    for num_rows, num_columns, depth in [(5, 16, 32), (300, 528, 208)]:
        x, weight, bias = draw_quantized(Layout.INT8_ROWS, num_rows, num_columns, depth)
        assert weight.scales is not None
        operands = (weight.values_TK, weight.scales[:, 0], bias.to(dtype) if biased else None)
        expected = multiply_int8(x, *operands, dtype)
        there = [None if part is None else part.to(device) for part in operands]
        out = gpu.multiply_int8(
            Activations(*(part.to(device) for part in x)), *there, dtype, tiles=tiles
        )
        assert_same_bits(out, expected)


def test_int8_of_odd_sizes_takes_no_accelerator(device: torch.device) -> None:
    x, weight, bias = draw_quantized(Layout.INT8_ROWS, 131, 259, 77)
    assert weight.scales is not None
    operands = (weight.values_TK, weight.scales[:, 0], bias)
    out = gpu.multiply_int8(
        Activations(*(part.to(device) for part in x)),
        *(part.to(device) for part in operands),
        torch.bfloat16,
    )
    assert_same_bits(out, multiply_int8(x, *operands, torch.bfloat16))
