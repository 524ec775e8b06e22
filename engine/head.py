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
from .transfer import Arrival, Outbox, to_host

# What a chunk holds for each logit: itself in float32, and on a CPU scratch and a copy to keep.
_BYTES_PER_LOGIT = {"cpu": 12, "cuda": 4}
_CPU_MULTIPLE = 64

Columns = dict[str, np.ndarray]
"""Scored rows in host memory by the names of `TokenRecords`: [R] each, candidates [R, k]."""


class Model(Protocol):
    """What the head and the runner need of a model: `Decoder` and `Fallback` have it."""

    vocab_size: int
    max_positions: int
    device: torch.device
    row_multiple: int
    block_rows: int

    def hidden(self, ids_T: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor: ...

    def logits(self, hidden_RD: torch.Tensor) -> torch.Tensor: ...


class Head:
    """Runs a model's head over rows of hidden states, chunk by chunk.

    `logits_memory` (bytes) bounds the logits that exist at a time, whatever the length of a
    document.
    """

    def __init__(self, model: Model, logits_memory: int) -> None:
        self._model = model
        self.chunk_rows = _chunk_rows(model, logits_memory)
        """Most rows of one chunk."""

    def score(
        self, hidden_RD: torch.Tensor, targets_R: torch.Tensor, num_rows: int, *, num_top: int = 0
    ) -> Arrival[Columns]:
        """Statistics of the first `num_rows` rows, and of each the `num_top` likeliest tokens.

        Rows are padded to the model's `row_multiple`; `targets_R` int64 are the ids that followed.
        """
        packed_7R = _empty_statistics(len(hidden_RD), hidden_RD.device)
        candidates = []
        for rows in self._chunks(len(hidden_RD)):
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
        for rows in self._chunks(len(hidden_RD)):
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

    def _chunks(self, num_rows: int) -> Iterator[slice]:
        for start in range(0, num_rows, self.chunk_rows):
            yield slice(start, min(start + self.chunk_rows, num_rows))


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


def _chunk_rows(model: Model, logits_memory: int) -> int:
    """Rows whose logits and scratch fit `logits_memory` bytes; ValueError if hardly any do.

    A GPU's products want full multiples, a CPU's give a row the same bits for any number.
    """
    on_cpu = model.device.type == "cpu"
    multiple = _CPU_MULTIPLE if on_cpu else model.row_multiple
    per_row = model.vocab_size * _BYTES_PER_LOGIT[model.device.type]
    rows = logits_memory // per_row // multiple * multiple
    if rows == 0:
        raise ValueError(
            f"logits_memory: {logits_memory} bytes is less than the {multiple * per_row} "
            f"bytes that {multiple} rows of {model.vocab_size} logits take"
        )
    return min(rows, model.row_multiple) if on_cpu else rows
