"""What to read: a corpus, cut into shards of documents by a plan that depends on nothing else.

The same corpus and the same spec give the same plan, whatever order a file system lists files in
and wherever the corpus lies; what its documents are is summed up in the plan's fingerprint. The
plan is made before any scoring, and is where a user's mistakes are found. Reading a shard needs
the spec and the shard only, so that any process can do it.

Knows nothing of models, scores or outputs.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, fields, replace
from functools import partial
from itertools import islice
from typing import Any, Protocol

from ...engine.records import Document
from ...engine.remote import nearest, redact
from . import hub
from .days import day_of_path, day_of_value
from .documents import FILE, Columns, RowError, id_of, to_document
from .ids import find_twin
from .locations import CorpusError, File, Location
from .plan import Input, Piece, Plan, Shard, group
from .readers import READERS, DatasetReader, Reader, Row, format_of

_THREADS = 16
_WINDOW = 64
_DATASET = "dataset"
_ID_SHOWN = 200
# Rows of which one at least must have a day, and characters of a value that has none.
_DAYS_READ, _VALUE_SHOWN = 1000, 40

LeaveOut = Callable[[Input], bool]
"""Whether an input takes no part in a plan; called from several threads."""


@dataclass(frozen=True, kw_only=True)
class CorpusSpec:
    """What to read, and which of its columns. Raises ValueError for settings that cannot be."""

    uri: str
    """A file, a folder (read all the way down) or a glob, on any fsspec file system (a local path,
    `s3://...`, `memory://...`); `datasets:NAME` or a bare `org/name` that is no existing path for a
    Hugging Face dataset; or a local folder written by `Dataset.save_to_disk`."""
    subset: str | None = None
    """Configuration of a Hugging Face dataset."""
    split: str = "train"
    """Split of a Hugging Face dataset; from the Hub also a slice such as `train[:1000]`."""
    revision: str | None = None
    """Commit, tag or branch of a Hugging Face dataset."""
    text_column: str = "text"
    """Column that is scored, in tables (everything but text files)."""
    messages_column: str | None = None
    """Scores chat messages instead: a column of lists of {role, content}."""
    ids_column: str | None = None
    """Scores token ids instead: a column of lists of whole numbers."""
    context_column: str | None = None
    """Text before the document that is read but not scored (conditional scoring)."""
    id_column: str | None = None
    """Column of document ids, which must be unique. Without one a row is called
    `path#row` (Parquet, datasets) or `path#byte offset` (JSON lines, CSV), and a text file by its
    path, all paths relative to the corpus."""
    source_column: str | None = None
    """Column by which summaries are grouped."""
    language_column: str | None = None
    """Column by which summaries are grouped."""
    day_column: str | None = None
    """Column of the day that a document is of, by which summaries are grouped: dates, timestamps
    (their day in UTC, where they have a time zone) or texts that begin with a date as in
    2026-11-23, 2026/11/23 or 20261123. Where it says none, the path of the input does:
    `dt=2026-11-23`, `2026/11/23/` or a bare 2026-11-23 in it."""
    source: str | None = None
    """Source of every document that no column gives one. Default: for text files the first folder
    below the corpus's root (or the root's own name), for tables the file's stem or the dataset."""
    format: str | None = None
    """`parquet`, `jsonl`, `csv`, `tsv` or `text`; default: by each file's suffix, text for most."""
    limit: int | None = None
    """At most this many documents, the first in plan order."""
    shard_bytes: int = 8 << 20
    """A shard holds about this many bytes of documents. Smaller: more is kept when a task dies and
    work spreads wider; larger: fewer parts. Does not change any document."""
    storage_options: Mapping[str, Any] = field(default_factory=dict, repr=False, hash=False)
    """What the file system is opened with (keys, `endpoint_url`, ...). Never shown or stored."""

    def __post_init__(self) -> None:
        if not self.uri:
            raise CorpusError("uri='': name a file, folder, glob or dataset.")
        if redact(self.uri) != self.uri:
            raise CorpusError(
                f"uri={redact(self.uri)!r} holds a password or a query; give it as "
                "storage_options instead."
            )
        if self.format is not None and self.format not in READERS:
            raise CorpusError(
                f"format={self.format!r} is unknown.{nearest(self.format, list(READERS))} "
                f"Formats: {', '.join(READERS)}; left out, a file's suffix decides."
            )
        if self.limit is not None and self.limit < 1:
            raise CorpusError(f"limit={self.limit}: a whole number from 1 on; left out, all count.")
        if self.shard_bytes < 1:
            raise CorpusError(f"shard_bytes={self.shard_bytes}: a number of bytes from 1 on.")
        contents = {
            "text_column": self.text_column if self.text_column != "text" else None,
            "messages_column": self.messages_column,
            "ids_column": self.ids_column,
        }
        chosen = [f"{key}={value!r}" for key, value in contents.items() if value is not None]
        if len(chosen) > 1:
            raise CorpusError(f"{' and '.join(chosen)}: only one column can be scored.")
        if self.context_column is not None and (self.messages_column or self.ids_column):
            raise CorpusError(
                f"context_column={self.context_column!r} goes with text, not with {chosen[0]}."
            )
        empty = [
            key for key, value in vars(self).items() if key.endswith("_column") and value == ""
        ]
        if empty:
            raise CorpusError(f"{empty[0]}='': name a column.")

    def reading(self) -> dict[str, Any]:
        """How documents are made of inputs: the fields that differ from what they are by default,
        but not where the corpus lies, what opens it, nor how it is cut."""
        elsewhere = ("uri", "storage_options", "shard_bytes")
        return {
            f.name: getattr(self, f.name)
            for f in fields(self)
            if f.name not in elsewhere and getattr(self, f.name) != f.default
        }

    @property
    def columns(self) -> Columns:
        """The columns that make a document of a table's row."""
        text = None if self.messages_column or self.ids_column else self.text_column
        return Columns(
            text=text,
            messages=self.messages_column,
            ids=self.ids_column,
            context=self.context_column,
            id=self.id_column,
            source=self.source_column,
            language=self.language_column,
            day=self.day_column,
        )


class NothingLeft(Exception):
    """All inputs of the corpus are left out."""


def plan_corpus(spec: CorpusSpec, leave_out: LeaveOut | None = None) -> Plan:
    """Cuts the corpus into shards, reading as little of it as that takes.

    The footer or first lines of every input that is not left out are looked at; content is read
    where the file system has no ETags (to hash it), for `limit` (lines are counted) and for
    `id_column` (ids must be unique).

    Inputs that are left out take no part in the plan, nor in its fingerprint; NothingLeft is raised
    if those are all. Raises ValueError, in one line that names the field and its value, for all
    that can be wrong with a corpus as a whole. What is wrong with one document is found by
    `read_shard`.
    """
    corpus = _open(spec)
    num_left_out = 0
    inputs: list[Input] = []
    labels: list[tuple[str, str]] = []
    pieces: list[Piece] = []
    remaining = spec.limit
    for input_, reader in corpus.survey(leave_out or (lambda input_: False)):
        if reader is None:
            num_left_out += 1
            continue
        inputs.append(input_)
        source = reader.source if spec.source is None else spec.source
        labels.append((source, corpus.day(input_)))
        with corpus.plain_errors(input_):
            taken = _pieces(input_, reader, spec, remaining)
        pieces += taken
        if remaining is not None:
            remaining -= sum(piece.num_documents or 0 for piece in taken)
            if remaining == 0:
                break
    if not inputs and num_left_out:
        raise NothingLeft
    if not pieces:
        raise CorpusError(f"uri={redact(spec.uri)!r} holds no documents.")
    if spec.day_column is not None:
        _check_days(corpus, pieces, spec.day_column)
    if spec.id_column is not None:
        _check_ids_differ(corpus, pieces, spec.id_column)
    return Plan(
        inputs=tuple(inputs),
        shards=tuple(group(pieces, spec.shard_bytes)),
        fingerprint=_fingerprint(spec, inputs, labels),
    )


def read_shard(spec: CorpusSpec, shard: Shard) -> Iterator[Document]:
    """The shard's documents in order, streamed.

    A document that cannot be read is one that says so in `status` and `error`. Raises ValueError
    ("corpus changed: ...") if an input is not what it was when the plan was made, and OSError if
    it cannot be reached, which may pass.
    """
    corpus = _open(spec, OSError)
    # Small files cost a round trip each: they are fetched side by side, a shard's worth at most.
    pool = ThreadPoolExecutor(_THREADS)
    try:
        fetched = pool.map(lambda piece: _fetch(corpus, spec, piece), shard.pieces)
        for piece, (reader, rows) in zip(shard.pieces, fetched, strict=True):
            columns = _columns(spec, piece.input)
            source = reader.source if spec.source is None else spec.source
            day = corpus.day(piece.input)
            with corpus.plain_errors(piece.input, OSError):
                for position, row in rows:
                    yield to_document(row, columns, reader.place(position), source, day)
    finally:
        pool.shutdown(cancel_futures=True)


# ---- planning


def _pieces(input_: Input, reader: Reader, spec: CorpusSpec, limit: int | None) -> list[Piece]:
    """The input's pieces, ending with document number `limit` at the latest."""
    pieces = []
    for cut in reader.cuts(_columns(spec, input_), spec.shard_bytes):
        piece = Piece(input_, cut.start, cut.stop, cut.num_bytes, cut.num_documents)
        if limit is not None:
            piece = _shortened(piece, reader, limit)
            limit -= piece.num_documents or 0
        if piece.num_documents != 0:
            pieces.append(piece)
        if limit == 0:
            break
    return pieces


def _shortened(piece: Piece, reader: Reader, limit: int) -> Piece:
    """The piece with its documents counted and at most `limit` of them."""
    count = piece.num_documents
    if count is None:
        rows = reader.rows(piece.start, piece.stop, ())
        count = sum(1 for _ in islice(rows, limit))
        after = next(rows, None)
        if after is None:
            return replace(piece, num_documents=count)
        stop = after[0]
        num_bytes = min(piece.num_bytes, stop - piece.start)
        return replace(piece, stop=stop, num_bytes=num_bytes, num_documents=count)
    if count <= limit:
        return piece
    num_bytes = piece.num_bytes * limit // count
    return replace(piece, stop=piece.start + limit, num_bytes=num_bytes, num_documents=limit)


def _fingerprint(spec: CorpusSpec, inputs: list[Input], labels: list[tuple[str, str]]) -> str:
    # Sources and days come from names outside of the inputs' own: a renamed root gives other
    # documents.
    decides = {
        "rules": 2,
        "inputs": [[i.uri, i.format, i.size, i.etag] for i in inputs],
        "labels": labels,
        "columns": spec.columns.named(),
        "subset": spec.subset,
        "split": spec.split,
        "limit": spec.limit,
    }
    return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()


def _check_days(corpus: _Corpus, pieces: list[Piece], column: str) -> None:
    """Raises CorpusError if there are values in the first rows, and none of them is a day.

    Where the path says a day, a column need not.
    """
    first = next((piece for piece in pieces if piece.format != "text"), None)
    if first is None or corpus.day(first.input):
        return
    with corpus.plain_errors(first.input):
        rows = corpus.reader(first.input).rows(first.start, first.stop, [column])
        taken = [row for _, row in islice(rows, _DAYS_READ) if not isinstance(row, RowError)]
    values = [row[column] for row in taken if row.get(column) is not None]
    if values and not any(map(day_of_value, values)):
        value = values[0]
        if isinstance(value, bytes):
            value = value.decode("utf-8", "replace")
        raise CorpusError(
            f"day_column={column!r}: of the first {len(taken)} rows none has a day there; the "
            f"first value is {repr(value)[:_VALUE_SHOWN]}. Give dates, timestamps or texts "
            "that begin with a date, as 2026-11-23."
        )


def _check_ids_differ(corpus: _Corpus, pieces: list[Piece], column: str) -> None:
    """Raises CorpusError for two documents of one id."""
    twin = find_twin(lambda: _ids(corpus, pieces, column))
    if twin is not None:
        doc_id, first, second = twin
        raise CorpusError(
            f"id_column={column!r}: {doc_id[:_ID_SHOWN]!r} stands twice, at {first} and at "
            f"{second}. Make the ids unique, or leave id_column out."
        )


def _ids(corpus: _Corpus, pieces: list[Piece], column: str) -> Iterator[tuple[str, str]]:
    """Every document's id, as it will be, and place."""
    for piece in pieces:
        reader = corpus.reader(piece.input)
        rows: Iterable[Row] = [(0, RowError("", ""))]
        if piece.format != "text":
            rows = reader.rows(piece.start, piece.stop, [column])
        with corpus.plain_errors(piece.input):
            for position, row in rows:
                place = reader.place(position)
                try:
                    yield place if isinstance(row, RowError) else id_of(row, column), place
                except RowError:
                    yield place, place


# ---- reading


def _fetch(corpus: _Corpus, spec: CorpusSpec, piece: Piece) -> tuple[Reader, Iterable[Row]]:
    """A piece's reader and rows: those of a text file in memory, of a table yet to be read."""
    with corpus.plain_errors(piece.input, OSError):
        corpus.verify(piece.input)
        reader = corpus.reader(piece.input)
        names = list(_columns(spec, piece.input).named().values())
        rows = reader.rows(piece.start, piece.stop, names)
        return reader, list(rows) if piece.format == "text" else rows


def _columns(spec: CorpusSpec, input_: Input) -> Columns:
    return FILE if input_.format == "text" else spec.columns


# ---- the two kinds of corpora


class _Corpus(Protocol):
    def survey(self, leave_out: LeaveOut) -> Iterator[tuple[Input, Reader | None]]:
        """Every input in order, checked; without a reader, and not parsed, if left out."""

    def reader(self, input_: Input) -> Reader:
        """What reads an input of a plan."""

    def day(self, input_: Input) -> str:
        """The day that the input's path names, nothing for none."""

    def verify(self, input_: Input) -> None:
        """Raises CorpusError if the input is not what it was."""

    def plain_errors(
        self, input_: Input, kind: type[Exception] = CorpusError
    ) -> AbstractContextManager[None]:
        """Turns a library's errors about an input into one line."""


class _Files:
    def __init__(self, spec: CorpusSpec, location: Location):
        if spec.split != "train":
            raise CorpusError(
                f"split={spec.split!r} is for Hugging Face datasets, but uri="
                f"{location.address!r} is read as files; 'datasets:NAME' names a dataset."
            )
        self._spec = spec
        self._location = location

    def survey(self, leave_out: LeaveOut) -> Iterator[tuple[Input, Reader | None]]:
        inspect = partial(self._inspect, leave_out=leave_out)
        files = self._location.files()
        formats = [self._spec.format or format_of(file.name) for file in files]
        self._check_columns_apply(formats)
        with ThreadPoolExecutor(_THREADS) as pool:
            for start in range(0, len(files), _WINDOW):
                window = slice(start, start + _WINDOW)
                yield from pool.map(inspect, files[window], formats[window])

    def reader(self, input_: Input) -> Reader:
        return READERS[input_.format](self._location, input_.uri, input_.size)

    def day(self, input_: Input) -> str:
        return day_of_path(self._location.path_of(input_.uri))

    def verify(self, input_: Input) -> None:
        changed = CorpusError(
            f"corpus changed: {input_.uri!r} in uri={self._location.address!r} is not what it was "
            "when the plan was made. Start a new run to score what is there now."
        )
        try:
            stat = self._location.stat(input_.uri)
        except FileNotFoundError:
            raise changed from None
        if stat.size is not None and stat.size != input_.size:
            raise changed
        if stat.etag is not None:
            same = stat.etag == input_.etag
        else:
            # A copied or touched file has another time and may well have the same content.
            same = bool(stat.stamp) and stat.stamp == input_.stamp
            same = same or self._location.known_digest(input_.uri, stat)[0] == input_.etag
        if not same:
            raise changed

    def plain_errors(
        self, input_: Input, kind: type[Exception] = CorpusError
    ) -> AbstractContextManager[None]:
        return self._location.plain_errors("read", input_.uri, kind)

    def _inspect(
        self, file: File, format: str, *, leave_out: LeaveOut
    ) -> tuple[Input, Reader | None]:
        with self._location.plain_errors("read", file.name):
            etag, size = file.stat.etag, file.stat.size
            if etag is None or size is None:
                digest, size = self._location.digest(file.name)
                etag = etag or digest
            input_ = Input(file.name, format, size, etag, file.stat.stamp)
            if leave_out(input_):
                return input_, None
            reader = self.reader(input_)
            reader.check(self._spec.columns)
            return input_, reader

    def _check_columns_apply(self, formats: list[str]) -> None:
        named = self._spec.columns.named()
        if set(formats) == {"text"} and named != {"text_column": "text"}:
            setting, column = next(item for item in named.items() if item[1] != "text")
            raise CorpusError(
                f"{setting}={column!r}: uri={self._location.address!r} holds only text files, "
                "which have no columns. Is it a table? Then say its format: parquet, jsonl, csv "
                "or tsv."
            )


class _HuggingFace:
    def __init__(self, spec: CorpusSpec, dataset: Any, name: str, path: str):
        if spec.format is not None:
            raise CorpusError(
                f"format={spec.format!r} is for files, but uri={spec.uri!r} is a dataset."
            )
        self._spec = spec
        self._dataset = dataset
        self._name = name
        self._day = day_of_path(path)

    def survey(self, leave_out: LeaveOut) -> Iterator[tuple[Input, Reader | None]]:
        etag = f"datasets:{self._dataset._fingerprint}"
        input_ = Input(self._name, _DATASET, len(self._dataset), etag)
        if leave_out(input_):
            yield input_, None
            return
        reader = self.reader(input_)
        reader.check(self._spec.columns)
        yield input_, reader

    def reader(self, input_: Input) -> Reader:
        return DatasetReader(self._dataset, self._name)

    def day(self, input_: Input) -> str:
        return self._day

    def verify(self, input_: Input) -> None:
        if input_.etag != f"datasets:{self._dataset._fingerprint}":
            raise CorpusError(
                f"corpus changed: dataset {self._name!r} is not what it was when the plan was "
                "made. Start a new run to score what is there now, or set revision."
            )

    def plain_errors(
        self, input_: Input, kind: type[Exception] = CorpusError
    ) -> AbstractContextManager[None]:
        return nullcontext()


def _open(spec: CorpusSpec, kind: type[Exception] = CorpusError) -> _Corpus:
    """Raises CorpusError for what cannot be, and `kind` for what cannot be reached."""
    name = hub.dataset_name(spec.uri)
    if name is not None:
        token = spec.storage_options.get("token")
        dataset = hub.load_named(name, spec.subset, spec.split, spec.revision, token, kind)
        # Where on a disk a folder lies is no part of its documents' ids.
        shown = os.path.basename(os.path.abspath(name)) if os.path.exists(name) else name
        return _HuggingFace(spec, dataset, shown, name)
    for setting, value in (("subset", spec.subset), ("revision", spec.revision)):
        if value is not None:
            raise CorpusError(
                f"{setting}={value!r} is for datasets of the Hugging Face Hub, but uri="
                f"{redact(spec.uri)!r} is a path; 'datasets:NAME' names a dataset."
            )
    location = Location(spec.uri, spec.storage_options, kind)
    if location.is_local and not location.is_file and hub.is_saved_dataset(location.root):
        saved = hub.load_saved(location.root, spec.split)
        return _HuggingFace(spec, saved, location.root_name, location.root)
    return _Files(spec, location)
