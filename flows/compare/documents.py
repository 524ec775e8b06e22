"""Two runs document by document: what moved, by how much, how surely, and where.

A difference is the other's less the base's: above 0 the other run is the more surprised. Documents
are paired by their ids; one whose text is not the same in both is left out, and counted.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ...engine.records import OK
from ..run import Run
from .extremes import BIN, NUM_BINS, Document, Extremes, Found, numbers
from .pairing import OnProgress, Stream, pair
from .sums import EXACT_VALUES, Grouped, Moments, Values

COLUMNS = (
    *("source", "language", "status", "num_tokens", "num_tokens_scored", "num_bytes"),
    *("num_words", "zlib_bytes", "loglikelihood", "nll_per_token", "bits_per_byte"),
)
MAX_NAMED = 20
"""Documents that are named where there is something to say of them."""
_GROUP_VALUES = EXACT_VALUES // 128
_LN2 = math.log(2.0)

BITS_PER_BYTE, BITS_PER_TOKEN = "bits/byte", "bits/token"


@dataclass(frozen=True)
class Drift:
    """How documents moved: differences of the measure, other less base."""

    source: str
    language: str
    documents: int
    median: float
    low: float | None
    """Where the median's interval of 95 % begins, from order statistics; None of fewer than 6."""
    high: float | None
    mean: float
    error: float
    """Of the mean, sd / sqrt(n); NaN of a single document."""
    delta_nll: float
    """Mean over documents of nats a token, other less base: the change of ln perplexity. NaN where
    no document has as many tokens in both."""
    delta_nll_error: float
    base: float
    """Of all documents as one text: bits over bytes (or tokens)."""
    other: float


@dataclass
class Few:
    """How many documents something holds of, and the first of them in the order they came."""

    count: int = 0
    named: list[str] = field(default_factory=list)

    def add(self, ids: pa.Array | pa.ChunkedArray) -> None:
        """Count documents."""
        self.count += len(ids)
        room = MAX_NAMED - len(self.named)
        self.named += ids.slice(0, max(0, room)).to_pylist()


@dataclass(frozen=True)
class Documents:
    """What two runs make of the documents that both hold."""

    measure: str
    """`bits/byte`; `bits/token` if no document has bytes."""
    all: Drift | None
    """None if nothing is paired."""
    groups: list[Drift]
    """By source and language, the largest first."""
    only_base: Few
    only_other: Few
    changed: Few
    """Other text under the same id."""
    moved: dict[tuple[str, str], Few]
    """Documents whose status is another one, by (base's, other's)."""
    unscored: int
    """Scored by neither."""
    slope: float
    """Of the least-squares line of other over base, through the means of both."""
    intercept: float
    correlation: float
    counts: np.ndarray
    """Documents by bin of base, then of other: [NUM_BINS, NUM_BINS]."""
    worse: list[Document]
    """Of which the other run is the more surprised, the most first."""
    better: list[Document]
    residual: list[Document]
    """The farthest from the line."""
    is_exact: bool
    """Whether quantiles are exact, and not from a sketch within 1 %."""


def compare_documents(base: Run, other: Run, on_progress: OnProgress) -> Documents:
    """Pair the documents of two runs and add up what differs, shard by shard."""
    tally = _Tally(find_measure(base, other))
    streams = [Stream(run, "scores", COLUMNS) for run in (base, other)]
    for ours, theirs in pair(*streams, on_progress=on_progress, on_alone=tally.add_alone):
        tally.add(ours, theirs)
    return tally.sum_up()


def find_measure(base: Run, other: Run) -> str:
    """What documents of two runs are compared by: bits/byte, or bits/token if one has no bytes."""
    assert base.manifest is not None and other.manifest is not None
    has_bytes = base.manifest["bytes"] and other.manifest["bytes"]
    return BITS_PER_BYTE if has_bytes else BITS_PER_TOKEN


class _Sums:
    """Of the documents of a group."""

    def __init__(self, most: int = _GROUP_VALUES) -> None:
        self.delta = Values(most)
        self.moments = Moments(3)
        """Base, other, and other less base."""
        self.delta_nll = Moments(1)
        self.size = np.zeros(2, np.int64)
        self.bits = np.zeros(2)

    def add(self, found: Found, rows: np.ndarray | slice) -> None:
        delta = found.delta[rows]
        self.delta.add(delta)
        self.moments.add(found.base[rows], found.other[rows], delta)
        nll = found.delta_nll[rows]
        self.delta_nll.add(nll[~np.isnan(nll)])
        self.size += found.size[:, rows].sum(1)
        self.bits += found.bits[:, rows].sum(1)

    def drift(self, source: str, language: str) -> Drift:
        low, high = self.delta.median_interval() or (None, None)
        (median,) = self.delta.quantiles([0.5])
        has_nll = self.delta_nll.count > 0
        base, other = self.bits / self.size if self.size.all() else (math.nan, math.nan)
        return Drift(
            source=source,
            language=language,
            documents=self.delta.count,
            median=median,
            low=low,
            high=high,
            mean=float(self.moments.mean[2]),
            error=self.moments.error(2),
            delta_nll=float(self.delta_nll.mean[0]) if has_nll else math.nan,
            delta_nll_error=self.delta_nll.error(0) if has_nll else math.nan,
            base=float(base),
            other=float(other),
        )


class _Tally:
    def __init__(self, measure: str) -> None:
        self._measure = measure
        self._drift = Grouped(_Sums)
        self._drift.total = _Sums(EXACT_VALUES)
        self._only = (Few(), Few())
        self._changed = Few()
        self._moved: dict[tuple[str, str], Few] = {}
        self._unscored = 0
        self._counts = np.zeros((NUM_BINS, NUM_BINS), np.int64)
        self._extremes = Extremes()

    def add_alone(self, base_ids: pa.Array, other_ids: pa.Array) -> None:
        for few, ids in zip(self._only, (base_ids, other_ids), strict=True):
            few.add(ids)

    def add(self, ours: pa.Table, theirs: pa.Table) -> None:
        is_scored = pc.and_(pc.equal(ours["status"], OK), pc.equal(theirs["status"], OK))
        self._count_statuses(ours["doc_id"], ours["status"], theirs["status"])
        ours, theirs = ours.filter(is_scored), theirs.filter(is_scored)
        same = same_text(ours, theirs)
        self._changed.add(ours["doc_id"].filter(pa.array(~same)))
        measured = same & _are_measured(ours, theirs, self._measure)
        ours, theirs = (t.filter(pa.array(measured)) for t in (ours, theirs))
        if not len(ours):
            return
        found = self._find(ours, theirs)
        for sums, rows in self._drift.split(ours):
            sums.add(found, rows)
        self._drift.total.add(found, slice(None))
        at = [
            np.clip((values / BIN).astype(np.int64), 0, NUM_BINS - 1)
            for values in (found.base, found.other)
        ]
        np.add.at(self._counts, (at[0], at[1]), 1)
        self._extremes.add(ours, found)

    def _count_statuses(
        self, ids: pa.ChunkedArray, ours: pa.ChunkedArray, theirs: pa.ChunkedArray
    ) -> None:
        differs = pc.not_equal(ours, theirs)
        pairs = list(
            zip(ours.filter(differs).to_pylist(), theirs.filter(differs).to_pylist(), strict=True)
        )
        moved = ids.filter(differs)
        for key in sorted(set(pairs)):
            rows = pa.array([i for i, p in enumerate(pairs) if p == key])
            self._moved.setdefault(key, Few()).add(moved.take(rows))
        neither = pc.and_(pc.not_equal(ours, OK), pc.not_equal(theirs, OK))
        self._unscored += pc.sum(neither).as_py() or 0

    def _find(self, ours: pa.Table, theirs: pa.Table) -> Found:
        bits = np.stack([-numbers(t, "loglikelihood") / _LN2 for t in (ours, theirs)])
        if self._measure == BITS_PER_BYTE:
            sized = "num_bytes"
            base, other = (numbers(t, "bits_per_byte") for t in (ours, theirs))
        else:
            sized = "num_tokens_scored"
            base, other = (numbers(t, "nll_per_token") / _LN2 for t in (ours, theirs))
        nll = numbers(theirs, "nll_per_token") - numbers(ours, "nll_per_token")
        unlike = numbers(ours, "num_tokens_scored") != numbers(theirs, "num_tokens_scored")
        nll[unlike] = math.nan
        size = np.stack([numbers(t, sized).astype(np.int64) for t in (ours, theirs)])
        return Found(base, other, other - base, nll, size, bits)

    def sum_up(self) -> Documents:
        total = self._drift.total
        drifts = [sums.drift(*key) for key, sums in self._drift.groups.items()]
        slope, intercept = _fit(total.moments)
        worse, better, residual = self._extremes.choose(slope, intercept)
        return Documents(
            measure=self._measure,
            all=total.drift("", "") if total.delta.count else None,
            groups=sorted(drifts, key=lambda d: (-d.documents, d.source, d.language)),
            only_base=self._only[0],
            only_other=self._only[1],
            changed=self._changed,
            moved=dict(sorted(self._moved.items())),
            unscored=self._unscored,
            slope=slope,
            intercept=intercept,
            correlation=total.moments.correlation(0, 1),
            counts=self._counts,
            worse=worse,
            better=better,
            residual=residual,
            is_exact=total.delta.is_exact,
        )


def same_text(ours: pa.Table, theirs: pa.Table) -> np.ndarray:
    """Whether documents are the same in both runs, as far as their scores tell."""

    def equal(name: str) -> np.ndarray:
        # A column that neither has tells nothing.
        same = pc.fill_null(pc.equal(ours[name], theirs[name]), True)
        return same.to_numpy()

    # Words are counted where all of the text was scored, and then bytes are all of its bytes.
    whole = pc.and_(ours["num_words"].is_valid(), theirs["num_words"].is_valid()).to_numpy()
    # Of ids, or of text in one run and ids in the other, there is but the number of tokens.
    is_text = pc.and_(ours["zlib_bytes"].is_valid(), theirs["zlib_bytes"].is_valid()).to_numpy()
    text = equal("zlib_bytes") & (~whole | (equal("num_bytes") & equal("num_words")))
    return np.where(is_text, text, equal("num_tokens"))


def _are_measured(ours: pa.Table, theirs: pa.Table, measure: str) -> np.ndarray:
    name = "bits_per_byte" if measure == BITS_PER_BYTE else "nll_per_token"
    both = pc.and_(pc.is_finite(ours[name]), pc.is_finite(theirs[name]))
    return pc.fill_null(both, False).to_numpy()


def _fit(moments: Moments) -> tuple[float, float]:
    """Slope and intercept of the least-squares line of the second column over the first."""
    if moments.count < 2 or not moments.covariance(0, 0):
        return math.nan, math.nan
    slope = moments.covariance(0, 1) / moments.covariance(0, 0)
    return slope, float(moments.mean[1] - slope * moments.mean[0])
