"""Makes a run of its shards: merged summaries, the report, and the manifest that says it stands."""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, TypeVar

import pyarrow as pa

from .folder import Folder, Part, open_page
from .kept import OF_TIERS
from .operations import operations
from .parts import PartFile, write_table
from .store import MANIFEST, PLAN, REPORT, Receipt, find_receipts
from .summary import merge_counts, merge_outliers
from .vocabulary import merge_vocabulary

if TYPE_CHECKING:
    from .run import Run

# Files that are fetched ahead, and their bytes at most: a vocabulary by source may have 100 MB.
_READERS, _AHEAD, _AHEAD_BYTES = 16, 64, 64 << 20
# Of a plan, what the command that gives it again says besides.
_SETTINGS = (*OF_TIERS, "logits_dtype", "vocabulary", "reading", "shard_bytes")
_TABLE_BYTES = 1 << 20
_T = TypeVar("_T")

Merge = Callable[[Iterable[Any]], pa.Table]


def find_merges(plan: Mapping[str, Any]) -> dict[str, Merge]:
    """How the tables of a run's shards become the run's, by their names."""
    merges: dict[str, Merge] = {"counts": merge_counts, "outliers": merge_outliers}
    if plan.get("vocabulary"):
        merges["vocabulary"] = merge_vocabulary
    return merges


def publish(folder: Folder, receipts: Sequence[Receipt]) -> None:
    """Write the run's summaries and report from its shards' receipts, and the manifest last."""
    plan = folder.read_json(PLAN)
    assert plan is not None, "a run has a plan before it has receipts"
    tables: dict[str, pa.Table] = {}
    summaries: list[Part] = []
    with folder.scratch() as scratch:
        for name, merge in find_merges(plan).items():
            tables[name] = merge(read_tables(folder, name, receipts))
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

    html = render_report(**tables, facts=facts, operations=operations(receipts))
    folder.write(REPORT, html.encode())
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


def rewrite_report(
    run: Run,
    out: str | None = None,
    base: Run | None = None,
    *,
    endpoint_url: str | None = None,
    on_progress: Callable[[str, int, int], object] = lambda doing, done, total: None,
) -> str:
    """Render a run's report anew, in its place or as the page `out`; returns where.

    With `base` it also shows what is different from that run, of which `on_progress` is told as
    `compare` tells it.

    Raises:
        ValueError: if `out` cannot be written, or is no page's name, or the runs do not compare.
    """
    from .report import render_report

    if out is None:
        folder, name = run.folder, REPORT
        folder.check_writable()
    else:
        folder, name = open_page(out, "out", endpoint_url)
    receipts = list(find_receipts(run.folder, len(run.plan["corpus"]["shards"])).values())
    facts = report_facts(run.uri, run.plan, receipts)
    tables = {name: run.summary(name) for name in find_merges(run.plan)}
    against = None
    if base is not None:
        from .compare import compare
        from .compare.page import show_against

        against = show_against(compare(base, run, on_progress=on_progress))
    told = operations(receipts)
    html = render_report(**tables, facts=facts, operations=told, against=against).encode()
    folder.write(name, html)
    return run.report_path if out is None else out


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
        **{name: plan.get(name) for name in _SETTINGS},
        "versions": dict(receipts[0].versions) if receipts else {},
        "device": ", ".join(devices),
        "seconds": sum(r.seconds for r in receipts),
        "documents": sum(r.documents for r in receipts),
        "tokens": sum(r.tokens for r in receipts),
        "bytes": sum(r.bytes for r in receipts),
    }


def read_tables(folder: Folder, name: str, receipts: Iterable[Receipt]) -> Iterator[Any]:
    """The tables of this name of shards, in the order of their receipts, small ones together.

    To merge a table costs what has been merged before, so that there should be few of them. Not so
    vocabularies, which are streams of one shard each.
    """
    if name == "vocabulary":
        yield from _read_ahead(folder, name, receipts, _stream_vocabulary)
        return
    together: list[pa.Table] = []
    num_bytes = 0
    for table in _read_ahead(folder, name, receipts, _parse):
        together.append(table)
        num_bytes += table.nbytes
        if num_bytes >= _TABLE_BYTES:
            yield pa.concat_tables(together)
            together, num_bytes = [], 0
    if together:
        yield pa.concat_tables(together)


def _read_ahead(
    folder: Folder, name: str, receipts: Iterable[Receipt], parse: Callable[[bytes], _T]
) -> Iterator[_T]:
    # Files are fetched side by side, and parsed here: side by side that takes longer.
    fetching: deque[tuple[Future[bytes], int]] = deque()
    num_bytes = 0
    with ThreadPoolExecutor(_READERS) as pool:
        for receipt in receipts:
            table = f"shards/{receipt.shard:05d}.{name}.parquet"
            size = sum(part.bytes for part in receipt.parts if part.name == table)
            while fetching and (len(fetching) == _AHEAD or num_bytes + size > _AHEAD_BYTES):
                future, held = fetching.popleft()
                yield parse(future.result())
                num_bytes -= held
            fetching.append((pool.submit(_fetch, folder, table), size))
            num_bytes += size
        while fetching:
            yield parse(fetching.popleft()[0].result())


def read_table(folder: Folder, name: str) -> pa.Table:
    """A small table of a run, which a receipt names."""
    return _parse(_fetch(folder, name))


def _fetch(folder: Folder, name: str) -> bytes:
    data = folder.read(name)
    assert data is not None, f"{name} is in a receipt"
    return data


def _parse(data: bytes) -> pa.Table:
    return PartFile(pa.BufferReader(data)).read()


def _stream_vocabulary(data: bytes) -> pa.RecordBatchReader:
    return PartFile(pa.BufferReader(data), dictionaries=["source"]).stream()
