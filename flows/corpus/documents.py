"""What a document is made of: a row's values, by the columns that the user named.

Knows nothing of files: values are what Python's `json` gives, with texts also as bytes and token
ids also as arrays. A row that makes no document becomes one that says why.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...engine.records import Document
from .days import day_of_value


class RowError(Exception):
    """Why a row cannot be scored: becomes the status and the error of its document."""

    def __init__(self, status: str, error: str):
        super().__init__(error)
        self.status = status
        self.error = error


@dataclass(frozen=True, kw_only=True)
class Columns:
    """The columns of a table that make a document. Exactly one of text, messages, ids is set."""

    text: str | None = None
    messages: str | None = None
    ids: str | None = None
    context: str | None = None
    id: str | None = None
    source: str | None = None
    language: str | None = None
    day: str | None = None

    def named(self) -> dict[str, str]:
        """The setting's name -> the column, for those that are set."""
        settings = {f"{key}_column": value for key, value in vars(self).items()}
        return {key: value for key, value in settings.items() if value is not None}

    @property
    def content(self) -> str:
        """The column that is scored."""
        content = self.text or self.messages or self.ids
        assert content is not None
        return content


FILE = Columns(text="file")
"""A file of text as a table of one row."""


def to_document(
    row: Mapping[str, Any] | RowError, columns: Columns, place: str, source: str, day: str
) -> Document:
    """The document of a row. What cannot be scored gets a status and an error, never an exception.

    `place` is its id, `source` its source and `day` its day where no column says otherwise.
    """
    doc_id, language = utf8_safe(place), ""
    try:
        if isinstance(row, RowError):
            raise row
        source = _label(row, columns.source) or source
        language = _label(row, columns.language)
        day = (day_of_value(row.get(columns.day)) if columns.day else "") or day
        if columns.id:
            doc_id = id_of(row, columns.id)
        content = _content(row, columns)
        context = _text(_value(row, columns.context), columns.context) if columns.context else None
    except RowError as error:
        return Document(
            doc_id,
            source=utf8_safe(source),
            language=language,
            day=day,
            status=error.status,
            error=utf8_safe(error.error),
        )
    return Document(
        doc_id, context=context, source=utf8_safe(source), language=language, day=day, **content
    )


def id_of(row: Mapping[str, Any], column: str) -> str:
    """The id of a row as text. Raises RowError for null and for what is no text or number."""
    value = _value(row, column)
    if isinstance(value, bool) or not isinstance(value, (str, bytes, int)):
        raise _wrong(column, value, "text or a whole number")
    return str(value) if isinstance(value, int) else _text(value, column)


def utf8_safe(text: str) -> str:
    """`text` as something that can be written: file names need not be UTF-8."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _content(row: Mapping[str, Any], columns: Columns) -> dict[str, Any]:
    value = _value(row, columns.content)
    if columns.messages:
        content: dict[str, Any] = {"messages": _messages(value, columns.messages)}
    elif columns.ids:
        content = {"input_ids": _ids(value, columns.ids)}
    else:
        content = {"text": _text(value, columns.content)}
    if len(next(iter(content.values()))) == 0:
        raise RowError("empty", "nothing to score: the document is empty")
    return content


def _value(row: Mapping[str, Any], column: str) -> Any:
    if column not in row:
        there = ", ".join(map(str, row)) or "none"
        raise RowError("invalid_value", f"no column {column!r}; there are: {there}")
    value = row[column]
    if isinstance(value, RowError):
        raise value
    return value


def _label(row: Mapping[str, Any], column: str | None) -> str:
    """A source or language: any scalar as text, nothing for null. Labels decide no score, so a
    row is not given up for one."""
    value = row.get(column) if column else None
    if value is None or isinstance(value, RowError):
        return ""
    return utf8_safe(
        value.decode("utf-8", "backslashreplace") if isinstance(value, bytes) else str(value)
    )


def _text(value: Any, column: str) -> str:
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError as error:
            raise RowError(
                "invalid_utf8", f"byte {error.start} of {column!r} is not UTF-8 ({error.reason})"
            ) from None
    if not isinstance(value, str):
        raise _wrong(column, value, "text")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        byte = len(value[: error.start].encode("utf-8"))
        raise RowError(
            "invalid_utf8", f"byte {byte} of {column!r} starts half a surrogate pair, not UTF-8"
        ) from None
    return value


def _ids(value: Any, column: str) -> np.ndarray:
    if isinstance(value, np.ndarray):
        return value
    if not isinstance(value, list):
        raise _wrong(column, value, "a list of whole numbers")
    for position, item in enumerate(value):
        if type(item) is not int:
            raise _wrong(f"{column}[{position}]", item, "a whole number")
    try:
        return np.array(value, np.int64)
    except OverflowError:
        raise RowError(
            "invalid_value", f"column {column!r} holds a number beyond 64 bits"
        ) from None


def _messages(value: Any, column: str) -> list[dict[str, Any]]:
    if not isinstance(value, list):
        raise _wrong(column, value, "a list of {role, content}")
    return [_message(item, f"{column}[{position}]") for position, item in enumerate(value)]


def _message(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _wrong(where, value, "{role, content}")
    for key in ("role", "content"):
        if not isinstance(value.get(key), str):
            found = kind_of(value[key]) if key in value else "nothing"
            raise RowError(
                "invalid_value", f"column {where!r} needs text as {key!r}, found {found}"
            )
        _text(value[key], f"{where}.{key}")
    # Arrow fills in nulls for keys that other messages have; templates ask whether a key is there.
    return {key: inner for key, inner in value.items() if inner is not None}


def _wrong(column: str, value: Any, needed: str) -> RowError:
    return RowError("invalid_value", f"column {column!r} needs {needed}, found {kind_of(value)}")


def kind_of(value: Any) -> str:
    """What a value is called in an error."""
    return "null" if value is None else f"a value of type {type(value).__name__}"
