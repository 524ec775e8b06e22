"""What is inside a corpus's files: one reader a format, all of them giving rows in a fixed order.

A reader knows one input. It checks at planning time that the input is what it is said to be
(`CorpusError`), says where it may be cut, and reads the rows between two cuts. A row that cannot
be read is an `RowError` in its place, so that no other row is lost. What becomes of rows is
`to_document`'s business; what becomes of cuts is the plan's.
"""

from __future__ import annotations

import csv
import json
import posixpath
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from ...engine.remote import nearest
from .documents import FILE, Columns, RowError, kind_of, utf8_safe
from .locations import CorpusError, Location, codec_of, is_garbled

if TYPE_CHECKING:
    import pyarrow as pa

TABLE_SUFFIXES = {
    ".parquet": "parquet",
    ".pq": "parquet",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".csv": "csv",
    ".tsv": "tsv",
}
"""File name suffix -> format; every other suffix is text."""

_PEEK_LINES = 100
_PEEK_BYTES = 1 << 20
_BATCH_ROWS = 64
"""Small, since a row may be megabytes of text."""


@dataclass(frozen=True)
class Cut:
    """A contiguous part of an input."""

    start: int
    stop: int | None
    """None: to the end, where the length is not known before reading."""
    num_bytes: int
    num_documents: int | None


Row = tuple[int, Mapping[str, Any] | RowError]
"""Where the row stands (row number, or byte offset of the line), and its values by column."""


class Reader(Protocol):
    """One input in one format."""

    source: str
    """Documents' source unless a column or the spec says otherwise."""

    def check(self, columns: Columns) -> None:
        """Raises CorpusError if the input is garbled or has not the columns."""

    def cuts(self, columns: Columns, max_bytes: int) -> list[Cut]:
        """The whole input in order, in parts of about `max_bytes` where it can be cut."""

    def rows(self, start: int, stop: int | None, names: Sequence[str]) -> Iterator[Row]:
        """The rows of a cut, with at least the columns `names` of them."""

    def place(self, position: int) -> str:
        """What a row without id is called: unique in the corpus."""


# ---- text


class TextReader:
    """One document a file: its bytes as they are. No newline is translated, and a byte order mark
    stays: it is part of what a model given this file would see, and of the file's size in bytes."""

    def __init__(self, location: Location, name: str, size: int):
        self._location = location
        self._name = name
        self._size = size
        first, _, rest = name.partition("/")
        self.source = _stem(name) if location.is_file else first if rest else location.root_name

    def check(self, columns: Columns) -> None:
        """Any file is text until it is read."""

    def cuts(self, columns: Columns, max_bytes: int) -> list[Cut]:
        return [Cut(0, self._size, self._size, 1)]

    def rows(self, start: int, stop: int | None, names: Sequence[str]) -> Iterator[Row]:
        try:
            with self._location.open(self._name, codec_of(self._name)) as stream:
                yield 0, {FILE.content: stream.read()}
        except OSError as error:
            if not is_garbled(error):
                raise
            yield 0, RowError("invalid_value", f"cannot be decompressed: {error}")

    def place(self, position: int) -> str:
        return self._name


# ---- JSON lines


class JsonlReader:
    """One JSON object a line. A line belongs to the cut that holds its first byte; blank lines
    are no rows. Positions are byte offsets in the uncompressed stream."""

    def __init__(self, location: Location, name: str, size: int):
        self._location = location
        self._name = name
        self._size = size
        self._codec = codec_of(name)
        self.source = _stem(name)

    def check(self, columns: Columns) -> None:
        keys: dict[str, None] = {}
        num_lines, why = 0, "it is empty"
        for position, line in self.lines(0, None):
            if num_lines == _PEEK_LINES or (num_lines and position > _PEEK_BYTES):
                break
            num_lines += 1
            row = self._parsed(position, line)
            if isinstance(row, RowError):
                why = row.error
            else:
                keys.update(dict.fromkeys(row))
        if num_lines and not keys:
            raise CorpusError(
                f"file {self._name!r}: none of its first {num_lines} lines is a JSON object with "
                f"content ({why}). format='text' scores files as they are."
            )
        if num_lines:
            _check_names(self._name, columns, list(keys))

    def cuts(self, columns: Columns, max_bytes: int) -> list[Cut]:
        if self._codec:
            return [Cut(0, None, self._size, None)] if self._size else []
        starts = range(0, self._size, max_bytes)
        stops = [min(start + max_bytes, self._size) for start in starts]
        return [
            Cut(start, stop, stop - start, None) for start, stop in zip(starts, stops, strict=True)
        ]

    def rows(self, start: int, stop: int | None, names: Sequence[str]) -> Iterator[Row]:
        for position, line in self.lines(start, stop):
            yield position, self._parsed(position, line)

    def place(self, position: int) -> str:
        return f"{self._name}#{position}"

    def lines(self, start: int, stop: int | None) -> Iterator[tuple[int, bytes | RowError]]:
        """Offset and bytes of every line that is not blank and starts in [start, stop)."""
        position = start
        with self._location.open(self._name, self._codec) as stream:
            if start:
                # From the byte before: if it ends a line, a line starts at `start`.
                stream.seek(start - 1)
                position += len(stream.readline()) - 1
            while stop is None or position < stop:
                try:
                    line = stream.readline()
                except OSError as error:
                    if not is_garbled(error):
                        raise
                    yield position, RowError("invalid_value", f"cannot be decompressed: {error}")
                    return
                if not line:
                    return
                if line.strip():
                    yield position, line
                position += len(line)

    def _parsed(self, position: int, line: bytes | RowError) -> Mapping[str, Any] | RowError:
        if isinstance(line, RowError):
            return line
        try:
            # A byte order mark belongs to the file here, not to any document.
            text = line.decode("utf-8-sig" if position == 0 else "utf-8")
        except UnicodeDecodeError as error:
            start = position + error.start
            return RowError(
                "invalid_utf8", f"byte {start} of the file is not UTF-8 ({error.reason})"
            )
        try:
            row = json.loads(text)
        except (ValueError, RecursionError) as error:
            return RowError("invalid_value", f"the line is not JSON: {error}")
        if not isinstance(row, dict):
            return RowError("invalid_value", f"the line is not an object but {kind_of(row)}")
        return row


# ---- CSV


class CsvReader:
    """Rows of text between delimiters, below a first row that names the columns.

    Values may be quoted with ", and then hold delimiters, line ends and doubled quotes. A row
    belongs to the cut that holds its first byte; blank lines are no rows. Positions are byte
    offsets in the uncompressed stream.
    """

    def __init__(self, location: Location, name: str, size: int, delimiter: str = ","):
        self._location = location
        self._name = name
        self._size = size
        self._codec = codec_of(name)
        self._delimiter = delimiter
        self._known_header: list[str] | None = None
        self.source = _stem(name)

    def check(self, columns: Columns) -> None:
        for setting, value in columns.named().items():
            if setting in ("messages_column", "ids_column"):
                raise CorpusError(
                    f"{setting}={value!r}: lists needed, and the columns of {self._name!r} hold "
                    "text alone. Use JSON lines or Parquet."
                )
        header = next(self._records(0, None), None)
        if header is not None and isinstance(header[1], RowError):
            raise CorpusError(
                f"file {self._name!r}: its first row, which names the columns, cannot be read "
                f"({header[1].error}). format='text' scores files as they are."
            )
        if header is not None:
            _check_names(self._name, columns, self._header)

    def cuts(self, columns: Columns, max_bytes: int) -> list[Cut]:
        if self._codec:
            return [Cut(0, None, self._size, None)] if self._size else []
        # A line end may stand inside quotes, so only reading from the front tells where rows begin.
        starts = [0]
        for position, _ in self._records(0, None):
            if position - starts[-1] >= max_bytes:
                starts.append(position)
        stops = [*starts[1:], self._size]
        return [
            Cut(start, stop, stop - start, None)
            for start, stop in zip(starts, stops, strict=True)
            if start < stop
        ]

    def rows(self, start: int, stop: int | None, names: Sequence[str]) -> Iterator[Row]:
        header: list[str] | None = None if start == 0 else self._header
        for position, values in self._records(start, stop):
            if isinstance(values, RowError):
                yield position, values
            elif header is None:
                header = _names(values)
            elif len(values) != len(header):
                error = f"the row has {len(values)} values, and the first row names {len(header)}"
                yield position, RowError("invalid_value", error)
            else:
                texts = (value.encode("utf-8", "surrogateescape") for value in values)
                yield position, dict(zip(header, texts, strict=True))

    def place(self, position: int) -> str:
        return f"{self._name}#{position}"

    @property
    def _header(self) -> list[str]:
        if self._known_header is None:
            values = next(self._records(0, None))[1]
            assert not isinstance(values, RowError), "it has been checked"
            self._known_header = _names(values)
        return self._known_header

    def _records(self, start: int, stop: int | None) -> Iterator[tuple[int, list[str] | RowError]]:
        """Offset and values of every row that starts in [start, stop), the first row too.

        `start` is where a row starts. Bytes that are not UTF-8 are surrogates (PEP 383).
        """
        position = after = start
        with self._location.open(self._name, self._codec) as stream:
            if start:
                stream.seek(start)

            def lines() -> Iterator[str]:
                nonlocal after
                for line in stream:
                    # A byte order mark belongs to the file here, not to any name.
                    encoding = "utf-8" if after else "utf-8-sig"
                    after += len(line)
                    yield line.decode(encoding, "surrogateescape")

            # Longer values than the library's limit are documents, not mistakes.
            csv.field_size_limit(sys.maxsize)
            parsed = csv.reader(lines(), delimiter=self._delimiter, strict=True)
            while stop is None or position < stop:
                try:
                    values: list[str] | RowError = next(parsed)
                except StopIteration:
                    return
                except csv.Error as error:
                    values = RowError("invalid_value", f"the row is not CSV: {error}")
                except OSError as error:
                    if not is_garbled(error):
                        raise
                    yield position, RowError("invalid_value", f"cannot be decompressed: {error}")
                    return
                if values:
                    yield position, values
                position = after


def _names(header: Sequence[str]) -> list[str]:
    return [utf8_safe(name) for name in header]


# ---- Parquet


class ParquetReader:
    """A Parquet file, cut between row groups, and inside those that are larger than asked for."""

    def __init__(self, location: Location, name: str, size: int):
        self._location = location
        self._name = name
        self._known_footer: Any = None
        self.source = _stem(name)

    def check(self, columns: Columns) -> None:
        try:
            schema = self._footer.schema.to_arrow_schema()
        except (OSError, ValueError) as error:
            if not is_garbled(error):
                raise
            raise CorpusError(
                f"file {self._name!r}: not a whole Parquet file (is it truncated?): "
                f"{self._location.scrub(error)}"
            ) from None
        _check_schema(self._name, columns, schema)

    def cuts(self, columns: Columns, max_bytes: int) -> list[Cut]:
        cuts: list[Cut] = []
        row = 0
        for group in self._groups():
            size = _column_bytes(group, columns.content)
            cuts += _even_cuts(row, group.num_rows, size, max_bytes)
            row += group.num_rows
        return cuts

    def rows(self, start: int, stop: int | None, names: Sequence[str]) -> Iterator[Row]:
        assert stop is not None
        import pyarrow.parquet as pq

        with self._location.open(self._name) as stream:
            # A request a needed column of a row group, by this thread alone: threads of Arrow's may
            # hold Python's file for longer than a call, and a process that ends then is aborted.
            file = pq.ParquetFile(
                stream, metadata=self._footer, pre_buffer=False, page_checksum_verification=True
            )
            first = 0
            for index, group in enumerate(self._groups()):
                low, high = max(start, first), min(stop, first + group.num_rows)
                if low < high:
                    batches = file.iter_batches(
                        _BATCH_ROWS,
                        row_groups=[index],
                        columns=list(dict.fromkeys(names)),
                        use_threads=False,
                    )
                    yield from self._group_rows(batches, index, first, low, high)
                first += group.num_rows

    def place(self, position: int) -> str:
        return f"{self._name}#{position}"

    @property
    def _footer(self) -> Any:
        # Python 3.11's cached_property has one lock for all readers, which work side by side.
        if self._known_footer is None:
            import pyarrow.parquet as pq

            with self._location.open(self._name) as stream:
                self._known_footer = pq.read_metadata(stream)
        return self._known_footer

    def _group_rows(
        self, batches: Iterator[Any], index: int, first: int, low: int, high: int
    ) -> Iterator[Row]:
        """Rows [low, high) of the file, all in row group `index`, which starts at `first`."""
        position = first
        try:
            for batch in batches:
                inside = slice(max(low - position, 0), max(high - position, 0))
                for offset, row in enumerate(_batch_rows(batch, inside)):
                    yield position + inside.start + offset, row
                position += batch.num_rows
                if position >= high:
                    return
        except (OSError, ValueError) as error:
            if not is_garbled(error):
                raise
            lost = RowError("invalid_value", f"row group {index} is garbled: {error}")
            yield from ((row, lost) for row in range(max(low, position), high))

    def _groups(self) -> list[Any]:
        return [self._footer.row_group(index) for index in range(self._footer.num_row_groups)]


# ---- Hugging Face datasets


class DatasetReader:
    """A split of a Hugging Face dataset, memory-mapped by `datasets`."""

    def __init__(self, dataset: Any, name: str):
        self._dataset = dataset
        self._name = name
        self.source = name

    def check(self, columns: Columns) -> None:
        _check_schema(self._name, columns, self._dataset.data.schema)

    def cuts(self, columns: Columns, max_bytes: int) -> list[Cut]:
        size = self._dataset.data.column(columns.content).nbytes
        return _even_cuts(0, len(self._dataset), size, max_bytes)

    def rows(self, start: int, stop: int | None, names: Sequence[str]) -> Iterator[Row]:
        assert stop is not None
        part = self._dataset.select(range(start, stop)).with_format("arrow")
        part = part.select_columns(list(dict.fromkeys(names)))
        position = start
        for table in part.iter(_BATCH_ROWS):
            for row in _batch_rows(table, slice(0, table.num_rows)):
                yield position, row
                position += 1

    def place(self, position: int) -> str:
        return f"{self._name}#{position}"


READERS: dict[str, Callable[[Location, str, int], Reader]] = {
    "parquet": ParquetReader,
    "jsonl": JsonlReader,
    "csv": CsvReader,
    "tsv": partial(CsvReader, delimiter="\t"),
    "text": TextReader,
}
"""The formats of files, made from where, which and how many bytes. A new one is a class like those
above, and a line here."""


def format_of(name: str) -> str:
    """The format that a file name's suffix says, below that of its compression."""
    codec = codec_of(name)
    suffix = posixpath.splitext(posixpath.splitext(name)[0] if codec else name)[1].lower()
    format = TABLE_SUFFIXES.get(suffix, "text")
    if format == "parquet" and codec:
        raise CorpusError(f"file {name!r}: Parquet is compressed inside; unpack the file first.")
    return format


# ---- Arrow


def _batch_rows(batch: pa.RecordBatch | pa.Table, inside: slice) -> Iterator[Mapping[str, Any]]:
    part = batch.slice(inside.start, max(inside.stop - inside.start, 0))
    names = part.schema.names
    columns = [_python_values(part.column(index)) for index in range(len(names))]
    for values in zip(*columns, strict=True):
        yield dict(zip(names, values, strict=True))


def _python_values(column: Any) -> list[Any]:
    """A column's values; texts as bytes, since Arrow takes it on trust that they are UTF-8."""
    import pyarrow as pa

    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if _is_text(column.type):
        return list(column.cast(pa.large_binary()).to_pylist())
    if _is_ids(column.type):
        return [_ids_value(value) for value in column]
    return [_python_value(value) for value in column]


def _python_value(value: Any) -> Any:
    try:
        return value.as_py()
    except UnicodeDecodeError as error:
        return RowError(
            "invalid_utf8", f"byte {error.start} of a text is not UTF-8 ({error.reason})"
        )
    except (ValueError, OverflowError, KeyError):
        # Dates beyond Python's years, time zones that it does not know.
        return RowError("invalid_value", f"a value of type {value.type} that cannot be read")


def _ids_value(value: Any) -> Any:
    if not value.is_valid:
        return None
    if value.values.null_count:
        return RowError("invalid_value", "a null among the ids")
    return value.values.to_numpy(zero_copy_only=False).astype(np.int64)


def _is_text(type_: Any) -> bool:
    import pyarrow as pa

    kinds = pa.types
    if kinds.is_dictionary(type_):
        return _is_text(type_.value_type)
    texts = (kinds.is_string, kinds.is_large_string, kinds.is_string_view)
    return any(is_(type_) for is_ in (*texts, kinds.is_binary, kinds.is_large_binary))


def _is_day(type_: Any) -> bool:
    import pyarrow as pa

    return bool(pa.types.is_date(type_) or pa.types.is_timestamp(type_))


def _is_list(type_: Any) -> bool:
    import pyarrow as pa

    lists = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    return any(is_(type_) for is_ in lists)


def _is_whole(type_: Any) -> bool:
    import pyarrow as pa

    return bool(pa.types.is_integer(type_))


def _is_ids(type_: Any) -> bool:
    return _is_list(type_) and _is_whole(type_.value_type)


def _is_messages(type_: Any) -> bool:
    import pyarrow as pa

    return _is_list(type_) and pa.types.is_struct(type_.value_type)


# setting -> what its column must be, said and checked
_NEEDED: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "text_column": ("text", _is_text),
    "context_column": ("text", _is_text),
    "messages_column": ("lists of {role, content}", _is_messages),
    "ids_column": ("lists of whole numbers", _is_ids),
    "id_column": ("text or whole numbers", lambda type_: _is_text(type_) or _is_whole(type_)),
    "day_column": ("dates, timestamps or text", lambda type_: _is_text(type_) or _is_day(type_)),
}


def _check_schema(name: str, columns: Columns, schema: Any) -> None:
    import pyarrow as pa

    _check_names(name, columns, schema.names)
    for setting, column in columns.named().items():
        needed, is_ = _NEEDED.get(setting, ("", lambda _: True))
        type_ = schema.field(column).type
        if not is_(type_) and not pa.types.is_null(type_):
            raise CorpusError(
                f"{setting}={column!r}: {needed} needed, but {name!r} holds {type_} in that column."
            )


def _check_names(name: str, columns: Columns, names: list[str]) -> None:
    for setting, column in columns.named().items():
        if column not in names:
            raise CorpusError(
                f"{setting}={column!r}: no such column in {name!r}.{nearest(column, names)} "
                f"There are: {', '.join(names)}."
            )


def _column_bytes(group: Any, column: str) -> int:
    """Uncompressed bytes of one column of a row group, nested ones included."""
    chunks = (group.column(index) for index in range(group.num_columns))
    return sum(
        chunk.total_uncompressed_size
        for chunk in chunks
        if chunk.path_in_schema == column or chunk.path_in_schema.startswith(f"{column}.")
    )


def _even_cuts(first: int, num_rows: int, num_bytes: int, max_bytes: int) -> list[Cut]:
    """Rows [first, first + num_rows), weighing `num_bytes` together, in parts of equal rows."""
    num_cuts = max(1, min(num_rows, -(-num_bytes // max_bytes)))
    edges = [num_rows * index // num_cuts for index in range(num_cuts + 1)]
    weights = [num_bytes * index // num_cuts for index in range(num_cuts + 1)]
    return [
        Cut(
            first + edges[i],
            first + edges[i + 1],
            weights[i + 1] - weights[i],
            edges[i + 1] - edges[i],
        )
        for i in range(num_cuts if num_rows else 0)
    ]


def _stem(name: str) -> str:
    base = posixpath.basename(name)
    if codec_of(base):
        base = posixpath.splitext(base)[0]
    return posixpath.splitext(base)[0]
