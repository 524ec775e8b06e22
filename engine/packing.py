"""Windows -> packed batches: sequences side by side under a budget of tokens, nothing padded."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

import numpy as np

from .prefixes import count_saved

_T = TypeVar("_T")


def pack(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Indices of sequences grouped so that each group's tokens fit `budget`.

    First-fit decreasing: longest first, each into the first batch that still has room, so that
    equal lengths lie side by side and batches come out nearly full. A sequence longer than the
    budget is a batch of its own. Deterministic: equal lengths keep their order.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    batches: list[list[int]] = []
    room: list[int] = []
    first_open = 0
    for i in order:
        for b in range(first_open, len(batches)):
            if lengths[i] <= room[b]:
                batches[b].append(i)
                room[b] -= lengths[i]
                break
        else:
            batches.append([i])
            room.append(budget - lengths[i])
        while first_open < len(batches) and room[first_open] <= 0:
            first_open += 1
    return batches


def pack_alike(sequences: Iterable[np.ndarray], budget: int) -> list[list[int]]:
    """Indices of sequences grouped so that those that begin alike are neighbours.

    A group's tokens fit `budget`, where what is computed once for a sequence and the one before it
    counts once, but for a sequence that is longer by itself.
    """
    sequences = list(sequences)
    # Big-endian bytes of what is not negative compare as the numbers do.
    keys = [ids.astype(">u4").tobytes() for ids in sequences]
    batches: list[list[int]] = []
    total = budget
    for i in sorted(range(len(sequences)), key=keys.__getitem__):
        own = len(sequences[i])
        if batches:
            own -= count_saved(sequences[batches[-1][-1]], sequences[i])
        if total + own > budget:
            batches.append([])
            own, total = len(sequences[i]), 0
        batches[-1].append(i)
        total += own
    return batches


def rounds(items: Iterable[tuple[_T, int]], budget: int) -> Iterator[list[_T]]:
    """Consecutive items whose weights sum to at most `budget`, at least one item each."""
    group: list[_T] = []
    total = 0
    for item, weight in items:
        if group and total + weight > budget:
            yield group
            group, total = [], 0
        group.append(item)
        total += weight
    if group:
        yield group
