"""Local folders (`.tmp-*`) for what is not finished yet, each locked while its writer lives.

Whoever finds one without a lock may remove it.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import mkdtemp

TEMPORARY = ".tmp-"
"""What names of unfinished files begin with."""


def make_scratch(within: Path) -> tuple[Path, int]:
    """A new folder, and the lock on it that this process has for as long as it lives."""
    while True:
        folder = Path(mkdtemp(prefix=TEMPORARY, dir=within))
        # Until it is locked it may be swept, and then another is taken.
        try:
            lock = os.open(folder, os.O_RDONLY)
        except FileNotFoundError:
            continue
        fcntl.flock(lock, fcntl.LOCK_EX)
        if folder.exists():
            return folder, lock
        os.close(lock)


def sweep(within: Path) -> None:
    """Remove the scratch folders whose writers are gone: those that nobody holds the lock of."""
    for folder in within.glob(f"{TEMPORARY}*"):
        with suppress(FileNotFoundError), _claim(folder) as is_claimed:
            if is_claimed:
                shutil.rmtree(folder, ignore_errors=True)


def find_live(within: Path) -> set[str]:
    """Names of the scratch folders whose writers live."""
    found = set()
    for folder in within.glob(f"{TEMPORARY}*"):
        with suppress(FileNotFoundError), _claim(folder) as is_claimed:
            if not is_claimed:
                found.add(folder.name)
    return found


@contextmanager
def _claim(folder: Path) -> Iterator[bool]:
    """Hold the lock of a scratch folder, if nobody else does; FileNotFoundError if it is gone."""
    lock = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True
    finally:
        os.close(lock)
