"""Filters of one run's documents: by percentiles of a score, and by their least likely tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pyarrow as pa

from ...engine import metrics
from ..run import Run
from .columns import batch, check_tier, read_groups, split
from .cuts import BITS_PER_BYTE, Cuts, check_documents, find_cuts, group_scores


def buckets(run: Run, cuts: Cuts | None = None) -> pa.RecordBatchReader:
    """Every document's bucket: `doc_id, source, language, <score>, bucket`.

    A document is in the bucket of how many cuts are at most its score: of two `head`, `middle` or
    `tail`; null if it has no score, or its group no cuts.

    Args:
        cuts: of this run or of another, as of a reference corpus; default `find_cuts(run)`.
    """
    chosen = cuts or find_cuts(run)
    names = pa.array(chosen.names)
    schema = _document_schema(chosen.score, pa.field("bucket", pa.string()))

    def place(rows: pa.Table) -> pa.Array:
        places = chosen.place(*group_scores(rows, chosen))
        return names.take(pa.array(places, mask=places < 0))

    return _stream(run, schema, place)


def keep(
    run: Run,
    low: float,
    high: float,
    *,
    score: str = BITS_PER_BYTE,
    by: str | None = "language",
    weight: str = "documents",
) -> pa.RecordBatchReader:
    """Whether documents lie between two percentiles: `doc_id, source, language, <score>, kept`.

    From the score at `low` on and below the score at `high`, as `find_cuts` has them; 0 has no
    lower end and 100 no upper one. What has no score is not kept.
    """
    return kept_between(run, find_cuts(run, (low, high), score=score, by=by, weight=weight))


def kept_between(run: Run, cuts: Cuts) -> pa.RecordBatchReader:
    """`keep` by two cuts that are known."""
    if len(cuts.percentiles) != 2:
        raise ValueError(f"cuts: {len(cuts.percentiles)} are not two, between which to keep")
    schema = _document_schema(cuts.score, pa.field("kept", pa.bool_()))
    return _stream(run, schema, lambda rows: pa.array(cuts.place(*group_scores(rows, cuts)) == 1))


def min_k(run: Run, share: float = 0.2) -> pa.RecordBatchReader:
    """Min-K% and Min-K%++ at any share: `doc_id, min_k_prob, min_k_plus_plus`.

    Mean of the lowest max(1, floor(share n)) log-probabilities, nats (Shi et al., ICLR 2024,
    arXiv:2310.16789), and of as many lowest (log p + H) / sigma (Zhang et al., ICLR 2025,
    arXiv:2404.02936); `engine/metrics.py`. The scores hold both at 0.2. Needs the tier
    `tokens`; documents that were not scored have no row.

    Raises:
        ValueError: for a share that is not more than 0 and at most 1, or if tokens were not kept.
    """
    if not 0 < share <= 1:
        raise ValueError(f"share: {share:g} is not more than 0 and at most 1; give 0.2")
    check_tier(run, "run", "tokens")
    schema = pa.schema(
        {"doc_id": pa.string(), "min_k_prob": pa.float64(), "min_k_plus_plus": pa.float64()}
    )

    def batches() -> Iterator[pa.RecordBatch]:
        columns = ["logprob", "entropy", "varentropy"]
        for rows in read_groups(run, "tokens", ["doc_id", *columns]):
            lists = [split(rows[name]) for name in columns]
            found = [
                (metrics.min_k_prob(lp, share), metrics.min_k_plus_plus(lp, entropy, var, share))
                for lp, entropy, var in zip(*lists, strict=True)
            ]
            values = np.array(found, np.float64).reshape(-1, 2)
            yield batch(schema, rows["doc_id"], values[:, 0], values[:, 1])

    return pa.RecordBatchReader.from_batches(schema, batches())


def _stream(
    run: Run, schema: pa.Schema, last: Callable[[pa.Table], pa.Array]
) -> pa.RecordBatchReader:
    """Scores with one more column, made of the rows by `last`."""
    check_documents(run)

    def batches() -> Iterator[pa.RecordBatch]:
        needed = [*schema.names[:-1], "status"]
        for rows in read_groups(run, "scores", needed):
            columns = [rows[name] for name in schema.names[:-1]]
            yield batch(schema, *columns, last(rows))

    return pa.RecordBatchReader.from_batches(schema, batches())


def _document_schema(score: str, last: pa.Field) -> pa.Schema:
    labels = [(name, pa.string()) for name in ("doc_id", "source", "language")]
    return pa.schema([*labels, (score, pa.float64()), last])
