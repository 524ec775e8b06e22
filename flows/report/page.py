"""Summary tables -> one self-contained HTML page. Reads no raw rows and loads nothing.

The page's text comes from `page.html`, its look from `page.css`, its few lines of script from
`page.js`, its panels from `panels.py`. Ids, sources, errors and text of documents are anybody's:
the template escapes them all, and the page's own policy lets no other script run.
"""

from __future__ import annotations

import base64
import hashlib
import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from ...engine.records import OK
from ..summary import BITS_PER_BYTE, FAILED, HIGHEST, LOWEST, SAMPLE, STATUS
from .panels import PANELS, Cells
from .totals import BITS, Row, Totals, bits_per_byte, perplexity, ratio
from .wording import (
    MAX_LABEL,
    NOTHING,
    duration,
    edge,
    number,
    percent,
    plural,
    show,
    show_lines,
    size,
)

_FOLDER = Path(__file__).parent
# Upper edges of the heatmap's levels, bits; the last level is open.
_LEVELS = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0)

_WHY = {
    "empty": "empty",
    "too_short": "too short for the recipe",
    "invalid_utf8": "not valid UTF-8",
    "invalid_ids": "with token ids outside the vocabulary",
    "invalid_value": "with a value of the wrong type",
    "nonfinite": "with scores that are not finite",
}

_RECIPES = {
    "rolling": "Every token is scored exactly once, in windows of at most {context} tokens. A "
    "later window reads {overlap} tokens before the first one it scores; a short last window is "
    "filled up on its left (the rule of lm-evaluation-harness).",
    "disjoint": "Windows of {context} tokens side by side. The first token of each is not "
    "scored and a tail shorter than a window is left out (the rule of the GPTQ and AWQ papers).",
    "strided": "Windows of at most {context} tokens that start {stride} tokens apart; each scores "
    "the tokens that no window before it has scored (the rule of Hugging Face's guide).",
    "llamacpp": "Windows of {context} tokens side by side, the second half of each scored (the "
    "rule of llama-perplexity).",
    "truncated": "The first {context} tokens of every document, the rest left out (the rule of "
    "Hugging Face's evaluate).",
    "conditional": "A text given its context: the context is read and not scored, and cut from the "
    "left where both are longer than {context} tokens.",
}

_PREFIXES = {
    "auto": "its beginning-of-text token, or the end-of-text token if it has none",
    "bos": "its beginning-of-text token",
    "eos": "its end-of-text token",
    "none": "no token",
    "tokenizer": "what its tokenizer puts there by itself",
}

_FACTS = {
    "run_key": "Run key",
    "uri": "Run",
    "created": "Created",
    "model": "Model",
    "model_digest": "Model digest",
    "corpus": "Corpus",
    "recipe": "Recipe",
    "recipe_hash": "Recipe hash",
    "engine": "Engine",
    "device": "Device",
    "tiers": "Tiers kept",
    "versions": "Versions",
    "documents": "Documents",
    "tokens": "Tokens",
    "bytes": "Bytes",
    "seconds": "Seconds of scoring",
}


@dataclass(frozen=True)
class Marked:
    """A document of the heatmap: why it is there, its numbers, and its tokens as coloured text."""

    id: str
    doc_id: str
    why: str
    about: str
    tokens: Markup


def render_report(counts: pa.Table, outliers: pa.Table, facts: Mapping[str, Any]) -> str:
    """The report of a run as one HTML page.

    Args:
        counts: schema `summary.COUNTS`.
        outliers: schema `summary.OUTLIERS`.
        facts: what else there is to say of the run: `run_key, uri, model, model_digest, corpus,
            recipe, recipe_hash, engine, tiers, versions, device, created, seconds, documents,
            tokens, bytes`. Any of them may be missing.
    """
    totals = Totals.of(counts)
    rows = outliers.to_pylist()
    marked = _mark_documents(rows)
    script = (_FOLDER / "page.js").read_text("utf-8")
    environment = Environment(
        loader=FileSystemLoader(_FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html").render(
        style=Markup((_FOLDER / "page.css").read_text("utf-8")),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        model=_plain(facts.get("model")),
        corpus=_plain(facts.get("corpus")),
        recipe=_plain((facts.get("recipe") or {}).get("name")),
        scored=_scored(totals),
        tiles=_tiles(totals, facts),
        failure=_failure(totals),
        panels=[panel(totals) for panel in PANELS],
        tables=_outlier_tables(rows, totals, {m.doc_id: m.id for m in marked}),
        failed=_failed_table(rows),
        marked=marked,
        levels=_level_names(),
        recipe_words=describe_recipe(facts.get("recipe") or {}),
        provenance=_provenance(facts),
        command=_command(facts),
        reading=show(f"open_run({facts['uri']!r})", 4000) if facts.get("uri") else None,
    )


def describe_recipe(recipe: Mapping[str, Any]) -> str:
    """A recipe in words, empty if it is none that this version knows."""
    words = _RECIPES.get(recipe.get("name") or "")
    if words is None:
        return ""
    known = {key: _plain(recipe.get(key)) or "?" for key in ("context", "overlap", "stride")}
    text = words.format(**known).replace(" 1 tokens", " 1 token")
    prefix = recipe.get("prefix")
    if prefix is not None:
        named = _PREFIXES.get(str(prefix), f"the token {prefix}")
        text += f" Before a document's first token the model sees {named}."
    if recipe.get("concatenate"):
        text += " The corpus is read as one stream, documents joined by a blank line."
    return text


def _scored(totals: Totals) -> dict[str, str]:
    """What was scored, in numbers."""
    scored = totals.total(STATUS + OK)
    return {
        "documents": plural(scored["documents"], "document"),
        "tokens": plural(scored["tokens"], "token"),
        "bytes": size(scored["bytes"]) if scored["bytes"] else "",
    }


def _tiles(totals: Totals, facts: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """The headline: (name, value, what it means)."""
    scored = totals.total(STATUS + OK)
    seconds, device = facts.get("seconds") or 0.0, facts.get("device")
    tokens = facts.get("tokens") or scored["tokens"]
    where = f" on {show(str(device), MAX_LABEL)}" if device else ""
    rate, time = None, "not recorded"
    if tokens and 0.0 < seconds < math.inf:
        rate = tokens / seconds
        time = f"{plural(tokens, 'token')} in {duration(seconds)}{where}"
    return [
        (
            "Bits per byte",
            number(bits_per_byte(totals.total(BITS_PER_BYTE)), 3),
            "surprise for a byte of text; less is more predictable, 8 is pure noise",
        ),
        (
            "Token perplexity",
            number(perplexity(scored), 2),
            "token-weighted; compare only between models with one tokenizer",
        ),
        (
            "Top-1 accuracy",
            percent(ratio(scored["hits"], scored["tokens"])),
            "of tokens were the model's first choice",
        ),
        ("Tokens per second", number(rate, 0), time),
    ]


def _failure(totals: Totals) -> str | None:
    """How many documents were not scored, and why; None if all were."""
    failed = totals.failed()
    num_failed = sum(failed.values())
    if not num_failed:
        return None
    num_all = num_failed + totals.total(STATUS + OK)["documents"]
    why = ", ".join(
        f"{count:,} {_WHY.get(status, show(status))}" for status, count in failed.items()
    )
    return f"{num_failed:,} of {plural(num_all, 'document')} could not be scored: {why}."


def _outlier_tables(
    rows: Sequence[Row], totals: Totals, marked: Mapping[str, str]
) -> list[dict[str, Any]]:
    """The lowest and highest documents: titles, columns, rows, and links to their tokens."""
    num_scored = totals.total(STATUS + OK)["documents"]
    # Of few documents, none should be lowest and highest at once.
    most = max(1, num_scored // 2)
    tables = []
    for kind, title in ((LOWEST, "Most predictable"), (HIGHEST, "Most surprising")):
        of_kind = [row for row in rows if row["kind"] == kind][:most]
        cells = [
            {
                "doc_id": show(row["doc_id"]),
                "link": marked.get(show(row["doc_id"])),
                "source": show(row["source"], MAX_LABEL),
                "numbers": _document_numbers(row),
            }
            for row in of_kind
        ]
        tables.append({"id": kind, "title": title, "rows": cells})
    return tables


def _document_numbers(row: Row) -> list[str]:
    return [
        number(row["bits_per_byte"], 3),
        number(row["token_perplexity"], 2),
        number(row["min_k_plus_plus_20"], 2),
        f"{row['num_tokens']:,}",
        f"{row['num_bytes']:,}" if row["num_bytes"] else NOTHING,
    ]


def _failed_table(rows: Sequence[Row]) -> Cells | None:
    failed = [
        (
            show(row["doc_id"]),
            show(row["status"]),
            show(row["error"] or "") or NOTHING,
            show(row["source"], MAX_LABEL) or NOTHING,
        )
        for row in rows
        if row["kind"] == FAILED
    ]
    return Cells(("document", "status", "error", "source"), failed, 4) if failed else None


def _mark_documents(rows: Sequence[Row]) -> list[Marked]:
    """The documents whose tokens are shown, each once."""
    why = {
        LOWEST: "among the most predictable",
        HIGHEST: "among the most surprising",
        SAMPLE: "drawn at random",
    }
    marked: dict[tuple[str, float | None], Marked] = {}
    for row in rows:
        key = (row["doc_id"], row["bits_per_byte"])
        if row["pieces"] is None or key in marked:
            continue
        about = f"token perplexity {number(row['token_perplexity'], 2)}, "
        if row["bits_per_byte"] is not None:
            about = f"{number(row['bits_per_byte'], 3)} bits/byte, {about}"
        if len(row["pieces"]) < row["num_tokens"]:
            about += f"first {len(row['pieces']):,} of "
        marked[key] = Marked(
            id=f"document-{len(marked) + 1}",
            doc_id=show(row["doc_id"]),
            why=why[row["kind"]],
            about=about + plural(row["num_tokens"], "token"),
            tokens=_mark_tokens(row),
        )
    return list(marked.values())


def _mark_tokens(row: Row) -> Markup:
    """A span a token, its class the level of surprisal, its title the numbers."""
    spans = []
    for piece, logprob, rank, entropy in zip(
        row["pieces"], row["logprob"], row["rank"], row["entropy"], strict=True
    ):
        bits = max(0.0, -logprob * BITS)
        level = sum(bits >= lower for lower in _LEVELS)
        title = f"{number(bits, 2)} bits, rank {rank:,}, entropy {number(entropy * BITS, 2)} bits"
        text = str(escape(show_lines(piece)))
        # The marks are there to see, not to be read aloud.
        for mark in ("\u21b5", "\u21e5"):
            text = text.replace(mark, f'<i aria-hidden="true">{mark}</i>')
        spans.append(f'<span class="s{level}" title="{title}">{text}</span>')
    # Token ids, which stand for a document without text, would run into one number.
    return Markup(("" if row["num_bytes"] else " ").join(spans))


def _level_names() -> list[str]:
    """What the heatmap's levels stand for, bits."""
    edges = [edge(bits) for bits in _LEVELS]
    inner = [f"{a}\u2013{b}" for a, b in pairwise(edges)]
    return [f"< {edges[0]}", *inner, f"\u2265 {edges[-1]}"]


def _provenance(facts: Mapping[str, Any]) -> list[tuple[str, list[tuple[str, str]]]]:
    """Everything that is known of the run: (name, [(part, value)]), parts of a plain value ''."""
    names = [*_FACTS, *sorted(set(facts) - set(_FACTS))]
    flat = ((_FACTS.get(name, show(name, MAX_LABEL)), _flatten(facts.get(name))) for name in names)
    return [(name, parts) for name, parts in flat if parts]


def _flatten(value: Any, path: str = "") -> list[tuple[str, str]]:
    if isinstance(value, Mapping):
        return [
            part
            for key, inner in value.items()
            for part in _flatten(inner, f"{path}.{key}" if path else str(key))
        ]
    text = _plain(value)
    return [(show(path, MAX_LABEL), text)] if text else []


def _plain(value: Any) -> str:
    """A fact as text, empty where there is nothing to say."""
    match value:
        case None:
            return ""
        case bool():
            return "yes" if value else "no"
        case int():
            return f"{value:,}"
        case float():
            return f"{value:,.6g}" if math.isfinite(value) else ""
        case list() | tuple() | set():
            return ", ".join(filter(None, map(_plain, value)))
    return show(str(value))


def _command(facts: Mapping[str, Any]) -> str | None:
    """The command that gives this run's scores again."""
    model, corpus, recipe = facts.get("model"), facts.get("corpus"), facts.get("recipe") or {}
    if not (model and corpus):
        return None
    words = ["logitmill", "score", str(model), str(corpus)]
    if facts.get("uri"):
        words += ["--out", str(facts["uri"]).rstrip("/").rpartition("/")[0]]
    if recipe.get("name"):
        words += ["--recipe", str(recipe["name"])]
    # The others' settings have no meaning for a recipe, and are refused.
    meant = {"overlap": "rolling", "stride": "strided"}
    for setting in ("context", "overlap", "stride", "prefix"):
        if recipe.get(setting) is not None and meant.get(setting) in (None, recipe.get("name")):
            words += [f"--{setting}", str(recipe[setting])]
    for tier in facts.get("tiers") or ():
        # Document scores are always kept.
        words += ["--keep", str(tier)] if tier != "scores" else []
    return show(shlex.join(words), 4000)
