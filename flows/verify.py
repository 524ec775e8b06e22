"""Holds a run to its receipts: every byte, every row and every sum of what lies in its folder.

What the receipts cannot tell, whether the numbers are the model's, is `rescore`'s. Knows nothing
of models.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from .contents import BLOCK, TOTALS, Finding, hold_rows, open_part
from .corpus.locations import is_garbled
from .folder import Folder, Part, StoreError, endpoint_options, one_line
from .publish import find_merges, read_table, read_tables
from .run import Run, open_run
from .scratch import TEMPORARY, find_live
from .store import MANIFEST, PLAN, REPORT, Receipt

if TYPE_CHECKING:
    from ..engine.pipeline import EngineSettings

SAMPLE = 8
"""Documents that are scored again, unless it is said otherwise."""
_READERS = 8

Said = Callable[[str], None]
"""Told in a line what was done."""
Progress = Callable[[int, int], None]
"""Told how many bytes of how many are read; from several threads."""


def verify_run(
    run: Run | str,
    *,
    sample: int = SAMPLE,
    seed: int = 0,
    engine: EngineSettings | None = None,
    endpoint_url: str | None = None,
    on_line: Said = lambda line: None,
    on_progress: Progress = lambda done, total: None,
) -> list[Finding]:
    """Check a run, complete or not, against its receipts, and score a few documents again.

    Every part that a receipt names is read whole and hashed; rows, sums, summaries and manifest are
    held to each other, and what no receipt names is reported. Then documents spread over the run
    are scored again and compared bit for bit, or within `rescore`'s tolerance where device or
    software are not those that the run was made with.

    Args:
        run: a run, or the URI of one.
        sample: documents to score again; 0 leaves that out.
        seed: which documents these are.
        engine: where and in what room they are scored; what decides the numbers is the plan's.
        endpoint_url: the S3 server to use where it is not Amazon's.
        on_line: is told what was compared, and how.
        on_progress: is told how far the reading is.

    Returns:
        What does not hold, also what could not be checked; empty if all does.

    Raises:
        ValueError: if there is no such run, or for a negative sample.
    """
    if sample < 0:
        raise ValueError(f"sample: {sample} is not a number of documents; 0 scores none again")
    if isinstance(run, str):
        options = endpoint_options(run, endpoint_url)
        run = open_run(run, partial=True, storage_options=options)
    stored = _Stored(run)
    findings = stored.check(on_progress)
    num_done, num_shards = len(stored.receipts), len(stored.shards)
    on_line(
        f"read {stored.num_bytes:,} bytes in {stored.num_parts:,} files of {num_done:,} of "
        f"{num_shards:,} shards"
    )
    if sample:
        from .rescore import rescore

        whole = [stored.receipts[i] for i in sorted(stored.receipts) if i not in stored.damaged]
        findings += rescore(
            run,
            whole,
            sample=sample,
            seed=seed,
            engine=engine,
            endpoint_url=endpoint_url,
            on_line=on_line,
        )
    return findings


class _Stored:
    """What lies in a run's folder, and what its receipts say of it."""

    def __init__(self, run: Run) -> None:
        self._folder, self._plan = run.folder, run.plan
        self._merges = find_merges(run.plan)
        self.shards: list[dict[str, Any]] = run.plan["corpus"]["shards"]
        self._manifest = run.manifest
        self._there = _list_files(run.folder)
        self.receipts: dict[int, Receipt] = {}
        """By shard, those that can be read."""
        self.damaged: set[int] = set()
        """Shards whose parts are not what their receipt says."""
        self.num_parts = self.num_bytes = 0
        """What was read."""

    def check(self, on_progress: Progress) -> list[Finding]:
        """All that does not hold."""
        findings = list(self._read_receipts())
        found = list(self.receipts.values())
        total = sum(part.bytes for receipt in found for part in receipt.parts)
        lock = threading.Lock()

        def count(num_bytes: int) -> None:
            with lock:
                self.num_bytes += num_bytes
                on_progress(self.num_bytes, total)

        with ThreadPoolExecutor(_READERS) as pool:
            for receipt, in_shard in zip(
                found, pool.map(partial(self._check_shard, count=count), found), strict=True
            ):
                self.num_parts += len(receipt.parts)
                findings += in_shard
                if in_shard:
                    self.damaged.add(receipt.shard)
        findings += self._check_manifest()
        findings += self._find_leftovers()
        return findings

    def _read_receipts(self) -> Iterator[Finding]:
        names = {Receipt.name(shard): shard for shard in range(len(self.shards))}
        there = [name for name in names if name in self._there]
        with ThreadPoolExecutor(_READERS) as pool:
            read = pool.map(lambda name: Receipt.read(self._folder, names[name]), there)
            for name, receipt in zip(there, read, strict=True):
                if receipt is None:
                    yield Finding(name, "it is no whole receipt")
                elif receipt.shard != names[name]:
                    yield Finding(name, f"it is the receipt of shard {receipt.shard}")
                else:
                    self.receipts[receipt.shard] = receipt
        if self._manifest is not None:
            for name in sorted(names.keys() - set(there)):
                yield Finding(name, "it is missing, and the manifest says that the run is complete")

    def _check_shard(self, receipt: Receipt, count: Callable[[int], None]) -> list[Finding]:
        named = {part.name for part in receipt.parts}
        wanted = set(self._part_names(receipt.shard))
        if named != wanted:
            differ = ", ".join(sorted(named ^ wanted))
            return [
                Finding(
                    Receipt.name(receipt.shard), f"it names other parts than its shard's: {differ}"
                )
            ]
        damage = [f for part in receipt.parts if (f := self._check_part(part, count))]
        # Rows of what is not the receipt's say nothing of it.
        return damage or self._check_rows(receipt)

    def _check_part(self, part: Part, count: Callable[[int], None]) -> Finding | None:
        """Whether a part is there in its size and sha256; it is read in blocks."""
        size = self._there.get(part.name)
        if size is None:
            # It may have come since the folder was listed.
            size = self._folder.size(part.name)
        if size is None:
            return Finding(part.name, "it is missing")
        if size != part.bytes:
            return Finding(part.name, f"it has {size:,} bytes, its receipt says {part.bytes:,}")
        digest = hashlib.sha256()
        for block in _blocks(self._folder, part):
            digest.update(block)
            count(len(block))
        if digest.hexdigest() != part.sha256:
            return Finding(
                part.name,
                f"its sha256 is {digest.hexdigest()[:16]}..., its receipt says "
                f"{part.sha256[:16]}...",
            )
        return None

    def _check_rows(self, receipt: Receipt) -> list[Finding]:
        name = f"shard {receipt.shard}"
        try:
            return list(hold_rows(self._folder, self._plan, receipt, self.shards))
        except (KeyError, StoreError, pa.ArrowException, OSError) as error:
            if isinstance(error, StoreError):
                return [Finding(name, str(error))]
            if isinstance(error, KeyError):
                return [Finding(name, f"its tables have no column {error}")]
            if not is_garbled(error):
                raise
            return [Finding(name, f"its tables cannot be read: {one_line(error)}")]

    def _check_manifest(self) -> Iterator[Finding]:
        manifest = self._manifest
        if manifest is None:
            if MANIFEST in self._there:
                yield Finding(MANIFEST, "it is no whole JSON object")
            return
        for name in ("run_key", "recipe_hash", "tiers", "model", "engine"):
            if manifest.get(name) != self._plan[name]:
                yield Finding(MANIFEST, f"its {name} is not the plan's")
        receipts = [self.receipts[shard] for shard in sorted(self.receipts)]
        stated = {(p["shard"], p["name"]): (p["bytes"], p["sha256"]) for p in manifest["parts"]}
        held = {(r.shard, p.name): (p.bytes, p.sha256) for r in receipts for p in r.parts}
        if len(stated) != len(manifest["parts"]):
            yield Finding(MANIFEST, "it names a part twice")
        for shard, name in sorted(stated.keys() | held.keys()):
            ours, theirs = stated.get((shard, name)), held.get((shard, name))
            if ours is None:
                yield Finding(
                    MANIFEST, f"it misses {name}, which the receipt of shard {shard} names"
                )
            elif theirs is None:
                yield Finding(MANIFEST, f"it names {name}, which no receipt of shard {shard} does")
            elif ours != theirs:
                yield Finding(MANIFEST, f"it has another size or sha256 of {name} than its receipt")
        for total in TOTALS:
            added = sum(getattr(receipt, total) for receipt in receipts)
            if manifest[total] != added:
                yield Finding(
                    MANIFEST, f"it says {manifest[total]:,} {total}, the receipts {added:,}"
                )
        summaries = [Part(**part) for part in manifest["summaries"]]
        damage = [f for part in summaries if (f := self._check_part(part, lambda _: None))]
        yield from damage
        if REPORT not in self._there:
            yield Finding(REPORT, "it is missing")
        # Only of whole shards can it be told what their tables add up to.
        if not damage and not self.damaged and len(receipts) == len(self.shards):
            yield from self._check_summaries(receipts)

    def _check_summaries(self, receipts: Sequence[Receipt]) -> Iterator[Finding]:
        for name, merge in self._merges.items():
            merged = merge(read_tables(self._folder, name, receipts))
            whole = f"summary/{name}.parquet"
            stored = read_table(self._folder, whole)
            # A run of an earlier version may have fewer columns.
            if not merged.select(stored.column_names).equals(stored):
                yield Finding(whole, "it is not what the tables of the shards add up to")

    def _find_leftovers(self) -> Iterator[Finding]:
        """Files that nothing of the run names, and uploads that nobody finished."""
        named = {PLAN, MANIFEST, REPORT}
        named |= {f"summary/{name}.parquet" for name in self._merges}
        named |= {name for r in self.receipts.values() for name in self._names(r.shard)}
        if self._manifest is None:
            # Where a shard is not done, somebody may be at work, and a rerun writes over it.
            named |= {name for i in range(len(self.shards)) for name in self._names(i)}
        else:
            named |= {Receipt.name(shard) for shard in range(len(self.shards))}
        for name in sorted(self._there.keys() - named):
            if self._manifest is None and name.startswith(TEMPORARY):
                # The next start removes them.
                continue
            yield Finding(name, f"nothing names it: {self._there[name]:,} bytes left over")
        if self._manifest is not None:
            for name, begun in _list_uploads(self._folder):
                yield Finding(name, f"an upload of {begun} that was never finished is left over")

    def _names(self, shard: int) -> list[str]:
        return [Receipt.name(shard), *self._part_names(shard)]

    def _part_names(self, shard: int) -> list[str]:
        tables = [f"shards/{shard:05d}.{name}.parquet" for name in self._merges]
        return [*(f"{tier}/part-{shard:05d}.parquet" for tier in self._plan["tiers"]), *tables]


def _blocks(folder: Folder, part: Part) -> Iterator[bytes]:
    """A part's bytes; those of a small one in one request."""
    if part.bytes <= BLOCK:
        yield folder.read(part.name) or b""
        return
    with open_part(folder, part.name) as file:
        while block := file.read(BLOCK):
            yield block


def _list_files(folder: Folder) -> dict[str, int]:
    """All files of a folder with their sizes in bytes, without those that somebody is writing."""
    root = folder.path("")
    listed = folder.filesystem.find(root, detail=True)
    files = {str(path)[len(root) :]: int(info["size"]) for path, info in listed.items()}
    if not folder.is_local:
        return files
    busy = find_live(Path(root))
    return {name: size for name, size in files.items() if name.split("/")[0] not in busy}


def _list_uploads(folder: Folder) -> list[tuple[str, str]]:
    """(file, when it was begun) of uploads in parts to the folder that have not been finished."""
    root = folder.path("").partition("/")[2]
    # Not every server lists them, nor may everybody ask.
    with suppress(OSError, NotImplementedError):
        return [(u["Key"][len(root) :], str(u["Initiated"])) for u in folder.list_uploads()]
    return []
