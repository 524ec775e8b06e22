"""Windows -> packed batches: sequences side by side under a budget of tokens, nothing padded."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

import numpy as np

from .prefixes import LEAST_SHARED, Branch, Growing, branch
from .trie import Trie

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


def pack_alike(
    branches: Sequence[Growing], num_scored: Sequence[int], budget: int
) -> list[list[tuple[int, Branch]]]:
    """Sequences grouped so that those that begin alike are neighbours: indices, and what each adds.

    A group's tokens fit `budget`, what is computed once for neighbours counted once, but for a
    sequence that is longer by itself; and so do the rows that are scored.

    Args:
        branches: each by what it adds to the one before it here.
        num_scored: rows that are scored of each.
    """
    batches: list[list[tuple[int, Branch]]] = []
    total = budget
    for i, shared, path in Trie(branches).walk():
        saved = shared if batches and shared >= LEAST_SHARED else 0
        weight = max(path.length - saved, num_scored[i])
        if total + weight > budget:
            batches.append([])
            saved, total = 0, 0
            weight = max(path.length, num_scored[i])
        batches[-1].append((i, Branch(saved, path.ids(saved))))
        total += weight
    return batches


def rounds_alike(
    items: Iterable[tuple[_T, int, np.ndarray | None]], budget: int, *, first: int | None = None
) -> Iterator[list[tuple[_T, Branch | None]]]:
    """`rounds` of items whose tokens count once where they and the item before begin alike.

    Items are (item, weight, ids), of which ids that are given weigh themselves what the item before
    in the round does not begin with, though at least `weight`; and no more of them is held. The
    first round may be given a budget of its own.
    """
    group: list[tuple[_T, Branch | None]] = []
    total, room = 0, budget if first is None else first
    before: np.ndarray | None = None
    for item, least, ids in items:
        added = None if ids is None else branch(before, ids)
        weight = least if added is None else max(least, len(added.ids))
        if group and total + weight > room:
            yield group
            group, total, room = [], 0, budget
            if ids is not None:
                added = branch(None, ids)
                weight = max(least, len(ids))
        group.append((item, added))
        total += weight
        before = ids
    if group:
        yield group


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
