"""`logitmill compare`."""

from __future__ import annotations

import sys
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from .mistakes import or_exit
from .options import ENDPOINT_HELP
from .terminal import show_counts

if TYPE_CHECKING:
    from ..compare import Comparison


class Level(StrEnum):
    """How deep two runs are compared."""

    documents = "documents"
    tokens = "tokens"
    distributions = "distributions"


def compare(
    base: Annotated[
        str, typer.Argument(metavar="A", help="URI of the base: a run, or a folder that holds one.")
    ],
    other: Annotated[
        str | None,
        typer.Argument(
            metavar="B",
            help="URI of the run held against it; without, the last two complete runs of one "
            "recipe in the folder A.",
        ),
    ] = None,
    out: Annotated[
        str | None,
        typer.Option(
            help="Folder for compare.html and compare.json, on any fsspec URI, or a name that ends "
            "with .html; default compare/A-B in the folder that holds both runs."
        ),
    ] = None,
    level: Annotated[
        Level | None,
        typer.Option(
            help="Compare no deeper than this, and fail if it cannot be; default as deep as what "
            "both runs kept allows."
        ),
    ] = None,
    endpoint_url: Annotated[str | None, typer.Option(help=ENDPOINT_HELP)] = None,
) -> None:
    """Compare two runs: two models, two quantizations, two nights.

    A is the base: differences are B less A, and KL is KL(A || B). Documents are paired by their
    ids, tokens by document and place (both runs need --keep tokens), distributions the same way
    (--keep topk for lower bounds, --keep logits for exact numbers). Both must be of one recipe.

    Examples:

    `logitmill compare runs/6f3a09c2d41b77e0 runs/2a8f88e1ffe40b5a`

    `logitmill compare s3://scores/monday s3://scores/tuesday --out s3://scores/compare/tuesday`
    """

    def show() -> None:
        from ..compare import compare_runs

        with show_counts() as on_progress:
            found = compare_runs(
                base,
                other,
                out,
                level=level.value if level is not None else None,
                endpoint_url=endpoint_url,
                on_progress=on_progress,
            )
        _show(found)

    or_exit(show)


def _show(found: Comparison) -> None:
    """A short table, and where the page is."""
    from rich.console import Console
    from rich.table import Table

    from ..compare.headline import headline
    from ..compare.page import find_alerts, find_gaps

    for line in (*find_alerts(found), *find_gaps(found)):
        typer.echo(line)
    table = Table(box=None, show_header=False)
    table.add_column()
    table.add_column(justify="right")
    for name, value in headline(found):
        table.add_row(name, value)
    Console(file=sys.stdout, highlight=False).print(table)
    typer.echo(f"page    {found.uri}")
