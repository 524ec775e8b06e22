"""What `logitmill score --dry-run` says."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING

import typer

from ..progress import counted

if TYPE_CHECKING:
    from ..estimate import Estimate
    from ..request import Prepared


def say_placement(prepared: Prepared) -> None:
    """Where the model's layers would live."""
    from pathlib import Path

    from ...engine.pipeline import inspect_placement

    if not prepared.job.is_elsewhere:
        placement = inspect_placement(Path(prepared.job.model), prepared.job.engine)
        typer.echo(f"layers  {placement}")


def say_estimate(prepared: Prepared, price: float | None) -> None:
    """Sizes, time and the cost of storage, at `price` a GB and month."""
    from rich.console import Console

    from ..estimate import estimate_run
    from ..report.wording import size

    job, num_shards = prepared.job, len(prepared.plan.shards)
    with Console(stderr=True).status("reading a sample, and scoring it"):
        expected = estimate_run(prepared)
    documents = counted(expected.documents, "document")
    typer.echo(
        f"tokens  about {expected.tokens:,} in {documents}, from "
        f"{counted(expected.num_sampled, 'document')} that were tokenized"
    )
    sizes = ", ".join(f"{tier} {size(num_bytes)}" for tier, num_bytes in expected.sizes.items())
    packed = ""
    for tier in ("hidden", "logits"):
        if tier in job.tiers:
            packed = f", {tier} before compression"
    typer.echo(f"storage about {size(expected.num_bytes)}: {sizes} ({expected.sized_by}{packed})")
    if price is not None:
        cost = price * expected.num_bytes / 1e9
        said = f"about {cost:,.2f}" if cost >= 0.01 else "less than 0.01"
        typer.echo(f"cost    {said} a month, at {price:g} a GB and month")
    if expected.shards_left < num_shards:
        typer.echo(
            f"left    {expected.shards_left:,} of {counted(num_shards, 'shard')}, about "
            f"{counted(expected.tokens_left, 'token')}"
        )
    typer.echo(f"time    {_time(expected)}")
    typer.echo("dry run: nothing was scored for the run, and nothing was kept")


def _time(expected: Estimate) -> str:
    if not expected.shards_left:
        return "none, every shard is done"
    if expected.rate is None or expected.seconds_left is None:
        return (
            "not known: the model takes long to load, or is elsewhere, and no such run is below "
            "--out; score a part of the corpus (--limit) and ask again"
        )
    left = timedelta(seconds=round(expected.seconds_left))
    return (
        f"about {left} for each process or GPU alone, at {expected.rate.tokens_per_second:,.0f} "
        f"tokens/s ({expected.rate.source}), loading left out"
    )
