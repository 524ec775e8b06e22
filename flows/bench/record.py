"""What a measurement found, and under which conditions: a line of JSON, tables in a terminal."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

# Columns of tables that go to no terminal.
_WIDTH = 140


@dataclass(frozen=True)
class Pass:
    """One way of scoring the whole subject, its fastest run."""

    name: str
    """What is computed for every token, or the peer that computes it."""
    unit: str
    """What linears are multiplied in."""
    seconds: float
    tokens_per_second: float
    """Tokens of the corpus over `seconds`, loading left out."""
    tflops: float | None
    """Useful operations a second / 1e12, for a model whose shape is known."""
    roofline_share: float | None
    """The least time that the ceilings allow over `seconds`."""
    peak_bytes: int | None
    """Device memory at its fullest, over the weights."""
    bits_per_token: float | None
    """Of the scored tokens, so that ways can be told to agree."""
    busy: float | None = None
    """Share of the time in which the devices were at work on batches, where it was taken."""


@dataclass(frozen=True)
class Part:
    """One part of the first pass, microseconds a token."""

    measured: float | None
    least: float | None
    """What the ceilings allow; None for what a pass does not have to do."""


@dataclass(frozen=True)
class Record:
    """One measurement with its conditions."""

    command: str
    date: str
    device: str
    versions: Mapping[str, str]
    subject: str
    text: str
    """The subject in a line."""
    case: str
    """What linears were asked to be multiplied as: "fp8", "fp8+head"."""
    format: str
    """What linears are stored as and run as."""
    documents: int
    tokens: int
    batch_tokens: int
    weights_bytes: int | None
    start: Mapping[str, float]
    """Seconds from the start of the process to what is named; only its first record has them."""
    passes: list[Pass]
    """The engine's, then the peers'."""
    ceilings: Mapping[str, tuple[float, str]]
    """(operations or bytes a second, of what), measured."""
    parts: Mapping[str, Part]
    busy: float | None
    """Share of the time between the first and the last kernel in which one ran."""
    notes: Sequence[str] = ()
    """What was not measured, and why."""
    placement: str = ""
    """Where layers live."""

    def append(self, path: Path) -> None:
        """Add the record to a file of JSON lines."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as file:
            file.write(json.dumps(asdict(self)) + "\n")


def load_records(path: Path) -> list[Record]:
    """The records of a file of JSON lines, in order."""
    return [_load(json.loads(line)) for line in path.read_text().splitlines()]


def _load(fields: dict[str, Any]) -> Record:
    return Record(
        **{
            **fields,
            "passes": [Pass(**p) for p in fields["passes"]],
            "ceilings": {name: tuple(ceiling) for name, ceiling in fields["ceilings"].items()},
            "parts": {name: Part(**part) for name, part in fields["parts"].items()},
        }
    )


def show(record: Record) -> None:
    """Print a record as tables."""
    console = make_console()

    def say(text: str = "") -> None:
        console.print(text, soft_wrap=True, highlight=False)

    say(
        f"{record.subject}: {record.text}; {record.documents:,} documents, {record.tokens:,} tokens"
    )
    weights = f"; weights {record.weights_bytes / 1e9:.2f} GB" if record.weights_bytes else ""
    say(f"{record.format}; batches of {record.batch_tokens:,} tokens{weights}")
    if record.placement:
        say(record.placement)
    if record.start:
        say("from process start: " + ", ".join(f"{k} {v:.1f} s" for k, v in record.start.items()))
    say()
    console.print(_passes(record.passes))
    if record.parts:
        say()
        console.print(_parts(record))
    if record.busy is not None:
        say(f"GPU busy {record.busy:.1%} of the time between first and last batch")
    for note in record.notes:
        say(note)
    say(f"{record.device}; {say_versions(record.versions)}; {record.date}")


def make_console():  # type: ignore[no-untyped-def]
    """Where tables go: a terminal of its width, or anything else, whose lines fit no screen."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else _WIDTH)


def say_versions(versions: Mapping[str, str]) -> str:
    """Versions of software in a line."""
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def _passes(passes: Sequence[Pass]):  # type: ignore[no-untyped-def]
    from rich.table import Table

    first = passes[0]
    table = Table(box=None, header_style="bold")
    table.add_column("")
    table.add_column("linears in")
    names = ["tokens/s", "seconds", "logitmill is", "TFLOP/s", "roofline", "peak GB", "bits/token"]
    has_busy = any(p.busy is not None for p in passes)
    for name in [*names, "busy"] if has_busy else names:
        table.add_column(name, justify="right")
    for p in passes:
        ratio = first.tokens_per_second / p.tokens_per_second
        table.add_row(
            p.name,
            p.unit,
            f"{p.tokens_per_second:,.0f}",
            f"{p.seconds:.2f}",
            "" if p is first else f"{ratio:.2f}x",
            _or_blank(p.tflops, ".3g"),
            _or_blank(p.roofline_share, ".1%"),
            _or_blank(p.peak_bytes and p.peak_bytes / 1e9, ".2f"),
            _or_blank(p.bits_per_token, ".5f"),
            *([_or_blank(p.busy, ".1%")] if has_busy else []),
        )
    return table


def _parts(record: Record):  # type: ignore[no-untyped-def]
    from rich.table import Table

    table = Table(box=None, header_style="bold")
    table.add_column("us a token")
    table.add_column("measured", justify="right")
    table.add_column("least", justify="right")
    table.add_column("ceiling, measured")
    for name, part in record.parts.items():
        ceiling = record.ceilings.get(name) or record.ceilings["copy"]
        text = f"{say_rate(name, ceiling[0])}, {ceiling[1]}" if part.least is not None else ""
        table.add_row(name, _or_blank(part.measured, ".3f"), _or_blank(part.least, ".3f"), text)
    measured = [part.measured for part in record.parts.values() if part.measured is not None]
    least = math.fsum(part.least or 0.0 for part in record.parts.values())
    table.add_row(
        "all", f"{math.fsum(measured):.3f}" if measured else "", f"{least:.3f}", "", style="bold"
    )
    return table


def say_rate(name: str, rate: float) -> str:
    """A ceiling's rate for people; `name` is that of the ceiling."""
    unit = "FLOP/s" if name in ("linears", "head", "attention") else "B/s"
    power, prefix = (1e12, "T") if rate >= 1e12 else (1e9, "G")
    return f"{rate / power:,.4g} {prefix}{unit}"


def _or_blank(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
