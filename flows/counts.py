"""The additive counts of a shard or a run: their schema, and how they are merged and kept small."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ..engine import frequencies

COUNTS = pa.schema(
    {
        "panel": pa.string(),
        "source": pa.string(),
        "language": pa.string(),
        "length": pa.int8(),
        "day": pa.string(),
        "bin": pa.int32(),
        "documents": pa.int64(),
        "tokens": pa.int64(),
        "bytes": pa.int64(),
        "nll": pa.float64(),
        "value": pa.float64(),
        "hits": pa.int64(),
    }
)
"""One row a (panel, source, language, length, day, bin). `nll` is a sum in nats. Sums that a panel
lacks are 0: those that its bins tell already, and what nobody asks of it.

    panel            bin                                    value             hits
    bits_per_byte    floor(bits/byte / 0.02), of a document
    length           floor(log2(bytes)), of a document
    sketch/<score>   `sketches.sketch_bin`, of a document
    status/<status>  0; each document is in exactly one     sum of entropy    tokens of rank 1
    token_nll        floor(bits / 0.25), of a token
    entropy          floor(bits / 0.25), of a token
    position         floor(4 log2(p + 1)), p from 0         sum of entropy
    window           floor(4 log2(c)), c inputs read        sum of entropy
    calibration      min(19, floor(20 p)), p of the top 1   sum of p          tokens of rank 1
    rank             floor(log2(rank))

The last bin of bits/byte, of token_nll and of entropy takes all from 100 bits up. The first four
count documents, tokens and bytes; the others count tokens and know no documents or bytes. `nll` is
known of length, status, entropy, position, window and rank. What shards round, and how far, is said
at `round_sums`.

`window` has the tokens of windows that begin within their document: of all before such a token the
model has read the c inputs that its window holds. Counted is what was read and not what was scored,
since recipes begin to score at unlike places: after 1 input, in the middle of the window, or near
the end of one that is filled up on its left. What a window knows at the beginning of a document is
no choice of the recipe, and in `position`: a run of one window a document has no rows here, unless
`conditional` cut contexts on their left.

`length` is floor(log2(bytes)) of a document, rounded down to an even number: 10 is 1 to 4 KiB. It
is of tokens where a document is ids, 0 of nothing, and `ALL_LENGTHS` where lengths are not told
apart, as in `position`, `window` and `calibration`.
`day` is that of documents, `OTHER` where days are not told apart. Of more rows than
`MAX_SHARD_ROWS`, or a run's `MAX_RUN_ROWS`, the smallest groups are told apart no longer: by
length, then by day, then by source and language. No sum is ever lost.
"""
KEYS, SUMS = COUNTS.names[:6], COUNTS.names[6:]
"""What rows are told apart by, and what is added."""
GROUP = KEYS[1:5]
"""What documents are told apart by."""

BITS_PER_BYTE, LENGTH, SKETCH, STATUS = "bits_per_byte", "length", "sketch/", "status/"
TOKEN_NLL, ENTROPY = "token_nll", "entropy"
POSITION, WINDOW = "position", "window"
CALIBRATION, RANK = "calibration", "rank"
TOKEN_PANELS = (TOKEN_NLL, ENTROPY, POSITION, WINDOW, CALIBRATION, RANK)

OTHER = frequencies.OTHER
"""The source, or the day, of what is not told apart."""
ALL_LENGTHS = -1

MAX_SHARD_ROWS = 7000
"""Rows of a shard in histograms of documents, and as many in sketches and in histograms of tokens.
A column of addresses given as `source` must not make the summary as large as the scores."""
MAX_RUN_ROWS = 1 << 20
"""The same of a run, for any corpus: tables of 300 MB, and a GB at most while they are merged."""

# How groups are told apart no longer, step by step.
_STEPS: tuple[dict[str, str | int], ...] = (
    {"length": ALL_LENGTHS},
    {"day": OTHER},
    {"source": OTHER, "language": ""},
)
# Tables added up at a time: memory stays bounded however many shards there are.
_FOLD = 64
# What a sum of floats keeps: significant bits, parts of a nat. Bits of a group's units of weight.
_SUM_BITS, _FRACTIONS, _WEIGHT_BITS = 20, 2.0**16, 7


def merge_counts(tables: Iterable[pa.Table], max_rows: int = MAX_RUN_ROWS) -> pa.Table:
    """Add tables of schema `COUNTS` up, in their order.

    Merging merged tables gives the same, as long as there are no more than `max_rows` rows of
    documents or of tokens. Beyond, what is added up stays, and groups are told apart less.
    """
    return fold(tables, COUNTS, lambda table: _bound(_add_up(table), max_rows)).combine_chunks()


def round_sums(table: pa.Table) -> pa.Table:
    """The counts of a shard, with numbers that take a third of the room.

    - `nll` and `value` become multiples of 2^-16, those of tokens with 20 significant bits at most:
      they stay within 1e-5 nats or 1e-6 of themselves. Multiples of 2^-16 add up exactly, in any
      order, as long as sums stay below 2^37 nats, those of some 5e10 tokens.
    - `tokens` and `bytes` of sketches, which quantiles are weighted by, become multiples of a power
      of two, so that the sum below any bin is within 1 % of that of its group. The group's own sum
      stays what it is.

    Args:
        table: schema `COUNTS`, all rows of a shard, in the order of their keys.
    """
    if table.num_rows == 0:
        return table
    of_tokens = pc.is_in(table["panel"], pa.array(TOKEN_PANELS)).to_numpy()
    for name in ("nll", "value"):
        sums = table[name].to_numpy()
        sums = np.where(of_tokens, round_off(sums, _SUM_BITS), sums)
        table = _replace(table, name, np.rint(sums * _FRACTIONS) / _FRACTIONS)
    is_sketch = pc.starts_with(table["panel"], SKETCH)
    place, starts = np.flatnonzero(is_sketch), _group_starts(table.filter(is_sketch))
    for name in ("tokens", "bytes"):
        sums = table[name].to_numpy().copy()
        sums[place] = _round_weights(sums[place], starts)
        table = _replace(table, name, sums)
    return table


def round_off(numbers: np.ndarray, bits: int) -> np.ndarray:
    """float64 numbers to so many significant bits; what is not finite stays."""
    mantissa, exponent = np.frexp(numbers)
    return np.ldexp(np.rint(np.ldexp(mantissa, bits)), exponent - bits)


def fold(
    tables: Iterable[pa.Table], schema: pa.Schema, reduce: Callable[[pa.Table], pa.Table]
) -> pa.Table:
    """`reduce` over all tables. What is reduced stays in front, so sums run in one order."""
    held = [schema.empty_table()]
    for table in tables:
        held.append(table.select(schema.names).cast(schema))
        if len(held) > _FOLD:
            held = [reduce(pa.concat_tables(held))]
    return reduce(pa.concat_tables(held))


def _add_up(table: pa.Table) -> pa.Table:
    """Rows of equal keys added in the order they stand in; rows come in the order of their keys."""
    if table.num_rows == 0:
        return table
    # Numbers that are ordered as keys are: on these, numpy takes a tenth of Arrow's time on texts.
    keys = [_ordinals(table[name].combine_chunks()) for name in KEYS]
    order = np.lexsort(keys[::-1])
    is_first = np.zeros(len(order), bool)
    is_first[0] = True
    for key in keys:
        ordered = key[order]
        is_first[1:] |= ordered[1:] != ordered[:-1]
    starts, row = np.flatnonzero(is_first), np.cumsum(is_first) - 1
    columns = table.select(KEYS).take(pa.array(order[starts])).columns
    for name in SUMS:
        values = table[name].to_numpy()[order]
        is_whole = pa.types.is_integer(COUNTS.field(name).type)
        columns.append(
            pa.array(np.add.reduceat(values, starts) if is_whole else np.bincount(row, values))
        )
    return pa.Table.from_arrays(columns, schema=COUNTS)


def _replace(table: pa.Table, name: str, values: np.ndarray) -> pa.Table:
    return table.set_column(COUNTS.names.index(name), COUNTS.field(name), pa.array(values))


def _group_starts(table: pa.Table) -> np.ndarray:
    """Rows at which another panel or group begins."""
    keys = [_ordinals(table[name].combine_chunks()) for name in ("panel", *GROUP)]
    is_first = np.ones(table.num_rows, bool)
    is_first[1:] = np.any([key[1:] != key[:-1] for key in keys], axis=0)
    return np.flatnonzero(is_first)


def _round_weights(weights: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """What whole numbers add up to, a group's from each of `starts` on, in units of its own.

    Rounded is what they add up to below each, so that errors never do. A unit is a power of two, 64
    to 128 of which make a group, and 1 for less.
    """
    if len(weights) == 0:
        return weights
    sizes = np.diff(starts, append=len(weights))
    totals = np.add.reduceat(weights, starts)
    below = np.cumsum(weights)
    below -= np.repeat(below[starts] - weights[starts], sizes)
    units = np.int64(1) << np.maximum(np.frexp(totals)[1].astype(np.int64) - _WEIGHT_BITS, 0)
    units = units.repeat(sizes)
    below = np.minimum((below + units // 2) // units * units, totals.repeat(sizes))
    below[starts + sizes - 1] = totals
    rounded = np.diff(below, prepend=0)
    rounded[starts] = below[starts]
    return rounded


def _ordinals(column: pa.Array) -> np.ndarray:
    """Whole numbers that are equal and ordered as the values of a column are."""
    if not pa.types.is_string(column.type):
        return column.to_numpy()
    encoded = column.dictionary_encode()
    places = np.empty(len(encoded.dictionary), np.int32)
    places[pc.sort_indices(encoded.dictionary).to_numpy()] = np.arange(len(places))
    return places[encoded.indices.to_numpy()]


def _bound(table: pa.Table, max_rows: int) -> pa.Table:
    """At most about `max_rows` rows of histograms of documents, of sketches, and of tokens."""
    if table.num_rows <= max_rows:
        return table
    of_tokens = pc.is_in(table["panel"], pa.array(TOKEN_PANELS))
    of_sketches = pc.starts_with(table["panel"], SKETCH)
    masks = (of_tokens, of_sketches, pc.invert(pc.or_(of_tokens, of_sketches)))
    return _add_up(pa.concat_tables([_coarsen(table.filter(mask), max_rows) for mask in masks]))


def _coarsen(table: pa.Table, max_rows: int) -> pa.Table:
    """The largest groups as they are, the others told apart less and less until they fit."""
    kept, whole, told_by = [], table, list(GROUP)
    for step in _STEPS:
        if table.num_rows <= max_rows:
            break
        name, value = next(iter(step.items()))
        is_told = pc.not_equal(table[name], value)
        told, others = table.filter(is_told), table.filter(pc.invert(is_told))
        # Sources are told apart before days, and these before lengths: they have most of the room.
        room = max_rows if "source" in step else max_rows // 4
        # But if all fits with this step, what is left over.
        room = max(room, max_rows - _tell_less(table, step).num_rows)
        # What is large is so by all of its rows, also by those that are kept already.
        mask = _largest(told, room, _weigh(whole, told_by))
        kept.append(told.filter(mask))
        max_rows -= kept[-1].num_rows
        table = _tell_less(pa.concat_tables([told.filter(pc.invert(mask)), others]), step)
        told_by = [key for key in told_by if key not in step]
    return pa.concat_tables([*kept, table])


def _tell_less(table: pa.Table, step: Mapping[str, str | int]) -> pa.Table:
    """The table with these values for what groups were told apart by."""
    for name, value in step.items():
        place, type_ = KEYS.index(name), COUNTS.field(name).type
        same = pa.repeat(pa.scalar(value, type_), table.num_rows)
        table = table.set_column(place, COUNTS.field(name), same)
    return _add_up(table)


def _weigh(table: pa.Table, keys: Sequence[str]) -> pa.Table:
    """`tokens` and `documents` of every group, those of the panel that counts most of them."""
    measures = ("tokens", "documents")
    sums = table.group_by(["panel", *keys], use_threads=False).aggregate(
        [(name, "sum") for name in measures]
    )
    most = sums.group_by(keys, use_threads=False).aggregate(
        [(f"{name}_sum", "max") for name in measures]
    )
    return most.rename_columns([*keys, *measures])


def _largest(table: pa.Table, max_rows: int, weights: pa.Table) -> pa.Array:
    """Which rows are of the groups that weigh most, as many groups as have that many rows."""
    keys = [name for name in weights.column_names if name in GROUP]
    sizes = table.group_by(GROUP, use_threads=False).aggregate([("bin", "count")])
    sizes = sizes.join(weights, keys, join_type="left outer", use_threads=False)
    most = [("tokens", "descending"), ("documents", "descending")]
    sizes = sizes.sort_by([*most, *((key, "ascending") for key in GROUP)])
    num_kept = np.searchsorted(np.cumsum(sizes["bin_count"].to_numpy()), max_rows, side="right")
    largest = sizes.select(GROUP).append_column("kept", pa.repeat(True, len(sizes)))
    rows = table.select(GROUP).append_column("row", pa.array(np.arange(table.num_rows)))
    found = rows.join(largest.slice(0, int(num_kept)), GROUP, join_type="inner", use_threads=False)[
        "row"
    ]
    mask = np.zeros(table.num_rows, bool)
    mask[found.to_numpy()] = True
    return pa.array(mask)
