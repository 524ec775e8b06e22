"""Keys and values of earlier tokens, kept for generation and for nothing else.

Legend: S slots, C tokens that a slot has room for, T tokens, H query heads, G key/value heads,
D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ..kernels.attention import attend
from .transfer import to_device

KEPT_AS = ("int8", "int4")
"""What keys and values may be rounded to."""
# Room comes in as many tokens, so that most steps have the shapes of the step before: libraries
# prepare themselves anew for others.
_ROOM = 64


@dataclass(frozen=True)
class Places:
    """Where tokens' rows are kept."""

    slots_T: torch.Tensor
    at_T: torch.Tensor
    """int64, as the slots: the tokens' places in their sequences."""
    room: int
    """What every slot needs, tokens, or more; the host need not ask the device for it."""


class KeptRows:
    """One tensor of rows by slot and place, as they are or rounded.

    Rounded, each head of each token has its own scale and zero: code = round((x - low) / step) with
    step = (high - low) / (2^bits - 1). int4 takes two codes a byte.
    """

    def __init__(self, num_slots: int, kept_as: str | None) -> None:
        self._num_slots = num_slots
        self._bits = {None: None, "int8": 8, "int4": 4}[kept_as]
        self._rows: torch.Tensor | None = None
        """Rows, or their codes; [S, C, G, D], or [S, C, G, D / 2] for int4."""
        self._ranges: torch.Tensor | None = None
        """Low and step, float32 [S, C, G, 2]."""
        self._dtype = torch.float32
        self._size = 0

    @property
    def num_bytes(self) -> int:
        """What it takes."""
        kept = (x for x in (self._rows, self._ranges) if x is not None)
        return sum(x.numel() * x.element_size() for x in kept)

    def clear(self, slots_S: torch.Tensor) -> None:
        """Forget what slots hold: their places are 0 until they are written."""
        for x in (self._rows, self._ranges):
            if x is not None:
                x[slots_S] = 0

    def write(self, places: Places, rows_TGD: torch.Tensor) -> None:
        """Keep rows at places of slots; room grows as needed."""
        self._dtype, self._size = rows_TGD.dtype, rows_TGD.shape[-1]
        if self._bits is None:
            self._rows = _put(self._rows, rows_TGD, places, self._num_slots)
            return
        wide = rows_TGD.float()
        low, high = wide.amin(-1, keepdim=True), wide.amax(-1, keepdim=True)
        step = (high - low) / (2**self._bits - 1)
        # Where all are equal any step will do.
        codes = ((wide - low) / step.where(step > 0, 1.0)).round().to(torch.uint8)
        if self._bits == 4:
            codes = F.pad(codes, (0, codes.shape[-1] % 2))
            codes = codes[..., 0::2] | (codes[..., 1::2] << 4)
        ranges = torch.cat([low, step], -1)
        self._rows = _put(self._rows, codes, places, self._num_slots)
        self._ranges = _put(self._ranges, ranges, places, self._num_slots)

    def read(self, slots: torch.Tensor, length: int) -> torch.Tensor:
        """The first rows of some slots, [slots, length, G, D]; 0 where none were written."""
        assert self._rows is not None, "rows are written before they are read"
        rows = self._rows[slots, :length]
        if self._bits is None:
            return rows
        assert self._ranges is not None
        if self._bits == 4:
            rows = torch.stack([rows & 15, rows >> 4], -1).flatten(-2)[..., : self._size]
        low, step = self._ranges[slots, :length].split(1, -1)
        return (rows.float() * step + low).to(self._dtype)


class Kept:
    """Keys and values of every layer for sequences in slots."""

    def __init__(self, num_layers: int, num_slots: int, kept_as: str | None) -> None:
        self._layers = [
            (KeptRows(num_slots, kept_as), KeptRows(num_slots, kept_as)) for _ in range(num_layers)
        ]

    @property
    def num_bytes(self) -> int:
        """What all layers take."""
        return sum(rows.num_bytes for layer in self._layers for rows in layer)

    def read_whole(
        self, slots: Sequence[int], lengths: Sequence[int], device: torch.device
    ) -> _Whole:
        """Attention of whole sequences, which takes their keys and values to these slots."""
        slots_S = torch.tensor(slots)
        slots_T = slots_S.repeat_interleave(torch.tensor(lengths))
        at_T = torch.cat([torch.arange(n) for n in lengths])
        slots_S, slots_T, at_T = (to_device(x, device) for x in (slots_S, slots_T, at_T))
        return _Whole(self._layers, slots_S, Places(slots_T, at_T, _room(lengths)))

    def read_last(
        self, slots: Sequence[int], lengths: Sequence[int], device: torch.device
    ) -> _Last:
        """Attention of the last tokens of sequences in slots, which may see all before them."""
        slots_S, lengths_S = (to_device(torch.tensor(x), device) for x in (slots, lengths))
        return _Last(self._layers, Places(slots_S, lengths_S - 1, _room(lengths)))


class _Whole:
    """`kernels.attention.attend`, called once a layer in order; what it is given is kept."""

    def __init__(
        self,
        layers: Sequence[tuple[KeptRows, KeptRows]],
        slots_S: torch.Tensor,
        places: Places,
    ) -> None:
        self._layers = iter(layers)
        self._slots_S = slots_S
        self._places = places

    def __call__(
        self,
        q_THD: torch.Tensor,
        k_TGD: torch.Tensor,
        v_TGD: torch.Tensor,
        *,
        lengths: Sequence[int],
        **settings: object,
    ) -> torch.Tensor:
        used = sum(lengths)
        for kept, rows in zip(next(self._layers), (k_TGD, v_TGD), strict=True):
            # What an earlier sequence left may not be numbers, and 0 * NaN is none.
            kept.clear(self._slots_S)
            kept.write(self._places, rows[:used])
        return attend(q_THD, k_TGD, v_TGD, lengths, **settings)  # type: ignore[arg-type]


class _Last:
    """Attention of one token a sequence over what is kept of it, called once a layer in order."""

    def __init__(self, layers: Sequence[tuple[KeptRows, KeptRows]], places: Places) -> None:
        self._layers = iter(layers)
        self._places = places

    def __call__(
        self,
        q_THD: torch.Tensor,
        k_TGD: torch.Tensor,
        v_TGD: torch.Tensor,
        *,
        scale: float,
        window: int | None,
        soft_cap: float | None,
        sinks_H: torch.Tensor | None,
    ) -> torch.Tensor:
        places = self._places
        count = len(places.slots_T)
        read = []
        for kept, rows in zip(next(self._layers), (k_TGD, v_TGD), strict=True):
            kept.write(places, rows[:count])
            read.append(kept.read(places.slots_T, places.room).transpose(1, 2))
        keys, values = read
        at_C = torch.arange(places.room, device=q_THD.device)
        seen_SC = at_C <= places.at_T[:, None]
        if window is not None:
            seen_SC &= at_C > places.at_T[:, None] - window
        # The heads that share a key are rows of one product with it.
        q_SGHD = q_THD[:count].unflatten(1, (keys.shape[1], -1))
        if soft_cap is None and sinks_H is None:
            seen = seen_SC[:, None, None].expand(-1, -1, q_SGHD.shape[2], -1)
            mixed = F.scaled_dot_product_attention(
                q_SGHD, keys, values, attn_mask=seen, scale=scale
            )
        else:
            mixed = _attend_plain(q_SGHD, keys, values, seen_SC, scale, soft_cap, sinks_H)
        out_THD = torch.zeros_like(q_THD)
        out_THD[:count] = mixed.flatten(1, 2)
        return out_THD


def _attend_plain(
    q_SGHD: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    seen_SC: torch.Tensor,
    scale: float,
    soft_cap: float | None,
    sinks_H: torch.Tensor | None,
) -> torch.Tensor:
    """Attention of [S, G, H / G, D] to [S, G, C, D] by its definition, in float32."""
    scores = q_SGHD.float() @ keys.float().transpose(-1, -2) * scale
    if soft_cap is not None:
        scores = soft_cap * torch.tanh(scores / soft_cap)
    scores = scores.masked_fill(~seen_SC[:, None, None], float("-inf"))
    if sinks_H is not None:
        sinks = sinks_H.float().view(1, q_SGHD.shape[1], -1, 1).expand(len(scores), -1, -1, -1)
        scores = torch.cat([scores, sinks], -1)
    weights = scores.softmax(-1)[..., : keys.shape[2]]
    return (weights @ values.float()).to(q_SGHD.dtype)


def _put(
    kept: torch.Tensor | None, rows: torch.Tensor, places: Places, num_slots: int
) -> torch.Tensor:
    """What is kept with rows written to it, with twice the room where it was too small."""
    if kept is None or kept.shape[1] < places.room:
        had = 0 if kept is None else kept.shape[1]
        grown = rows.new_zeros(num_slots, max(places.room, 2 * had), *rows.shape[1:])
        if kept is not None:
            grown[:, :had] = kept
        kept = grown
    kept[places.slots_T, places.at_T] = rows
    return kept


def _room(lengths: Sequence[int]) -> int:
    return -(-max(lengths) // _ROOM) * _ROOM
