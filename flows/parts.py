"""The tables of a shard: schemas of the tiers, and writers that give equal bytes for equal rows."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ..engine.records import DOCUMENT_FIELDS, STATISTICS, TOKEN_DTYPES, DocumentScore

LOGITS_DTYPES = {"float32": np.float32, "float16": np.float16}

# Rows buffered before a row group is written: documents, and bytes of tokens or logits.
_GROUP_DOCUMENTS = 8192
_GROUP_BYTES = 32 << 20
# Of all that buffered documents hold, also for the other parts.
_HELD_BYTES = 256 << 20
_BATCH_ROWS = 1 << 16
# Tables of fewer rows are compressed as well as can be, which takes a tenth of a second at most.
_FEW_ROWS = 1 << 15

_DOCUMENT_TYPES: dict[str, pa.DataType] = {
    "doc_id": pa.string(),
    "source": pa.string(),
    "language": pa.string(),
    "day": pa.string(),
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

_OF_EVERY_TOKEN = (
    *(("doc_id", pa.string()), ("num_tokens", pa.int32()), ("first_input", pa.int32())),
    *(("token_id", pa.binary()), ("byte_start", pa.binary()), ("byte_end", pa.binary())),
    ("logprob", pa.binary()),
)
_HIGH = 1 << 16
"""Ids from here on take a column more."""

TOPK = pa.schema(
    [
        *_OF_EVERY_TOKEN,
        ("top_id_0", pa.binary()),
        ("top_id_1", pa.binary()),
        ("top_id_2", pa.binary()),
        ("top_logprob_0", pa.binary()),
        ("top_logprob_1", pa.binary()),
        ("log_tail_mass", pa.binary()),
    ]
)
"""One row a scored document of n tokens, arrays as little-endian bytes (`BLOBS`). `token_id`,
`byte_start`, `byte_end` and `logprob` [n] are those of the token records; the likeliest k tokens of
each row are ids of 24 bits and their log-probabilities in float16 [n, k], descending: `top_id_0`,
`top_id_1`, `top_id_2` and `top_logprob_0`, `top_logprob_1` hold their bytes, the lowest first;
`log_tail_mass` [n] is the log of what all others weigh, -inf if k is the whole vocabulary. Row i is
the distribution of what follows the token i - 1, row 0 of what follows `first_input`: the prefix,
or without one the document's first token. k and the vocabulary are in the file's metadata."""

SAMPLED = pa.schema(
    [
        *_OF_EVERY_TOKEN,
        ("num_ids", pa.binary()),
        ("id_0", pa.binary()),
        ("id_1", pa.binary()),
        ("id_2", pa.binary()),
        ("count", pa.binary()),
    ]
)
"""As `TOPK`, with tokens that were drawn from each row's distribution, m of them with replacement:
`num_ids` [n] distinct ones a row, end to end `id_0` + 256 `id_1` + 65,536 `id_2`, ascending in a
row, and how many draws each has, `count`. count / m is an unbiased estimate of a token's
probability."""

LENS = pa.schema(
    [("doc_id", pa.string()), ("layer", pa.int32())]
    + [(name, pa.list_(pa.from_numpy_dtype(TOKEN_DTYPES[name]))) for name in STATISTICS]
)
"""One row a scored document and layer, layers ascending: what its token records would be if the
head took the layer's states (`Pipeline.lens`), as lists of one length. Which layers there are is in
the file's metadata."""

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

HIDDEN = pa.schema(
    [
        ("doc_id", pa.string()),
        ("first_row", pa.int64()),
        ("num_rows", pa.int32()),
        ("states", pa.large_binary()),
    ]
)
"""Consecutive rows of a document: `states` is [num_rows, D], little-endian, what the model's head
takes, after the final norm; row i was made into what scored the document's token record i. Dtype, D
and the head's digest are in the file's metadata."""

SCHEMAS = {
    "scores": SCORES,
    "tokens": TOKENS,
    "topk": TOPK,
    "sampled": SAMPLED,
    "lens": LENS,
    "hidden": HIDDEN,
    "logits": LOGITS,
}
TIERS = tuple(SCHEMAS)
"""What a run can keep, in the order that tiers are listed in."""

BLOBS: dict[str, np.dtype] = {
    "token_id": np.dtype("<i4"),
    "byte_start": np.dtype("<u4"),
    "byte_end": np.dtype("<u4"),
    "logprob": np.dtype("<f4"),
    "top_id_0": np.dtype("u1"),
    "top_id_1": np.dtype("u1"),
    "top_id_2": np.dtype("u1"),
    "top_logprob_0": np.dtype("u1"),
    "top_logprob_1": np.dtype("u1"),
    "log_tail_mass": np.dtype("<f4"),
    "num_ids": np.dtype("u1"),
    "id_0": np.dtype("u1"),
    "id_1": np.dtype("u1"),
    "id_2": np.dtype("u1"),
    "count": np.dtype("u1"),
}
"""What the bytes of a document's arrays are, in `TOPK` and `SAMPLED`."""

# Bytes as good as random: to compress them saves a few percent and takes most of a reader's time.
_NOISE = ("top_id_0", "top_logprob_0", "id_0")
_NOISE_IF_HIGH = ("top_id_1", "id_1")


class PartFile(pq.ParquetFile):
    """A Parquet file that the calling thread reads alone.

    Threads of Arrow's may hold Python's file for longer than a call, and a process that ends while
    they do is aborted. Those that fetch ahead (`pre_buffer`) do, too.
    """

    def __init__(self, source: Any, dictionaries: Sequence[str] = ()) -> None:
        """Of an open file or a buffer; `dictionaries` are columns to read dictionary-encoded."""
        super().__init__(source, pre_buffer=False, read_dictionary=list(dictionaries))

    def stream(self) -> pa.RecordBatchReader:
        """All rows, so many at a time that memory is used again and again."""
        batches = self.iter_batches(_BATCH_ROWS, use_threads=False)
        return pa.RecordBatchReader.from_batches(self.schema_arrow, batches)

    def read(self, columns: Sequence[str] | None = None) -> pa.Table:
        """All rows of some columns, or of all of them."""
        return super().read(columns, use_threads=False)

    def read_row_group(self, i: int, columns: Sequence[str] | None = None) -> pa.Table:
        """A row group's rows of some columns, or of all of them."""
        return super().read_row_group(i, columns, use_threads=False)


def schema_of(tier: str, vocab_size: int) -> pa.Schema:
    """The columns of a tier for a vocabulary: without the high bytes of ids where all are 0."""
    schema = SCHEMAS[tier]
    if vocab_size > _HIGH:
        return schema
    return pa.schema([field for field in schema if not field.name.endswith("id_2")])


def rows_of(parquet: PartFile, doc_id: str) -> Iterator[pa.Table]:
    """A document's rows in a part, by the row groups that have some."""
    for group in range(parquet.num_row_groups):
        ids = parquet.read_row_group(group, columns=["doc_id"])["doc_id"]
        if pc.any(pc.equal(ids, doc_id)).as_py():
            yield parquet.read_row_group(group).filter(pc.field("doc_id") == doc_id)


def write_table(table: pa.Table, path: Path) -> None:
    """Write a summary table as one Parquet file, small for it: equal tables give equal bytes.

    No statistics and no copy of the schema, which would be as large as what a shard says; Parquet's
    own types are those of summaries. Encodings are those that readers of old know, too.
    """
    encodings: dict[str, str] = {}
    names = []
    for field in table.schema:
        if pa.types.is_string(field.type):
            names.append(field.name)
        elif pa.types.is_floating(field.type):
            encodings[field.name] = "BYTE_STREAM_SPLIT"
        elif pa.types.is_list(field.type) and pa.types.is_floating(field.type.value_type):
            encodings[f"{field.name}.list.element"] = "BYTE_STREAM_SPLIT"
        elif pa.types.is_int32(field.type):
            encodings[field.name] = "DELTA_BINARY_PACKED"
    pq.write_table(
        table,
        path,
        compression="zstd",
        compression_level=19 if table.num_rows < _FEW_ROWS else 3,
        use_dictionary=names,
        column_encoding=encodings,
        write_statistics=False,
        store_schema=False,
    )


class PartWriter:
    """Writes one Parquet file row group by row group."""

    def __init__(self, path: Path, schema: pa.Schema, metadata: Mapping[str, str]) -> None:
        self.path = path
        self._schema = schema.with_metadata({f"logitmill.{k}": v for k, v in metadata.items()})
        kinds = {field.name: field.type for field in schema}
        blobs = [
            n for n, t in kinds.items() if pa.types.is_large_binary(t) or pa.types.is_binary(t)
        ]
        # Dictionaries pay for the repeated strings of document rows, not for floats or blobs.
        strings = [field.name for field in schema if pa.types.is_string(field.type)]
        noise = _noise(kinds)
        # Codecs by column are asked for by the columns' leaves, which those of lists have below.
        codecs = {name: "none" if name in noise else "zstd" for name in kinds} if noise else "zstd"
        levels = {name: 3 for name in kinds if name not in noise} if noise else 3
        self._writer = pq.ParquetWriter(
            path,
            self._schema,
            compression=codecs,
            compression_level=levels,
            use_dictionary=strings,
            write_statistics=[name for name in schema.names if name not in blobs],
        )

    def write(self, columns: Mapping[str, Any]) -> None:
        """Append one row group."""
        arrays = [pa.array(columns[field.name], field.type) for field in self._schema]
        rows = pa.Table.from_arrays(arrays, schema=self._schema)
        self._writer.write_table(rows, row_group_size=max(1, len(rows)))

    def close(self) -> None:
        """Finish the file."""
        self._writer.close()


def _noise(names: Collection[str]) -> list[str]:
    """Columns that are not worth compressing: all bytes of numbers but the highest."""
    has_high = any(name.endswith("id_2") for name in names)
    noise = _NOISE + _NOISE_IF_HIGH * has_high
    return [name for name in names if name in noise]


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


class DocumentsWriter:
    """A part with one row a scored document, whose arrays `make_columns` lays out."""

    tier: str

    def __init__(
        self, path: Path, schema: pa.Schema, metadata: Mapping[str, str], token_bytes: int
    ) -> None:
        """`token_bytes` are those of a token's arrays: they decide where row groups end."""
        self._part = PartWriter(path, schema, metadata)
        self._token_bytes = token_bytes
        self._scores: list[DocumentScore] = []
        self._bytes = self._held = 0

    def make_columns(self, scores: Sequence[DocumentScore]) -> dict[str, Any]:
        """The columns of a row group."""
        raise NotImplementedError

    def add(self, score: DocumentScore) -> None:
        """Append a document, if it was scored."""
        if not len(score.tokens):
            return
        self._scores.append(score)
        self._bytes += len(score.tokens) * self._token_bytes
        self._held += score.tokens.num_bytes
        is_full = self._bytes >= _GROUP_BYTES or self._held >= _HELD_BYTES
        if is_full or len(self._scores) >= _GROUP_DOCUMENTS:
            self._flush()

    def close(self) -> None:
        """Finish the file."""
        self._flush()
        self._part.close()

    def _flush(self) -> None:
        if self._scores:
            self._part.write(self.make_columns(self._scores))
            self._scores, self._bytes, self._held = [], 0, 0


class TokensWriter(DocumentsWriter):
    """The `tokens` part: the scored tokens of every scored document."""

    tier = "tokens"

    def __init__(self, path: Path, metadata: Mapping[str, str]) -> None:
        super().__init__(path, TOKENS, metadata, sum(d.itemsize for d in TOKEN_DTYPES.values()))

    def make_columns(self, scores: Sequence[DocumentScore]) -> dict[str, Any]:
        """Lists of one length a document."""
        offsets = np.cumsum([0, *(len(s.tokens) for s in scores)]).astype(np.int32)
        columns: dict[str, Any] = {"doc_id": [s.record.doc_id for s in scores]}
        for name in TOKEN_DTYPES:
            values = np.concatenate([getattr(s.tokens, name) for s in scores])
            columns[name] = pa.ListArray.from_arrays(offsets, values)
        return columns


class LensWriter(DocumentsWriter):
    """The `lens` part: what layers on the way would have said of every scored token."""

    tier = "lens"

    def __init__(self, path: Path, metadata: Mapping[str, str], *, layers: Sequence[int]) -> None:
        about = {"layers": json.dumps(list(layers))}
        token_bytes = sum(TOKEN_DTYPES[name].itemsize for name in STATISTICS)
        super().__init__(path, LENS, {**metadata, **about}, token_bytes * len(layers))
        self._layers = layers

    def make_columns(self, scores: Sequence[DocumentScore]) -> dict[str, Any]:
        """A row a document and layer, lists of one length a document."""
        number = len(self._layers)
        lengths = np.repeat([len(score.tokens) for score in scores], number)
        offsets = np.cumsum([0, *lengths]).astype(np.int32)
        columns: dict[str, Any] = {
            "doc_id": [score.record.doc_id for score in scores for _ in self._layers],
            "layer": [*self._layers] * len(scores),
        }
        told = [score.tokens.lens for score in scores if score.tokens.lens is not None]
        for i, name in enumerate(STATISTICS):
            values = np.concatenate([lens[:, :, i].T.ravel() for lens in told])
            columns[name] = pa.ListArray.from_arrays(offsets, values.view(TOKEN_DTYPES[name]))
        return columns
