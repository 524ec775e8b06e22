"""Documents as rows of `COUNTS`: which bins they and their tokens fall into."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from ..engine.records import OK, DocumentRecord, DocumentScore
from .counts import (
    ALL_LENGTHS,
    BITS_PER_BYTE,
    CALIBRATION,
    COUNTS,
    ENTROPY,
    LENGTH,
    POSITION,
    RANK,
    SKETCH,
    STATUS,
    SUMS,
    TOKEN_NLL,
    WINDOW,
)
from .sketches import SKETCHES, WIDTH, sketch_bin

BIN_BITS_PER_BYTE = 0.02
BIN_TOKEN_BITS = 0.25
BINS_PER_OCTAVE = 4
CALIBRATION_BINS = 20

# Two octaves of lengths are one class.
_LENGTH_MASK = ~1
# The last bin of an open scale takes all that is beyond: 100 bits.
_LAST_BITS_PER_BYTE = int(100 / BIN_BITS_PER_BYTE) - 1
_LAST_TOKEN_BITS = int(100 / BIN_TOKEN_BITS) - 1


def _position_starts() -> tuple[np.ndarray, np.ndarray]:
    """First position of every bin that holds one: 2^(b/4) <= p + 1 < 2^((b+1)/4)."""
    edges = np.ceil(np.exp2(np.arange(160) / BINS_PER_OCTAVE)).astype(np.int64) - 1
    bins = np.flatnonzero(np.diff(edges))
    return bins, edges[bins]


_POSITION_BINS, _POSITION_STARTS = _position_starts()


def length_of(record: DocumentRecord) -> int:
    """floor(log2(bytes)), of tokens where a document is ids, 0 of nothing."""
    return max(0, (record.num_bytes or record.num_tokens_scored).bit_length() - 1)


def count_documents(records: Sequence[DocumentRecord]) -> pa.Table:
    """Every panel of documents, a row for each document in it: not added up."""
    length = np.array([length_of(record) for record in records], np.int8)
    groups = {
        "source": pa.array([record.source for record in records], pa.string()),
        "language": pa.array([record.language for record in records], pa.string()),
        "length": pa.array(length & _LENGTH_MASK),
        "day": pa.array([record.day for record in records], pa.string()),
    }
    sums = {
        "documents": np.ones(len(records), np.int64),
        "tokens": np.array([record.num_tokens_scored for record in records], np.int64),
        "bytes": np.array([record.num_bytes for record in records], np.int64),
    }
    nll = {"nll": np.array([-(record.loglikelihood or 0.0) for record in records])}
    others = {
        "value": np.array([record.sum_entropy or 0.0 for record in records]),
        "hits": np.array([record.num_top1 for record in records], np.int64),
    }
    status = pa.array([STATUS + record.status for record in records], pa.string())
    is_scored = np.array([record.status == OK for record in records])
    every = np.arange(len(records))
    tables = [
        _rows(status, groups, every, np.zeros(len(records), np.int32), sums | nll | others),
        _rows(LENGTH, groups, every[is_scored], length, sums | nll),
    ]
    for score in SKETCHES:
        values = np.array([getattr(record, score) for record in records], np.float64)
        known = np.flatnonzero(~np.isnan(values))
        bins = np.zeros(len(records), np.int32)
        bins[known] = sketch_bin(values[known], WIDTH)
        tables.append(_rows(SKETCH + score, groups, known, bins, sums))
        if score == BITS_PER_BYTE:
            bins[known] = _clamp(values[known] / BIN_BITS_PER_BYTE, _LAST_BITS_PER_BYTE)
            tables.append(_rows(BITS_PER_BYTE, groups, known, bins, sums))
    return pa.concat_tables(tables)


class Tokens(NamedTuple):
    """What is counted of a document's tokens, and under which group."""

    group: tuple[str, str, str, int]
    """Source, language, day, class of length."""
    logprob: np.ndarray
    entropy: np.ndarray
    top1_logprob: np.ndarray
    rank: np.ndarray
    num_read: np.ndarray
    """int32: inputs of its window that stand before each; 0 where that begins with the document."""

    @classmethod
    def of(cls, score: DocumentScore) -> Tokens:
        """Those of a document. Holds none of the other columns, which may be far larger."""
        record, tokens = score.record, score.tokens
        length = length_of(record) & _LENGTH_MASK
        group = record.source, record.language, record.day, length
        columns = tokens.logprob, tokens.entropy, tokens.top1_logprob, tokens.rank
        return cls(group, *columns, _count_read(score))


class _Groups(NamedTuple):
    """The groups of documents, and which of them each token is of."""

    keys: dict[str, pa.Array]
    of_token: np.ndarray

    @classmethod
    def of(cls, groups: Sequence[tuple[str, str, str, int]], num_tokens: np.ndarray) -> _Groups:
        places: dict[tuple[str, str, str, int], int] = {}
        of_document = [places.setdefault(group, len(places)) for group in groups]
        columns = zip(
            ("source", "language", "day", "length"), zip(*places, strict=True), strict=True
        )
        keys = {name: pa.array(column, COUNTS.field(name).type) for name, column in columns}
        return cls(keys, np.repeat(np.array(of_document, np.int64), num_tokens))


def count_tokens(documents: Sequence[Tokens]) -> pa.Table:
    """Every panel of tokens, added up: one row for each bin that holds any, of every group."""
    num_tokens = np.array([len(tokens.logprob) for tokens in documents])
    by_length = _Groups.of([tokens.group for tokens in documents], num_tokens)
    together = _Groups.of([(*tokens.group[:3], ALL_LENGTHS) for tokens in documents], num_tokens)
    nll = -_joined(tokens.logprob for tokens in documents)
    entropy = _joined(tokens.entropy for tokens in documents)
    top1 = np.exp(_joined(tokens.top1_logprob for tokens in documents))
    rank = _joined(tokens.rank for tokens in documents)
    is_first = rank == 1.0
    read = np.concatenate([tokens.num_read for tokens in documents])
    later = np.flatnonzero(read)
    every = slice(None)
    per_bin = 1.0 / (BIN_TOKEN_BITS * math.log(2.0))
    both = {"nll": nll, "value": entropy}
    # Panel, how its tokens are told apart, which these are, their bins, what is added.
    binned: list[tuple[str, _Groups, np.ndarray | slice, np.ndarray, dict[str, np.ndarray]]] = [
        (TOKEN_NLL, by_length, every, _clamp(nll * per_bin, _LAST_TOKEN_BITS), {}),
        (ENTROPY, by_length, every, _clamp(entropy * per_bin, _LAST_TOKEN_BITS), {"nll": nll}),
        (POSITION, together, every, _position_bins(num_tokens), both),
        (WINDOW, together, later, _bins_until(int(read.max()))[read[later] - 1], both),
        (
            CALIBRATION,
            together,
            every,
            _clamp(top1 * CALIBRATION_BINS, CALIBRATION_BINS - 1),
            {"value": top1, "hits": is_first},
        ),
        # The exponent of x = m 2^e with m in [0.5, 1): exact where a logarithm would round.
        (RANK, by_length, every, np.frexp(rank)[1].astype(np.int64) - 1, {"nll": nll}),
    ]
    tables = []
    for panel, groups, chosen, bins, sums in binned:
        num_bins = int(bins.max(initial=0)) + 1
        place = groups.of_token[chosen] * num_bins + bins
        count = np.bincount(place)
        held = np.flatnonzero(count)
        owner = pa.array(held // num_bins)
        columns = {"tokens": count[held]}
        for name, values in sums.items():
            added = np.bincount(place, values[chosen], minlength=len(count))[held]
            columns[name] = added.astype(np.int64) if name == "hits" else added
        keys = {name: column.take(owner) for name, column in groups.keys.items()}
        tables.append(_rows(panel, keys, np.arange(len(held)), held % num_bins, columns))
    return pa.concat_tables(tables)


def _rows(
    panel: str | pa.Array,
    groups: Mapping[str, pa.Array],
    chosen: np.ndarray,
    bins: np.ndarray,
    sums: Mapping[str, np.ndarray],
) -> pa.Table:
    """The chosen rows as a table of schema `COUNTS`."""
    place = pa.array(chosen)
    if isinstance(panel, str):
        columns = {"panel": pa.repeat(pa.scalar(panel), len(chosen))}
    else:
        columns = {"panel": panel.take(place)}
    columns |= {name: column.take(place) for name, column in groups.items()}
    columns["bin"] = pa.array(bins[chosen].astype(np.int32))
    for name in SUMS:
        dtype = COUNTS.field(name).type.to_pandas_dtype()
        column = sums[name][chosen] if name in sums else np.zeros(len(chosen), dtype)
        columns[name] = pa.array(column)
    return pa.Table.from_arrays([columns[name] for name in COUNTS.names], schema=COUNTS)


def _joined(columns: Iterable[np.ndarray]) -> np.ndarray:
    return np.concatenate(list(columns), dtype=np.float64)


def _position_bins(num_tokens: np.ndarray) -> np.ndarray:
    """The bins of positions 0, 1, ... of documents with so many tokens, one after another."""
    of_position = _bins_until(int(num_tokens.max()))
    return np.concatenate([of_position[:n] for n in num_tokens])


def _bins_until(stop: int) -> np.ndarray:
    """The bins of positions 0, 1, ..., stop - 1."""
    num_bins = int(np.searchsorted(_POSITION_STARTS, stop))
    widths = np.diff(_POSITION_STARTS[:num_bins], append=stop)
    return np.repeat(_POSITION_BINS[:num_bins], widths)


def _count_read(score: DocumentScore) -> np.ndarray:
    """`Tokens.num_read` of a document."""
    read, first = np.zeros(len(score.tokens), np.int32), 0
    for window in score.windows:
        stop = first + window.num_targets
        if window.start:
            before = window.first_target - window.start
            read[first:stop] = np.arange(before, before + window.num_targets)
        first = stop
    return read


def _clamp(scaled: np.ndarray, last: int) -> np.ndarray:
    """Bins of values already divided by the bin's width, from 0 to `last`; `last` for NaN."""
    return np.fmax(np.fmin(scaled, last), 0.0).astype(np.int64)
