"""What a person who waits gets to see: counts from the tasks, a bar in the terminal."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass
class Tally:
    """What the tasks of this process have done so far. Safe to use from several threads."""

    started: float = field(default_factory=time.monotonic)
    documents: int = 0
    bytes: int = 0
    tokens: int = 0
    first_score: float | None = None
    """Seconds from `started` to the first scored document."""
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def reset(self) -> None:
        """Begin again at nothing, from now."""
        with self._lock:
            self.started = time.monotonic()
            self.documents = self.bytes = self.tokens = 0
            self.first_score = None

    def add(self, *, num_bytes: int, tokens: int) -> None:
        """Count one more document."""
        with self._lock:
            self.documents += 1
            self.bytes += num_bytes
            self.tokens += tokens
            if self.first_score is None and tokens:
                self.first_score = time.monotonic() - self.started


TALLY = Tally()
"""Of the run that this process is at work on."""


@contextmanager
def show_progress(total_bytes: int, done_bytes: int) -> Iterator[None]:
    """A bar on the terminal for as long as the block runs; nothing where stderr is no terminal."""
    if not sys.stderr.isatty():
        yield
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("scoring"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        TextColumn("{task.fields[documents]:,} documents  {task.fields[rate]:,.0f} tokens/s"),
        TimeRemainingColumn(),
    )
    stop = threading.Event()
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=total_bytes, completed=done_bytes, documents=0, rate=0.0)
        began, before = time.monotonic(), (TALLY.documents, TALLY.bytes, TALLY.tokens)

        def draw() -> None:
            while not stop.wait(0.2):
                bar.update(
                    task,
                    completed=done_bytes + TALLY.bytes - before[1],
                    documents=TALLY.documents - before[0],
                    rate=(TALLY.tokens - before[2]) / (time.monotonic() - began),
                )

        thread = threading.Thread(target=draw, daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()
