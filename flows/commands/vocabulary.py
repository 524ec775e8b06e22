"""`logitmill vocabulary`."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from ..progress import counted
from .mistakes import or_exit
from .options import ENDPOINT_HELP

if TYPE_CHECKING:
    from ..vocabulary import Usage


def vocabulary(
    run: Annotated[str, typer.Argument(help="URI of a run, or of a folder that holds one.")],
    source: Annotated[
        str | None, typer.Option(help="Tokens of this source alone; default all of them.")
    ] = None,
    count: Annotated[int, typer.Option(help="So many tokens of each kind.")] = 10,
    endpoint_url: Annotated[str | None, typer.Option(help=ENDPOINT_HELP)] = None,
) -> None:
    """Show which tokens a model expects too seldom and too often, of a run scored with it.

    A token is expected as often as its probabilities add up to. z is how far what was observed lies
    from that, in standard deviations of what would be observed if the model were right, or in
    tokens where that is less than one. A source marked (in part) may have more tokens among
    `(other)`, where shards have more sources than they tell apart.

    The run needs its vocabulary: `logitmill score MODEL CORPUS --vocabulary`. All of the table, for
    any tool that reads Parquet: RUN/summary/vocabulary.parquet.

    Examples:

    `logitmill vocabulary runs/6f3a09c2d41b77e0`

    `logitmill vocabulary s3://scores/6f3a09c2d41b77e0 --source wikipedia --count 50`
    """

    def show() -> None:
        from ...engine.frequencies import MAX_SOURCES, OTHER
        from ..folder import endpoint_options
        from ..run import open_run
        from ..vocabulary import find_bias

        opened = open_run(run, storage_options=endpoint_options(run, endpoint_url))
        if not opened.plan.get("vocabulary"):
            raise ValueError(
                f"run: {opened.uri!r} was scored without its vocabulary; score it with --vocabulary"
            )
        table = opened.summary("vocabulary")
        chosen = find_bias(table, source, count)
        _show("expected too seldom", chosen.too_seldom)
        _show("expected too often", chosen.too_often)
        sources = [source] if source is not None else [None, *table["source"].unique().to_pylist()]
        is_partial = False
        for name in sources:
            found = chosen if name == source else find_bias(table, name)
            label = "all sources" if name is None else name or "(no source)"
            in_part = " (in part)" * found.partial
            is_partial |= found.partial
            typer.echo(
                f"{label}{in_part}: {counted(found.num_tokens, 'token')}, "
                f"{found.divergence:.4f} bits of divergence from what was expected"
            )
        if is_partial:
            typer.echo(
                f"note: where a shard has more than {MAX_SOURCES} sources, the later ones are told "
                f"apart no longer: what is marked (in part) may have more tokens among {OTHER}"
            )

    or_exit(show)


def _show(title: str, tokens: list[Usage]) -> None:
    """A table of tokens."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from ..report.wording import show_piece

    table = Table(box=None, header_style="bold")
    table.add_column(title)
    for name in ("id", "observed", "expected", "observed/expected", "z"):
        table.add_column(name, justify="right")
    for usage in tokens:
        table.add_row(
            # Brackets in a token are no style.
            Text(show_piece(usage.token)),
            str(usage.token_id),
            f"{usage.observed:,}",
            f"{usage.expected:,.1f}",
            f"{usage.observed / usage.expected:.3g}" if usage.expected else "-",
            f"{usage.z:+.3g}",
        )
    Console(file=sys.stdout, highlight=False).print(table)
