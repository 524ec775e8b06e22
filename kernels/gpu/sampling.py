"""Draws from rows of logits: weights summed by tiles, and looked up in the tiles that are hit."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..sampling import UNIT

_UNIT = tl.constexpr(UNIT)
# Columns of a program.
_TILE, _WARPS = 2048, 4


@triton.jit
def _weights(logits, top, tile, num_columns, TILE: tl.constexpr):
    """Weights of a tile's columns; 0 beyond the last one."""
    column = tile * TILE + tl.arange(0, TILE)
    z = tl.load(logits + column, mask=column < num_columns, other=float("-inf"))
    return (tl.exp(z - top) * _UNIT).to(tl.int64)


@triton.jit(do_not_specialize=["num_tiles"])
def _sum_tiles(logits, tops, sums, num_columns, row_stride, num_tiles, TILE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    weights = _weights(logits + row * row_stride, tl.load(tops + row), tile, num_columns, TILE)
    tl.store(sums + row * num_tiles + tile, tl.sum(weights, axis=0))


@triton.jit(do_not_specialize=["num_draws"])
def _find(logits, tops, tiles, rest, ids, num_columns, row_stride, num_draws, TILE: tl.constexpr):
    """The column of a tile at which the sum of weights exceeds `rest`."""
    place = tl.program_id(0)
    row = (place // num_draws).to(tl.int64)
    tile = tl.load(tiles + place)
    weights = _weights(logits + row * row_stride, tl.load(tops + row), tile, num_columns, TILE)
    passed = (tl.cumsum(weights, axis=0) <= tl.load(rest + place)).to(tl.int32)
    found = tile * TILE + tl.sum(passed, axis=0)
    tl.store(ids + place, tl.minimum(found, num_columns - 1))


def draw(logits_RV: torch.Tensor, uniforms_RM: torch.Tensor) -> torch.Tensor:
    """Ids that numbers in [0, 1) fall on, int32 [R, M], ascending; `kernels.sampling.draw`."""
    num_rows, num_columns = logits_RV.shape
    num_draws = uniforms_RM.shape[1]
    ids_RM = torch.empty(num_rows, num_draws, dtype=torch.int32, device=logits_RV.device)
    if not num_rows:
        return ids_RM
    num_tiles = triton.cdiv(num_columns, _TILE)
    tops_R = logits_RV.amax(1)
    sums_RN = torch.empty(num_rows, num_tiles, dtype=torch.int64, device=logits_RV.device)
    _sum_tiles[(num_rows, num_tiles)](
        logits_RV,
        tops_R,
        sums_RN,
        num_columns,
        logits_RV.stride(0),
        num_tiles,
        TILE=_TILE,
        num_warps=_WARPS,
        enable_fp_fusion=False,
    )
    ends_RN = sums_RN.cumsum(1)
    total_R1 = ends_RN[:, -1:]
    # Rounded up, the largest number could reach the total, which is nobody's.
    at_RM = (uniforms_RM * total_R1).to(torch.int64).minimum(total_R1 - 1)
    # A row that holds a NaN may have no tile.
    tiles_RM = torch.searchsorted(ends_RN, at_RM, right=True).clamp_(0, num_tiles - 1)
    rest_RM = at_RM - (ends_RN - sums_RN).gather(1, tiles_RM)
    _find[(num_rows * num_draws,)](
        logits_RV,
        tops_R,
        tiles_RM.to(torch.int32),
        rest_RM,
        ids_RM,
        num_columns,
        logits_RV.stride(0),
        num_draws,
        TILE=_TILE,
        num_warps=_WARPS,
        enable_fp_fusion=False,
    )
    return ids_RM.sort(dim=1).values
