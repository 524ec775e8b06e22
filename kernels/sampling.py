"""Draws from rows of logits by counters: the same row and key give the same draws anywhere.

Legend: R rows, V vocabulary, M draws a row.
"""

from __future__ import annotations

import torch

from .choice import has_triton

# A weight is a whole number of 2^-40 of the likeliest token's: sums of whole numbers have the same
# bits in any order, which those of floats have not on a GPU. 2^23 of them fit in an int64.
UNIT = 2.0**40
# Logits whose weights exist at a time where torch computes: 3 MB of them, which caches hold.
_SCRATCH = 1 << 18
# Of the splitmix64 generator (Steele, Lea, Flood: Fast Splittable Pseudorandom Number Generators,
# 2014), as int64.
_GAMMA = 0x9E3779B97F4A7C15 - (1 << 64)
_FIRST = 0xBF58476D1CE4E5B9 - (1 << 64)
_SECOND = 0x94D049BB133111EB - (1 << 64)


def draw(logits_RV: torch.Tensor, keys_R: torch.Tensor, num_draws: int) -> torch.Tensor:
    """Tokens drawn from softmax(z) of each row, with replacement; int32 [R, M], ascending.

    By the inverse of the cumulative distribution: one pass over a row whatever M is, where the
    Gumbel-max trick takes V random numbers a draw. A draw's number in [0, 1) is a hash of the
    row's key and the draw's place alone. Weights are exp(z - max z) in float32, cut to multiples
    of 2^-40: what is less likely than that, beside the likeliest, is never drawn, and no
    probability is off by more than V * 2^-40.

    Args:
        logits_RV: float32, contiguous but for the distance between rows; left as it is. A row
            that holds a NaN or +inf gives some ids.
        keys_R: int64, any bits.
        num_draws: M, at least 1.
    """
    if has_triton(logits_RV):
        from .gpu import sampling

        return sampling.draw(logits_RV, uniforms(keys_R, num_draws))
    ids_RM = torch.empty(len(logits_RV), num_draws, dtype=torch.int32, device=logits_RV.device)
    step = max(1, _SCRATCH // logits_RV.shape[1])
    for start in range(0, len(logits_RV), step):
        rows = slice(start, start + step)
        ids_RM[rows] = _draw(logits_RV[rows], uniforms(keys_R[rows], num_draws))
    return ids_RM


def _draw(logits_RV: torch.Tensor, uniforms_RM: torch.Tensor) -> torch.Tensor:
    shifted = logits_RV - logits_RV.amax(1, keepdim=True)
    weights_RV = shifted.exp_().mul_(UNIT).to(torch.int64)
    del shifted
    sums_RV = torch.cumsum(weights_RV, 1, out=weights_RV)
    total_R1 = sums_RV[:, -1:]
    # Rounded up, the largest number could reach the total, which is nobody's.
    at_RM = (uniforms_RM * total_R1).to(torch.int64).minimum(total_R1 - 1)
    ids_RM = torch.searchsorted(sums_RV, at_RM, right=True)
    return ids_RM.clamp_(0, logits_RV.shape[1] - 1).sort(dim=1).values.to(torch.int32)


def uniforms(keys_R: torch.Tensor, num_draws: int) -> torch.Tensor:
    """Numbers in [0, 1), float64 [R, M]: the first M of splitmix64 from each key's hash."""
    counter_M = torch.arange(1, num_draws + 1, device=keys_R.device) * _GAMMA
    bits_RM = _mix(_mix(keys_R)[:, None] + counter_M)
    return _shift(bits_RM, 11).double() * 2.0**-53


def _mix(x: torch.Tensor) -> torch.Tensor:
    x = (x ^ _shift(x, 30)) * _FIRST
    x = (x ^ _shift(x, 27)) * _SECOND
    return x ^ _shift(x, 31)


def _shift(x: torch.Tensor, count: int) -> torch.Tensor:
    """To the right, as if without sign."""
    return (x >> count) & ((1 << (64 - count)) - 1)
