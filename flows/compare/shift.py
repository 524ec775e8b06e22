"""How two distributions of documents differ where the documents themselves are not the same.

From summaries alone: nothing is read that grows with the corpus.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ..counts import BITS_PER_BYTE
from ..histograms import BIN_BITS_PER_BYTE

NUM_CLASSES = 10
"""Of the population stability index: the base's tenths."""
MIN_DOCUMENTS = 30
"""In both runs, for a group to be compared."""


@dataclass(frozen=True)
class Shift:
    """Of bits/byte over documents, from bins of 0.02."""

    source: str
    language: str
    base_documents: int
    other_documents: int
    psi: float
    """Population stability index."""
    psi_by_chance: float
    """What it is on average where both are drawn from one population: (classes - 1)(1/n + 1/m),
    of as many classes as bins leave of the tenths."""
    wasserstein: float
    """Bits/byte that a document is moved on average to make one distribution of the other."""
    base_median: float
    other_median: float


def measure_shift(base: pa.Table, other: pa.Table) -> list[Shift]:
    """Shifts of all documents and, after it, of each source and language that both runs have.

    Args:
        base: schema `summary.COUNTS`, and so `other`.

    Returns:
        The largest groups first; empty if either run has no document with bytes.
    """
    ours, theirs = (_histograms(table) for table in (base, other))
    total = tuple(_add(list(h.values())) for h in (ours, theirs))
    if not (total[0].sum() and total[1].sum()):
        return []
    shifts = [_shift("", "", *total)]
    groups = [
        _shift(*key, ours[key], theirs[key])
        for key in sorted(ours.keys() & theirs.keys())
        if is_crowd(ours[key].sum(), theirs[key].sum())
    ]
    groups.sort(key=lambda shift: -shift.base_documents)
    return shifts + groups


def is_crowd(*documents: int) -> bool:
    """Whether there are documents enough, in each run, for tenths of them to mean something."""
    return min(documents) >= MIN_DOCUMENTS


def population_stability(base: np.ndarray, other: np.ndarray) -> float:
    """sum (q - p) ln(q / p) over the base's tenths, p and q the shares of documents in them.

    An empty class counts half a document: the logarithm of nothing has no meaning. Up to 0.1 is
    taken for no change, from 0.25 for a large one (Siddiqi 2006).

    Args:
        base: documents by bin, and so `other`; of equal length.
    """
    starts = _class_starts(base)
    p, q = (
        np.maximum(np.add.reduceat(counts, starts), 0.5) / counts.sum() for counts in (base, other)
    )
    return float(((q - p) * np.log(q / p)).sum())


def _class_starts(base: np.ndarray) -> np.ndarray:
    """The bins that the base's tenths begin with; fewer where a bin holds more than one."""
    below = np.cumsum(base)
    edges = np.searchsorted(below, below[-1] * np.arange(1, NUM_CLASSES) / NUM_CLASSES) + 1
    starts = np.unique(np.concatenate([[0], edges]))
    return starts[starts < len(base)]


def wasserstein(base: np.ndarray, other: np.ndarray, width: float) -> float:
    """Area between two distribution functions: earth mover's distance, in the unit of `width`."""
    ours, theirs = (np.cumsum(counts) / counts.sum() for counts in (base, other))
    return float(np.abs(ours - theirs)[:-1].sum() * width)


def _shift(source: str, language: str, base: np.ndarray, other: np.ndarray) -> Shift:
    length = max(len(base), len(other))
    base, other = (np.pad(counts, (0, length - len(counts))) for counts in (base, other))
    num_degrees = len(_class_starts(base)) - 1
    return Shift(
        source=source,
        language=language,
        base_documents=int(base.sum()),
        other_documents=int(other.sum()),
        psi=population_stability(base, other),
        psi_by_chance=float(num_degrees * (1 / base.sum() + 1 / other.sum())),
        wasserstein=wasserstein(base, other, BIN_BITS_PER_BYTE),
        base_median=_median(base),
        other_median=_median(other),
    )


def _median(counts: np.ndarray) -> float:
    # Documents lie evenly within their bin.
    below = np.cumsum(counts)
    at = int(np.searchsorted(below, below[-1] / 2))
    within = 1 - (below[at] - below[-1] / 2) / counts[at]
    return float((at + within) * BIN_BITS_PER_BYTE)


def _histograms(counts: pa.Table) -> dict[tuple[str, str], np.ndarray]:
    """Documents by bin of bits/byte, by source and language."""
    rows = counts.filter(pc.equal(counts["panel"], BITS_PER_BYTE))
    by_group: dict[tuple[str, str], np.ndarray] = {}
    grouped = rows.group_by(["source", "language", "bin"]).aggregate([("documents", "sum")])
    for row in grouped.to_pylist():
        key = (row["source"], row["language"])
        held = by_group.get(key, np.zeros(0, np.int64))
        by_group[key] = _add([held, _one(row["bin"], row["documents_sum"])])
    return by_group


def _one(place: int, count: int) -> np.ndarray:
    array = np.zeros(place + 1, np.int64)
    array[place] = count
    return array


def _add(arrays: list[np.ndarray]) -> np.ndarray:
    total = np.zeros(max((len(a) for a in arrays), default=0), np.int64)
    for array in arrays:
        total[: len(array)] += array
    return total
