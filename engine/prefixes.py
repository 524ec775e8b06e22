"""Sequences that begin alike, laid out so that what they share is computed once.

Every part of a decoder but attention sees a token alone, and `TreeAttention` gives it the same bits
in all sequences that begin with what it has seen: it is computed for the first of them.

Legend: T rows that are computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

LEAST_SHARED = 16
"""Tokens that must be saved for two sequences to be held together."""


@dataclass(frozen=True)
class Tree:
    """Sequences, and the rows that their tokens are computed in."""

    ids: np.ndarray
    """int64 [T]: the token of every row."""
    positions: np.ndarray
    """int64 [T]: its place in its sequences."""
    paths: list[np.ndarray]
    """Of each sequence the rows of its tokens, int64 [length]. Its own rows are consecutive and
    stand at the end, and there are none where another sequence begins with all of it."""
    num_shared: list[int]
    """Of each sequence the tokens that a sequence before it has computed."""

    @property
    def lengths(self) -> list[int]:
        """Tokens of each sequence."""
        return [len(path) for path in self.paths]


def fold(sequences: Sequence[np.ndarray]) -> Tree:
    """Share what each sequence and the one before it begin with.

    Where those that begin alike are neighbours, they share all that they can.
    """
    shared = [0] * min(1, len(sequences))
    for before, ids in pairwise(sequences):
        shared.append(count_saved(before, ids))
    paths: list[np.ndarray] = []
    positions, first = [], 0
    for ids, count in zip(sequences, shared, strict=True):
        own = np.arange(first, first + len(ids) - count)
        paths.append(np.concatenate([paths[-1][:count], own]) if count else own)
        positions.append(np.arange(count, len(ids)))
        first += len(own)
    own_ids = [ids[count:] for ids, count in zip(sequences, shared, strict=True)]
    return Tree(np.concatenate(own_ids).astype(np.int64), np.concatenate(positions), paths, shared)


def count_saved(before: np.ndarray, ids: np.ndarray) -> int:
    """How many tokens of a sequence are not computed again after the one before it."""
    count = count_shared(before, ids)
    return count if count >= LEAST_SHARED else 0


def count_shared(one: np.ndarray, other: np.ndarray) -> int:
    """How many tokens two sequences begin with alike."""
    length = min(len(one), len(other))
    unlike = np.flatnonzero(one[:length] != other[:length])
    return int(unlike[0]) if len(unlike) else length
