"""The counts of a run as its report shows them: by source, the small ones together."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from ...engine.records import OK
from ..summary import OTHER, STATUS, SUMS
from .wording import MAX_LABEL, show

MAX_SERIES = 9
"""Sources told apart; of more, the largest, and one that stands for all the others."""
BITS = 1.0 / math.log(2.0)
"""Bits of a nat."""
Row = dict[str, Any]

_IS_SCORED = pc.field("panel") == STATUS + OK


@dataclass
class Totals:
    """The counts with sources named as the page names them, of all languages, lengths, days."""

    labels: list[str]
    """Sources of which anything was scored, largest first."""
    panels: dict[str, list[Row]] = field(default_factory=dict)
    """Rows of `label`, `bin` and the sums, in the order of labels and bins."""
    sources: dict[str, str] = field(default_factory=dict)
    """The source that a label stands for, where it is one."""

    @classmethod
    def of(cls, counts: pa.Table) -> Totals:
        """Totals of a table of schema `COUNTS`."""
        names = _name_sources(counts)
        renamed = pa.array([names[s] for s in counts["source"].to_pylist()], pa.string())
        keys = ["panel", "label", "bin"]
        grouped = (
            counts.append_column("label", renamed)
            .group_by(keys, use_threads=False)
            .aggregate([(name, "sum") for name in SUMS])
            .rename_columns([*keys, *SUMS])
        )
        # Panels may tell sources apart that others do not.
        failed = pc.and_(
            pc.starts_with(grouped["panel"], STATUS), pc.not_equal(grouped["panel"], STATUS + OK)
        )
        scored = set(grouped.filter(pc.invert(failed))["label"].to_pylist())
        labels = [label for label in dict.fromkeys(names.values()) if label in scored]
        totals = cls(labels)
        told = Counter(names.values())
        totals.sources = {names[s]: s for s in names if told[names[s]] == 1 and s != OTHER}
        for row in grouped.to_pylist():
            totals.panels.setdefault(row.pop("panel"), []).append(row)
        order = {label: n for n, label in enumerate(labels)}
        for rows in totals.panels.values():
            rows.sort(key=lambda row: (order.get(row["label"], len(order)), row["bin"]))
        return totals

    def rows(self, panel: str) -> list[Row]:
        """Rows of a panel, by label and bin."""
        return self.panels.get(panel, [])

    def by(self, panel: str, key: str) -> dict[Any, Row]:
        """Sums of a panel by `label` or `bin`."""
        return sum_by(self.rows(panel), lambda row: row[key])

    def total(self, panel: str) -> Row:
        """Sums of a whole panel, zero where it is empty."""
        return sum_by(self.rows(panel), lambda row: None).get(None, dict.fromkeys(SUMS, 0))

    def failed(self) -> dict[str, int]:
        """Documents that were not scored, by status."""
        names = sorted(p for p in self.panels if p.startswith(STATUS) and p != STATUS + OK)
        return {name.removeprefix(STATUS): self.total(name)["documents"] for name in names}


def sum_by(rows: Iterable[Row], key: Callable[[Row], Any]) -> dict[Any, Row]:
    """Rows added up by a key of theirs."""
    sums: dict[Any, Row] = {}
    for row in rows:
        into = sums.setdefault(key(row), dict.fromkeys(SUMS, 0))
        for name in SUMS:
            into[name] += row[name]
    return sums


def bits_per_byte(sums: Row) -> float | None:
    """nll / (bytes ln 2)."""
    nats = ratio(sums["nll"], sums["bytes"])
    return None if nats is None else nats * BITS


def perplexity(sums: Row) -> float | None:
    """exp(nll / tokens): token-weighted."""
    nats = ratio(sums["nll"], sums["tokens"])
    return None if nats is None else math.exp(min(nats, 709.0))


def ratio(a: float, b: float) -> float | None:
    """a / b, None for 0 / 0."""
    return a / b if b else None


def _name_sources(counts: pa.Table) -> dict[str, str]:
    """Source -> its name on the page, largest first; small ones share a name."""
    scored = sum_by(counts.filter(_IS_SCORED).to_pylist(), lambda row: row["source"])
    nothing = dict.fromkeys(SUMS, 0)

    def place(source: str) -> tuple[Any, ...]:
        sums = scored.get(source, nothing)
        return source == OTHER, -sums["bytes"], -sums["tokens"], source

    ordered = sorted(pc.unique(counts["source"]).to_pylist(), key=place)
    num_apart = len(scored) if len(scored) <= MAX_SERIES else MAX_SERIES - 1
    num_together = len(scored) - num_apart
    rest = f"all other sources ({num_together})" if num_together else "other sources"
    return {
        source: (show(source, MAX_LABEL) or "(no source)") if n < num_apart else rest
        for n, source in enumerate(ordered)
    }
