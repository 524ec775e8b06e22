"""What a command does around a flow: the terminal is left to it, and imports run side by side."""

from __future__ import annotations

import logging
import os
import shlex
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from rich.progress import TaskID


def hush_prefect() -> None:
    """Leave the terminal to this command: what Prefect itself has to say goes to the server.

    A mistake is one line here, not that line below Prefect's traceback of it.
    """
    for handler in ("CONSOLE", "DEBUG"):
        os.environ.setdefault(f"PREFECT_LOGGING_HANDLERS_{handler}_LEVEL", "CRITICAL")


def show_own_lines() -> None:
    """Show what this package's flow and tasks log. Once Prefect has set up its own handlers."""
    from ...engine import fallback, mirror

    for runs in ("flow_runs", "task_runs"):
        logging.getLogger(f"prefect.{runs}").addHandler(_OwnLines(logging.INFO))
    # A model is fetched before there is a run, and loaded without a thought of it.
    for module in (mirror, fallback):
        module.log.addHandler(_OwnLines(logging.INFO))


class _OwnLines(logging.Handler):
    """Shows, of what flow and task runs log, the lines of this package that the plan did not."""

    def emit(self, record: logging.LogRecord) -> None:
        root = Path(__file__).parents[2]
        is_own = Path(record.pathname).parent in (root / "flows", root / "engine")
        if is_own and not getattr(record, "in_plan", False):
            typer.echo(record.getMessage(), err=True)


def import_all() -> None:
    """Import the engine in one thread and the orchestrator in this one, side by side."""

    def import_engine() -> None:
        from transformers import AutoConfig, AutoTokenizer  # noqa: F401

        from ...engine import pipeline  # noqa: F401

    thread = threading.Thread(target=import_engine)
    thread.start()
    import prefect.artifacts
    import prefect.flow_engine
    import prefect.task_engine
    import prefect.task_runners  # noqa: F401

    # What imports both comes after both: transformers cannot be imported by two threads at once.
    thread.join()


def typed(*, without: str) -> str:
    """The command as it was typed, but for one option and its value."""
    arguments = sys.argv[1:]
    if without in arguments:
        at = arguments.index(without)
        del arguments[at : at + 2]
    return shlex.join(["logitmill", *arguments])


@contextmanager
def show_bytes(doing: str, then: str) -> Iterator[Callable[[int, int], None]]:
    """A bar for as long as the block runs, on a terminal; told how many bytes of how many.

    Once these are all, it says what is done `then`.
    """
    if not sys.stderr.isatty():
        yield lambda done, total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    said = TextColumn("{task.description}")
    columns = (said, BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(doing, total=None)

        def show(done: int, total: int) -> None:
            progress.update(
                task, completed=done, total=total, description=doing if done < total else then
            )

        yield show


@contextmanager
def show_counts() -> Iterator[Callable[[str, int, int], None]]:
    """Bars for as long as the block runs, on a terminal: one for each thing told to be done."""
    if not sys.stderr.isatty():
        yield lambda doing, done, total: None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    said = TextColumn("{task.description}")
    columns = (said, BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        tasks: dict[str, TaskID] = {}

        def show(doing: str, done: int, total: int) -> None:
            if doing not in tasks:
                tasks[doing] = progress.add_task(doing, total=total)
            progress.update(tasks[doing], completed=done, total=total)

        yield show
