"""The parts that hold a little of every row's distribution: its likeliest tokens, or draws of it.

Legend: n tokens of a document, k candidates, m draws.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..engine.records import DocumentScore
from .folder import Folder, StoreError
from .parts import BLOBS, DocumentsWriter, PartFile, schema_of

# Of a token's id, spans, log-probability; of the mass of a tail; of an id and what goes with it.
_OWN_BYTES, _TAIL_BYTES, _TOP_BYTES, _PAIR_BYTES = 16, 4, 5, 4


# What a value of a Parquet file may hold, less what may lie before it in a page. Arrow's large
# types hold more, for which Parquet has no page.
_VALUE_BYTES = (1 << 31) - (1 << 27)


class ArraysWriter(DocumentsWriter):
    """A part whose arrays are bytes, each of a document in one value."""

    def __init__(
        self,
        path: Path,
        metadata: Mapping[str, str],
        *,
        vocab_size: int,
        token_bytes: int,
        kept: tuple[str, int],
    ) -> None:
        """`kept` is the setting of what is kept of a row, and how many: two bytes each."""
        about = {kept[0]: str(kept[1]), "vocab_size": str(vocab_size)}
        schema = schema_of(self.tier, vocab_size)
        super().__init__(path, schema, {**metadata, **about}, token_bytes)
        self._kept = kept
        self.most_tokens = _VALUE_BYTES // (2 * max(2, kept[1]))
        """Scored tokens of a document, at most."""

    def check(self, doc_id: str, num_tokens: int) -> None:
        """ValueError for a document of more scored tokens than a value can hold the arrays of."""
        if num_tokens > self.most_tokens:
            name, number = self._kept
            raise ValueError(
                f"tiers: document {doc_id!r} has {num_tokens:,} scored tokens, more than the "
                f"{self.most_tokens:,} that a row of {self.tier} holds with {name} {number}; cut "
                f"it in two, ask for fewer, or leave {self.tier} out"
            )

    def add(self, score: DocumentScore) -> None:
        """Append a document, if it was scored; ValueError as `check` has it."""
        self.check(score.record.doc_id, len(score.tokens))
        super().add(score)


class TopKWriter(ArraysWriter):
    """The `topk` part: the k likeliest tokens of every row, and the mass of all others."""

    tier = "topk"

    def __init__(
        self, path: Path, metadata: Mapping[str, str], *, top_k: int, vocab_size: int
    ) -> None:
        token_bytes = _OWN_BYTES + _TAIL_BYTES + top_k * _TOP_BYTES
        kept = ("top_k", top_k)
        super().__init__(path, metadata, vocab_size=vocab_size, token_bytes=token_bytes, kept=kept)

    def make_columns(self, scores: Sequence[DocumentScore]) -> dict[str, Any]:
        """Arrays as bytes, one value a document."""
        return _top_k_columns(scores)


class SampledWriter(ArraysWriter):
    """The `sampled` part: tokens drawn from every row's distribution, and how often each was."""

    tier = "sampled"

    def __init__(
        self,
        path: Path,
        metadata: Mapping[str, str],
        *,
        num_draws: int,
        draw_seed: int,
        vocab_size: int,
    ) -> None:
        super().__init__(
            path,
            {**metadata, "draw_seed": str(draw_seed)},
            vocab_size=vocab_size,
            token_bytes=_OWN_BYTES + 1 + num_draws * _PAIR_BYTES,
            kept=("num_draws", num_draws),
        )

    def make_columns(self, scores: Sequence[DocumentScore]) -> dict[str, Any]:
        """Arrays as bytes, one value a document."""
        return _draws_columns(scores)


def read_top_k(row: Mapping[str, Any], top_k: int) -> dict[str, np.ndarray]:
    """The arrays of a row of the tier `topk`.

    `top_ids` int32 and `top_logprobs` float16 are [n, k], `log_tail_mass`, `token_id`, `logprob`,
    `byte_start` and `byte_end` [n], as far as the row has these columns, views of the row's bytes.
    """
    return {
        "top_ids": join_bytes(row, "top_id", "<i4").reshape(-1, top_k),
        "top_logprobs": join_bytes(row, "top_logprob", "<u2").view("<f2").reshape(-1, top_k),
        **_read_own(row, "log_tail_mass"),
    }


def read_draws(row: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The arrays of a row of the tier `sampled`.

    `num_ids` [n] are how many of the pairs `ids` int32 and `counts`, end to end, each row has;
    `token_id`, `logprob`, `byte_start` and `byte_end` are [n].
    """
    return {
        "ids": join_bytes(row, "id", "<i4"),
        "counts": _unpack("count", row["count"]),
        **_read_own(row, "num_ids"),
    }


def spread_draws(arrays: Mapping[str, np.ndarray], num_draws: int) -> np.ndarray:
    """Every draw of each row, int32 [n, num_draws], ascending, from what `read_draws` gives."""
    return np.repeat(arrays["ids"], arrays["counts"]).reshape(-1, num_draws)


def join_bytes(row: Mapping[str, Any], name: str, dtype: str) -> np.ndarray:
    """Whole numbers of columns that hold a byte of each: `name_0`, the lowest, `name_1`, ..."""
    planes = [_unpack(column, row[column]) for i in range(3) if (column := f"{name}_{i}") in row]
    joined = planes.pop().astype(dtype)
    while planes:
        joined <<= 8
        joined |= planes.pop()
    return joined


def _read_own(row: Mapping[str, Any], *names: str) -> dict[str, np.ndarray]:
    """What is told of the tokens themselves, as far as it was read."""
    names = (*names, "token_id", "logprob", "byte_start", "byte_end")
    return {name: _unpack(name, row[name]) for name in names if name in row}


def _top_k_columns(scores: Sequence[DocumentScore]) -> dict[str, Any]:
    columns = _own_columns(scores)
    tail = [_pack("log_tail_mass", _need(s.tokens.log_tail_mass)) for s in scores]
    return {
        **columns,
        **_split("top_id", 3, [_need(s.tokens.top_ids) for s in scores]),
        **_split("top_logprob", 2, [_to_half(_need(s.tokens.top_logprobs)) for s in scores]),
        "log_tail_mass": tail,
    }


def _draws_columns(scores: Sequence[DocumentScore]) -> dict[str, Any]:
    counted = [_count(_need(s.tokens.drawn_ids)) for s in scores]
    return {
        **_own_columns(scores),
        "num_ids": [_pack("num_ids", number) for number, _, _ in counted],
        **_split("id", 3, [ids for _, ids, _ in counted]),
        "count": [_pack("count", count) for _, _, count in counted],
    }


COLUMNS: dict[str, Callable[[Sequence[DocumentScore]], dict[str, Any]]] = {
    "topk": _top_k_columns,
    "sampled": _draws_columns,
}
"""What the tiers' columns are, of documents: a list with one value a document each, arrays as
bytes. High bytes of ids are among them even where the schema leaves them out."""


def check_layout(part: PartFile, name: str, folder: Folder, plan: Mapping[str, Any]) -> None:
    """StoreError for a part in which an earlier version has laid arrays out otherwise."""
    tier = name.split("/")[0]
    if tier not in COLUMNS:
        return
    wanted = schema_of(tier, plan["model"]["vocab_size"]).names
    if missing := [column for column in wanted if column not in part.schema_arrow.names]:
        made_by = plan.get("versions", {}).get("logitmill", "another version")
        raise StoreError(
            f"run: {name} of {folder.uri} has no column {missing[0]!r}; it is of logitmill "
            f"{made_by}, which reads it, or score the corpus again"
        )


def _own_columns(scores: Sequence[DocumentScore]) -> dict[str, Any]:
    """What is told of the scored tokens themselves."""
    columns: dict[str, Any] = {
        "doc_id": [s.record.doc_id for s in scores],
        "num_tokens": [len(s.tokens) for s in scores],
        "first_input": [s.first_input for s in scores],
    }
    for name in ("token_id", "byte_start", "byte_end", "logprob"):
        columns[name] = [_pack(name, getattr(s.tokens, name)) for s in scores]
    return columns


def _pack(name: str, values: np.ndarray) -> bytes:
    packed = values.astype(BLOBS[name])
    assert packed.dtype.kind == "f" or (packed == values).all(), f"{name} does not fit"
    return packed.tobytes()


def _to_half(values: np.ndarray) -> np.ndarray:
    """The bits of the numbers in float16."""
    with np.errstate(over="ignore"):
        # What is less likely than e^-65504 is impossible in float16.
        return values.astype(np.float16).view(np.uint16)


def _unpack(name: str, blob: Any) -> np.ndarray:
    return np.frombuffer(blob, BLOBS[name])


def _split(name: str, count: int, arrays: Sequence[np.ndarray]) -> dict[str, list[bytes]]:
    """So many bytes of whole numbers by themselves, the lowest first: they are unlike each other.

    Low ones are random and high ones alike, and of these alone there is something to compress.
    """
    return {
        f"{name}_{i}": [(one >> 8 * i).astype(np.uint8).tobytes() for one in arrays]
        for i in range(count)
    }


def _count(drawn_NM: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(distinct ids of each row, these ids end to end, draws of each) of ascending draws."""
    is_first = np.ones(drawn_NM.shape, bool)
    is_first[:, 1:] = drawn_NM[:, 1:] != drawn_NM[:, :-1]
    starts = np.flatnonzero(is_first)
    return is_first.sum(1), drawn_NM.ravel()[starts], np.diff(starts, append=drawn_NM.size)


def _need(values: np.ndarray | None) -> np.ndarray:
    assert values is not None, "the engine was asked for it"
    return values
