"""Percentiles of document scores, by group and weighted: exact, of any number of documents.

Scores are read shard by shard, and of many documents four times over: each reading tells 16 more
bits of where a percentile lies, so that no more than histograms is ever held.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

Rows = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Of some documents: group (text), score (float64, none NaN), weight (int64)."""

# Documents whose scores can all be held: one reading does.
_HELD = 1 << 22
_LEAST_ADDED = 1 << 14
_TOP = np.uint64(1 << 63)


@dataclass(frozen=True)
class _Place:
    """Where a percentile lies, as far as it is known: the leading bits of its score's key."""

    prefix: int
    below: int
    """Weight of all that is certainly less."""


def find_percentiles(
    read: Callable[[], Iterator[Rows]], percentiles: Sequence[float], num_documents: int
) -> dict[str, list[float]]:
    """Of every group the scores at `percentiles` (more than 0, at most 100), in their order.

    The score at p is the smallest one such that documents of at most that score have p percent of
    the group's weight or more (numpy's `inverted_cdf`). Groups without weight are left out.

    Args:
        read: gives all documents, the same each time, a shard at a time.
        num_documents: about how many there are; decides no result.
    """
    widths = [64] if num_documents <= _HELD else [16] * 4
    places: dict[str, list[_Place]] = {}
    totals: dict[str, int] = {}
    known = 0
    for width in widths:
        histograms = _count(read(), places, known, width)
        if not known:
            totals = {group: int(h.sums()[1].sum()) for (group, _), h in histograms.items()}
            totals = {group: total for group, total in totals.items() if total}
            places = {group: [_Place(0, 0)] * len(percentiles) for group in totals}
        places = {
            group: [
                _narrow(place, histograms[group, place.prefix], percentile / 100.0, total, width)
                for place, percentile in zip(places[group], percentiles, strict=True)
            ]
            for group, total in totals.items()
        }
        known += width
    return {group: _values([p.prefix for p in found]) for group, found in places.items()}


class _Histogram:
    """Weight by digits, in the order of digits.

    What comes is added up once it is as much as what is there: of many small shards each would
    else cost all before it.
    """

    def __init__(self) -> None:
        self._digits = [np.zeros(0, np.uint64)]
        self._weights = [np.zeros(0, np.int64)]
        self._num_waiting = 0

    def add(self, digits: np.ndarray, weights: np.ndarray) -> None:
        self._digits.append(digits)
        self._weights.append(weights)
        self._num_waiting += len(digits)
        if self._num_waiting > max(_LEAST_ADDED, len(self._digits[0])):
            self._add_up()

    def sums(self) -> tuple[np.ndarray, np.ndarray]:
        """The digits that came, ascending, and the weight of each."""
        self._add_up()
        return self._digits[0], self._weights[0]

    def _add_up(self) -> None:
        digits, place = np.unique(np.concatenate(self._digits), return_inverse=True)
        sums = np.zeros(len(digits), np.int64)
        np.add.at(sums, place, np.concatenate(self._weights))
        self._digits, self._weights, self._num_waiting = [digits], [sums], 0


def _count(
    shards: Iterator[Rows], places: Mapping[str, Sequence[_Place]], known: int, width: int
) -> dict[tuple[str, int], _Histogram]:
    """Of the documents that a percentile may be among, the next `width` bits of their keys."""
    histograms: dict[tuple[str, int], _Histogram] = defaultdict(_Histogram)
    for groups, scores, weights in shards:
        names, code = np.unique(groups.astype(str), return_inverse=True)
        order = np.argsort(code, kind="stable")
        keys, sorted_weights = _keys(scores)[order], weights[order]
        counts = np.bincount(code, minlength=len(names))
        for name, stop, count in zip(names.tolist(), np.cumsum(counts), counts, strict=True):
            own, own_weights = keys[stop - count : stop], sorted_weights[stop - count : stop]
            if not known:
                histograms[name, 0].add(own >> np.uint64(64 - width), own_weights)
                continue
            for prefix in {place.prefix for place in places.get(name, ())}:
                within = own >> np.uint64(64 - known) == prefix
                digits = own[within] >> np.uint64(64 - known - width)
                digits &= np.uint64((1 << width) - 1)
                histograms[name, prefix].add(digits, own_weights[within])
    return histograms


def _narrow(place: _Place, found: _Histogram, share: float, total: int, width: int) -> _Place:
    digits, weights = found.sums()
    up_to = place.below + np.cumsum(weights)
    i = int(np.searchsorted(up_to / total, share, side="left"))
    # A share of 1 may be beyond the last quotient by a rounding.
    i = min(i, len(up_to) - 1)
    prefix = (place.prefix << width) | int(digits[i])
    return _Place(prefix, int(up_to[i] - weights[i]))


def _keys(scores: np.ndarray) -> np.ndarray:
    """uint64 that are ordered as float64 are."""
    bits = (np.asarray(scores, np.float64) + 0.0).view(np.uint64)
    return np.where(bits & _TOP, ~bits, bits | _TOP)


def _values(keys: Sequence[int]) -> list[float]:
    """The float64 of keys."""
    ordered = np.array(keys, np.uint64)
    return np.where(ordered & _TOP, ordered ^ _TOP, ~ordered).view(np.float64).tolist()
