#!/usr/bin/env python3
"""Measures what grows with the shards of a run: files, seconds, memory, Prefect's database.

    python infra/benchmarks/sizes.py 100 1000 10000 --out /tmp/sizes
    python infra/benchmarks/sizes.py 100 1000 --out s3://bucket/sizes --endpoint-url URL
    python infra/benchmarks/sizes.py --flow 100 300 600 --out /tmp/sizes

Shards are not scored: their parts, tables and receipts go through the writers that a run has, with
random numbers in them, of a corpus of as many Parquet files of a row each. `--flow` scores that
many shards of a short document in this process, with a server of its own. Keys of S3 are in the
environment. What is left in `--out` is not removed.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import io
import json
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from logitmill.engine import metrics
from logitmill.engine.records import DocumentRecord, DocumentScore, TokenRecords
from logitmill.flows.corpus import CorpusSpec
from logitmill.flows.folder import Folder, endpoint_options
from logitmill.flows.follow import _Follower
from logitmill.flows.parts import ScoresWriter, write_table
from logitmill.flows.publish import publish
from logitmill.flows.request import NothingNew, Prepared, Request, prepare
from logitmill.flows.run import open_run
from logitmill.flows.store import MANIFEST, PLAN, REPORT, Receipt, _known, find_receipts
from logitmill.flows.summary import Summary
from logitmill.flows.verify import verify_run

MODEL = Path(__file__).resolve().parent.parent / "demo" / "model"
TOKENS = 200
"""Of a document."""
_DRAWN = 400
"""Documents at least, of which each shard has some."""
_WRITERS = 16
_IDLE_SECONDS, _IDLE_SHARE = 5.0, 0.1


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("shards", type=int, nargs="*", help="numbers of shards of a made-up run")
    parser.add_argument("--out", required=True, help="where runs and corpora go: a folder, s3://")
    parser.add_argument("--endpoint-url", help="the S3 server where it is not Amazon's")
    parser.add_argument("--documents", type=int, default=24, help="in a shard")
    parser.add_argument("--sources", type=int, help="of the corpus; default: one a shard")
    parser.add_argument("--flow", type=int, nargs="+", default=[], help="numbers of real shards")
    given = parser.parse_args()
    runs = given.shards and [
        MadeUp(given.out, given.endpoint_url, n, documents, given.sources).measure()
        # The first is warming up: what is loaded once counts for none of them.
        for n, documents in [(10, 10), *((n, given.documents) for n in given.shards)]
    ]
    tabulate(given.shards, runs[1:])
    tabulate(given.flow, measure_flows(given.out, given.flow) if given.flow else [])


def tabulate(numbers: Sequence[int], columns: Sequence[dict[str, str]]) -> None:
    """Print a column for each number of shards."""
    if not columns:
        return
    print("| " + " | ".join(["shards", *(f"{n:,}" for n in numbers)]) + " |")
    print("| --- |" + " ---: |" * len(columns))
    for name in columns[0]:
        print("| " + " | ".join([name, *(column[name] for column in columns)]) + " |")
    print(flush=True)


class Meter:
    """Seconds and memory of what is done, by name."""

    def __init__(self) -> None:
        self.cells: dict[str, str] = {}

    @contextmanager
    def measure(self, name: str, *, is_new: bool = False) -> Iterator[None]:
        """Wall time, and how far this process's resident memory rises above what it was.

        With `is_new` as a process that has read no receipts yet.
        """
        if is_new:
            _known.cache_clear()
        gc.collect()
        pa.default_memory_pool().release_unused()
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        before, began = memory("VmRSS"), time.monotonic()
        yield
        seconds = time.monotonic() - began
        self.cells[name] = f"{seconds:.1f} s, {max(0, memory('VmHWM') - before) / 1e6:,.0f} MB"
        print(f"{name}: {self.cells[name]}", flush=True)

    def note(self, name: str, num_bytes: float) -> None:
        """So many bytes."""
        self.cells[name] = say_bytes(num_bytes)
        print(f"{name}: {self.cells[name]}", flush=True)


def memory(line: str, pid: int | str = "self") -> int:
    """Bytes that a line of a process's status says: VmRSS now, VmHWM at most."""
    status = Path(f"/proc/{pid}/status").read_text()
    return 1024 * int(next(s.split()[1] for s in status.splitlines() if s.startswith(f"{line}:")))


def say_bytes(num_bytes: float) -> str:
    """For people: "1.2 MB"."""
    for unit in ("B", "kB", "MB"):
        if num_bytes < 1000:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.3g} GB"


# ---- a run that nobody scored


class MadeUp:
    """A run of random numbers, and what can be done with it."""

    def __init__(
        self, out: str, endpoint_url: str | None, shards: int, documents: int, sources: int | None
    ) -> None:
        self._num_shards, self._documents = shards, documents
        self._sources = sources or shards
        options = endpoint_options(out, endpoint_url)
        below = f"{out.rstrip('/')}/{shards}-of-{documents}-by-{self._sources}"
        self._corpus, self._file = Folder(f"{below}/corpus", options), make_file(documents)
        group = pq.read_metadata(pa.BufferReader(self._file)).row_group(0)
        self._request = Request(
            model=str(MODEL),
            # A file is a shard.
            corpus=CorpusSpec(
                uri=f"{below}/corpus", shard_bytes=group.column(0).total_uncompressed_size
            ),
            out=f"{below}/runs",
            endpoint_url=endpoint_url,
        )
        self._options = options
        self._meter = Meter()

    def measure(self) -> dict[str, str]:
        """Cells of a table by the names of their rows."""
        print(f"-- {self._num_shards:,} shards, {self._sources:,} sources", flush=True)
        meter, num_shards = self._meter, self._num_shards
        make_corpus(self._corpus, self._file, num_shards)
        with meter.measure("plan"):
            prepared = prepare(self._request)
        folder = prepared.job.folder
        with meter.measure("write plan.json"):
            prepared.write_plan()
        self._write_shards(prepared, range(num_shards - num_shards // 100))
        with meter.measure("resume at 99 %: to the first shard", is_new=True):
            again = prepare(self._request)
            again.is_complete()
            find_receipts(folder, num_shards)
            find_receipts(folder, num_shards)
        self._write_shards(prepared, range(num_shards - num_shards // 100, num_shards))
        with meter.measure("find receipts", is_new=True):
            find_receipts(folder, num_shards)
        with meter.measure("find receipts again"):
            receipts = list(find_receipts(folder, num_shards).values())
        with meter.measure("publish"):
            publish(folder, receipts)
        del receipts
        follower = _Follower(folder)
        with meter.measure("follow: first look"):
            follower.look()
        with meter.measure("follow: next look"):
            follower.look()
        del follower
        with meter.measure("run again: complete", is_new=True):
            assert prepare(self._request).is_complete()
        with meter.measure("run again: nothing new (only_new)"):
            try:
                prepare(replace(self._request, only_new=True))
            except NothingNew:
                pass
            else:
                raise AssertionError("something is new")
        with meter.measure("open_run"):
            run = open_run(folder.uri, storage_options=self._options)
        with meter.measure("verify, nothing scored again"):
            assert not verify_run(run, sample=0)
        self._note_sizes(folder)
        return meter.cells

    def _write_shards(self, prepared: Prepared, shards: range) -> None:
        began = time.monotonic()
        num_drawn = max(_DRAWN, self._documents)
        documents = make_documents(num_drawn)

        def write(shard: int) -> None:
            drawn = np.random.default_rng(shard).permutation(num_drawn)[: self._documents]
            source = f"source-{shard % self._sources:05d}"
            write_shard(prepared, shard, [documents[n] for n in drawn], source)

        with ThreadPoolExecutor(_WRITERS) as pool:
            list(pool.map(write, shards))
        print(f"(wrote {len(shards):,} shards in {time.monotonic() - began:.0f} s)", flush=True)

    def _note_sizes(self, folder: Folder) -> None:
        for name in (PLAN, MANIFEST, REPORT, "summary/counts.parquet", "summary/outliers.parquet"):
            self._meter.note(name, folder.size(name) or 0)
        sizes = folder.sizes("shards")
        for kind in (".json", ".counts.parquet", ".outliers.parquet"):
            total = sum(size for name, size in sizes.items() if name.endswith(kind))
            self._meter.note(f"shards/*{kind}", total)
        self._meter.note("scores/*", sum(folder.sizes("scores").values()))


def make_file(num_rows: int) -> bytes:
    """A Parquet file of short texts."""
    made = io.BytesIO()
    pq.write_table(pa.table({"text": [f"document {row}" for row in range(num_rows)]}), made)
    return made.getvalue()


def make_corpus(folder: Folder, file: bytes, num_files: int) -> None:
    """So many files, those that are not there yet."""
    have = folder.sizes("data")
    names = [name for i in range(num_files) if (name := f"data/part-{i:05d}.parquet") not in have]
    with ThreadPoolExecutor(_WRITERS) as pool:
        list(pool.map(lambda name: folder.write(name, file), names))


def make_documents(count: int) -> list[DocumentScore]:
    """Documents with plausible random records."""
    rng = np.random.default_rng(0)
    text = "abcd" * TOKENS
    made = []
    for index in range(count):
        tokens = TokenRecords.empty(TOKENS)
        tokens.byte_start[:] = np.arange(0, 4 * TOKENS, 4)
        tokens.byte_end[:] = tokens.byte_start + 4
        tokens.logprob[:] = -rng.exponential(2.0, TOKENS)
        tokens.entropy[:] = rng.exponential(2.0, TOKENS)
        tokens.rank[:] = rng.geometric(0.2, TOKENS)
        tokens.top1_logprob[:] = np.log(rng.uniform(0.01, 1.0, TOKENS))
        total = float(tokens.logprob.sum(dtype=np.float64))
        record = DocumentRecord(
            str(index),
            loglikelihood=total,
            num_tokens=TOKENS,
            num_tokens_scored=TOKENS,
            num_bytes=len(text),
            num_chars=len(text),
            num_windows=1,
            sum_entropy=float(tokens.entropy.sum(dtype=np.float64)),
            num_top1=int((tokens.rank == 1).sum()),
            nll_per_token=metrics.nll_per_token(total, TOKENS),
            token_perplexity=metrics.perplexity(total, TOKENS),
            bits_per_byte=metrics.bits(total, len(text)),
            mean_entropy=float(tokens.entropy.mean()),
            top1_accuracy=float((tokens.rank == 1).mean()),
            byte_perplexity=metrics.perplexity(total, len(text)),
            bits_per_char=metrics.bits(total, len(text)),
            word_perplexity=metrics.perplexity(total, TOKENS),
            min_k_prob_20=metrics.min_k_prob(tokens.logprob, 0.2),
            min_k_plus_plus_20=float(rng.normal()),
            zlib_ratio=float(rng.uniform()),
        )
        made.append(DocumentScore(index, record, tokens, text))
    return made


def write_shard(
    prepared: Prepared, shard: int, documents: Sequence[DocumentScore], source: str
) -> None:
    """What the task of a shard leaves."""
    job, name, summary = prepared.job, f"{shard:05d}", Summary()
    with job.folder.scratch() as scratch:
        scores = ScoresWriter(scratch / "scores", {"run_key": job.run_key})
        for row, document in enumerate(documents):
            record = replace(
                document.record,
                doc_id=f"part-{name}.parquet#{row}",
                source=source,
                recipe=job.recipe.name,
                recipe_hash=job.recipe.hash,
            )
            made = replace(document, record=record)
            scores.add(made)
            summary.add(made)
        scores.close()
        parts = [job.folder.publish(scratch / "scores", f"scores/part-{name}.parquet")]
        for kind, table in (("counts", summary.counts()), ("outliers", summary.outliers())):
            write_table(table, scratch / kind)
            parts.append(job.folder.publish(scratch / kind, f"shards/{name}.{kind}.parquet"))
    records = [document.record for document in documents]
    Receipt(
        shard=shard,
        parts=tuple(parts),
        documents=len(records),
        failed=0,
        tokens=sum(record.num_tokens_scored for record in records),
        bytes=sum(record.num_bytes for record in records),
        loglikelihood=sum(record.loglikelihood or 0.0 for record in records),
        seconds=60.0,
        device=prepared.described["device"],
        versions=prepared.described["versions"],
    ).write(job.folder)


# ---- a run that Prefect knows of


def measure_flows(out: str, numbers: Sequence[int]) -> list[dict[str, str]]:
    """Cells of a column for each number of shards, scored one run after another."""
    # Set before Prefect is imported, which reads its settings once.
    os.environ["PREFECT_HOME"] = str(home := Path(out, "prefect").absolute())
    os.environ.pop("PREFECT_API_URL", None)
    from logitmill.flows import score_corpus
    from logitmill.flows.server import start_server

    server = start_server()
    assert server is not None
    pid = server._process.pid
    columns = []
    # The first is warming up.
    for count in [10, *numbers]:
        lines = Path(out, f"{count}.jsonl")
        text = [
            json.dumps({"text": f"document {n:06d} of few tokens"}) + "\n" for n in range(count)
        ]
        lines.write_text("".join(text))
        before, meter = (cpu_seconds(pid), database_bytes(home)), Meter()
        with meter.measure("in the flow's process"):
            score_corpus(
                model=str(MODEL),
                corpus=CorpusSpec(uri=str(lines), shard_bytes=len(text[0])),
                out=str(Path(out, "runs")),
            )
        seconds = wait_until_idle(pid) - before[0]
        meter.cells["the server's CPU"] = f"{seconds:.1f} s"
        meter.note("the server's memory", memory("VmRSS", pid))
        meter.note("the server's database", database_bytes(home) - before[1])
        meter.note("the flow's process, after it", memory("VmRSS"))
        columns.append(meter.cells)
    return columns[1:]


def database_bytes(home: Path) -> int:
    """Of SQLite's files."""
    return sum(file.stat().st_size for file in home.glob("prefect.db*"))


def cpu_seconds(pid: int) -> float:
    """That a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def wait_until_idle(pid: int) -> float:
    """Return once a process has done its work: the CPU seconds of it, idling left out."""
    while True:
        before = cpu_seconds(pid)
        time.sleep(_IDLE_SECONDS)
        if cpu_seconds(pid) - before < _IDLE_SHARE * _IDLE_SECONDS:
            return before


if __name__ == "__main__":
    main()
