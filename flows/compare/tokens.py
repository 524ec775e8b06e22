"""Two runs token by token: what both make of the true token, in llama.cpp's terms.

A token is paired by its document and its place in it, and only where both runs have the same token
ids: documents of other ids are counted and left out.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ..run import Run
from .documents import BITS_PER_BYTE, Few, find_measure
from .flat import Flat, are_same, find_tier, stream
from .pairing import OnProgress, pair
from .sums import EXACT_VALUES, Grouped, Moments, Spread, Spreads

PERCENTS = ("99.9", "99", "95", "90", "75", "50", "25", "10", "5", "1", "0.1")
_GROUP_VALUES = EXACT_VALUES // 128
# So many documents of other ids, and none of equal ones, and the rest need not be read.
_ENOUGH_UNLIKE = 64


class NotComparable(Exception):
    """Why something cannot be compared, and what would work."""


class OtherTokens(NotComparable):
    """The runs' token ids are not the same."""


@dataclass(frozen=True)
class Estimate:
    """A number and its standard error, as if tokens were independent."""

    value: float
    error: float


def binomial(hits: int, count: int) -> Estimate:
    """A share and its binomial error, sqrt(p (1 - p) / (n - 1))."""
    share = hits / count
    return Estimate(share, math.sqrt(share * (1 - share) / (count - 1)) if count > 1 else math.nan)


@dataclass(frozen=True)
class TokenDrift:
    """Of the tokens of a source and language."""

    source: str
    language: str
    tokens: int
    ln_ratio: Estimate
    mean_delta_p: Estimate
    rms_delta_p: Estimate
    same_top: Estimate


@dataclass(frozen=True)
class Tokens:
    """What two runs make of the true tokens."""

    tokens: int
    documents: int
    unlike: Few
    """Documents of other token ids."""
    base_perplexity: Estimate
    other_perplexity: Estimate
    correlation: float
    """Of -log p of a token in both."""
    ln_ratio: Estimate
    """Mean of ln(PPL(other) / PPL(base)): the mean excess loss, -log p other less base, nats."""
    ln_ratio_error_by_document: float
    """The same error where the tokens of a document are not taken for independent."""
    ratio: Estimate
    """PPL(other) / PPL(base)."""
    difference: Estimate
    """PPL(other) - PPL(base)."""
    delta_p: Spread
    """Probability of the true token, other less base."""
    rms_delta_p: Estimate
    delta_logprob: Spread
    """log p of the true token, other less base; the excess loss is its negative. Nats."""
    same_top: Estimate
    """Share of tokens where both have the same likeliest token; the error is binomial."""
    groups: list[TokenDrift]


@dataclass(frozen=True)
class Told:
    """A document's tokens in both runs, for a person to look at."""

    token_id: np.ndarray
    base_logprob: np.ndarray
    other_logprob: np.ndarray


def check_tokens(base: Run, other: Run) -> None:
    """NotComparable for a run that kept no tokens."""
    for name, run in (("A", base), ("B", other)):
        if find_tier(run) is None:
            raise NotComparable(f"{name} kept no tokens; score it with --keep tokens")


def compare_tokens(
    base: Run, other: Run, told: Collection[str], on_progress: OnProgress
) -> tuple[Tokens, dict[str, Told]]:
    """Add up what differs, shard by shard.

    Args:
        told: ids of the documents whose tokens are wanted as well.

    Raises:
        NotComparable: if tokens were not kept, or are not the same tokens.
    """
    check_tokens(base, other)
    tally = _Tally(set(told))
    streams = [stream(run, labels=run is base) for run in (base, other)]
    for ours, theirs in pair(*streams, on_progress=on_progress):
        tally.add(Flat.of(ours), Flat.of(theirs), ours)
        if tally.documents == 0 and tally.unlike.count >= _ENOUGH_UNLIKE:
            break
    if tally.unlike.count > tally.documents:
        why = "the runs' token ids differ, so their tokenizers do"
        if find_measure(base, other) == BITS_PER_BYTE:
            why += "; bits per byte compare all the same"
        raise OtherTokens(why)
    if not tally.documents:
        raise NotComparable("no document was scored in both")
    return tally.sum_up(), tally.told


class _Sums:
    """Of the tokens of a group."""

    def __init__(self) -> None:
        self.nll = Moments(3)
        """Base, other, and other less base."""
        self.delta_p = Moments(2)
        """The difference and its square."""
        self.same = 0

    def add(self, columns: _Columns, tokens: np.ndarray | slice) -> None:
        self.nll.add(columns.base_nll[tokens], columns.other_nll[tokens], columns.excess[tokens])
        delta_p = columns.delta_p[tokens]
        self.delta_p.add(delta_p, np.square(delta_p))
        self.same += int(columns.same_top[tokens].sum())

    def ln_ratio(self) -> Estimate:
        return Estimate(float(self.nll.mean[2]), self.nll.error(2))

    def rms(self) -> Estimate:
        value = math.sqrt(self.delta_p.mean[1])
        # The error of the mean square, through the derivative of the root.
        return Estimate(value, self.delta_p.error(1) / (2 * value) if value else 0.0)

    def same_top(self) -> Estimate:
        return binomial(self.same, self.nll.count)


@dataclass(frozen=True)
class _Columns:
    base_nll: np.ndarray
    other_nll: np.ndarray
    excess: np.ndarray
    delta_p: np.ndarray
    same_top: np.ndarray


class _Tally:
    def __init__(self, told: set[str]) -> None:
        self.documents = 0
        self.unlike = Few()
        self.told: dict[str, Told] = {}
        self._wanted = told
        self._sums = Grouped(_Sums)
        self._delta_p = Spreads(PERCENTS)
        self._delta_logprob = Spreads(PERCENTS)
        self._by_document = Moments(2)
        """Of each document: its sum of excess loss, and its tokens."""

    def add(self, ours: Flat, theirs: Flat, table: pa.Table) -> None:
        is_same = are_same(ours, theirs)
        self.unlike.add(table["doc_id"].filter(pa.array(~is_same)))
        table = table.filter(pa.array(is_same))
        lengths = ours.lengths[is_same]
        if not len(lengths):
            return
        self.documents += len(lengths)
        mine, yours = np.repeat(is_same, ours.lengths), np.repeat(is_same, theirs.lengths)
        base, other = (
            flat.logprob[which].astype(np.float64)
            for flat, which in ((ours, mine), (theirs, yours))
        )
        columns = _Columns(
            base_nll=-base,
            other_nll=-other,
            excess=base - other,
            delta_p=np.exp(other) - np.exp(base),
            same_top=ours.top1_id[mine] == theirs.top1_id[yours],
        )
        starts = np.cumsum([0, *lengths[:-1]])
        self._sums.total.add(columns, slice(None))
        group_of = np.empty(len(lengths), np.int64)
        groups = []
        for n, (sums, rows) in enumerate(self._sums.split(table)):
            group_of[rows] = n
            groups.append(sums)
        of_token = np.repeat(group_of, lengths)
        order = np.argsort(of_token, kind="stable")
        cuts = np.searchsorted(of_token[order], np.arange(1, len(groups)))
        for sums, tokens in zip(groups, np.split(order, cuts), strict=True):
            sums.add(columns, tokens)
        self._delta_p.add(columns.delta_p)
        self._delta_logprob.add(-columns.excess)
        self._by_document.add(np.add.reduceat(columns.excess, starts), lengths)
        self._tell(table, starts, lengths, ours.token_id[mine], base, other)

    def _tell(
        self,
        table: pa.Table,
        starts: np.ndarray,
        lengths: np.ndarray,
        token_id: np.ndarray,
        base: np.ndarray,
        other: np.ndarray,
    ) -> None:
        wanted = pc.is_in(table["doc_id"], pa.array(sorted(self._wanted), pa.string())).to_numpy()
        for row in np.flatnonzero(wanted).tolist():
            tokens = slice(starts[row], starts[row] + lengths[row])
            doc_id = table["doc_id"][row].as_py()
            # Copies: a slice would keep all of the batch.
            arrays = (x[tokens].copy() for x in (token_id, base, other))
            self.told[doc_id] = Told(*arrays)

    def sum_up(self) -> Tokens:
        total = self._sums.total
        nll = total.nll
        perplexity = [Estimate(p := _exp(nll.mean[i]), p * nll.error(i)) for i in range(2)]
        ratio = _exp(nll.mean[2])
        # Of b y - a x with y = x + d: (b - a) x + b d, whose terms vanish where d does.
        moved, b = perplexity[1].value - perplexity[0].value, perplexity[1].value
        variance = (
            moved**2 * nll.covariance(0, 0)
            + b**2 * nll.covariance(2, 2)
            + 2 * moved * b * nll.covariance(0, 2)
        ) / nll.count
        groups = [
            TokenDrift(
                source=source,
                language=language,
                tokens=sums.nll.count,
                ln_ratio=sums.ln_ratio(),
                mean_delta_p=Estimate(float(sums.delta_p.mean[0]), sums.delta_p.error(0)),
                rms_delta_p=sums.rms(),
                same_top=sums.same_top(),
            )
            for (source, language), sums in self._sums.groups.items()
        ]
        return Tokens(
            tokens=nll.count,
            documents=self.documents,
            unlike=self.unlike,
            base_perplexity=perplexity[0],
            other_perplexity=perplexity[1],
            correlation=nll.correlation(0, 1),
            ln_ratio=total.ln_ratio(),
            ln_ratio_error_by_document=_clustered(self._by_document),
            ratio=Estimate(ratio, ratio * nll.error(2)),
            difference=Estimate(moved, math.sqrt(max(variance, 0.0))),
            delta_p=self._delta_p.spread(),
            rms_delta_p=total.rms(),
            delta_logprob=self._delta_logprob.spread(),
            same_top=total.same_top(),
            groups=sorted(groups, key=lambda g: (-g.tokens, g.source, g.language)),
        )


def _clustered(by_document: Moments) -> float:
    """Standard error of a ratio of sums over documents: of excess loss over tokens.

    sqrt(sum (s_i - m n_i)^2 D / (D - 1)) / N, the sandwich estimate with documents for clusters.
    """
    documents = by_document.count
    if documents < 2:
        return math.nan
    total, tokens = by_document.mean
    mean = total / tokens
    variance = (
        by_document.covariance(0, 0)
        - 2 * mean * by_document.covariance(0, 1)
        + mean**2 * by_document.covariance(1, 1)
    )
    return math.sqrt(max(0.0, variance) / documents) / tokens


def _exp(nats: float) -> float:
    return math.exp(min(float(nats), 709.0))
