"""Copies between host and device that nobody waits for, and the time that a device is at work."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Generic, TypeVar

import torch

_T = TypeVar("_T")
_U = TypeVar("_U")


def on(device: torch.device) -> AbstractContextManager[object]:
    """Makes a GPU the current one, where Triton launches its kernels and events are recorded."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def to_device(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A copy on the device, through pinned memory, so that the host does not wait for it."""
    if device.type != "cuda":
        return x.to(device)
    return x.pin_memory().to(device, non_blocking=True)


class Arrival(Generic[_T]):
    """A result on its way from the device to the host."""

    def __init__(self, event: torch.cuda.Event | None, make: Callable[[], _T]) -> None:
        self._event = event
        self._make = make
        self._result: list[_T] = []

    def wait(self) -> _T:
        """The result, once it is there."""
        if not self._result:
            if self._event is not None:
                self._event.synchronize()
            self._result.append(self._make())
        return self._result[0]

    def then(self, change: Callable[[_T], _U]) -> Arrival[_U]:
        """What `change` makes of the result, once it is there."""
        return Arrival(self._event, lambda: change(self._make()))


def to_host(*tensors: torch.Tensor) -> Arrival[list[torch.Tensor]]:
    """Copies of a device's tensors in pinned host memory; of a CPU's, the tensors themselves."""
    device = tensors[0].device
    if device.type != "cuda":
        return Arrival(None, lambda: list(tensors))
    copies = [torch.empty(x.shape, dtype=x.dtype, pin_memory=True) for x in tensors]
    for copy, x in zip(copies, tensors, strict=True):
        copy.copy_(x, non_blocking=True)
    event = torch.cuda.Event()
    event.record()
    return Arrival(event, lambda: copies)


Mark = torch.cuda.Event | None


class Aside:
    """A stream beside a GPU's current one, so that what is launched there need not wait for what
    was launched later here; on a CPU there is none, and everything is done at once."""

    def __init__(self, device: torch.device) -> None:
        self._stream: torch.cuda.Stream | None = None
        self._device = device
        if device.type == "cuda":
            # What has results that somebody waits for comes first.
            self._stream = torch.cuda.Stream(device, priority=-1)

    def current(self) -> AbstractContextManager[object]:
        """Makes it the current stream."""
        # torch's own context of no stream would start CUDA, for a CPU's work as well.
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    def mark(self) -> Mark:
        """What has been launched so far on the current stream."""
        if self._stream is None:
            return None
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._device))
        return event

    def follow(self, mark: Mark, *tensors: torch.Tensor) -> None:
        """What is launched aside from now on comes after the mark, and may use `tensors`."""
        if self._stream is None or mark is None:
            return
        self._stream.wait_event(mark)
        for tensor in tensors:
            tensor.record_stream(self._stream)


class Meter:
    """Seconds that a device was at work on what was launched in spans. Safe to use from threads.

    What it waits for within a span counts: a layer that is still on its way to the device, room for
    results that leave it, a host that is slow to launch. The gaps between spans do not.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._lock = threading.Lock()
        self._seconds = 0.0
        self._open: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()
        self._last: torch.cuda.Event | None = None
        """Where the last span that is counted ended."""

    @contextmanager
    def span(self) -> Iterator[None]:
        """Counts what is launched in the block, from its start on the device to its end there."""
        if self._device.type != "cuda":
            started = time.perf_counter()
            yield
            with self._lock:
                self._seconds += time.perf_counter() - started
            return
        begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        stream = torch.cuda.current_stream(self._device)
        begun.record(stream)
        yield
        ended.record(stream)
        with self._lock:
            self._open.append((begun, ended))
            # Who never asks shall not keep the events of every batch.
            self._count()

    def take(self) -> float:
        """Of the spans that are done by now, and were not when this was asked last."""
        with self._lock:
            self._count()
            seconds, self._seconds = self._seconds, 0.0
            return seconds

    def _count(self) -> None:
        while self._open and self._open[0][1].query():
            begun, ended = self._open.popleft()
            milliseconds = begun.elapsed_time(ended)
            if self._last is not None:
                # Spans of two streams lie beside one another.
                milliseconds = min(milliseconds, self._last.elapsed_time(ended))
            if milliseconds > 0:
                self._seconds += milliseconds / 1e3
                self._last = ended


class Outbox:
    """A ring of buffers through which large results leave a device, on a stream of their own.

    At most `slots` results may be under way; the first one's host memory is used again for the
    one after the last. On a CPU nothing is copied.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype, slots: int) -> None:
        self.dtype = dtype
        self._device = device
        self._slots = [_Slot() for _ in range(slots)]
        self._turn = 0
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    @property
    def num_bytes(self) -> int:
        """What the buffers on the device take for each number of a result."""
        return len(self._slots) * self.dtype.itemsize

    def claim(self, num_rows: int, num_columns: int) -> torch.Tensor:
        """Room on the device for the next result, which `send` then takes; [rows, columns]."""
        if self._stream is None:
            return torch.empty(num_rows, num_columns, dtype=self.dtype)
        slot = self._slots[self._turn]
        size = num_rows * num_columns
        if slot.there is None or slot.there.numel() < size:
            slot.there = torch.empty(size, dtype=self.dtype, device=self._device)
            slot.here = torch.empty(size, dtype=self.dtype, pin_memory=True)
        if slot.sent is not None:
            torch.cuda.current_stream(self._device).wait_event(slot.sent)
        return slot.there[:size].view(num_rows, num_columns)

    def send(self, claimed: torch.Tensor) -> Arrival[torch.Tensor]:
        """Start the copy of what the last `claim` gave, once all before it is computed."""
        if self._stream is None:
            return Arrival(None, lambda: claimed)
        slot = self._slots[self._turn]
        self._turn = (self._turn + 1) % len(self._slots)
        assert slot.here is not None
        here = slot.here[: claimed.numel()].view_as(claimed)
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            here.copy_(claimed, non_blocking=True)
            slot.sent = torch.cuda.Event()
            slot.sent.record(self._stream)
        return Arrival(slot.sent, lambda: here)


class _Slot:
    """One buffer on either side, and when the last copy between them was done."""

    def __init__(self) -> None:
        self.there: torch.Tensor | None = None
        self.here: torch.Tensor | None = None
        self.sent: torch.cuda.Event | None = None
