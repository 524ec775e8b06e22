"""The tokens of documents as flat arrays, of whichever tier of a run has them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ..distributions import join_bytes
from ..parts import schema_of
from ..run import Run
from .pairing import Stream

_TIERS = {
    "tokens": ("token_id", "logprob", "top1_id"),
    "topk": ("token_id", "logprob", "top_id_0", "top_id_1", "top_id_2"),
}


def find_tier(run: Run) -> str | None:
    """The tier that holds a run's true tokens, None if it kept none."""
    return next((tier for tier in _TIERS if tier in run.tiers), None)


def stream(run: Run, *, labels: bool) -> Stream:
    """The columns that `Flat` takes; with `labels` also source and language."""
    tier = find_tier(run)
    assert tier is not None
    there = schema_of(tier, run.plan["model"]["vocab_size"]).names
    return Stream(run, tier, [name for name in _TIERS[tier] if name in there], labels)


@dataclass(frozen=True)
class Flat:
    """Tokens of documents, one after another."""

    lengths: np.ndarray
    token_id: np.ndarray
    logprob: np.ndarray
    top1_id: np.ndarray

    @classmethod
    def of(cls, table: pa.Table) -> Flat:
        """Of rows of the tier `tokens` or `topk`."""
        if "top1_id" in table.column_names:
            lists = table["token_id"]
            flat = (flatten(table[name]) for name in _TIERS["tokens"])
            return cls(pc.list_value_length(lists).to_numpy(), *flat)
        token_id, logprob = unpack(table["token_id"], "<i4"), unpack(table["logprob"], "<f4")
        lengths = pc.binary_length(table["token_id"]).to_numpy() // 4
        top_ids = join_column(table, "top_id", "<i4")
        # The likeliest of each row comes first.
        top1 = top_ids.reshape(len(token_id), -1)[:, 0] if len(token_id) else top_ids
        return cls(lengths, token_id, logprob, top1)


def flatten(lists: pa.ChunkedArray) -> np.ndarray:
    """The values of lists, one after another."""
    return pa.chunked_array([c.flatten() for c in lists.chunks], lists.type.value_type).to_numpy()


def unpack(blobs: pa.ChunkedArray, dtype: str) -> np.ndarray:
    """The numbers of blobs, one after another."""
    return np.frombuffer(b"".join(blobs.to_pylist()), dtype)


def join_column(table: pa.Table, name: str, dtype: str) -> np.ndarray:
    """Numbers of blobs that hold a byte of each, as `join_bytes` joins them, one after another."""
    names = [column for column in table.column_names if column.startswith(f"{name}_")]
    return join_bytes({column: unpack(table[column], "u1") for column in names}, name, dtype)


def are_same(ours: Flat, theirs: Flat) -> np.ndarray:
    """Whether documents have the same token ids in both."""
    same = ours.lengths == theirs.lengths
    mine, yours = np.repeat(same, ours.lengths), np.repeat(same, theirs.lengths)
    differ = ours.token_id[mine] != theirs.token_id[yours]
    lengths = ours.lengths[same]
    if len(lengths):
        starts = np.cumsum([0, *lengths[:-1]])
        same[same] = ~np.logical_or.reduceat(differ, starts)
    return same
