"""Hidden states -> token statistics and logits, a bounded number of rows at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import numpy as np
import torch

from ..kernels.logits import RowStatistics, row_statistics

_ROW_MULTIPLE = 64
# What a chunk holds for each logit in float32: the logit, scratch, and a copy to keep.
_BYTES_PER_LOGIT = 12

LogprobsSink = Callable[[slice, np.ndarray, np.ndarray], None]
"""(rows, their log-probabilities float32 [rows, V], their logsumexp float32 [rows])."""


class Model(Protocol):
    """What the head and the pipeline need of a model: `Decoder` and `Fallback` have it."""

    vocab_size: int
    max_positions: int
    device: torch.device
    block_rows: int

    def hidden(self, ids_T: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor: ...

    def logits(self, hidden_RD: torch.Tensor) -> torch.Tensor: ...


class Head:
    """Runs a model's head over rows of hidden states in chunks of one fixed shape.

    The fixed shape keeps a row's bits whatever the number of rows, and `logits_memory` (bytes)
    bounds what exists at a time whatever the length of a document.
    """

    def __init__(self, model: Model, logits_memory: int) -> None:
        self._model = model
        self.rows = _chunk_rows(model, logits_memory)
        """Rows of one chunk."""

    def chunks(self, hidden_RD: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
        """(rows, their float32 logits [chunk, V]) in order; the caller may overwrite them.

        The last chunk has rows of padding beyond those that were asked for.
        """
        for start in range(0, len(hidden_RD), self.rows):
            part = hidden_RD[start : start + self.rows]
            rows = slice(start, start + len(part))
            if len(part) < self.rows:
                padding = part.new_zeros(self.rows - len(part), part.shape[1])
                part = torch.cat([part, padding])
            yield rows, self._model.logits(part)

    def statistics(
        self,
        hidden_RD: torch.Tensor,
        targets_R: np.ndarray,
        on_logprobs: LogprobsSink | None = None,
    ) -> RowStatistics:
        """Statistics of every row, in host memory; `targets_R` are the ids that followed.

        `on_logprobs` is handed every row's log-probabilities, chunk after chunk.
        """
        targets = np.zeros(-(-len(hidden_RD) // self.rows) * self.rows, np.int64)
        targets[: len(targets_R)] = targets_R
        on_device = torch.from_numpy(targets).to(hidden_RD.device)
        parts = []
        for rows, logits in self.chunks(hidden_RD):
            count = rows.stop - rows.start
            kept = logits[:count].clone() if on_logprobs is not None else None
            part = row_statistics(logits, on_device[rows.start : rows.start + self.rows])
            parts.append([column[:count] for column in part])
            if on_logprobs is not None and kept is not None:
                # The same two roundings as in `row_statistics`: the target's entry here and its
                # `logprob` there are equal to the bit.
                kept -= kept.amax(1, keepdim=True)
                kept += part.top1_logprob[:count, None]
                on_logprobs(rows, kept.cpu().numpy(), part.logsumexp[:count].cpu().numpy())
        return RowStatistics(*(torch.cat(column).cpu() for column in zip(*parts, strict=True)))


def _chunk_rows(model: Model, logits_memory: int) -> int:
    """Rows whose logits and scratch fit `logits_memory` bytes; ValueError if hardly any do."""
    per_row = model.vocab_size * _BYTES_PER_LOGIT
    rows = logits_memory // per_row // _ROW_MULTIPLE * _ROW_MULTIPLE
    if rows == 0:
        raise ValueError(
            f"logits_memory: {logits_memory} bytes is less than the {_ROW_MULTIPLE * per_row} "
            f"bytes that {_ROW_MULTIPLE} rows of {model.vocab_size} logits take"
        )
    return min(rows, model.block_rows)
