"""Which two runs are compared where a single place is named."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

from ..folder import Folder, endpoint_options
from ..store import MANIFEST, PLAN

_MOST_NAMED = 3


def find_latest(uri: str, endpoint_url: str | None = None) -> tuple[str, str]:
    """The last complete run in a folder, after the one before it of the same recipe.

    Raises:
        ValueError: if there are no two, saying how to find another for a single one.
    """
    folder = Folder(uri, endpoint_options(uri, endpoint_url), field="run")
    if folder.read_json(PLAN) is not None:
        raise _one_run(folder)
    complete = _find_complete(folder)
    for last, recipe in islice(complete, 1):
        for name, other in complete:
            if other == recipe:
                return f"{folder.uri}/{name}", f"{folder.uri}/{last}"
    raise ValueError(
        f"run: {folder.uri!r} holds no two complete runs of one recipe, the last of them; name "
        "two, as in `logitmill compare RUN OTHER` (`logitmill inspect FOLDER` lists runs)"
    )


def _find_complete(folder: Folder) -> Iterator[tuple[str, str | None]]:
    """Complete runs in a folder, the last first, and the hash of each one's recipe.

    Manifests name every part of a run, so they are read as they are asked for.
    """
    stamps = []
    for name in folder.folders():
        manifest = folder.stats(name).get(f"{name}/{MANIFEST}")
        if manifest is not None:
            stamps.append((manifest.stamp, name))
    for _, name in sorted(stamps, reverse=True):
        yield name, (folder.below(name).read_json(MANIFEST) or {}).get("recipe_hash")


def _one_run(run: Folder) -> ValueError:
    """What to raise for a run alone: it names others that it can be compared with."""
    root, _, own = run.uri.rpartition("/")
    beside = Folder(root or ".", run.options, field="run")
    recipe = (run.read_json(PLAN) or {}).get("recipe_hash")
    same = (name for name, other in _find_complete(beside) if other == recipe and name != own)
    names = list(islice(same, _MOST_NAMED))
    if names:
        others = ", ".join(f"{beside.uri}/{name}" for name in names)
        works = f"name one of its recipe beside it, as {others}"
    else:
        works = (
            "none of its recipe is beside it, so score the corpus again, as with another model or "
            "--quantization, and name that run"
        )
    return ValueError(f"run: {run.uri!r} is one run, and two are compared; {works}")
