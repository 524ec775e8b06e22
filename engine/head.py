"""Hidden states -> token statistics, candidates and logits, a bounded number of rows at a time.

Legend: R rows, D hidden size, V vocabulary, k kept candidates.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Protocol

import numpy as np
import torch

from ..kernels.logits import TILE, RowStatistics, narrow, row_statistics, top_k
from .blocks import LEAST, Blocks
from .transfer import Arrival, Outbox, to_host

# What a chunk holds for each logit: itself in float32, and on a CPU scratch and a copy to keep.
_BYTES_PER_LOGIT = {"cpu": 12, "cuda": 4}
# Fewest rows of a chunk on a CPU, whose caches like small ones.
_CPU_LEAST = 64

Columns = dict[str, np.ndarray]
"""Scored rows in host memory by the names of `TokenRecords`: [R] each, candidates [R, k]."""


class Model(Protocol):
    """What the head and the runner need of a model: `Decoder` and `Fallback` have it."""

    vocab_size: int
    max_positions: int
    device: torch.device
    blocks: Blocks
    """Rows of the products of `hidden`; ids are padded accordingly."""
    is_streamed: bool
    """Whether every batch, however small, costs a copy of layers to the device."""

    def hidden(self, ids_T: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor: ...

    def logits(self, hidden_RD: torch.Tensor) -> torch.Tensor: ...

    def agree_on_logits(self, most_rows: int, least: int) -> Blocks:
        """Numbers of rows from `least` up to `most_rows` for which `logits` gives the same bits."""


class Head:
    """Runs a model's head over rows of hidden states, chunk by chunk.

    `logits_memory` (bytes) bounds the logits that exist at a time, whatever the length of a
    document.
    """

    def __init__(self, model: Model, logits_memory: int) -> None:
        self._model = model
        self._logits_memory = logits_memory
        self.blocks = _chunks(model, logits_memory)
        """Rows of a chunk; rows of hidden states are padded accordingly."""

    def score(
        self, hidden_RD: torch.Tensor, targets_R: torch.Tensor, num_rows: int, *, num_top: int = 0
    ) -> Arrival[Columns]:
        """Statistics of the first `num_rows` rows, and of each the `num_top` likeliest tokens.

        Rows are padded as `blocks` pads; `targets_R` int64 are the ids that followed.
        """
        packed_7R = _empty_statistics(len(hidden_RD), hidden_RD.device)
        candidates = []
        for rows in self.blocks.cut(len(hidden_RD)):
            logits_RV = self._model.logits(hidden_RD[rows])
            maxima_RN = _empty_maxima(logits_RV) if num_top else None
            statistics = row_statistics(
                logits_RV, targets_R[rows], out_7R=packed_7R[:, rows], maxima_RN=maxima_RN
            )
            if num_top:
                ids, values = top_k(logits_RV, num_top, maxima_RN)
                # The roundings of a row's own `logprob`.
                highest = values[:, :1]
                candidates.append((ids, values - highest + statistics.top1_logprob[:, None]))
        packed_7R = packed_7R[:, :num_rows].contiguous()
        if not num_top:
            return to_host(packed_7R).then(lambda got: _name(got[0]))
        top_ids, top_logprobs = (torch.cat(c)[:num_rows] for c in zip(*candidates, strict=True))
        return to_host(packed_7R, top_ids, top_logprobs).then(
            lambda got: {
                **_name(got[0]),
                "top_ids": got[1].numpy(),
                "top_logprobs": got[2].numpy(),
            }
        )

    def rows(
        self,
        hidden_RD: torch.Tensor,
        targets_R: torch.Tensor,
        num_rows: int,
        outbox: Outbox,
        *,
        normalised: bool,
    ) -> Iterator[tuple[slice, Arrival[tuple[torch.Tensor, Columns]]]]:
        """(rows, their values over the whole vocabulary and their statistics), chunk by chunk.

        Values are log-probabilities if `normalised`, else logits, in the dtype of `outbox`.
        """
        for rows in self._smaller(outbox).cut(len(hidden_RD)):
            count = min(rows.stop, num_rows) - rows.start
            if count <= 0:
                return
            logits_RV = self._model.logits(hidden_RD[rows])
            packed_7R = _empty_statistics(len(logits_RV), logits_RV.device)
            statistics = row_statistics(logits_RV, targets_R[rows], out_7R=packed_7R)
            claimed = outbox.claim(*logits_RV.shape)
            narrow(logits_RV, statistics if normalised else None, outbox.dtype, claimed)
            columns = to_host(packed_7R)
            yield (
                slice(rows.start, rows.start + count),
                outbox.send(claimed).then(partial(_take, columns, count)),
            )

    def _smaller(self, outbox: Outbox) -> Blocks:
        """Chunks that leave room for what is under way, as far as there are any."""
        per_row = self._model.vocab_size * (4 + outbox.num_bytes)
        return self.blocks.limit(self._logits_memory // per_row)


def _empty_statistics(num_rows: int, device: torch.device) -> torch.Tensor:
    return torch.empty(len(RowStatistics._fields), num_rows, device=device)


def _empty_maxima(logits_RV: torch.Tensor) -> torch.Tensor:
    num_rows, num_columns = logits_RV.shape
    return logits_RV.new_empty(num_rows, -(-num_columns // TILE))


def _name(packed_7R: torch.Tensor) -> Columns:
    statistics = RowStatistics.unpack(packed_7R)
    return {name: column.numpy() for name, column in statistics._asdict().items()}


def _take(
    columns: Arrival[list[torch.Tensor]], count: int, values: torch.Tensor
) -> tuple[torch.Tensor, Columns]:
    return values[:count], {n: c[:count] for n, c in _name(columns.wait()[0]).items()}


def _chunks(model: Model, logits_memory: int) -> Blocks:
    rows = most_rows(model.vocab_size, model.device.type, logits_memory)
    # How much memory logits may take must not decide a bit: the fewest rows always fit.
    if model.device.type == "cpu":
        return model.agree_on_logits(min(rows, LEAST), _CPU_LEAST)
    return model.agree_on_logits(rows, LEAST)


def most_rows(vocab_size: int, device: str, logits_memory: int) -> int:
    """Rows whose logits and scratch fit `logits_memory` bytes on a `cpu` or `cuda`.

    Raises:
        ValueError: if hardly any do.
    """
    least = _CPU_LEAST if device == "cpu" else LEAST
    per_row = vocab_size * _BYTES_PER_LOGIT[device]
    rows = logits_memory // per_row // least * least
    if rows == 0:
        raise ValueError(
            f"logits_memory: {logits_memory} bytes is less than the {least * per_row} "
            f"bytes that {least} rows of {vocab_size} logits take"
        )
    return rows
