"""Sums over more values than fit in memory: means with their errors, and quantiles.

Everything is added in the order it comes, so that equal runs give equal numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
import pyarrow as pa

from ..counts import OTHER
from ..sketches import sketch_bin, sketch_value

T = TypeVar("T")

EXACT_VALUES = 1 << 23
"""Values that quantiles are read from exactly: 64 MB."""


class Moments:
    """Means, variances and covariances of columns, by Chan's update: no large sums cancel."""

    def __init__(self, num_columns: int) -> None:
        self.count = 0
        self.mean = np.zeros(num_columns)
        self._scatter = np.zeros((num_columns, num_columns))

    def add(self, *columns: np.ndarray) -> None:
        """Count values that belong together."""
        values = np.stack([np.asarray(column, np.float64) for column in columns])
        count = values.shape[1]
        if not count:
            return
        mean = values.mean(1)
        centred = values - mean[:, None]
        delta, total = mean - self.mean, self.count + count
        shift = np.outer(delta, delta) * (self.count * count / total)
        self._scatter += centred @ centred.T + shift
        self.mean = self.mean + delta * (count / total)
        self.count = total

    def covariance(self, i: int, j: int) -> float:
        """Of two columns; NaN of fewer than two values."""
        return float(self._scatter[i, j]) / (self.count - 1) if self.count > 1 else math.nan

    def sd(self, i: int) -> float:
        """Standard deviation of a column."""
        return math.sqrt(self.covariance(i, i))

    def error(self, i: int) -> float:
        """Standard error of a column's mean: sd / sqrt(n)."""
        return self.sd(i) / math.sqrt(self.count) if self.count else math.nan

    def correlation(self, i: int, j: int) -> float:
        """Pearson's; NaN where a column is constant."""
        spread = math.sqrt(self._scatter[i, i] * self._scatter[j, j])
        return float(self._scatter[i, j]) / spread if spread else math.nan


class Values:
    """Quantiles of a stream of numbers: exact of the first `EXACT_VALUES`, of more from a sketch.

    The sketch has the bins of the summaries', twice as many: a quantile is within 1 %, or 1e-6, of
    the value of its rank. Extremes are exact.
    """

    def __init__(self, most: int = EXACT_VALUES) -> None:
        self.count = 0
        self.least, self.largest = math.inf, -math.inf
        self._most = most
        self._exact: list[np.ndarray] = []
        self._bins: dict[int, int] = {}

    @property
    def is_exact(self) -> bool:
        """Whether all values are held."""
        return not self._bins

    def add(self, values: np.ndarray) -> None:
        """Count values; none may be NaN."""
        if not len(values):
            return
        self.count += len(values)
        self.least = min(self.least, float(values.min()))
        self.largest = max(self.largest, float(values.max()))
        self._exact.append(np.asarray(values, np.float64))
        if self._bins or self.count > self._most:
            self._fold()

    def quantiles(self, shares: Sequence[float]) -> list[float]:
        """Values below which these shares lie, linear between neighbours; NaN of nothing."""
        if not self.count:
            return [math.nan] * len(shares)
        if self.is_exact:
            self._exact = [np.sort(np.concatenate(self._exact), kind="stable")]
        return [self._at(share * (self.count - 1)) for share in shares]

    def median_interval(self) -> tuple[float, float] | None:
        """Where the median of what these were drawn from lies, with a confidence of 95 %.

        By order statistics, whatever the distribution: the number of draws below the median is
        binomial. None of fewer than six values, which give no such interval.
        """
        below = _draws_below(self.count)
        if not below:
            return None
        self.quantiles([0.5])
        return self._at(below - 1), self._at(self.count - below)

    def _at(self, rank: float) -> float:
        low = math.floor(rank)
        if self.is_exact:
            (held,) = self._exact
            pair = held[low : low + 2]
            if len(pair) == 1 or rank == low or pair[0] == pair[1]:
                return float(pair[0])
            return float(pair[0] + (rank - low) * (pair[1] - pair[0]))
        if rank in (0, self.count - 1):
            return self.largest if rank else self.least
        total = 0
        for key in sorted(self._bins):
            total += self._bins[key]
            if total > low:
                (middle,) = sketch_value(np.array([key]))
                return min(max(float(middle), self.least), self.largest)
        raise AssertionError("a rank is below the count")

    def _fold(self) -> None:
        keys, counts = np.unique(sketch_bin(np.concatenate(self._exact)), return_counts=True)
        for key, count in zip(keys.tolist(), counts.tolist(), strict=True):
            self._bins[key] = self._bins.get(key, 0) + count
        self._exact = []


@dataclass(frozen=True)
class Spread:
    """How values lie: their mean with its error, extremes and quantiles."""

    mean: float
    error: float
    """Standard error of the mean, sd / sqrt(n), as if values were independent."""
    least: float
    largest: float
    percentiles: dict[str, float]
    """By percent: "99.9", "50" is the median."""
    is_exact: bool
    """Whether percentiles are exact, and not from a sketch within 1 %."""


class Spreads:
    """Makes a `Spread` of a stream of numbers."""

    def __init__(self, percents: Sequence[str], most: int = EXACT_VALUES) -> None:
        self._percents = percents
        self._values = Values(most)
        self._moments = Moments(1)

    def add(self, values: np.ndarray) -> None:
        """Count values; none may be NaN."""
        self._values.add(values)
        self._moments.add(values[np.isfinite(values)])

    def spread(self) -> Spread:
        """Of all values so far."""
        values, moments = self._values, self._moments
        found = values.quantiles([float(percent) / 100 for percent in self._percents])
        endless = moments.count < values.count
        return Spread(
            mean=values.largest
            if endless
            else float(moments.mean[0])
            if values.count
            else math.nan,
            error=math.nan if endless else moments.error(0),
            least=values.least,
            largest=values.largest,
            percentiles=dict(zip(self._percents, found, strict=True)),
            is_exact=values.is_exact,
        )


def _draws_below(count: int) -> int:
    """The largest k of which fewer than k of `count` fair coins are heads with at most 2.5 %.

    So that the k-th smallest and the k-th largest value hold the median in 95 % of cases; 0 if
    there is no such k. By the normal curve, rounded to the safe side, of many.
    """
    if count > 1000:
        return math.floor((count - 1.96 * math.sqrt(count)) / 2)
    total, weight = 0, 1
    for k in range(count + 1):
        total += weight
        if total > 0.025 * 2**count:
            return k
        weight = weight * (count - k) // (k + 1)
    return 0


MAX_GROUPS = 256
"""Pairs of source and language that are told apart; what comes later counts as `OTHER`."""


class Grouped(Generic[T]):
    """Sums of their own for every source and language, and for all together."""

    def __init__(self, make: Callable[[], T]) -> None:
        self._make = make
        self.total = make()
        self.groups: dict[tuple[str, str], T] = {}

    def split(self, table: pa.Table) -> Iterator[tuple[T, np.ndarray]]:
        """For each group that is among the rows of a table, its sums and its rows."""
        codes, names = [], []
        for name in ("source", "language"):
            encoded = table[name].combine_chunks().dictionary_encode()
            if isinstance(encoded, pa.ChunkedArray):
                encoded = encoded.unify_dictionaries().combine_chunks()
            codes.append(encoded.indices.to_numpy(zero_copy_only=False).astype(np.int64))
            names.append(encoded.dictionary.to_pylist())
        both = codes[0] * max(1, len(names[1])) + codes[1]
        order = np.argsort(both, kind="stable")
        keys, starts = np.unique(both[order], return_index=True)
        by_place: dict[tuple[str, str], list[np.ndarray]] = {}
        for key, rows in zip(keys.tolist(), np.split(order, starts[1:]), strict=True):
            source, language = divmod(key, len(names[1]))
            place = self._place(names[0][source], names[1][language])
            by_place.setdefault(place, []).append(rows)
        for place, parts in by_place.items():
            yield self.groups[place], np.sort(np.concatenate(parts))

    def _place(self, source: str, language: str) -> tuple[str, str]:
        place = (source, language)
        if place not in self.groups:
            if len(self.groups) >= MAX_GROUPS:
                place = (OTHER, "")
            self.groups.setdefault(place, self._make())
        return place
