"""Where a corpus lies: files under one fsspec URI, in one order, and whether they changed.

Knows nothing of formats, documents or shards. Whatever goes wrong here is said in one line that
names the URI and shows no credential: neither `storage_options` nor what a URL carries in it.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, Literal

from ...engine.remote import (
    SchemeError,
    Stat,
    connect,
    is_io,
    nearest,
    protocols,
    redact,
    scrub,
    stat_of,
)

Codec = Literal["gzip", "zstd", "bz2"]
CODECS: dict[str, Codec] = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2"}
"""File name suffix -> Arrow's name of the compression."""

_NOT_DATA = {"__pycache__", "_SUCCESS", "_metadata", "_common_metadata"}
_PARTS_SHOWN = 5
_BLOCK_BYTES = 1 << 20


class CorpusError(ValueError):
    """The corpus cannot be read as asked. The message names field, value and what would work."""


@dataclass(frozen=True)
class File:
    """A listed file."""

    name: str
    """Path below the corpus's root, with "/" between its parts."""
    path: str
    """What the file system calls it."""
    stat: Stat


def codec_of(name: str) -> Codec | None:
    """Arrow's name of the compression that the file name's suffix says; None for none."""
    return CODECS.get(os.path.splitext(name)[1].lower())


def is_garbled(error: BaseException) -> bool:
    """Whether Arrow says that the bytes are wrong, as opposed to that they could not be had.

    Arrow raises plain `OSError`s without errno for corrupt pages and streams. An error of the file
    system under it comes through as itself, and is worth a retry instead.
    """
    import pyarrow as pa

    return isinstance(error, pa.ArrowException) or (type(error) is OSError and error.errno is None)


class Location:
    """The files that one URI stands for: a file, a folder (all the way down) or a glob.

    `root` is the folder that names are relative to: the folder itself, the part of a glob before
    its first wildcard, or the parent of a single file.
    """

    def __init__(
        self, uri: str, storage_options: Mapping[str, Any], kind: type[Exception] = CorpusError
    ):
        """Raises CorpusError for a URI that cannot be, and `kind` if it cannot be reached."""
        self.address = redact(uri)
        self._options = storage_options
        with self.plain_errors("opened", kind=kind):
            try:
                self.fs, path = connect(uri, storage_options)
            except SchemeError as error:
                raise CorpusError(f"uri={self.address!r}: {error}") from None
            self.path: str = path
            self.is_local = "file" in protocols(self.fs)
            self._is_http = bool({"http", "https"} & set(protocols(self.fs)))
            self._info = self._find()
            self.is_file = self._info is not None and self._info["type"] != "directory"
            self.root = self._root()
            self.root_name = self.root.rstrip("/").rsplit("/", 1)[-1]

    def files(self) -> list[File]:
        """Every file, sorted by name. Raises CorpusError if there is none."""
        if self.is_file:
            assert self._info is not None
            return [self._file(self.path, self._info)]
        with self.plain_errors("listed"):
            if self._info is not None:
                listed = self.fs.find(self.path, detail=True)
            else:
                listed = self.fs.glob(self.path, detail=True) if self._is_glob else {}
            infos = ((path, self._followed(path, info)) for path, info in listed.items())
            files = [self._file(path, info) for path, info in infos if info["type"] == "file"]
        files = [file for file in files if file.name and self._is_data(file.name)]
        if not files:
            raise CorpusError(f"uri={self.address!r}: {self._nothing(len(listed))}")
        return sorted(files, key=lambda file: file.name)

    def path_of(self, name: str) -> str:
        """What the file system calls the file of this name."""
        return self.path if self.is_file else f"{self.root.rstrip('/')}/{name}"

    def stat(self, name: str) -> Stat:
        """Size, ETag and time of the file as it is now. Raises FileNotFoundError."""
        return stat_of(self.fs.info(self.path_of(name)))

    def open(self, name: str, codec: Codec | None = None) -> BinaryIO:
        """The file's bytes, seekable unless a `codec` is given: then they are decompressed."""
        raw = self.fs.open(self.path_of(name), "rb", block_size=self._block_size)
        if isinstance(raw, io.BytesIO):
            # memory:// hands out its one handle, position included, to everybody who opens.
            raw = io.BytesIO(raw.getvalue())
        if codec is None:
            # fsspec's own readline fetches a whole block for every line.
            return io.BufferedReader(raw, _BLOCK_BYTES)
        import pyarrow as pa

        # Arrow's reader, not fsspec's: it reads all frames of a file and says where one is cut off.
        stream: Any = pa.CompressedInputStream(pa.PythonFile(raw, "r"), codec)
        return io.BufferedReader(stream, _BLOCK_BYTES)

    def digest(self, name: str) -> tuple[str, int]:
        """sha256 of the file's content, and its bytes."""
        return _digest(self.fs, self.path_of(name))

    def known_digest(self, name: str, stat: Stat) -> tuple[str, int]:
        """`digest`, made once a process for a file that keeps its size and time."""
        if not stat.stamp:
            return self.digest(name)
        return _known_digest(self.fs, self.path_of(name), stat)

    def scrub(self, error: BaseException) -> str:
        """One line for an error of a library, without anything from storage_options or a URL."""
        return scrub(error, self._options)

    @contextmanager
    def plain_errors(
        self, doing: str, name: str | None = None, kind: type[Exception] = CorpusError
    ) -> Iterator[None]:
        """Turns what file systems and their clients raise into one `kind` with one line.

        The chain is cut on purpose: tracebacks of HTTP clients show signed URLs and headers.
        """
        try:
            yield
        except Exception as error:
            if isinstance(error, CorpusError) or not (is_io(error) or is_garbled(error)):
                raise
            what = f"uri={self.address!r}" + (f", file {name!r}" if name else "")
            raise kind(f"{what} cannot be {doing}: {self.scrub(error)}") from None

    @property
    def _block_size(self) -> int | None:
        """Bytes that are fetched beyond those asked for; None leaves it to the file system.

        s3fs would fetch 50 MB to look at the first lines of a file, and for each shard of it.
        """
        return None if self.is_local or self._is_http else _BLOCK_BYTES

    @property
    def _is_glob(self) -> bool:
        return bool(_wild(self.path, self._is_http))

    def _find(self) -> dict[str, Any] | None:
        """What lies at the path itself; None if nothing does, as for most globs."""
        if self._is_glob and not self.is_local:
            return None
        try:
            info = self.fs.info(self.path)
        except (FileNotFoundError, NotADirectoryError):
            return None
        if info["type"] not in ("file", "directory"):
            raise CorpusError(f"uri={self.address!r} is neither a file nor a folder.")
        return dict(info)

    def _root(self) -> str:
        if self._info is not None and not self.is_file:
            return self.path
        if self.is_file or not self._is_glob:
            return (
                self.path.split("?")[0].rpartition("/")[0] if self._is_http else _parent(self.path)
            )
        parts = self.path.split("/")
        fixed = next(i for i, part in enumerate(parts) if _wild(part, self._is_http))
        return "/".join(parts[:fixed]) or "/"

    def _file(self, path: str, info: Mapping[str, Any]) -> File:
        if self.is_file:
            name = (path.split("?")[0] if self._is_http else path).rpartition("/")[2]
        else:
            name = path[len(self.root.rstrip("/")) :].lstrip("/")
        return File(name=name, path=path, stat=stat_of(info))

    def _followed(self, path: str, info: Mapping[str, Any]) -> Mapping[str, Any]:
        """A local listing says "other" of a link; what counts is what it leads to."""
        if not info.get("islink"):
            return info
        try:
            return dict(self.fs.info(path))
        except FileNotFoundError:
            return {**info, "type": "other"}

    def _is_data(self, name: str) -> bool:
        """Hidden files and other tools' leftovers count only where a glob spells them out."""
        asked = set() if self._info is not None else set(self.path.split("/"))
        if any(part.startswith(".") for part in asked):
            return True
        parts = name.split("/")
        return not any(part.startswith(".") or part in _NOT_DATA - asked for part in parts)

    def _nothing(self, num_listed: int) -> str:
        if self._info is not None:
            return "the folder holds no files (hidden ones and __pycache__ are left out)"
        if not self._is_glob:
            is_s3 = self.address.startswith(("s3://", "s3a://"))
            what = "file, folder or bucket" if is_s3 else "file or folder"
            return f"no such {what}.{self._near(self.path)}"
        if num_listed:
            return "the glob matches only folders or hidden files; end it with /** to go down"
        seen = self._seen() if os.path.isdir(self.root) else self._near(self.root)
        return f"the glob matches nothing; searched below {redact(self.root)!r}.{seen}"

    def _near(self, path: str) -> str:
        """What a mistyped local path may have meant: a sibling of its first missing part."""
        if not self.is_local:
            return ""
        missing = Path(path)
        while not missing.parent.exists():
            missing = missing.parent
        if not missing.parent.is_dir():
            return f" {str(missing.parent)!r} is a file."
        siblings = [entry.name for entry in missing.parent.iterdir()]
        return f" {str(missing)!r} does not exist.{nearest(missing.name, siblings)}"

    def _seen(self) -> str:
        if not self.is_local:
            return ""
        names = sorted(entry.name for entry in Path(self.root).iterdir())
        more = ", ..." if len(names) > _PARTS_SHOWN else ""
        return f" There is: {', '.join(names[:_PARTS_SHOWN])}{more}" if names else " It is empty."


def _wild(path: str, is_http: bool) -> str:
    """The wildcards in a path; a URL's question mark starts its query."""
    return "".join(char for char in path if char in ("*[" if is_http else "*?["))


def _parent(path: str) -> str:
    return path.rpartition("/")[0] or "/"


def _digest(fs: Any, path: str) -> tuple[str, int]:
    digest, size = hashlib.sha256(), 0
    with fs.open(path, "rb") as raw:
        # memory:// shares the handle between threads; its whole content is at hand anyway.
        stream = io.BytesIO(raw.getvalue()) if isinstance(raw, io.BytesIO) else raw
        while block := stream.read(1 << 20):
            digest.update(block)
            size += len(block)
    return f"sha256:{digest.hexdigest()}", size


@lru_cache(maxsize=1024)
def _known_digest(fs: Any, path: str, stat: Stat) -> tuple[str, int]:
    return _digest(fs, path)
