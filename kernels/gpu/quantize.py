"""Rows of float32 values -> memory, as a product takes them."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..quantize import FP8_MAX, GROUP, INT8_MAX, Activations, Layout

LAYOUTS = {layout: i for i, layout in enumerate(Layout)}
_FP8_ROWS = tl.constexpr(LAYOUTS[Layout.FP8_ROWS])
_FP8_GROUPS = tl.constexpr(LAYOUTS[Layout.FP8_GROUPS])
_INT8_ROWS = tl.constexpr(LAYOUTS[Layout.INT8_ROWS])
_GROUP = tl.constexpr(GROUP)
_FP8_MAX = tl.constexpr(FP8_MAX)
_INT8_MAX = tl.constexpr(INT8_MAX)
_PER_FP8_MAX = tl.constexpr(1.0 / FP8_MAX)
_PER_INT8_MAX = tl.constexpr(1.0 / INT8_MAX)
_LEAST = tl.constexpr(1e-12)
# Adding and taking away 1.5 * 2^23 rounds a small float32 to an integer, ties to even.
_ROUNDER = tl.constexpr(12582912.0)

_DTYPES = {
    Layout.FP8_ROWS: torch.float8_e4m3fn,
    Layout.FP8_GROUPS: torch.float8_e4m3fn,
    Layout.INT8_ROWS: torch.int8,
}
# Elements that a program holds, and a warp at most: enough bytes in flight to fill the memory's
# bandwidth, and few programs' worth of instructions beside them.
_PROGRAM, _WARP = 4096, 2048


def empty_activations(
    num_rows: int, num_columns: int, layout: Layout, dtype: torch.dtype, device: torch.device
) -> Activations:
    """Room for `layout`; group scales lie column by column, as the library's products take them."""
    values = torch.empty(num_rows, num_columns, dtype=_DTYPES.get(layout, dtype), device=device)
    if layout == Layout.PLAIN:
        return Activations(values)
    groups = num_columns // GROUP if layout == Layout.FP8_GROUPS else 1
    return Activations(values, torch.empty(groups, num_rows, device=device).t())


def shape_program(num_columns: int) -> tuple[int, int, int]:
    """(columns padded to a power of two, rows of a program, warps)."""
    block = max(triton.next_power_of_2(num_columns), GROUP)
    rows = max(1, _PROGRAM // block)
    return block, rows, min(32, max(2, block * rows // _WARP))


@triton.jit
def _largest(y, AXIS: tl.constexpr):
    """max |y|, NaN if any y is: a maximum of floats would leave NaN out, one of bits does not."""
    bits = y.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    largest = tl.max(bits, AXIS).to(tl.float32, bitcast=True)
    return tl.where(largest < _LEAST, _LEAST, largest)


@triton.jit
def store_rows(
    y,
    row,
    column,
    seen,
    values,
    scales,
    num_rows,
    num_columns,
    LAYOUT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Round y [ROWS, BLOCK], zero where not `seen`, and store values and scales.

    What is scaled exceeds the largest number by a rounding at most, so nothing has to be clamped:
    fp8 saturates, and an integer is rounded back.
    """
    at = row[:, None].to(tl.int64) * num_columns + column[None, :]
    if LAYOUT == _FP8_GROUPS:
        groups = tl.reshape(y, (ROWS, BLOCK // _GROUP, _GROUP))
        largest = _largest(groups, 2)
        scaled = groups * tl.div_rn(_FP8_MAX, largest)[:, :, None]
        scaled = tl.reshape(scaled, (ROWS, BLOCK))
        tl.store(values + at, scaled.to(tl.float8e4nv), mask=seen)
        group = tl.arange(0, BLOCK // _GROUP)
        into = group[None, :].to(tl.int64) * num_rows + row[:, None]
        there = (row[:, None] < num_rows) & (group[None, :] < num_columns // _GROUP)
        tl.store(scales + into, largest * _PER_FP8_MAX, mask=there)
    elif LAYOUT == _FP8_ROWS:
        largest = _largest(y, 1)
        scaled = y * tl.div_rn(_FP8_MAX, largest)[:, None]
        tl.store(values + at, scaled.to(tl.float8e4nv), mask=seen)
        tl.store(scales + row, largest * _PER_FP8_MAX, mask=row < num_rows)
    elif LAYOUT == _INT8_ROWS:
        largest = _largest(y, 1)
        scaled = y * tl.div_rn(_INT8_MAX, largest)[:, None]
        rounded = (scaled + _ROUNDER) - _ROUNDER
        tl.store(values + at, rounded.to(tl.int8), mask=seen)
        tl.store(scales + row, largest * _PER_INT8_MAX, mask=row < num_rows)
    else:
        tl.store(values + at, y.to(values.dtype.element_ty), mask=seen)


@triton.jit(do_not_specialize=["num_rows"])
def _quantize(
    x,
    values,
    scales,
    num_rows,
    num_columns: tl.constexpr,
    LAYOUT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    seen = (row[:, None] < num_rows) & (column[None, :] < num_columns)
    at = row[:, None].to(tl.int64) * num_columns + column[None, :]
    y = tl.load(x + at, mask=seen, other=0.0).to(tl.float32)
    store_rows(y, row, column, seen, values, scales, num_rows, num_columns, LAYOUT, ROWS, BLOCK)


def quantize(x_TK: torch.Tensor, layout: Layout) -> Activations:
    """`kernels.quantize.quantize`, one read and one write."""
    num_rows, num_columns = x_TK.shape
    out = empty_activations(num_rows, num_columns, layout, x_TK.dtype, x_TK.device)
    block, rows, warps = shape_program(num_columns)
    _quantize[(triton.cdiv(num_rows, rows),)](
        x_TK,
        out.values_TK,
        out.scales if out.scales is not None else x_TK,
        num_rows,
        num_columns,
        LAYOUT=LAYOUTS[layout],
        ROWS=rows,
        BLOCK=block,
        num_warps=warps,
        enable_fp_fusion=False,
    )
    return out
