"""A model folder of any file system, brought to a folder of this machine.

    <cache>/models/<last part of the URI>-<hash>/config.json, model.safetensors, ...

`<cache>` is LOGITMILL_CACHE, else XDG_CACHE_HOME/logitmill, else ~/.cache/logitmill. The hash is of
the URI and of every file's name, size and ETag (its time, where there is no ETag), so files that
changed are other files, and what is there is not fetched again. A file has another name until it is
whole: a process that is killed leaves no half of one, and the next takes up where it ended.

Where headers are enough, the folder's name ends in "-headers", and of its safetensors all that
follows the header is a hole.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from .remote import SchemeError, Stat, connect, is_io, protocols, redact, scrub, stat_of

log = logging.getLogger(__name__)

_NUM_THREADS = 8
_PART = ".part"
_WEIGHTS = ".safetensors"
# No header is larger: the library that reads it refuses one.
_MOST_HEADER_BYTES = 100_000_000
# Between one line and the next on how much is here.
_SECONDS = 5.0


class RemoteFolder:
    """The files of one folder, without those of folders below it."""

    def __init__(self, uri: str, options: Mapping[str, Any]) -> None:
        """List the folder.

        Raises:
            ValueError: naming the URI, if it holds a credential or cannot be listed.
        """
        if redact(uri) != uri:
            raise ValueError(
                f"model: {redact(uri)!r} holds a credential; give it in the environment instead"
            )
        self.uri = uri.rstrip("/")
        self._options = options
        with self._plain_errors("cannot be opened"):
            self._fs, path = connect(uri, options)
            self._path = path.rstrip("/") or "/"
        self.local = Path(self._path) if "file" in protocols(self._fs) else None
        """Where it lies on this machine anyway; it is not listed then."""
        self._stats = {} if self.local else self._list()

    @property
    def names(self) -> list[str]:
        return sorted(self._stats)

    def fetch(self, names: Sequence[str], *, headers_only: bool = False) -> Path:
        """A local folder of these files, with nothing fetched that is there.

        What is fetched is said, and how far it is every few seconds.

        Args:
            names: of `self.names`.
            headers_only: whether the headers of safetensors will do. What follows them is then a
                hole of the same length, unless all of the files are there already.

        Raises:
            ValueError: naming the URI and the file that cannot be had.
        """
        folder = self._folder(names)
        headers_only = headers_only and not all((folder / name).is_file() for name in names)
        if headers_only:
            folder = folder.with_name(folder.name + "-headers")
        with self._plain_errors(f"cannot be kept in {folder.parent} (set LOGITMILL_CACHE)"):
            folder.mkdir(parents=True, exist_ok=True)
            lock = os.open(folder.with_name(folder.name + ".lock"), os.O_CREAT | os.O_RDWR, 0o644)
        try:
            # Another process may be fetching the same; what it has fetched is there afterwards.
            fcntl.flock(lock, fcntl.LOCK_EX)
            # What has neither an ETag nor a time may have changed.
            left = [
                name
                for name in names
                if not (folder / name).is_file() or _identity(self._stats[name]) is None
            ]
            if left:
                self._fetch_all(left, folder, headers_only)
        finally:
            os.close(lock)
        return folder

    def _fetch_all(self, names: Sequence[str], folder: Path, headers_only: bool) -> None:
        whole = {
            name: self._stats[name].size or 0
            for name in names
            if not (headers_only and name.endswith(_WEIGHTS))
        }
        total = sum(whole.values()) / 1e9
        log.warning(
            "model: fetching %d files, %.2f GB%s, of %s into %s",
            *(len(names), total, " and headers of weights" if headers_only else ""),
            *(self.uri, folder),
        )
        # Large ones first, so that none of them is left for the end.
        order = sorted(names, key=lambda name: -(self._stats[name].size or 0))
        pool = ThreadPoolExecutor(_NUM_THREADS)
        try:
            left = {
                pool.submit(self._fetch, name, folder, headers_only=name not in whole)
                for name in order
            }
            while left:
                done, left = wait(left, _SECONDS, FIRST_EXCEPTION)
                for job in done:
                    job.result()
                if left:
                    here = sum(_count_fetched(folder / name) for name in whole) / 1e9
                    log.warning("model: %.2f of %.2f GB are here", here, total)
        finally:
            pool.shutdown(cancel_futures=True)

    def _fetch(self, name: str, folder: Path, *, headers_only: bool) -> None:
        expected = self._stats[name]
        part = folder / (name + _PART)
        with self._plain_errors("cannot be fetched", name):
            try:
                if headers_only:
                    self._fetch_header(name, part)
                else:
                    self._fs.get_file(f"{self._path}/{name}", str(part))
                size = part.stat().st_size
                if expected.size not in (None, size):
                    raise OSError(f"{size} of {expected.size} bytes came")
                if self._read_stats().get(name) != expected:
                    raise OSError("it was written anew in the meantime; start again")
                part.replace(folder / name)
            finally:
                part.unlink(missing_ok=True)

    def _fetch_header(self, name: str, part: Path) -> None:
        """A file as long as the one of that name, and the same as far as its header goes."""
        path, size = f"{self._path}/{name}", self._stats[name].size
        if size is None:
            raise OSError("the server does not say how long it is")
        first = self._fs.cat_file(path, start=0, end=min(8, size))[:8]
        end = min(8 + int.from_bytes(first, "little"), size, 8 + _MOST_HEADER_BYTES)
        with part.open("wb") as file:
            file.write(first)
            if end > 8:
                file.write(self._fs.cat_file(path, start=8, end=end)[: end - 8])
            file.truncate(size)

    def _list(self) -> dict[str, Stat]:
        with self._plain_errors("cannot be listed"):
            if self._fs.isfile(self._path):
                raise ValueError(
                    f"model: {self.uri!r} is a file; name the folder that holds config.json"
                )
            return self._read_stats()

    def _read_stats(self) -> dict[str, Stat]:
        """Of every file as it is now, by its name.

        From a listing each time: some file systems tell the time otherwise when asked for one file.
        """
        self._fs.invalidate_cache(self._path)
        return {
            name: stat_of(info)
            for info in self._fs.ls(self._path, detail=True)
            if info["type"] == "file" and (name := info["name"].rstrip("/").rpartition("/")[2])
        }

    def _folder(self, names: Sequence[str]) -> Path:
        decides = [(name, _identity(self._stats[name])) for name in sorted(names)]
        key = hashlib.sha256(json.dumps([self.uri, decides]).encode()).hexdigest()[:16]
        return cache_folder() / "models" / f"{self.uri.rpartition('/')[2]}-{key}"

    @contextmanager
    def _plain_errors(self, what: str, name: str | None = None) -> Iterator[None]:
        """The chain is cut on purpose: tracebacks of HTTP clients show signed URLs and headers."""
        file = f", file {name!r}," if name else ""
        try:
            yield
        except SchemeError as error:
            raise ValueError(f"model: {self.uri!r}: {error}") from None
        except Exception as error:
            if not is_io(error):
                raise
            if isinstance(error, FileNotFoundError) and name is None:
                raise ValueError(
                    f"model: there is nothing at {self.uri!r}; give the URI of the folder that "
                    "holds config.json"
                ) from None
            said = scrub(error, self._options)
            raise ValueError(f"model: {self.uri!r}{file} {what}: {said}") from None


def _count_fetched(path: Path) -> int:
    """Bytes of a file that are here, while it is written too."""
    for here in (path, path.with_name(path.name + _PART)):
        with suppress(FileNotFoundError):
            return here.stat().st_size
    return 0


def _identity(stat: Stat) -> tuple[int | None, str] | None:
    """What a file has as long as it is the same; None if its file system has no such thing."""
    mark = stat.etag or stat.stamp
    return (stat.size, mark) if mark else None


def cache_folder() -> Path:
    """Where this machine keeps what it fetched."""
    given = os.environ.get("LOGITMILL_CACHE")
    if given:
        return Path(given).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "logitmill"
