"""Where a decoder's layer weights live: on its device, in host memory or on disk, and streamed.

Every layer is used once per batch, so a layer may come to the device just before its turn. While
one layer computes, the next ones are copied from pinned host memory into a few slots on the
device, in a cycle that does not end with a batch:

    compute    | layer 0 . . . | layer 1 . . . | layer 2 . . . | layer 0 of the next batch
    slot 0     | 0 in use      | <- 2          | 2 in use      | <- 1
    slot 1     | <- 1          | 1 in use      | <- 0          | 0 in use

Host memory may be shared with other processes (`shared.py`). What lies on disk comes through pinned
memory of as many layers, which a thread reads into. On a CPU nothing is copied: layers are used
where they lie, and of a disk the kernel is told what comes next.

This knows nothing of what a layer is: any tree of tensors will do (`map_tensors`).
"""

from __future__ import annotations

import copy
import logging
import mmap
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import fields, is_dataclass
from typing import Any, Generic, Protocol, TypeVar, cast

import torch

from .placement import NUM_SLOTS, show_gb, spread
from .scratch import Scratch
from .shared import Shared

log = logging.getLogger(__name__)

# Where tensors may start in a layer's bytes: what kernels and copy engines like, and a multiple of
# every dtype's size.
_ALIGNMENT = 256
# What is compared at a time: a device that is filling up has no room for a copy of a layer.
_BLOCK_BYTES = 64 << 20

_T = TypeVar("_T")


# ---- trees of tensors ------------------------------------------------------------------------


def map_tensors(tree: _T, change: Callable[[torch.Tensor], torch.Tensor]) -> _T:
    """The same tree with `change(tensor)` in the place of each tensor.

    Goes through dataclasses, tuples (named ones too), lists and dicts, in the same order in every
    process; everything else stays as it is. A tensor that is there twice is changed once and stays
    shared. Dataclasses are not made anew: what `__post_init__` checked holds, and what it computed
    is kept, with its tensors changed as well.
    """
    return cast(_T, _walk(tree, change, {}))


def _walk(
    node: Any, change: Callable[[torch.Tensor], torch.Tensor], changed: dict[int, torch.Tensor]
) -> Any:
    """One node of a tree; a function of its own, since one that calls itself from within another
    would keep what was changed, gigabytes of it, until garbage is collected."""
    match node:
        case torch.Tensor():
            if id(node) not in changed:
                changed[id(node)] = change(node)
            return changed[id(node)]
        case tuple() if hasattr(node, "_fields"):
            return type(node)(*(_walk(part, change, changed) for part in node))
        case tuple() | list():
            return type(node)(_walk(part, change, changed) for part in node)
        case dict():
            return {key: _walk(value, change, changed) for key, value in node.items()}
    if not is_dataclass(node) or isinstance(node, type):
        return node
    made = copy.copy(node)
    # Cached properties are no fields, and with slots fields are not in a dictionary. Not a set,
    # whose order is another one in every process.
    names = [*(field.name for field in fields(node)), *getattr(node, "__dict__", ())]
    for name in dict.fromkeys(names):
        object.__setattr__(made, name, _walk(getattr(node, name), change, changed))
    return made


def bring(tree: _T, device: torch.device) -> _T:
    """The same tree with all tensors on the device, strides kept; what is there is not copied."""
    return map_tensors(tree, lambda x: _elements(x).to(device).as_strided(x.shape, x.stride()))


def count_bytes(tree: object) -> int:
    """What a tree takes when its tensors are packed one after another."""
    total = 0

    def add(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal total
        total = _align(total) + _num_bytes(tensor)
        return tensor

    map_tensors(tree, add)
    return _align(total)


def _pack(tree: _T, out: torch.Tensor) -> _T:
    """Copy a tree's tensors into `out`, uint8 [count_bytes(tree)]; the same tree of its views."""
    return _lay_out(tree, out, lambda view, tensor: _elements(view).copy_(_elements(tensor)))


def _match(tree: _T, out: torch.Tensor) -> _T | None:
    """The same tree as views of `out`, if that is what `_pack` has made of it, bit for bit."""
    if len(out) != count_bytes(tree):
        return None
    is_same = True

    def compare(view: torch.Tensor, tensor: torch.Tensor) -> None:
        nonlocal is_same
        is_same = is_same and _is_copy(view, tensor)

    packed = _lay_out(tree, out, compare)
    return packed if is_same else None


def _is_copy(view: torch.Tensor, tensor: torch.Tensor) -> bool:
    """Whether two tensors of one layout are of the same bits; looked at where the second one is."""
    pairs = zip(*(_bytes(x).split(_BLOCK_BYTES) for x in (view, tensor)), strict=True)
    return all(torch.equal(a.to(b.device), b) for a, b in pairs)


def _lay_out(
    tree: _T, out: torch.Tensor, put: Callable[[torch.Tensor, torch.Tensor], object]
) -> _T:
    """The same tree as views of `out`, after `put(view, tensor)` of each."""
    start = 0

    def move(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal start
        view = _view(out, start, tensor)
        put(view, tensor)
        start = _align(start + _num_bytes(tensor))
        return view

    return map_tensors(tree, move)


def _unpack(packed: _T, out: torch.Tensor) -> _T:
    """What `_pack` returned, as views of a copy of the bytes.

    Offsets are those into the packed bytes, which `_allocate` puts at the front of a storage.
    """
    return map_tensors(packed, lambda x: _view(out, int(x.storage_offset()) * x.itemsize, x))


def _view(flat: torch.Tensor, start: int, like: torch.Tensor) -> torch.Tensor:
    """A tensor's shape, strides and dtype over the bytes from `start` on."""
    values = flat[start : start + _num_bytes(like)].view(like.dtype)
    return values.as_strided(like.shape, like.stride())


def _elements(tensor: torch.Tensor) -> torch.Tensor:
    """All that lies between a tensor's first and last element in memory, flat.

    Copied as such, a tensor keeps strides of any kind, and with them the kernel that a library
    picks for it.
    """
    return tensor.as_strided((_span(tensor),), (1,))


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return _elements(tensor).view(torch.uint8)


def _span(tensor: torch.Tensor) -> int:
    if not tensor.numel():
        return 0
    return 1 + sum(
        (n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True)
    )


def _num_bytes(tensor: torch.Tensor) -> int:
    return _span(tensor) * tensor.itemsize


def _align(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT


# ---- copies ----------------------------------------------------------------------------------


class Link(Protocol):
    """Brings bytes from host memory into slots on the device, behind the caller's back.

    Whoever computes says so to the link: `wait` before a slot is first read, `release` once
    everything that reads it has been launched.
    """

    @property
    def buffers(self) -> Sequence[torch.Tensor]:
        """Slots: uint8 [bytes] each."""

    def copy(self, source: torch.Tensor, slot: int) -> None:
        """Start a copy of `source`, uint8, to the front of a slot; not before it is released."""

    def wait(self, slot: int) -> None:
        """What is computed from now on comes after the last copy into the slot."""

    def release(self, slot: int) -> None:
        """Copies into the slot from now on come after what has been launched so far."""

    def finish(self, slot: int) -> None:
        """Return once the last copy into the slot is over, so that its source may change."""


MakeLink = Callable[[int, int], Link]
"""(number of slots, bytes of a slot) -> link."""


class CudaLink:
    """Copies on a stream of their own, ordered with the current stream by events."""

    def __init__(self, device: torch.device, num_slots: int, slot_bytes: int) -> None:
        self.buffers = [
            torch.empty(slot_bytes, dtype=torch.uint8, device=device) for _ in range(num_slots)
        ]
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._copied = [torch.cuda.Event() for _ in range(num_slots)]
        self._released = [torch.cuda.Event() for _ in range(num_slots)]
        for slot, buffer in enumerate(self.buffers):
            # The allocator knows one stream alone: work that was launched there may still use this
            # memory for what it held before, and what it will hold next must wait for our copies.
            self.release(slot)
            buffer.record_stream(self._stream)

    def copy(self, source: torch.Tensor, slot: int) -> None:
        self._stream.wait_event(self._released[slot])
        with torch.cuda.stream(self._stream):
            self.buffers[slot][: len(source)].copy_(source, non_blocking=True)
            self._copied[slot].record(self._stream)

    def wait(self, slot: int) -> None:
        torch.cuda.current_stream(self._device).wait_event(self._copied[slot])

    def release(self, slot: int) -> None:
        self._released[slot].record(torch.cuda.current_stream(self._device))

    def finish(self, slot: int) -> None:
        self._copied[slot].synchronize()


class DiskLink:
    """A link whose sources are parts of a scratch file.

    A thread reads each into pinned memory, one buffer a slot, and then has `link` copy it. Copies
    are read in the order they were started in.
    """

    def __init__(self, link: Link, scratch: Scratch, slot_bytes: int, device: torch.device) -> None:
        """Raises MemoryError if host memory cannot be pinned."""
        self.buffers = link.buffers
        self._link = link
        self._scratch = scratch
        self._pool = ThreadPoolExecutor(1, "logitmill-disk")
        self._staged: list[torch.Tensor] = []
        self._sources: list[torch.Tensor | None] = [None] * len(link.buffers)
        self._jobs: list[Future[None] | None] = [None] * len(link.buffers)
        is_gpu = device.type == "cuda"
        # What the thread does holds no reference to this, or it might be the one to end itself.
        weakref.finalize(
            self, _stop, self._pool, self._staged, device if is_gpu else None
        ).atexit = False
        for _ in link.buffers:
            self._staged.append(_allocate(slot_bytes, pinned=is_gpu))

    def copy(self, source: torch.Tensor, slot: int) -> None:
        last = self._jobs[slot]
        if last is not None:
            # Of a pass that was given up; what has not been read need not be.
            last.cancel()
        staged = self._staged[slot][: len(source)]
        self._sources[slot] = source
        self._jobs[slot] = self._pool.submit(
            _bring_from_disk, self._scratch, source, staged, self._link, slot
        )

    def wait(self, slot: int) -> None:
        """As `Link.wait`, and the host waits until the source has been read.

        Raises:
            OSError: if the disk does not give it.
        """
        job, source = self._jobs[slot], self._sources[slot]
        assert job is not None and source is not None, "nothing is copied into the slot"
        error = job.exception()
        if error is not None:
            # The next pass may want the same one.
            self.copy(source, slot)
            raise OSError(
                f"scratch: layers cannot be read back from {self._scratch.folder}: {error}"
            )
        self._link.wait(slot)

    def release(self, slot: int) -> None:
        self._link.release(slot)

    def finish(self, slot: int) -> None:
        job = self._jobs[slot]
        if job is not None:
            job.exception()
        self._link.finish(slot)


def _bring_from_disk(
    scratch: Scratch, source: torch.Tensor, staged: torch.Tensor, link: Link, slot: int
) -> None:
    link.finish(slot)
    scratch.read(source, staged)
    link.copy(staged, slot)


def _stop(
    pool: ThreadPoolExecutor, staged: Sequence[torch.Tensor], device: torch.device | None
) -> None:
    pool.shutdown(cancel_futures=True)
    if device is not None:
        _unpin(staged, device)


class _Sources(Protocol):
    """Layers' bytes, which come again and again in one order."""

    def rewind(self) -> None:
        """Let the first source be the next one, whatever became of the pass before."""

    def take(self) -> torch.Tensor:
        """The bytes of the next source, which are there for what is launched from now on."""

    def release(self) -> None:
        """Use the room of the source that was taken last for the one whose turn is next."""


class _Mapped:
    """Parts of a scratch file, used where they are mapped: the kernel is told what comes next."""

    def __init__(self, sources: Sequence[torch.Tensor], scratch: Scratch) -> None:
        self._sources = sources
        self._scratch = scratch
        self._next = 0

    def rewind(self) -> None:
        if self._next:
            self._scratch.forget(self._sources[self._next])
        self._next = 0
        self._scratch.expect(self._sources[0])

    def take(self) -> torch.Tensor:
        self._scratch.expect(self._sources[(self._next + 1) % len(self._sources)])
        return self._sources[self._next]

    def release(self) -> None:
        self._scratch.forget(self._sources[self._next])
        self._next = (self._next + 1) % len(self._sources)


class _Ring:
    """Sources that are copied, each through the next slot.

    Of copies it counts those started, and those whose slot has been released.
    """

    def __init__(self, sources: Sequence[torch.Tensor], link: Link) -> None:
        self._sources = sources
        self._link = link
        self._num_slots = len(link.buffers)
        self._started = 0
        self._released = 0

    def rewind(self) -> None:
        """Let the first source be the next one, whatever became of the pass before."""
        if self._released % len(self._sources):
            # An abandoned pass: what it launched may still read any of the slots.
            for slot in range(self._num_slots):
                self._link.release(slot)
            self._started = self._released = 0
        self._fill()

    def take(self) -> torch.Tensor:
        """The slot of the next source, which is there for what is launched from now on."""
        slot = self._released % self._num_slots
        self._link.wait(slot)
        return self._link.buffers[slot]

    def release(self) -> None:
        """Use the slot that was taken last for the source whose turn is next."""
        self._link.release(self._released % self._num_slots)
        self._released += 1
        self._fill()

    def _fill(self) -> None:
        while self._started < self._released + self._num_slots:
            source = self._sources[self._started % len(self._sources)]
            self._link.copy(source, self._started % self._num_slots)
            self._started += 1


# ---- layers ----------------------------------------------------------------------------------


class Layers(Protocol[_T]):
    """A decoder's layers, wherever their weights live."""

    @property
    def held(self) -> Sequence[_T]:
        """The layers where they live: to look at, or to `bring` to the device one at a time."""

    def add(self, layer: _T) -> None:
        """Take the next layer, its tensors on the device or a CPU."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[_T]:
        """A pass: the layers in order, each on the device and valid until the next one."""


class Resident(Generic[_T]):
    """Layers whose weights stay on the device."""

    def __init__(self, device: torch.device) -> None:
        self.held: list[_T] = []
        self._device = device

    def add(self, layer: _T) -> None:
        self.held.append(bring(layer, self._device))

    def __len__(self) -> int:
        return len(self.held)

    def __iter__(self) -> Iterator[_T]:
        return iter(self.held)


class Streamed(Generic[_T]):
    """Layers whose weights wait in pinned host memory or on disk, some of them on the device.

    A layer is valid until the next one is asked for: what it computes must have been launched on
    the current stream by then. A pass may be given up anywhere; the next one starts from the first
    layer, and the one before it is over.

    On a CPU nothing is copied, and layers are used where they lie.
    """

    def __init__(
        self,
        num_layers: int,
        *,
        device: torch.device,
        num_resident: int = 0,
        num_slots: int = NUM_SLOTS,
        scratch: Scratch | None = None,
        shared: Shared | None = None,
        make_link: MakeLink | None = None,
    ) -> None:
        """Room for `num_layers` layers, `num_resident` of which stay on the device.

        Args:
            scratch: where on disk the others wait; None is host memory.
            shared: the layers' host memory in common with other processes; None is our own.
            num_slots: layers that have room on the device at a time, besides those that stay.
            make_link: what copies; None is what the device has.
        """
        assert 0 <= num_resident <= num_layers and num_slots > 0
        assert scratch is None or shared is None
        self.held: list[_T] = []
        self.is_streamed = spread(num_layers, num_resident)
        """Of each layer, whether it is copied for every pass."""
        self._device = device
        self._num_slots = num_slots
        is_gpu = device.type == "cuda"
        if make_link is None and is_gpu:
            self._make_link: MakeLink | None = lambda num, size: CudaLink(device, num, size)
        else:
            self._make_link = make_link
        self._scratch = scratch
        self._shared = shared
        self._sources: list[torch.Tensor] = []
        self._ring: _Sources | None = None
        self._num_passes = 0
        if is_gpu and scratch is None:
            # The process takes its registrations with it when it ends.
            weakref.finalize(self, _unpin, self._sources, device).atexit = False

    # What inference mode makes could not be copied into outside of it.
    @torch.inference_mode(False)
    def add(self, layer: _T) -> None:
        """Copy the next layer to where it will live; the slots are made with the last one.

        Raises:
            MemoryError: if host memory cannot be pinned.
            ValueError: if the disk is full.
        """
        assert len(self.held) < len(self), "all layers are there"
        if not self.is_streamed[len(self.held)]:
            self.held.append(bring(layer, self._device))
        elif self._shared is None or not self._share(layer, self._shared):
            self._sources.append(self._allocate(count_bytes(layer)))
            self.held.append(_pack(layer, self._sources[-1]))
            if self._scratch is not None:
                self._scratch.settle(self._sources[-1])
        if len(self.held) == len(self) and self._sources:
            self._ring = self._make_ring()

    def _allocate(self, num_bytes: int) -> torch.Tensor:
        if self._scratch is not None:
            return self._scratch.allocate(num_bytes)
        return _allocate(num_bytes, pinned=self._device.type == "cuda")

    def _share(self, layer: _T, shared: Shared) -> bool:
        """Let the next layer live in shared memory; False, and a warning, if others' bytes do.

        Raises:
            MemoryError: if it cannot be pinned.
        """
        index, is_gpu = len(self.held), self._device.type == "cuda"
        try:
            with shared.take(index, count_bytes(layer)) as (room, is_whole):
                if is_gpu:
                    if not is_whole:
                        _touch(room)
                    _pin(room)
                self._sources.append(room)
                packed = _match(layer, room) if is_whole else _pack(layer, room)
        except OSError as error:
            log.warning(
                "host memory: layer %d cannot be shared with other processes (%s); this one keeps "
                "a copy of its own",
                index,
                error,
            )
            return False
        if packed is not None:
            self.held.append(packed)
            return True
        self._sources.pop()
        if is_gpu:
            _unpin([room], self._device)
        log.warning(
            "host memory: layer %d has other bytes in another process of this model; this one "
            "keeps a copy of its own",
            index,
        )
        return False

    def _make_ring(self) -> _Sources | None:
        """How the sources come to where they are used; None where they are there."""
        if self._make_link is None:
            return None if self._scratch is None else _Mapped(self._sources, self._scratch)
        slot_bytes = max(len(source) for source in self._sources)
        link = self._make_link(self._num_slots, slot_bytes)
        if self._scratch is not None:
            link = DiskLink(link, self._scratch, slot_bytes, self._device)
        return _Ring(self._sources, link)

    def __len__(self) -> int:
        return len(self.is_streamed)

    def __iter__(self) -> Iterator[_T]:
        """A pass: the layers in order, each valid until the next one.

        Raises:
            RuntimeError: if another pass has begun before this one was over.
            OSError: if a disk does not give a layer back.
        """
        assert len(self.held) == len(self), "some layers are missing"
        if self._ring is None:
            yield from self.held
            return
        self._num_passes += 1
        this_pass = self._num_passes
        self._ring.rewind()
        for layer, is_streamed in zip(self.held, self.is_streamed, strict=True):
            if is_streamed:
                yield _unpack(layer, self._ring.take())
            else:
                yield layer
            # Nothing is done when a pass is given up, since that may be noticed late: an exception
            # that is kept somewhere keeps its pass as well.
            if this_pass != self._num_passes:
                raise RuntimeError("another pass over the layers has begun; this one is over")
            if is_streamed:
                self._ring.release()


def _allocate(num_bytes: int, *, pinned: bool) -> torch.Tensor:
    """Host memory, uint8 [num_bytes].

    Pinned, it takes whole pages and no more: torch's own pinned memory comes in powers of two, up
    to twice of what a layer needs.
    """
    if not pinned:
        return torch.empty(num_bytes, dtype=torch.uint8)
    # Pages of its own, since none may be pinned twice.
    pages = mmap.mmap(-1, max(num_bytes, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError, AttributeError):
        pages.madvise(mmap.MADV_HUGEPAGE)
    room = torch.frombuffer(pages, dtype=torch.uint8)
    _touch(room)
    _pin(room)
    return room[:num_bytes]


def _touch(room: torch.Tensor) -> None:
    """Have the system give memory, with all threads: the driver would ask for it with one."""
    room.zero_()


def _pin(room: torch.Tensor) -> None:
    """Let a GPU copy from memory on its own, uint8 [bytes] from the beginning of a page on.

    Raises:
        MemoryError: if it cannot be pinned.
    """
    status = int(torch.cuda.cudart().cudaHostRegister(room.data_ptr(), len(room), 0))
    if status:
        raise MemoryError(
            f"host memory: {show_gb(len(room), up=True)} more cannot be pinned (CUDA error "
            f"{status}); free some, or stream fewer layers"
        )


def _unpin(sources: Sequence[torch.Tensor], device: torch.device) -> None:
    """Let go of what `_pin` pinned, once no copy reads it."""
    torch.cuda.synchronize(device)
    for source in sources:
        torch.cuda.cudart().cudaHostUnregister(source.data_ptr())
