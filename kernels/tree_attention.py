"""Causal attention where sequences share the rows of what they begin with.

A row's bits go by the tokens up to it and nothing else: not by how its sequence goes on, be it with
numbers that overflow, nor by which of the rows before it another sequence has computed.

Legend: T rows, S rows of sequences laid out whole, L tokens of a sequence, M rows of a product,
N keys, H query heads, G key/value heads (H a multiple of G), D head size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F

from .attention import takes_kernel
from .branches import Branches
from .linear import multiply

# A query is multiplied with keys up to the next multiple of this, wherever its sequence ends.
_KEYS = 128
LEAST_ROWS = 16
"""Fewest rows of a product that are worth trying."""
# Keys that are laid out at a time, at most where sequences are shorter.
_MAX_KEYS = 32768


class Rows(Protocol):
    """Numbers of rows for which products give a row the same bits."""

    def pad(self, num_rows: int) -> int: ...

    def cut(self, num_rows: int) -> Sequence[slice]: ...


def can_attend(device: torch.device, dtype: torch.dtype, size: int) -> bool:
    """Whether there is a way for heads of this kind, which is one way for all sequences."""
    return device.type == "cpu" or takes_kernel(device, dtype, size)


def products(size: int) -> list[tuple[Callable[[torch.Tensor], torch.Tensor], int]]:
    """The products on a CPU that `Rows` are found by: functions of rows [M, K], and their K."""

    def by(num_rows: int, num_columns: int) -> Callable[[torch.Tensor], torch.Tensor]:
        weight = torch.randn(num_rows, num_columns, generator=torch.Generator().manual_seed(0))
        return lambda x_MK: multiply(x_MK.float(), weight)

    counts = (_KEYS, 2 * _KEYS, 8 * _KEYS)
    return [
        *((by(count, size), size) for count in counts),
        *((by(size, count), count) for count in counts),
    ]


def most_rows(num_heads: int, num_groups: int) -> int:
    """Rows of a CPU's largest product: the queries of as many tokens as keys, of a key's heads."""
    return _KEYS * num_heads // num_groups


class TreeAttention:
    """Attention over the sequences of a batch; made once and called for every layer."""

    def __init__(self, branches: Branches, device: torch.device) -> None:
        self._branches = branches
        self._device = device
        self._chunks: list[_Chunk] | None = None
        self._hidden: dict[tuple[int, int, int, int | None], torch.Tensor] = {}

    def __call__(
        self,
        q_THD: torch.Tensor,
        k_TGD: torch.Tensor,
        v_TGD: torch.Tensor,
        *,
        rows: Rows | None,
        scale: float,
        window: int | None = None,
        soft_cap: float | None = None,
        sinks_H: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """As `attention.attend`; `rows` are needed on a CPU. [T, H, D], zeros for padding."""
        out_THD = torch.empty(q_THD.shape, dtype=q_THD.dtype, device=q_THD.device)
        out_THD[self._branches.num_rows :] = 0
        if not takes_kernel(q_THD.device, q_THD.dtype, q_THD.shape[2]):
            assert rows is not None, "of what a CPU computes"
            scores = _Scores(rows, scale, window, soft_cap, sinks_H)
            self._attend_rows(q_THD, k_TGD, v_TGD, scores, out_THD)
            return out_THD
        from .gpu import attention, tree_attention

        if self._chunks is None:
            self._chunks = list(self._lay_out(q_THD.shape[2]))
        for chunk in self._chunks:
            attention.attend(
                q_THD[chunk.own],
                *tree_attention.take(k_TGD, v_TGD, chunk.rows_S),
                chunk.tiles,
                out_THD[chunk.own],
                scale=scale,
                window=window,
                soft_cap=soft_cap,
                sinks_H=sinks_H,
            )
        return out_THD

    def _lay_out(self, size: int) -> Iterator[_Chunk]:
        """Sequences whose keys are laid out together, with the kernel's tiles for a head size.

        A sequence, the trunk, is laid out whole. Of those after it keys are only laid out from
        where they part with it on, and another one is the trunk once that has copied as many keys,
        which other sequences share, as a new trunk copies.
        """
        from .gpu.attention import block_of, lay_out_tiles, step_of

        branches, step = self._branches, step_of(size)
        held: list[int] = []
        keys: list[np.ndarray] = []
        places: list[tuple[int, int, int]] = []
        trunk = shared = num_keys = copied = 0

        def close() -> _Chunk:
            first = int(branches.first_rows[held[0]])
            own = branches.num_own[held]
            tiles = lay_out_tiles(own, branches.lengths[held], block_of(size), places)
            return _Chunk(
                slice(first, first + int(own.sum())),
                _send(torch.from_numpy(np.concatenate(keys)), self._device),
                _send(torch.from_numpy(tiles), self._device),
            )

        for i in range(len(branches.num_own)):
            num_shared, length = int(branches.num_shared[i]), int(branches.lengths[i])
            shared = min(shared, num_shared)
            if not branches.num_own[i]:
                continue
            fork = shared // step * step
            copied += num_shared // step * step - fork
            if copied >= fork:
                fork = 0
            if held and num_keys + length - fork > _MAX_KEYS:
                yield close()
                held, keys, places = [], [], []
                num_keys = fork = 0
            if fork == 0:
                trunk, shared, copied = num_keys, length, 0
            keys.append(branches.rows(i, fork))
            places.append((num_keys - fork, trunk, fork))
            held.append(i)
            num_keys += length - fork
        if held:
            yield close()

    def _attend_rows(
        self,
        q_THD: torch.Tensor,
        k_TGD: torch.Tensor,
        v_TGD: torch.Tensor,
        scores: _Scores,
        out_THD: torch.Tensor,
    ) -> None:
        """One sequence at a time, by tiles of queries that lie at multiples of `_KEYS`."""
        num_groups = k_TGD.shape[1]
        lost_TG1 = _find_lost(v_TGD)
        if lost_TG1.any():
            k_TGD = k_TGD.masked_fill(lost_TG1, torch.nan)
            v_TGD = v_TGD.masked_fill(lost_TG1, 0)
        branches, first = self._branches, 0
        most = int(branches.lengths.max())
        room = _Room(num_groups, -(-most // _KEYS) * _KEYS, q_THD.shape[2])
        for start, length in zip(
            branches.num_shared.tolist(), branches.lengths.tolist(), strict=True
        ):
            if start == length:
                continue
            own = slice(first, first + length - start)
            room.put(k_TGD[own], v_TGD[own], start)
            while start < length:
                stop = min(length, start // _KEYS * _KEYS + _KEYS)
                rows = slice(first, first + stop - start)
                num_keys = -(-stop // _KEYS) * _KEYS
                keys_GND, values_GDN = room.take(num_keys)
                q_GHLD = q_THD[rows].unflatten(1, (num_groups, -1)).permute(1, 2, 0, 3)
                hidden = self._hide(start, stop - start, num_keys, scores.window)
                for group in range(num_groups):
                    mixed_HLD = scores.mix(
                        q_GHLD[group], keys_GND[group], values_GDN[group], hidden, group
                    )
                    heads = slice(group * len(mixed_HLD), (group + 1) * len(mixed_HLD))
                    out_THD[rows, heads] = mixed_HLD.transpose(0, 1).to(out_THD.dtype)
                first, start = rows.stop, stop

    def _hide(self, start: int, length: int, num_keys: int, window: int | None) -> torch.Tensor:
        """Which of the last keys queries from position `start` on do not see, [length, last keys].

        All keys before these are seen by all of them, or, with a window, by none.
        """
        first = start if window is None else max(0, start - window + 1)
        first = first // _KEYS * _KEYS
        # It goes by distances alone, so that there are few.
        place = (start - first, length, num_keys - first, window)
        if place not in self._hidden:
            at = torch.arange(start - first, start - first + length)[:, None]
            key = torch.arange(num_keys - first)[None]
            hidden = key > at
            if window is not None:
                hidden |= key <= at - window
            self._hidden[place] = hidden
        return self._hidden[place]


class _Room:
    """Keys and values of one sequence after another in float32, what they share laid out once."""

    def __init__(self, num_groups: int, num_keys: int, size: int) -> None:
        # What lies beyond a sequence is masked, and has to be finite.
        self._keys_GSD = torch.zeros(num_groups, num_keys, size)
        self._values_GSD = torch.zeros(num_groups, num_keys, size)
        self._turned_GDN = torch.zeros(num_groups, size, 0)
        self._length = 0

    def put(self, k_LGD: torch.Tensor, v_LGD: torch.Tensor, start: int) -> None:
        """A sequence that begins with `start` tokens of the one before and goes on with these."""
        stop, before = start + len(k_LGD), self._length
        for room_GSD, x_LGD in ((self._keys_GSD, k_LGD), (self._values_GSD, v_LGD)):
            room_GSD[:, start:stop] = x_LGD.transpose(0, 1)
            room_GSD[:, stop:before] = 0
        changed = slice(start, max(stop, before))
        if start < self._turned_GDN.shape[2]:
            columns = self._turned_GDN[:, :, changed]
            columns.copy_(self._values_GSD[:, start : start + columns.shape[2]].transpose(1, 2))
        self._length = stop

    def take(self, num_keys: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The first keys [G, N, D], and their values turned [G, D, N]; contiguous a group."""
        if self._turned_GDN.shape[2] != num_keys:
            self._turned_GDN = self._values_GSD[:, :num_keys].transpose(1, 2).contiguous()
        return self._keys_GSD[:, :num_keys], self._turned_GDN


@dataclass(frozen=True)
class _Chunk:
    """Sequences that the kernel is given together."""

    own: slice
    """The rows that are theirs."""
    rows_S: torch.Tensor
    tiles: torch.Tensor


@dataclass(frozen=True)
class _Scores:
    """What becomes of queries and keys on a CPU, in float32."""

    rows: Rows
    scale: float
    window: int | None
    soft_cap: float | None
    sinks_H: torch.Tensor | None

    def mix(
        self,
        q_HLD: torch.Tensor,
        keys_ND: torch.Tensor,
        values_DN: torch.Tensor,
        hidden: torch.Tensor,
        group: int,
    ) -> torch.Tensor:
        """Attention of a group's heads to keys, [H, L, D]; `hidden` is as `_hide` gives it."""
        num_heads, length, size = q_HLD.shape
        num_rows, num_keys = num_heads * length, len(keys_ND)
        q_MD = torch.zeros(self.rows.pad(num_rows), size)
        q_MD[:num_rows].view(num_heads, length, size).copy_(q_HLD).mul_(self.scale)
        cut = self.rows.cut(len(q_MD))
        s_MN = torch.cat([multiply(q_MD[rows], keys_ND) for rows in cut])
        s_HLN = s_MN[:num_rows].view(num_heads, length, num_keys)
        if self.soft_cap is not None:
            s_HLN.div_(self.soft_cap).tanh_().mul_(self.soft_cap)
        first = num_keys - hidden.shape[1]
        s_HLN[..., first:].masked_fill_(hidden, float("-inf"))
        if self.window is not None:
            s_HLN[..., :first] = float("-inf")
        if self.sinks_H is not None:
            sinks = self.sinks_H.float().view(-1, num_heads)[group]
            sinks_M1 = sinks.repeat_interleave(length)[:, None]
            s_MN = torch.cat([s_MN, F.pad(sinks_M1, (0, 0, 0, len(s_MN) - num_rows))], 1)
        p_MN = torch.softmax(s_MN, 1)[:, :num_keys].contiguous()
        mixed_MD = torch.cat([multiply(p_MN[rows], values_DN) for rows in cut])
        return mixed_MD[:num_rows].view(num_heads, length, size)


def _find_lost(v_SGD: torch.Tensor) -> torch.Tensor:
    """Values that are not finite, bool [S, G, 1].

    Not to be seen is to have a weight of zero, and zero times infinity is not zero. So their keys
    become NaN, whose scores can be masked, and they zeros: what sees them is lost, and that alone.
    """
    return ~v_SGD.isfinite().all(2, keepdim=True)


def _send(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    return x.pin_memory().to(device, non_blocking=True)
