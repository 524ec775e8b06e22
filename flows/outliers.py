"""Documents worth showing: extremes of a shard or a run, failures, examples of every bar."""

from __future__ import annotations

import hashlib
import math
from bisect import insort
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ..engine.records import OK, DocumentRecord, DocumentScore
from .counts import fold, round_off

OUTLIERS = pa.schema(
    {
        "kind": pa.string(),
        "doc_id": pa.string(),
        "source": pa.string(),
        "language": pa.string(),
        "day": pa.string(),
        "status": pa.string(),
        "error": pa.string(),
        "score": pa.float64(),
        "bits_per_byte": pa.float64(),
        "token_perplexity": pa.float64(),
        "min_k_plus_plus_20": pa.float64(),
        "num_tokens": pa.int64(),
        "num_bytes": pa.int64(),
        "num_windows": pa.int64(),
        "truncated": pa.bool_(),
        "pieces": pa.list_(pa.string()),
        "logprob": pa.list_(pa.float32()),
        "rank": pa.list_(pa.int32()),
        "entropy": pa.list_(pa.float32()),
    }
)
"""One row a document worth showing, and `score`, what it was chosen by.

    kind         the documents                                    score
    lowest       of least bits/byte                               it; nats/token of ids
    highest      of most bits/byte                                it; nats/token of ids
    memorized    of most Min-K%++                                 it
    sample       any that were scored                             a hash of the id
    truncated    any of which tokens were left out                a hash of the id
    example      any of each tenth of bits/byte                   a hash of the id
    failed       any that were not scored, of all reasons alike   a hash of the id

The hash is a number in [0, 1]; the least are taken. Scores have 14 significant bits. The lists hold
a document's first scored tokens, `logprob` and `entropy` to a sixteenth of a nat, and are null for
documents that no heatmap will show."""

LOWEST, HIGHEST, MEMORIZED = "lowest", "highest", "memorized"
SAMPLE, TRUNCATED, EXAMPLE, FAILED = "sample", "truncated", "example", "failed"
MAX_ROWS = {LOWEST: 10, HIGHEST: 10, MEMORIZED: 10, SAMPLE: 3, TRUNCATED: 10, FAILED: 24}
MAX_SHOWN = {LOWEST: 2, HIGHEST: 2, SAMPLE: 2}
"""Documents of a kind that keep their tokens."""
MAX_EXAMPLES = 2
"""Of a tenth of bits/byte."""
MAX_TOKENS = 80
MIN_BYTES, MIN_TOKENS = 64, 16
"""A document below this is an extreme only if all are: those of a few tokens tell nothing."""

_SCORE_BITS, _TOKEN_STEP = 14, 1 / 16
_EXTREMES = (LOWEST, HIGHEST, MEMORIZED)
_SCORES = ("bits_per_byte", "token_perplexity", "min_k_plus_plus_20")
_LISTS = ("pieces", "logprob", "rank", "entropy")
_EXAMPLES_PER_BIT = 10
_LAST_EXAMPLE = 100 * _EXAMPLES_PER_BIT - 1
# Examples are searched for by their ids, so that these are not cut.
_MAX_EXAMPLE_ID = 256
# No token covers more of a document than this, unless its tokenizer skips text.
_MAX_PIECE_BYTES = 256

_Place = tuple[bool, float]


class Chosen:
    """The documents of a shard that are worth showing, of those that it was offered in order."""

    def __init__(self) -> None:
        # The best by kind, and by status of the failed and tenth of the examples.
        self._kept: dict[tuple[str, str | int], list[tuple[_Place, dict[str, Any]]]] = defaultdict(
            list
        )

    def offer(self, score: DocumentScore) -> None:
        """Keep a document for all kinds that it is among the first of so far."""
        record = score.record
        chance = _shorten(_hash(record.doc_id))
        if record.status != OK:
            self._offer(FAILED, record.status, chance, score)
            return
        order = record.bits_per_byte
        if order is None:
            order = record.nll_per_token
        assert order is not None, "a scored document has its scores"
        # Documents are chosen by what is kept, so that those of merged tables are the same.
        order = _shorten(order)
        self._offer(LOWEST, "", order, score)
        self._offer(HIGHEST, "", order, score)
        self._offer(SAMPLE, "", chance, score)
        memorized = record.min_k_plus_plus_20
        if memorized is not None and not math.isnan(memorized):
            self._offer(MEMORIZED, "", _shorten(memorized), score)
        if record.truncated:
            self._offer(TRUNCATED, "", chance, score)
        if record.bits_per_byte is not None and len(record.doc_id) <= _MAX_EXAMPLE_ID:
            tenth = int(min(order * _EXAMPLES_PER_BIT, _LAST_EXAMPLE))
            self._offer(EXAMPLE, tenth, chance, score)

    def rows(self) -> Iterator[dict[str, Any]]:
        """What is kept so far, rows of schema `OUTLIERS`."""
        for kept in self._kept.values():
            for _, row in kept:
                yield row

    def _offer(self, kind: str, which: str | int, order: float, score: DocumentScore) -> None:
        kept, most = self._kept[kind, which], MAX_ROWS.get(kind, MAX_EXAMPLES)
        record = score.record
        is_short = _is_short(record.bits_per_byte, record.num_tokens_scored, record.num_bytes)
        place = _place(kind, order, is_short)
        if len(kept) == most and place >= kept[-1][0]:
            return
        row = _row(kind, order, record)
        insort(kept, (place, row), key=lambda entry: entry[0])
        del kept[most:]
        # Its place can only get worse, so that later documents never bring it back.
        if any(row is shown for _, shown in kept[: MAX_SHOWN.get(kind, 0)]):
            row.update(_shown(score))


def merge_outliers(tables: Iterable[pa.Table]) -> pa.Table:
    """The documents to show of all tables. Merging merged tables gives the same."""
    return fold(tables, OUTLIERS, _choose)


def _hash(doc_id: str) -> float:
    """A number in [0, 1] that is random over ids and always the same for one."""
    digest = hashlib.sha256(doc_id.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") / 2.0**64


def _shorten(score: float) -> float:
    """A score with as many digits as are ever shown."""
    return float(round_off(np.array(score), _SCORE_BITS))


def _row(kind: str, order: float, record: DocumentRecord) -> dict[str, Any]:
    return {
        "kind": kind,
        "doc_id": record.doc_id,
        "source": record.source,
        "language": record.language,
        "day": record.day,
        "status": record.status,
        "error": record.error,
        "score": order,
        **{
            name: _shorten(score)
            for name in _SCORES
            if (score := getattr(record, name)) is not None
        },
        "num_tokens": record.num_tokens_scored,
        "num_bytes": record.num_bytes,
        "num_windows": record.num_windows,
        "truncated": record.truncated,
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
        "logprob": np.rint(tokens.logprob[first] / _TOKEN_STEP) * _TOKEN_STEP,
        "rank": tokens.rank[first],
        "entropy": np.rint(tokens.entropy[first] / _TOKEN_STEP) * _TOKEN_STEP,
    }


def _piece(utf8: bytes) -> str:
    if len(utf8) > _MAX_PIECE_BYTES:
        return utf8[:_MAX_PIECE_BYTES].decode(errors="replace") + "\u2026"
    return utf8.decode(errors="replace")


def _is_short(bits_per_byte: float | None, num_tokens: int, num_bytes: int) -> bool:
    if bits_per_byte is None:
        return num_tokens < MIN_TOKENS
    return num_bytes < MIN_BYTES


def _place(kind: str, order: float, is_short: bool) -> _Place:
    """What the documents of a kind are sorted by, first come first among equals."""
    return kind in _EXTREMES and is_short, -order if kind in (HIGHEST, MEMORIZED) else order


def _choose(table: pa.Table) -> pa.Table:
    """The rows that stay, and of those the lists that stay."""
    # Without the lists, which are most of the table, until it is known which rows stay.
    light = table.drop_columns(list(_LISTS))
    is_example = pc.equal(light["kind"], EXAMPLE).to_numpy(zero_copy_only=False)
    few, examples = np.flatnonzero(~is_example), np.flatnonzero(is_example)
    chosen, shown = _choose_few(light.take(pa.array(few)).to_pylist())
    chosen_examples = _choose_examples(light.take(pa.array(examples)))
    rows = np.concatenate([few[np.array(chosen, np.int64)], examples[chosen_examples]])
    kept = light.take(pa.array(rows))
    with_lists = [None if i is None else few[i] for i in shown] + [None] * len(chosen_examples)
    lists = table.select(list(_LISTS)).take(pa.array(with_lists, pa.int64()))
    columns = [(kept if name in light.column_names else lists)[name] for name in OUTLIERS.names]
    return pa.Table.from_arrays(columns, schema=OUTLIERS).combine_chunks()


def _choose_examples(table: pa.Table) -> np.ndarray:
    """Of each tenth of bits/byte the first by their hashes; there are many rows to choose from."""
    tenths = np.fmin(table["bits_per_byte"].to_numpy() * _EXAMPLES_PER_BIT, _LAST_EXAMPLE)
    tenths = tenths.astype(np.int64)
    order = np.lexsort([table["score"].to_numpy(), tenths])
    ordered = tenths[order]
    # The place of each among those of its tenth.
    place = np.arange(len(order)) - np.searchsorted(ordered, ordered)
    return order[place < MAX_EXAMPLES]


def _choose_few(rows: list[dict[str, Any]]) -> tuple[list[int], list[int | None]]:
    """Places of the rows that stay, and the same where the lists stay too, else None."""
    chosen: list[int] = []
    shown: list[int | None] = []
    for kind, most in MAX_ROWS.items():
        places = {i: _row_place(row) for i, row in enumerate(rows) if row["kind"] == kind}
        of_kind = sorted(places, key=places.__getitem__)
        if kind == FAILED:
            of_kind = _by_turns(of_kind, [row["status"] for row in rows])
        elif of_kind and not places[of_kind[0]][0]:
            of_kind = [i for i in of_kind if not places[i][0]]
        chosen += of_kind[:most]
        num_shown = MAX_SHOWN.get(kind, 0)
        shown += [i if n < num_shown else None for n, i in enumerate(of_kind[:most])]
    return chosen, shown


def _row_place(row: Mapping[str, Any]) -> _Place:
    is_short = _is_short(row["bits_per_byte"], row["num_tokens"], row["num_bytes"])
    return _place(row["kind"], row["score"], is_short)


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
