"""What the model would have said in a token's place: the likeliest ones, and the rest's mass."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..index import shard_names
from ..parts import LOGITS_DTYPES
from ..run import Run

MOST = 10
"""Candidates that are shown of a token."""


@dataclass(frozen=True)
class Candidates:
    """The likeliest tokens of each of n rows."""

    ids: np.ndarray
    """int [n, k], the likeliest first."""
    logprobs: np.ndarray
    """float64 [n, k], nats."""
    tail: np.ndarray
    """float64 [n]: probability of all others together."""


def find_candidates(run: Run, record: Mapping[str, Any], rows: slice) -> Candidates | None:
    """Candidates of the tokens `rows`, of the tier that holds the most of them; None for none.

    Args:
        record: what `Run.document` gives.
    """
    if "topk" in record:
        topk = record["topk"]
        logprobs, rest = topk["top_logprobs"][rows], topk["log_tail_mass"][rows]
        # Not 1 less what is shown: of rounded probabilities that would be rounding alone.
        tail = np.exp(rest.astype(np.float64)) + _mass(logprobs[:, MOST:])
        return Candidates(topk["top_ids"][rows, :MOST], logprobs[:, :MOST].astype(float), tail)
    if "logits" in run.tiers:
        return _of_logits(run, record["doc_id"], rows)
    if "tokens" in record:
        tokens = record["tokens"]
        return _candidates(tokens["top1_id"][rows, None], tokens["top1_logprob"][rows, None])
    return None


def _candidates(ids: np.ndarray, logprobs: np.ndarray) -> Candidates:
    """Of likeliest tokens alone, at most `MOST` a row."""
    return Candidates(ids, logprobs.astype(np.float64), np.maximum(0.0, 1.0 - _mass(logprobs)))


def _mass(logprobs: np.ndarray) -> np.ndarray:
    return np.exp(logprobs.astype(np.float64)).sum(1)


def _of_logits(run: Run, doc_id: str, rows: slice) -> Candidates:
    """The likeliest of the tier `logits`; no more of it is held than a row group."""
    shard, _ = run.find(doc_id)
    dtype = np.dtype(LOGITS_DTYPES[run.plan["logits_dtype"]]).newbyteorder("<")
    found: list[tuple[np.ndarray, np.ndarray]] = []
    with run.open_part(shard_names(run, "logits")[shard]) as parquet:
        for group in range(parquet.num_row_groups):
            places = parquet.read_row_group(group, columns=["doc_id", "first_row", "num_rows"])
            for i, place in enumerate(places.to_pylist()):
                first = max(rows.start, place["first_row"])
                last = min(rows.stop, place["first_row"] + place["num_rows"])
                if place["doc_id"] != doc_id or first >= last:
                    continue
                blob = parquet.read_row_group(group, columns=["logprobs"])["logprobs"][i]
                logprobs = np.frombuffer(blob.as_py(), dtype).reshape(place["num_rows"], -1)
                found.append(_likeliest(logprobs[first - place["first_row"] :][: last - first]))
    ids, logprobs = (np.concatenate(arrays) for arrays in zip(*found, strict=True))
    return _candidates(ids, logprobs)


def _likeliest(logprobs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Ids and log-probabilities of the likeliest of each row, the lowest id first among equals."""
    count = min(MOST, logprobs.shape[1])
    ids = np.argpartition(-logprobs, count - 1, axis=1)[:, :count]
    ids.sort(axis=1)
    values = np.take_along_axis(logprobs, ids, 1)
    order = np.argsort(-values, axis=1, kind="stable")
    return np.take_along_axis(ids, order, 1), np.take_along_axis(values, order, 1)
