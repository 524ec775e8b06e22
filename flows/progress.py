"""What a person who waits gets to see: a bar or lines in the terminal, an artifact in the UI."""

from __future__ import annotations

import contextvars
import logging
import sys
import threading
import time
from collections import deque
from collections.abc import Hashable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol
from uuid import UUID

from . import metrics

_TICK_SECONDS = 0.2
# What a device's share is told from: so many seconds, and so many at least.
_RECENT_SECONDS, _LEAST_SECONDS = 30.0, 2.0


@dataclass
class Count:
    """What has been done of a shard, or of a run."""

    documents: int = 0
    bytes: int = 0
    tokens: int = 0
    """Scored; their documents may not be done yet."""
    device_seconds: float = 0.0
    """That a device was at work on them."""

    def add(self, other: Count) -> None:
        """Add what another one counted."""
        self.documents += other.documents
        self.bytes += other.bytes
        self.tokens += other.tokens
        self.device_seconds += other.device_seconds


class Attempt:
    """A task at work on a shard. What it counted is taken back if it fails: it is done again."""

    def __init__(self, tally: Tally, count: Count) -> None:
        self._tally = tally
        self._count = count

    def add_batch(self, tokens: int, num_bytes: int, device_seconds: float) -> None:
        """Count scored tokens, their bytes, and how long a device was at work on them."""
        with self._tally.lock:
            self._count.tokens += tokens
            self._count.bytes += num_bytes
            self._count.device_seconds += device_seconds

    def add_document(self, *, scored: bool) -> None:
        """Count one more document."""
        with self._tally.lock:
            self._count.documents += 1
            self._tally.note_first(scored)


class Tally:
    """What this process, and those that report to it, have done. Safe to use from threads."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.reset()

    def reset(self) -> None:
        """Begin again at nothing, from now."""
        with self.lock:
            self.started = time.monotonic()
            self.first_score: float | None = None
            """Seconds from `started` to the first scored document."""
            self._done = Count()
            self._running: dict[Hashable, Count] = {}

    def total(self) -> Count:
        """All of it, shards in hand included."""
        with self.lock:
            total = replace(self._done)
            for count in self._running.values():
                total.add(count)
            return total

    def running(self) -> dict[Hashable, Count]:
        """What is done of the shards in hand."""
        with self.lock:
            return {shard: replace(count) for shard, count in self._running.items()}

    @contextmanager
    def attempt(self, shard: Hashable) -> Iterator[Attempt]:
        """A task of this process."""
        count = Count()
        with self.lock:
            self._running[shard] = count
        try:
            yield Attempt(self, count)
        except BaseException:
            self.drop(shard)
            raise
        self.finish(shard, count)

    def report(self, shard: Hashable, count: Count) -> bool:
        """What another process has done of a shard so far; whether that is news."""
        with self.lock:
            is_news = self._running.get(shard) != count
            self._running[shard] = count
            self.note_first(count.documents > 0)
            return is_news

    def finish(self, shard: Hashable, count: Count) -> None:
        """A shard is done, and this is what it held."""
        with self.lock:
            self._running.pop(shard, None)
            self._done.add(count)

    def drop(self, shard: Hashable) -> None:
        """A shard was lost, with all that was done of it."""
        with self.lock:
            self._running.pop(shard, None)

    def note_first(self, scored: bool) -> None:
        """Note the time of the first score. The lock is held by the caller."""
        if self.first_score is None and scored:
            self.first_score = time.monotonic() - self.started


TALLY = Tally()
"""Of the run that this process is at work on."""


@dataclass(frozen=True)
class Seen:
    """How far a run is."""

    fraction: float
    shards: int
    num_shards: int
    documents: int
    """Of the run, whoever scored them."""
    workers: int
    tokens_per_second: float
    """Of this run of the flow."""
    busy: float | None
    """Share of the last half minute that the workers' devices were at work; None at first."""
    seconds_left: float | None
    """None while there is nothing to tell it from."""

    def __str__(self) -> str:
        left = f", {_clock(self.seconds_left)} left" if self.seconds_left is not None else ""
        each = ""
        if self.workers != 1:
            rate = self.tokens_per_second / self.workers if self.workers else 0.0
            each = f" on {counted(self.workers, 'worker')}, {rate:,.0f} each"
        busy = f", {self.busy:.0%} busy" if self.busy is not None else ""
        return (
            f"{self.fraction:4.0%}  {self.shards:,} of {counted(self.num_shards, 'shard')}  "
            f"{counted(self.documents, 'document')}  "
            f"{self.tokens_per_second:,.0f} tokens/s{each}{busy}{left}"
        )


class Display(Protocol):
    """One place where progress shows."""

    seconds: float
    """From one look to the next."""

    def show(self, seen: Seen) -> None:
        """Show how far the run is."""


@dataclass
class Done:
    """How far a run is whose shards are finished one after another."""

    num_shards: int
    total_bytes: int
    shards: int
    bytes: int
    documents: int
    workers: int = 1
    """Processes at work."""

    def note_workers(self, count: int) -> None:
        """There are so many now."""
        self.workers = count


@contextmanager
def show_progress(done: Done, log: logging.LoggerAdapter[Any] | logging.Logger) -> Iterator[None]:
    """Show the tally's way to the end of a run for as long as the block runs.

    `done` holds what was done before this process took the run up; the block counts its shards on
    and keeps its workers. On a terminal it shows as a bar, elsewhere as lines in `log`; and as an
    artifact of the flow run that the block is in.
    """
    began, at_first = time.monotonic(), TALLY.total()
    first_bytes, first_documents = done.bytes, done.documents

    recent = _Recent(_RECENT_SECONDS)

    def look() -> Seen:
        seconds = time.monotonic() - began
        now = TALLY.total()
        new_bytes = now.bytes - at_first.bytes
        bytes_done = min(first_bytes + new_bytes, done.total_bytes)
        left = (done.total_bytes - bytes_done) * seconds / new_bytes if new_bytes > 0 else None
        return Seen(
            fraction=bytes_done / done.total_bytes if done.total_bytes else 1.0,
            shards=done.shards,
            num_shards=done.num_shards,
            documents=first_documents + now.documents - at_first.documents,
            workers=done.workers,
            tokens_per_second=(now.tokens - at_first.tokens) / seconds if seconds else 0.0,
            busy=recent.share(seconds, now.device_seconds, done.workers),
            seconds_left=left,
        )

    with ExitStack() as stack:
        in_terminal: Display = stack.enter_context(_bar()) if sys.stderr.isatty() else _Lines(log)
        for display in (in_terminal, _Artifact(), _Gauges()):
            stack.enter_context(_repeat(display, look))
        yield


class _Recent:
    """How busy devices were lately."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._looks: deque[tuple[float, float]] = deque()
        self._lock = threading.Lock()

    def share(self, now: float, device_seconds: float, workers: int) -> float | None:
        """Of the time of so many workers, 0 to 1; None until their first batch is done."""
        with self._lock:
            if not device_seconds:
                return None
            self._looks.append((now, device_seconds))
            # One that is older is kept, so that what is between covers all of the time.
            while len(self._looks) > 2 and self._looks[1][0] < now - self._seconds:
                self._looks.popleft()
            past, seconds = self._looks[0]
        if now - past < _LEAST_SECONDS or not workers:
            return None
        # A shard that is lost takes what it counted with it.
        return min(1.0, max(0.0, device_seconds - seconds) / (now - past) / workers)


@contextmanager
def _repeat(display: Display, look: Any) -> Iterator[None]:
    """Show what there is to see every so often, and once more when the block ends."""
    stop = threading.Event()

    def tick() -> None:
        while not stop.wait(display.seconds):
            display.show(look())

    # The thread's artifacts belong to the flow run of this one.
    thread = threading.Thread(target=contextvars.copy_context().run, args=(tick,), daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        if not isinstance(display, _Lines):
            display.show(look())


@dataclass
class _Lines:
    log: logging.LoggerAdapter[Any] | logging.Logger
    seconds: float = 10.0

    def show(self, seen: Seen) -> None:
        self.log.info("scoring %s", seen)


class _Artifact:
    """The progress artifact of a flow run. A server that does not answer stops no run."""

    seconds = 3.0

    def __init__(self) -> None:
        self._id: UUID | None = None

    def show(self, seen: Seen) -> None:
        from prefect.artifacts import create_progress_artifact, update_progress_artifact

        percent = round(100 * seen.fraction, 1)
        try:
            if self._id is None:
                self._id = create_progress_artifact(
                    percent, key="progress", description="Bytes of the corpus that are scored"
                )  # type: ignore[assignment]
            else:
                update_progress_artifact(self._id, progress=percent)
        except Exception:
            logging.getLogger(__name__).debug("no progress artifact", exc_info=True)


class _Gauges:
    """The metrics of this process."""

    seconds = 5.0

    def show(self, seen: Seen) -> None:
        metrics.record_progress(seen)


@contextmanager
def _bar() -> Iterator[Display]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    columns = (TextColumn("scoring"), BarColumn(), TextColumn("{task.fields[seen]}"))
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=1.0, seen="")

        class Bar:
            seconds = _TICK_SECONDS

            def show(self, seen: Seen) -> None:
                progress.update(task, completed=seen.fraction, seen=str(seen))

        yield Bar()


def counted(number: int, noun: str) -> str:
    """A number of things, for people: "1 document", "2,000 documents"."""
    return f"{number:,} {noun}{'s' if number != 1 else ''}"


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
