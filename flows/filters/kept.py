"""A corpus cut down to the documents that a filter keeps: their ids, or their texts again."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from ..index import shard_names
from ..run import Run
from .cuts import Cuts, check_documents, group_scores
from .output import Ids, Texts, Write


@dataclass
class Tally:
    """Documents, and the bytes of their scored text."""

    documents: int = 0
    bytes: int = 0
    kept_documents: int = 0
    kept_bytes: int = 0

    def add(self, num_bytes: np.ndarray, kept: np.ndarray) -> None:
        """Count documents."""
        self.documents += len(kept)
        self.bytes += int(num_bytes.sum())
        self.kept_documents += int(kept.sum())
        self.kept_bytes += int(num_bytes[kept].sum())


@dataclass
class Kept:
    """What was kept."""

    total: Tally = field(default_factory=Tally)
    groups: dict[str, Tally] = field(default_factory=dict)
    """By language or source, as the cuts are."""
    no_score: int = 0
    """Documents without the score, which were not kept."""


def write_kept(
    run: Run,
    cuts: Cuts,
    out: str | None,
    *,
    texts: bool = False,
    endpoint_url: str | None = None,
    on_progress: Callable[[int, int], object] = lambda done, total: None,
) -> Kept:
    """Write the documents from the first of two cuts on and below the second.

    Args:
        out: a Parquet file, on any fsspec URI, of `doc_id, source, language, <score>`; with `texts`
            a folder, which gets a Parquet file `part-00017.parquet` a shard of the run that
            documents are kept of, with the same and `text` (`input_ids` of a corpus of ids), and
            last a `.filter.json` that says it is whole; what was killed is gone on with. None
            counts what would be kept.
        texts: read the documents from the corpus again, and write them too.
        endpoint_url: the S3 server of corpus and output where it is not Amazon's.
        on_progress: is told how many shards of how many are done.

    Raises:
        ValueError: if the output is no such place, or holds what this filter has not written, or
            the corpus is not what was scored.
    """
    check_documents(run)
    if len(cuts.percentiles) != 2:
        raise ValueError(f"cuts: {len(cuts.percentiles)} are not two, between which to keep")
    opened: AbstractContextManager[Write] = nullcontext(lambda shard, rows, chosen: None)
    if out is not None:
        writer = Texts(run, cuts, out, endpoint_url) if texts else Ids(run, cuts, out, endpoint_url)
        opened = writer.open()
    kept, names = Kept(), shard_names(run)
    with opened as write:
        for done, (shard, name) in enumerate(names.items()):
            rows = _read(run, name, cuts)
            places = cuts.place(*group_scores(rows, cuts))
            chosen = places == 1
            _count(kept, rows, cuts, chosen)
            if chosen.any():
                write(shard, rows, chosen)
            on_progress(done + 1, len(names))
    return kept


def _read(run: Run, name: str, cuts: Cuts) -> pa.Table:
    columns = ["doc_id", "source", "language", "status", "num_bytes", cuts.score]
    with run.open_part(name) as parquet:
        return parquet.read(columns)


def _count(kept: Kept, rows: pa.Table, cuts: Cuts, chosen: np.ndarray) -> None:
    groups, scores = group_scores(rows, cuts)
    there, num_bytes = ~np.isnan(scores), rows["num_bytes"].to_numpy()
    kept.no_score += int((~there).sum())
    kept.total.add(num_bytes[there], chosen[there])
    for group in np.unique(groups[there].astype(str)).tolist():
        own = there & (groups == group)
        kept.groups.setdefault(group, Tally()).add(num_bytes[own], chosen[own])
