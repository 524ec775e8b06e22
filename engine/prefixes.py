"""Sequences that begin alike, laid out so that what they share is held and computed once.

Every part of a decoder but attention sees a token alone, and `TreeAttention` gives it the same bits
in all sequences that begin with what it has seen: it is computed for the first of them.

Legend: T rows that are computed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from ..kernels.branches import Branches

LEAST_SHARED = 16
"""Tokens that must be saved for two sequences to be held together."""


class Growing(Protocol):
    """A sequence by what it adds to the one before it."""

    @property
    def num_shared(self) -> int:
        """Tokens that it and the one before it begin with."""

    @property
    def ids(self) -> np.ndarray:
        """Integers: those that follow on them."""


@dataclass(frozen=True)
class Branch:
    """A sequence by what it adds to the one before it."""

    num_shared: int
    ids: np.ndarray


def branch(before: np.ndarray | None, ids: np.ndarray) -> Branch:
    """A sequence after another one; what they share is not held on to."""
    count = 0 if before is None else count_saved(before, ids)
    return Branch(count, ids[count:].copy())


def unfold(branches: Sequence[Growing]) -> Iterator[np.ndarray]:
    """The sequences as they are, one after another."""
    ids = np.zeros(0, np.int32)
    for one in branches:
        ids = np.concatenate([ids[: one.num_shared], one.ids])
        yield ids


def join(branches: Sequence[Growing], i: int) -> np.ndarray:
    """One of the sequences as it is."""
    parts = [branches[i].ids]
    missing = branches[i].num_shared
    while missing:
        i -= 1
        shared = branches[i].num_shared
        if shared < missing:
            parts.append(branches[i].ids[: missing - shared])
            missing = shared
    return np.concatenate(parts[::-1])


@dataclass(frozen=True)
class Tree:
    """Sequences, and the rows that their tokens are computed in."""

    ids: np.ndarray
    """int64 [T]: the token of every row."""
    positions: np.ndarray
    """int64 [T]: its place in its sequences."""
    branches: Branches
    """Which rows are whose."""


def fold(branches: Sequence[Growing]) -> Tree:
    """Rows for what each sequence adds to the one before it; the first adds all it has."""
    num_shared = np.array([one.num_shared for one in branches], np.int64)
    own = [one.ids for one in branches]
    num_own = np.array([len(ids) for ids in own], np.int64)
    found = Branches(num_shared, num_own)
    ids = np.concatenate(own).astype(np.int64)
    positions = np.arange(len(ids)) + np.repeat(num_shared - found.first_rows, num_own)
    return Tree(ids, positions, found)


def count_saved(before: np.ndarray, ids: np.ndarray) -> int:
    """How many tokens of a sequence are not computed again after the one before it."""
    count = count_shared(before, ids)
    return count if count >= LEAST_SHARED else 0


def count_shared(one: np.ndarray, other: np.ndarray) -> int:
    """How many tokens two sequences begin with alike."""
    length = min(len(one), len(other))
    unlike = np.flatnonzero(one[:length] != other[:length])
    return int(unlike[0]) if len(unlike) else length
