"""Two runs' distributions over the vocabulary, token by token.

Of whole distributions (tier `logits`) the divergences are exact; of the likeliest tokens and the
mass of the rest (tier `topk`) they are lower bounds, since outcomes that are not told apart cannot
differ.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ...engine.pipeline import EngineSettings
from ..parts import LOGITS_DTYPES, PartFile, schema_of
from ..run import Run
from .divergences import Candidates, Divergences, diverge, diverge_coarsely
from .documents import COLUMNS, same_text
from .flat import join_column, unpack
from .pairing import OnProgress, Stream, pair, part_names
from .sums import EXACT_VALUES, Grouped, Spread, Spreads
from .tokens import Estimate, NotComparable, binomial

PERCENTS = ("99.9", "99", "95", "90", "50", "10", "5", "1")
EXACT, BOUND = "logits", "topk"
_GROUP_VALUES = EXACT_VALUES // 128
_ROWS_AT_ONCE = 1 << 15


@dataclass(frozen=True)
class KlDrift:
    """Of the tokens of a source and language."""

    source: str
    language: str
    tokens: int
    kl: Spread
    same_top: Estimate


@dataclass(frozen=True)
class Distributions:
    """How far distributions are apart."""

    tier: str
    """`logits`: exact; `topk`: lower bounds."""
    tokens: int
    kl: Spread
    """KL(base || other), nats."""
    js: Spread
    """Jensen-Shannon divergence, nats; at most ln 2."""
    same_top: Estimate
    groups: list[KlDrift]


def find_shared_tier(base: Run, other: Run) -> str:
    """The best tier that both runs kept.

    Raises:
        NotComparable: if there is none.
    """
    for tier in (EXACT, BOUND):
        if tier in base.tiers and tier in other.tiers:
            return tier
    raise NotComparable(
        "the runs did not both keep logits, or topk; score both with --keep topk (a lower bound) "
        "or --keep logits (exact, and large)"
    )


def compare_distributions(base: Run, other: Run, on_progress: OnProgress) -> Distributions:
    """Add up divergences, shard by shard.

    Raises:
        NotComparable: if neither tier was kept by both, or their vocabularies are not the same.
    """
    tier = find_shared_tier(base, other)
    tally = _Tally()
    pairs = _pair_logits if tier == EXACT else _pair_topk
    for labels, found in pairs(base, other, on_progress):
        tally.add(labels, found)
    if not tally.tokens:
        raise NotComparable("no document has its distributions in both, of the same tokens")
    return tally.sum_up(tier)


class _Sums:
    """Of the tokens of a group."""

    def __init__(self, most: int = _GROUP_VALUES) -> None:
        self.kl = Spreads(PERCENTS, most)
        self.tokens = self.same = 0

    def add(self, found: Divergences, tokens: np.ndarray | slice) -> None:
        self.kl.add(found.kl_T[tokens])
        same_top = found.same_top_T[tokens]
        self.tokens += len(same_top)
        self.same += int(same_top.sum())


class _Tally:
    def __init__(self) -> None:
        self._sums = Grouped(_Sums)
        self._sums.total = _Sums(EXACT_VALUES)
        self._js = Spreads(PERCENTS)

    @property
    def tokens(self) -> int:
        return self._sums.total.tokens

    def add(self, labels: pa.Table, found: Divergences) -> None:
        """Count tokens, of which `labels` has the source and language of each."""
        self._sums.total.add(found, slice(None))
        self._js.add(found.js_T)
        for sums, tokens in self._sums.split(labels):
            sums.add(found, tokens)

    def sum_up(self, tier: str) -> Distributions:
        total = self._sums.total
        groups = [
            KlDrift(*key, sums.tokens, sums.kl.spread(), binomial(sums.same, sums.tokens))
            for key, sums in self._sums.groups.items()
        ]
        return Distributions(
            tier=tier,
            tokens=total.tokens,
            kl=total.kl.spread(),
            js=self._js.spread(),
            same_top=binomial(total.same, total.tokens),
            groups=sorted(groups, key=lambda g: (-g.tokens, g.source, g.language)),
        )


_Pairs = Iterator[tuple[pa.Table, Divergences]]


# ---- the likeliest tokens --------------------------------------------------------------------


def _pair_topk(base: Run, other: Run, on_progress: OnProgress) -> _Pairs:
    streams = [open_topk(run, labels=run is base) for run in (base, other)]
    for ours, theirs in pair(*streams, on_progress=on_progress):
        same = pc.equal(ours["token_id"], theirs["token_id"])
        ours, theirs = ours.filter(same), theirs.filter(same)
        lengths = pc.binary_length(ours["token_id"]).to_numpy() // 4
        rows = np.repeat(np.arange(len(lengths)), lengths)
        kept = [read_candidates(table) for table in (ours, theirs)]
        for start in range(0, len(rows), _ROWS_AT_ONCE):
            block = slice(start, start + _ROWS_AT_ONCE)
            found = diverge_coarsely(*(candidates.some(block) for candidates in kept))
            yield ours.select(["source", "language"]).take(pa.array(rows[block])), found


def open_topk(run: Run, *, labels: bool = False) -> Stream:
    """What candidates are made of: the columns of the tier `topk` that a run has."""
    names = schema_of(BOUND, run.plan["model"]["vocab_size"]).names
    columns = [name for name in names if name.startswith("top_")]
    return Stream(run, BOUND, ["token_id", *columns, "log_tail_mass"], labels)


def read_candidates(table: pa.Table) -> Candidates:
    """The candidates of rows of the tier `topk`, the tokens of one document after another's."""
    log_tail = unpack(table["log_tail_mass"], "<f4")
    shape = (len(log_tail), -1) if len(log_tail) else (0, 0)
    ids = join_column(table, "top_id", "<i4").reshape(shape)
    logprobs = join_column(table, "top_logprob", "<u2").view("<f2").reshape(shape)
    return Candidates(ids, logprobs, log_tail)


# ---- all of the vocabulary -------------------------------------------------------------------


def _pair_logits(base: Run, other: Run, on_progress: OnProgress) -> _Pairs:
    sizes = [run.plan["model"]["vocab_size"] for run in (base, other)]
    if sizes[0] != sizes[1]:
        raise NotComparable(
            f"logits are over {sizes[0]:,} tokens in A and {sizes[1]:,} in B; score both with "
            "--keep topk"
        )
    streams = [Stream(run, "scores", COLUMNS) for run in (base, other)]
    with Chunks(base) as ours, Chunks(other) as theirs:
        for mine, yours in pair(*streams, on_progress=on_progress):
            same = pa.array(same_text(mine, yours))
            for row in mine.filter(same).select(["doc_id", "source", "language"]).to_pylist():
                doc_id = row.pop("doc_id")
                if ours.num_rows(doc_id) != theirs.num_rows(doc_id):
                    continue
                for found in diverge_rows(ours.read(doc_id), theirs.read(doc_id)):
                    yield pa.Table.from_pylist([row] * len(found.kl_T), _LABELS), found


_LABELS = pa.schema([("source", pa.string()), ("language", pa.string())])


@dataclass(frozen=True)
class _Chunk:
    """Where consecutive rows of a document lie."""

    part: int
    group: int
    row: int
    num_rows: int


class Chunks:
    """The stored rows of a run's documents. One part is held open."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._names = part_names(run, EXACT)
        self._dtype = np.dtype(LOGITS_DTYPES[run.plan["logits_dtype"]]).newbyteorder("<")
        self._vocab_size = run.plan["model"]["vocab_size"]
        self._open: tuple[int, ExitStack, PartFile] | None = None
        # An entry for every few megabytes that are stored.
        self._places: dict[str, list[_Chunk]] = {}
        for part in range(len(self._names)):
            self._index(part)

    def __enter__(self) -> Chunks:
        return self

    def __exit__(self, *_: object) -> None:
        if self._open is not None:
            self._open[1].close()
            self._open = None

    def _index(self, part: int) -> None:
        with self._run.open_part(self._names[part]) as file:
            rows = file.read(["doc_id", "num_rows"])
            counts = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
        places = ((group, row) for group, count in enumerate(counts) for row in range(count))
        columns = (rows[name].to_pylist() for name in ("doc_id", "num_rows"))
        for doc_id, num_rows, (group, row) in zip(*columns, places, strict=True):
            self._places.setdefault(doc_id, []).append(_Chunk(part, group, row, num_rows))

    def num_rows(self, doc_id: str) -> int:
        """Of a document, 0 if nothing of it is stored."""
        return sum(chunk.num_rows for chunk in self._places.get(doc_id, ()))

    def read(self, doc_id: str) -> Iterator[np.ndarray]:
        """A document's log-probabilities, [rows, V] at a time."""
        for chunk in self._places.get(doc_id, ()):
            group = self._part(chunk.part).read_row_group(chunk.group, ["logprobs"])
            blob = group["logprobs"][chunk.row].as_buffer()
            yield np.frombuffer(blob, self._dtype).reshape(chunk.num_rows, self._vocab_size)

    def _part(self, part: int) -> PartFile:
        if self._open is None or self._open[0] != part:
            self.__exit__()
            stack = ExitStack()
            self._open = part, stack, stack.enter_context(self._run.open_part(self._names[part]))
        return self._open[2]


def diverge_rows(base: Iterator[np.ndarray], other: Iterator[np.ndarray]) -> Iterator[Divergences]:
    """Divergences of a document's log-probabilities, as `Chunks.read` has them, in its order."""
    import torch

    device = EngineSettings().resolve_device()
    for a, b in _side_by_side(base, other):
        # Copies: what is read from Parquet is read-only.
        yield diverge(torch.from_numpy(a.copy()), torch.from_numpy(b.copy()), device)


def _side_by_side(
    ours: Iterator[np.ndarray], theirs: Iterator[np.ndarray]
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The same rows of both, however either is cut; both are of one length."""
    mine = yours = np.zeros((0, 0), np.float32)
    while True:
        mine = mine if len(mine) else next(ours, mine)
        yours = yours if len(yours) else next(theirs, yours)
        count = min(len(mine), len(yours))
        if not count:
            return
        yield mine[:count], yours[:count]
        mine, yours = mine[count:], yours[count:]
