"""The documents of two runs that stand out: the most worse, the most better, the farthest off."""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa

from ..outliers import MIN_BYTES, MIN_TOKENS

BIN = 0.02
"""Of the picture of both, in bits a byte (or a token)."""
NUM_BINS = 800
"""The last takes all from 16 bits up."""
_MAX_EXTREMES = 10


@dataclass(frozen=True)
class Document:
    """A document that stands out."""

    doc_id: str
    source: str
    language: str
    base: float
    """The measure."""
    other: float
    num_bytes: int
    num_tokens: int
    residual: float
    """Other, less what a straight line over all documents gives for the base."""

    @property
    def delta(self) -> float:
        """Other less base."""
        return self.other - self.base


@dataclass(frozen=True)
class Found:
    """Columns of documents that are compared."""

    base: np.ndarray
    other: np.ndarray
    delta: np.ndarray
    delta_nll: np.ndarray
    size: np.ndarray
    """[2, documents]: bytes, or tokens, of base and other."""
    bits: np.ndarray
    """[2, documents]: of base and other."""


class Extremes:
    """The largest differences, kept by the base's value so that any line can be taken off later.

    Within a bin of the base a line hardly rises: what is farthest from it there is among those that
    differ the most.
    """

    def __init__(self) -> None:
        self._heaps: dict[tuple[int, int, int], list[tuple[float, str, Document]]] = {}

    def add(self, table: pa.Table, found: Found) -> None:
        """Keep what stands out among documents, whose rows `table` holds."""
        column = np.clip((found.base / BIN).astype(np.int64), 0, NUM_BINS - 1)
        num_bytes, num_tokens = (numbers(table, n) for n in ("num_bytes", "num_tokens_scored"))
        is_long = np.where(num_bytes > 0, num_bytes >= MIN_BYTES, num_tokens >= MIN_TOKENS)
        place = column * 2 + is_long
        for key in np.unique(place).tolist():
            rows = np.flatnonzero(place == key)
            for sign in (1, -1):
                order = np.argsort(-sign * found.delta[rows], kind="stable")
                for row in rows[order[:_MAX_EXTREMES]].tolist():
                    self._push(
                        (key, key % 2, sign), sign * float(found.delta[row]), table, row, found
                    )

    def _push(
        self, key: tuple[int, int, int], far: float, table: pa.Table, row: int, found: Found
    ) -> None:
        heap = self._heaps.setdefault(key, [])
        if len(heap) == _MAX_EXTREMES and far < heap[0][0]:
            return
        doc_id = table["doc_id"][row].as_py()
        document = Document(
            doc_id=doc_id,
            source=table["source"][row].as_py(),
            language=table["language"][row].as_py(),
            base=float(found.base[row]),
            other=float(found.other[row]),
            num_bytes=table["num_bytes"][row].as_py(),
            num_tokens=table["num_tokens_scored"][row].as_py(),
            residual=math.nan,
        )
        heapq.heappush(heap, (far, doc_id, document))
        if len(heap) > _MAX_EXTREMES:
            heapq.heappop(heap)

    def choose(
        self, slope: float, intercept: float
    ) -> tuple[list[Document], list[Document], list[Document]]:
        """The most worse, the most better, and the farthest from the line."""
        has_long = any(is_long for _, is_long, _ in self._heaps)
        kept = {
            document.doc_id: document
            for (_, is_long, _), heap in self._heaps.items()
            for _, _, document in heap
            if is_long or not has_long
        }
        documents = [
            replace(d, residual=d.other - (intercept + slope * d.base)) for d in kept.values()
        ]
        documents.sort(key=lambda d: (-d.delta, d.doc_id))
        worse = [d for d in documents if d.delta > 0][:_MAX_EXTREMES]
        better = [d for d in reversed(documents) if d.delta < 0][:_MAX_EXTREMES]
        far = [d for d in documents if d.residual]
        far.sort(key=lambda d: (-abs(d.residual), d.doc_id))
        return worse, better, far[:_MAX_EXTREMES] if not math.isnan(slope) else []


def numbers(table: pa.Table, name: str) -> np.ndarray:
    """A column as float64, NaN where there is none."""
    return table[name].to_numpy().astype(np.float64)
