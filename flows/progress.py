"""What a person who waits gets to see: a bar or lines in the terminal, an artifact in the UI."""

from __future__ import annotations

import contextvars
import logging
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Protocol
from uuid import UUID

_TICK_SECONDS = 0.2


@dataclass
class Tally:
    """What the tasks of this process have done so far. Safe to use from several threads."""

    started: float = field(default_factory=time.monotonic)
    documents: int = 0
    bytes: int = 0
    tokens: int = 0
    first_score: float | None = None
    """Seconds from `started` to the first scored document."""
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    def reset(self) -> None:
        """Begin again at nothing, from now."""
        with self._lock:
            self.started = time.monotonic()
            self.documents = self.bytes = self.tokens = 0
            self.first_score = None

    def add_batch(self, tokens: int, num_bytes: int) -> None:
        """Count scored tokens and their bytes, whose documents may not be done yet."""
        with self._lock:
            self.tokens += tokens
            self.bytes += num_bytes

    def add_document(self, *, scored: bool) -> None:
        """Count one more document."""
        with self._lock:
            self.documents += 1
            if self.first_score is None and scored:
                self.first_score = time.monotonic() - self.started

    @contextmanager
    def attempt(self) -> Iterator[None]:
        """A task: what it counted is taken back if it fails, for it will be counted again."""
        before = replace(self)
        try:
            yield
        except BaseException:
            with self._lock:
                self.documents, self.bytes = before.documents, before.bytes
                self.tokens = before.tokens
            raise


TALLY = Tally()
"""Of the run that this process is at work on."""


@dataclass(frozen=True)
class Seen:
    """How far a run is."""

    fraction: float
    documents: int
    """Of the run, whoever scored them."""
    tokens_per_second: float
    """Of this process."""
    seconds_left: float | None
    """None while there is nothing to tell it from."""

    def __str__(self) -> str:
        left = f", {_clock(self.seconds_left)} left" if self.seconds_left is not None else ""
        return (
            f"{self.fraction:4.0%}  {counted(self.documents, 'document')}  "
            f"{self.tokens_per_second:,.0f} tokens/s{left}"
        )


class Display(Protocol):
    """One place where progress shows."""

    seconds: float
    """From one look to the next."""

    def show(self, seen: Seen) -> None:
        """Show how far the run is."""


@contextmanager
def show_progress(
    total_bytes: int,
    done_bytes: int,
    done_documents: int,
    log: logging.LoggerAdapter[Any] | logging.Logger,
) -> Iterator[None]:
    """Show the tally's way to `total_bytes` for as long as the block runs.

    What is `done` was done before this process took the run up. On a terminal it shows as a bar,
    elsewhere as lines in `log`; and as an artifact of the flow run that the block is in.
    """
    began, at_first = time.monotonic(), replace(TALLY)

    def look() -> Seen:
        seconds = time.monotonic() - began
        new_bytes = TALLY.bytes - at_first.bytes
        done = min(done_bytes + new_bytes, total_bytes)
        return Seen(
            fraction=done / total_bytes if total_bytes else 1.0,
            documents=done_documents + TALLY.documents - at_first.documents,
            tokens_per_second=(TALLY.tokens - at_first.tokens) / seconds if seconds else 0.0,
            seconds_left=(total_bytes - done) * seconds / new_bytes if new_bytes > 0 else None,
        )

    with ExitStack() as stack:
        in_terminal: Display = stack.enter_context(_bar()) if sys.stderr.isatty() else _Lines(log)
        for display in (in_terminal, _Artifact()):
            stack.enter_context(_repeat(display, look))
        yield


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
