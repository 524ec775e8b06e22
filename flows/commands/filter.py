"""`logitmill filter`."""

from __future__ import annotations

import math
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from ..progress import counted
from .mistakes import or_exit
from .options import ENDPOINT_HELP
from .terminal import show_counts

if TYPE_CHECKING:
    from ..filters import Cuts, Kept
    from ..filters.kept import Tally

_MOST_GROUPS = 20
# What stands for the scores at 0 and 100, which keep all that is below or above.
_OPEN = {-math.inf: "lowest", math.inf: "highest"}


class By(StrEnum):
    """What documents are grouped by."""

    language = "language"
    source = "source"
    none = "none"


class Weight(StrEnum):
    """What percentiles are of."""

    documents = "documents"
    bytes = "bytes"
    tokens = "tokens"


def filter(
    run: Annotated[str, typer.Argument(help="URI of a run, or of a folder that holds one.")],
    keep: Annotated[
        str,
        typer.Option(
            metavar="LOW:HIGH", help="Percentiles that documents are kept between, as in 30:60."
        ),
    ],
    out: Annotated[
        str | None,
        typer.Option(
            help="Parquet file of the ids that are kept, or with --text a folder; any fsspec URI. "
            "What another filter wrote is left alone. Left out, only what would be kept is said."
        ),
    ] = None,
    text: Annotated[
        bool,
        typer.Option(
            "--text",
            help="Write the documents themselves, read from the corpus again, in shards. Complete "
            "once its .filter.json says so; run it again after a kill.",
        ),
    ] = False,
    score: Annotated[
        str, typer.Option(help="Column of the scores that percentiles are of.")
    ] = "bits_per_byte",
    by: Annotated[By, typer.Option(help="Groups that have percentiles of their own.")] = (
        By.language
    ),
    weight: Annotated[
        Weight, typer.Option(help="What a percentile is a share of.")
    ] = Weight.documents,
    endpoint_url: Annotated[str | None, typer.Option(help=ENDPOINT_HELP)] = None,
) -> None:
    """Keep the documents of a run whose score lies between two percentiles of their group.

    `--keep 0:30`, `30:60` and `60:100` by language are the head, middle and tail of CCNet. Low
    scores are text that the model knows well, or text that repeats; high ones are foreign to it, or
    noise. Percentiles are exact; a document that stands at one is kept by what begins there.

    Examples:

    `logitmill filter runs --keep 30:60 --out kept.parquet`

    `logitmill filter runs --keep 0:60 --by source --weight bytes`

    `logitmill filter s3://scores/6f3a09c2d41b77e0 --keep 30:60 --text --out s3://corpora/middle`
    """

    def write() -> None:
        low, high = _parse(keep)
        if text and out is None:
            raise ValueError("text: documents need a place; give --out a folder")

        from ..filters import Cuts, find_cuts, write_kept
        from ..filters.output import check_texts, describe, find_place
        from ..folder import endpoint_options
        from ..run import open_run

        opened = open_run(run, storage_options=endpoint_options(run, endpoint_url))
        group = None if by == By.none else by.value
        if out is not None:
            about = describe(opened, Cuts(score, (low, high), group, weight.value, {}))
            find_place(out, about, texts=text, endpoint_url=endpoint_url)
        if text:
            check_texts(opened, endpoint_url)
        cuts = find_cuts(opened, (low, high), score=score, by=group, weight=weight.value)
        with show_counts() as show:
            kept = write_kept(
                opened,
                cuts,
                out,
                texts=text,
                endpoint_url=endpoint_url,
                on_progress=lambda done, total: show("filtering shards", done, total),
            )
        _show(cuts, kept)
        if out is not None:
            typer.echo(out)

    or_exit(write)


def _parse(keep: str) -> tuple[float, float]:
    low, _, high = keep.partition(":")
    try:
        ends = float(low), float(high)
    except ValueError:
        ends = (math.nan, math.nan)
    if not 0 <= ends[0] < ends[1] <= 100:
        raise ValueError(
            f"keep: {keep!r} is not two percentiles from 0 to 100, the lower first; give LOW:HIGH, "
            "as in --keep=30:60"
        )
    return ends


def _show(cuts: Cuts, kept: Kept) -> None:
    """A line a group, the largest first, and one of all."""
    start, end = cuts.percentiles
    rows: list[tuple[str, ...]] = [
        (cuts.by or "", f"p{start:g}", f"p{end:g}", "documents kept", "of", "bytes kept", "of")
    ]
    largest = sorted(kept.groups.items(), key=lambda item: (-item[1].documents, item[0]))
    for group, tally in largest[:_MOST_GROUPS]:
        ends = [_OPEN.get(value) or f"{value:.4g}" for value in cuts.values[group]]
        rows.append((group or "(none)", *ends, *_numbers(tally)))
    rows.append(("all", "", "", *_numbers(kept.total)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    typer.echo(f"{cuts.score}, percentiles of {cuts.weight}")
    for first, *others in rows:
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        typer.echo("  ".join([first.ljust(widths[0]), *cells]).rstrip())
    if len(largest) > _MOST_GROUPS:
        typer.echo(f"({len(largest) - _MOST_GROUPS:,} smaller groups are among all)")
    if kept.no_score:
        typer.echo(f"{counted(kept.no_score, 'document')} without the score not kept")
    if end <= 1:
        typer.echo(
            f"note: percentiles go to 100, so --keep={start:g}:{end:g} is at most one in a hundred;"
            f" shares of {start:g} to {end:g} are --keep={100 * start:g}:{100 * end:g}"
        )
    elif not kept.total.kept_documents:
        single = ", or --by=none for a single group" if len(kept.groups) > 1 else ""
        typer.echo(
            f"note: --keep={start:g}:{end:g} keeps nothing, groups are too small or their scores "
            f"equal; give percentiles further apart{single}"
        )


def _numbers(tally: Tally) -> list[str]:
    numbers = (tally.kept_documents, tally.documents, tally.kept_bytes, tally.bytes)
    return [f"{number:,}" for number in numbers]
