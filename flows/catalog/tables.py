"""What a run is as tables: which there are, where their rows come from, and how they are cut.

    table   a row                    its files
    runs    a run                    written for the catalog
    shards  a shard of a run         written for the catalog
    counts  a bin of a histogram     the run's summary, written again for the catalog
    scores  a document               the run's own parts, where they lie
    tokens  a document, as lists     the run's own parts, where they lie (if the run kept them)

All are partitioned by model, corpus, date and run. The parts of a run hold none of these four: the
catalog has them as partition values, and readers fill them in, as Iceberg's specification has it
for columns that a file lacks. So what is large is never copied, and a part is the same bytes
whether or not it is published. What is small has them as columns as well.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from ..folder import Folder, StoreError
from ..operations import OPERATIONS, operations
from ..parts import TIERS
from ..run import Run
from ..store import MANIFEST, Receipt

PARTITION = ("model", "corpus", "date", "run_key")
"""Columns that every table has, and by whose values its files are found."""

PARTS = ("tokens", "scores")
TABLES = (*PARTS, "counts", "shards", "runs")
"""In the order they are published in: a run that is in `runs` is in all of them."""

_DAY, _DAYS_FOLDER = re.compile(r"\d{4}-\d{2}-\d{2}"), re.compile(r"/\d{4}/\d{2}/\d{2}/")


@dataclass(frozen=True)
class Origin:
    """Where rows come from: the values of `PARTITION`."""

    model: str
    """Its name, as the run was given it."""
    corpus: str
    """Its URI with `*` for dates, so that what is scored night by night is one corpus; or a name
    of the caller's."""
    date: datetime.date
    """When the run was complete, in UTC; or a date of the caller's."""
    run_key: str

    @classmethod
    def of(cls, run: Run, corpus: str | None, date: str | datetime.date | None) -> Origin:
        """A run's own, but for what is given.

        Raises:
            ValueError: for a date that is none.
        """
        if corpus is not None and not corpus:
            raise StoreError("corpus: '' is no name; leave it out for the corpus' URI")
        return cls(
            model=run.plan["model"]["name"],
            corpus=corpus or name_corpus(run.plan["uri"]),
            date=_find_date(run.folder, date),
            run_key=run.plan["run_key"],
        )

    @property
    def values(self) -> tuple[str, str, int, str]:
        """As a partition of a table: a date is days since 1970."""
        days = (self.date - datetime.date(1970, 1, 1)).days
        return self.model, self.corpus, days, self.run_key

    def add_to(self, table: pa.Table) -> pa.Table:
        """The table with these as its first columns, and no integers that Iceberg has not."""
        for at, field in enumerate(table.schema):
            if pa.types.is_int8(field.type) or pa.types.is_int16(field.type):
                column = table.column(at).cast(pa.int32())
                table = table.set_column(at, field.with_type(pa.int32()), column)
        for name in reversed(PARTITION):
            value = pa.scalar(getattr(self, name))
            column = pa.chunked_array([pa.repeat(value, table.num_rows)])
            table = table.add_column(0, pa.field(name, value.type), column)
        return table.replace_schema_metadata(None)


def name_corpus(uri: str) -> str:
    """A corpus' URI with `*` for dates: `s3://c/dt=*/` for the corpus of any night."""
    return _DAYS_FOLDER.sub("/*/", _DAY.sub("*", uri))


def make_table(name: str, run: Run, receipts: Sequence[Receipt]) -> pa.Table:
    """The rows of a small table, without the columns of `PARTITION`."""
    if name == "counts":
        return run.summary("counts")
    if name == "shards":
        return _with_all_tiers(operations(receipts))
    return pa.Table.from_pylist([_run_row(run, receipts)], schema=RUNS)


def _with_all_tiers(shards: pa.Table) -> pa.Table:
    """The table with a column of bytes for each tier that a run can keep, 0 where this one has not.

    So that the columns are those of the views over a folder of runs, whatever was published first.
    """
    fixed = [name for name in shards.column_names if name not in _bytes_columns(shards)]
    for tier in TIERS:
        if (name := f"bytes_{tier}") not in shards.column_names:
            shards = shards.append_column(name, pa.array([0] * len(shards), pa.int64()))
    return shards.select([*fixed, *sorted(_bytes_columns(shards))])


def _bytes_columns(shards: pa.Table) -> list[str]:
    known = set(OPERATIONS.names)
    return [n for n in shards.column_names if n.startswith("bytes_") and n not in known]


RUNS = pa.schema(
    {
        "uri": pa.string(),
        "model_digest": pa.string(),
        "architecture": pa.string(),
        "quantization": pa.string(),
        "dtype": pa.string(),
        "device": pa.string(),
        "recipe": pa.string(),
        "recipe_hash": pa.string(),
        "tiers": pa.list_(pa.string()),
        "corpus_uri": pa.string(),
        "corpus_fingerprint": pa.string(),
        "shards": pa.int64(),
        "documents": pa.int64(),
        "failed": pa.int64(),
        "tokens": pa.int64(),
        "bytes": pa.int64(),
        "loglikelihood": pa.float64(),
        "seconds": pa.float64(),
        "device_seconds": pa.float64(),
        "bytes_written": pa.int64(),
    }
)
"""One row a run. `failed` of its `documents` have no scores; `tokens` and `bytes` are the scored
ones, `loglikelihood` their sum in nats; `seconds` and `device_seconds` are sums over its shards."""


def _run_row(run: Run, receipts: Sequence[Receipt]) -> dict[str, Any]:
    plan, manifest = run.plan, run.manifest
    assert manifest is not None, "only complete runs are published"
    return {
        "uri": run.folder.address("").rstrip("/"),
        "model_digest": plan["model"]["digest"],
        "architecture": plan["model"]["architecture"],
        "quantization": plan.get("quantization"),
        "dtype": plan["engine"]["dtype"],
        "device": plan.get("device"),
        "recipe": plan["recipe"]["name"],
        "recipe_hash": plan["recipe_hash"],
        "tiers": plan["tiers"],
        "corpus_uri": plan["uri"],
        "corpus_fingerprint": plan["corpus"]["fingerprint"],
        "shards": len(receipts),
        **{key: manifest[key] for key in ("documents", "failed", "tokens", "bytes")},
        "loglikelihood": manifest["loglikelihood"],
        "seconds": sum(r.seconds for r in receipts),
        "device_seconds": sum(r.device_seconds for r in receipts),
        "bytes_written": sum(part.bytes for r in receipts for part in r.parts),
    }


def _find_date(folder: Folder, given: str | datetime.date | None) -> datetime.date:
    if isinstance(given, datetime.date):
        return given
    if given is not None:
        try:
            return datetime.date.fromisoformat(given)
        except ValueError:
            raise StoreError(f"date: {given!r} is no date; give one as 2026-11-23") from None
    try:
        modified = folder.filesystem.modified(folder.path(MANIFEST))
    except NotImplementedError:
        raise StoreError(
            f"date: {folder.uri!r} does not say when its files were written; give the run's date"
        ) from None
    return datetime.datetime.date(modified.astimezone(datetime.UTC))
