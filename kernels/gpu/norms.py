"""Residual addition, norm and quantization in one read and one write."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..norms import NormWeights
from ..quantize import Activations, Layout
from .quantize import LAYOUTS, empty_activations, shape_program, store_rows


@triton.jit(do_not_specialize=["num_rows"])
def _add_norm(
    x,
    delta,
    weight,
    bias,
    values,
    scales,
    num_rows,
    eps,
    scale,
    num_columns: tl.constexpr,
    HAS_DELTA: tl.constexpr,
    SCALED: tl.constexpr,
    NORM: tl.constexpr,
    CENTRED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    LAYOUT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    seen = (row[:, None] < num_rows) & (column[None, :] < num_columns)
    at = row[:, None].to(tl.int64) * num_columns + column[None, :]
    y = tl.load(x + at, mask=seen, other=0.0).to(tl.float32)
    if HAS_DELTA:
        added = tl.load(delta + at, mask=seen, other=0.0).to(tl.float32)
        if SCALED:
            added *= scale
        y += added
        stored = y.to(x.dtype.element_ty)
        tl.store(x + at, stored, mask=seen)
        y = stored.to(tl.float32)
    if NORM:
        w = tl.load(weight + column, mask=column < num_columns, other=0.0).to(tl.float32)
        if CENTRED:
            y = tl.where(seen, y - (tl.sum(y, 1) / num_columns)[:, None], 0.0)
        mean = tl.sum(y * y, 1) / num_columns
        y = y * tl.rsqrt(mean + eps)[:, None] * w[None, :]
        if HAS_BIAS:
            y += tl.load(bias + column, mask=column < num_columns, other=0.0).to(tl.float32)[
                None, :
            ]
    store_rows(y, row, column, seen, values, scales, num_rows, num_columns, LAYOUT, ROWS, BLOCK)


def add_norm(
    x_TD: torch.Tensor,
    delta_TD: torch.Tensor | None,
    norm: NormWeights | None,
    layout: Layout,
    scale: float = 1.0,
) -> Activations:
    """`kernels.norms.add_norm`; `x` and `delta` are contiguous."""
    num_rows, num_columns = x_TD.shape
    out = empty_activations(num_rows, num_columns, layout, x_TD.dtype, x_TD.device)
    block, rows, warps = shape_program(num_columns)
    bias = norm.bias if norm is not None else None
    _add_norm[(triton.cdiv(num_rows, rows),)](
        x_TD,
        delta_TD if delta_TD is not None else x_TD,
        norm.weight if norm is not None else x_TD,
        bias if bias is not None else x_TD,
        out.values_TK,
        out.scales if out.scales is not None else x_TD,
        num_rows,
        norm.eps if norm is not None else 0.0,
        scale,
        num_columns,
        HAS_DELTA=delta_TD is not None,
        SCALED=scale != 1.0,
        NORM=norm is not None,
        CENTRED=norm is not None and norm.centred,
        HAS_BIAS=bias is not None,
        LAYOUT=LAYOUTS[layout],
        ROWS=rows,
        BLOCK=block,
        num_warps=warps,
        enable_fp_fusion=False,
    )
    return out
