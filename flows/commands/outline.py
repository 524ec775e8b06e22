"""What `logitmill score` says before a run and after it."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import typer

from ..progress import TALLY, counted
from .words import describe_way, show_outliers, show_totals

if TYPE_CHECKING:
    from ..request import Prepared


def say_plan(prepared: Prepared) -> None:
    """What is to be scored, by what and how, and where it goes."""
    from ..report.wording import size

    request, plan, facts, job = prepared.request, prepared.plan, prepared.facts, prepared.job
    documents = (
        f"{counted(plan.num_documents, 'document')}, " if plan.num_documents is not None else ""
    )
    recipe = job.recipe
    typer.echo(
        f"corpus  {job.corpus.uri}: {documents}{size(plan.num_bytes)}, "
        f"{counted(len(plan.shards), 'shard')}"
    )
    typer.echo(
        f"model   {request.model}: {facts.architecture}, {describe_way(facts)}, {facts.dtype} on "
        f"{facts.device}"
    )
    typer.echo(f"linears {facts.quantization}")
    typer.echo(
        f"recipe  {recipe.name}, context {recipe.context}, prefix {recipe.prefix} ({recipe.hash})"
    )
    if job.layers:
        typer.echo(f"lens    of layers {', '.join(map(str, job.layers))}")
    if prepared.logits_bytes is not None:
        kind = ("hidden", facts.dtype) if "hidden" in job.tiers else ("logits", job.logits_dtype)
        typer.echo(f"{kind[0]:7} about {size(prepared.logits_bytes)}, {kind[1]}")
    typer.echo(f"run     {job.folder.uri}")
    for line in (prepared.other, prepared.doubt):
        if line is not None:
            typer.echo(f"note    {line}")


def say_result(uri: str, storage_options: Mapping[str, Any]) -> None:
    """What a run holds, and what of it was scored now; RuntimeError if that is not one score."""
    from ..run import open_run

    run = open_run(uri, storage_options=storage_options)
    show_outliers(run)
    show_totals(run)
    seconds = time.monotonic() - TALLY.started
    documents = TALLY.total().documents
    if documents:
        first = f", first score after {TALLY.first_score:.1f} s" if TALLY.first_score else ""
        typer.echo(f"scored now: {counted(documents, 'document')} in {seconds:.1f} s{first}")
    else:
        typer.echo("scored now: nothing, the run was complete")
    typer.echo(f"run:    {uri}")
    typer.echo(f"report: {run.report_path}")
    counts = run.manifest
    assert counts is not None
    if counts["documents"] and counts["failed"] == counts["documents"]:
        raise RuntimeError(f"none of {counted(counts['documents'], 'document')} could be scored")
