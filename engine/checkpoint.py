"""A model's files: where they lie, what they hold, what they hash to."""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import warnings
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open

from .mirror import RemoteFolder
from .staging import Stage

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
# Files of other tools that hold weights as pickles.
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
# What decides the numbers of a model: weights, config, tokenizer and chat template.
_DIGESTED = ("*.safetensors", "*.json", "*.model", "*.jinja", "*.txt", "*.py")
_HASH_BLOCK = 16 << 20
_CPU = torch.device("cpu")
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
# Values, as bytes, that are no finite number. A byte's first bit is the sign but in e8m0.
_E4M3_NAN, _E5M2_INF, _E8M0_NAN = 0x7F, 0x7C, 0xFF


@dataclass(frozen=True)
class Sizes:
    """What a checkpoint's files hold."""

    num_tensors: int
    num_bytes: int
    """Of all tensors, as stored."""
    num_files: int

    def __str__(self) -> str:
        """For people: "291 tensors, 16.06 GB in 4 files"."""
        files = f"{self.num_files:,} files" if self.num_files != 1 else "1 file"
        return f"{self.num_tensors:,} tensors, {self.num_bytes / 1e9:,.2f} GB in {files}"


class Checkpoint:
    """Safetensors of one model folder, single file or sharded by an index; read lazily."""

    def __init__(self, folder: Path, config: Mapping[str, Any], files: Mapping[str, Path]) -> None:
        self.folder = folder
        """Local folder that holds all files."""
        self.config = config
        """config.json as it stands."""
        self._files = files
        self._read: set[str] = set()
        self._opened: dict[Path, _File] = {}
        self._stages: dict[torch.device, Stage] = {}
        self._unchecked: list[tuple[str, torch.Tensor]] = []

    @classmethod
    def open(cls, folder: Path) -> Checkpoint:
        """Read the config and the list of tensors of a model folder.

        Raises:
            ValueError: naming what is missing or broken in the folder.
        """
        config = read_config(folder)
        if (folder / _INDEX).is_file():
            weight_map = _read_json(folder / _INDEX).get("weight_map", {})
            files = {name: folder / file for name, file in weight_map.items()}
            for name, file in files.items():
                if not file.is_file():
                    raise ValueError(
                        f"model: {file} is named in {_INDEX} but is not there, and with it tensor "
                        f"{name}"
                    )
        elif (folder / _SINGLE).is_file():
            files = dict.fromkeys(_list_tensors(folder / _SINGLE), folder / _SINGLE)
        else:
            raise ValueError(_no_weights(folder, [path.name for path in folder.iterdir()]))
        return cls(folder, config, files)

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def check_files(self) -> Sizes:
        """Open every file, and find every tensor in the header of its file.

        Raises:
            ValueError: naming a file that is not whole, or a tensor that is not in its file.
        """
        num_bytes = sum(self._file(name).count_bytes(name) for name in self._files)
        self._close()
        return Sizes(len(self._files), num_bytes, len(set(self._files.values())))

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor that is there, as stored."""
        return self._file(name).shape(name)

    def dtype(self, name: str) -> torch.dtype:
        """The dtype of a tensor that is there, as stored."""
        return self._file(name).dtype(name)

    def read(self, name: str, shape: tuple[int, ...], device: torch.device = _CPU) -> torch.Tensor:
        """The tensor `name`, as stored, in host memory or on a GPU.

        On a GPU it is queued on the current stream, and whether it is finite is only asked by
        `finish`, so that nothing waits for it here. On torch's `meta` device it has no numbers, and
        of its file the header alone is read.

        Raises:
            ValueError: if it is missing, has another shape, or holds a NaN or an infinity.
        """
        file = self._file(name)
        if file.shape(name) != shape:
            raise ValueError(
                f"model: tensor {name} in {file.path} has shape {list(file.shape(name))}, "
                f"but the config calls for {list(shape)}"
            )
        self._read.add(name)
        if device.type == "meta":
            return torch.empty(shape, dtype=file.dtype(name), device=device)
        return file.load(name) if device.type == "cpu" else self._fetch(name, device)

    def skip(self, *names: str) -> None:
        """Count tensors as read that a computation has no use for, if they are there."""
        self._read.update(name for name in names if name in self._files)

    def finish(self) -> None:
        """Check what went to a GPU, and let go of files and of the buffers it went through.

        Raises:
            ValueError: naming the first tensor that holds a NaN or an infinity.
        """
        for stage in self._stages.values():
            stage.close()
        self._stages.clear()
        self._close()
        if self._unchecked:
            names, flags = zip(*self._unchecked, strict=True)
            self._unchecked.clear()
            # One wait for all tensors of a device.
            finite = torch.stack(flags).tolist()
            for name, is_finite in zip(names, finite, strict=True):
                if not is_finite:
                    raise ValueError(_not_finite(name, self._files[name]))

    def _close(self) -> None:
        for file in self._opened.values():
            file.close()
        self._opened.clear()

    def _fetch(self, name: str, device: torch.device) -> torch.Tensor:
        if device not in self._stages:
            self._stages[device] = Stage(device)
        tensor = self._file(name).fetch(name, self._stages[device])
        self._unchecked.append((name, is_finite(tensor)))
        return tensor

    def _file(self, name: str) -> _File:
        if name not in self._files:
            raise ValueError(f"model: tensor {name} is not in the safetensors of {self.folder}")
        path = self._files[name]
        if path not in self._opened:
            self._opened[path] = _File(path)
        return self._opened[path]

    def unread(self) -> list[str]:
        """Names of tensors that were never read, without the buffers that old files carry."""
        return sorted(
            name
            for name in set(self._files) - self._read
            if not name.endswith("rotary_emb.inv_freq")
        )


class _File:
    """One safetensors file: mapped for the host, read in ranges for a GPU."""

    def __init__(self, path: Path) -> None:
        self.path = path
        # The library checks it: entries that tile the file, and dtypes and shapes that fit.
        _list_tensors(path)
        self._raw: BinaryIO = path.open("rb")
        size = int.from_bytes(self._raw.read(8), "little")
        self._header: dict[str, Any] = json.loads(self._raw.read(size))
        self._start = 8 + size
        self._pages: mmap.mmap | None = None

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._entry(name)["shape"])

    def dtype(self, name: str) -> torch.dtype:
        stored = self._entry(name)["dtype"]
        if stored not in _DTYPES:
            raise ValueError(
                f"model: tensor {name} in {self.path} is stored as {stored}, which is not one of "
                f"{', '.join(_DTYPES)}"
            )
        return _DTYPES[stored]

    def count_bytes(self, name: str) -> int:
        start, stop = self._entry(name)["data_offsets"]
        return stop - start

    def load(self, name: str) -> torch.Tensor:
        """The tensor over the file's pages, not to be written to; ValueError if not finite."""
        shape, dtype = self.shape(name), self.dtype(name)
        if not math.prod(shape):
            return torch.empty(shape, dtype=dtype)
        try:
            # Shared and read-only it takes nothing of the memory that the system may promise.
            self._pages = self._pages or mmap.mmap(self._raw.fileno(), 0, access=mmap.ACCESS_READ)
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "The given buffer is not writable")
                data = torch.frombuffer(
                    self._pages,
                    dtype=torch.uint8,
                    count=math.prod(shape) * dtype.itemsize,
                    offset=self._start + self._entry(name)["data_offsets"][0],
                )
        except (OSError, ValueError) as error:
            raise ValueError(
                f"model: tensor {name} cannot be read from {self.path}: {error}"
            ) from None
        tensor = data.view(dtype).view(shape)
        if not is_finite(tensor):
            raise ValueError(_not_finite(name, self.path))
        return tensor

    def fetch(self, name: str, stage: Stage) -> torch.Tensor:
        """The tensor on the stage's device."""
        shape, dtype = self.shape(name), self.dtype(name)
        num_bytes = math.prod(shape) * dtype.itemsize
        data = torch.empty(num_bytes, dtype=torch.uint8, device=stage.device)
        start = self._start + self._entry(name)["data_offsets"][0]
        try:
            stage.fetch(self._raw.fileno(), start, data)
        except EOFError as error:
            raise ValueError(
                f"model: tensor {name} cannot be read from {self.path}: {error}"
            ) from None
        return data.view(dtype).view(shape)

    def close(self) -> None:
        self._raw.close()

    def _entry(self, name: str) -> Any:
        if name not in self._header:
            raise ValueError(f"model: tensor {name} cannot be read from {self.path}: not in it")
        return self._header[name]


def is_finite(tensor: torch.Tensor) -> torch.Tensor:
    """Whether no value is a NaN or an infinity: bool [], on the tensor's device."""
    if not tensor.dtype.is_floating_point:
        return torch.ones((), dtype=torch.bool, device=tensor.device)
    if tensor.dtype.itemsize > 1:
        return torch.isfinite(tensor).all()
    codes = tensor.view(torch.uint8)
    if tensor.dtype == torch.float8_e4m3fn:
        return ((codes & 0x7F) != _E4M3_NAN).all()
    if tensor.dtype == torch.float8_e5m2:
        return ((codes & 0x7F) < _E5M2_INF).all()
    return (codes != _E8M0_NAN).all()


def _not_finite(name: str, path: Path) -> str:
    return f"model: tensor {name} in {path} holds NaN or infinite weights"


def find_model(
    model: str,
    *,
    revision: str | None = None,
    storage_options: Mapping[str, Any] | None = None,
    headers_only: bool = False,
) -> Path:
    """The local folder of a model: a path as it is, a Hub id through the Hub's cache.

    A URI of any file system that fsspec opens (`s3://bucket/model/`) is fetched into a cache of
    this machine (`mirror`); `storage_options` are what it is opened with. With `headers_only` no
    numbers are fetched from there, and what is returned can be inspected and not loaded.

    Raises:
        ValueError: if there is neither such a folder nor such a model on the Hub, or if files of a
            URI cannot be had.
    """
    if "://" in model:
        if revision is not None:
            raise ValueError(f"revision: {revision!r} is for Hub ids; {model!r} has none")
        return _fetch_model(RemoteFolder(model, storage_options or {}), headers_only)
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if path.is_file():
        raise ValueError(f"model: {model!r} is a file; name the folder that holds config.json")
    is_id = model.count("/") <= 1 and not model.startswith((".", "/", "~"))
    if not is_id:
        raise ValueError(
            f"model: there is no folder {model!r}; give a model folder, a URI of one or a Hub id"
        )
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        folder = snapshot_download(
            model,
            revision=revision,
            allow_patterns=list(_DIGESTED),
            # Offline alone, the library asks for a pinned commit's list of files all the same.
            local_files_only=constants.HF_HUB_OFFLINE,
        )
        return Path(folder)
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"model: {model!r} is neither a local folder nor a model that the Hub hands out "
            f"({reason})"
        ) from None


def _fetch_model(remote: RemoteFolder, headers_only: bool) -> Path:
    if remote.local is not None:
        return find_model(str(remote.local))
    if "config.json" not in remote.names:
        raise ValueError(_no_config(remote.uri))
    if not {_SINGLE, _INDEX} & set(remote.names):
        raise ValueError(_no_weights(remote.uri, remote.names))
    # Just what the digest is of, so that a model has one digest wherever it lies.
    return remote.fetch(
        [name for name in remote.names if any(fnmatch(name, pattern) for pattern in _DIGESTED)],
        headers_only=headers_only,
    )


def _no_config(where: Path | str) -> str:
    return f"model: no config.json in {where}; give a folder in Hugging Face layout"


def _no_weights(where: Path | str, names: Iterable[str]) -> str:
    """What to do with a folder without safetensors that holds files of these names."""
    said = f"model: no {_SINGLE} or {_INDEX} in {where}"
    pickles = sorted(name for name in names if name.endswith(_PICKLES))
    if pickles:
        said += (
            f"; {', '.join(pickles)} is not read, since a pickle runs whatever code is in it; "
            "convert to safetensors"
        )
    others = sorted(name for name in names if name.endswith(".gguf"))
    if others:
        said += f"; {', '.join(others)} cannot be read, convert to safetensors"
    return said


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a model folder; ValueError if it is missing or not an object."""
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(_no_config(folder))
    config = _read_json(path)
    if not config.get("architectures"):
        raise ValueError(f"model: {path} names no 'architectures', so what to run is unknown")
    return config


def digest(folder: Path) -> str:
    """sha256 over the names and contents of the files that decide a model's numbers."""
    files = sorted({p for pattern in _DIGESTED for p in folder.glob(pattern) if p.is_file()})
    with ThreadPoolExecutor() as pool:
        hashes = list(pool.map(_hash_file, files))
    total = hashlib.sha256()
    for path, value in zip(files, hashes, strict=True):
        total.update(f"{path.name}\0{value}\n".encode())
    return total.hexdigest()


def _hash_file(path: Path) -> str:
    value = hashlib.sha256()
    for block in _blocks(path):
        value.update(block)
    return value.hexdigest()


def _blocks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while block := file.read(_HASH_BLOCK):
            yield block


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"model: {path} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"model: {path} holds a {type(value).__name__}, not an object")
    return value


def _list_tensors(path: Path) -> list[str]:
    """Names of the tensors of a file; ValueError if it is not whole."""
    try:
        # For torch the library maps all of it to be written to, which a system may refuse where
        # the file is larger than memory.
        with safe_open(path, framework="np") as handle:
            return list(handle.keys())
    except (SafetensorError, OSError) as error:
        cut = _find_cut(path)
        raise ValueError(f"model: {path} is not a whole safetensors file: {cut or error}") from None


def _find_cut(path: Path) -> str | None:
    """The first tensor that a file is too short for; None if its header does not tell."""
    try:
        with path.open("rb") as file:
            start = 8 + int.from_bytes(file.read(8), "little")
            num_bytes = path.stat().st_size
            if start > num_bytes:
                return None
            header = json.loads(file.read(start - 8))
            header.pop("__metadata__", None)
            ends = {name: start + entry["data_offsets"][1] for name, entry in header.items()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None
    short = sorted((end, name) for name, end in ends.items() if end > num_bytes)
    if not short:
        return None
    end, name = short[0]
    return f"it ends at byte {num_bytes}, and tensor {name} at byte {end}; fetch it again"
