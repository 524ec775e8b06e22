"""Additive tables of a shard: counts of its tokens and documents, and a few documents to show.

Made while documents are scored, merged by addition, and all that reports and dashboards read:
none of them opens token or document rows. Every float is a float64 sum taken in a fixed order
(tokens in a document, documents in a shard, shards in a run), so equal scores give equal bytes. The
tables of a shard of one source, 10 MB of text, have 19 kB on disk. What is rounded for that stands
at `counts.round_sums` and at `outliers.OUTLIERS`.
"""

from __future__ import annotations

import pyarrow as pa

from ..engine.records import DocumentRecord, DocumentScore
from .counts import (
    ALL_LENGTHS,
    BITS_PER_BYTE,
    CALIBRATION,
    COUNTS,
    ENTROPY,
    GROUP,
    KEYS,
    LENGTH,
    MAX_SHARD_ROWS,
    OTHER,
    POSITION,
    RANK,
    SKETCH,
    STATUS,
    SUMS,
    TOKEN_NLL,
    TOKEN_PANELS,
    WINDOW,
    merge_counts,
    round_sums,
)
from .histograms import (
    BIN_BITS_PER_BYTE,
    BIN_TOKEN_BITS,
    BINS_PER_OCTAVE,
    CALIBRATION_BINS,
    Tokens,
    count_documents,
    count_tokens,
    length_of,
)
from .outliers import (
    EXAMPLE,
    FAILED,
    HIGHEST,
    LOWEST,
    MEMORIZED,
    OUTLIERS,
    SAMPLE,
    TRUNCATED,
    Chosen,
    merge_outliers,
)
from .sketches import (
    RELATIVE_ERROR,
    SKETCHES,
    quantile,
    quantiles,
    sketch_bin,
    sketch_value,
)

__all__ = [
    "ALL_LENGTHS",
    "BINS_PER_OCTAVE",
    "BIN_BITS_PER_BYTE",
    "BIN_TOKEN_BITS",
    "BITS_PER_BYTE",
    "CALIBRATION",
    "CALIBRATION_BINS",
    "COUNTS",
    "ENTROPY",
    "EXAMPLE",
    "FAILED",
    "GROUP",
    "HIGHEST",
    "KEYS",
    "LENGTH",
    "LOWEST",
    "MEMORIZED",
    "OTHER",
    "OUTLIERS",
    "POSITION",
    "RANK",
    "RELATIVE_ERROR",
    "SAMPLE",
    "SKETCH",
    "SKETCHES",
    "STATUS",
    "SUMS",
    "TOKEN_NLL",
    "TOKEN_PANELS",
    "TRUNCATED",
    "WINDOW",
    "Summary",
    "length_of",
    "merge_counts",
    "merge_outliers",
    "quantile",
    "quantiles",
    "sketch_bin",
    "sketch_value",
]

# Documents are counted together: numpy's calls cost more than what they do for one.
_BATCH_TOKENS, _BATCH_DOCUMENTS = 1 << 16, 256
# Rows that wait to be added up, and what of a shard is told apart until its end.
_WAITING_ROWS = 1 << 17
_ROOM = 2 * MAX_SHARD_ROWS


class Summary:
    """The tables of one shard, made by adding its documents in order."""

    def __init__(self) -> None:
        self._tables: list[pa.Table] = []
        self._waiting_rows = 0
        self._records: list[DocumentRecord] = []
        self._tokens: list[Tokens] = []
        self._num_tokens = 0
        self._chosen = Chosen()

    def add(self, score: DocumentScore) -> None:
        """Count a document, scored or failed."""
        self._chosen.offer(score)
        self._records.append(score.record)
        if len(score.tokens):
            self._tokens.append(Tokens.of(score))
            self._num_tokens += len(score.tokens)
        if self._num_tokens >= _BATCH_TOKENS or len(self._records) == _BATCH_DOCUMENTS:
            made = self._count()
            self._tables += made
            self._waiting_rows += sum(table.num_rows for table in made)
            self._records, self._tokens, self._num_tokens = [], [], 0
        if self._waiting_rows >= _WAITING_ROWS:
            self._tables, self._waiting_rows = [merge_counts(self._tables, _ROOM)], 0

    def counts(self) -> pa.Table:
        """The counts so far, schema `COUNTS`, rows in the order of their keys."""
        return round_sums(merge_counts([*self._tables, *self._count()], MAX_SHARD_ROWS))

    def outliers(self) -> pa.Table:
        """The documents to show so far, schema `OUTLIERS`."""
        rows = list(self._chosen.rows())
        return merge_outliers([pa.Table.from_pylist(rows, schema=OUTLIERS)])

    def _count(self) -> list[pa.Table]:
        """The documents that are not counted yet."""
        made = [count_documents(self._records)] if self._records else []
        return [*made, count_tokens(self._tokens)] if self._tokens else made
