"""Two runs compared as deep as what both kept allows: documents, tokens, distributions."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import numpy as np

from ..folder import Folder, endpoint_options, split_page
from ..run import Run, open_run
from .choice import find_latest
from .distributions import Distributions, compare_distributions, find_shared_tier
from .documents import Documents, compare_documents
from .shift import Shift, measure_shift
from .tokens import NotComparable, OtherTokens, Tokens, Told, check_tokens, compare_tokens

LEVELS = ("documents", "tokens", "distributions")
"""How deep a comparison goes, each with those before it."""
PAGE, NUMBERS = "compare.html", "compare.json"
_TOLD = 3
"""Documents of either direction whose tokens are shown."""

OnProgress = Callable[[str, int, int], object]
"""Is told what is read, and how much of how much is done."""


@dataclass(frozen=True)
class Comparison:
    """What is there to say of two runs. The base is A; a difference is B's less A's."""

    base: Run
    other: Run
    documents: Documents
    shifts: list[Shift]
    """Of all documents and of groups, paired or not, from summaries."""
    tokens: Tokens | None
    distributions: Distributions | None
    missing: dict[str, str]
    """Why a level could not be compared, by its name, and what would work."""
    told: dict[str, Told]
    """Tokens of the documents that differ the most, by id."""
    uri: str | None = None
    """Where the page lies, once it is written."""
    address: str | None = None
    """The same as a full URI."""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON: all numbers but the picture and single tokens; null where not finite."""
        levels = ("documents", "shifts", "tokens", "distributions", "missing")
        sides = {"base": self.base, "other": self.other}
        return {
            **{name: describe_run(run) for name, run in sides.items()},
            **{name: _plain(getattr(self, name)) for name in levels},
        }


def compare_runs(
    base: str,
    other: str | None = None,
    out: str | None = None,
    *,
    level: str | None = None,
    endpoint_url: str | None = None,
    on_progress: OnProgress = lambda doing, done, total: None,
) -> Comparison:
    """Compare two complete runs, and leave `compare.html` and `compare.json`.

    The base is the first: KL is KL(base || other), and differences are the other's less the base's.
    Documents are paired by id, tokens by document and place.

    Args:
        base: URI of a run, or of a folder that holds one.
        other: the same of the other run; None compares the last run in the folder `base` with the
            one before it of the same recipe.
        out: a folder on any fsspec URI, or the page's name if it ends with `.html`; default
            `compare/<base key>-<other key>` in the folder that holds both runs.
        level: compare no deeper than this: `documents`, `tokens` or `distributions`; that it cannot
            be reached is an error then. Default as deep as what both kept allows.
        endpoint_url: the S3 server to use where it is not Amazon's.
        on_progress: is told what is read, and how much of how much is done.

    Raises:
        ValueError: if a run is missing or not complete, the recipes are not the same, the level
            cannot be reached or there is no place for the page.
    """
    uris = (base, other) if other is not None else find_latest(base, endpoint_url)
    ours, theirs = (
        open_run(uri, storage_options=endpoint_options(uri, endpoint_url)) for uri in uris
    )
    _check(ours, theirs, level)
    place = _find_place(ours, theirs, out, endpoint_url)
    comparison = compare(ours, theirs, level=level, on_progress=on_progress)
    return _write(comparison, place, endpoint_url)


def compare(
    base: Run,
    other: Run,
    *,
    level: str | None = None,
    on_progress: OnProgress = lambda doing, done, total: None,
) -> Comparison:
    """The numbers of a comparison of two complete runs; writes nothing.

    Raises:
        ValueError: as `compare_runs`.
    """
    _check(base, other, level)
    deepest = LEVELS.index(level) if level is not None else len(LEVELS) - 1
    missing: dict[str, str] = {}

    def progress(doing: str) -> Callable[[int, int], object]:
        return lambda done, total: on_progress(doing, done, total)

    def give_up(name: str, why: NotComparable) -> None:
        if level == name:
            raise _unreachable(name, why) from None
        missing[name] = str(why)

    documents = compare_documents(base, other, progress("documents"))
    if documents.all is None and level is not None:
        raise _unreachable(level, why_no_pairs(documents))
    if documents.all is None:
        missing = dict.fromkeys(LEVELS, why_no_pairs(documents))
        deepest = 0
    wanted = [d.doc_id for d in (*documents.worse[:_TOLD], *documents.better[:_TOLD])]
    tokens, distributions = None, None
    told: dict[str, Told] = {}
    if deepest >= 1:
        try:
            tokens, told = compare_tokens(base, other, wanted, progress("tokens"))
        except OtherTokens as why:
            give_up("tokens", why)
            give_up("distributions", why)
            deepest = 1
        except NotComparable as why:
            give_up("tokens", why)
    if deepest >= 2:
        try:
            distributions = compare_distributions(base, other, progress("distributions"))
        except NotComparable as why:
            give_up("distributions", why)
    return Comparison(
        base=base,
        other=other,
        documents=documents,
        shifts=measure_shift(base.summary(), other.summary()),
        tokens=tokens,
        distributions=distributions,
        missing=missing,
        told=told,
    )


def why_no_pairs(documents: Documents) -> str:
    """Why no document is paired."""
    if documents.changed.count:
        return "no document has the same text in both runs"
    if documents.unscored or documents.moved:
        return "no document was scored in both runs"
    return "no document is in both runs; ids made alike (--id-column) are what pairs them"


def split_address(run: Run) -> tuple[str, str]:
    """The folder that a run lies in, as a full URI, and its name there."""
    root, _, key = run.folder.address("").rstrip("/").rpartition("/")
    return root, key


def describe_run(run: Run) -> dict[str, Any]:
    """What a run is: what was scored by what, how and where."""
    plan, manifest = run.plan, run.manifest or {}
    return {
        "uri": run.uri,
        "run_key": plan["run_key"],
        "model": plan["model"]["name"],
        "model_digest": plan["model"]["digest"],
        "quantization": plan.get("quantization"),
        "engine": plan["engine"],
        "recipe": plan["recipe"],
        "recipe_hash": plan["recipe_hash"],
        "corpus": plan["uri"],
        "corpus_fingerprint": plan["corpus"]["fingerprint"],
        "device": plan.get("device"),
        "versions": plan.get("versions", {}),
        "tiers": plan["tiers"],
        **{name: manifest.get(name) for name in ("documents", "failed", "tokens", "bytes")},
    }


def _check(base: Run, other: Run, level: str | None) -> None:
    """ValueError for what can be known before anything is read."""
    if level is not None and level not in LEVELS:
        raise ValueError(f"level: {level!r} is not one of {', '.join(LEVELS)}")
    if base.plan["recipe_hash"] != other.plan["recipe_hash"]:
        ours, theirs = (run.plan["recipe"] for run in (base, other))
        differ = [name for name in ours if ours[name] != theirs.get(name)]
        said = (
            ", ".join([recipe["name"], *(f"{n} {recipe.get(n)}" for n in differ if n != "name")])
            for recipe in (ours, theirs)
        )
        raise ValueError(
            f"recipe: A was scored with {next(said)}, B with {next(said)}; numbers of two recipes "
            "do not compare, score one of them again with the other's"
        )
    try:
        if level == "tokens":
            check_tokens(base, other)
        elif level == "distributions":
            find_shared_tier(base, other)
    except NotComparable as why:
        raise _unreachable(level, why) from None


def _unreachable(level: str | None, why: object) -> ValueError:
    return ValueError(f"level: {level!r} cannot be compared: {why}")


@dataclass(frozen=True)
class _Place:
    """Where a comparison is written."""

    folder: Folder
    page: str
    numbers: str


def _find_place(base: Run, other: Run, out: str | None, endpoint_url: str | None) -> _Place:
    """ValueError if there is no place, or it cannot be written."""
    stem, page = PAGE.removesuffix(".html"), PAGE
    if out is None:
        (root, key), (other_root, other_key) = map(split_address, (base, other))
        if root != other_root:
            raise ValueError(
                f"out: {base.uri!r} and {other.uri!r} are in different folders; say where the "
                "page goes, as in --out compare"
            )
        # Of the first run's own name: a folder that was given relatively stays so.
        within = base.uri.rsplit("/", 1)[0] if "/" in base.uri else "."
        out = f"{within}/compare/{key}-{other_key}"
    elif out.endswith(".html"):
        out, page = split_page(out, "out")
        stem = page.removesuffix(".html")
    folder = Folder(out, endpoint_options(out, endpoint_url))
    folder.check_writable()
    return _Place(folder, page, f"{stem}.json")


def _write(comparison: Comparison, place: _Place, endpoint_url: str | None) -> Comparison:
    from .page import render_comparison

    html = render_comparison(comparison, endpoint_url, numbers=place.numbers)
    place.folder.write_json(place.numbers, comparison.to_dict())
    place.folder.write(place.page, html.encode())
    uri, address = f"{place.folder.uri}/{place.page}", place.folder.address(place.page)
    return replace(comparison, uri=uri, address=address)


def _plain(value: Any) -> Any:
    """A value as JSON has it; null for a number that is not finite."""
    if is_dataclass(value) and not isinstance(value, type):
        inner = {f.name: getattr(value, f.name) for f in fields(value)}
        return {name: _plain(v) for name, v in inner.items() if not isinstance(v, np.ndarray)}
    if isinstance(value, Mapping):
        return {" -> ".join(k) if isinstance(k, tuple) else k: _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
