"""The parts that hold the whole distribution of every row: log-probabilities, or hidden states.

Rows come while documents are scored, long before their records, and are too many to wait for them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from ..engine.records import DocumentScore
from .parts import HIDDEN, LOGITS, LOGITS_DTYPES, PartWriter

# Rows buffered before a row group is written, in bytes.
_GROUP_BYTES = 32 << 20
# numpy has no bfloat16: its bits are kept as they are.
STATES_DTYPES: dict[str, np.dtype] = {
    "float32": np.dtype("<f4"),
    "float16": np.dtype("<f2"),
    "bfloat16": np.dtype("<u2"),
}


class TooManyLogits(RuntimeError):
    """There are more logits or states than the run may keep. The message names the setting."""


class RowsWriter:
    """A part of rows of documents, in document order.

    A document's rows are stored so many at a time, whatever numbers they come in, so that batches
    decide no bytes.
    """

    tier: str
    instead: str
    """What may be kept instead."""

    def __init__(
        self,
        path: Path,
        schema: pa.Schema,
        metadata: Mapping[str, str],
        dtypes: Mapping[str, np.dtype],
    ) -> None:
        """`dtypes` are those of the columns of a row's values, the large one first."""
        self._part = PartWriter(path, schema, metadata)
        self._dtypes = dtypes
        self.room = 0
        """Bytes of rows, before compression, that may yet be kept."""
        self._document = (-1, "")
        self._first_row = 0
        self._num_rows = 0
        self._held: dict[str, np.ndarray] = {}

    def make_columns(self, rows: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """The columns of a row group, but for those that say of which rows it is."""
        raise NotImplementedError

    def take(self, index: int, doc_id: str, first_row: int, rows: Mapping[str, np.ndarray]) -> None:
        """Append consecutive rows of a document. Copies what it keeps.

        Raises:
            TooManyLogits: if they are more than may be kept.
        """
        large = next(iter(self._dtypes))
        num_rows = len(rows[large])
        row_bytes = rows[large][:1].size * self._dtypes[large].itemsize
        self.room -= num_rows * row_bytes
        if self.room < 0:
            raise TooManyLogits(
                f"max_logits_bytes: it is used up within document {doc_id!r}, as the corpus holds "
                "more tokens than a sample of it let expect; raise it, score fewer documents "
                f"(limit), or keep {self.instead} instead"
            )
        if not self._held:
            step = max(1, _GROUP_BYTES // row_bytes)
            self._held = {
                name: np.empty((step, *rows[name].shape[1:]), dtype)
                for name, dtype in self._dtypes.items()
            }
        if self._document != (index, doc_id):
            self._flush()
            self._document, self._first_row = (index, doc_id), first_row
        taken, step = 0, len(self._held[large])
        while taken < num_rows:
            count = min(num_rows - taken, step - self._num_rows)
            into = slice(self._num_rows, self._num_rows + count)
            for name, held in self._held.items():
                held[into] = rows[name][taken : taken + count]
            taken += count
            self._num_rows += count
            if self._num_rows == step:
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
        self._part.write(
            {
                "doc_id": [self._document[1]],
                "first_row": [self._first_row],
                "num_rows": [self._num_rows],
                **self.make_columns({n: v[: self._num_rows] for n, v in self._held.items()}),
            }
        )
        self._first_row += self._num_rows
        self._num_rows = 0


class LogitsWriter(RowsWriter):
    """The `logits` part: log-probabilities over the whole vocabulary."""

    tier = "logits"
    instead = "topk or tokens"

    def __init__(self, path: Path, metadata: Mapping[str, str], *, dtype: str) -> None:
        dtypes: dict[str, np.dtype] = {
            "logprobs": np.dtype(LOGITS_DTYPES[dtype]).newbyteorder("<"),
            "logsumexp": np.dtype(np.float32),
        }
        super().__init__(path, LOGITS, {**metadata, "logits_dtype": dtype}, dtypes)

    def make_columns(self, rows: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """Log-probabilities as bytes."""
        return {"logsumexp": [rows["logsumexp"]], "logprobs": [rows["logprobs"].tobytes()]}

    def add_rows(
        self, index: int, doc_id: str, first_row: int, logprobs: np.ndarray, logsumexp: np.ndarray
    ) -> None:
        """Append consecutive rows of a document; an engine's `on_logits`. As `take`."""
        self.take(index, doc_id, first_row, {"logprobs": logprobs, "logsumexp": logsumexp})


class HiddenWriter(RowsWriter):
    """The `hidden` part: what the model's head takes."""

    tier = "hidden"
    instead = "topk or tokens"

    def __init__(
        self,
        path: Path,
        metadata: Mapping[str, str],
        *,
        dtype: str,
        hidden_size: int,
        head_digest: str,
    ) -> None:
        about = {
            "hidden_dtype": dtype,
            "hidden_size": str(hidden_size),
            "head_digest": head_digest,
        }
        super().__init__(path, HIDDEN, {**metadata, **about}, {"states": STATES_DTYPES[dtype]})

    def make_columns(self, rows: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """States as bytes."""
        return {"states": [rows["states"].tobytes()]}

    def add_rows(self, index: int, doc_id: str, first_row: int, states: torch.Tensor) -> None:
        """Append consecutive rows of a document; an engine's `on_states`. As `take`."""
        bits = states.view(torch.int16) if states.dtype == torch.bfloat16 else states
        self.take(index, doc_id, first_row, {"states": bits.numpy()})


def read_states(blob: bytes, dtype: str, hidden_size: int) -> torch.Tensor:
    """The states of a row of the tier `hidden`, [num_rows, D] in the dtype they were kept in."""
    held = np.frombuffer(bytearray(blob), STATES_DTYPES[dtype])
    states = torch.from_numpy(held.view(np.int16) if dtype == "bfloat16" else held)
    return states.view(getattr(torch, dtype)).view(-1, hidden_size)
