"""Statistics of each row of logits: what a score keeps of a distribution over the vocabulary."""

from __future__ import annotations

from typing import NamedTuple

import torch


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
    with values in [0, V). A row that holds a NaN or an infinity comes out as NaN in `logprob`.
    """
    target_R1 = logits_RV.gather(1, targets_R[:, None])
    rank = (logits_RV > target_R1).sum(1, dtype=torch.int32) + 1
    max_R, top1 = logits_RV.max(1)
    shifted = logits_RV.sub_(max_R[:, None])
    weight = shifted.exp()
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
        top1_id=top1.to(torch.int32),
        top1_logprob=-log_total,
        logsumexp=max_R + log_total,
    )
