"""Scores that divide documents, at percentiles of each group.

CCNet: Wenzek et al., LREC 2020, arXiv:1911.00359.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pyarrow as pa

from ...engine.records import OK
from ..parts import SCORES
from ..run import Run
from .columns import describe_recipe, floats, read_groups
from .percentiles import Rows, find_percentiles

BITS_PER_BYTE = "bits_per_byte"
GROUPS = ("language", "source")
WEIGHTS = {"documents": None, "bytes": "num_bytes", "tokens": "num_tokens_scored"}
"""What percentiles can be of, and the column that counts it."""
_NAMES = ("head", "middle", "tail")


@dataclass(frozen=True)
class Cuts:
    """Scores that divide the documents of every group, and what they are percentiles of."""

    score: str
    """A column of the scores."""
    percentiles: tuple[float, ...]
    """Ascending, from 0 to 100."""
    by: str | None
    """`language`, `source`, or None for one group, called ""."""
    weight: str
    """`documents`, `bytes` or `tokens`."""
    values: Mapping[str, tuple[float, ...]]
    """The score at each percentile, by group; -inf at 0 and inf at 100."""

    @property
    def names(self) -> tuple[str, ...]:
        """What buckets are called, from below: CCNet's names of three, else `0-25`."""
        if len(self.percentiles) == len(_NAMES) - 1:
            return _NAMES
        ends = [f"{p:g}" for p in (0, *self.percentiles, 100)]
        return tuple(f"{a}-{b}" for a, b in pairwise(ends))

    def table(self) -> pa.Table:
        """A row a group, a column a percentile (`p30`)."""
        groups = sorted(self.values)
        columns: dict[str, list[object]] = {self.by or "group": list(groups)}
        for i, percentile in enumerate(self.percentiles):
            columns[f"p{percentile:g}"] = [self.values[group][i] for group in groups]
        return pa.table(columns)

    def place(self, groups: np.ndarray, scores: np.ndarray) -> np.ndarray:
        """The bucket of each, counted from 0: how many cuts are at most its score.

        -1 for a score that is none (NaN), and for a group that has no cuts.
        """
        found = np.full(len(scores), -1, np.int64)
        for group in np.unique(groups.astype(str)).tolist():
            if group in self.values:
                own = groups == group
                found[own] = np.searchsorted(self.values[group], scores[own], side="right")
        found[np.isnan(scores)] = -1
        return found


def find_cuts(
    run: Run,
    percentiles: Sequence[float] = (30.0, 60.0),
    *,
    score: str = BITS_PER_BYTE,
    by: str | None = "language",
    weight: str = "documents",
) -> Cuts:
    """The scores at percentiles of a run's documents, by group, exact.

    The score at p is the smallest one such that documents of at most that score have p percent of
    the group's weight. CCNet takes 30 and 60, by language, of documents.

    Raises:
        ValueError: for a percentile, score, group or weight that cannot be, or if no document has
            the score.
    """
    given = tuple(float(p) for p in percentiles)
    if not given or not all(0 <= p <= 100 for p in given) or list(given) != sorted(set(given)):
        raise ValueError(
            f"percentiles: {', '.join(f'{p:g}' for p in given) or 'none'} are not ascending "
            "numbers from 0 to 100; give 30 and 60"
        )
    _check_score(score)
    _check_one_of("by", by, (*GROUPS, None))
    _check_one_of("weight", weight, tuple(WEIGHTS))
    check_documents(run)
    inner = [p for p in given if 0 < p < 100]
    total = run.manifest["documents"] if run.manifest is not None else 0
    # Found of at least one, so that groups are known.
    found = find_percentiles(lambda: _weigh(run, score, by, weight), inner or [50.0], total)
    if not found:
        raise ValueError(
            f"score: no document of {run.uri} has a {score!r} and {weight} that count; documents "
            "of token ids have token_perplexity"
        )
    ends = {0.0: -math.inf, 100.0: math.inf}
    values = {
        group: tuple(ends[p] if p in ends else at[inner.index(p)] for p in given)
        for group, at in found.items()
    }
    return Cuts(score, given, by, weight, values)


def _weigh(run: Run, score: str, by: str | None, weight: str) -> Iterator[Rows]:
    counted = WEIGHTS[weight]
    needed = {"status", score, *([by] if by else []), *([counted] if counted else [])}
    cuts = Cuts(score, (), by, weight, {})
    for rows in read_groups(run, "scores", sorted(needed)):
        groups, scores = group_scores(rows, cuts)
        weights = rows[counted].to_numpy() if counted else np.ones(len(rows), np.int64)
        there = ~np.isnan(scores)
        yield groups[there], scores[there], weights[there]


def group_scores(rows: pa.Table, cuts: Cuts) -> tuple[np.ndarray, np.ndarray]:
    """Group and score of every row, NaN where a document was not scored."""
    groups = rows[cuts.by].to_numpy() if cuts.by else np.full(len(rows), "", object)
    scores = floats(rows[cuts.score])
    return groups, np.where(rows["status"].to_numpy() == OK, scores, np.nan)


def check_documents(run: Run) -> None:
    """ValueError for a run of one stream."""
    if run.plan["recipe"]["concatenate"]:
        raise ValueError(
            f"run: its recipe {describe_recipe(run)} reads the corpus as one stream, which has no "
            "documents to choose among; score it with rolling"
        )


def _check_score(score: str) -> None:
    known = [field.name for field in SCORES if pa.types.is_floating(field.type)]
    _check_one_of("score", score, known)


def _check_one_of(name: str, value: str | None, known: Sequence[str | None]) -> None:
    if value not in known:
        works = ", ".join(text for text in known if text is not None)
        raise ValueError(f"{name}: {value!r} is not one of {works}")
