"""Statistics of each row of logits: what a score keeps of a distribution over the vocabulary."""

from __future__ import annotations

from typing import NamedTuple

import torch

# Columns of one tile in the search for a row's maximum.
_TILE = 128


class RowStatistics(NamedTuple):
    """One value a row, all float32 nats but for `rank` (int32) and `top1_id` (int32)."""

    logprob: torch.Tensor
    entropy: torch.Tensor
    varentropy: torch.Tensor
    rank: torch.Tensor
    top1_id: torch.Tensor
    top1_logprob: torch.Tensor
    logsumexp: torch.Tensor


def row_statistics(logits_RV: torch.Tensor, targets_R: torch.Tensor) -> RowStatistics:
    """Log-probability of the targets and the shape of each row's distribution.

    With m = max z, w = exp(z - m), s = sum w and log p = z - m - log s:

        logsumexp  = m + log s
        entropy    = log s - sum w (z - m) / s
        varentropy = sum w (z - m)^2 / s - (sum w (z - m) / s)^2
        rank       = 1 + #{j : z_j > z_target}
        top1_id    = the lowest j with z_j = m

    Both moments are taken about m, whose neighbourhood holds the mass, so that a confident row
    does not cancel. `logits_RV` is float32 [R, V], overwritten as scratch; `targets_R` int64 [R]
    with values in [0, V). A row with a NaN or +inf comes out as NaN;
    a -inf leaves `logprob` as it is and makes the moments NaN.
    """
    target_R1 = logits_RV.gather(1, targets_R[:, None])
    max_R, top1_R = _first_max(logits_RV)
    # Ones in float32 add up exactly to 2^24, and faster than booleans do.
    weight = torch.empty_like(logits_RV)
    rank = torch.gt(logits_RV, target_R1, out=weight).sum(1).to(torch.int32) + 1
    shifted = logits_RV.sub_(max_R[:, None])
    torch.exp(shifted, out=weight)
    total = weight.sum(1)
    weight *= shifted
    mean = weight.sum(1) / total
    weight *= shifted
    square = weight.sum(1) / total
    log_total = total.log()
    return RowStatistics(
        logprob=target_R1[:, 0] - max_R - log_total,
        entropy=log_total - mean,
        varentropy=(square - mean.square()).clamp_min_(0.0),
        rank=rank,
        top1_id=top1_R.to(torch.int32),
        top1_logprob=-log_total,
        logsumexp=max_R + log_total,
    )


def _first_max(logits_RV: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Each row's maximum and the lowest column that holds it.

    The maxima of tiles come first, which vectorises where a search for a position does not; then
    only the first tile that holds the maximum is searched.
    """
    num_columns = logits_RV.shape[1]
    whole = num_columns // _TILE * _TILE
    tiles = logits_RV[:, :whole].unflatten(1, (-1, _TILE))
    maxima = tiles.amax(2)
    if whole < num_columns:
        maxima = torch.cat([maxima, logits_RV[:, whole:].amax(1, keepdim=True)], dim=1)
    tile_R = maxima.argmax(1)
    columns = tile_R[:, None] * _TILE + torch.arange(_TILE, device=logits_RV.device)
    # Beyond the last column the last one stands in, which is never the first of equals.
    found = logits_RV.gather(1, columns.clamp_max_(num_columns - 1))
    return maxima.gather(1, tile_R[:, None])[:, 0], tile_R * _TILE + found.argmax(1)
