"""A model's files: where they lie, what they hold, what they hash to."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
# What decides the numbers of a model: weights, config, tokenizer and chat template.
_DIGESTED = ("*.safetensors", "*.json", "*.model", "*.jinja", "*.txt", "*.py")
_HASH_BLOCK = 16 << 20


class Checkpoint:
    """Safetensors of one model folder, single file or sharded by an index; read lazily."""

    def __init__(self, folder: Path, config: Mapping[str, Any], files: Mapping[str, Path]) -> None:
        self.folder = folder
        """Local folder that holds all files."""
        self.config = config
        """config.json as it stands."""
        self._files = files
        self._read: set[str] = set()
        self._handles: dict[Path, Any] = {}

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
            for file in sorted(set(files.values())):
                if not file.is_file():
                    raise ValueError(f"model: {file} is named in {_INDEX} but is not there")
        elif (folder / _SINGLE).is_file():
            with _open(folder / _SINGLE) as handle:
                files = dict.fromkeys(handle.keys(), folder / _SINGLE)
        else:
            others = sorted(
                p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".gguf")
            )
            found = (
                f"; {', '.join(others)} cannot be read, convert to safetensors" if others else ""
            )
            raise ValueError(f"model: no {_SINGLE} or {_INDEX} in {folder}{found}")
        return cls(folder, config, files)

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def read(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """The tensor `name`, as stored, in host memory.

        Raises:
            ValueError: if it is missing, has another shape, or holds a NaN or an infinity.
        """
        if name not in self._files:
            raise ValueError(f"model: tensor {name} is not in the safetensors of {self.folder}")
        file = self._files[name]
        if file not in self._handles:
            self._handles[file] = _open(file)
        try:
            tensor = self._handles[file].get_tensor(name)
        except SafetensorError as error:
            raise ValueError(f"model: tensor {name} cannot be read from {file}: {error}") from None
        if tuple(tensor.shape) != shape:
            raise ValueError(
                f"model: tensor {name} in {file} has shape {list(tensor.shape)}, "
                f"but the config calls for {list(shape)}"
            )
        if not torch.isfinite(tensor).all():
            raise ValueError(f"model: tensor {name} in {file} holds NaN or infinite weights")
        self._read.add(name)
        return tensor

    def unread(self) -> list[str]:
        """Names of tensors that were never read, without the buffers that old files carry."""
        return sorted(
            name
            for name in set(self._files) - self._read
            if not name.endswith("rotary_emb.inv_freq")
        )


def find_model(model: str, *, revision: str | None = None) -> Path:
    """The local folder of a model: a path as it is, a Hub id through the Hub's cache.

    Raises:
        ValueError: if there is neither such a folder nor such a model on the Hub.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if path.is_file():
        raise ValueError(f"model: {model!r} is a file; name the folder that holds config.json")
    is_id = model.count("/") <= 1 and not model.startswith((".", "/", "~")) and "://" not in model
    if not is_id:
        raise ValueError(f"model: there is no folder {model!r}; give a model folder or a Hub id")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=list(_DIGESTED)))
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"model: {model!r} is neither a local folder nor a model that the Hub hands out "
            f"({reason})"
        ) from None


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a model folder; ValueError if it is missing or not an object."""
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"model: no config.json in {folder}; give a folder in Hugging Face layout")
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


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"model: {path} is not a whole safetensors file: {error}") from None
