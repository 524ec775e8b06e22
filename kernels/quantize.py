"""Activations as a product takes them: plain, or in 8 bits with scales.

Legend: T packed tokens, K columns. The formulas are those of dynamic per-token quantization as
compressed-tensors and DeepSeek-V3 publish it.
"""

from __future__ import annotations

from enum import StrEnum
from typing import NamedTuple

import torch

from .choice import has_triton

GROUP = 128
"""Columns that share a scale in `FP8_GROUPS`."""
FP8_MAX = 448.0
"""Largest finite e4m3 number."""
INT8_MAX = 127.0
# What an all-zero row is divided by instead of zero.
_LEAST = 1e-12


class Layout(StrEnum):
    """How a product takes its left operand."""

    PLAIN = "plain"
    """In the dtype of the arithmetic."""
    FP8_ROWS = "fp8_rows"
    """e4m3, one scale a row."""
    FP8_GROUPS = "fp8_groups"
    """e4m3, one scale per `GROUP` columns of a row."""
    INT8_ROWS = "int8_rows"
    """int8, symmetric, one scale a row."""


class Activations(NamedTuple):
    """values * scales is what is meant; `scales` is None in the layout `PLAIN`."""

    values_TK: torch.Tensor
    scales: torch.Tensor | None = None
    """float32 [T, 1], or [T, K / GROUP] for `FP8_GROUPS`."""


def quantize(x_TK: torch.Tensor, layout: Layout) -> Activations:
    """Round `x` to the layout's numbers, ties to even.

    With a = max |x| of a row (or a group of it): scale = a / 448 and value = x * (448 / a) in
    float32, with 127 for int8. A row of zeros stays zeros.
    """
    if layout == Layout.PLAIN:
        return Activations(x_TK)
    if has_triton(x_TK):
        from .gpu import quantize as gpu

        return gpu.quantize(x_TK, layout)
    num_rows, num_columns = x_TK.shape
    wide = x_TK.float()
    if layout == Layout.FP8_GROUPS:
        wide = wide.view(num_rows, num_columns // GROUP, GROUP)
    largest = wide.abs().amax(-1, keepdim=True).clamp_min(_LEAST)
    top = INT8_MAX if layout == Layout.INT8_ROWS else FP8_MAX
    # A number over a tensor would be a reciprocal and a product: two roundings.
    scaled = wide * torch.full_like(largest, top).div_(largest)
    if layout == Layout.INT8_ROWS:
        values = scaled.round().clamp_(-top, top).to(torch.int8)
    else:
        values = scaled.clamp_(-top, top).to(torch.float8_e4m3fn)
    scales = largest * (1.0 / top)
    return Activations(values.view(num_rows, num_columns), scales.view(num_rows, -1))


def dequantize(x: Activations) -> torch.Tensor:
    """The numbers that are meant, float32 [T, K]."""
    wide = x.values_TK.float()
    if x.scales is None:
        return wide
    groups = wide.view(len(wide), x.scales.shape[1], -1)
    return (groups * x.scales[..., None]).view_as(wide)
