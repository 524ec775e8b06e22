"""Quantiles of document scores from additive counts: logarithmic bins, merged by addition.

The rule is DDSketch's (Masson, Rim, Lee: "DDSketch: a fast and fully-mergeable quantile sketch with
relative-error guarantees", 2019): with g = (1 + a) / (1 - a), bin i holds what lies in
(g^(i-1), g^i], and 2 g^i / (g + 1) is within a of all of it, relatively. Bins here are counted from
`SMALLEST`, and those of negative values mirror them, so that bins are ordered as values are:

    bin    0             |x| < SMALLEST, taken for 0
           i > 0         SMALLEST g^(i-1) <= x < SMALLEST g^i, taken for SMALLEST 2 g^i / (g + 1)
           i < 0         as -x, taken for the opposite

with a = 0.01. Summaries count two bins as one, under the number of the one that is farther from 0:
even numbers, and g^2 for g. Those of older runs have odd numbers, too, and are read alike: bin i
lies in (g^(i-2), g^i].
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from .counts import COUNTS, SKETCH

SKETCHES = ("bits_per_byte", "token_perplexity", "min_k_plus_plus_20")
"""Document scores that are sketched: those that corpora are cut by. Bits/byte compares texts over
tokenizers; the token perplexity is there for documents of ids too, and its logarithm is the nll per
token, known to 0.02 nats; Min-K%++ tells what was memorized. Cuts by other scores read `scores`."""
RELATIVE_ERROR = 0.02
"""Of a summary's quantile, at most, where it is not nearer to 0 than `SMALLEST` nor beyond
`LARGEST`."""
SMALLEST, LARGEST = 1e-6, 1e12
WIDTH = 2
"""Bins that a summary counts as one."""
WEIGHTS = ("documents", "tokens", "bytes")

_GAMMA = 1.01 / 0.99
_LAST = math.ceil(math.log(LARGEST / SMALLEST) / math.log(_GAMMA))


def sketch_bin(values: np.ndarray, width: int = 1) -> np.ndarray:
    """Bins, int32, of values that are no NaN; what is beyond `LARGEST` goes to the last.

    `width` bins count as one.
    """
    size = np.abs(values)
    with np.errstate(divide="ignore"):
        bins = np.floor(np.log(size / SMALLEST) / math.log(_GAMMA)) + 1.0
    bins = np.where(size < SMALLEST, 0.0, np.clip(bins, 1.0, _LAST))
    return (np.sign(values) * np.ceil(bins / width) * width).astype(np.int32)


def sketch_value(bins: np.ndarray, width: int = 1) -> np.ndarray:
    """What bins stand for, float64, where `width` count as one."""
    bins = np.asarray(bins, np.float64)
    sizes = SMALLEST * 2.0 / (_GAMMA**width + 1.0) * np.power(_GAMMA, np.abs(bins))
    return np.where(bins == 0, 0.0, np.sign(bins) * sizes)


def quantile(
    counts: pa.Table, score: str, share: float, *, weight: str = "documents"
) -> float | None:
    """The least value of a score that `share` of the weight does not exceed.

    Args:
        counts: schema `counts.COUNTS`, filtered to the documents that are meant.
        score: one of `SKETCHES`.
        share: from 0 to 1.
        weight: what a document counts: 1 (`documents`), or its `tokens` or `bytes`, of which the
            share is met to 1 % (`counts.round_sums`).

    Returns:
        The value within `RELATIVE_ERROR`; None if there is no weight.

    Raises:
        ValueError: naming what is not one of the above.
    """
    (found,) = quantiles(counts, score, [share], by=(), weight=weight).to_pylist() or [{}]
    return found.get(_name(share))


def quantiles(
    counts: pa.Table,
    score: str,
    shares: Sequence[float],
    *,
    by: Sequence[str] = ("source",),
    weight: str = "documents",
) -> pa.Table:
    """`quantile` of groups: a row for each, by the columns `by` and in their order.

    Returns:
        The columns `by`, `documents`, `tokens` and `bytes` that the score is known of, and a column
        for each share: `q30` of 0.3. A group without weight is left out.

    Raises:
        ValueError: naming what is not there.
    """
    _check("score", score, SKETCHES)
    _check("weight", weight, WEIGHTS)
    for name in by:
        _check("by", name, COUNTS.names[1:5])
    for share in shares:
        if not 0.0 <= share <= 1.0:
            raise ValueError(f"share: {share} is not from 0 to 1")
    by = list(by)
    rows = counts.filter(pc.equal(counts["panel"], SKETCH + score))
    rows = rows.group_by([*by, "bin"], use_threads=False).aggregate([(w, "sum") for w in WEIGHTS])
    rows = rows.sort_by([(name, "ascending") for name in (*by, "bin")])
    sums = {w: rows[f"{w}_sum"].to_numpy() for w in WEIGHTS}
    starts = _starts([rows[name].combine_chunks() for name in by], rows.num_rows)
    ends = np.append(starts, rows.num_rows)[1:]
    values = sketch_value(rows["bin"].to_numpy(), WIDTH)
    groups = [slice(a, b) for a, b in zip(starts, ends, strict=True) if sums[weight][a:b].any()]
    first = pa.array([group.start for group in groups], pa.int64())
    made = {name: rows[name].take(first) for name in by}
    made |= {w: pa.array([sums[w][group].sum() for group in groups], pa.int64()) for w in WEIGHTS}
    for share in shares:
        found = [values[group][_place(sums[weight][group], share)] for group in groups]
        made[_name(share)] = pa.array(found, pa.float64())
    return pa.table(made)


def _place(weights: np.ndarray, share: float) -> int:
    """The first place at which the weights, added up, reach `share` of them all."""
    reached = np.cumsum(weights)
    # In whole numbers where they are: 0.3 of 10 is 3, whatever floats make of it.
    wanted = math.ceil(round(share * int(reached[-1]), 6))
    return int(np.searchsorted(reached, max(wanted, 1)))


def _starts(keys: Sequence[pa.Array], num_rows: int) -> np.ndarray:
    """Where rows of other keys than the row before begin."""
    is_new = np.zeros(num_rows, bool)
    is_new[:1] = True
    for key in keys:
        differs = pc.not_equal(key.slice(1), key.slice(0, max(num_rows - 1, 0)))
        is_new[1:] |= differs.to_numpy(zero_copy_only=False)
    return np.flatnonzero(is_new)


def _name(share: float) -> str:
    return f"q{round(100 * share, 6):g}"


def _check(field: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise ValueError(f"{field}: {value!r} is not one of {', '.join(known)}")
