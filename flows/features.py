"""Rows of the tiers whose arrays are bytes, as columns of lists, which `datasets` can use."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from .distributions import read_draws, read_top_k, spread_draws
from .folder import Folder, StoreError
from .parts import BLOBS, LOGITS_DTYPES
from .rows import read_states
from .scratch import sweep

if TYPE_CHECKING:
    from .run import Run

UNPACKED = ("topk", "sampled", "hidden", "logits")
"""Tiers whose arrays are bytes."""
# In the names of files that are kept for the next time: goes up when columns change.
_FORMAT = 1
_OWN = ("token_id", "byte_start", "byte_end", "logprob")


def schema_of_lists(run: Run, tier: str) -> pa.Schema:
    """The columns of a tier with lists in place of bytes: a list of a document's n tokens or rows.

    `topk`: `top_ids` int32 and `top_logprobs` float16 are lists of k a token. `sampled`:
    `sample_ids` int32 of m draws a token, ascending. `hidden`: `states` of D numbers a row, in the
    dtype they were kept in, bfloat16 as float32, which holds the same numbers. `logits`: `logprobs`
    of V a row. All else is as in the tier's table.
    """
    plan = run.plan
    text, whole = pa.string(), pa.int32()
    if tier in ("hidden", "logits"):
        fields = {"doc_id": text, "first_row": pa.int64(), "num_rows": whole}
        if tier == "hidden":
            dtype, size = _about_states(run)
            kind = pa.float16() if dtype == "float16" else pa.float32()
            return pa.schema({**fields, "states": _lists_of(kind, size)})
        kind = pa.from_numpy_dtype(LOGITS_DTYPES[plan["logits_dtype"]])
        logprobs = _lists_of(kind, plan["model"]["vocab_size"])
        return pa.schema({**fields, "logsumexp": pa.list_(pa.float32()), "logprobs": logprobs})
    own = {name: pa.list_(pa.from_numpy_dtype(BLOBS[name])) for name in _OWN}
    fields = {"doc_id": text, "num_tokens": whole, "first_input": whole, **own}
    if tier == "sampled":
        return pa.schema({**fields, "sample_ids": _lists_of(pa.int32(), plan["num_draws"])})
    return pa.schema(
        {
            **fields,
            "top_ids": _lists_of(pa.int32(), plan["top_k"]),
            "top_logprobs": _lists_of(pa.float16(), plan["top_k"]),
            "log_tail_mass": pa.list_(pa.float32()),
        }
    )


def write_lists(run: Run, tier: str, columns: Sequence[str] | None) -> Path:
    """A file of the tier's rows as `schema_of_lists` has them, in the cache of `datasets`.

    An Arrow stream, made a row group at a time and kept: what is there already is what the run's
    key and its parts say.
    """
    import datasets

    schema = schema_of_lists(run, tier)
    if columns is not None:
        schema = pa.schema([schema.field(name) for name in columns])
    stated = json.dumps([_FORMAT, tier, schema.names, run.parts(tier)])
    digest = hashlib.sha256(stated.encode()).hexdigest()[:16]
    folder = Path(datasets.config.HF_DATASETS_CACHE, "logitmill")
    path = folder / f"{run.plan['run_key']}-{tier}-{digest}.arrow"
    if path.exists():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    sweep(folder)
    with Folder(str(folder)).scratch() as scratch:
        made = scratch / path.name
        with open(made, "wb") as file, pa.ipc.new_stream(file, schema) as writer:
            for batch in _batches(run, tier, schema):
                writer.write_batch(batch)
        # Others may be making it, too: it is there at once and whole.
        os.replace(made, path)
    return path


def _batches(run: Run, tier: str, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    read = _reader(run, tier)
    for name in run.parts(tier):
        with run.open_part(name) as parquet:
            for group in range(parquet.num_row_groups):
                rows = [row | read(row) for row in parquet.read_row_group(group).to_pylist()]
                arrays = [_column(field, [row[field.name] for row in rows]) for field in schema]
                yield pa.record_batch(arrays, schema=schema)


def _reader(run: Run, tier: str) -> Callable[[dict[str, Any]], dict[str, np.ndarray]]:
    """What makes arrays of the bytes of a row, a row of theirs for each token or row."""
    plan = run.plan
    if tier == "topk":
        return lambda row: read_top_k(row, plan["top_k"])
    if tier == "sampled":
        return lambda row: _read_samples(row, plan["num_draws"])
    if tier == "hidden":
        dtype, size = _about_states(run)
        kind = np.float16 if dtype == "float16" else np.float32
        return lambda row: {
            "states": read_states(row["states"], dtype, size).float().numpy().astype(kind)
        }
    stored = np.dtype(LOGITS_DTYPES[plan["logits_dtype"]]).newbyteorder("<")
    return lambda row: {
        "logsumexp": np.array(row["logsumexp"], np.float32),
        "logprobs": np.frombuffer(row["logprobs"], stored).reshape(row["num_rows"], -1),
    }


def _read_samples(row: dict[str, Any], num_draws: int) -> dict[str, np.ndarray]:
    arrays = read_draws(row)
    return {**arrays, "sample_ids": spread_draws(arrays, num_draws)}


def _column(field: pa.Field, values: Sequence[Any]) -> pa.Array:
    if not pa.types.is_list(field.type):
        return pa.array(values, field.type)
    inner = pa.array(np.concatenate(values).ravel())
    if pa.types.is_fixed_size_list(field.type.value_type):
        inner = pa.FixedSizeListArray.from_arrays(inner, field.type.value_type.list_size)
    offsets = np.cumsum([0, *map(len, values)], dtype=np.int32)
    return pa.ListArray.from_arrays(offsets, inner).cast(field.type)


def _lists_of(kind: pa.DataType, size: int) -> pa.DataType:
    return pa.list_(pa.list_(kind, size))


def _about_states(run: Run) -> tuple[str, int]:
    """The dtype of states and how long they are."""
    for name in run.parts("hidden")[:1]:
        with run.open_part(name) as parquet:
            about = parquet.schema_arrow.metadata
            return about[b"logitmill.hidden_dtype"].decode(), int(about[b"logitmill.hidden_size"])
    raise StoreError(f"run: {run.uri!r} has no shard yet that is complete")
