"""What a run leaves behind: a folder under any fsspec URI, its layout, receipts and manifest.

    <root>/<run key>/
      plan.json                      what is scored and how
      scores/part-00017.parquet      document records; tokens/ and logits/ on request
      shards/00017.json              receipt: the shard's parts with size and sha256
      summary/00017.counts.parquet   the shard's additive tables
      summary/*.parquet              the run's tables: the shards' merged
      report.html
      manifest.json                  written last: the run is complete, and this is all of it

Readers believe receipts only. A part's name and bytes follow from the plan, so a task that dies
and starts again, or runs twice, overwrites a part with itself.
"""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from fsspec.core import url_to_fs

from .locations import redact

PLAN, MANIFEST, REPORT = "plan.json", "manifest.json", "report.html"
_TEMPORARY = ".tmp-"


class StoreError(ValueError):
    """The output cannot be used as asked. The message names field, value and what would work."""


class Folder:
    """A folder under an fsspec URI, whose files appear whole or not at all."""

    def __init__(self, uri: str, storage_options: Mapping[str, Any] | None = None) -> None:
        self.uri = uri.rstrip("/")
        self._options = dict(storage_options or {})
        try:
            self._fs, self._root = url_to_fs(self.uri, **self._options)
        except (ImportError, ValueError) as error:
            raise StoreError(f"out: {redact(uri)!r} cannot be opened: {error}") from None
        self._fs.invalidate_cache()
        protocol = self._fs.protocol
        self.is_local = "file" in (protocol if isinstance(protocol, tuple) else (protocol,))

    def below(self, name: str) -> Folder:
        """The folder `name` in this one."""
        return Folder(f"{self.uri}/{name}", self._options)

    def path(self, name: str) -> str:
        """What the file system calls the file `name` ("scores/part-00000.parquet")."""
        return f"{self._root.rstrip('/')}/{name}"

    @property
    def filesystem(self) -> Any:
        """The fsspec file system that `path` belongs to."""
        return self._fs

    def check_writable(self) -> None:
        """Write and remove a file; StoreError says what the file system answered."""
        probe = f"{_TEMPORARY}{uuid.uuid4().hex}"
        try:
            self.write(probe, b"logitmill")
            self._fs.rm_file(self.path(probe))
        except Exception as error:  # botocore, aiohttp and others raise types of their own
            reason = redact(str(error)) or type(error).__name__
            raise StoreError(f"out: {redact(self.uri)!r} cannot be written: {reason}") from None

    def read(self, name: str) -> bytes | None:
        """The file's bytes, None if it is not there."""
        try:
            return self._fs.cat_file(self.path(name))
        except FileNotFoundError:
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
            self._fs.pipe_file(self.path(name), data)
            return
        final = Path(self.path(name))
        final.parent.mkdir(parents=True, exist_ok=True)
        temporary = final.with_name(f"{final.name}{_TEMPORARY}{uuid.uuid4().hex}")
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(final)

    def write_json(self, name: str, value: Mapping[str, Any]) -> None:
        """Put a JSON object in place; equal objects give equal bytes."""
        text = json.dumps(value, indent=1, sort_keys=True, allow_nan=False)
        self.write(name, text.encode() + b"\n")

    @contextmanager
    def scratch(self) -> Iterator[Path]:
        """A local folder to write parts in, beside the output where that is local."""
        if not self.is_local:
            with TemporaryDirectory(prefix="logitmill-") as folder:
                yield Path(folder)
            return
        Path(self._root).mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=_TEMPORARY, dir=self._root) as folder:
            yield Path(folder)

    def publish(self, local: Path, name: str) -> Part:
        """Move a finished local file into place and say what it is."""
        part = Part(name=name, bytes=local.stat().st_size, sha256=_hash_file(local))
        if self.is_local:
            final = Path(self.path(name))
            final.parent.mkdir(parents=True, exist_ok=True)
            with local.open("rb") as file:
                os.fsync(file.fileno())
            local.replace(final)
        else:
            self._fs.put_file(str(local), self.path(name))
        return part

    def size(self, name: str) -> int | None:
        """Bytes of a file, None if it is not there."""
        try:
            return self._fs.info(self.path(name))["size"]
        except FileNotFoundError:
            return None

    def names(self, folder: str) -> dict[str, int]:
        """Files directly in `folder` with their sizes in bytes, by name within this folder."""
        try:
            listed = self._fs.ls(self.path(folder), detail=True, refresh=True)
        except TypeError:  # a file system without a cache of listings
            listed = self._fs.ls(self.path(folder), detail=True)
        except FileNotFoundError:
            return {}
        return {
            f"{folder}/{entry['name'].rsplit('/', 1)[-1]}": entry["size"]
            for entry in listed
            if entry["type"] == "file"
        }

    def sweep(self) -> None:
        """Remove what killed writers left: temporary files, which no reader looks at."""
        if not self.is_local:
            return
        for path in Path(self._root).rglob(f"*{_TEMPORARY}*"):
            if path.is_file():
                path.unlink(missing_ok=True)
        for path in Path(self._root).glob(f"{_TEMPORARY}*"):
            if path.is_dir() and not any(path.iterdir()):
                path.rmdir()


@dataclass(frozen=True)
class Part:
    """One file of a run."""

    name: str
    """Path below the run's folder."""
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Receipt:
    """That a shard is done: written once all its parts are in place."""

    shard: int
    parts: tuple[Part, ...]
    documents: int
    failed: int
    """Documents whose status is not ok."""
    tokens: int
    """Scored tokens."""
    bytes: int
    """UTF-8 bytes of the scored tokens."""
    loglikelihood: float
    """Sum over the scored documents, nats."""
    seconds: float
    device: str
    versions: Mapping[str, str]

    @staticmethod
    def name(shard: int) -> str:
        """Where the receipt of a shard lies."""
        return f"shards/{shard:05d}.json"

    def write(self, folder: Folder) -> None:
        """Put the receipt in place."""
        folder.write_json(self.name(self.shard), asdict(self))

    @classmethod
    def read(cls, folder: Folder, shard: int) -> Receipt | None:
        """The receipt of a shard, None if there is no whole one."""
        value = folder.read_json(cls.name(shard))
        if value is None:
            return None
        try:
            parts = tuple(Part(**part) for part in value.pop("parts"))
            return cls(parts=parts, **value)
        except (KeyError, TypeError):
            return None


def find_receipts(folder: Folder, num_shards: int) -> dict[int, Receipt]:
    """Receipts that check out, by shard: each of their parts is there in the stated size."""
    there = folder.names("shards")
    wanted = [shard for shard in range(num_shards) if Receipt.name(shard) in there]
    if not wanted:
        return {}
    receipts = [Receipt.read(folder, shard) for shard in wanted]
    folders = {part.name.rsplit("/", 1)[0] for r in receipts if r for part in r.parts}
    sizes = {name: size for part in sorted(folders) for name, size in folder.names(part).items()}
    return {
        receipt.shard: receipt
        for receipt in receipts
        if receipt and all(sizes.get(part.name) == part.bytes for part in receipt.parts)
    }


def hash_json(value: Any) -> str:
    """sha256 of a value's canonical JSON."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _hash_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
