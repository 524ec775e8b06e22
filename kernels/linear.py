"""Matrix products of packed tokens with weights stored [out, in], plain or quantized.

Legend: T packed tokens, N outputs, K inputs, G columns of a group of int4 weights.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from .choice import has_triton
from .quantize import FP8_MAX, GROUP, Activations, dequantize

INT4_ZERO = 8
"""The code that stands for zero where a weight has no zero points of its own."""
# torch does not annotate the members.
_SCALINGS: Any = F.ScalingType


def multiply(
    x_TK: torch.Tensor, weight_NK: torch.Tensor, bias_N: torch.Tensor | None = None
) -> torch.Tensor:
    """x @ weight^T + bias in the dtype of `x` with float32 accumulation; [T, N].

    Both operands are contiguous. A float32 product on a CPU goes to oneDNN: torch's own way to
    MKL does not use the AVX-512 units of AMD's processors (430 against 190 GFLOP/s on two cores
    of an EPYC). On Intel's, either gives a row other bits beside fewer rows.
    """
    if x_TK.dtype == torch.float32 and x_TK.device.type == "cpu" and _HAS_ONEDNN:
        return torch.ops.mkldnn._linear_pointwise(x_TK, weight_NK, bias_N, "none", [], "")
    return F.linear(x_TK, weight_NK, bias_N)


def multiply_wide(x_TK: torch.Tensor, weight_NK: torch.Tensor) -> torch.Tensor:
    """x @ weight^T with a float32 result, never rounded to a narrower dtype; [T, N].

    16-bit weights need a GPU, whose library accumulates and returns float32; a CPU is given
    float32 weights. The products of 16-bit operands are exact in float32 either way.
    """
    if weight_NK.dtype == torch.float32:
        return multiply(x_TK.float(), weight_NK)
    return torch.mm(x_TK, weight_NK.t(), out_dtype=torch.float32)


def multiply_fp8(
    x: Activations,
    weight_NK: torch.Tensor,
    scale_N: torch.Tensor,
    bias_N: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """(x @ weight^T) * scales + bias of e4m3 operands, rounded once to `dtype`; [T, N].

    `x` is `FP8_ROWS`, `weight_NK` e4m3 and `scale_N` float32. A GPU (compute capability 8.9 and
    up, N and K multiples of 16) sums on its tensor cores alone, which keep about 14 bits.
    """
    if not weight_NK.is_cuda:
        product = multiply(dequantize(x), weight_NK.float() * scale_N[:, None])
        return _finish(product, bias_N, dtype)
    assert x.scales is not None
    # The library rounds to bfloat16 after adding the bias; for other types it adds none.
    plain = dtype != torch.bfloat16
    product = torch._scaled_mm(
        x.values_TK,
        weight_NK.t(),
        scale_a=x.scales,
        scale_b=scale_N[None],
        bias=None if plain or bias_N is None else bias_N.to(dtype),
        out_dtype=torch.float32 if plain else dtype,
        use_fast_accum=True,
    )
    return _finish(product, bias_N, dtype) if plain else product


def multiply_fp8_blocks(
    x: Activations,
    weight_NK: torch.Tensor,
    scales: torch.Tensor,
    bias_N: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """The product of e4m3 operands whose weight has a scale per block of 128 x 128; [T, N].

    `x` is `FP8_GROUPS` and `weight_NK` e4m3; `scales` is what `lay_out_block_scales` made of
    float32 [ceil(N / 128), K / 128]. Sums are float32 from one group of columns to the next, and
    the result plus bias is rounded once to `dtype`.
    """
    if _is_hopper(weight_NK):
        scaling = _SCALINGS.BlockWise128x128
        return _multiply_fp8_hopper(x, weight_NK, scales.t(), scaling, bias_N, dtype)
    if has_triton(weight_NK):
        from .gpu import linear as gpu

        return gpu.multiply_fp8_blocks(x, weight_NK, scales, bias_N, dtype)
    num_rows, num_columns = weight_NK.shape
    scale_NK = scales[:, : num_columns // GROUP].repeat_interleave(GROUP, 0)[:num_rows]
    weight = weight_NK.float() * scale_NK.repeat_interleave(GROUP, 1)
    return _finish(multiply(dequantize(x), weight), bias_N, dtype)


def lay_out_block_scales(scales: torch.Tensor) -> torch.Tensor:
    """Scales [ceil(N / 128), K / 128] as `multiply_fp8_blocks` takes them, made once at load.

    float32, contiguous, with columns of zeros up to a multiple of four, which is how the GPU's
    library reads them.
    """
    return F.pad(scales.float(), (0, -scales.shape[1] % 4)).contiguous()


def multiply_fp8_groups(
    x: Activations,
    weight_NK: torch.Tensor,
    scales_NG: torch.Tensor,
    bias_N: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """The product of e4m3 operands that both have a scale per 128 columns of a row; [T, N].

    `x` is `FP8_GROUPS`, `weight_NK` e4m3 and `scales_NG` float32 [N, K / 128], copied unless
    `lay_out_group_scales` made them. Sums and rounding are those of `multiply_fp8_blocks`. Of
    GPUs, Hopper has a product of its own (N a multiple of 16); others multiply in float32.
    """
    if _is_hopper(weight_NK):
        scales, scaling = lay_out_group_scales(scales_NG), _SCALINGS.BlockWise1x128
        return _multiply_fp8_hopper(x, weight_NK, scales, scaling, bias_N, dtype)
    weight = dequantize(Activations(weight_NK, scales_NG))
    return _finish(multiply(dequantize(x), weight), bias_N, dtype)


def lay_out_group_scales(scales_RG: torch.Tensor) -> torch.Tensor:
    """Scales [rows, K / 128] in float32, group after group in memory: strides (1, rows).

    The GPU's library reads them so. No copy where they lie so.
    """
    by_group = scales_RG.float().t().contiguous()
    # A single group counts as contiguous whatever its stride; the library looks at the number.
    return by_group.as_strided(scales_RG.shape, (1, len(scales_RG)))


def _is_hopper(tensor: torch.Tensor) -> bool:
    """Whether the library has products of e4m3 operands with a scale per group of columns."""
    return tensor.is_cuda and torch.cuda.get_device_capability(tensor.device)[0] == 9


def _multiply_fp8_hopper(
    x: Activations,
    weight_NK: torch.Tensor,
    scales: torch.Tensor,
    scaling: Any,
    bias_N: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """A product of `FP8_GROUPS` by the GPU's library, which takes multiples of four rows.

    `scales` are the weight's, as the library takes them for `scaling`.
    """
    assert x.scales is not None
    values_TK, scales_TG = x.values_TK, x.scales
    num_rows = len(values_TK)
    if num_rows % 4:
        more = -num_rows % 4
        # Bytes, since padding is not defined for e4m3.
        values_TK = F.pad(values_TK.view(torch.uint8), (0, 0, 0, more)).view(values_TK.dtype)
        scales_TG = F.pad(scales_TG, (0, 0, 0, more))
    product = F.scaled_mm(
        values_TK,
        weight_NK.t(),
        lay_out_group_scales(scales_TG),
        _SCALINGS.BlockWise1x128,
        scales,
        scaling,
        output_dtype=torch.bfloat16
        if dtype == torch.bfloat16 and bias_N is None
        else torch.float32,
    )
    return _finish(product[:num_rows], bias_N, dtype)


def multiply_int8(
    x: Activations,
    weight_NK: torch.Tensor,
    scale_N: torch.Tensor,
    bias_N: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """The product of int8 operands, exact in int32, then float32; [T, N] in `dtype`.

    ((sum * x.scales) * scale_N) + bias, each step rounded to float32 and the last to `dtype`,
    so that every device gives the same bits. `x` is `INT8_ROWS` and `scale_N` float32.
    """
    if has_triton(weight_NK):
        from .gpu import linear as gpu

        return gpu.multiply_int8(x, weight_NK, scale_N, bias_N, dtype)
    assert x.scales is not None
    total = torch._int_mm(x.values_TK, weight_NK.t())
    return _finish((total.float() * x.scales) * scale_N, bias_N, dtype)


def _finish(product: torch.Tensor, bias_N: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """A product plus bias, added in the product's dtype, as `dtype`."""
    if bias_N is not None:
        product = product + bias_N.to(product.dtype)
    return product.to(dtype)


class Int4(NamedTuple):
    """(code - zero) * scale is what is meant; the zero is `INT4_ZERO` where `zeros` is None."""

    codes: torch.Tensor
    """uint8 [N, K / 2]: column 2i in the low four bits of byte i, column 2i + 1 in the high."""
    scales: torch.Tensor
    """[N, K / G], of any floating dtype."""
    zeros: torch.Tensor | None = None
    """uint8 [N, K / G], 0 ... 16."""
    groups: torch.Tensor | None = None
    """int32 [K]: the group of each column, where groups are not neighbours."""


def pack_int4(codes_NK: torch.Tensor) -> torch.Tensor:
    """Codes 0 ... 15, K even, two to a byte: uint8 [N, K / 2]."""
    codes = codes_NK.to(torch.uint8)
    return codes[:, 0::2] | (codes[:, 1::2] << 4)


def expand_int4(weight: Int4, dtype: torch.dtype) -> torch.Tensor:
    """(code - zero) * scale in float32, rounded once to `dtype`; [N, K]."""
    if has_triton(weight.codes):
        from .gpu import linear as gpu

        return gpu.expand_int4(weight, dtype)
    return (_steps(weight) * _columns(weight, weight.scales.float())).to(dtype)


def expand_int4_fp8(weight: Int4, scale_N: torch.Tensor) -> torch.Tensor:
    """The weight over `scale_N` (float32, one a row) as e4m3 [N, K].

    (code - zero) * (scale * (1 / scale_N)), each step rounded to float32, then clamped to +-448
    and rounded to nearest even.
    """
    if has_triton(weight.codes):
        from .gpu import linear as gpu

        return gpu.expand_int4_fp8(weight, scale_N)
    ratios = weight.scales.float() * scale_N.reciprocal()[:, None]
    values = _steps(weight) * _columns(weight, ratios)
    return values.clamp_(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)


def expand_int4_codes(weight: Int4) -> torch.Tensor:
    """code - zero, which e4m3 holds exactly; [N, K]."""
    if has_triton(weight.codes):
        from .gpu import linear as gpu

        return gpu.expand_int4_codes(weight)
    return _steps(weight).to(torch.float8_e4m3fn)


def _steps(weight: Int4) -> torch.Tensor:
    """code - zero as float32 [N, K]."""
    codes = torch.stack([weight.codes & 15, weight.codes >> 4], -1).flatten(1).float()
    if weight.zeros is None:
        return codes.sub_(INT4_ZERO)
    return codes.sub_(_columns(weight, weight.zeros.float()))


def _columns(weight: Int4, values: torch.Tensor) -> torch.Tensor:
    """What each column's group has of `values` [N, K / G]; [N, K]."""
    if weight.groups is not None:
        return values[:, weight.groups.long()]
    return values.repeat_interleave(weight.codes.shape[1] * 2 // values.shape[1], 1)


_HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(
    torch.ops.mkldnn, "_linear_pointwise"
)
