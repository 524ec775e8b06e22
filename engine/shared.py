"""Host memory that processes have in common: one copy of a model's layers for all that stream them.

Each layer is a file in memory (memfd) that lies in no folder, so it is gone with the last process
that has it, however that ends. Its name, which never changes, says what its bytes are, and by its
name others find it among the open files of processes:

    /proc/11/fd/40 -> /memfd:logitmill-<key>-0 (deleted)     process 11 has made it
    /proc/12/fd/31 -> /memfd:logitmill-<key>-0 (deleted)     process 12 has opened /proc/11/fd/40

Nothing is written down elsewhere, so nothing can be out of date: what a process has open now is
what is there. While files are looked for and made, a folder in the system's temporary folder is
locked; it stays empty.

A file is filled by whoever locks it first, and then sealed: it is whole, and of one size for good.
A process that is killed before that leaves the lock, and the file as it is, to the next one.

What another user has made is not taken, and processes in other PID namespaces are not seen. Where
memory cannot be shared, each process keeps a copy of its own.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import mmap
import os
import tempfile
import weakref
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from .checkpoint import Checkpoint
from .formats import Scheme

log = logging.getLogger(__name__)


def identify(
    checkpoint: Checkpoint, scheme: Scheme, *, device: torch.device, dtype: torch.dtype
) -> str | None:
    """A hash of what decides the bytes of a checkpoint's layers; None if it is not one of files."""
    # What stands for a checkpoint draws its weights in an order that nothing here knows.
    if not isinstance(checkpoint, Checkpoint):
        return None
    paths = sorted(x for x in checkpoint.folder.glob("*.safetensors") if x.is_file())
    stats = [path.stat() for path in paths]
    decides = {
        "paths": [str(path.resolve()) for path in paths],
        "files": [(x.st_dev, x.st_ino, x.st_size, x.st_mtime_ns) for x in stats],
        "config": checkpoint.config,
        "runs": sorted(scheme.runs.items()),
        "emulated": scheme.emulated,
        "dtype": str(dtype),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        # Another version of the code lies elsewhere, or its bytes are found to differ.
        "code": (str(Path(__file__).resolve()), torch.__version__),
    }
    return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()


def share(key: str | None, num_layers: int) -> Shared | None:
    """The memory of the layers that `key` is of; None, and a warning, where it cannot be had."""
    if key is None:
        return None
    try:
        shared = Shared(key, num_layers)
    except OSError as error:
        log.warning(
            "host memory: layers cannot be shared with other processes (%s); this one keeps a copy "
            "of its own",
            # The error itself would keep what was opened, as long as the line is kept.
            str(error),
        )
        return None
    if shared.whole:
        log.info(
            "host memory: %d of %d layers are there already, and shared with other processes",
            len(shared.whole),
            num_layers,
        )
    return shared


class Shared:
    """Memory of a model's layers, which other processes of this user have as well.

    All of it stays as long as any process has one of these.
    """

    def __init__(self, key: str, num_layers: int) -> None:
        """Find the layers that `key` is of; those that are not there are made, empty.

        Raises:
            OSError: saying what stands in the way.
        """
        if not (hasattr(os, "memfd_create") and hasattr(fcntl, "F_ADD_SEALS")):
            raise OSError("this system, or this build of Python, has no memfd_create")
        names = [f"logitmill-{key}-{i}" for i in range(num_layers)]
        self._fds: list[int] = []
        weakref.finalize(self, _close, self._fds)
        with _lock():
            found = _find(names)
            for name in names:
                opened = (_open(path, name) for path in found[name])
                fd = next((fd for fd in opened if fd is not None), None)
                if fd is None:
                    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
                self._fds.append(fd)

    @property
    def whole(self) -> frozenset[int]:
        """Layers whose bytes are there."""
        return frozenset(i for i, fd in enumerate(self._fds) if _is_whole(fd))

    @contextmanager
    def take(self, index: int, num_bytes: int) -> Iterator[tuple[torch.Tensor, bool]]:
        """A layer's memory, uint8, and whether it is whole.

        If it is, it is not to be written to, and has the size that it was filled with. If not, it
        is [num_bytes], to be filled by the end of the context; others wait until then.

        Raises:
            OSError: if there is no memory.
        """
        fd = self._fds[index]
        fcntl.flock(fd, fcntl.LOCK_EX)
        try:
            if not _is_whole(fd):
                os.ftruncate(fd, num_bytes)
                try:
                    yield _map(fd), False
                except BaseException:
                    os.ftruncate(fd, 0)
                    raise
                fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _seals())
                return
        finally:
            fcntl.flock(fd, fcntl.LOCK_UN)
        yield _map(fd), True


def _close(fds: Sequence[int]) -> None:
    for fd in fds:
        os.close(fd)


def _seals() -> int:
    return fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


def _is_whole(fd: int) -> bool:
    return fcntl.fcntl(fd, fcntl.F_GET_SEALS) & _seals() == _seals()


def _map(fd: int) -> torch.Tensor:
    return torch.frombuffer(mmap.mmap(fd, os.fstat(fd).st_size), dtype=torch.uint8)


@contextmanager
def _lock() -> Iterator[None]:
    """Let one process of this user at a time look for files and make them."""
    folder = Path(tempfile.gettempdir()) / f"logitmill-{os.geteuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        stat = os.fstat(fd)
        # Whoever can open it can lock it for good.
        if stat.st_uid != os.geteuid() or stat.st_mode & 0o077:
            raise PermissionError(
                f"{folder} is open to other users; remove it, or set TMPDIR to another folder"
            )
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def _find(names: Sequence[str]) -> defaultdict[str, list[str]]:
    """Where processes have files of these names open."""
    links = {_link(name): name for name in names}
    found = defaultdict(list)
    for path in _list_open():
        try:
            name = links.get(os.readlink(path))
        except OSError:
            continue
        if name is not None:
            found[name].append(path)
    return found


def _list_open() -> Iterator[str]:
    """What processes have open that may be looked into, as paths in /proc."""
    for process in os.listdir("/proc"):
        if not process.isdigit():
            continue
        folder = f"/proc/{process}/fd"
        try:
            fds = os.listdir(folder)
        except OSError:
            # It has ended, or is another user's.
            continue
        yield from (f"{folder}/{fd}" for fd in fds)


def _open(path: str, name: str) -> int | None:
    """The file of this name that a process has open at `path`; None if it is another one."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return None
    # Since it was found there, the process may have closed it and opened another, or be another
    # process. And whoever made it can write to it, so that has to be this user.
    if os.readlink(f"/proc/self/fd/{fd}") == _link(name) and os.fstat(fd).st_uid == os.geteuid():
        return fd
    os.close(fd)
    return None


def _link(name: str) -> str:
    return f"/memfd:{name} (deleted)"
