"""The table of faults, shown when the tests are over.

A row goes with the report of its test, so that it comes here from any process of xdist.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

COLUMNS = ("times", "runs", "rows lost", "duplicates", "parts differing", "temporary objects")
PROPERTY = "fault"
"""Of a test's report, with the fault's name and these columns."""


def find_rows(reports: Iterable[Any]) -> list[dict[str, Any]]:
    """The rows that tests' reports bring along, one a fault, in their order."""
    rows: dict[str, dict[str, Any]] = {}
    for report in reports:
        # Set-up and tear-down bring the same ones.
        if getattr(report, "when", None) != "call":
            continue
        for name, found in report.user_properties:
            if name != PROPERTY:
                continue
            row = rows.setdefault(found["fault"], {"fault": found["fault"]})
            for column in COLUMNS:
                row[column] = row.get(column, 0) + found[column]
    return list(rows.values())


def format_rows(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """A table in Markdown, as lines."""
    header = f"| {'fault':44} | {' | '.join(COLUMNS)} |"
    rule = f"| {'-' * 44} | {' | '.join('-' * (len(c) - 1) + ':' for c in COLUMNS)} |"
    return [
        header,
        rule,
        *(
            f"| {row['fault']:44} | {' | '.join(f'{row[c]:>{len(c)}}' for c in COLUMNS)} |"
            for row in rows
        ),
    ]
