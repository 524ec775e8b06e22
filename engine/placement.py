"""Where a model's layers live: how many stay on the device, and how many are streamed."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from .blocks import LEAST
from .spec import DecoderSpec, Experts

RESIDENCIES = ("device", "host")
NUM_SLOTS = 2
"""Layers that have room on the device at a time while others are streamed."""


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Where layers live. Made by `place`."""

    num_layers: int
    num_resident: int
    """Layers that stay on the device."""
    resident_bytes: int
    streamed_bytes: int
    """Host memory that the other layers take."""
    num_slots: int = 0
    slot_bytes: int = 0
    """Of each slot: the largest layer that is streamed."""
    reason: str = ""
    """Why not all layers stay."""

    @property
    def is_streamed(self) -> bool:
        return self.num_resident < self.num_layers

    def describe(self) -> str:
        """One line for people.

        "40 of 64 layers resident, 24 streamed from pinned host memory (23.4 GB), 2 slots of
        0.98 GB: all would take 80.1 GB of 70.0 GB"
        """
        if not self.is_streamed:
            return f"all {self.num_layers} layers resident ({show_gb(self.resident_bytes)})"
        num_streamed = self.num_layers - self.num_resident
        return (
            f"{self.num_resident} of {self.num_layers} layers resident, {num_streamed} streamed "
            f"from pinned host memory ({show_gb(self.streamed_bytes)}), {self.num_slots} slots of "
            f"{show_gb(self.slot_bytes)}: {self.reason}"
        )


@dataclass(frozen=True)
class Room:
    """What a model may take, and what it would like to run at a time. None is for us to choose."""

    device_bytes: int
    """Device memory that weights and batches may take."""
    host_bytes: int
    """Host memory that layers may be streamed from."""
    logits_bytes: int
    """What logits may take at a time."""
    batch_tokens: int
    """Tokens of a batch, at most."""
    block_rows: int
    """Rows of a product, at most."""
    wanted: str | None = None
    """Where layers shall live, as `place` takes it."""
    keeps_batch: bool = False
    """Whether batches must not be made smaller."""


@dataclass(frozen=True)
class Arrangement:
    """Where layers live, and what runs at a time. Made by `arrange`."""

    placement: Placement
    batch_tokens: int
    block_rows: int


# Rows of a product below which a GPU is not busy with it, and tokens of a batch below which the
# copy of a layer does not hide behind its arithmetic.
_FEWEST_ROWS = 4 * LEAST
_FEWEST_TOKENS = 4096
# Rows of a product that lose nothing worth a layer's room.
_ENOUGH_ROWS = 8192


def arrange(
    spec: DecoderSpec, layer_bytes: Sequence[int], fixed_bytes: int, room: Room, *, width: int
) -> Arrangement:
    """Choose where layers live and how much runs at a time, so that all of it fits.

    Products of fewer rows come first, since they cost little; then layers are streamed, and then
    batches get smaller. No number depends on it.

    Args:
        spec: of the model.
        layer_bytes: of each layer in order.
        fixed_bytes: what else stays on the device.
        room: what there is, and what is wanted.
        width: bytes of a number between products.

    Raises:
        ValueError: as `place`, if nothing fits.
    """
    tried: list[tuple[int, int, str | None]] = []
    tokens = room.batch_tokens
    while True:
        rows = _halves(min(room.block_rows, tokens), min(_FEWEST_ROWS, tokens))
        if room.wanted != "host":
            tried += [(tokens, n, "device") for n in rows if n >= _ENOUGH_ROWS or n == rows[0]]
        if room.wanted != "device":
            tried += [(tokens, n, room.wanted) for n in rows if n <= _ENOUGH_ROWS or n == rows[-1]]
        if room.keeps_batch or tokens // 2 < _FEWEST_TOKENS:
            break
        tokens //= 2
    # All of them resident in small batches is no better than some of them streamed in large ones.
    error = None
    for tokens, rows_at_once, wanted in tried:
        try:
            placement = place(
                layer_bytes,
                fixed_bytes=fixed_bytes,
                activation_bytes=_count_activations(spec, tokens, rows_at_once, room, width),
                device_bytes=room.device_bytes,
                host_bytes=room.host_bytes,
                wanted=wanted,
            )
        except ValueError as refused:
            # What fits least in any way is what the user has to hear of.
            error = refused
        else:
            return Arrangement(placement, tokens, rows_at_once)
    assert error is not None
    raise error


def _halves(largest: int, least: int) -> list[int]:
    sizes = [largest]
    while sizes[-1] // 2 >= least:
        sizes.append(sizes[-1] // 2)
    return sizes


def _count_activations(spec: DecoderSpec, tokens: int, rows: int, room: Room, width: int) -> int:
    """Most bytes that a batch takes at a time, about, and what libraries keep for themselves.

    Across a batch: the stream and what is added to it, queries, keys and values, and attention's
    result. In a block of rows: what lies between the products of a feed-forward.
    """
    d, heads = spec.hidden_size, spec.q_size + 2 * spec.kv_size
    between = 0
    for layer in spec.layers:
        shape, times = layer.feed_forward, 1
        if isinstance(shape, Experts):
            # Rows are there once for each expert that takes them, and what they gave as well.
            times, shape = shape.router.top_k, shape.expert
            between = max(between, 2 * times * d)
        between = max(between, times * (3 if shape.gated else 2) * shape.size + 2 * times * d)
    batch = tokens * (2 * d + heads + spec.q_size) * width
    return batch + max(rows * between * width, room.logits_bytes) + _LIBRARY_BYTES


_LIBRARY_BYTES = 256 << 20


def free_device_memory(device: torch.device) -> int:
    """Bytes of a GPU's memory that nothing has taken."""
    return torch.cuda.mem_get_info(device)[0]


def free_host_memory() -> int:
    """Bytes of host memory that can be had, what the system would give up for it included."""
    try:
        found = re.search(r"^MemAvailable:\s*(\d+) kB", Path("/proc/meminfo").read_text(), re.M)
        if found:
            return int(found[1]) << 10
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    except (OSError, ValueError):
        return 1 << 62


def place(
    layer_bytes: Sequence[int],
    *,
    fixed_bytes: int,
    activation_bytes: int,
    device_bytes: int,
    host_bytes: int,
    wanted: str | None = None,
    num_slots: int = NUM_SLOTS,
) -> Placement:
    """Choose where layers live: on the device if they fit there, else as many as do.

    Args:
        layer_bytes: of each layer in order, from `count_bytes`.
        fixed_bytes: what else stays on the device: embedding, head, norms.
        activation_bytes: what the largest batch takes there, the logits' share included.
        device_bytes: device memory that may be used.
        host_bytes: host memory that may be pinned.
        wanted: `device` keeps every layer there, `host` streams every layer and so takes the
            least device memory; None chooses.
        num_slots: layers that have room on the device at a time while others are streamed.

    Raises:
        ValueError: naming the field, the numbers and what would work.
    """
    if wanted not in (None, *RESIDENCIES):
        raise ValueError(f"residency: {wanted!r} is not one of {', '.join(RESIDENCIES)}")
    num_layers, total = len(layer_bytes), sum(layer_bytes)
    room = device_bytes - fixed_bytes - activation_bytes
    all_bytes = fixed_bytes + total + activation_bytes
    if wanted != "host" and total <= room:
        return Placement(
            num_layers=num_layers,
            num_resident=num_layers,
            resident_bytes=total,
            streamed_bytes=0,
        )
    if wanted == "device":
        raise ValueError(
            f"residency: 'device' takes {show_gb(all_bytes, up=True)}, and device_memory is "
            f"{show_gb(device_bytes)}; leave it out to stream what does not fit from host memory"
        )
    reason = "as asked for"
    if wanted is None:
        reason = f"all would take {show_gb(all_bytes, up=True)} of {show_gb(device_bytes)}"
    for num_resident in [0] if wanted == "host" else range(num_layers - 1, -1, -1):
        is_streamed = spread(num_layers, num_resident)
        streamed = [n for n, moves in zip(layer_bytes, is_streamed, strict=True) if moves]
        placement = Placement(
            num_layers=num_layers,
            num_resident=num_resident,
            resident_bytes=total - sum(streamed),
            streamed_bytes=sum(streamed),
            num_slots=num_slots,
            slot_bytes=max(streamed),
            reason=reason,
        )
        if placement.resident_bytes + num_slots * placement.slot_bytes <= room:
            break
    else:
        raise ValueError(
            _explain_device(layer_bytes, fixed_bytes, activation_bytes, device_bytes, num_slots)
        )
    if placement.streamed_bytes > host_bytes:
        works = "use a smaller max_batch_tokens or"
        if wanted == "host":
            works = "leave residency out or use"
        raise ValueError(
            f"host_memory: {show_gb(host_bytes)} is less than the "
            f"{show_gb(placement.streamed_bytes, up=True)} that "
            f"{num_layers - placement.num_resident} streamed layers take; give more, {works} a "
            "quantization of fewer bits"
        )
    return placement


def _explain_device(
    layer_bytes: Sequence[int],
    fixed_bytes: int,
    activation_bytes: int,
    device_bytes: int,
    num_slots: int,
) -> str:
    slots_bytes = num_slots * max(layer_bytes)
    needed = fixed_bytes + slots_bytes + activation_bytes
    fits_without_batch = fixed_bytes + slots_bytes < device_bytes
    works = "smaller max_batch_tokens" if fits_without_batch else "quantization of fewer bits"
    return (
        f"device_memory: {show_gb(device_bytes)} is less than the {show_gb(needed, up=True)} that "
        f"{num_slots} layers at a time ({show_gb(slots_bytes)}), what always stays "
        f"({show_gb(fixed_bytes)}) and a batch ({show_gb(activation_bytes)}) take; give more or "
        f"use a {works}"
    )


def tokens_to_hide(
    *,
    layer_bytes: int,
    layer_flops_per_token: int,
    copy_bytes_per_second: float,
    flops_per_second: float,
) -> int:
    """Fewest tokens of a batch whose arithmetic takes as long as the copy of a layer.

    tokens * layer_flops_per_token / flops_per_second >= layer_bytes / copy_bytes_per_second

    With bfloat16 weights, a product takes 2 FLOP a token for 2 bytes: at 400 TFLOP/s and 53 GB/s
    that is 7,548 tokens. Where one layer of n is streamed, an n-th of the tokens will do.
    """
    copy_seconds = layer_bytes / copy_bytes_per_second
    return math.ceil(copy_seconds * flops_per_second / layer_flops_per_token)


def show_gb(num_bytes: int, *, up: bool = False) -> str:
    """Gigabytes of 10^9 bytes, never rounded to where what does not fit would seem to."""
    digits = 1 if num_bytes >= 10**9 else 2
    unit = 10 ** (9 - digits)
    count = -(-num_bytes // unit) if up else num_bytes // unit
    return f"{count / 10**digits:.{digits}f} GB"


def spread(num_layers: int, num_resident: int) -> list[bool]:
    """Which layers are streamed when so many stay: every so many-th, and the last.

    A copy starts when a slot is released. With the layers that stay side by side, slots would soon
    be full and the copies stand still while those compute, and then have one layer each to hide
    behind; evenly spread, each copy has its share of all layers.
    """
    num_streamed = num_layers - num_resident
    return [
        (i + 1) * num_streamed // num_layers > i * num_streamed // num_layers
        for i in range(num_layers)
    ]
