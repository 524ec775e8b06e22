"""`logitmill follow`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

from .mistakes import or_exit
from .options import ENDPOINT_HELP
from .words import show_totals

if TYPE_CHECKING:
    from ..follow import Followed


def follow(
    run: Annotated[
        str,
        typer.Argument(help="URI of a run, or of a folder in which one is at work."),
    ],
    endpoint_url: Annotated[str | None, typer.Option(help=ENDPOINT_HELP)] = None,
) -> None:
    """Show how far a run is that goes on elsewhere, until it is complete.

    From any machine that can read its folder: what is shown is told from storage alone, and the run
    does not notice. Shards count once they are done, so nothing moves while the first ones are
    scored. Ctrl-C ends the following (status 130), not the run.

    Examples:

    `logitmill follow runs`

    `logitmill follow s3://scores/6f3a09c2d41b77e0 --endpoint-url http://minio:9000`
    """
    or_exit(lambda: _follow(run, endpoint_url))


def _follow(uri: str, endpoint_url: str | None) -> None:
    from ..folder import endpoint_options
    from ..follow import find_followed, follow_run
    from ..run import open_run

    options = endpoint_options(uri, endpoint_url)
    folder = find_followed(uri, options)
    typer.echo(f"run     {folder.uri}")
    try:
        with _display() as show:
            for seen in follow_run(folder):
                show(seen)
    except KeyboardInterrupt as stop:
        typer.echo("no longer followed; the run itself goes on", err=True)
        # Another kind is SIGTERM's (`mistakes`).
        raise typer.Exit(130 if type(stop) is KeyboardInterrupt else 143) from None
    show_totals(open_run(folder.uri, storage_options=options))


@contextmanager
def _display() -> Iterator[Callable[[Followed], None]]:
    """A bar on a terminal; elsewhere a line whenever a look shows something else."""
    if not sys.stderr.isatty():
        last: list[str] = []

        def show_line(seen: Followed) -> None:
            if last != [str(seen)]:
                last[:] = [str(seen)]
                typer.echo(str(seen), err=True)

        yield show_line
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    columns = (TextColumn("following"), BarColumn(), TextColumn("{task.fields[seen]}"))
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=1.0, seen="")
        yield lambda seen: progress.update(task, completed=seen.fraction, seen=str(seen))
