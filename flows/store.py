"""What a run leaves behind: the layout of its folder, and the receipts of its shards.

    <root>/<run key>/
      plan.json                      what is scored and how
      scores/part-00017.parquet      document records; tokens/ topk/ sampled/ lens/ hidden/
                                     logits/ on request
      shards/00017.json              receipt: the shard's parts with size and sha256
      shards/00017.counts.parquet    the shard's additive tables, also of its outliers and, on
                                     request, of its vocabulary
      summary/*.parquet              the run's tables: the shards' merged
      report.html
      manifest.json                  written last: the run is complete, and this is all of it

Readers believe receipts only. A part's name and bytes follow from the plan, so a task that dies
and starts again, or runs twice, overwrites a part with itself.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

from ..engine.remote import Stat
from .folder import Folder, Part

PLAN, MANIFEST, REPORT = "plan.json", "manifest.json", "report.html"
_READERS = 16


@dataclass(frozen=True)
class Receipt:
    """That a shard is done: written once all its parts are in place."""

    shard: int
    parts: tuple[Part, ...]
    documents: int
    failed: int
    """Documents whose status is not ok."""
    tokens: int
    """Scored tokens."""
    bytes: int
    """UTF-8 bytes of the scored tokens."""
    loglikelihood: float
    """Sum over the scored documents, nats."""
    seconds: float
    """That the engine had the shard; where two overlap, the later one's begin with the end of the
    other."""
    device: str
    versions: Mapping[str, str]
    device_seconds: float = 0.0
    """That the device was at work meanwhile, also on the last batches of the shard before."""
    attempt: int | None = None
    """Which attempt of its flow run at the shard wrote this, from 1: those before it failed, or
    were lost with their worker. None where that is not known."""

    @staticmethod
    def name(shard: int) -> str:
        """Where the receipt of a shard lies."""
        return f"shards/{shard:05d}.json"

    def write(self, folder: Folder) -> None:
        """Put the receipt in place."""
        folder.write_json(self.name(self.shard), asdict(self))

    @classmethod
    def read(cls, folder: Folder, shard: int) -> Receipt | None:
        """The receipt of a shard, None if there is no whole one."""
        value = folder.read_json(cls.name(shard))
        try:
            return cls.from_dict(value) if value is not None else None
        except (KeyError, TypeError):
            return None

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Receipt:
        """The receipt that `asdict` was called on."""
        parts = tuple(Part(**part) for part in value["parts"])
        return cls(**{**value, "parts": parts})


def find_receipts(folder: Folder, num_shards: int) -> dict[int, Receipt]:
    """Receipts that check out, by shard in order: their parts are there in the stated sizes.

    A receipt is read once in a process, and again only if it is not the file that it was.
    """
    there = folder.stats("shards")
    wanted = [shard for shard in range(num_shards) if Receipt.name(shard) in there]
    stats = {shard: there[Receipt.name(shard)] for shard in wanted}
    known = _known(folder.uri)
    new = [n for n in wanted if n not in known or known[n][0] != stats[n]]
    with ThreadPoolExecutor(_READERS) as pool:
        read = dict(zip(new, pool.map(lambda n: Receipt.read(folder, n), new), strict=True))
    # As they were listed: one that has been written since is read the next time.
    known |= {n: (stats[n], receipt) for n, receipt in read.items() if _tells(stats[n])}
    found = (read[n] if n in read else known[n][1] for n in wanted)
    receipts = [receipt for receipt in found if receipt is not None]
    # A listing a folder, where asking for every part would be a round trip each.
    sizes = {name: stat.size for name, stat in there.items()}
    folders = {part.name.rsplit("/", 1)[0] for r in receipts for part in r.parts} - {"shards"}
    for name in sorted(folders):
        sizes |= folder.sizes(name)
    return {
        receipt.shard: receipt
        for receipt in receipts
        if all(sizes.get(part.name) == part.bytes for part in receipt.parts)
    }


@lru_cache(maxsize=2)
def _known(uri: str) -> dict[int, tuple[Stat, Receipt | None]]:
    """What this process has read of a run, by shard: what its file was listed as, what it held."""
    return {}


def _tells(stat: Stat) -> bool:
    """Whether another file of this name would be listed otherwise."""
    return bool(stat.etag or stat.stamp)


def hash_json(value: Any) -> str:
    """sha256 of a value's canonical JSON."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()
