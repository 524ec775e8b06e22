"""Makes a run of its shards: merged summaries, the report, and the manifest that says it stands."""

from __future__ import annotations

import io
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from .folder import Folder, Part
from .parts import write_table
from .store import MANIFEST, PLAN, REPORT, Receipt, find_receipts
from .summary import merge_counts, merge_outliers

if TYPE_CHECKING:
    from .run import Run

MERGES: dict[str, Callable[[Iterable[pa.Table]], pa.Table]] = {
    "counts": merge_counts,
    "outliers": merge_outliers,
}
"""How the tables of shards become the run's."""


def publish(folder: Folder, receipts: Sequence[Receipt]) -> None:
    """Write the run's summaries and report from its shards' receipts, and the manifest last."""
    plan = folder.read_json(PLAN)
    assert plan is not None, "a run has a plan before it has receipts"
    tables: dict[str, pa.Table] = {}
    summaries: list[Part] = []
    with folder.scratch() as scratch:
        for name, merge in MERGES.items():
            shards = (read_table(folder, f"shards/{r.shard:05d}.{name}.parquet") for r in receipts)
            tables[name] = merge(shards)
            write_table(tables[name], scratch / name)
            summaries.append(folder.publish(scratch / name, f"summary/{name}.parquet"))
    totals = {
        "documents": sum(r.documents for r in receipts),
        "failed": sum(r.failed for r in receipts),
        "tokens": sum(r.tokens for r in receipts),
        "bytes": sum(r.bytes for r in receipts),
        "loglikelihood": math.fsum(r.loglikelihood for r in receipts),
    }
    facts = report_facts(folder.uri, plan, receipts)
    from .report import render_report

    folder.write(REPORT, render_report(tables["counts"], tables["outliers"], facts).encode())
    manifest = {
        "format": 1,
        "run_key": plan["run_key"],
        "model": plan["model"],
        "engine": plan["engine"],
        "recipe": plan["recipe"],
        "recipe_hash": plan["recipe_hash"],
        "tiers": plan["tiers"],
        "logits_dtype": plan["logits_dtype"],
        "units": "nats",
        "alignment": "record i and logits row i of a document belong to its i-th scored token",
        "corpus_fingerprint": plan["corpus"]["fingerprint"],
        **totals,
        "parts": [asdict(part) | {"shard": r.shard} for r in receipts for part in r.parts],
        "summaries": [asdict(part) for part in summaries],
    }
    folder.sweep()
    folder.write_json(MANIFEST, manifest)


def rewrite_report(run: Run, out: str | None) -> str:
    """Render a run's report anew, in its place or into the local file `out`; returns where."""
    from .report import render_report

    receipts = find_receipts(run.folder, len(run.plan["corpus"]["shards"]))
    facts = report_facts(run.uri, run.plan, list(receipts.values()))
    html = render_report(run.summary("counts"), run.summary("outliers"), facts).encode()
    if out is None:
        run.folder.write(REPORT, html)
        return run.report_path
    Path(out).write_bytes(html)
    return out


def report_facts(uri: str, plan: dict[str, Any], receipts: Sequence[Receipt]) -> dict[str, Any]:
    """What the report says of a run besides its tables."""
    devices = Counter(r.device for r in receipts)
    return {
        "run_key": plan["run_key"],
        "uri": uri,
        "model": plan["model"]["name"],
        "model_digest": plan["model"]["digest"],
        "corpus": plan["uri"],
        "recipe": plan["recipe"],
        "recipe_hash": plan["recipe_hash"],
        "engine": plan["engine"],
        "tiers": plan["tiers"],
        "versions": dict(receipts[0].versions) if receipts else {},
        "device": ", ".join(devices),
        "seconds": sum(r.seconds for r in receipts),
        "documents": sum(r.documents for r in receipts),
        "tokens": sum(r.tokens for r in receipts),
        "bytes": sum(r.bytes for r in receipts),
    }


def read_table(folder: Folder, name: str) -> pa.Table:
    """A small table of a run, which a receipt names."""
    data = folder.read(name)
    assert data is not None, f"{name} is in a receipt"
    return pq.read_table(io.BytesIO(data))
