"""Additive tables of a shard: histograms of its tokens and documents, and a few documents to show.

Made while documents are scored, merged by addition, and all that reports and dashboards read:
none of them opens token or document rows. Every float is a float64 sum taken in a fixed order
(tokens in a document, documents in a shard, shards in a run), so equal scores give equal bytes.
"""

from __future__ import annotations

import hashlib
import math
from bisect import insort
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from ..engine.records import OK, DocumentRecord, DocumentScore, TokenRecords

COUNTS = pa.schema(
    {
        "panel": pa.string(),
        "source": pa.string(),
        "language": pa.string(),
        "bin": pa.int32(),
        "documents": pa.int64(),
        "tokens": pa.int64(),
        "bytes": pa.int64(),
        "nll": pa.float64(),
        "value": pa.float64(),
        "hits": pa.int64(),
    }
)
"""One row a (panel, source, language, bin). `nll` is a sum in nats. Sums a panel lacks are 0.

    panel            bin                                    value             hits
    bits_per_byte    floor(bits/byte / 0.02), of a document
    token_nll        floor(bits / 0.25), of a token
    position         floor(4 log2(p + 1)), p from 0         sum of entropy
    calibration      min(19, floor(20 p)), p of the top 1   sum of p          tokens of rank 1
    rank             floor(log2(rank))
    status/<status>  0; each document is in exactly one     sum of entropy    tokens of rank 1

The last bin of bits/byte and of token_nll takes all from 100 bits up.
"""

OUTLIERS = pa.schema(
    {
        "kind": pa.string(),
        "doc_id": pa.string(),
        "source": pa.string(),
        "language": pa.string(),
        "status": pa.string(),
        "error": pa.string(),
        "score": pa.float64(),
        "bits_per_byte": pa.float64(),
        "token_perplexity": pa.float64(),
        "min_k_plus_plus_20": pa.float64(),
        "num_tokens": pa.int64(),
        "num_bytes": pa.int64(),
        "pieces": pa.list_(pa.string()),
        "logprob": pa.list_(pa.float32()),
        "rank": pa.list_(pa.int32()),
        "entropy": pa.list_(pa.float32()),
    }
)
"""One row a document worth showing. `kind` is `lowest`, `highest`, `sample` or `failed`; `score`
is what it was chosen by: bits/byte (nats/token for a document of ids), or for samples and failures
a number in [0, 1) hashed from the document's id. The lists hold its first scored tokens, and are
null for documents that no heatmap will show."""

BITS_PER_BYTE, TOKEN_NLL, POSITION = "bits_per_byte", "token_nll", "position"
CALIBRATION, RANK, STATUS = "calibration", "rank", "status/"

BIN_BITS_PER_BYTE = 0.02
BIN_TOKEN_BITS = 0.25
BINS_PER_OCTAVE = 4
CALIBRATION_BINS = 20

MAX_SOURCES = 256
"""Pairs of source and language that a shard tells apart; later ones count as `OTHER`. A column of
addresses given as `source` must not make the summary as large as the scores."""
OTHER = "(other)"

LOWEST, HIGHEST, SAMPLE, FAILED = "lowest", "highest", "sample", "failed"
MAX_ROWS = {LOWEST: 10, HIGHEST: 10, SAMPLE: 3, FAILED: 10}
MAX_SHOWN = {LOWEST: 3, HIGHEST: 3, SAMPLE: 3, FAILED: 0}
"""Documents of a kind that keep their tokens."""
MAX_TOKENS = 300
MIN_BYTES, MIN_TOKENS = 64, 16
"""A document below this is an outlier only if all are: extremes of a few tokens tell nothing."""

_LISTS = ("pieces", "logprob", "rank", "entropy")
# The last bin of an open scale takes all that is beyond: 100 bits.
_LAST_BITS_PER_BYTE = int(100 / BIN_BITS_PER_BYTE) - 1
_LAST_TOKEN_NLL = int(100 / BIN_TOKEN_BITS) - 1
# No token covers more of a document than this, unless its tokenizer skips text.
_MAX_PIECE_BYTES = 256
# Tables added up at a time: memory stays bounded however many shards there are.
_FOLD = 64


def _position_starts() -> tuple[np.ndarray, np.ndarray]:
    """First position of every bin that holds one: 2^(b/4) <= p + 1 < 2^((b+1)/4)."""
    edges = np.ceil(np.exp2(np.arange(160) / BINS_PER_OCTAVE)).astype(np.int64) - 1
    bins = np.flatnonzero(np.diff(edges))
    return bins, edges[bins]


_POSITION_BINS, _POSITION_STARTS = _position_starts()


class Summary:
    """The tables of one shard, made by adding its documents in order."""

    def __init__(self) -> None:
        self._panels: dict[tuple[str, str, str], _Bins] = defaultdict(_Bins)
        self._groups: set[tuple[str, str]] = set()
        # A list for every kind, and for every status among the failed.
        self._kept: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)

    def add(self, score: DocumentScore) -> None:
        """Count a document, scored or failed."""
        record, tokens = score.record, score.tokens
        group = self._group(record)
        nll = -record.loglikelihood if record.loglikelihood is not None else 0.0
        sums = {"tokens": record.num_tokens_scored, "bytes": record.num_bytes, "nll": nll}
        self._panels[(STATUS + record.status, *group)].add(
            slice(0, 1),
            documents=1,
            value=record.sum_entropy or 0.0,
            hits=record.num_top1,
            **sums,
        )
        if record.bits_per_byte is not None:
            b = min(int(record.bits_per_byte / BIN_BITS_PER_BYTE), _LAST_BITS_PER_BYTE)
            self._panels[(BITS_PER_BYTE, *group)].add(slice(b, b + 1), documents=1, **sums)
        if len(tokens):
            self._add_tokens(tokens, group)
        self._keep(score)

    def counts(self) -> pa.Table:
        """The histograms so far, schema `COUNTS`, rows in the order of their keys."""
        tables = []
        for (panel, source, language), sums in self._panels.items():
            bins, columns = sums.filled()
            keys = (pa.repeat(pa.scalar(key), len(bins)) for key in (panel, source, language))
            arrays = [*keys, pa.array(bins), *map(pa.array, columns)]
            tables.append(pa.Table.from_arrays(arrays, schema=COUNTS))
        return merge_counts(tables)

    def outliers(self) -> pa.Table:
        """The documents to show so far, schema `OUTLIERS`."""
        rows = [row for kept in self._kept.values() for row in kept]
        return merge_outliers([pa.Table.from_pylist(rows, schema=OUTLIERS)])

    def _group(self, record: DocumentRecord) -> tuple[str, str]:
        group = (record.source, record.language)
        if group not in self._groups:
            if len(self._groups) == MAX_SOURCES:
                return OTHER, ""
            self._groups.add(group)
        return group

    def _add_tokens(self, tokens: TokenRecords, group: tuple[str, str]) -> None:
        nll = -tokens.logprob.astype(np.float64)

        bins = _clamp(nll * (1.0 / (BIN_TOKEN_BITS * math.log(2.0))), _LAST_TOKEN_NLL)
        count = np.bincount(bins)
        self._panels[(TOKEN_NLL, *group)].add(
            slice(0, len(count)), tokens=count, nll=np.bincount(bins, nll)
        )

        num_bins = int(np.searchsorted(_POSITION_STARTS, len(nll)))
        starts = _POSITION_STARTS[:num_bins]
        self._panels[(POSITION, *group)].add(
            _POSITION_BINS[:num_bins],
            tokens=np.diff(starts, append=len(nll)),
            nll=np.add.reduceat(nll, starts),
            value=np.add.reduceat(tokens.entropy.astype(np.float64), starts),
        )

        top1 = np.exp(tokens.top1_logprob.astype(np.float64))
        bins = _clamp(top1 * CALIBRATION_BINS, CALIBRATION_BINS - 1)
        self._panels[(CALIBRATION, *group)].add(
            slice(0, CALIBRATION_BINS),
            tokens=np.bincount(bins, minlength=CALIBRATION_BINS),
            value=np.bincount(bins, top1, minlength=CALIBRATION_BINS),
            hits=np.bincount(bins[tokens.rank == 1], minlength=CALIBRATION_BINS),
        )

        # The exponent of x = m 2^e with m in [0.5, 1): exact where a logarithm would round.
        bins = np.frexp(tokens.rank.astype(np.float64))[1] - 1
        count = np.bincount(bins)
        self._panels[(RANK, *group)].add(
            slice(0, len(count)), tokens=count, nll=np.bincount(bins, nll)
        )

    def _keep(self, score: DocumentScore) -> None:
        record = score.record
        chance = _hash(record.doc_id)
        if record.status != OK:
            self._offer(FAILED, record.status, chance, score)
            return
        order = record.bits_per_byte
        if order is None:
            order = record.nll_per_token
        assert order is not None, "a scored document has its scores"
        self._offer(LOWEST, "", order, score)
        self._offer(HIGHEST, "", order, score)
        self._offer(SAMPLE, "", chance, score)

    def _offer(self, kind: str, status: str, order: float, score: DocumentScore) -> None:
        """Keep a document if it is among the first of its kind so far."""
        kept, most = self._kept[kind, status], MAX_ROWS[kind]
        row = _row(kind, order, score.record)
        if len(kept) == most and _order(row) >= _order(kept[-1]):
            return
        insort(kept, row, key=_order)
        del kept[most:]
        # Its place can only get worse, so that later documents never bring it back.
        if any(row is shown for shown in kept[: MAX_SHOWN[kind]]):
            row.update(_shown(score))


def merge_counts(tables: Iterable[pa.Table]) -> pa.Table:
    """Add tables of schema `COUNTS` up, in their order. Merging merged tables gives the same."""
    return _fold(tables, COUNTS, _sum_counts)


def merge_outliers(tables: Iterable[pa.Table]) -> pa.Table:
    """The documents to show of all tables. Merging merged tables gives the same."""
    return _fold(tables, OUTLIERS, _choose_outliers)


class _Bins:
    """Sums over the bins of one panel and group, dense from bin 0."""

    def __init__(self) -> None:
        self._columns = {
            field.name: np.zeros(0, np.int64 if field.type == pa.int64() else np.float64)
            for field in list(COUNTS)[4:]
        }

    def add(self, bins: slice | np.ndarray, **columns: Any) -> None:
        """Add one value a bin to each of the columns named; no bin may come twice."""
        size = int(bins.stop if isinstance(bins, slice) else bins[-1] + 1)
        grow = size - len(self._columns["tokens"])
        if grow > 0:
            self._columns = {n: np.pad(c, (0, grow)) for n, c in self._columns.items()}
        for name, values in columns.items():
            self._columns[name][bins] += values

    def filled(self) -> tuple[np.ndarray, list[np.ndarray]]:
        """The bins that hold something, int32, and the columns at these bins."""
        held = (self._columns["documents"] > 0) | (self._columns["tokens"] > 0)
        bins = np.flatnonzero(held)
        return bins.astype(np.int32), [column[bins] for column in self._columns.values()]


def _clamp(scaled: np.ndarray, last: int) -> np.ndarray:
    """Bins of values already divided by the bin's width, from 0 to `last`; `last` for NaN."""
    return np.fmax(np.fmin(scaled, last), 0.0).astype(np.intp)


def _hash(doc_id: str) -> float:
    """A number in [0, 1] that is random over ids and always the same for one."""
    digest = hashlib.sha256(doc_id.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") / 2.0**64


def _row(kind: str, order: float, record: DocumentRecord) -> dict[str, Any]:
    return {
        "kind": kind,
        "doc_id": record.doc_id,
        "source": record.source,
        "language": record.language,
        "status": record.status,
        "error": record.error,
        "score": order,
        "bits_per_byte": record.bits_per_byte,
        "token_perplexity": record.token_perplexity,
        "min_k_plus_plus_20": record.min_k_plus_plus_20,
        "num_tokens": record.num_tokens_scored,
        "num_bytes": record.num_bytes,
    }


def _shown(score: DocumentScore) -> dict[str, Any]:
    """The lists of a row: the first scored tokens as text, and what the model thought of them."""
    tokens, first = score.tokens, slice(0, MAX_TOKENS)
    starts, ends = tokens.byte_start[first].tolist(), tokens.byte_end[first].tolist()
    if score.text is None:
        pieces = [str(i) for i in tokens.token_id[first].tolist()]
    else:
        # No more characters than bytes: of a long document only the beginning is encoded.
        utf8 = score.text[: max(ends, default=0)].encode()
        pieces = [_piece(utf8[a:b]) for a, b in zip(starts, ends, strict=True)]
    return {
        "pieces": pieces,
        "logprob": tokens.logprob[first],
        "rank": tokens.rank[first],
        "entropy": tokens.entropy[first],
    }


def _piece(utf8: bytes) -> str:
    if len(utf8) > _MAX_PIECE_BYTES:
        return utf8[:_MAX_PIECE_BYTES].decode(errors="replace") + "\u2026"
    return utf8.decode(errors="replace")


def _is_short(row: Mapping[str, Any]) -> bool:
    if row["bits_per_byte"] is None:
        return bool(row["num_tokens"] < MIN_TOKENS)
    return bool(row["num_bytes"] < MIN_BYTES)


def _order(row: Mapping[str, Any]) -> tuple[bool, float]:
    """What the rows of a kind are sorted by, first come first among equals."""
    ranked = row["kind"] in (LOWEST, HIGHEST)
    return ranked and _is_short(row), -row["score"] if row["kind"] == HIGHEST else row["score"]


def _fold(
    tables: Iterable[pa.Table], schema: pa.Schema, reduce: Callable[[pa.Table], pa.Table]
) -> pa.Table:
    """`reduce` over all tables. What is reduced stays in front, so sums run in one order."""
    held = [schema.empty_table()]
    for table in tables:
        held.append(table.select(schema.names).cast(schema))
        if len(held) > _FOLD:
            held = [reduce(pa.concat_tables(held))]
    return reduce(pa.concat_tables(held))


def _sum_counts(table: pa.Table) -> pa.Table:
    keys, sums = COUNTS.names[:4], COUNTS.names[4:]
    # One thread: rows of a key are added in the order they stand in.
    grouped = table.group_by(keys, use_threads=False).aggregate([(name, "sum") for name in sums])
    grouped = grouped.select([*keys, *(f"{name}_sum" for name in sums)])
    grouped = grouped.rename_columns(COUNTS.names).cast(COUNTS)
    return grouped.sort_by([(key, "ascending") for key in keys]).combine_chunks()


def _choose_outliers(table: pa.Table) -> pa.Table:
    rows = table.drop_columns(list(_LISTS)).to_pylist()
    chosen: list[int] = []
    shown: list[int | None] = []
    for kind, most in MAX_ROWS.items():
        of_kind = sorted(
            (i for i, row in enumerate(rows) if row["kind"] == kind), key=lambda i: _order(rows[i])
        )
        if kind == FAILED:
            of_kind = _by_turns(of_kind, [row["status"] for row in rows])
        elif kind != SAMPLE and of_kind and not _is_short(rows[of_kind[0]]):
            of_kind = [i for i in of_kind if not _is_short(rows[i])]
        chosen += of_kind[:most]
        shown += [i if n < MAX_SHOWN[kind] else None for n, i in enumerate(of_kind[:most])]
    kept = table.take(pa.array(chosen, pa.int64()))
    lists = table.select(list(_LISTS)).take(pa.array(shown, pa.int64()))
    for name in _LISTS:
        kept = kept.set_column(OUTLIERS.get_field_index(name), OUTLIERS.field(name), lists[name])
    return kept.combine_chunks()


def _by_turns(indices: list[int], status: list[str]) -> list[int]:
    """The first of every status, then the second of every status, ...: all kinds of failure show.

    What is cut off the end here would be cut off after any further merge as well.
    """
    turns: dict[str, int] = defaultdict(int)
    keyed = []
    for i in indices:
        keyed.append((turns[status[i]], status[i], i))
        turns[status[i]] += 1
    return [i for _, _, i in sorted(keyed)]
