"""Hidden states -> token statistics, candidates and logits, a bounded number of rows at a time.

Legend: R rows, D hidden size, V vocabulary, k kept candidates, m draws.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import numpy as np
import torch

from ..kernels.frequencies import add_frequencies
from ..kernels.logits import (
    RowStatistics,
    Tiles,
    log_tail_mass,
    narrow,
    row_statistics,
    top_k,
)
from ..kernels.sampling import draw
from .blocks import LEAST, Blocks
from .frequencies import Frequencies
from .prefixes import Tree
from .transfer import Arrival, Outbox, to_host

# What a chunk holds for each logit: itself in float32, and on a CPU scratch and a copy to keep.
_BYTES_PER_LOGIT = {"cpu": 12, "cuda": 4}
# Fewest rows of a chunk on a CPU, whose caches like small ones.
_CPU_LEAST = 64

Columns = dict[str, np.ndarray]
"""Scored rows in host memory by the names of `TokenRecords`: [R] each, candidates [R, k]."""


@dataclass(frozen=True)
class Extras:
    """What is told of every row besides its statistics."""

    num_top: int = 0
    """k: the so many likeliest tokens, and the mass of all others."""
    num_draws: int = 0
    """m: so many tokens drawn from the row's distribution."""
    seed: int = 0
    """Of the draws."""
    frequencies: Frequencies | None = None
    """Where what rows expect is added up."""
    layers: tuple[int, ...] = ()
    """Layers whose own statistics are told, by the logit lens."""


BARE = Extras()
"""Statistics alone."""


@dataclass(frozen=True)
class Rows:
    """Rows of hidden states on the device, padded as a head's `blocks` pads."""

    hidden_RD: torch.Tensor
    targets_R: torch.Tensor
    """int64: the ids that followed."""
    count: int
    """Rows that are not padding."""
    keys_R: torch.Tensor | None = None
    """int64: what decides the draws; None where there are none."""
    groups_R: torch.Tensor | None = None
    """int64: which of `groups` a row's sums are of, -1 for padding; None where none are made."""
    groups: Sequence[int] = ()
    lens_R7: Sequence[torch.Tensor] = ()
    """The statistics that layers on the way would have, packed, [R, 7] each."""

    @property
    def tensors(self) -> list[torch.Tensor]:
        """All that lies on the device."""
        more = [x for x in (self.keys_R, self.groups_R) if x is not None]
        return [self.hidden_RD, self.targets_R, *more, *self.lens_R7]


class Model(Protocol):
    """What the head and the runner need of a model: `Decoder` and `Fallback` have it."""

    vocab_size: int
    max_positions: int
    device: torch.device
    blocks: Blocks
    """Rows of the products of `hidden`; ids are padded accordingly."""
    dtype: torch.dtype
    """Of hidden states."""

    @property
    def hidden_size(self) -> int | None:
        """D; None where that cannot be told."""

    @property
    def head_digest(self) -> str | None:
        """sha256 of all that `logits` makes logits of hidden states with; None where that cannot be
        told."""

    is_streamed: bool
    """Whether every batch, however small, costs a copy of layers to the device."""

    def hidden(self, ids_T: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor: ...

    @property
    def hidden_of_tree(self) -> Callable[[torch.Tensor, Tree], torch.Tensor] | None:
        """Hidden states of a tree's rows, for a model whose sequences can share them."""
        ...

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

    def score(self, rows: Rows, extras: Extras) -> Arrival[Columns]:
        """Statistics of the rows, and what `extras` says of each."""
        packed_7R = _empty_statistics(len(rows.hidden_RD), rows.hidden_RD.device)
        told: list[dict[str, torch.Tensor]] = []
        sums = _Sums(self._model, rows, extras)
        for part in self.blocks.cut(len(rows.hidden_RD)):
            logits_RV = self._model.logits(rows.hidden_RD[part])
            told.append(self._tell(logits_RV, rows, part, extras, packed_7R[:, part], sums)[1])
        more = {name: torch.cat([one[name] for one in told])[: rows.count] for name in told[0]}
        columns = _send(packed_7R[:, : rows.count].contiguous(), more)
        # Last: of a batch that memory runs out for, which is run again, nothing may be counted.
        sums.commit()
        return columns

    def describe(self, hidden_RD: torch.Tensor, targets_R: torch.Tensor) -> torch.Tensor:
        """Statistics of rows, packed, [R, 7] on the device."""
        packed_7R = _empty_statistics(len(hidden_RD), hidden_RD.device)
        for part in self.blocks.cut(len(hidden_RD)):
            logits_RV = self._model.logits(hidden_RD[part])
            row_statistics(logits_RV, targets_R[part], out_7R=packed_7R[:, part])
        return packed_7R.T

    def logits(
        self, rows: Rows, outbox: Outbox, *, normalised: bool, extras: Extras = BARE
    ) -> Iterator[tuple[slice, Arrival[tuple[torch.Tensor, Columns]]]]:
        """(rows, their values over the whole vocabulary and their statistics), chunk by chunk.

        Values are log-probabilities if `normalised`, else logits, in the dtype of `outbox`.
        """
        assert not extras.num_top and not extras.num_draws, "they can be made of the values"
        sums = _Sums(self._model, rows, extras)
        for part, count in self._cut(rows, self._smaller(outbox)):
            logits_RV = self._model.logits(rows.hidden_RD[part])
            packed_7R = _empty_statistics(len(logits_RV), logits_RV.device)
            statistics, more = self._tell(logits_RV, rows, part, extras, packed_7R, sums)
            claimed = outbox.claim(*logits_RV.shape)
            narrow(logits_RV, statistics if normalised else None, outbox.dtype, claimed)
            columns = _send(packed_7R, more)
            yield (
                slice(part.start, part.start + count),
                outbox.send(claimed).then(partial(_take, columns, count)),
            )
        sums.commit()

    def states(
        self, rows: Rows, outbox: Outbox, extras: Extras
    ) -> Iterator[tuple[slice, Arrival[tuple[torch.Tensor, Columns]]]]:
        """(rows, their hidden states and what `score` tells of them), chunk by chunk."""
        sums = _Sums(self._model, rows, extras)
        for part, count in self._cut(rows, self.blocks):
            logits_RV = self._model.logits(rows.hidden_RD[part])
            packed_7R = _empty_statistics(len(logits_RV), logits_RV.device)
            _, more = self._tell(logits_RV, rows, part, extras, packed_7R, sums)
            claimed = outbox.claim(*rows.hidden_RD[part].shape).copy_(rows.hidden_RD[part])
            columns = _send(packed_7R, more)
            yield (
                slice(part.start, part.start + count),
                outbox.send(claimed).then(partial(_take, columns, count)),
            )
        sums.commit()

    def _tell(
        self,
        logits_RV: torch.Tensor,
        rows: Rows,
        part: slice,
        extras: Extras,
        packed_7R: torch.Tensor,
        sums: _Sums,
    ) -> tuple[RowStatistics, dict[str, torch.Tensor]]:
        """Statistics of a chunk into `packed_7R`, and the extras; logits are of no use then."""
        tiles = Tiles.of(logits_RV) if extras.num_top else None
        targets_R = rows.targets_R[part]
        statistics = row_statistics(logits_RV, targets_R, out_7R=packed_7R, tiles=tiles)
        sums.add(logits_RV, statistics, part)
        more: dict[str, torch.Tensor] = {}
        if extras.num_draws:
            assert rows.keys_R is not None, "draws are decided by keys"
            more["drawn_ids"] = draw(logits_RV, rows.keys_R[part], extras.num_draws)
        if tiles is not None:
            ids, values = top_k(logits_RV, extras.num_top, tiles)
            more["top_ids"] = ids
            # The roundings of a row's own `logprob`.
            more["top_logprobs"] = values - values[:, :1] + statistics.top1_logprob[:, None]
            more["log_tail_mass"] = log_tail_mass(logits_RV, statistics, ids, tiles)
        if rows.lens_R7:
            more["lens"] = torch.stack([layer_R7[part] for layer_R7 in rows.lens_R7], 1)
        return statistics, more

    def _cut(self, rows: Rows, blocks: Blocks) -> Iterator[tuple[slice, int]]:
        """Chunks, and how many rows of each are not padding; without those that are padding."""
        for part in blocks.cut(len(rows.hidden_RD)):
            count = min(part.stop, rows.count) - part.start
            if count <= 0:
                return
            yield part, count

    def _smaller(self, outbox: Outbox) -> Blocks:
        """Chunks that leave room for what is under way, as far as there are any."""
        per_row = self._model.vocab_size * (4 + outbox.num_bytes)
        return self.blocks.limit(self._logits_memory // per_row)


class _Sums:
    """What the rows of a batch expect, added up by group beside what was added before."""

    def __init__(self, model: Model, rows: Rows, extras: Extras) -> None:
        self._rows, self._frequencies = rows, extras.frequencies
        self._sums_G3V: torch.Tensor | None = None
        if extras.frequencies is not None and rows.groups:
            size = (len(rows.groups), 3, model.vocab_size)
            self._sums_G3V = torch.zeros(size, dtype=torch.int64, device=rows.hidden_RD.device)

    def add(self, logits_RV: torch.Tensor, statistics: RowStatistics, part: slice) -> None:
        """Count a chunk's rows."""
        if self._sums_G3V is None:
            return
        assert self._rows.groups_R is not None
        targets_R, groups_R = self._rows.targets_R[part], self._rows.groups_R[part]
        add_frequencies(logits_RV, statistics, targets_R, groups_R, self._sums_G3V)

    def commit(self) -> None:
        """Add them to those of the batches before."""
        if self._sums_G3V is not None and self._frequencies is not None:
            self._frequencies.commit(self._rows.groups, self._sums_G3V)


def _empty_statistics(num_rows: int, device: torch.device) -> torch.Tensor:
    return torch.empty(len(RowStatistics._fields), num_rows, device=device)


def _send(packed_7R: torch.Tensor, more: dict[str, torch.Tensor]) -> Arrival[Columns]:
    """Statistics and extras on their way to the host."""

    def name(got: list[torch.Tensor]) -> Columns:
        statistics = RowStatistics.unpack(got[0])._asdict()
        return {
            k: v.numpy() for k, v in {**statistics, **dict(zip(more, got[1:], strict=True))}.items()
        }

    return to_host(packed_7R, *more.values()).then(name)


def _take(
    columns: Arrival[Columns], count: int, values: torch.Tensor
) -> tuple[torch.Tensor, Columns]:
    return values[:count], {n: c[:count] for n, c in columns.wait().items()}


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
