"""The rows of two runs, document by document, in bounded memory.

Where both plans cut the same inputs alike, a shard of the one is the same shard of the other, and
their parts are read side by side, a row group at a time. Else documents are dealt out by a hash of
their ids to files on local disk, and each is small enough to be held: the order of either run does
not matter, nor how it was cut.
"""

from __future__ import annotations

import errno
import os
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ..parts import PartFile
from ..run import Run

_LABELS = ["source", "language"]
# About what a file of dealt-out documents holds, bytes in memory, and how many there may be.
_FILE_BYTES, _MOST_FILES = 64 << 20, 512
# Parquet's bytes to those in memory, at the most.
_EXPANSION = 4
_GROUPS_HELD = 2

OnProgress = Callable[[int, int], object]
"""Is told how much of how much is read."""
OnAlone = Callable[[pa.Array, pa.Array], object]


@dataclass(frozen=True)
class Stream:
    """Columns of a tier of a run; `doc_id` comes with them."""

    run: Run
    tier: str
    columns: Sequence[str]
    labels: bool = False
    """Whether `source` and `language` of the documents are added, from their scores."""

    def parts(self) -> list[str]:
        """Names of the tier's files, in the order of shards."""
        return part_names(self.run, self.tier)

    @contextmanager
    def open(self, part: int) -> Iterator[Groups]:
        """The row groups of a part."""
        with self.run.open_part(self.parts()[part]) as file:
            labels = None
            if self.labels:
                with self.run.open_part(part_names(self.run, "scores")[part]) as scores:
                    labels = scores.read(["doc_id", *_LABELS])
            yield Groups(file, ["doc_id", *self.columns], labels)


def part_names(run: Run, tier: str) -> list[str]:
    """Names of the files of a tier of a complete run, in the order of shards."""
    assert run.manifest is not None, "only complete runs are compared"
    parts = sorted(run.manifest["parts"], key=lambda part: part["shard"])
    return [part["name"] for part in parts if part["name"].startswith(f"{tier}/")]


class Groups:
    """A part's rows by their number; the row groups last used are held."""

    def __init__(self, file: PartFile, columns: list[str], labels: pa.Table | None) -> None:
        self._file, self._columns, self._labels = file, columns, labels
        counts = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
        self.starts = np.cumsum([0, *counts])
        """Number of each row group's first row, and of all rows."""
        self._held: OrderedDict[int, pa.Table] = OrderedDict()

    def __len__(self) -> int:
        return len(self.starts) - 1

    def ids(self) -> pa.Array:
        """Documents of all rows."""
        return _whole(self._file.read(["doc_id"])["doc_id"])

    def read(self, group: int) -> pa.Table:
        """All rows of a group."""
        if group in self._held:
            self._held.move_to_end(group)
            return self._held[group]
        table = self._file.read_row_group(group, self._columns)
        if self._labels is not None:
            at = pc.index_in(_whole(table["doc_id"]), _whole(self._labels["doc_id"]))
            for name in _LABELS:
                table = table.append_column(name, self._labels[name].take(at))
        self._held[group] = table
        if len(self._held) > _GROUPS_HELD:
            self._held.popitem(last=False)
        return table

    def take(self, rows: np.ndarray) -> Iterator[tuple[slice, pa.Table]]:
        """Rows by number, in pieces of one group each: which of `rows`, and these."""
        group_of = np.searchsorted(self.starts, rows, side="right") - 1
        cuts = [0, *(np.flatnonzero(np.diff(group_of)) + 1).tolist(), len(rows)]
        for start, stop in pairwise(cuts):
            if start < stop:
                group = int(group_of[start])
                wanted = pa.array(rows[start:stop] - self.starts[group])
                yield slice(start, stop), self.read(group).take(wanted)


def are_cut_alike(base: Run, other: Run) -> bool:
    """Whether the runs' shards hold the same documents, by their plans."""

    def cut(run: Run) -> list[object]:
        corpus = run.plan["corpus"]
        # When a file was written decides nothing.
        inputs = [{**input_, "stamp": ""} for input_ in corpus["inputs"]]
        return [inputs, corpus["shards"], run.plan.get("reading")]

    return cut(base) == cut(other)


def pair(
    base: Stream,
    other: Stream,
    *,
    on_progress: OnProgress,
    on_alone: OnAlone = lambda base, other: None,
) -> Iterator[tuple[pa.Table, pa.Table]]:
    """All documents that two streams share: tables of which row i is the same document.

    Args:
        on_alone: is given the ids that only the one and only the other has.

    Raises:
        OSError: if the disk of temporary files is full.
    """
    if are_cut_alike(base.run, other.run):
        num_parts = len(base.parts())
        for part in range(num_parts):
            with base.open(part) as ours, other.open(part) as theirs:
                yield from _pair_groups(ours, theirs, on_alone)
            on_progress(part + 1, num_parts)
        return
    with TemporaryDirectory(prefix="logitmill-compare-") as folder, _say_where():
        yield from _pair_dealt(base, other, Path(folder), on_progress, on_alone)


def _pair_groups(
    ours: Groups, theirs: Groups, on_alone: OnAlone
) -> Iterator[tuple[pa.Table, pa.Table]]:
    our_ids, their_ids = ours.ids(), theirs.ids()
    at = pc.index_in(our_ids, their_ids)
    for group, (start, stop) in enumerate(pairwise(ours.starts.tolist())):
        within = at.slice(start, stop - start)
        shared = np.flatnonzero(within.is_valid().to_numpy(zero_copy_only=False))
        # No more than a group of either is joined, however the other's are cut.
        for which, table in theirs.take(within.drop_null().to_numpy()):
            yield ours.read(group).take(pa.array(shared[which])), table
    on_alone(our_ids.filter(at.is_null()), _without(their_ids, our_ids))


def _pair_dealt(
    base: Stream, other: Stream, folder: Path, on_progress: OnProgress, on_alone: OnAlone
) -> Iterator[tuple[pa.Table, pa.Table]]:
    streams = {"base": base, "other": other}
    num_bytes = sum(_stored_bytes(stream) for stream in streams.values())
    num_files = min(_MOST_FILES, 1 + num_bytes * _EXPANSION // _FILE_BYTES)
    total = len(base.parts()) + len(other.parts()) + num_files
    done = 0
    for name, stream in streams.items():
        with ExitStack() as stack:
            deal = _Deal(folder, name, num_files, stack)
            for part in range(len(stream.parts())):
                with stream.open(part) as groups:
                    for group in range(len(groups)):
                        deal.add(groups.read(group))
                done += 1
                on_progress(done, total)
    for file in range(num_files):
        ours, theirs = (_read_dealt(folder / f"{name}-{file}") for name in streams)
        if ours is not None and theirs is not None:
            our_ids, their_ids = _whole(ours["doc_id"]), _whole(theirs["doc_id"])
            at = pc.index_in(our_ids, their_ids)
            on_alone(our_ids.filter(at.is_null()), _without(their_ids, our_ids))
            if at.null_count < len(at):
                yield ours.filter(at.is_valid()), theirs.take(at.drop_null())
        else:
            none = pa.array([], pa.string())
            on_alone(*(none if t is None else _whole(t["doc_id"]) for t in (ours, theirs)))
        done += 1
        on_progress(done, total)


class _Deal:
    """Files that documents are dealt out to, all of one id to one."""

    def __init__(self, folder: Path, name: str, num_files: int, stack: ExitStack) -> None:
        self._folder, self._name, self._num_files, self._stack = folder, name, num_files, stack
        self._writers: dict[int, pa.RecordBatchFileWriter] = {}

    def add(self, table: pa.Table) -> None:
        """Deal out the rows of a table."""
        import pandas as pd

        ids = table["doc_id"].to_numpy()
        # Of one key in every process: both runs' documents go to files of one number.
        file_of = (pd.util.hash_array(ids, categorize=False) % self._num_files).astype(np.int64)
        order = np.argsort(file_of, kind="stable")
        dealt = table.take(pa.array(order))
        for file, count in zip(*np.unique(file_of, return_counts=True), strict=True):
            start = int(np.searchsorted(file_of[order], file))
            self._writer(int(file), table.schema).write_table(dealt.slice(start, int(count)))

    def _writer(self, file: int, schema: pa.Schema) -> pa.RecordBatchFileWriter:
        if file not in self._writers:
            path = str(self._folder / f"{self._name}-{file}")
            options = pa.ipc.IpcWriteOptions(compression="lz4")
            self._writers[file] = self._stack.enter_context(
                pa.ipc.new_file(path, schema, options=options)
            )
        return self._writers[file]


def _read_dealt(path: Path) -> pa.Table | None:
    if not path.exists():
        return None
    with pa.memory_map(str(path)) as file:
        return pa.ipc.open_file(file).read_all()


def _stored_bytes(stream: Stream) -> int:
    """Of the columns of a stream, as Parquet holds them."""
    wanted, total = {"doc_id", *stream.columns}, 0
    for name in stream.parts():
        with stream.run.open_part(name) as file:
            for i in range(file.num_row_groups):
                group = file.metadata.row_group(i)
                for j in range(group.num_columns):
                    column = group.column(j)
                    if column.path_in_schema.split(".")[0] in wanted:
                        total += column.total_compressed_size
    return total


def _without(ids: pa.Array, others: pa.Array) -> pa.Array:
    return ids.filter(pc.invert(pc.is_in(ids, others)))


def _whole(column: pa.ChunkedArray) -> pa.Array:
    whole = column.combine_chunks()
    return pa.concat_arrays(whole.chunks) if isinstance(whole, pa.ChunkedArray) else whole


@contextmanager
def _say_where() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise OSError(
            f"the disk of {gettempdir()!r}, where documents are sorted that the two runs hold in "
            f"another order, is full ({os.strerror(error.errno)}); free some of it, or set TMPDIR"
        ) from None
