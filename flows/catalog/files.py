"""The data files of a run in a table: its own parts, or one written for the catalog."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq

from ..parts import SCHEMAS
from ..run import Run
from .settings import open_files
from .tables import Origin

if TYPE_CHECKING:
    from pyiceberg.io import FileIO
    from pyiceberg.manifest import DataFile
    from pyiceberg.table import Table

_READERS = 16

OnProgress = Callable[[str, int, int], None]
"""Told the table's name, and how many of how many files have been looked at."""


class Files:
    """The data files of a run in one table."""

    def __init__(self, run: Run, name: str, origin: Origin, rows: pa.Table | None) -> None:
        self._run, self._name, self._origin, self._rows = run, name, origin, rows
        self._written: tuple[FileIO, str] | None = None

    def schema(self) -> pa.Schema:
        """Columns of the files, all parts of a run having the same."""
        if self._rows is not None:
            return self._rows.schema
        paths = self._run.paths(self._name)
        if not paths:
            return SCHEMAS[self._name]
        with open_files(self._run.folder).new_input(paths[0]).open() as file:
            return pq.read_schema(file).remove_metadata()

    def describe(self, table: Table, on_progress: OnProgress) -> list[DataFile]:
        """What the table is to know of every file that has rows."""
        if self._rows is not None:
            io, paths = table.io, [self._write(table)]
        else:
            io, paths = open_files(self._run.folder), self._run.paths(self._name)
        found = []
        with ThreadPoolExecutor(_READERS) as pool:
            described = pool.map(lambda path: _describe(io, table, path, self._origin), paths)
            for done, file in enumerate(described, 1):
                if file.record_count:
                    found.append(file)
                on_progress(self._name, done, len(paths))
        return found

    def discard(self) -> None:
        """Remove what was written for a commit that did not come about."""
        if self._written is not None:
            io, path = self._written
            with suppress(Exception):
                io.delete(path)

    def _write(self, table: Table) -> str:
        # A name of its own: who publishes the same run at the same time may be ahead of us.
        name = f"{self._origin.run_key}-{uuid.uuid4().hex}.parquet"
        path = f"{table.location()}/data/{name}"
        sink = pa.BufferOutputStream()
        pq.write_table(self._rows, sink, compression="zstd")
        with table.io.new_output(path).create() as file:
            file.write(sink.getvalue().to_pybytes())
        self._written = table.io, path
        return path


def _describe(io: FileIO, table: Table, path: str, origin: Origin) -> DataFile:
    """A data file by its footer, and by the run's partition, which its columns may not tell."""
    from pyiceberg.io.pyarrow import parquet_file_to_data_file

    file = parquet_file_to_data_file(io, table.metadata, path)
    for at, value in enumerate(origin.values):
        file.partition[at] = value
    return file
