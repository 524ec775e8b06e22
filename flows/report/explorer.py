"""What the page's own histogram is drawn from: documents by bits/byte in groups, compact.

Filters, weights and cutoffs are the reader's choice, so that the page adds groups up by itself. Its
data is bounded for any corpus: small sources and languages count together, and where that is still
too much, lengths do, and fewer are told apart.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ..summary import BIN_BITS_PER_BYTE, BITS_PER_BYTE, OTHER
from .wording import MAX_LABEL, MAX_TEXT, show

# Sources, languages and whether lengths are told apart: the first that fits is taken.
_LEVELS = ((12, 8, True), (12, 8, False), (12, 4, False), (8, 2, False), (8, 1, False))
_MAX_CELLS = 40_000
_MAX_EXAMPLES = 600
_MAX_EXAMPLE_CHARS = 250_000
# log2 of the bytes with which a class of lengths begins.
_LENGTHS = (0, 8, 10, 12, 14, 16, 18, 20)
_UNITS = ("", "ki", "Mi")
# Longer names, and those with characters that no query can hold, are asked for by digest.
_MAX_NAME = 200


@dataclass(frozen=True)
class Axis:
    """The values of a column that are told apart: their names, and the query's words for each."""

    names: Sequence[str]
    wheres: Sequence[str]
    index: Mapping[Any, int]
    """Which of them a value is; those that are not in here are the last."""

    def of(self, value: Any) -> int:
        """The place of a value among the names."""
        return self.index.get(value, len(self.names) - 1)


@dataclass(frozen=True)
class Explorer:
    """The groups, and the axes that their places stand on: source, language, length."""

    axes: tuple[Axis, Axis, Axis]
    groups: list[list[Any]]
    """`[source, language, length, bins, documents, bytes]`; bins as steps from the one before."""

    @classmethod
    def of(cls, counts: pa.Table) -> Explorer:
        """The groups of a table of schema `COUNTS`."""
        table = counts.filter(pc.field("panel") == BITS_PER_BYTE)
        columns = {name: table[name].to_numpy() for name in ("bin", "documents", "bytes", "length")}
        names = {name: table[name].combine_chunks() for name in ("source", "language")}
        for num_sources, num_languages, by_length in _LEVELS:
            axes = (
                _axis("source", names["source"], columns["bytes"], num_sources),
                _axis("language", names["language"], columns["bytes"], num_languages),
                _length_axis(columns["length"] if by_length else columns["length"][:0]),
            )
            places = [
                _places(axis, values)
                for axis, values in zip(
                    axes, (names["source"], names["language"], columns["length"]), strict=True
                )
            ]
            sizes = [*(len(axis.names) for axis in axes), columns["bin"].max(initial=0) + 1]
            keys = np.ravel_multi_index([*places, columns["bin"]], sizes)
            cells, which = np.unique(keys, return_inverse=True)
            if len(cells) <= _MAX_CELLS:
                break
        # Whole numbers below 2^53 stay whole in float64.
        sums = [
            np.bincount(which, columns[name], len(cells)).astype(np.int64)
            for name in ("documents", "bytes")
        ]
        return cls(axes, _group(np.stack(np.unravel_index(cells, sizes)), *sums))

    def places(self, source: str, language: str, num_bytes: int) -> list[int]:
        """The group that a document is in."""
        length = int(num_bytes).bit_length() - 1 if num_bytes else 0
        values = zip(self.axes, (source, language, length), strict=True)
        return [axis.of(value) for axis, value in values]


def draw_data(
    explorer: Explorer,
    facts: Mapping[str, Any],
    outliers: Iterable[Mapping[str, Any]],
    links: Mapping[str, str],
    behind: Mapping[str, Mapping[str, Sequence[Any]]],
) -> str:
    """All that the page's script knows, as JSON that can stand in HTML.

    Args:
        explorer: the groups.
        facts: `uri` and `tiers` of the run.
        outliers: rows of schema `OUTLIERS`: those with bits/byte are examples of their bar.
        links: ids of the elements that show a document's tokens, by the document's shown id.
        behind: `panel.Behind` by chart and mark.
    """
    uri = str(facts.get("uri") or "RUN").rstrip("/")
    data = {
        "uri": uri,
        "scores": f"read_parquet({quote(f'{uri}/scores/*.parquet')})",
        "tokens": f"read_parquet({quote(f'{uri}/tokens/*.parquet')})"
        if "tokens" in (facts.get("tiers") or ())
        else None,
        "width": BIN_BITS_PER_BYTE,
        "names": [axis.names for axis in explorer.axes],
        "wheres": [axis.wheres for axis in explorer.axes],
        "groups": explorer.groups,
        "examples": _examples(explorer, outliers, links),
        "behind": behind,
    }
    return _to_html(data)


def _to_html(data: Any) -> str:
    """JSON without a character that could end or begin anything in HTML."""
    text = json.dumps(data, ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def quote(text: str) -> str:
    """A string as SQL has it."""
    return "'" + text.replace("'", "''") + "'"


def is_value(column: str, value: str) -> str:
    """The condition that a column of text is `value`, whatever the value holds."""
    if len(value) <= _MAX_NAME and value.isprintable():
        return f"{column} = {quote(value)}"
    digest = hashlib.md5(value.encode("utf-8", "surrogatepass"), usedforsecurity=False)
    return f"md5({column}) = '{digest.hexdigest()}'"


def _axis(column: str, values: pa.Array, weights: np.ndarray, most: int) -> Axis:
    """The heaviest values of a column, and one name for all others."""
    encoded = values.dictionary_encode()
    known = encoded.dictionary.to_pylist()
    weight = np.bincount(encoded.indices.to_numpy(), weights, len(known)).tolist()
    order = sorted(range(len(known)), key=lambda i: (known[i] == OTHER, -weight[i], known[i]))
    ordered = [known[i] for i in order]
    apart = [value for value in ordered[: most if len(ordered) > most else None] if value != OTHER]
    names = [show(value, MAX_LABEL) or f"(no {column})" for value in apart]
    wheres = [is_value(column, value) for value in apart]
    if len(apart) < len(ordered):
        names.append(f"all other {column}s")
        wheres.append(" AND ".join(f"NOT {where}" for where in wheres) or "true")
    return Axis(names, wheres, {value: i for i, value in enumerate(apart)})


def _length_axis(lengths: np.ndarray) -> Axis:
    """Classes of lengths from the smallest to the largest that is there."""
    there = sorted({_length_class(n) for n in np.unique(lengths).tolist()})
    if len(there) < 2:
        return Axis(["all lengths"], ["true"], {})
    names: list[str] = []
    wheres: list[str] = []
    index: dict[int, int] = {}
    for place, c in enumerate(there):
        index |= {n: place for n in range(-1, 64) if _length_class(n) == c}
        if c < 0:
            names.append("length not told apart")
            wheres.append("true")
            continue
        last = c == len(_LENGTHS) - 1
        begin, end = 1 << _LENGTHS[c], None if last else 1 << _LENGTHS[c + 1]
        if c == 0:
            names.append(f"below {_binary(end or 0)}")
            wheres.append(f"num_bytes < {end}")
        elif end is None:
            names.append(f"{_binary(begin)} and more")
            wheres.append(f"num_bytes >= {begin}")
        else:
            names.append(f"{_binary(begin)} to {_binary(end)}")
            wheres.append(f"num_bytes >= {begin} AND num_bytes < {end}")
    return Axis(names, wheres, index)


def _length_class(length: int) -> int:
    """The class of a length; -1 for documents whose length is not told apart."""
    return int(np.searchsorted(_LENGTHS, length, side="right")) - 1


def _binary(num_bytes: int) -> str:
    power = min((num_bytes.bit_length() - 1) // 10, len(_UNITS) - 1)
    return f"{num_bytes >> 10 * power} {_UNITS[power]}B"


def _places(axis: Axis, values: Any) -> np.ndarray:
    """The place of every value on an axis, int64."""
    if isinstance(values, np.ndarray):
        found, which = np.unique(values, return_inverse=True)
        known = found.tolist()
    else:
        encoded = values.dictionary_encode()
        known, which = encoded.dictionary.to_pylist(), encoded.indices.to_numpy()
    return np.array([axis.of(value) for value in known], np.int64)[which]


def _group(cells: np.ndarray, documents: np.ndarray, num_bytes: np.ndarray) -> list[list[Any]]:
    """Cells, in the order of their keys, as a list a group."""
    if not cells.shape[1]:
        return []
    starts = np.flatnonzero(np.any(np.diff(cells[:3], axis=1), axis=0)) + 1
    groups = []
    for cell in np.split(np.arange(cells.shape[1]), starts):
        bins = np.diff(cells[3, cell], prepend=0)
        group = [bins, documents[cell], num_bytes[cell]]
        groups.append([*cells[:3, cell[0]].tolist(), *(values.tolist() for values in group)])
    return groups


def _examples(
    explorer: Explorer, outliers: Iterable[Mapping[str, Any]], links: Mapping[str, str]
) -> list[list[Any]]:
    """`[bits/byte, source, language, length, id, bytes, tokens, link]`, each document once."""
    found = {}
    for row in outliers:
        if row["bits_per_byte"] is None or len(row["doc_id"]) > MAX_TEXT:
            continue
        places = explorer.places(row["source"], row["language"], row["num_bytes"])
        numbers = [row["num_bytes"], row["num_tokens"]]
        link = links.get(show(row["doc_id"]), "")
        bits = round(row["bits_per_byte"], 4)
        found[row["doc_id"], bits] = [bits, *places, row["doc_id"], *numbers, link]
    examples = sorted(found.values(), key=lambda e: (e[0], e[4]))
    step = -(-len(examples) // _MAX_EXAMPLES) or 1
    while len(_to_html(examples[::step])) > _MAX_EXAMPLE_CHARS:
        step *= 2
    return examples[::step]
