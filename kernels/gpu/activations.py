"""Activation, gating and quantization in one read and one write."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..activations import SWIGLU_ALPHA, SWIGLU_CLAMPED, SWIGLU_LIMIT
from ..quantize import Activations, Layout
from .quantize import LAYOUTS, empty_activations, shape_program, store_rows

_ACTIVATIONS = {"silu": 0, "gelu": 1, "gelu_tanh": 2, "relu": 3, "relu2": 4, SWIGLU_CLAMPED: 5}
_GELU = tl.constexpr(1)
_GELU_TANH = tl.constexpr(2)
_RELU = tl.constexpr(3)
_RELU2 = tl.constexpr(4)
_SWIGLU_CLAMPED = tl.constexpr(5)
_LOG2_E = tl.constexpr(1.4426950408889634)
_LIMIT, _ALPHA = tl.constexpr(SWIGLU_LIMIT), tl.constexpr(SWIGLU_ALPHA)


@triton.jit
def _logistic(x):
    """1 / (1 + e^-x). A division takes more instructions than all the rest of a gate, and a square
    root's inverse is one; twice its rounding is far below that of a 16-bit result."""
    root = tl.rsqrt(1.0 + tl.exp2(x * -_LOG2_E))
    return root * root


@triton.jit
def _activate(x, ACTIVATION: tl.constexpr):
    if ACTIVATION == _GELU:
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    if ACTIVATION == _GELU_TANH:
        inner = 0.7978845608028654 * (x + 0.044715 * x * x * x)
        # (1 + tanh u) / 2 is the logistic function of 2u.
        return x * _logistic(2.0 * inner)
    if ACTIVATION == _RELU:
        return tl.maximum(x, 0.0)
    if ACTIVATION == _RELU2:
        return tl.maximum(x, 0.0) * tl.maximum(x, 0.0)
    return x * _logistic(x)


@triton.jit(do_not_specialize=["num_rows"])
def _gate(
    gate_up,
    values,
    scales,
    num_rows,
    num_columns: tl.constexpr,
    GATED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    LAYOUT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    seen = (row[:, None] < num_rows) & (column[None, :] < num_columns)
    stride: tl.constexpr = 2 * num_columns if GATED else num_columns
    at = row[:, None].to(tl.int64) * stride + column[None, :]
    first = tl.load(gate_up + at, mask=seen, other=0.0).to(tl.float32)
    if GATED:
        up = tl.load(gate_up + at + num_columns, mask=seen, other=0.0).to(tl.float32)
        if ACTIVATION == _SWIGLU_CLAMPED:
            # Comparisons leave NaN as it is.
            first = tl.where(first > _LIMIT, _LIMIT, first)
            up = tl.where(up > _LIMIT, _LIMIT, tl.where(up < -_LIMIT, -_LIMIT, up)) + 1.0
            # Rows beyond the last one count for nothing in a row's largest number.
            y = tl.where(seen, up * first * _logistic(first * _ALPHA), 0.0)
        else:
            y = _activate(first, ACTIVATION) * up
    else:
        y = _activate(first, ACTIVATION)
    store_rows(y, row, column, seen, values, scales, num_rows, num_columns, LAYOUT, ROWS, BLOCK)


def gate(
    gate_up_TF: torch.Tensor, activation: str, layout: Layout, gated: bool = True
) -> Activations:
    """`kernels.activations.gate`; `gate_up` is contiguous."""
    num_rows, num_columns = gate_up_TF.shape[0], gate_up_TF.shape[1] // (1 + gated)
    out = empty_activations(num_rows, num_columns, layout, gate_up_TF.dtype, gate_up_TF.device)
    block, rows, warps = shape_program(num_columns)
    _gate[(triton.cdiv(num_rows, rows),)](
        gate_up_TF,
        out.values_TK,
        out.scales if out.scales is not None else gate_up_TF,
        num_rows,
        num_columns,
        GATED=gated,
        ACTIVATION=_ACTIVATIONS[activation],
        LAYOUT=LAYOUTS[layout],
        ROWS=rows,
        BLOCK=block,
        num_warps=warps,
        enable_fp_fusion=False,
    )
    return out
