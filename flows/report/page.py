"""Summary tables -> one self-contained HTML page. Reads no raw rows and loads nothing.

The page's text comes from `page.html`, its look from `page.css`, its panels from `panels.py`. It
can be read without its script, which lets the reader choose (`explorer.js`), says what is behind a
mark (`behind.js`) and of a token (`page.js`). Ids, sources, errors and text of documents are
anybody's: the template escapes them all, and the page's own policy lets no other script run.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
from markupsafe import Markup

from ...engine.records import OK
from ..summary import STATUS
from .explorer import Explorer, draw_data
from .marked import Heatmap
from .panel import Against, Behind, Material, Panel
from .panels import PANELS
from .provenance import describe_recipe, list_facts, plain, repeat_command
from .standouts import list_failed, list_standouts
from .template import REPORT, fill
from .totals import Totals, bits_per_byte, perplexity, ratio
from .wording import MAX_LABEL, duration, number, percent, plural, show, size

# In this order, one script: what stands in one is known to the next.
_SCRIPTS = ("page.js", "behind.js", "explorer.js")

_WHY = {
    "empty": "empty",
    "too_short": "too short for the recipe",
    "invalid_utf8": "not valid UTF-8",
    "invalid_ids": "with token ids outside the vocabulary",
    "invalid_value": "with a value of the wrong type",
    "nonfinite": "with scores that are not finite",
}


def render_report(
    counts: pa.Table,
    outliers: pa.Table,
    facts: Mapping[str, Any],
    operations: pa.Table | None = None,
    vocabulary: pa.Table | None = None,
    against: Against | None = None,
) -> str:
    """The report of a run as one HTML page.

    Args:
        counts: schema `summary.COUNTS`.
        outliers: schema `summary.OUTLIERS`.
        facts: what else there is to say of the run: `run_key, uri, model, model_digest, corpus,
            recipe, recipe_hash, engine, tiers, versions, device, created, seconds, documents,
            tokens, bytes`. Any of them may be missing.
        operations: schema `operations.OPERATIONS`, of all shards.
        vocabulary: schema `vocabulary.VOCABULARY`.
        against: what `compare.page.show_against` makes of a comparison with another run.
    """
    material = Material(Totals.of(counts), Explorer.of(counts), facts, operations, vocabulary)
    totals, rows = material.totals, outliers.to_pylist()
    heatmap = Heatmap.of(rows, facts.get("recipe") or {})
    links = {document.doc_id: document.id for document in heatmap.documents}
    panels = [panel for make in PANELS if (panel := make(material)) is not None]
    return fill(
        REPORT,
        styles=[REPORT / "page.css", *([against.style] if against is not None else [])],
        scripts=[REPORT / name for name in _SCRIPTS],
        data=Markup(draw_data(material.explorer, facts, rows, links, _behind(panels))),
        model=plain(facts.get("model")),
        corpus=plain(facts.get("corpus")),
        recipe=plain((facts.get("recipe") or {}).get("name")),
        uri=show(str(facts["uri"]), 4000) if facts.get("uri") else "RUN",
        scored=_scored(totals),
        tiles=_tiles(totals, facts),
        failure=_failure(totals),
        panels=panels,
        against=against,
        tables=list_standouts(rows, totals),
        links=links,
        failed=list_failed(rows),
        heatmap=heatmap,
        recipe_words=describe_recipe(facts.get("recipe") or {}),
        provenance=list_facts(facts),
        command=repeat_command(facts),
        reading=show(f"open_run({facts['uri']!r})", 4000) if facts.get("uri") else None,
    )


def _behind(panels: Sequence[Panel]) -> dict[str, Mapping[str, Behind]]:
    """What is behind the marks of charts and heatmaps, by the names that page.html gives them."""
    found: dict[str, Mapping[str, Behind]] = {}
    for panel in panels:
        found |= {f"{panel.id}-{n}": chart.behind for n, chart in enumerate(panel.charts)}
        if panel.heatmap:
            found[panel.id] = panel.heatmap.behind
    return {name: behind for name, behind in found.items() if behind}


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
            number(bits_per_byte(scored), 3),
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
