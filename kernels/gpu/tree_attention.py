"""Keys and values of rows side by side, in one read of either."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

# Rows of a program.
_ROWS, _WARPS = 16, 4


@triton.jit(do_not_specialize=["num_rows"])
def _take(
    keys,
    values,
    rows,
    keys_out,
    values_out,
    num_rows,
    num_groups,
    key_stride,
    key_group,
    value_stride,
    value_group,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
):
    place = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    group = tl.program_id(1)
    own = place < num_rows
    row = tl.load(rows + place, mask=own, other=0).to(tl.int64)[:, None]
    dim = tl.arange(0, BLOCK_D)[None, :]
    mask = own[:, None] & (dim < D)
    value = tl.load(values + row * value_stride + group * value_group + dim, mask=mask, other=0.0)
    key = tl.load(keys + row * key_stride + group * key_group + dim, mask=mask, other=0.0)
    is_lost = (tl.abs(value.to(tl.float32)) < float("inf")).to(tl.int32) == 0
    lost = tl.max(is_lost.to(tl.int32), axis=1)[:, None] > 0
    out = place.to(tl.int64)[:, None] * (num_groups * D) + group * D + dim
    tl.store(keys_out + out, tl.where(lost, float("nan"), key).to(key.dtype), mask=mask)
    tl.store(values_out + out, tl.where(lost, 0.0, value).to(value.dtype), mask=mask)


def take(
    k_TGD: torch.Tensor, v_TGD: torch.Tensor, rows_S: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of some rows, [S, G, D]: NaN and 0 where a value is not finite."""
    num_rows, (_, num_groups, size) = len(rows_S), k_TGD.shape
    k_SGD, v_SGD = (x.new_empty(num_rows, num_groups, size) for x in (k_TGD, v_TGD))
    _take[(triton.cdiv(num_rows, _ROWS), num_groups)](
        k_TGD,
        v_TGD,
        rows_S,
        k_SGD,
        v_SGD,
        num_rows,
        num_groups,
        k_TGD.stride(0),
        k_TGD.stride(1),
        v_TGD.stride(0),
        v_TGD.stride(1),
        D=size,
        BLOCK_D=triton.next_power_of_2(size),
        ROWS=_ROWS,
        num_warps=_WARPS,
    )
    return k_SGD, v_SGD
