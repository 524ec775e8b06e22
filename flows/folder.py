"""A folder under any fsspec URI, whose files appear whole or not at all.

What is not finished lies in scratch folders. Knows nothing of what the files are.

Object stores put an object in place in one piece, and two writers of one name leave the object of
one of them. Nothing here asks a server for conditional writes, so it does not matter which have
them: whoever writes a name twice writes bytes of which either will do.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import gettempdir
from typing import Any

from ..engine.remote import Stat, connect, hush, protocols, redact, remedy, stat_of
from .scratch import TEMPORARY, make_scratch, sweep

log = logging.getLogger(__name__)

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_BARRED = (errno.EACCES, errno.EPERM, errno.EROFS)


class StoreError(ValueError):
    """The output cannot be used as asked. The message names field, value and what would work."""


class FullDisk(OSError):
    """The disk of the output is full."""


@dataclass(frozen=True)
class Part:
    """One file of a run."""

    name: str
    """Path below the run's folder."""
    bytes: int
    sha256: str


class Folder:
    """A folder under an fsspec URI, whose files appear whole or not at all."""

    def __init__(
        self, uri: str, storage_options: Mapping[str, Any] | None = None, *, field: str = "out"
    ) -> None:
        """Open a place; `field` is the argument that named it, which errors begin with.

        Raises:
            StoreError: for a URI that cannot be.
        """
        self.field = field
        """The argument that named the place."""
        if not uri.strip():
            raise StoreError(f"{field}: {uri!r} names no place; give a folder or a URI")
        if redact(uri) != uri:
            raise StoreError(
                f"{field}: {redact(uri)!r} holds a credential; give it in the environment instead"
            )
        self.uri = uri.rstrip("/")
        self.options = dict(storage_options or {})
        """What the file system is opened with."""
        try:
            # Listings are never cached: another process may be at work on the same run.
            self._fs, root = connect(uri, {"use_listings_cache": False, **self.options})
        except ValueError as error:
            raise StoreError(f"{field}: {uri!r} cannot be opened: {one_line(error)}") from None
        self._root = root.rstrip("/")
        self.is_local = "file" in protocols(self._fs)
        # s3fs asks for the size first, to fetch large objects in parts: twice the requests.
        self._at_once = {"max_concurrency": 1} if "s3" in protocols(self._fs) else {}

    def below(self, name: str) -> Folder:
        """The folder `name` in this one."""
        return Folder(f"{self.uri}/{name}", self.options, field=self.field)

    def path(self, name: str) -> str:
        """What the file system calls the file `name` ("scores/part-00000.parquet")."""
        return f"{self._root}/{name}"

    def address(self, name: str) -> str:
        """The file's full URI; absolute where this folder's is not."""
        return str(self._fs.unstrip_protocol(self.path(name)))

    @property
    def filesystem(self) -> Any:
        """The fsspec file system that `path` belongs to."""
        return self._fs

    def check_writable(self) -> None:
        """Write and remove a file; StoreError says what the file system answered."""
        try:
            if self.is_local:
                with self.scratch() as folder:
                    (folder / "probe").write_bytes(b"logitmill")
                sweep(Path(self.path("")))
            else:
                probe = f"{TEMPORARY}{uuid.uuid4().hex}"
                self._fs.pipe_file(self.path(probe), b"logitmill")
                self._fs.rm_file(self.path(probe))
        except StoreError:
            raise
        except Exception as error:  # botocore, aiohttp and others raise types of their own
            # A folder needs nobody to make it; what is missing is the bucket.
            works = "; create it first" if isinstance(error, FileNotFoundError) else ""
            raise StoreError(
                f"{self.field}: {self.uri!r} cannot be written: {one_line(error)}{works}"
            ) from None

    def read(self, name: str) -> bytes | None:
        """The file's bytes in one request, None if it is not there."""
        with self._plain_errors(name, "read"):
            try:
                return self._fs.cat_file(self.path(name), **self._at_once)
            except (FileNotFoundError, NotADirectoryError):
                return None

    def read_json(self, name: str) -> dict[str, Any] | None:
        """The file as a JSON object, None if it is not there or not whole."""
        data = self.read(name)
        try:
            value = json.loads(data) if data is not None else None
        except ValueError:
            return None
        return value if isinstance(value, dict) else None

    def write(self, name: str, data: bytes) -> None:
        """Put a small file in place, whole."""
        if not self.is_local:
            with self._plain_errors(name, "written"):
                self._fs.pipe_file(self.path(name), data)
            return
        with self.scratch() as folder:
            (folder / "file").write_bytes(data)
            self._move(folder / "file", name)

    def write_json(self, name: str, value: Mapping[str, Any]) -> None:
        """Put a JSON object in place; equal objects give equal bytes."""
        text = json.dumps(value, indent=1, sort_keys=True, allow_nan=False)
        self.write(name, text.encode() + b"\n")

    @contextmanager
    def scratch(self) -> Iterator[Path]:
        """A local folder to write parts in, beside the output where that is local.

        Raises:
            StoreError: if this is no place to make one.
            OSError: naming where it lies, if the disk is full.
        """
        within = Path(self.path("")) if self.is_local else Path(gettempdir(), "logitmill")
        try:
            within.mkdir(parents=True, exist_ok=True)
            folder, lock = make_scratch(within)
        except OSError as error:
            self._refuse(within, error)
            raise
        try:
            yield folder
        except OSError as error:
            if error.errno in _FULL:
                self._refuse(within, error)
            raise
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            os.close(lock)

    def publish(self, local: Path, name: str) -> Part:
        """Move a finished local file into place and say what it is."""
        part = Part(name=name, bytes=local.stat().st_size, sha256=_hash_file(local))
        if self.is_local:
            self._move(local, name)
        else:
            with self._plain_errors(name, "written"):
                self._fs.put_file(str(local), self.path(name))
        return part

    def size(self, name: str) -> int | None:
        """Bytes of a file, None if it is not there."""
        with self._plain_errors(name, "read"):
            try:
                return self._fs.info(self.path(name))["size"]
            except (FileNotFoundError, NotADirectoryError):
                return None

    def holds(self, parts: Iterable[Part]) -> bool:
        """Whether each of the parts is there in its stated size."""
        return all(self.size(part.name) == part.bytes for part in parts)

    def stats(self, folder: str) -> dict[str, Stat]:
        """What a listing says of the files directly in `folder`, by name within this folder."""
        return {
            f"{folder}/{_last(entry)}": stat_of(entry)
            for entry in self._list(folder)
            if entry["type"] == "file"
        }

    def sizes(self, folder: str) -> dict[str, int]:
        """Files directly in `folder` with their sizes in bytes, by name within this folder."""
        return {name: stat.size or 0 for name, stat in self.stats(folder).items()}

    def folders(self) -> list[str]:
        """Names of the folders directly in this one, sorted."""
        return sorted(_last(entry) for entry in self._list("") if entry["type"] == "directory")

    def sweep(self) -> None:
        """Remove what killed writers left. Writers that live keep their scratch folders.

        Not so their unfinished uploads to S3, which nothing tells from those of the dead: call this
        once nothing is left to be written. Who is cut off finds the shard's receipt in place.
        """
        sweep(Path(self.path("")) if self.is_local else Path(gettempdir(), "logitmill"))
        self._end_uploads()

    def list_uploads(self) -> list[dict[str, Any]]:
        """S3's words on uploads in parts to this folder that are not finished; nothing elsewhere.

        They stand in no other listing. Not every server lists them, nor may everybody ask: that is
        an exception of the client's.
        """
        if "s3" not in protocols(self._fs):
            return []
        bucket, _, prefix = self._root.partition("/")
        found = self._fs.call_s3("list_multipart_uploads", Bucket=bucket, Prefix=f"{prefix}/")
        return list(found.get("Uploads", []))

    def _list(self, folder: str) -> list[dict[str, Any]]:
        with self._plain_errors(folder, "listed"):
            try:
                return self._fs.ls(self.path(folder), detail=True)
            except (FileNotFoundError, NotADirectoryError):
                return []

    def _end_uploads(self) -> None:
        """Abort uploads in parts: S3 charges for their bytes until then."""
        bucket = self._root.partition("/")[0]
        try:
            for upload in self.list_uploads():
                which = {"Key": upload["Key"], "UploadId": upload["UploadId"]}
                self._fs.call_s3("abort_multipart_upload", Bucket=bucket, **which)
        except Exception as error:  # they cost money, not rows; not everybody may list them
            log.warning("%s: unfinished uploads may be left: %s", self.uri, one_line(error))

    def _move(self, local: Path, name: str) -> None:
        final = Path(self.path(name))
        final.parent.mkdir(parents=True, exist_ok=True)
        with local.open("rb") as file:
            os.fsync(file.fileno())
        local.replace(final)

    def _refuse(self, within: Path, error: OSError) -> None:
        """Raise what an error of a scratch folder comes from, and what works; else nothing."""
        if error.errno in _FULL:
            works = "free some of it" if self.is_local else "free some of it, or set TMPDIR"
            # Where parts are made elsewhere than they stay, another worker may have room.
            raise (FullDisk if self.is_local else OSError)(
                f"{self.field}: the disk of {str(within)!r}, where parts are made, is full "
                f"({os.strerror(error.errno)}); {works}"
            ) from None
        place = self.uri if self.is_local else str(within)
        there = next(one for one in (within, *within.absolute().parents) if os.path.exists(one))
        if not there.is_dir():
            said = f"{str(there)!r} is a file; name a folder"
        elif error.errno in _BARRED:
            said = f"{os.strerror(error.errno)} to write in {str(there)!r}; "
            said += "name another folder" if self.is_local else "set TMPDIR to another folder"
        else:
            return
        raise StoreError(f"{self.field}: {place!r} cannot be written: {said}") from None

    @contextmanager
    def _plain_errors(self, name: str, done: str) -> Iterator[None]:
        """One line instead of a client's exception, whose traceback shows headers and URLs."""
        try:
            yield
        except Exception as error:
            where = f"{self.uri}/{name}".rstrip("/")
            raise OSError(f"{self.field}: {where} cannot be {done}: {one_line(error)}") from None


def open_page(uri: str, field: str, endpoint_url: str | None = None) -> tuple[Folder, str]:
    """The folder that a page will lie in, and the page's name there.

    Args:
        uri: where the page goes, a local path or an fsspec URI.
        field: the argument that named it, which errors begin with.
        endpoint_url: the S3 server where it is not Amazon's.

    Raises:
        StoreError: if its folder is not there, or cannot be written.
    """
    within, name = split_page(uri, field)
    folder = Folder(within, endpoint_options(uri, endpoint_url), field=field)
    if folder.is_local and not os.path.isdir(folder.path("")):
        raise StoreError(f"{field}: {uri!r} lies in a folder that is not there; make it first")
    if folder.is_local and os.path.isdir(folder.path(name)):
        raise StoreError(f"{field}: {uri!r} is a folder; give the name of a page in it")
    folder.check_writable()
    return folder, name


def split_page(uri: str, field: str) -> tuple[str, str]:
    """Where a page's folder lies, and the page's name in it.

    Raises:
        StoreError: if it lies in no bucket.
    """
    within, slash, name = uri.rpartition("/")
    if within.endswith(":/"):
        raise StoreError(
            f"{field}: {uri!r} names no bucket; give one, as in {within}/bucket/{name}"
        )
    return within or slash or ".", name


def endpoint_options(uri: str, endpoint_url: str | None) -> dict[str, Any]:
    """What opens `uri` at an S3 server of one's own; nothing for other URIs.

    Raises:
        ValueError: for what is no server's URL.
    """
    if endpoint_url is not None and not endpoint_url.startswith(("http://", "https://")):
        raise ValueError(
            f"endpoint_url: {redact(endpoint_url)!r} is no server's URL; give one as "
            "http://localhost:9000"
        )
    if endpoint_url is not None and uri.startswith(("s3://", "s3a://")):
        return {"endpoint_url": endpoint_url}
    return {}


def one_line(error: BaseException) -> str:
    """What an error says, in one line, without credentials and with what helps against it."""
    return (hush(" ".join(str(error).split())) or type(error).__name__) + remedy(error)


def _last(entry: Mapping[str, Any]) -> str:
    return str(entry["name"]).rstrip("/").rsplit("/", 1)[-1]


def _hash_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
