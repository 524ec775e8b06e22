"""The table of shards against the receipts it is made of."""

from __future__ import annotations

from dataclasses import replace

from logitmill.flows.folder import Part
from logitmill.flows.operations import OPERATIONS, operations
from logitmill.flows.store import Receipt

FIRST = Receipt(
    shard=3,
    parts=(
        Part("scores/part-00003.parquet", 100, "a"),
        Part("tokens/part-00003.parquet", 900, "b"),
        Part("shards/00003.counts.parquet", 30, "c"),
        Part("shards/00003.outliers.parquet", 7, "d"),
    ),
    documents=5,
    failed=1,
    tokens=400,
    bytes=1600,
    loglikelihood=-12.0,
    seconds=2.5,
    device="cpu",
    versions={"torch": "2"},
    device_seconds=2.0,
)


def test_a_row_holds_what_the_receipt_of_a_shard_says() -> None:
    fewer = replace(FIRST, shard=4, parts=FIRST.parts[:1], device="gpu", failed=0)
    table = operations(iter([FIRST, fewer]))
    assert table.column_names[: len(OPERATIONS)] == OPERATIONS.names
    common = {
        "seconds": 2.5,
        "device_seconds": 2.0,
        "documents": 5,
        "tokens": 400,
        "bytes": 1600,
        "bytes_scores": 100,
    }
    assert table.to_pylist() == [
        common
        | {"shard": 3, "device": "cpu", "failed": 1, "bytes_written": 1037}
        | {"bytes_summary": 37, "bytes_tokens": 900},
        common
        | {"shard": 4, "device": "gpu", "failed": 0, "bytes_written": 100}
        | {"bytes_summary": 0, "bytes_tokens": 0},
    ]


def test_no_shards_make_no_rows() -> None:
    table = operations([])
    assert table.num_rows == 0
    assert table.column_names == [*OPERATIONS.names, "bytes_summary"]
