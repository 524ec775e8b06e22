"""Host memory that lies in a file: filled once, read for every batch, gone with its process.

The file is in LOGITMILL_SCRATCH, else in the cache folder of `mirror.py`, else in the system's
temporary folder. It has no name, so nothing is left behind however the process ends.

A part of it is a tensor over mapped pages, and is known by where it is mapped. Its bytes may be
used there, which has the kernel bring them page by page, or be read into other memory.
"""

from __future__ import annotations

import errno
import logging
import mmap
import os
import tempfile
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from .mirror import cache_folder
from .placement import show_gb

log = logging.getLogger(__name__)

# What a thread reads at a time, and how many do: one alone leaves a disk's queue empty.
_BLOCK_BYTES = 2 << 20
_NUM_THREADS = 8
# What the kernel reads ahead when asked to, whatever the disk: it takes no more of a longer range.
_AHEAD_BYTES = 128 << 10
# What is read back to see how fast a disk is.
_SAMPLE_BYTES = 512 << 20
_IN_MEMORY = ("tmpfs", "ramfs", "devtmpfs")


_WORKS = "set LOGITMILL_SCRATCH to a folder on a larger disk"


class Scratch:
    """A file without a name on a local disk."""

    def __init__(self, num_bytes: int) -> None:
        """A file that about `num_bytes` will be put into.

        Raises:
            ValueError: naming the folders that will not do, and why.
        """
        self.folder = find_folder(num_bytes)
        """Where the file is."""
        with tempfile.TemporaryFile(dir=self.folder, buffering=0) as file:
            self._fd = os.dup(file.fileno())
        weakref.finalize(self, os.close, self._fd)
        self._num_bytes = 0
        self._places: dict[int, tuple[int, mmap.mmap]] = {}
        self._readers = ThreadPoolExecutor(_NUM_THREADS, "logitmill-scratch")
        # One thread, so that what is used first is read first.
        self._ahead = ThreadPoolExecutor(1, "logitmill-scratch-ahead")
        log.info("scratch: layers are put into %s, %s", self.folder, show_gb(num_bytes, up=True))

    def allocate(self, num_bytes: int) -> torch.Tensor:
        """A new part, uint8 [num_bytes], to be filled and then settled.

        Raises:
            ValueError: if the disk is full.
        """
        start, unit = self._num_bytes, mmap.ALLOCATIONGRANULARITY
        size = -(-max(num_bytes, 1) // unit) * unit
        try:
            # To fill pages that a full disk has no room for would end the process by a signal.
            os.posix_fallocate(self._fd, start, size)
        except OSError as error:
            raise ValueError(
                f"scratch: {self.folder} has no room for {show_gb(num_bytes, up=True)} more "
                f"({error.strerror}); {_WORKS}"
            ) from None
        pages = mmap.mmap(self._fd, size, offset=start)
        part = torch.frombuffer(pages, dtype=torch.uint8, count=max(num_bytes, 1))
        self._places[part.data_ptr()] = (start, pages)
        self._num_bytes += size
        return part

    def settle(self, part: torch.Tensor) -> None:
        """Bring a part that has been filled to the disk, and give back the memory that it took."""
        os.fdatasync(self._fd)
        self.forget(part)
        start, _ = self._places[part.data_ptr()]
        os.posix_fadvise(self._fd, start, len(part), os.POSIX_FADV_DONTNEED)

    def expect(self, part: torch.Tensor) -> None:
        """Have a part read into memory that the kernel may take back, while the caller goes on."""
        start, pages = self._places[part.data_ptr()]
        self._ahead.submit(_read_ahead, self, start, len(pages))

    def forget(self, part: torch.Tensor) -> None:
        """Let go of a part's pages; whether they stay in free memory is for the kernel."""
        _, pages = self._places[part.data_ptr()]
        pages.madvise(mmap.MADV_DONTNEED)

    def read(self, part: torch.Tensor, out: torch.Tensor) -> None:
        """Copy a part into `out`, uint8 of as many bytes, past the mapped pages.

        Raises:
            OSError: if the disk does not give it.
        """
        start, _ = self._places[part.data_ptr()]
        self._read(start, out)

    def measure(self) -> float:
        """Bytes a second that the disk gives, of the first part of what has been settled."""
        num_bytes = min(self._num_bytes, _SAMPLE_BYTES)
        out = torch.zeros(_NUM_THREADS * _BLOCK_BYTES, dtype=torch.uint8)
        os.posix_fadvise(self._fd, 0, num_bytes, os.POSIX_FADV_DONTNEED)
        start = time.perf_counter()
        for at in range(0, num_bytes, len(out)):
            self._read(at, out[: num_bytes - at])
        seconds = time.perf_counter() - start
        os.posix_fadvise(self._fd, 0, num_bytes, os.POSIX_FADV_DONTNEED)
        return num_bytes / seconds

    def _read(self, start: int, out: torch.Tensor) -> None:
        view = out.numpy().data
        jobs = [
            self._readers.submit(_fill, self._fd, start + at, view[at : at + _BLOCK_BYTES])
            for at in range(0, len(out), _BLOCK_BYTES)
        ]
        for job in jobs:
            job.result()


def _fill(fd: int, start: int, view: memoryview) -> None:
    done = 0
    while done < len(view):
        got = os.preadv(fd, [view[done:]], start + done)
        if not got:
            raise OSError(errno.EIO, f"the file ends at byte {start + done}")
        done += got


def _read_ahead(scratch: Scratch, start: int, num_bytes: int) -> None:
    """`scratch` keeps its file open until this is done."""
    for at in range(start, start + num_bytes, _AHEAD_BYTES):
        os.posix_fadvise(scratch._fd, at, _AHEAD_BYTES, os.POSIX_FADV_WILLNEED)


def find_folder(num_bytes: int) -> Path:
    """The first folder that will do for a file of `num_bytes`.

    Raises:
        ValueError: naming the folders that will not do, and why.
    """
    given = os.environ.get("LOGITMILL_SCRATCH")
    folders = [Path(given).expanduser()] if given else [cache_folder(), Path(tempfile.gettempdir())]
    reasons = []
    if given and "://" in given:
        raise ValueError(
            f"scratch: LOGITMILL_SCRATCH {given!r} is no folder of this machine; {_WORKS}"
        )
    for folder in folders:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                disk = os.statvfs(folder)
        except OSError as error:
            reasons.append(f"{folder} cannot be written to ({error.strerror})")
            continue
        kind, free = _file_system(folder), disk.f_bavail * disk.f_frsize
        if kind in _IN_MEMORY:
            reasons.append(f"{folder} is memory ({kind})")
        elif free < num_bytes:
            reasons.append(f"{folder} has {show_gb(free)} free")
        else:
            return folder
    reason = ", ".join(reasons)
    raise ValueError(f"scratch: {reason}, the layers take {show_gb(num_bytes, up=True)}; {_WORKS}")


def _file_system(folder: Path) -> str | None:
    """What kind of file system a folder is on, if /proc says so."""
    device = folder.stat().st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    try:
        mounts = Path("/proc/self/mountinfo").read_text().splitlines()
    except OSError:
        return None
    # "36 35 98:0 /root /where options... - ext4 /dev/vda ..."
    for mount in mounts:
        front, _, back = mount.partition(" - ")
        if front.split()[2] == number:
            return back.split()[0]
    return None
