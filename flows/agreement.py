"""Whether stored distributions are what the engine gives of a document when it is scored again."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from ..engine.lens import split_lens
from ..engine.records import STATISTICS, DocumentScore
from .distributions import COLUMNS, read_top_k
from .folder import Folder
from .parts import BLOBS, PartFile, rows_of


class Distributions:
    """Asks the engine for what a run has kept of distributions, and compares it with the parts.

    Logits are left out: their bytes are their receipt's, and other tiers tell of them as much.
    """

    def __init__(self, folder: Folder, plan: Mapping[str, Any]) -> None:
        self._folder = folder
        self._tiers = [t for t in ("topk", "sampled", "lens", "hidden") if t in plan["tiers"]]
        self._top_k = plan.get("top_k") or 0
        self._states: dict[int, Any] = {}
        self.wanted: dict[str, Any] = {
            "top_k": self._top_k,
            "num_draws": plan.get("num_draws") or 0,
            "draw_seed": plan.get("draw_seed") or 0,
            "layers": plan.get("layers") or (),
        }
        """What `Pipeline.score` is to be asked for."""
        if "hidden" in self._tiers:
            self.wanted["on_states"] = self._take_states

    def compare(self, shard: int, score: DocumentScore, tolerance: float | None) -> Iterator[str]:
        """What differs, in words: in any bit, or by more than `tolerance` nats a token.

        Within a tolerance neither draws nor states are compared, which one last bit can change.
        """
        for tier in self._tiers:
            if not len(score.tokens):
                continue
            name = f"{tier}/part-{shard:05d}.parquet"
            if tier == "hidden":
                found = self._states.pop(score.index).hexdigest()
                if tolerance is None and found != self._hash_states(name, score.record.doc_id):
                    yield "its hidden states are stored with other bits"
                continue
            if tier == "lens":
                rows = list(self._rows(name, score.record.doc_id))
                yield from _compare_layers(rows, score, tolerance)
                continue
            row = next(self._rows(name, score.record.doc_id), None)
            if row is None:
                yield f"it has no row in {name}"
            elif tolerance is None:
                yield from _compare_bytes(tier, row, score)
            elif tier == "topk":
                yield from _compare_top_k(read_top_k(row, self._top_k), score, tolerance)

    def _take_states(self, index: int, doc_id: str, first: int, states: torch.Tensor) -> None:
        digest = self._states.setdefault(index, hashlib.sha256())
        digest.update(states.contiguous().view(torch.uint8).numpy().data)

    def _hash_states(self, name: str, doc_id: str) -> str:
        digest = hashlib.sha256()
        for row in self._rows(name, doc_id):
            digest.update(row["states"])
        return digest.hexdigest()

    def _rows(self, name: str, doc_id: str) -> Iterator[dict[str, Any]]:
        """The rows of a document, a row group at a time."""
        with self._folder.filesystem.open(self._folder.path(name), "rb") as file:
            for rows in rows_of(PartFile(file), doc_id):
                yield from rows.to_pylist()


def _compare_bytes(tier: str, row: Mapping[str, Any], score: DocumentScore) -> Iterator[str]:
    made = COLUMNS[tier]([score])
    for column, stored in row.items():
        (again,) = made[column]
        if stored == again:
            continue
        if column not in BLOBS:
            yield f"{column} of {tier} is stored as {stored!r}, and is {again!r}"
            return
        ours, theirs = (np.frombuffer(blob, BLOBS[column]) for blob in (stored, again))
        if len(ours) != len(theirs):
            yield f"{column} of {tier} has {len(ours):,} entries, and it has {len(theirs):,}"
            return
        bits = f"u{ours.itemsize}"
        at = np.flatnonzero(ours.view(bits) != theirs.view(bits))
        yield (
            f"entry {at[0]} of {column} of {tier} is stored as {ours[at[0]]}, and is "
            f"{theirs[at[0]]}; {len(at):,} of {len(ours):,} differ"
        )
        return


def _compare_layers(
    rows: Sequence[Mapping[str, Any]], score: DocumentScore, tolerance: float | None
) -> Iterator[str]:
    told = split_lens(score.tokens)
    if len(rows) != len(told):
        yield f"it has {len(rows):,} layers in lens, and the plan has {len(told):,}"
        return
    for row, tokens in zip(rows, told, strict=True):
        which = f"of layer {row['layer']} of lens"
        if tolerance is not None:
            # Ranks and first choices of layers on the way go by the last bits.
            stored = np.array(row["logprob"], np.float32)
            # A layer on the way may be without numbers.
            alike = np.isnan(stored) & np.isnan(tokens.logprob)
            apart = float(np.where(alike, 0.0, np.abs(stored - tokens.logprob)).mean())
            if not apart <= tolerance:
                yield f"logprob {which} is {apart:g} apart on average, more than {tolerance:g}"
            continue
        for name in STATISTICS:
            again = getattr(tokens, name)
            stored = np.array(row[name], again.dtype)
            if len(at := np.flatnonzero(stored.view("u4") != again.view("u4"))):
                yield (
                    f"entry {at[0]} of {name} {which} is stored as {stored[at[0]]}, and is "
                    f"{again[at[0]]}; {len(at):,} of {len(again):,} differ"
                )
                return


def _compare_top_k(
    stored: Mapping[str, np.ndarray], score: DocumentScore, tolerance: float
) -> Iterator[str]:
    tokens = score.tokens
    assert tokens.top_logprobs is not None and tokens.log_tail_mass is not None
    if not np.array_equal(stored["token_id"], tokens.token_id):
        yield "token_id of topk is stored otherwise"
        return
    # Of the likeliest tokens neighbours may change places: their values are compared by rank.
    weights = np.exp(stored["top_logprobs"].astype(np.float64))
    apart = np.abs(stored["top_logprobs"] - tokens.top_logprobs.astype(np.float64))
    for name, distance in (
        ("top_logprob", float(np.where(weights > 0, weights * apart, 0.0).sum(1).mean())),
        (
            "log_tail_mass",
            float(np.abs(np.exp(stored["log_tail_mass"]) - np.exp(tokens.log_tail_mass)).mean()),
        ),
    ):
        if not distance <= tolerance:
            yield f"{name} of topk is {distance:g} apart on average, more than {tolerance:g}"
