"""Panels of documents: how predictable they are, by source and by language."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from markupsafe import Markup

from ...engine.records import OK
from ..summary import BIN_BITS_PER_BYTE, BITS_PER_BYTE, STATUS
from . import charts
from .panel import (
    Behind,
    Cell,
    Cells,
    Chart,
    Heatmap,
    Material,
    Panel,
    Scale,
    find_documents,
    legend,
    make_scale,
    quantile,
)
from .totals import Row, Totals, bits_per_byte, perplexity, ratio, sum_by
from .wording import edge, number, percent, plural, size

_NUM_LEVELS = 8


def histogram_panel(material: Material) -> Panel:
    """Bits per byte of documents, by source."""
    totals = material.totals
    about = (
        "How predictable the documents are: each is counted at its bits per byte, so low is text "
        "the model knows or text that repeats, high is text that is foreign to it, or noise."
    )
    notes: list[str] = []
    drawn: list[Chart] = []
    by_bin = totals.by(BITS_PER_BYTE, "bin")
    if by_bin:
        scale = make_scale({b: row["documents"] for b, row in by_bin.items()}, BIN_BITS_PER_BYTE)
        drawn = [
            _histogram(totals, scale, "documents", "documents", "Weighted by documents"),
            _histogram(totals, scale, "bytes", "bytes", "Weighted by bytes"),
        ]
        notes = _spread(by_bin)
        beyond = sum(row["documents"] for b, row in by_bin.items() if b > scale.last)
        if beyond:
            end = number(scale.stop(scale.last), 2)
            notes.append(
                f"The last bar also holds {plural(beyond, 'document')} beyond {end} bits/byte."
            )
    table = _source_table(totals)
    return Panel(
        "bits-per-byte",
        "Bits per byte",
        about,
        drawn,
        notes,
        [("By source", table)] if table else (),
        empty="Nothing to draw: no document with bytes was scored.",
    )


def languages_panel(material: Material) -> Panel | None:
    """Median bits per byte of every source in every language, where there are several."""
    about = (
        "The median document of every source in every language, in bits per byte, and how many "
        "there are: the stronger a cell's colour, the more foreign is its text to the model."
    )
    explorer = material.explorer
    sources, languages = explorer.axes[:2]
    weights: dict[tuple[int, int], dict[int, int]] = {}
    for source, language, _, steps, documents, _ in explorer.groups:
        into = weights.setdefault((source, language), {})
        for b, num in zip(np.cumsum(steps).tolist(), documents, strict=True):
            into[b] = into.get(b, 0) + num
    if len(weights) < 2:
        return None
    medians = {
        key: (quantile(by_bin, 0.5) + 0.5) * BIN_BITS_PER_BYTE for key, by_bin in weights.items()
    }
    low, high = min(medians.values()), max(medians.values())
    step = max((high - low) / _NUM_LEVELS, BIN_BITS_PER_BYTE)
    behind: dict[str, Behind] = {}
    rows = []
    for s, source in enumerate(sources.names):
        cells: list[Cell | None] = []
        for k, language in enumerate(languages.names):
            if (s, k) not in medians:
                cells.append(None)
                continue
            median, num = number(medians[s, k], 2), sum(weights[s, k].values())
            label = f"{source}, {language}: median {median} bits/byte, "
            label += plural(num, "document")
            level = min(int((medians[s, k] - low) / step), _NUM_LEVELS - 1)
            cells.append(Cell(median, plural(num, "document"), level, label))
            query = find_documents("status = 'ok'", sources.wheres[s], languages.wheres[k])
            behind[label] = (query, s, k)
        rows.append((source, cells))
    edges = [number(low + n * step, 2) for n in range(_NUM_LEVELS)]
    levels = [f"from {edges[0]}", *edges[1:]]
    heatmap = Heatmap("source", languages.names, rows, levels, "bits/byte", behind)
    return Panel("languages", "Sources and languages", about, heatmap=heatmap)


def _spread(by_bin: Mapping[int, Row]) -> list[str]:
    """Quantiles over documents, to a bin's width."""
    weights = {b: row["documents"] for b, row in by_bin.items()}
    if sum(weights.values()) < 20:
        return []
    low, middle, high = (
        number((quantile(weights, q) + 0.5) * BIN_BITS_PER_BYTE, 2) for q in (0.05, 0.5, 0.95)
    )
    return [
        f"Half of the documents are below {middle} bits/byte; nine in ten lie between {low} and "
        f"{high}."
    ]


def _histogram(totals: Totals, scale: Scale, weight: str, unit: str, title: str) -> Chart:
    order = {label: n for n, label in enumerate(totals.labels)}
    bars = sum_by(
        totals.rows(BITS_PER_BYTE), lambda row: (order[row["label"]], scale.bar(row["bin"]))
    )
    rows = []
    for (n, bar), sums in bars.items():
        b, label = bar * scale.factor, totals.labels[n]
        span = f"{edge(scale.start(b))} to {edge(scale.stop(b))} bits/byte"
        rows.append(
            {
                "start": scale.start(b),
                "stop": scale.stop(b),
                "series": label,
                "order": n,
                "value": sums[weight],
                "label": f"{span}, {label}: {plural(sums['documents'], 'document')}, "
                f"{size(sums['bytes'])}",
            }
        )
    svg = charts.draw_histogram(rows, totals.labels, x_title="bits per byte", y_title=unit)
    sums_of = sum_by(totals.rows(BITS_PER_BYTE), lambda row: scale.bar(row["bin"]))
    numbers = [
        (
            f"{edge(scale.start(bar * scale.factor))} to {edge(scale.stop(bar * scale.factor))}",
            f"{sums['documents']:,}",
            f"{sums['bytes']:,}",
        )
        for bar, sums in sorted(sums_of.items())
    ]
    columns = ("bits per byte", "documents", "bytes")
    return Chart(title, Markup(svg), Cells(columns, numbers), legend(totals.labels))


def _source_table(totals: Totals) -> Cells | None:
    scored = totals.by(STATUS + OK, "label")
    if not scored:
        return None
    named = [(label, scored[label]) for label in totals.labels if label in scored]
    if len(named) > 1:
        named.append(("All", totals.total(STATUS + OK)))
    rows = [
        (
            label,
            f"{sums['documents']:,}",
            size(sums["bytes"]),
            f"{sums['tokens']:,}",
            number(bits_per_byte(sums), 3),
            number(perplexity(sums), 2),
            percent(ratio(sums["hits"], sums["tokens"])),
        )
        for label, sums in named
    ]
    columns = (
        "source",
        "documents",
        "size",
        "tokens",
        "bits/byte",
        "token perplexity",
        "top-1 accuracy",
    )
    return Cells(columns, rows)
