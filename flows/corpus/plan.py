"""The plan: which parts of which inputs are read, in which shards. Plain data, kept as plan.json.

Knows nothing of how inputs are opened or read.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Input:
    """A file or dataset split of the corpus, as it was when the plan was made."""

    uri: str
    """Relative to the corpus's root: a plan holds for a copy elsewhere, and holds no credential."""
    format: str
    size: int
    """Bytes; rows for a dataset."""
    etag: str
    """The object's ETag, or the content's sha256 if it has none, or a dataset's fingerprint."""
    stamp: str = field(default="", compare=False)
    """When it was written. If only this differs, the content decides whether the file changed."""


@dataclass(frozen=True)
class Piece:
    """A contiguous part of one input: rows [start, stop) of a Parquet file or dataset; the JSON
    lines or CSV rows that start at bytes [start, stop) of the uncompressed stream; a whole text
    file."""

    input: Input
    start: int
    stop: int | None
    """None: to the end (compressed lines, whose length is not known before reading)."""
    num_bytes: int
    """About what it weighs: bytes in the file, for columns those of the scored column."""
    num_documents: int | None
    """None where only reading tells (JSON lines, CSV)."""

    @property
    def uri(self) -> str:
        """The input's path below the corpus's root."""
        return self.input.uri

    @property
    def format(self) -> str:
        """The input's format."""
        return self.input.format


@dataclass(frozen=True)
class Shard:
    """A unit of work: consecutive pieces. May turn out empty where a line spans a whole piece."""

    index: int
    pieces: tuple[Piece, ...]

    @property
    def num_bytes(self) -> int:
        """Sum of the pieces' bytes."""
        return sum(piece.num_bytes for piece in self.pieces)

    @property
    def num_documents(self) -> int | None:
        """None where only reading tells."""
        return _total(piece.num_documents for piece in self.pieces)


@dataclass(frozen=True)
class Plan:
    """All that is to be read, in order."""

    inputs: tuple[Input, ...]
    shards: tuple[Shard, ...]
    fingerprint: str
    """sha256 over what decides the documents, and nothing else: the inputs' names, sizes and ETags,
    columns, split, limit. Not where the corpus lies, how it is reached, nor how it is sharded."""

    @property
    def num_bytes(self) -> int:
        """Sum of the shards' bytes."""
        return sum(shard.num_bytes for shard in self.shards)

    @property
    def num_documents(self) -> int | None:
        """None where only reading tells."""
        return _total(shard.num_documents for shard in self.shards)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON; `from_dict` gives an equal plan."""
        index = {input_: i for i, input_ in enumerate(self.inputs)}
        return {
            "fingerprint": self.fingerprint,
            "inputs": [vars(input_).copy() for input_ in self.inputs],
            "shards": [
                {
                    "index": shard.index,
                    "num_bytes": shard.num_bytes,
                    "num_documents": shard.num_documents,
                    "pieces": [
                        {**vars(piece), "input": index[piece.input]} for piece in shard.pieces
                    ],
                }
                for shard in self.shards
            ],
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Plan:
        """The plan that `to_dict` was called on."""
        inputs = tuple(Input(**input_) for input_ in data["inputs"])
        shards = tuple(
            Shard(
                index=shard["index"],
                pieces=tuple(
                    Piece(**{**piece, "input": inputs[piece["input"]]}) for piece in shard["pieces"]
                ),
            )
            for shard in data["shards"]
        )
        return cls(inputs=inputs, shards=shards, fingerprint=data["fingerprint"])


def group(pieces: Iterable[Piece], shard_bytes: int) -> Iterator[Shard]:
    """Shards of neighbouring pieces, together while they stay within `shard_bytes`."""
    index, weight = 0, 0
    together: list[Piece] = []
    for piece in pieces:
        if together and weight + piece.num_bytes > shard_bytes:
            yield Shard(index, tuple(together))
            index, together, weight = index + 1, [], 0
        together.append(piece)
        weight += piece.num_bytes
    if together:
        yield Shard(index, tuple(together))


def _total(counts: Iterable[int | None]) -> int | None:
    total = 0
    for count in counts:
        if count is None:
            return None
        total += count
    return total
