"""Hugging Face datasets: which URIs mean one, and how a split of it is had.

Knows nothing of files. `datasets` takes seconds to import, so it is imported only here, when one
is read.
"""

from __future__ import annotations

import os
import re
from functools import lru_cache
from typing import Any

from ...engine.remote import nearest, redact
from .locations import CorpusError

_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def dataset_name(uri: str) -> str | None:
    """The dataset that a URI names: `datasets:NAME`, or a bare `org/name` unless there is a folder
    `org` here (then it is a path, mistyped perhaps). None if it names none."""
    scheme, _, name = uri.partition(":")
    if scheme == "datasets":
        if not name:
            raise CorpusError(f"uri={uri!r}: name the dataset, as in 'datasets:org/name'.")
        return name
    if _NAME.fullmatch(uri) and not os.path.exists(os.path.dirname(uri)):
        return uri
    return None


def is_saved_dataset(folder: str) -> bool:
    """Whether `Dataset.save_to_disk` or `DatasetDict.save_to_disk` wrote the local folder."""
    files = ("dataset_dict.json", "state.json")
    return any(os.path.isfile(os.path.join(folder, file)) for file in files)


def load_saved(folder: str, split: str) -> Any:
    """A split of a saved dataset, memory-mapped. Raises CorpusError."""
    import datasets

    try:
        saved = datasets.load_from_disk(folder)
    except Exception as error:  # The library raises whatever its parsers do.
        raise CorpusError(f"uri={folder!r} is no whole saved dataset: {_plain(error)}") from None
    if isinstance(saved, dict):
        splits = {str(name): dataset for name, dataset in saved.items()}
    else:
        splits = {str(saved.split or "train"): saved}
    if split not in splits:
        near = nearest(split, list(splits))
        raise CorpusError(f"split={split!r}: no such split; there are: {', '.join(splits)}.{near}")
    return splits[split]


def load_named(
    name: str,
    subset: str | None,
    split: str,
    revision: str | None,
    token: str | None,
    kind: type[Exception] = CorpusError,
) -> Any:
    """A split of a dataset of the Hub, or of a folder that `load_dataset` reads, memory-mapped.
    Raises CorpusError for a split or subset that is not there, and `kind` if nothing can be had."""
    try:
        return _load(name, subset, split, revision, token)
    except Exception as error:  # Splits and subsets are refused with plain ValueErrors.
        text = _plain(error)
    if token:
        text = text.replace(token, "***")
    if "Unknown split" in text:
        raise CorpusError(f"split={split!r}: {text}")
    if "BuilderConfig" in text or "Config name" in text:
        raise CorpusError(f"subset={subset!r}: {text}")
    raise kind(
        f"uri={name!r} is no path that exists here, and no Hugging Face dataset that can be had: "
        f"{text}"
    )


@lru_cache(maxsize=2)
def _load(
    name: str, subset: str | None, split: str, revision: str | None, token: str | None
) -> Any:
    """Once a process: every shard would ask the Hub again, and might be told something else."""
    import datasets

    return datasets.load_dataset(name, subset, split=split, revision=revision, token=token)


def _plain(error: Exception) -> str:
    return redact(f"{type(error).__name__}: {' '.join(str(error).split())}")
