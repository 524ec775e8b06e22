"""Reads parts that hold distributions as examples to train on: inputs, and what follows each.

    inputs     P  a  b  c        row i is the teacher's distribution of what follows input i,
    targets    a  b  c  d        and target i what did

P is the prefix, or the document's first token where the recipe puts none in front.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import torch

from .distributions import read_draws, read_top_k, spread_draws
from .folder import StoreError
from .parts import BLOBS, LOGITS_DTYPES, PartFile
from .rows import read_states

if TYPE_CHECKING:
    from ..engine import Pipeline
    from .run import Run

# Of these a token has as many as `num_ids` says.
_PAIRS = ("id_0", "id_1", "id_2", "count")

Example = dict[str, Any]
"""`doc_id`, `first_row` and tensors that have a row for each input."""


Source = Callable[[], Example]
"""Makes an example of some rows of a document, which are read and not looked at yet."""


@dataclass(frozen=True)
class Reader:
    """Reads parts of a run's tier."""

    run: Run
    tier: str
    vocab_size: int
    """Of the student."""
    pipe: Pipeline | None
    """What makes log-probabilities of states, if anything is to."""
    context: int | None
    """Most inputs of an example."""
    spans: bool
    """Whether the targets' bytes are among what is read."""
    keeps: bool
    """Whether sources outlive the row group that they come from."""

    def read(self, name: str) -> Iterator[Source]:
        """What examples of a part are made of, in order.

        Raises:
            StoreError: for a part of another run.
        """
        with self.run.open_part(name) as parquet:
            about = parquet.schema_arrow.metadata or {}
            stated = about.get(b"logitmill.run_key", b"").decode()
            if stated != self.run.plan["run_key"]:
                raise StoreError(
                    f"run: {name} is of run {stated!r}, and its manifest is of "
                    f"{self.run.plan['run_key']!r}; take a whole copy of one of them"
                )
            if self.tier in ("hidden", "logits"):
                yield from self._read_rows(parquet, name)
            else:
                yield from self._read_documents(parquet)

    @property
    def _model_size(self) -> int:
        return self.run.plan["model"]["vocab_size"]

    # ---- a row a document

    def _read_documents(self, parquet: PartFile) -> Iterator[Source]:
        leave: tuple[str, ...] = () if self.spans else ("byte_start", "byte_end")
        leave += ("logprob",) if self.tier == "sampled" else ()
        names = [name for name in parquet.schema_arrow.names if name not in leave]
        for number in range(parquet.num_row_groups):
            table = parquet.read_row_group(number, columns=names)
            columns = {name: table.column(name).combine_chunks() for name in names}
            own = [columns.pop(n).to_pylist() for n in ("doc_id", "num_tokens", "first_input")]
            group = _Group({n: _bytes_of(c) for n, c in columns.items()})
            end = 0
            for doc_id, num_tokens, first_input in zip(*own, strict=True):
                first, end = end, end + num_tokens
                for start, stop in _pieces(num_tokens, self.context):
                    row = group.cut(first + start, first + stop)
                    before = group.token_id[first + start - 1] if start else first_input
                    make = partial(self._unpack, doc_id, start, before, row)
                    # A view would hold all of its row group.
                    yield partial(_same, make()) if self.keeps else make

    def _unpack(self, doc_id: str, first_row: int, before: int, row: Mapping[str, Any]) -> Example:
        """The arrays of some of a document's rows, which follow the token `before`."""
        if self.tier == "topk":
            arrays = read_top_k(row, self.run.plan["top_k"])
            self._check_ids(doc_id, arrays["top_ids"])
        else:
            arrays = read_draws(row)
            self._check_ids(doc_id, arrays["ids"])
            arrays["sample_ids"] = spread_draws(arrays, self.run.plan["num_draws"])
            for name in ("ids", "counts", "num_ids"):
                del arrays[name]
        token_id = arrays.pop("token_id")
        example = {
            "doc_id": doc_id,
            "first_row": first_row,
            **self._make_ids(doc_id, before, token_id),
        }
        for name, values in arrays.items():
            kept = values.astype(np.int64) if name.startswith("byte_") else values
            example[name] = torch.from_numpy(kept if kept.flags.writeable else kept.copy())
        return example

    def _make_ids(self, doc_id: str, first_input: int, token_id: np.ndarray) -> Example:
        """Inputs and targets of rows that follow `first_input`."""
        inputs = np.concatenate([[first_input], token_id[:-1]], dtype=np.int64)
        targets = token_id.astype(np.int64)
        for ids in (inputs, targets):
            self._check_ids(doc_id, ids)
        return {"input_ids": torch.from_numpy(inputs), "target_ids": torch.from_numpy(targets)}

    def _check_ids(self, doc_id: str, ids: np.ndarray) -> None:
        if self.vocab_size < self._model_size and len(ids) and ids.max() >= self.vocab_size:
            raise ValueError(
                f"vocab_size: document {doc_id!r} has token {ids.max()}, which a student of "
                f"{self.vocab_size} tokens does not have; the run's model has {self._model_size}"
            )

    # ---- rows of whole distributions

    def _read_rows(self, parquet: PartFile, name: str) -> Iterator[Source]:
        column = "states" if self.tier == "hidden" else "logprobs"
        about = {k.decode(): v.decode() for k, v in (parquet.schema_arrow.metadata or {}).items()}
        tokens = self._read_tokens(name.replace(f"{self.tier}/", "tokens/"))
        following = next(tokens, None)
        document: _Tokens | None = None
        held: list[torch.Tensor] = []
        num_held = first = 0
        for group in range(parquet.num_row_groups):
            rows = parquet.read_row_group(group, columns=["doc_id", "first_row", column])
            for row in rows.to_pylist():
                if row["first_row"] == 0:
                    document, held, num_held, first = None, [], 0, 0
                    if following is not None and following.doc_id == row["doc_id"]:
                        document, following = following, next(tokens, None)
                if document is None:
                    # Its numbers are not finite, which was not known yet when its rows were kept.
                    continue
                held.append(self._make_rows(row[column], about))
                num_held += len(held[-1])
                left = len(document.token_id) - first
                while left and num_held >= (size := min(left, self.context or left)):
                    together = torch.cat(held) if len(held) > 1 else held[0]
                    # A view would hold all that was read with it.
                    rows_of_piece = together[:size].clone() if self.keeps else together[:size]
                    yield self._whole_piece(document, first, rows_of_piece)
                    held, num_held = [together[size:]], num_held - size
                    first, left = first + size, left - size
        if following is not None:
            raise StoreError(
                f"run: {name} has no rows of document {following.doc_id!r}, or in another order "
                "than its tokens; take a whole copy of the run"
            )

    def _make_rows(self, blob: bytes, about: Mapping[str, str]) -> torch.Tensor:
        if self.tier == "hidden":
            size = int(about["logitmill.hidden_size"])
            states = read_states(blob, about["logitmill.hidden_dtype"], size)
            if self.pipe is None:
                return states
            return torch.cat([z.log_softmax(-1) for _, z in self.pipe.replay(states)])
        dtype = np.dtype(LOGITS_DTYPES[self.run.plan["logits_dtype"]]).newbyteorder("<")
        return torch.from_numpy(np.frombuffer(bytearray(blob), dtype)).view(-1, self._model_size)

    def _whole_piece(
        self, document: _Tokens, first: int, rows: torch.Tensor
    ) -> Callable[[], Example]:
        def make() -> Example:
            stop, token_id = first + len(rows), document.token_id
            before = token_id[first - 1] if first else self.run.plan["prefix_token"]
            example = {
                "doc_id": document.doc_id,
                "first_row": first,
                **self._make_ids(document.doc_id, before, token_id[first:stop]),
                "states" if self.tier == "hidden" and self.pipe is None else "logprobs": rows,
            }
            for name, span in document.spans.items():
                example[name] = torch.from_numpy(span[first:stop].copy())
            return example

        return make

    def _read_tokens(self, name: str) -> Iterator[_Tokens]:
        names = ["doc_id", "token_id", *(("byte_start", "byte_end") if self.spans else ())]
        with self.run.open_part(name) as parquet:
            for group in range(parquet.num_row_groups):
                table = parquet.read_row_group(group, columns=names)
                columns = {n: table.column(n).combine_chunks() for n in names}
                for i, doc_id in enumerate(columns.pop("doc_id").to_pylist()):
                    values = {n: column[i].values.to_numpy() for n, column in columns.items()}
                    if self.keeps:
                        values = {n: value.copy() for n, value in values.items()}
                    yield _Tokens(doc_id, values.pop("token_id"), values)


@dataclass(frozen=True)
class _Tokens:
    """A document of the tier `tokens`."""

    doc_id: str
    token_id: np.ndarray
    spans: Mapping[str, np.ndarray]


class _Group:
    """The arrays of a row group's documents, each end to end."""

    def __init__(self, blobs: Mapping[str, memoryview]) -> None:
        self.token_id = np.frombuffer(blobs["token_id"], BLOBS["token_id"])
        self._blobs = blobs
        # Bytes that a token has in an array, where all have as many.
        self._sizes = {name: len(blob) // len(self.token_id) for name, blob in blobs.items()}
        if "num_ids" in blobs:
            num_ids = np.frombuffer(blobs["num_ids"], BLOBS["num_ids"])
            self._ends = np.concatenate([[0], num_ids.cumsum(dtype=np.int64)])

    def cut(self, start: int, stop: int) -> dict[str, Any]:
        """The bytes of some tokens, as views."""
        found = {}
        for name, blob in self._blobs.items():
            if name in _PAIRS:
                first, end, size = self._ends[start], self._ends[stop], BLOBS[name].itemsize
            else:
                first, end, size = start, stop, self._sizes[name]
            found[name] = blob[first * size : end * size]
        return found


def _same(example: Example) -> Example:
    return example


def _bytes_of(column: pa.Array) -> memoryview:
    """The values of a binary column, end to end."""
    _, offsets, values = column.buffers()
    ends = np.frombuffer(offsets, np.int32)[column.offset : column.offset + len(column) + 1]
    return memoryview(values)[ends[0] : ends[-1]]


def _pieces(num_rows: int, context: int | None) -> Iterator[tuple[int, int]]:
    step = context or max(1, num_rows)
    for start in range(0, num_rows, step):
        yield start, min(num_rows, start + step)


def check_head(run: Run, pipe: Pipeline) -> None:
    """ValueError for a model whose head is not the one that a run's states are for, by digests."""
    for name in run.parts("hidden")[:1]:
        with run.open_part(name) as parquet:
            stored = parquet.schema_arrow.metadata[b"logitmill.head_digest"].decode()
        if stored != pipe.head_digest:
            raise StoreError(
                f"pipe: its head is {str(pipe.head_digest)[:16]}..., and the states are for "
                f"{stored[:16]}...; load the run's model with the run's settings"
            )
