"""Documents that stand out, as tables: the ends of the distribution, and what was not scored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from ...engine.records import OK
from ..summary import FAILED, HIGHEST, LOWEST, MEMORIZED, STATUS, TRUNCATED
from .panel import Cells
from .totals import Row, Totals
from .wording import MAX_LABEL, NOTHING, number, show

_TITLES = {
    LOWEST: "Most predictable",
    HIGHEST: "Most surprising",
    MEMORIZED: "Likeliest to have been trained on",
    TRUNCATED: "Scored in part",
}
# Of few documents, none should be at both ends.
_ENDS = (LOWEST, HIGHEST)


_COLUMNS = (
    "document",
    "source",
    "bits/byte",
    "token perplexity",
    Markup(
        '<abbr title="Mean of the lowest fifth of (log p + entropy) / standard deviation, per '
        'token; higher means likelier to have been trained on">Min-K%++</abbr>'
    ),
    "tokens",
    "bytes",
)


@dataclass(frozen=True)
class Table:
    """Documents of a kind."""

    id: str
    title: str
    cells: Cells


def list_standouts(rows: Sequence[Row], totals: Totals) -> list[Table]:
    """A table for every kind; for all but the two ends, only if there are such documents.

    Args:
        rows: of schema `OUTLIERS`.
        totals: of the run.
    """
    num_scored = totals.total(STATUS + OK)["documents"]
    tables = []
    for kind, title in _TITLES.items():
        most = max(1, num_scored // 2) if kind in _ENDS else None
        lines = [
            (
                show(row["doc_id"]),
                show(row["source"], MAX_LABEL) or NOTHING,
                *_numbers(row),
            )
            for row in [row for row in rows if row["kind"] == kind][:most]
        ]
        if lines or kind in _ENDS:
            tables.append(Table(kind, title, Cells(_COLUMNS, lines, 2)))
    return tables


def list_failed(rows: Sequence[Row]) -> Cells | None:
    """Documents that were not scored, those of one reason together; None if all were."""
    failed = [row for row in rows if row["kind"] == FAILED]
    cells = [
        (
            show(row["doc_id"]),
            show(row["status"]),
            show(row["error"] or "") or NOTHING,
            show(row["source"], MAX_LABEL) or NOTHING,
        )
        for row in sorted(failed, key=lambda row: row["status"])
    ]
    return Cells(("document", "status", "error", "source"), cells, 4) if cells else None


def _numbers(row: Row) -> list[str]:
    return [
        number(row["bits_per_byte"], 3),
        number(row["token_perplexity"], 2),
        number(row["min_k_plus_plus_20"], 2),
        f"{row['num_tokens']:,}",
        f"{row['num_bytes']:,}" if row["num_bytes"] else NOTHING,
    ]
