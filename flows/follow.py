"""Follows a run that somebody else is at work on, by what it leaves in storage and nothing else.

Receipts say what is done, and the times that storage gives them say how fast. No server is asked,
and the run is not touched.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from .folder import Folder, StoreError
from .progress import counted
from .run import find_runs, no_run, several_runs
from .store import MANIFEST, PLAN, Receipt

_READERS = 16
# Seconds from one look to the next: soon after there was something new, seldom while there is not.
_SOON, _SELDOM, _SLOWER = 1.0, 30.0, 1.5
# What speed is told from: the receipts of the last so many seconds, and as many at least.
_RECENT_SECONDS, _LEAST_RECEIPTS = 600.0, 2
# What passes for silence.
_QUIET_SECONDS = 60.0
# Keys under which file systems say when a file was written.
_TIMES = ("LastModified", "mtime", "last_modified", "updated")


@dataclass(frozen=True)
class Followed:
    """How far a run is, as its folder tells."""

    shards: int
    num_shards: int
    fraction: float
    """Of the corpus's bytes."""
    documents: int
    failed: int
    tokens: int
    tokens_per_second: float | None
    """Of all who are at work, over the last minutes of work; None before the first receipt."""
    seconds_left: float | None
    seconds_idle: float
    """Since the last receipt."""
    complete: bool
    """Whether the manifest stands."""

    def __str__(self) -> str:
        rate, left, idle = self.tokens_per_second, self.seconds_left, self.seconds_idle
        speed = f"  {rate:,.0f} tokens/s" if rate is not None else ""
        ahead = (
            f", {timedelta(seconds=round(left))} left"
            if left is not None and not self.complete
            else ""
        )
        quiet = (
            f", nothing new for {timedelta(seconds=round(idle))}"
            if idle > _QUIET_SECONDS and not self.complete
            else ""
        )
        failed = f" ({self.failed:,} failed)" if self.failed else ""
        return (
            f"{self.fraction:4.0%}  {self.shards:,} of {counted(self.num_shards, 'shard')}  "
            f"{counted(self.documents, 'document')}{failed}  {counted(self.tokens, 'token')}"
            f"{speed}{ahead}{quiet}"
        )


def find_followed(uri: str, storage_options: Mapping[str, Any] | None = None) -> Folder:
    """The run at `uri`, or the one below it that is not complete; if all are, the only one.

    Raises:
        ValueError: if there is none, or it is not clear which is meant.
    """
    folder = Folder(uri, storage_options, field="run")
    found = find_runs(folder)
    if not found:
        raise no_run(folder)
    if len(found) > 1:
        found = [run for run in found if run.size(MANIFEST) is None] or found
    if len(found) > 1:
        raise several_runs(folder, found)
    return found[0]


def follow_run(
    folder: Folder, *, wait: Callable[[float], None] = time.sleep, soon: float = _SOON
) -> Iterator[Followed]:
    """How far the run is, again and again until its manifest stands.

    A look is one listing, and one read for every receipt that is new. They follow each other
    within `soon` seconds where something changes, and ever slower, up to half a minute, where
    nothing does.

    Raises:
        ValueError: if the folder's run is removed.
    """
    follower = _Follower(folder)
    seconds = soon
    while True:
        news, seen = follower.look()
        yield seen
        if seen.complete:
            return
        seconds = soon if news else min(seconds * _SLOWER, max(_SELDOM, soon))
        wait(seconds)


@dataclass(frozen=True)
class _Done:
    """A shard that is done."""

    receipt: Receipt
    at: float
    """When its receipt was written, seconds since 1970 by the storage's clock."""

    @property
    def began(self) -> float:
        return self.at - self.receipt.seconds


class _Follower:
    """Keeps the receipts that it has read."""

    def __init__(self, folder: Folder) -> None:
        self._folder = folder
        plan = folder.read_json(PLAN)
        if plan is None:
            raise no_run(folder)
        self._bytes = [shard["num_bytes"] for shard in plan["corpus"]["shards"]]
        self._done: dict[int, _Done] = {}
        self._newest = time.monotonic()

    def look(self) -> tuple[bool, Followed]:
        """Whether there is something new, and how far the run is."""
        # First: what stands then has all of its receipts, which are read after.
        complete = self._folder.size(MANIFEST) is not None
        news = self._read_new()
        if not news and self._folder.size(PLAN) is None:
            raise StoreError(f"run: {self._folder.uri!r} is gone")
        done, receipts = self._done, [d.receipt for d in self._done.values()]
        num_bytes, total = sum(self._bytes[i] for i in done), sum(self._bytes)
        rates = self._measure()
        return news, Followed(
            shards=len(done),
            num_shards=len(self._bytes),
            fraction=num_bytes / total if total else 1.0,
            documents=sum(r.documents for r in receipts),
            failed=sum(r.failed for r in receipts),
            tokens=sum(r.tokens for r in receipts),
            tokens_per_second=rates[0] if rates else None,
            seconds_left=(total - num_bytes) / rates[1] if rates and rates[1] else None,
            seconds_idle=time.monotonic() - self._newest,
            complete=complete,
        )

    def _read_new(self) -> bool:
        names = {Receipt.name(shard): shard for shard in range(len(self._bytes))}
        new = {
            names[name]: at
            for name, at in _times(self._folder, "shards").items()
            if name in names and names[name] not in self._done
        }
        with ThreadPoolExecutor(_READERS) as pool:
            read = pool.map(lambda shard: Receipt.read(self._folder, shard), new)
            found = {r.shard: _Done(r, new[r.shard]) for r in read if r is not None}
        if found:
            self._newest = time.monotonic()
        is_first = not self._done
        self._done |= found
        if found and is_first:
            # What was there before the first look is as old as the storage says.
            self._newest -= max(0.0, time.time() - max(d.at for d in found.values()))
        return bool(found)

    def _measure(self) -> tuple[float, float] | None:
        """Tokens and bytes of the corpus a second, over the last receipts; None without any."""
        done = sorted(self._done.values(), key=lambda d: d.at)
        if not done:
            return None
        recent = [d for d in done if d.at > done[-1].at - _RECENT_SECONDS]
        recent = recent if len(recent) >= _LEAST_RECEIPTS else done[-_LEAST_RECEIPTS:]
        # All who are at work together: from the first that began to the last that was done.
        seconds = recent[-1].at - min(d.began for d in recent)
        if seconds <= 0:
            return None
        return (
            sum(d.receipt.tokens for d in recent) / seconds,
            sum(self._bytes[d.receipt.shard] for d in recent) / seconds,
        )


def _times(folder: Folder, name: str) -> dict[str, float]:
    """When the files directly in a folder were written, by name; now where nobody says."""
    try:
        entries = folder.filesystem.ls(folder.path(name), detail=True)
    except (FileNotFoundError, NotADirectoryError):
        return {}
    return {
        f"{name}/{entry['name'].rstrip('/').rsplit('/', 1)[-1]}": _time_of(entry)
        for entry in entries
        if entry["type"] == "file"
    }


def _time_of(entry: Mapping[str, Any]) -> float:
    said = next((entry[key] for key in _TIMES if entry.get(key) is not None), None)
    if isinstance(said, str):
        said = datetime.fromisoformat(said)
    if isinstance(said, datetime):
        return said.timestamp()
    return float(said) if said is not None else time.time()
