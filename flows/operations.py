"""What a run cost, shard by shard, as its receipts tell: seconds, devices, tokens, bytes written.

Times differ from run to run, so they are no part of summaries or the manifest.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields

import pyarrow as pa

from .store import Receipt

OPERATIONS = pa.schema(
    {
        "shard": pa.int32(),
        "device": pa.string(),
        "seconds": pa.float64(),
        "device_seconds": pa.float64(),
        "documents": pa.int64(),
        "failed": pa.int64(),
        "tokens": pa.int64(),
        "bytes": pa.int64(),
        "bytes_written": pa.int64(),
        "attempt": pa.int32(),
    }
)
"""One row a shard: fields of its `Receipt` (`attempt` null where it says none), and the bytes of
all its parts. A column of bytes for each tier follows, in the order of names: `bytes_scores`,
`bytes_tokens`, ...; `bytes_summary` are those of the shard's tables, which lie beside its receipt.
"""

_SUMMARY = "summary"
_RECEIPT = tuple(f.name for f in fields(Receipt) if f.name in OPERATIONS.names)


def operations(receipts: Iterable[Receipt]) -> pa.Table:
    """The table of shards, in the order of `receipts`; schema `OPERATIONS` and the tiers'."""
    rows: list[dict[str, object]] = []
    tiers: set[str] = {_SUMMARY}
    for receipt in receipts:
        written: dict[str, int] = {}
        for part in receipt.parts:
            folder = part.name.split("/")[0]
            tier = _SUMMARY if folder == "shards" else folder
            written[tier] = written.get(tier, 0) + part.bytes
        tiers |= set(written)
        row: dict[str, object] = {name: getattr(receipt, name) for name in _RECEIPT}
        row["bytes_written"] = sum(written.values())
        row |= {f"bytes_{tier}": num_bytes for tier, num_bytes in written.items()}
        rows.append(row)
    columns = [f"bytes_{tier}" for tier in sorted(tiers)]
    schema = pa.schema([*OPERATIONS, *(pa.field(name, pa.int64()) for name in columns)])
    nothing = dict.fromkeys(columns, 0)
    return pa.Table.from_pylist([nothing | row for row in rows], schema=schema)
