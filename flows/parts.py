"""The tables of a shard: schemas of the tiers, and writers that give equal bytes for equal rows."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ..engine.records import DOCUMENT_FIELDS, TOKEN_DTYPES, DocumentScore

LOGITS_DTYPES = {"float32": np.float32, "float16": np.float16}

# Rows buffered before a row group is written: documents, and bytes of tokens or logits.
_GROUP_DOCUMENTS = 8192
_GROUP_BYTES = 32 << 20

_DOCUMENT_TYPES: dict[str, pa.DataType] = {
    "doc_id": pa.string(),
    "source": pa.string(),
    "language": pa.string(),
    "status": pa.string(),
    "error": pa.string(),
    "recipe": pa.string(),
    "recipe_hash": pa.string(),
    "truncated": pa.bool_(),
    **dict.fromkeys(
        (
            "num_tokens",
            "num_tokens_scored",
            "num_bytes",
            "num_chars",
            "num_words",
            "num_windows",
            "num_top1",
            "zlib_bytes",
        ),
        pa.int64(),
    ),
}
SCORES = pa.schema([(name, _DOCUMENT_TYPES.get(name, pa.float64())) for name in DOCUMENT_FIELDS])
"""One row a document: `DocumentRecord`."""

TOKENS = pa.schema(
    [("doc_id", pa.string())]
    + [(name, pa.list_(pa.from_numpy_dtype(dtype))) for name, dtype in TOKEN_DTYPES.items()]
)
"""One row a scored document: its `TokenRecords` as lists of one length."""

LOGITS = pa.schema(
    [
        ("doc_id", pa.string()),
        ("first_row", pa.int64()),
        ("num_rows", pa.int32()),
        ("logsumexp", pa.list_(pa.float32())),
        ("logprobs", pa.large_binary()),
    ]
)
"""Consecutive rows of a document: `logprobs` is [num_rows, V], little-endian, of the dtype in the
file's metadata; row i scored the document's token record i; logits are logprobs + logsumexp."""

SCHEMAS = {"scores": SCORES, "tokens": TOKENS, "logits": LOGITS}
TIERS = tuple(SCHEMAS)
"""What a run can keep, in the order that tiers are listed in."""


def write_table(table: pa.Table, path: Path) -> None:
    """Write a small table as one Parquet file."""
    pq.write_table(table, path, compression="zstd", compression_level=3)


class PartWriter:
    """Writes one Parquet file row group by row group."""

    def __init__(self, path: Path, schema: pa.Schema, metadata: Mapping[str, str]) -> None:
        self.path = path
        self._schema = schema.with_metadata({f"logitmill.{k}": v for k, v in metadata.items()})
        blobs = [name for name in ("logprobs",) if name in schema.names]
        # Dictionaries pay for the repeated strings of document rows, not for floats or blobs.
        strings = [field.name for field in schema if pa.types.is_string(field.type)]
        self._writer = pq.ParquetWriter(
            path,
            self._schema,
            compression="zstd",
            compression_level=3,
            use_dictionary=strings,
            write_statistics=[name for name in schema.names if name not in blobs],
        )

    def write(self, columns: Mapping[str, Any]) -> None:
        """Append one row group."""
        arrays = [pa.array(columns[field.name], field.type) for field in self._schema]
        self._writer.write_table(pa.Table.from_arrays(arrays, schema=self._schema))

    def close(self) -> None:
        """Finish the file."""
        self._writer.close()


class ScoresWriter:
    """The `scores` part: every document, whatever became of it."""

    tier = "scores"

    def __init__(self, path: Path, metadata: Mapping[str, str]) -> None:
        self._part = PartWriter(path, SCORES, metadata)
        self._rows: list[dict[str, Any]] = []

    def add(self, score: DocumentScore) -> None:
        """Append a document."""
        self._rows.append(vars(score.record))
        if len(self._rows) >= _GROUP_DOCUMENTS:
            self._flush()

    def close(self) -> None:
        """Finish the file."""
        self._flush()
        self._part.close()

    def _flush(self) -> None:
        if self._rows:
            self._part.write({name: [r[name] for r in self._rows] for name in DOCUMENT_FIELDS})
            self._rows = []


class TokensWriter:
    """The `tokens` part: the scored tokens of every scored document."""

    tier = "tokens"

    def __init__(self, path: Path, metadata: Mapping[str, str]) -> None:
        self._part = PartWriter(path, TOKENS, metadata)
        self._scores: list[DocumentScore] = []
        self._bytes = 0

    def add(self, score: DocumentScore) -> None:
        """Append a document, if it was scored."""
        if not len(score.tokens):
            return
        self._scores.append(score)
        self._bytes += len(score.tokens) * sum(d.itemsize for d in TOKEN_DTYPES.values())
        if self._bytes >= _GROUP_BYTES:
            self._flush()

    def close(self) -> None:
        """Finish the file."""
        self._flush()
        self._part.close()

    def _flush(self) -> None:
        if not self._scores:
            return
        offsets = np.cumsum([0, *(len(s.tokens) for s in self._scores)]).astype(np.int32)
        columns: dict[str, Any] = {"doc_id": [s.record.doc_id for s in self._scores]}
        for name in TOKEN_DTYPES:
            values = np.concatenate([getattr(s.tokens, name) for s in self._scores])
            columns[name] = pa.ListArray.from_arrays(offsets, values)
        self._part.write(columns)
        self._scores, self._bytes = [], 0


class TooManyLogits(RuntimeError):
    """There are more logits than the run may keep. The message names the setting."""


class LogitsWriter:
    """The `logits` part: log-probabilities over the whole vocabulary, in document order.

    A document's rows are stored so many at a time, whatever numbers they come in, so that batches
    decide no bytes.
    """

    tier = "logits"

    def __init__(self, path: Path, metadata: Mapping[str, str], *, dtype: str) -> None:
        self._dtype = np.dtype(LOGITS_DTYPES[dtype]).newbyteorder("<")
        self._part = PartWriter(path, LOGITS, {**metadata, "logits_dtype": dtype})
        self.room = 0
        """Bytes of log-probabilities, before compression, that may yet be kept."""
        self._document = (-1, "")
        self._first_row = 0
        self._num_rows = 0
        self._logprobs = np.empty((0, 0), self._dtype)
        self._logsumexp = np.empty(0, np.float32)

    def add_rows(
        self, index: int, doc_id: str, first_row: int, logprobs: np.ndarray, logsumexp: np.ndarray
    ) -> None:
        """Append consecutive rows of a document; an engine's `on_logits`. Copies what it keeps.

        Raises:
            TooManyLogits: if they are more than may be kept.
        """
        num_columns = logprobs.shape[1]
        self.room -= logprobs.size * self._dtype.itemsize
        if self.room < 0:
            raise TooManyLogits(
                f"max_logits_bytes: it is used up within document {doc_id!r}, as the corpus holds "
                "more tokens than a sample of it let expect; raise it, score fewer documents "
                "(limit), or keep tokens instead"
            )
        if not len(self._logprobs):
            step = max(1, _GROUP_BYTES // (num_columns * self._dtype.itemsize))
            self._logprobs = np.empty((step, num_columns), self._dtype)
            self._logsumexp = np.empty(step, np.float32)
        if self._document != (index, doc_id):
            self._flush()
            self._document, self._first_row = (index, doc_id), first_row
        taken = 0
        while taken < len(logprobs):
            count = min(len(logprobs) - taken, len(self._logprobs) - self._num_rows)
            into = slice(self._num_rows, self._num_rows + count)
            self._logprobs[into] = logprobs[taken : taken + count]
            self._logsumexp[into] = logsumexp[taken : taken + count]
            taken += count
            self._num_rows += count
            if self._num_rows == len(self._logprobs):
                self._flush()

    def add(self, score: DocumentScore) -> None:
        """Documents add nothing to their rows."""

    def close(self) -> None:
        """Finish the file."""
        self._flush()
        self._part.close()

    def _flush(self) -> None:
        if not self._num_rows:
            return
        rows = slice(self._num_rows)
        self._part.write(
            {
                "doc_id": [self._document[1]],
                "first_row": [self._first_row],
                "num_rows": [self._num_rows],
                "logsumexp": [self._logsumexp[rows]],
                "logprobs": [self._logprobs[rows].tobytes()],
            }
        )
        self._first_row += self._num_rows
        self._num_rows = 0
