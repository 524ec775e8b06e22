"""Sums of rows' probabilities by group, in one read of the rows."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..frequencies import EXPECTED, UNIT, VARIANCE
from ..logits import RowStatistics

_PER_UNIT = tl.constexpr(1 / UNIT)
_EXPECTED, _VARIANCE = tl.constexpr(EXPECTED), tl.constexpr(VARIANCE)
# From here on a float32 is a whole number, which 0.5 more may round to another one.
_WHOLE = tl.constexpr(2.0**23)
# Columns and rows of a program.
_BLOCK, _ROWS, _WARPS = 512, 64, 4


@triton.jit
def _count(value):
    """A number of [0, 1] in units, rounded."""
    value = value * _PER_UNIT
    return tl.where(value < _WHOLE, value + 0.5, value).to(tl.int64)


@triton.jit
def _flush(sums, group, expected, variance, column, num_columns):
    """Add what a program has of one group to its sums."""
    if group >= 0:
        inside = column < num_columns
        own = sums + group * (3 * num_columns) + column
        tl.atomic_add(own + _EXPECTED * num_columns, expected, mask=inside, sem="relaxed")
        tl.atomic_add(own + _VARIANCE * num_columns, variance, mask=inside, sem="relaxed")


@triton.jit(do_not_specialize=["num_rows"])
def _add_expected(
    logits,
    tops,
    top_logprobs,
    groups,
    sums,
    num_rows,
    num_columns,
    row_stride,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    expected = tl.zeros((BLOCK,), tl.int64)
    variance = tl.zeros((BLOCK,), tl.int64)
    first = tl.program_id(1) * ROWS
    logits += first.to(tl.int64) * row_stride + column
    group = tl.load(groups + first)
    for row in range(first, tl.minimum(first + ROWS, num_rows)):
        here = tl.load(groups + row)
        if here != group:
            _flush(sums, group, expected, variance, column, num_columns)
            expected = tl.zeros((BLOCK,), tl.int64)
            variance = tl.zeros((BLOCK,), tl.int64)
            group = here
        z = tl.load(logits, mask=column < num_columns, other=float("-inf"))
        logits += row_stride
        p = tl.exp((z - tl.load(tops + row)) + tl.load(top_logprobs + row))
        expected += _count(p)
        variance += _count(p - p * p)
    _flush(sums, group, expected, variance, column, num_columns)


def add_expected(
    logits_RV: torch.Tensor,
    statistics: RowStatistics,
    groups_R: torch.Tensor,
    sums_G3V: torch.Tensor,
) -> None:
    """The expected counts of `kernels.frequencies.add_frequencies` and their variances."""
    num_rows, num_columns = logits_RV.shape
    if not num_rows:
        return
    top_R = logits_RV.gather(1, statistics.top1_id[:, None].long())[:, 0]
    _add_expected[(triton.cdiv(num_columns, _BLOCK), triton.cdiv(num_rows, _ROWS))](
        logits_RV,
        top_R,
        statistics.top1_logprob,
        groups_R,
        sums_G3V,
        num_rows,
        num_columns,
        logits_RV.stride(0),
        BLOCK=_BLOCK,
        ROWS=_ROWS,
        num_warps=_WARPS,
        enable_fp_fusion=False,
    )
