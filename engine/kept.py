"""Keys and values of earlier tokens, kept for generation and for nothing else.

Legend: S slots, C tokens that a slot has room for, T tokens, H query heads, G key/value heads,
D head size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from ..kernels.attention import attend

KEPT_AS = ("int8", "int4")
"""What keys and values may be rounded to."""
_LEAST_ROOM = 64


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

    def write(self, slots_T: torch.Tensor, at_T: torch.Tensor, rows_TGD: torch.Tensor) -> None:
        """Keep rows at places of slots; room grows as needed."""
        self._dtype, self._size = rows_TGD.dtype, rows_TGD.shape[-1]
        room = int(at_T.max()) + 1
        if self._bits is None:
            self._rows = _put(self._rows, rows_TGD, slots_T, at_T, self._num_slots, room)
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
        self._rows = _put(self._rows, codes, slots_T, at_T, self._num_slots, room)
        self._ranges = _put(self._ranges, ranges, slots_T, at_T, self._num_slots, room)

    def read(self, slots: torch.Tensor, length: int) -> torch.Tensor:
        """The first rows of some slots, [slots, length, G, D]; unwritten ones mean nothing."""
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

    def read_whole(self, slots: Sequence[int]) -> _Whole:
        """Attention of whole sequences, which takes their keys and values to these slots."""
        return _Whole(self._layers, slots)

    def read_last(self, slots: Sequence[int], lengths: Sequence[int]) -> _Last:
        """Attention of the last tokens of sequences in slots, which may see all before them."""
        return _Last(self._layers, slots, lengths)


class _Whole:
    """`kernels.attention.attend`, called once a layer in order; what it is given is kept."""

    def __init__(self, layers: Sequence[tuple[KeptRows, KeptRows]], slots: Sequence[int]) -> None:
        self._layers = iter(layers)
        self._slots = slots

    def __call__(
        self,
        q_THD: torch.Tensor,
        k_TGD: torch.Tensor,
        v_TGD: torch.Tensor,
        *,
        lengths: Sequence[int],
        **settings: object,
    ) -> torch.Tensor:
        device, used = q_THD.device, sum(lengths)
        slots_T = torch.cat(
            [torch.full((n,), slot) for slot, n in zip(self._slots, lengths, strict=True)]
        ).to(device)
        at_T = torch.cat([torch.arange(n) for n in lengths]).to(device)
        for kept, rows in zip(next(self._layers), (k_TGD, v_TGD), strict=True):
            kept.write(slots_T, at_T, rows[:used])
        return attend(q_THD, k_TGD, v_TGD, lengths, **settings)  # type: ignore[arg-type]


class _Last:
    """Attention of one token a sequence over what is kept of it, called once a layer in order."""

    def __init__(
        self,
        layers: Sequence[tuple[KeptRows, KeptRows]],
        slots: Sequence[int],
        lengths: Sequence[int],
    ) -> None:
        self._layers = iter(layers)
        self._slots, self._lengths = torch.tensor(slots), torch.tensor(lengths)
        self._longest = max(lengths)

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
        device, count = q_THD.device, len(self._slots)
        slots_S, lengths_S = self._slots.to(device), self._lengths.to(device)
        read = []
        for kept, rows in zip(next(self._layers), (k_TGD, v_TGD), strict=True):
            kept.write(slots_S, lengths_S - 1, rows[:count])
            read.append(kept.read(slots_S, self._longest).transpose(1, 2))
        keys, values = read
        at_C = torch.arange(self._longest, device=device)
        seen_SC = at_C < lengths_S[:, None]
        if window is not None:
            seen_SC &= at_C >= lengths_S[:, None] - window
        # What was never written may hold anything, and 0 * NaN is no number.
        values = values.masked_fill(~seen_SC[:, None, :, None], 0.0)
        out_THD = torch.zeros_like(q_THD)
        q = q_THD[:count, :, None]
        if soft_cap is None and sinks_H is None:
            mixed = F.scaled_dot_product_attention(
                q,
                keys,
                values,
                attn_mask=seen_SC[:, None, None],
                scale=scale,
                enable_gqa=q.shape[1] != keys.shape[1],
            )[:, :, 0]
        else:
            mixed = _attend_plain(q, keys, values, seen_SC, scale, soft_cap, sinks_H)
        out_THD[:count] = mixed
        return out_THD


def _attend_plain(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    seen_SC: torch.Tensor,
    scale: float,
    soft_cap: float | None,
    sinks_H: torch.Tensor | None,
) -> torch.Tensor:
    """Attention of [S, H, 1, D] to [S, G, C, D] by its definition, in float32; [S, H, D]."""
    num_heads, num_groups = q.shape[1], keys.shape[1]
    grouped = q[:, :, 0].float().unflatten(1, (num_groups, -1))
    scores = (grouped @ keys.float().transpose(-1, -2)).flatten(1, 2) * scale
    if soft_cap is not None:
        scores = soft_cap * torch.tanh(scores / soft_cap)
    scores = scores.masked_fill(~seen_SC[:, None], float("-inf"))
    if sinks_H is not None:
        sinks = sinks_H.float()[None, :, None].expand(len(scores), num_heads, 1)
        scores = torch.cat([scores, sinks], -1)
    weights = scores.softmax(-1)[..., : keys.shape[2]].unflatten(1, (num_groups, -1))
    return (weights @ values.float()).flatten(1, 2).to(q.dtype)


def _put(
    kept: torch.Tensor | None,
    rows: torch.Tensor,
    slots_T: torch.Tensor,
    at_T: torch.Tensor,
    num_slots: int,
    room: int,
) -> torch.Tensor:
    """What is kept with rows written to it, with twice the room where it was too small."""
    if kept is None or kept.shape[1] < room:
        had = 0 if kept is None else kept.shape[1]
        grown = rows.new_zeros(num_slots, max(room, 2 * had, _LEAST_ROOM), *rows.shape[1:])
        if kept is not None:
            grown[:, :had] = kept
        kept = grown
    kept[slots_T, at_T] = rows
    return kept
