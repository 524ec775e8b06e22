"""Surprisal as a level of colour: a logarithmic scale around a document's own mean."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

LEVELS = 8
"""Steps of the scale; page.css calls them `s0` to `s7`."""
_SPREAD = 2.5


@dataclass(frozen=True)
class Scale:
    """A scale from `low` to `high`, logarithms of 1 + bits; what is beyond counts as its ends.

    Of 1 + bits, since all tokens far below a bit are equally certain: by the logarithm of bits
    itself, most steps would tell 0.001 bits from 0.01.
    """

    low: float
    high: float

    @classmethod
    def of(cls, bits: np.ndarray) -> Scale:
        """Mean -+ 2.5 standard deviations, from 0 on, of bits [n]; of what is finite."""
        logs = np.log1p(np.maximum(bits[np.isfinite(bits)], 0.0))
        if not len(logs):
            return cls(0.0, 0.0)
        mean, spread = float(logs.mean()), _SPREAD * float(logs.std())
        return cls(max(0.0, mean - spread), mean + spread)

    def levels(self, bits: np.ndarray) -> np.ndarray:
        """Level of each, int [n] from 0 to 7: equal steps of the logarithm.

        The middle one where all are equally surprising; the last for what is not finite.
        """
        logs = np.log1p(np.maximum(bits, 0.0))
        if self.high <= self.low:
            return np.full(len(bits), LEVELS // 2)
        steps = (logs - self.low) / (self.high - self.low) * LEVELS
        return np.clip(np.nan_to_num(steps, nan=LEVELS, posinf=LEVELS), 0, LEVELS - 1).astype(int)

    def edges(self) -> list[float]:
        """Bits at which a level ends and the next begins, 7 of them; none of an empty scale."""
        if self.high <= self.low:
            return []
        step = (self.high - self.low) / LEVELS
        return [math.expm1(self.low + step * i) for i in range(1, LEVELS)]
