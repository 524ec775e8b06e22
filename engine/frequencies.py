"""How often a model expects every token of its vocabulary, against how often it stands there.

Legend: V vocabulary, G groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ..kernels.frequencies import EXPECTED, OBSERVED, UNIT, VARIANCE
from .transfer import to_device

MAX_SOURCES = 64
"""Sources that are told apart unless it is said otherwise: each takes 24 V bytes on the device, and
as many again in a batch that has it."""
OTHER = "(other)"
"""The source of all that come after as many."""


@dataclass(frozen=True)
class Frequency:
    """What a source's scored tokens were expected to be, and what they were."""

    expected: np.ndarray
    """float64 [V]: sum of p(token) over the rows."""
    variance: np.ndarray
    """float64 [V]: sum of p (1 - p), that of `observed` if rows were drawn from their
    distributions."""
    observed: np.ndarray
    """int64 [V]: how often each token was the one that followed."""


class Frequencies:
    """Expected and observed counts of all tokens by source, filled by `Pipeline.score`.

    A row counts if it has a distribution, those of documents that others make `nonfinite` too.
    Probabilities are added as multiples of 2^-36, so that equal documents give equal sums in any
    batches and order; a source may have fewer than 2^27 rows that are sure of one token.
    """

    def __init__(self, max_sources: int = MAX_SOURCES) -> None:
        if type(max_sources) is not int or max_sources < 1:
            raise ValueError(f"max_sources: {max_sources!r} is not an integer from 1")
        self._max_sources = max_sources
        self._groups: dict[str, int] = {}
        self._sums: torch.Tensor | None = None
        """int64 [G, 3, V] on the device, as `add_frequencies` has them."""

    def find_group(self, source: str) -> int:
        """The number of a source; the first `max_sources` have one of their own."""
        known = self._groups.get(source)
        if known is None:
            if len(self._groups) >= self._max_sources:
                source = OTHER
            known = self._groups.setdefault(source, len(self._groups))
        return known

    def commit(self, groups: Sequence[int], sums_G3V: torch.Tensor) -> None:
        """Add the sums of some groups, each of which is there once, once all of a batch is done."""
        most = max(groups) + 1
        if self._sums is None or len(self._sums) < most:
            grown = sums_G3V.new_zeros(most, *sums_G3V.shape[1:])
            if self._sums is not None:
                grown[: len(self._sums)] = self._sums
            self._sums = grown
        self._sums.index_add_(0, to_device(torch.tensor(groups), sums_G3V.device), sums_G3V)

    def read(self) -> dict[str, Frequency]:
        """Counts by source, once the documents were taken; empty if none had a row."""
        if self._sums is None:
            return {}
        if self._sums.is_cuda:
            # Batches are counted on more than one stream.
            torch.cuda.synchronize(self._sums.device)
        sums = self._sums.cpu().numpy()
        return {
            source: Frequency(
                expected=sums[group, EXPECTED] * UNIT,
                variance=sums[group, VARIANCE] * UNIT,
                observed=sums[group, OBSERVED],
            )
            for source, group in self._groups.items()
            if group < len(sums)
        }
