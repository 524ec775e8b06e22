"""What faults have done to runs: counted, checked, and told in one table when the tests are over.

A row goes with the report of its test, so that it reaches the table from any process of xdist.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flow_helpers import digests
from logitmill.flows import Run
from logitmill.flows.folder import find_live

COLUMNS = ("times", "runs", "rows lost", "duplicates", "parts differing", "temporary objects")
_PROPERTY = "fault"


@dataclass(frozen=True)
class Whole:
    """What a run holds that nobody has disturbed."""

    ids: frozenset[str]
    digests: Mapping[str, str]

    @classmethod
    def of(cls, run: Run) -> Whole:
        return cls(frozenset(_ids(run)), digests(run))


class Fault:
    """Counts what one kind of fault does to runs."""

    def __init__(self, name: str, whole: Whole, record: Callable[[str, object], None]) -> None:
        """`record` is pytest's `record_property` of the test that has the fault happen."""
        self._whole = whole
        self._row: dict[str, Any] = {"fault": name, **dict.fromkeys(COLUMNS, 0)}
        record(_PROPERTY, self._row)

    @property
    def times(self) -> int:
        """How often it has happened."""
        return int(self._row["times"])

    def strike(self, times: int = 1) -> None:
        """It has happened again."""
        self._row["times"] += times

    def check(self, run: Run, scratch: Path | None = None) -> None:
        """Nothing is missing, twice, of other bytes or left over.

        Args:
            run: a run after the fault, complete.
            scratch: where its scratch folders lay, if not beside the run.
        """
        assert self.times, "it has not happened"
        ids, found = _ids(run), digests(run)
        names = {*found, *self._whole.digests}
        seen = {
            "rows lost": len(self._whole.ids - set(ids)),
            "duplicates": len(ids) - len(set(ids)),
            "parts differing": sum(found.get(n) != self._whole.digests.get(n) for n in names),
            "temporary objects": len(_left(run, scratch)),
        }
        self._row["runs"] += 1
        for column, count in seen.items():
            self._row[column] += count
        assert seen == dict.fromkeys(seen, 0)


def _ids(run: Run) -> list[str]:
    ids: list[str] = run.table(columns=["doc_id"])["doc_id"].to_pylist()
    return ids


def _left(run: Run, scratch: Path | None) -> list[str]:
    """What no one will remove: temporary files, and uploads that have not been finished."""
    folder = run.folder
    left = [path for path in folder.filesystem.find(folder.path("")) if "/.tmp-" in path]
    left += [upload["Key"] for upload in folder.list_uploads()]
    within = Path(folder.path("")) if folder.is_local else scratch
    if within is not None and within.exists():
        live = find_live(within)
        left += [path.name for path in within.glob(".tmp-*") if path.name not in live]
    return left


def find_rows(reports: Iterable[Any]) -> list[dict[str, Any]]:
    """The rows that tests' reports bring along, one a fault, in their order."""
    rows: dict[str, dict[str, Any]] = {}
    for report in reports:
        # Set-up and tear-down bring the same ones.
        if getattr(report, "when", None) != "call":
            continue
        for name, found in report.user_properties:
            if name != _PROPERTY:
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
