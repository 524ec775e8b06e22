"""What faults have done to runs: counted, checked, and told in one table (`fault_table`)."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fault_table import COLUMNS, PROPERTY
from flow_helpers import digests
from logitmill.flows import Run
from logitmill.flows.scratch import find_live


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
        record(PROPERTY, self._row)

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


@contextmanager
def striking(
    fault: Fault,
    strike: Callable[[], None],
    is_time: Callable[[], bool],
    times: int,
    longest: float,
) -> Iterator[None]:
    """Has the fault happen at random moments, `longest` seconds apart at most, while it is time.

    No more once it has happened so many `times` in all.
    """
    done, rng = threading.Event(), random.Random(fault.times)

    def run() -> None:
        while fault.times < times and not done.is_set():
            if not is_time():
                done.wait(0.1)
            elif not done.wait(rng.uniform(0, longest)):
                fault.strike()
                strike()

    with ThreadPoolExecutor(1) as pool:
        striker = pool.submit(run)
        try:
            yield
        finally:
            done.set()
        striker.result()


def finish(score: Callable[[], Run]) -> Run:
    """The run once it is complete: an error that is said in a line has it run again."""
    for _ in range(10):
        found = attempt(score)
        if not isinstance(found, str):
            return found
    raise AssertionError("it did not complete")


def attempt(score: Callable[[], Run]) -> Run | str:
    """The run, or else what it ended with, which is a line."""
    try:
        return score()
    except Exception as error:
        said, kind = str(error), type(error)
    print(f"ended with {kind.__name__}: {said}")
    assert said and "\n" not in said
    return said


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
