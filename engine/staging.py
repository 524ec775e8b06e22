"""Brings ranges of files to a device: threads read into pinned buffers, copies run behind them.

A file that is mapped and copied as it stands goes through one thread's page faults and the
driver's own small buffer; reading a range with several threads keeps a disk's queue full and a
copy engine busy.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue

import torch

_CHUNK_BYTES = 8 << 20
_NUM_THREADS = 8


class Stage:
    """A ring of buffers between files and one device."""

    def __init__(
        self,
        device: torch.device,
        *,
        chunk_bytes: int = _CHUNK_BYTES,
        num_threads: int = _NUM_THREADS,
    ) -> None:
        self.device = device
        self._chunk_bytes = chunk_bytes
        self._pool = ThreadPoolExecutor(num_threads)
        self._free: SimpleQueue[_Buffer] = SimpleQueue()
        # Two a thread: one is filled while the other's copy runs.
        for _ in range(2 * num_threads):
            self._free.put(_Buffer(chunk_bytes, device))

    def fetch(self, fd: int, start: int, out: torch.Tensor) -> None:
        """Fill `out`, uint8 [bytes] on the device, with a file's bytes from `start` on.

        Returns when everything is read and its copies are queued on the device's current stream,
        so what is queued there next sees them.

        Raises:
            EOFError: if the file ends before `out` is full.
        """
        chunks = [
            (start + at, out[at : at + self._chunk_bytes])
            for at in range(0, len(out), self._chunk_bytes)
        ]
        if len(chunks) == 1:
            self._move(fd, *chunks[0], None)
            return
        stream = torch.cuda.current_stream(self.device) if self.device.type == "cuda" else None
        jobs = [self._pool.submit(self._move, fd, at, part, stream) for at, part in chunks]
        for job in jobs:
            job.result()

    def close(self) -> None:
        """Wait for the threads and let go of the buffers."""
        self._pool.shutdown()
        while not self._free.empty():
            self._free.get().wait()

    def _move(
        self, fd: int, start: int, out: torch.Tensor, stream: torch.cuda.Stream | None
    ) -> None:
        buffer = self._free.get()
        try:
            buffer.wait()
            buffer.fill(fd, start, len(out))
            # A thread of the pool has a current stream of its own.
            with torch.cuda.stream(stream):
                buffer.copy_to(out)
        finally:
            self._free.put(buffer)


class _Buffer:
    """Host memory, pinned where the device is a GPU, and the copy that last left it."""

    def __init__(self, num_bytes: int, device: torch.device) -> None:
        is_gpu = device.type == "cuda"
        self._bytes = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=is_gpu)
        self._view = self._bytes.numpy().data
        self._copied = torch.cuda.Event() if is_gpu else None

    def wait(self) -> None:
        """Until the last copy has left the buffer."""
        if self._copied is not None:
            self._copied.synchronize()

    def fill(self, fd: int, start: int, num_bytes: int) -> None:
        done = 0
        while done < num_bytes:
            got = os.preadv(fd, [self._view[done:num_bytes]], start + done)
            if not got:
                raise EOFError(f"the file ends at byte {start + done}")
            done += got

    def copy_to(self, out: torch.Tensor) -> None:
        out.copy_(self._bytes[: len(out)], non_blocking=True)
        if self._copied is not None:
            self._copied.record(torch.cuda.current_stream(out.device))
