"""`logitmill report`."""

from __future__ import annotations

from typing import Annotated

import typer

from .mistakes import need_page_name, or_exit
from .options import ENDPOINT_HELP
from .terminal import show_counts


def report(
    run: Annotated[str, typer.Argument(help="URI of a run, or of a folder that holds one.")],
    out: Annotated[
        str | None,
        typer.Option(
            help="Where the page goes, a file or any fsspec URI; default the run's report.html."
        ),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(help="A run to compare with: drift by source, model against model."),
    ] = None,
    endpoint_url: Annotated[str | None, typer.Option(help=ENDPOINT_HELP)] = None,
) -> None:
    """Make a run's report.html anew from its summary tables.

    Examples:

    `logitmill report runs/6f3a09c2d41b77e0`

    `logitmill report s3://scores/6f3a09c2d41b77e0 --out report.html`

    `logitmill report s3://scores/tuesday --base s3://scores/monday`
    """

    def make() -> None:
        need_page_name("out", out)

        from ..folder import endpoint_options
        from ..publish import rewrite_report
        from ..run import open_run

        opened = open_run(run, storage_options=endpoint_options(run, endpoint_url))
        other = None
        if base is not None:
            options = endpoint_options(base, endpoint_url)
            other = open_run(base, storage_options=options, field="base")
        with show_counts() as on_progress:
            place = rewrite_report(
                opened, out, other, endpoint_url=endpoint_url, on_progress=on_progress
            )
        typer.echo(place)

    or_exit(make)
