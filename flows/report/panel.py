"""What a panel of the page is made of, and the bars of its histograms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
from markupsafe import Markup

from . import charts
from .explorer import Explorer, is_value
from .totals import Totals

# Bars that half a page shows well, and the factors that make them of the summary's bins.
_MAX_BARS = 48
_FACTORS = (1, 2, 5, 10, 25, 50, 100, 250, 500, 1000)

Behind = tuple[str] | tuple[str, int] | tuple[str, int, int]
"""The query for the documents behind a mark, in which `{scores}` and `{tokens}` stand for the
tables; and, where the page has examples of them, the places of their source and language."""


@dataclass(frozen=True)
class Cells:
    """A table: its columns, how many of them from the left are text, and rows of what to show."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    num_text: int = 1


@dataclass(frozen=True)
class Chart:
    """A drawing, its legend as (name, colour), and the numbers behind it."""

    title: str
    svg: Markup
    numbers: Cells
    legend: Sequence[tuple[str, str]] = ()
    behind: Mapping[str, Behind] = field(default_factory=dict)
    """What is behind its marks, by their labels."""


@dataclass(frozen=True)
class Heatmap:
    """A table whose cells are coloured by their value."""

    corner: str
    columns: Sequence[str]
    rows: Sequence[tuple[str, Sequence[Cell | None]]]
    levels: Sequence[str]
    """What the colours stand for, the faintest first."""
    unit: str
    behind: Mapping[str, Behind]


@dataclass(frozen=True)
class Cell:
    """A cell of a heatmap: what is shown of it, its colour as a level, what it is in words."""

    value: str
    note: str
    level: int
    label: str


@dataclass(frozen=True)
class Material:
    """All that panels are made of."""

    totals: Totals
    explorer: Explorer
    facts: Mapping[str, Any]
    operations: pa.Table | None = None
    """What `operations.operations` returns, if it is known."""
    vocabulary: pa.Table | None = None
    """Schema `vocabulary.VOCABULARY`, if the run has it."""


@dataclass(frozen=True)
class Panel:
    """A section of the page: a title, what it shows in a sentence, charts, notes, tables."""

    id: str
    title: str
    about: str
    charts: Sequence[Chart] = ()
    notes: Sequence[str] = ()
    tables: Sequence[tuple[str, Cells]] = ()
    """With their titles."""
    heatmap: Heatmap | None = None
    empty: str = "Nothing to draw: no document was scored."


@dataclass(frozen=True)
class Against:
    """What a report shows of a comparison in which its run is B."""

    base: str
    """Where A lies."""
    sides: Sequence[str]
    """What tells A and B apart: their models, and what differs."""
    tiles: Sequence[tuple[str, str, str]]
    """The headline: (name, value, what it means)."""
    command: str
    """What makes the whole comparison."""
    alerts: Sequence[str]
    gaps: Sequence[str]
    panels: Sequence[Panel]
    style: Path
    """Of the panels, besides the report's own."""


@dataclass(frozen=True)
class Scale:
    """Bars of a histogram: `factor` bins of the summary each, up to the one that holds `last`."""

    width: float
    factor: int
    last: int

    def bar(self, b: int) -> int:
        """The bar of a bin."""
        return min(b, self.last) // self.factor

    def start(self, b: int) -> float:
        """Where the bar of a bin begins."""
        return round(self.bar(b) * self.factor * self.width, 6)

    def stop(self, b: int) -> float:
        """Where the bar of a bin ends."""
        return round((self.bar(b) + 1) * self.factor * self.width, 6)


def make_scale(weights: Mapping[int, int], width: float) -> Scale:
    """Bars that show all bins, or all but a long thin tail."""
    first, last = min(weights), max(weights)
    near = quantile(weights, 0.995)
    if last - first > 1.5 * (near - first) + 5:
        last = near
    factor = next((f for f in _FACTORS if (last - first) / f < _MAX_BARS), _FACTORS[-1])
    return Scale(width, factor, last)


def quantile(weights: Mapping[int, int], share: float) -> int:
    """The bin where the weights, added up, reach `share` of them all."""
    wanted, seen = share * sum(weights.values()), 0
    for b in sorted(weights):
        seen += weights[b]
        if seen >= wanted:
            return b
    return max(weights)


def legend(names: Sequence[str]) -> list[tuple[str, str]]:
    """Names with their colours; a single one needs no legend."""
    return [(name, charts.color(n)) for n, name in enumerate(names)] if len(names) > 1 else []


def find_documents(*conditions: str, order: str = "bits_per_byte") -> str:
    """The query for documents of which all conditions hold."""
    wheres = "\n  AND ".join(condition for condition in conditions if condition != "true")
    return (
        "SELECT doc_id, bits_per_byte, num_tokens_scored, num_bytes\nFROM {scores}\n"
        f"WHERE {wheres}\nORDER BY {order}\nLIMIT 20"
    )


def find_tokens(column: str, condition: str) -> str:
    """The query for the documents with most tokens whose `column`, named x, fulfils a condition."""
    return (
        f"SELECT doc_id, len(list_filter({column}, lambda x: {condition})) AS num_found\n"
        "FROM {tokens}\nORDER BY num_found DESC\nLIMIT 20"
    )


def behind_source(material: Material, label: str) -> Behind | None:
    """The documents of a source by its name on the page, None if that stands for several."""
    source = material.totals.sources.get(label)
    if source is None:
        return None
    query = find_documents("status = 'ok'", is_value("source", source))
    return (query, material.explorer.axes[0].of(source))
