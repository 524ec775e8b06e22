"""What filters read of a run and give: columns, a row group at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa

from ..index import shard_names
from ..run import Run


def read_groups(run: Run, tier: str, columns: Sequence[str]) -> Iterator[pa.Table]:
    """Columns of a tier, a row group at a time."""
    for name in shard_names(run, tier).values():
        with run.open_part(name) as parquet:
            for group in range(parquet.num_row_groups):
                yield parquet.read_row_group(group, columns=list(columns))


def floats(column: pa.ChunkedArray) -> np.ndarray:
    """float64, NaN where there is none."""
    return column.to_numpy(zero_copy_only=False).astype(np.float64)


def split(lists: pa.ChunkedArray) -> list[np.ndarray]:
    """Each row's list as an array."""
    return [row.values.to_numpy() for row in lists]


def batch(schema: pa.Schema, *columns: object) -> pa.RecordBatch:
    """A batch of Arrow or numpy columns; NaN is null."""
    arrays = []
    for field, column in zip(schema, columns, strict=True):
        if isinstance(column, pa.ChunkedArray):
            column = column.combine_chunks()
        elif not isinstance(column, pa.Array):
            values = np.asarray(column)
            gone = np.isnan(values) if values.dtype.kind == "f" else None
            column = pa.array(values, field.type, mask=gone)
        arrays.append(column)
    return pa.RecordBatch.from_arrays(arrays, schema=schema)


def check_tier(run: Run, name: str, tier: str) -> None:
    """ValueError for a run, called `name`, that did not keep a tier."""
    if tier not in run.tiers:
        kept = ", ".join(run.tiers)
        raise ValueError(f"{name}: {run.uri} kept {kept}; score it with --keep {tier}")


def describe_recipe(run: Run) -> str:
    """A run's recipe in an error: its name, context and hash."""
    recipe = run.plan["recipe"]
    return f"{recipe['name']} of context {recipe['context']} ({run.plan['recipe_hash']})"
