"""Sequences that go on from the beginnings of others: which rows their tokens are computed in.

A sequence shares the rows of what it and the one before it begin with. Its own follow on those of
the sequence before.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np


@dataclass(frozen=True)
class Branches:
    """What each sequence shares and what it adds; takes memory for sequences, not for tokens."""

    num_shared: np.ndarray
    """int64 [sequences]: its tokens that a sequence before it has computed, at its beginning."""
    num_own: np.ndarray
    """int64 [sequences]: its other tokens; there may be none."""

    @cached_property
    def lengths(self) -> np.ndarray:
        """int64 [sequences]: tokens, whoever computes them."""
        return self.num_shared + self.num_own

    @cached_property
    def first_rows(self) -> np.ndarray:
        """int64 [sequences]: where its own rows begin."""
        return np.cumsum(self.num_own) - self.num_own

    @property
    def num_rows(self) -> int:
        """Rows of all sequences."""
        return int(self.num_own.sum())

    @cached_property
    def _owners(self) -> list[int]:
        """Of each the sequence that computes the last token that it shares; -1 without any."""
        owners: list[int] = []
        path: list[int] = []
        for i, count in enumerate(self.num_shared.tolist()):
            while path and self.num_shared[path[-1]] >= count:
                path.pop()
            owners.append(path[-1] if path else -1)
            if self.num_own[i]:
                path.append(i)
        return owners

    def rows(self, i: int, start: int = 0) -> np.ndarray:
        """int64 [length - start]: the rows of a sequence's tokens from position `start` on."""
        stop = int(self.lengths[i])
        parts = []
        while stop > start:
            num_shared = int(self.num_shared[i])
            begin = max(start, num_shared)
            first = int(self.first_rows[i]) - num_shared
            parts.append(np.arange(first + begin, first + stop))
            i, stop = self._owners[i], min(stop, begin)
        return np.concatenate(parts[::-1]) if parts else np.zeros(0, np.int64)
