"""Where a model's layers live: how many stay on the device, and how many are streamed."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from .blocks import LEAST, PADDING
from .spec import DecoderSpec, Experts, Rotary

RESIDENCIES = ("device", "host", "disk")
SOURCES = ("host", "disk")
"""Where layers may come from that do not stay, the fastest first."""
NUM_SLOTS = 2
"""Layers that have room on the device at a time while others are streamed."""


@dataclass(frozen=True)
class Disk:
    """Where layers are read from."""

    folder: str
    bytes_per_second: float
    """What it was found to give."""


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Where layers live. Made by `place`."""

    num_layers: int
    num_resident: int
    """Layers that stay on the device."""
    resident_bytes: int
    streamed_bytes: int
    """Host memory, or room on disk, that the other layers take."""
    source: str = "host"
    """Where the other layers come from: `host` or `disk`."""
    num_slots: int = 0
    slot_bytes: int = 0
    """Of each slot: the largest layer that is streamed."""
    reason: str = ""
    """Why not all layers stay."""
    disk: Disk | None = None
    """Known once layers have been put there."""

    @property
    def is_streamed(self) -> bool:
        return self.num_resident < self.num_layers

    def describe(self, batch_tokens: int) -> str:
        """One line for people.

        "40 of 64 layers resident, 24 streamed from pinned host memory (23.4 GB), 2 slots of
        0.98 GB: all would take 80.1 GB of 70.0 GB"

        "0 of 80 layers resident, 80 read from disk for every batch (141.1 GB in /scratch; at 2.0
        GB/s that is 71 s a batch of 32,768 tokens), 2 at a time of 1.7 GB: as asked for"
        """
        if not self.is_streamed:
            return f"all {self.num_layers} layers resident ({show_gb(self.resident_bytes)})"
        num_streamed = self.num_layers - self.num_resident
        resident = f"{self.num_resident} of {self.num_layers} layers resident, {num_streamed}"
        streamed, slot = show_gb(self.streamed_bytes), show_gb(self.slot_bytes)
        if self.source == "host":
            return (
                f"{resident} streamed from pinned host memory ({streamed}), {self.num_slots} slots "
                f"of {slot}: {self.reason}"
            )
        if self.disk is not None:
            rate = self.disk.bytes_per_second
            streamed += (
                f" in {self.disk.folder}; at {_show(rate / 1e9)} GB/s that is "
                f"{_show(self.streamed_bytes / rate)} s a batch of {batch_tokens:,} tokens"
            )
        return (
            f"{resident} read from disk for every batch ({streamed}), {self.num_slots} at a time "
            f"of {slot}: {self.reason}"
        )


def _show(number: float) -> str:
    return f"{number:.0f}" if number >= 10 else f"{number:.1f}" if number >= 1 else f"{number:.2g}"


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
    is_host: bool = False
    """Whether the device is a CPU, and its memory the host's."""
    is_set: bool = False
    """Whether `device_bytes` was asked for, so that no batch may take more."""


@dataclass(frozen=True)
class Batches:
    """What batches take of a device's memory."""

    spec: DecoderSpec
    logits_bytes: int
    """What logits may take at a time."""
    width: int
    """Bytes of a number between products."""
    expanded: int = 0
    """Bytes of a weight's number that is expanded in front of each product; 0 if none is."""

    def count_bytes(self, tokens: int, rows: int) -> int:
        """Most that a batch takes at a time, about, and what libraries keep for themselves."""
        between = rows * self._row_bytes + self._weight_bytes
        return tokens * self.token_bytes + max(between, self.logits_bytes) + _LIBRARY_BYTES

    @property
    def token_bytes(self) -> int:
        """Across a batch: the stream and what is added to it, queries, keys and values,
        attention's result, and cosines and sines."""
        spec = self.spec
        rotaries: list[Rotary] = []
        for layer in spec.layers:
            if layer.rotary is not None and layer.rotary not in rotaries:
                rotaries.append(layer.rotary)
        numbers = 2 * spec.hidden_size + 2 * spec.q_size + 2 * spec.kv_size
        return numbers * self.width + sum(4 * rotary.dim for rotary in rotaries)

    @property
    def _row_bytes(self) -> int:
        """In a block of rows: what lies between the products of a feed-forward."""
        d, between = self.spec.hidden_size, 0
        for layer in self.spec.layers:
            shape, times = layer.feed_forward, 1
            if isinstance(shape, Experts):
                # Rows are there once for each expert that takes them, and what they gave as well.
                times, shape = shape.router.top_k, shape.expert
                between = max(between, 2 * times * d)
            between = max(between, times * (3 if shape.gated else 2) * shape.size + 2 * times * d)
        return between * self.width

    @property
    def _weight_bytes(self) -> int:
        """The largest weight, expanded; of experts, as many as a few of them take."""
        spec, d, numbers = self.spec, self.spec.hidden_size, 0
        for layer in spec.layers:
            shape = layer.feed_forward
            if isinstance(shape, Experts):
                shape = shape.shared or shape.expert
            up = (2 if shape.gated else 1) * shape.size
            numbers = max(numbers, d * up, d * (spec.q_size + 2 * spec.kv_size))
        return numbers * self.expanded


@dataclass(frozen=True)
class Arrangement:
    """Where layers live, and what runs at a time. Made by `arrange`."""

    placement: Placement
    batch_tokens: int
    block_rows: int
    batches: Batches
    batch_bytes: int | None = None
    """What batches may take, whatever the length of a window; None is what they need."""

    def describe(self) -> str:
        """One line for people: where layers live, and what that costs."""
        return self.placement.describe(self.batch_tokens)

    def allows(self, rows: int) -> bool:
        """Whether a product of so many rows fits alone."""
        return self.batch_bytes is None or self.batches.count_bytes(0, rows) <= self.batch_bytes

    def holds(self, tokens: int, padded: int, rows: int) -> bool:
        """Whether a batch of `tokens`, which padding makes `padded`, fits with products of `rows`.

        One of no more than `batch_tokens` does: what is counted for libraries holds its padding.
        """
        if self.batch_bytes is None or tokens <= self.batch_tokens:
            return True
        return self.batches.count_bytes(padded, rows) <= self.batch_bytes

    def refuse(self, tokens: int, padded: int, rows: int) -> RuntimeError:
        """What to do about a window that does not fit."""
        assert self.batch_bytes is not None
        needed = self.batches.count_bytes(padded, rows)
        rest = self.batch_bytes - self.batches.count_bytes(0, rows)
        most = max(self.batch_tokens, int(rest / self.batches.token_bytes / (1 + PADDING)))
        return RuntimeError(
            f"device_memory: a window of {tokens:,} tokens takes {show_gb(needed, up=True)}, and "
            f"layers leave {show_gb(self.batch_bytes)}; give more or use a context of at most "
            f"{most:,} tokens"
        )


_LIBRARY_BYTES = 256 << 20
# Rows of a product below which a GPU is not busy with it, and tokens of a batch below which the
# copy of a layer does not hide behind its arithmetic.
_FEWEST_ROWS = 4 * LEAST
_FEWEST_TOKENS = 4096
# Rows of a product that lose nothing worth a layer's room.
_ENOUGH_ROWS = 8192


def arrange(
    spec: DecoderSpec,
    layer_bytes: Sequence[int],
    fixed_bytes: int,
    room: Room,
    *,
    width: int,
    expanded: int = 0,
    shared: Collection[int] = (),
) -> Arrangement:
    """Choose where layers live and how much runs at a time, so that all of it fits.

    Products of fewer rows come first, since they cost little; then layers are streamed, and then
    batches get smaller; a disk comes last. No number depends on it.

    Args:
        spec: of the model.
        layer_bytes: of each layer in order.
        fixed_bytes: what else stays on the device.
        room: what there is, and what is wanted.
        width: bytes of a number between products.
        expanded: as `Batches` takes it.
        shared: layers that are in host memory already, as `place` takes them.

    Raises:
        ValueError: as `place`, if nothing fits.
    """
    # On a CPU layers that are in host memory are where they are used.
    wanted = "device" if room.is_host and room.wanted == "host" else room.wanted
    sources = [wanted] if wanted in ("host", "disk") else ["disk"] if room.is_host else SOURCES
    budgets = _halves(room.batch_tokens, room.batch_tokens if room.keeps_batch else _FEWEST_TOKENS)
    tried: list[tuple[int, int, str | None, str]] = []
    for source in sources:
        for tokens in budgets:
            rows = _halves(min(room.block_rows, tokens), min(_FEWEST_ROWS, tokens))
            if wanted in (None, "device") and source == sources[0]:
                most = [n for n in rows if n >= _ENOUGH_ROWS or n == rows[0]]
                tried += [(tokens, n, "device", source) for n in most]
            if wanted != "device":
                least = [n for n in rows if n <= _ENOUGH_ROWS or n == rows[-1]]
                tried += [(tokens, n, wanted, source) for n in least]
    # All of them resident in small batches is no better than some of them streamed in large ones.
    error = None
    batches = Batches(spec, room.logits_bytes, width, expanded)
    for tokens, rows_at_once, residency, source in tried:
        try:
            placement = place(
                layer_bytes,
                fixed_bytes=fixed_bytes,
                activation_bytes=batches.count_bytes(tokens, rows_at_once),
                device_bytes=room.device_bytes,
                host_bytes=room.host_bytes,
                shared=shared,
                wanted=residency,
                sources=[source],
                is_host=room.is_host,
            )
        except ValueError as refused:
            # What fits least in any way is what the user has to hear of.
            error = refused
        else:
            taken = fixed_bytes + placement.resident_bytes
            left = room.device_bytes - taken - placement.num_slots * placement.slot_bytes
            batch_bytes = left if room.is_set else None
            return Arrangement(placement, tokens, rows_at_once, batches, batch_bytes)
    assert error is not None
    raise error


def _halves(largest: int, least: int) -> list[int]:
    sizes = [largest]
    while sizes[-1] // 2 >= least:
        sizes.append(sizes[-1] // 2)
    return sizes


def free_device_memory(device: torch.device) -> int:
    """Bytes of a GPU's memory that nothing has taken."""
    return torch.cuda.mem_get_info(device)[0]


def free_host_memory() -> int:
    """Bytes of host memory that can be had, what the system would give up for it included."""
    return min(_free_in_system(), _free_in_container())


_CGROUP = Path("/sys/fs/cgroup")


def _free_in_container() -> int:
    """What a container's limit leaves, files in memory not counted: they give way."""
    try:
        limit = (_CGROUP / "memory.max").read_text().strip()
        if limit == "max":
            return 1 << 62
        used = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
        taken = int((_CGROUP / "memory.current").read_text())
        return max(0, int(limit) - taken + int(used["file"]) - int(used["shmem"]))
    except (OSError, ValueError, KeyError):
        return 1 << 62


def _free_in_system() -> int:
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
    shared: Collection[int] = (),
    wanted: str | None = None,
    sources: Sequence[str] = SOURCES,
    is_host: bool = False,
    num_slots: int = NUM_SLOTS,
) -> Placement:
    """Choose where layers live: on the device if they fit there, else as many as do.

    The others come from host memory if they fit there, else from disk.

    Args:
        layer_bytes: of each layer in order, from `count_bytes`.
        fixed_bytes: what else stays on the device: embedding, head, norms.
        activation_bytes: what the largest batch takes there, the logits' share included.
        device_bytes: device memory that may be used.
        host_bytes: host memory that is free to be pinned.
        shared: layers that are in host memory already and need none of it: other processes stream
            them too.
        wanted: `device` keeps every layer there, `host` and `disk` stream every layer from there
            and so take the least device memory; None chooses.
        sources: what None chooses from.
        is_host: whether the device's memory is the host's, where what is read from disk is used
            as the kernel maps it.
        num_slots: layers that have room on the device at a time while others are streamed.

    Raises:
        ValueError: naming the field, the numbers and what would work.
    """
    if wanted not in (None, *RESIDENCIES):
        raise ValueError(f"residency: {wanted!r} is not one of {', '.join(RESIDENCIES)}")
    num_layers, total = len(layer_bytes), sum(layer_bytes)
    room = device_bytes - fixed_bytes - activation_bytes
    all_bytes = fixed_bytes + total + activation_bytes
    memory = "host_memory" if is_host else "device_memory"
    if wanted in (None, "device") and total <= room:
        return Placement(
            num_layers=num_layers,
            num_resident=num_layers,
            resident_bytes=total,
            streamed_bytes=0,
        )
    if wanted == "device":
        raise ValueError(
            f"residency: 'device' takes {show_gb(all_bytes, up=True)}, and {memory} is "
            f"{show_gb(device_bytes)}; leave it out to stream what does not fit from "
            f"{'disk' if is_host else 'host memory'}"
        )
    reason = "as asked for"
    if wanted is None:
        reason = f"all would take {show_gb(all_bytes, up=True)} of {show_gb(device_bytes)}"
    for num_resident in [0] if wanted is not None else range(num_layers - 1, -1, -1):
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
            _explain_device(
                memory, layer_bytes, fixed_bytes, activation_bytes, device_bytes, num_slots
            )
        )
    possible = sources if wanted is None else [wanted]
    new = [
        n
        for i, (n, moves) in enumerate(zip(layer_bytes, is_streamed, strict=True))
        if moves and i not in shared
    ]
    if "host" in possible and sum(new) <= host_bytes:
        return placement
    if "disk" not in possible:
        works = "use a smaller max_batch_tokens or"
        if wanted == "host":
            works = "leave residency out or use"
        raise ValueError(
            f"host_memory: {show_gb(host_bytes)} is less than the "
            f"{show_gb(sum(new), up=True)} that {len(new)} streamed layers take; give more, "
            f"{works} a quantization of fewer bits"
        )
    staged_bytes = 0 if is_host else num_slots * placement.slot_bytes
    if staged_bytes > host_bytes:
        raise ValueError(
            f"host_memory: {show_gb(host_bytes)} is less than the {show_gb(staged_bytes, up=True)} "
            f"that {num_slots} layers take on their way from disk; give more or use a quantization "
            "of fewer bits"
        )
    return replace(placement, source="disk")


def _explain_device(
    memory: str,
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
        f"{memory}: {show_gb(device_bytes)} is less than the {show_gb(needed, up=True)} that "
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
