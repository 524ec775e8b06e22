"""Whether no two documents have the same id, of any number of documents in bounded memory."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

_HASH_BYTES = 8
_HELD = 1 << 23
"""Hashes that are held in memory: 64 MB."""
_FILES = 256
"""What there is more of goes to so many files: a billion hashes are files of 32 MB."""
_SUSPECTS = 1 << 20


def find_twin(ids: Callable[[], Iterable[tuple[str, str]]]) -> tuple[str, str, str] | None:
    """An id that stands twice, and its first two places; None if there is none.

    Args:
        ids: gives (id, place) of every document, the same each time; called again only if two ids
            have one hash.

    Raises:
        OSError: if the disk of temporary files is full: 8 bytes a document, of many documents.
    """
    with TemporaryDirectory(prefix="logitmill-ids-") as folder:
        hashes = (_hash(doc_id) for doc_id, _ in ids())
        for suspects in _repeated(hashes, Path(folder)):
            for start in range(0, len(suspects), _SUSPECTS):
                twin = _find_among(ids(), set(suspects[start : start + _SUSPECTS].tolist()))
                if twin is not None:
                    return twin
    return None


def _find_among(ids: Iterable[tuple[str, str]], suspects: set[int]) -> tuple[str, str, str] | None:
    """The first id of these hashes that comes again."""
    seen: dict[str, str] = {}
    for doc_id, place in ids:
        if _hash(doc_id) in suspects:
            if doc_id in seen:
                return doc_id, seen[doc_id], place
            seen[doc_id] = place
    return None


def _repeated(hashes: Iterator[int], folder: Path) -> Iterator[np.ndarray]:
    """uint64 hashes that come more than once, each once, in parts that share none."""
    held = array("Q", islice(hashes, _HELD))
    if len(held) < _HELD:
        yield _twice(np.asarray(held))
        return
    while held:
        _split(np.asarray(held), folder)
        held = array("Q", islice(hashes, _HELD))
    for file in sorted(folder.iterdir()):
        yield _twice(np.fromfile(file, np.uint64))


def _split(hashes: np.ndarray, folder: Path) -> None:
    """Append hashes to files: equal ones to the same."""
    ordered = np.sort(hashes)
    edges = np.searchsorted(ordered, np.arange(1, _FILES, dtype=np.uint64) << np.uint64(56))
    for number, part in enumerate(np.split(ordered, edges)):
        with (folder / f"{number:03d}").open("ab") as file:
            part.tofile(file)


def _twice(hashes: np.ndarray) -> np.ndarray:
    ordered = np.sort(hashes)
    return np.unique(ordered[1:][ordered[1:] == ordered[:-1]])


def _hash(doc_id: str) -> int:
    raw = doc_id.encode("utf-8", "backslashreplace")
    return int.from_bytes(hashlib.blake2b(raw, digest_size=_HASH_BYTES).digest(), "little")
