"""How often a model expects every token of its vocabulary, added up over rows of logits.

Legend: R rows, V vocabulary, G groups.
"""

from __future__ import annotations

import torch

from .choice import has_triton
from .logits import RowStatistics

UNIT = 2.0**-36
"""What sums count in. Sums of whole numbers have the same bits in any order, which those of floats
have not; fewer than 2^27 rows that are sure of one token fit in an int64."""
EXPECTED, VARIANCE, OBSERVED = range(3)
"""What is added up: sum p, sum p (1 - p), both in `UNIT`, and how often a token was the target."""
_ROWS = 16


def add_frequencies(
    logits_RV: torch.Tensor,
    statistics: RowStatistics,
    targets_R: torch.Tensor,
    groups_R: torch.Tensor,
    sums_G3V: torch.Tensor,
) -> None:
    """Add what each row expects, and what followed it, to the sums of its group.

    p = exp(log p) in float32 with log p as `logits.narrow` rounds it. If the token of each row were
    drawn from the row's distribution, a token would be observed sum p times, with variance
    sum p (1 - p).

    Args:
        logits_RV: float32, contiguous but for the distance between rows; left as it is.
        statistics: of the same rows.
        targets_R: int64 with values in [0, V).
        groups_R: int64 with values in [0, G); a row of -1 counts for nothing, and so does one that
            has no distribution.
        sums_G3V: contiguous int64, in the order of `EXPECTED`, `VARIANCE`, `OBSERVED`.
    """
    num_columns = logits_RV.shape[1]
    counted_R = (groups_R >= 0) & statistics.logsumexp.isfinite()
    groups_R = torch.where(counted_R, groups_R, -1)
    # Whole numbers again: the order of these additions does not matter.
    at_R = (groups_R.clamp(min=0) * 3 + OBSERVED) * num_columns + targets_R
    sums_G3V.view(-1).index_add_(0, at_R, counted_R.to(torch.int64))
    if has_triton(logits_RV):
        from .gpu import frequencies

        frequencies.add_expected(logits_RV, statistics, groups_R, sums_G3V)
        return
    for start in range(0, len(logits_RV), _ROWS):
        rows = slice(start, start + _ROWS)
        part, groups = logits_RV[rows], groups_R[rows]
        top_R1 = part.gather(1, statistics.top1_id[rows, None].long())
        p = ((part - top_R1) + statistics.top1_logprob[rows, None]).exp_()
        for group in groups.unique().tolist():
            if group >= 0:
                own = p[groups == group]
                sums_G3V[group, EXPECTED] += _count(own)
                sums_G3V[group, VARIANCE] += _count(own - own * own)


def _count(values: torch.Tensor) -> torch.Tensor:
    """Columns' sums in `UNIT`."""
    return (values / UNIT).round_().to(torch.int64).sum(0)
