"""What more than one command says of models and runs."""

from __future__ import annotations

import math
import sys
from typing import TYPE_CHECKING

import typer

from ..progress import counted

if TYPE_CHECKING:
    from ...engine.pipeline import ModelFacts
    from ..run import Run

_FAILED_SHOWN = 3


def describe_way(facts: ModelFacts) -> str:
    """What runs a model, and why."""
    return "native decoder" if facts.reason is None else f"through transformers: {facts.reason}"


def show_totals(run: Run) -> None:
    """A complete run in a line or two, and the documents that could not be scored."""
    m = run.manifest
    assert m is not None
    line = ", ".join(counted(m[name + "s"], name) for name in ("document", "token", "byte"))
    if m["failed"]:
        line += f"; {m['failed']:,} could not be scored:"
    typer.echo(line)
    failed = [r for r in run.summary("outliers").to_pylist() if r["kind"] == "failed"]
    for row in failed[:_FAILED_SHOWN]:
        typer.echo(f"  {row['doc_id']}: {row['status']}, {row['error']}")
    if m["failed"] > _FAILED_SHOWN:
        typer.echo("  ... (columns status and error of the scores say why)")
    column = (run.plan.get("reading") or {}).get("day_column")
    if column and (dayless := _count_dayless(run)):
        typer.echo(
            f"note: {counted(dayless, 'document')} of no day: neither their {column!r} nor their "
            "path begins with one or names one, as in 2026-11-23"
        )
    if m["bytes"] and m["tokens"]:
        bits = -m["loglikelihood"] / math.log(2) / m["bytes"]
        ppl = math.exp(-m["loglikelihood"] / m["tokens"])
        line = f"{bits:.4f} bits/byte, token perplexity {ppl:.3f} (token-weighted)"
        if m["recipe"]["weighting"] == "document":
            scored = run.table("scores", ["token_perplexity"]).column(0).drop_null()
            line += f", {math.fsum(scored.to_pylist()) / len(scored):.3f} (mean of documents)"
        typer.echo(line)


def _count_dayless(run: Run) -> int:
    """Documents of which no day is known, from the run's summary."""
    import pyarrow.compute as pc

    from ..counts import STATUS

    counts = run.summary("counts")
    is_dayless = pc.and_(pc.starts_with(counts["panel"], STATUS), pc.equal(counts["day"], ""))
    return int(pc.sum(counts.filter(is_dayless)["documents"]).as_py() or 0)


def show_outliers(run: Run, count: int = 5) -> None:
    """A table of the least and the most surprising documents, each of them once."""
    from rich.console import Console
    from rich.table import Table

    from ..outliers import HIGHEST, LOWEST, MAX_ROWS, MIN_BYTES, MIN_TOKENS

    rows = run.summary("outliers").to_pylist()
    lowest, highest = ([r for r in rows if r["kind"] == kind] for kind in (LOWEST, HIGHEST))
    # Of few documents, half are listed at either end.
    ends = (lowest[: min(count, -(-len(lowest) // 2))], highest[: min(count, len(highest) // 2)])
    table = Table(box=None, header_style="bold")
    for name, justify in (
        ("", "left"),
        ("document", "left"),
        ("bits/byte", "right"),
        ("token ppl", "right"),
        ("bytes", "right"),
    ):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    for end, label in zip(ends, ("least surprising", "most surprising"), strict=True):
        for i, row in enumerate(end):
            bits = f"{row['bits_per_byte']:.3f}" if row["bits_per_byte"] is not None else "-"
            table.add_row(
                label if not i else "",
                row["doc_id"],
                bits,
                f"{row['token_perplexity']:.2f}",
                f"{row['num_bytes']:,}",
            )
    Console(file=sys.stdout).print(table)
    m = run.manifest
    assert m is not None
    # Fewer than there is room for: the others are too short.
    if len(lowest) < MAX_ROWS[LOWEST] and (short := m["documents"] - m["failed"] - len(lowest)):
        typer.echo(
            f"(not among them: {counted(short, 'document')} of fewer than {MIN_BYTES} bytes, or of "
            f"fewer than {MIN_TOKENS} tokens)"
        )
