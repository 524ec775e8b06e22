"""Which tokens a model expects too often or too seldom: a shard's table, and what it tells.

A model whose probabilities are right expects every token as often as it is there, over any corpus
that is drawn as its own was. Where it does not, the difference says what it would rather have read.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ..engine.frequencies import MAX_SOURCES, OTHER, UNIT, Frequency

SHARD = pa.schema(
    {
        "source": pa.string(),
        "token_id": pa.int32(),
        "token": pa.string(),
        "expected": pa.float64(),
        "variance": pa.float64(),
        "observed": pa.int64(),
    }
)
"""Of a shard: one row a source and token that was expected or observed at all. `expected` is the
sum of p(token) over the scored rows, `observed` how often the token was the one that followed;
`variance`, the sum of p (1 - p), is that of `observed` if the model were right. `token` is its
text, bytes that are none as `\\xe2`, empty where there is no tokenizer. Of more than 64 sources the
later ones are one, `(other)`."""
VOCABULARY = SHARD.append(pa.field("partial", pa.bool_()))
"""Of a run: the shards' added up, again 64 sources at most. `partial` is the same in all rows of a
source: whether some of its tokens may be among those of `(other)`, as a shard that has these does
not tell it apart. Its counts are then those of the other shards, `observed` and `expected` of the
same tokens. Never of `(other)` itself."""

_ROWS = 1 << 16
_SUMS = {"expected": np.float64, "variance": np.float64, "observed": np.int64}


def tabulate(found: Mapping[str, Frequency], tokens: Sequence[str]) -> pa.Table:
    """What the engine found, schema `SHARD`, sources in order; `tokens` are all of the model's."""
    tables = [SHARD.empty_table()]
    spelled = pa.array(tokens, pa.string())
    for source in sorted(found):
        own = found[source]
        ids = np.flatnonzero((own.observed > 0) | (own.expected > 0)).astype(np.int32)
        columns = {name: getattr(own, name)[ids] for name in _SUMS}
        tables.append(
            pa.table(
                {
                    "source": pa.repeat(pa.scalar(source), len(ids)),
                    "token_id": ids,
                    "token": spelled.take(ids) if tokens else pa.repeat("", len(ids)),
                    **columns,
                },
                schema=SHARD,
            )
        )
    return pa.concat_tables(tables).combine_chunks()


def merge_vocabulary(tables: Iterable[pa.Table | pa.RecordBatchReader]) -> pa.Table:
    """The tables of shards added up in their order, one a shard; schema `VOCABULARY`.

    They may be read while they are added, and have `source` dictionary-encoded: a text a row takes
    longer than all the rest.
    """
    sums: dict[str, dict[str, np.ndarray]] = {}
    tokens: dict[int, str] = {}
    is_known = np.zeros(0, bool)
    whole: set[str] | None = None
    for table in tables:
        there: set[str] = set()
        for source, own in _split(table):
            there.add(source)
            if source not in sums and len(sums.keys() - {OTHER}) >= MAX_SOURCES:
                source = OTHER
            ids = own["token_id"].to_numpy()
            room = int(ids.max(initial=-1)) + 1
            kept = sums.setdefault(source, {name: np.zeros(0, t) for name, t in _SUMS.items()})
            if len(kept["observed"]) < room:
                for name, values in kept.items():
                    kept[name] = np.concatenate([values, np.zeros(room - len(values), _SUMS[name])])
            for name, values in kept.items():
                # A source of a table has each token once, and what is called (other) may not.
                np.add.at(values, ids, own[name].to_numpy())
            is_known = np.concatenate([is_known, np.zeros(max(0, room - len(is_known)), bool)])
            new = np.flatnonzero(~is_known[ids])
            tokens |= zip(ids[new].tolist(), own["token"].take(new).to_pylist(), strict=True)
            is_known[ids] = True
        if OTHER in there:
            # Whoever is not told apart here may be among those that are not.
            whole = there if whole is None else whole & there
    spelled = [tokens.get(i, "") for i in range(max(tokens, default=-1) + 1)]
    added = tabulate({source: Frequency(**own) for source, own in sums.items()}, spelled)
    in_part = [] if whole is None else sorted(sums.keys() - whole)
    partial = pc.is_in(added["source"], pa.array(in_part, pa.string()))
    return added.append_column(VOCABULARY.field("partial"), partial)


@dataclass(frozen=True)
class Usage:
    """How a token was used, beside how the model expected it to be."""

    token_id: int
    token: str
    observed: int
    expected: float
    z: float
    """(observed - expected) / sqrt(variance), which counts as 1 at least: beyond 5 or so, no matter
    of chance."""


@dataclass(frozen=True)
class Bias:
    """What a model expects of the vocabulary, beside what there is."""

    num_tokens: int
    """Scored rows."""
    divergence: float
    """Kullback-Leibler divergence of the expected from the observed distribution of tokens, bits:
    sum o log2(o / e) over the shares o observed and e expected."""
    too_seldom: list[Usage]
    """Expected too seldom, the most certain ones first."""
    too_often: list[Usage]
    """Expected too often, the most certain ones first."""
    partial: bool
    """Whether more of the source may be among what is not told apart: `VOCABULARY`'s."""


def find_bias(table: pa.Table, source: str | None = None, count: int = 10) -> Bias:
    """Which tokens a run's model expects too seldom and too often.

    Args:
        table: of schema `VOCABULARY`, or `SHARD`.
        source: one of the table's; None adds all of them up.
        count: so many tokens of each kind.

    Raises:
        ValueError: for a source that the table does not have, or a count below 1.
    """
    if count < 1:
        raise ValueError(f"count: {count} is not a number of tokens from 1")
    if source is None:
        same = pa.DictionaryArray.from_arrays(np.zeros(table.num_rows, np.int32), [""])
        own = merge_vocabulary([table.set_column(0, "source", same)])
    else:
        known = table["source"].unique().to_pylist()
        if source not in known:
            raise ValueError(f"source: {source!r} is not one of {', '.join(map(repr, known))}")
        own = table.filter(pc.equal(table["source"], source))
    observed, expected, variance = (
        own[name].to_numpy() for name in ("observed", "expected", "variance")
    )
    # A token that is hardly ever expected and there once is no news: rare ones come, some of many.
    z = (observed - expected) / np.sqrt(np.maximum(variance, 1.0))
    order = np.argsort(z, kind="stable")
    seen = observed > 0
    o = observed[seen] / observed.sum()
    e = np.maximum(expected[seen], UNIT) / expected.sum()

    def tell(places: np.ndarray) -> list[Usage]:
        rows = own.select(["token_id", "token", "observed", "expected"]).take(places).to_pylist()
        return [Usage(**row, z=float(z[i])) for row, i in zip(rows, places, strict=True)]

    return Bias(
        num_tokens=int(observed.sum()),
        divergence=float(np.sum(o * np.log2(o / e))),
        too_seldom=tell(order[::-1][: min(count, (z > 0).sum())]),
        too_often=tell(order[: min(count, (z < 0).sum())]),
        partial="partial" in own.column_names and bool(pc.any(own["partial"]).as_py()),
    )


def _split(
    table: pa.Table | pa.RecordBatchReader,
) -> Iterator[tuple[str, pa.RecordBatch]]:
    """Rows of one source that lie together, some at a time."""
    for batch in table.to_batches(_ROWS) if isinstance(table, pa.Table) else table:
        sources = batch["source"]
        if not pa.types.is_dictionary(sources.type):
            sources = sources.dictionary_encode()
        places = sources.indices.to_numpy()
        starts = [0, *(np.flatnonzero(np.diff(places)) + 1).tolist(), batch.num_rows]
        for start, stop in pairwise(starts):
            if stop > start:
                name = sources.dictionary[int(places[start])].as_py()
                yield name, batch.slice(start, stop - start)
