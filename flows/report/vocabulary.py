"""The panel of the vocabulary: which tokens the model expects too seldom, and which too often."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import pyarrow as pa
import pyarrow.compute as pc
from markupsafe import Markup

from ...engine.frequencies import MAX_SOURCES
from ..counts import OTHER
from ..vocabulary import Usage, find_bias
from . import charts
from .panel import Behind, Cells, Chart, Material, Panel
from .wording import MAX_LABEL, NOTHING, number, show, show_piece

_MAX_TOKENS, _MAX_SOURCES = 12, 20
_IN_PART = " (in part)"


def vocabulary_panel(material: Material) -> Panel | None:
    """Tokens by how far they were observed from where they were expected, and sources."""
    table = material.vocabulary
    if table is None or not table.num_rows:
        return None
    about = (
        "How often every token was there, beside how often the model expected it: the sum of its "
        "probabilities at all places. Tokens expected too seldom are words of this corpus that the "
        "model has not learned; those expected too often are what it would rather have read."
    )
    found = find_bias(table, count=_MAX_TOKENS)
    drawn = [
        _chart("Expected too seldom", found.too_seldom, charts.color(0), "num_observed"),
        _chart("Expected too often", found.too_often, charts.color(1), "num_first_choice"),
    ]
    notes = [
        "A bar is how far the count lies from what was expected, in standard deviations of what "
        "chance would do if the model were right. All tokens: summary/vocabulary.parquet.",
        "Behind a bar is the query for the documents where its token was there the most, or, of "
        "those expected too often, where it was the model's first choice the most.",
    ]
    sources = _sources(table)
    if any(label.endswith(_IN_PART) for label, *_ in sources.rows):
        notes.append(
            f"Where a shard has more than {MAX_SOURCES} sources, the later ones are told apart no "
            f"longer: a source that is marked{_IN_PART} may have more tokens among {OTHER}."
        )
    return Panel("vocabulary", "Vocabulary", about, drawn, notes, [("By source", sources)])


def _chart(title: str, usages: Sequence[Usage], color: str, order: str) -> Chart:
    names = _name(usages)
    rows, numbers = [], []
    behind: dict[str, Behind] = {}
    for name, usage in zip(names, usages, strict=True):
        expected = number(usage.expected, 1)
        told = f"{name}: observed {usage.observed:,}, expected {expected}"
        value = abs(usage.z)
        rows.append({"name": name, "value": value, "color": color, "label": told})
        behind[told] = (_find_usage(usage.token_id, order),)
        ratio = number(usage.observed / usage.expected, 2) if usage.expected else NOTHING
        numbers.append((name, f"{usage.observed:,}", expected, ratio, number(usage.z, 1)))
    svg = charts.draw_bars(rows, x_title="standard deviations", x_format="~s")
    columns = ("token", "observed", "expected", "observed / expected", "deviations")
    return Chart(title, Markup(svg), Cells(columns, numbers), behind=behind)


def _find_usage(token_id: int, order: str) -> str:
    """The query for the documents where a token came, or was expected first, most often."""
    counts = ",\n".join(
        f"  len(list_filter({column}, lambda x: x = {token_id})) AS {name}"
        for column, name in (("token_id", "num_observed"), ("top1_id", "num_first_choice"))
    )
    return f"SELECT doc_id,\n{counts}\nFROM {{tokens}}\nORDER BY {order} DESC\nLIMIT 20"


def _name(usages: Sequence[Usage]) -> list[str]:
    """Tokens as they can be told apart: spaces seen, and ids where texts are alike or none."""
    shown = [show_piece(usage.token) for usage in usages]
    times = Counter(shown)
    return [
        f"{text} #{usage.token_id}" if times[text] > 1 or not text else text
        for text, usage in zip(shown, usages, strict=True)
    ]


def _sources(table: pa.Table) -> Cells:
    """Sources of most tokens."""
    sizes = table.group_by("source", use_threads=False).aggregate([("observed", "sum")])
    sizes = sizes.sort_by([("observed_sum", "descending"), ("source", "ascending")])
    rows = []
    for source in sizes["source"].to_pylist()[:_MAX_SOURCES]:
        own = table.filter(pc.equal(table["source"], source))
        found = find_bias(own, source, 1)
        first = [
            _name(usages)[0] if usages else NOTHING
            for usages in (found.too_seldom, found.too_often)
        ]
        rows.append(
            (
                (show(source, MAX_LABEL) or "(no source)") + _IN_PART * found.partial,
                *first,
                f"{found.num_tokens:,}",
                number(found.divergence, 3),
            )
        )
    columns = ("source", "most too seldom", "most too often", "tokens", "divergence, bits")
    return Cells(columns, rows, 3)
