"""A comparison as one self-contained HTML page, of the look of a run's report.

The report's `page.css` and `page.js` come first, this folder's style after them. Ids, sources and
text of documents are anybody's: the template escapes them all, and the page's own policy lets no
other script run.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from ..document.text import Names, join_bytes
from ..report.panel import Against
from ..report.template import REPORT, fill, mark_up
from ..report.wording import number, percent, plural, show
from .comparison import NUMBERS, Comparison, describe_run, split_address, why_no_pairs
from .documents import Document
from .sections import documents_section, scatter_section, shift_section
from .token_sections import distributions_section, tokens_section
from .tokens import Told
from .wording import kl_name, signed, small

_HERE = Path(__file__).parent
SECTIONS = (
    documents_section,
    scatter_section,
    distributions_section,
    tokens_section,
    shift_section,
)
"""In the order of the page; each is None where there is nothing to show."""
_MAX_TOKENS = 400
# Lower edges of the levels of colour, nats.
_LEVELS = (0.1, 0.5, 1.0, 2.0)
# Of a document's bytes, what its tokens must spell for the tokenizer to be the one that made them.
_AGREE = 0.9
_FACTS = {
    "run_key": "Run key",
    "uri": "Run",
    "model": "Model",
    "model_digest": "Model digest",
    "quantization": "Linears",
    "engine": "Engine",
    "recipe": "Recipe",
    "recipe_hash": "Recipe hash",
    "corpus": "Corpus",
    "corpus_fingerprint": "Corpus fingerprint",
    "device": "Device",
    "versions": "Versions",
    "tiers": "Tiers kept",
    "documents": "Documents",
    "failed": "Not scored",
    "tokens": "Tokens",
    "bytes": "Bytes",
}


@dataclass(frozen=True)
class Shown:
    """A document's tokens as coloured text."""

    id: str
    doc_id: str
    about: str
    tokens: Markup


def render_comparison(
    comparison: Comparison, endpoint_url: str | None = None, *, numbers: str = NUMBERS
) -> str:
    """The comparison as one HTML page, below 3 MB whatever was compared.

    Args:
        endpoint_url: the S3 server where the models' tokenizers may lie.
        numbers: what the file of numbers beside the page is called.
    """
    told, spelling = _show_told(comparison, endpoint_url)
    provenance = _provenance(comparison)
    against = show_against(comparison)
    return fill(
        _HERE,
        styles=[REPORT / "page.css", against.style],
        scripts=[REPORT / "page.js"],
        against=against,
        told=told,
        spelling=spelling,
        links={document.doc_id: document.id for document in told},
        levels=_name_levels(),
        provenance=provenance,
        num_differ=sum(ours != theirs for _, ours, theirs in provenance),
        numbers=show(numbers),
    )


def show_against(comparison: Comparison) -> Against:
    """What a comparison's own page and the report of run B both show of it."""
    sections = [section(comparison) for section in SECTIONS]
    return Against(
        base=show(comparison.base.uri, 4000),
        sides=[_name_side(comparison, side) for side in ("base", "other")],
        tiles=_tiles(comparison),
        command=show(_command(comparison), 4000),
        alerts=find_alerts(comparison),
        gaps=find_gaps(comparison),
        panels=[section for section in sections if section is not None],
        style=_HERE / "page.css",
    )


def find_alerts(comparison: Comparison) -> list[str]:
    """What must be known before any number is read."""
    alerts = []
    found = comparison.documents
    if comparison.base.plan["run_key"] == comparison.other.plan["run_key"]:
        alerts.append("A and B are one run, or copies of it: every difference must be 0.")
    if found.all is None:
        rest = "Only distributions are compared." if comparison.shifts else ""
        alerts.append(f"Nothing is paired: {why_no_pairs(found)}. {rest}".rstrip())
    for name, few in (("A", found.only_base), ("B", found.only_other)):
        if few.count and found.all is not None:
            alerts.append(f"{plural(few.count, 'document')} in {name} alone, and left out.")
    if found.changed.count and found.all is not None:
        alerts.append(f"{plural(found.changed.count, 'document')} with another text in B left out.")
    if found.moved:
        moved = sum(few.count for few in found.moved.values())
        alerts.append(f"{plural(moved, 'document')} with another status in B.")
    return alerts


def find_gaps(comparison: Comparison) -> list[str]:
    """What could not be compared, and why."""
    if comparison.documents.all is None:
        return []
    return [f"Not compared, {name}: {why}." for name, why in comparison.missing.items()]


def _name_side(comparison: Comparison, side: str) -> str:
    """What tells this run from the other: its model, and what differs."""
    ours = describe_run(getattr(comparison, side))
    theirs = describe_run(comparison.other if side == "base" else comparison.base)
    name = str(ours["model"]).rstrip("/")
    parts = [show(name.rsplit("/", 1)[-1] if name.count("/") > 1 else name)]
    engine, other = dict(ours["engine"]), dict(theirs["engine"])
    for key, value in engine.items():
        if value != other.get(key):
            said = ", ".join(map(str, value.values())) if isinstance(value, Mapping) else value
            parts.append(f"{key} {said}")
    if ours["corpus"] != theirs["corpus"]:
        parts.append(show(str(ours["corpus"])))
    return "; ".join(parts)


def _tiles(comparison: Comparison) -> list[tuple[str, str, str]]:
    """The headline: (name, value, what it means)."""
    found, tokens, apart = comparison.documents, comparison.tokens, comparison.distributions
    tiles = []
    if found.all is not None:
        drift = found.all
        span = "too few documents for an interval"
        if drift.low is not None and drift.high is not None:
            span = f"95 % interval {signed(drift.low)} to {signed(drift.high)}"
        of = f"of {plural(drift.documents, 'paired document')}; {span}"
        tiles.append((f"Median \u0394 {found.measure}", signed(drift.median), of))
    if apart is not None:
        kl = apart.kl
        worst = f"99.9 % {small(kl.percentiles['99.9'])}, largest {small(kl.largest)}"
        tiles.append((f"Mean {kl_name(apart)}", small(kl.mean), f"nats a token, A to B; {worst}"))
    if tokens is not None:
        same, ratio = tokens.same_top, tokens.ratio
        error = f"\u00b1 {percent(same.error)}: the likeliest token is the same one"
        tiles.append(("Same top", percent(same.value), error))
        both = (tokens.base_perplexity.value, tokens.other_perplexity.value)
        pair = "{} in A, {} in B".format(*(number(value, 3) for value in both))
        tiles.append(("Perplexity, B over A", f"{ratio.value:.4f}", pair))
    if found.all is None and comparison.shifts:
        shift = comparison.shifts[0]
        tiles.append(
            ("Stability index", number(shift.psi, 3), "of bits/byte over documents, A to B")
        )
        tiles.append(
            ("Wasserstein", number(shift.wasserstein, 3), "bits/byte that a document moved")
        )
    if tokens is None and found.all is not None:
        drift = found.all
        of = f"over all text: {number(drift.base, 4)} in A, {number(drift.other, 4)} in B"
        tiles.append((f"\u0394 {found.measure}", signed(drift.other - drift.base), of))
    return tiles


# ---- token by token --------------------------------------------------------------------------


def _show_told(comparison: Comparison, endpoint_url: str | None) -> tuple[list[Shown], str]:
    """The documents that differ the most, and why they stand as ids if they do."""
    documents = {d.doc_id: d for d in (*comparison.documents.worse, *comparison.documents.better)}
    names = Names(comparison.base, endpoint_url)
    shown: list[Shown] = []
    spelling = ""
    # In the order of the tables, whatever order they were read in.
    for doc_id, document in documents.items():
        if doc_id not in comparison.told:
            continue
        told = comparison.told[doc_id]
        pieces, why = _spell(told, document, names)
        spelling = why or spelling
        rows = _stretch(told)
        about = f"{signed(document.delta, 3)} {comparison.documents.measure}, "
        if rows.stop - rows.start < len(told.token_id):
            about += f"tokens {rows.start + 1:,} to {rows.stop:,} of "
        shown.append(
            Shown(
                id=f"document-{len(shown) + 1}",
                doc_id=show(doc_id),
                about=about + plural(len(told.token_id), "token"),
                tokens=_mark(told, pieces, rows, is_text=not why),
            )
        )
    return shown, spelling


def _stretch(told: Told) -> slice:
    """The tokens to show: where the differences add up to the most."""
    apart = np.abs(told.other_logprob - told.base_logprob)
    if len(apart) <= _MAX_TOKENS:
        return slice(0, len(apart))
    sums = np.cumsum(np.concatenate([[0.0], apart]))
    start = int(np.argmax(sums[_MAX_TOKENS:] - sums[:-_MAX_TOKENS]))
    return slice(start, start + _MAX_TOKENS)


def _spell(told: Told, document: Document, names: Names) -> tuple[list[str], str]:
    """The text of each token, or its id and why that is."""
    ids = told.token_id.tolist()
    spelled = names.spell(ids)
    why = names.why_not
    if spelled is not None:
        num_bytes = sum(map(len, spelled))
        if document.num_bytes and abs(num_bytes - document.num_bytes) <= (1 - _AGREE) * num_bytes:
            return join_bytes(spelled), ""
        why = "the model's tokenizer is not the one that made them, or they are a document of ids"
    return list(map(str, ids)), f"Tokens stand as their ids: {show(why)}."


def _mark(told: Told, pieces: list[str], rows: slice, *, is_text: bool) -> Markup:
    """A span a token, its class the level of change, its title the numbers."""
    spans = []
    for piece, base, other in zip(
        pieces[rows],
        told.base_logprob[rows].tolist(),
        told.other_logprob[rows].tolist(),
        strict=True,
    ):
        said = f"log p {number(base, 2)} in A, {number(other, 2)} in B"
        title = f"{said}, change {signed(other - base, 2)}"
        level = _level(other - base)
        spans.append(f'<span class="{level}" title="{title}">{mark_up(piece)}</span>')
    return Markup(("" if is_text else " ").join(spans))


def _level(change: float) -> str:
    level = sum(abs(change) >= lower for lower in _LEVELS)
    return f"{'worse' if change < 0 else 'better'}{level}" if level else "even"


def _name_levels() -> list[tuple[str, str]]:
    """(class, what it stands for), from the least likely to B to the likeliest."""
    ends = [*_LEVELS, math.inf]
    count = len(_LEVELS)
    names = [
        f"\u2265 {ends[i]:g}" if i == count - 1 else f"{ends[i]:g}\u2013{ends[i + 1]:g}"
        for i in range(count)
    ]
    worse = [(f"worse{i + 1}", f"\u2212 {names[i]}") for i in reversed(range(count))]
    better = [(f"better{i + 1}", f"+ {names[i]}") for i in range(count)]
    return [*worse, ("even", f"< {_LEVELS[0]:g}"), *better]


# ---- provenance ------------------------------------------------------------------------------


def _provenance(comparison: Comparison) -> list[tuple[str, str, str]]:
    """(name, of A, of B) of everything that is known of the runs."""
    ours, theirs = (describe_run(run) for run in (comparison.base, comparison.other))
    rows = []
    for fact, name in _FACTS.items():
        mine, yours = _flatten(ours[fact], name), _flatten(theirs[fact], name)
        for part in dict.fromkeys([*mine, *yours]):
            rows.append((part, mine.get(part, ""), yours.get(part, "")))
    return rows


def _flatten(value: Any, name: str) -> dict[str, str]:
    if isinstance(value, Mapping):
        inner = (_flatten(v, f"{name}: {key}") for key, v in value.items())
        return {part: text for found in inner for part, text in found.items()}
    if value is None:
        return {}
    if isinstance(value, (list, tuple)):
        value = ", ".join(map(str, value))
    return {show(name): f"{value:,}" if type(value) is int else show(str(value))}


def _command(comparison: Comparison) -> str:
    runs = (comparison.base, comparison.other)
    command = ["logitmill", "compare", *(run.uri for run in runs)]
    if len({split_address(run)[0] for run in runs}) > 1:
        command += ["--out", "compare"]
    urls = {run.folder.options.get("endpoint_url") for run in runs} - {None}
    if len(urls) == 1:
        command += ["--endpoint-url", str(urls.pop())]
    return shlex.join(command)
