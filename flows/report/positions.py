"""Panels of where tokens stand: surprisal by position in the document, and in the window."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from markupsafe import Markup

from ...engine.recipes import Recipe
from ..summary import BINS_PER_OCTAVE, POSITION, WINDOW
from . import charts
from .explorer import is_value
from .panel import Behind, Cells, Chart, Material, Panel, find_documents, legend
from .totals import BITS, Row, Totals, ratio, sum_by
from .wording import number, percent, plural

# A mean over fewer tokens than this is noise.
_MIN_POINT_TOKENS = 30
_MAX_BORDERS = 8


@dataclass(frozen=True)
class _Place:
    """Where a token stands, as one of the two panels counts it."""

    panel: str
    x_title: str
    column: str
    """What its spans are called in a table."""
    name: Callable[[int, int], str]
    """Of places from one to another, counted from 1."""
    condition: Callable[[int], str]
    """SQL: that a document may have tokens from this place on."""
    last: int = 1 << 40
    """The last place that there is. A bin that it leaves less than half of counts with the bin
    before, since few tokens stand there."""

    def bin(self, b: int) -> int:
        """What a bin counts with: itself, but for one that is cut off so."""
        first, stop = _ends(b)
        return b - 1 if first <= self.last < (first + stop) // 2 else b

    def ends(self, b: int, num_bins: int = 1) -> tuple[int, int]:
        """The first and the last place of bins from `b`, with what counts with them."""
        first, stop = _ends(b, num_bins)
        return first, self.last if self.bin(b + num_bins) < b + num_bins else min(stop, self.last)

    def by_bin(self, totals: Totals) -> dict[int, Row]:
        """Sums of the panel by bin, in order."""
        return dict(sorted(sum_by(totals.rows(self.panel), lambda r: self.bin(r["bin"])).items()))


_IN_DOCUMENT = _Place(
    POSITION,
    "position in the document (tokens, log scale)",
    "tokens",
    lambda first, last: f"token {first:,}" if first == last else f"tokens {first:,} to {last:,}",
    lambda first: f"num_tokens_scored >= {first}",
)
_IN_WINDOW = _Place(
    WINDOW,
    "tokens of context in a later window (log scale)",
    "context, tokens",
    lambda first, last: (
        plural(first, "token") if first == last else f"{first:,} to {last:,} tokens"
    ),
    lambda first: "num_windows > 1",
)


def position_panel(material: Material) -> Panel:
    """Surprisal and entropy by position in the document."""
    totals = material.totals
    about = (
        "Bits per token by the token's place in its document. It falls while the model learns what "
        "it is reading and levels off; a saw-tooth is a trace of the recipe's windows. Entropy is "
        "the surprise that the model itself expected: a gap between the lines is a misjudgement."
    )
    by_bin = totals.by(POSITION, "bin")
    if not by_bin:
        return Panel("position", "Position in the document", about)
    recipe = _find_recipe(material.facts.get("recipe") or {})
    borders = _borders(recipe, max(_enough(by_bin)))
    notes = [
        "A point stands for a quarter of an octave, by source for an octave. Far ones come from "
        "long documents only, so the curve's end speaks of those; points of fewer than "
        f"{_MIN_POINT_TOKENS} tokens are left out."
    ]
    if borders:
        notes.append("Upright lines: where the recipe's first windows begin to score.")
    if not totals.rows(WINDOW):
        notes += _why_no_windows(recipe, max(by_bin))
    drawn = _draw(totals, _IN_DOCUMENT, borders)
    return Panel("position", "Position in the document", about, drawn, notes)


def window_panel(material: Material) -> Panel | None:
    """Surprisal and entropy by what was read, in windows that begin within their document."""
    totals = material.totals
    recipe = _find_recipe(material.facts.get("recipe") or {})
    place = _IN_WINDOW
    if recipe is not None and recipe.context is not None:
        place = replace(place, last=recipe.context)
    by_bin = place.by_bin(totals)
    # A context that was cut has one window a document, and none that is a later one.
    if not by_bin or (recipe is not None and recipe.name == "conditional"):
        return None
    about = (
        "A document longer than a window is read in several, and a later one does not show the "
        "model what stands before it. Bits per token of later windows, by the tokens of context "
        "that they show: as high as this falls, so high is the saw-tooth that the recipe's "
        "windows leave along a document. A flat line is a recipe that costs nothing."
    )
    drawn = _draw(totals, place)
    note = _height(by_bin, totals.total(POSITION), place)
    return Panel("window", "Position in the window", about, drawn, [note])


def _enough(by_bin: Mapping[int, Row]) -> dict[int, Row]:
    """The bins with enough tokens for a mean, or all if none has."""
    kept = {b: row for b, row in by_bin.items() if row["tokens"] >= _MIN_POINT_TOKENS}
    return dict(sorted((kept or by_bin).items()))


# ---- what the recipe does --------------------------------------------------------------------


def _find_recipe(recipe: Mapping[str, Any]) -> Recipe | None:
    """The recipe of a run, None if it is none that this version knows."""
    try:
        return Recipe(**recipe) if recipe.get("context") else None
    except (TypeError, ValueError):
        return None


def _borders(recipe: Recipe | None, last_bin: int) -> list[int]:
    """Where the windows of a long document begin to score, counted from 1; the first few."""
    if recipe is None or recipe.context is None or recipe.concatenate:
        return []
    length = min(int(2.0 ** ((last_bin + 1) / BINS_PER_OCTAVE)), _MAX_BORDERS * recipe.context)
    windows = recipe.windows(length + 1, has_prefix=True)
    return [window.first_target for window in windows[1 : _MAX_BORDERS + 1]]


def _why_no_windows(recipe: Recipe | None, last_bin: int) -> list[str]:
    """Why nothing is known of later windows, where documents reach as far as a bin of positions."""
    # How long a context was is not counted.
    if recipe is None or recipe.name == "conditional":
        return []
    _, longest = _ends(last_bin)
    if len(recipe.windows(longest + 1, has_prefix=True)) == 1:
        return [
            "Every document was read in one window, so no token lacks what stands before it there."
        ]
    return [
        "Position in the window is not shown: no document was read in several windows, or the "
        "run's summary has no counts of it."
    ]


def _height(by_bin: Mapping[int, Row], total: Row, place: _Place) -> str:
    """What tokens of later windows take with the least context and with the most, in words."""
    sums = sum_by(by_bin.values(), lambda row: None)[None]
    shown = _enough(by_bin)
    begin, end = min(shown), max(shown) + 1
    share = percent(ratio(sums["tokens"], total["tokens"]))
    said = f"{plural(sums['tokens'], 'token')} ({share}) stand in later windows"
    if end - begin <= BINS_PER_OCTAVE:
        first, _ = place.ends(min(by_bin))
        return f"{said}, each with a context of {plural(first, 'token')} or more."
    spans = []
    for start in (begin, end - BINS_PER_OCTAVE):
        held = [b for b in range(start, start + BINS_PER_OCTAVE) if b in by_bin]
        part = sum_by((by_bin[b] for b in held), lambda row: None)[None]
        first, last = place.ends(held[0])[0], place.ends(held[-1])[1]
        spans.append((place.name(first, last), part["nll"] / part["tokens"]))
    (least, low), (most, high) = spans
    run = total["nll"] / total["tokens"]
    even = run - (sums["nll"] - sums["tokens"] * high) / total["tokens"]
    said += (
        f". With {least} of context they take {number(low * BITS, 2)} bits each, with {most} "
        f"{number(high * BITS, 2)}."
    )
    if even >= run:
        return f"{said} The recipe's windows cost nothing here."
    return (
        f"{said} Had all of them been like the latter, the run would stand at "
        f"{number(even * BITS, 3)} bits per token, not {number(run * BITS, 3)}: more overlap or "
        "longer windows come near that."
    )


# ---- charts ----------------------------------------------------------------------------------


def _draw(totals: Totals, place: _Place, borders: Sequence[int] = ()) -> list[Chart]:
    """A panel of positions: of all sources, and by source where there are several."""
    drawn = [_draw_all(_enough(place.by_bin(totals)), place, borders)]
    if len(totals.labels) > 1:
        drawn.append(_draw_sources(totals, place))
    return drawn


def _draw_all(by_bin: Mapping[int, Row], place: _Place, borders: Sequence[int]) -> Chart:
    series = ("surprisal", "entropy")
    rows, numbers = [], []
    behind: dict[str, Behind] = {}
    for b, sums in by_bin.items():
        means = (sums["nll"] / sums["tokens"] * BITS, sums["value"] / sums["tokens"] * BITS)
        x, span = _point(place, b)
        for name, mean in zip(series, means, strict=True):
            text = f"{span}: {name} {number(mean, 2)} bits/token, {sums['tokens']:,} tokens"
            rows.append({"x": x, "y": mean, "series": name, "label": text})
            behind[text] = (_reaching(place, b),)
        numbers.append((span, f"{sums['tokens']:,}", *(number(mean, 3) for mean in means)))
    svg = charts.draw_lines(
        rows, series, x_title=place.x_title, y_title="bits per token", rules=borders
    )
    columns = (place.column, "number", "surprisal, bits", "entropy, bits")
    return Chart("All sources", Markup(svg), Cells(columns, numbers), legend(series), behind)


def _draw_sources(totals: Totals, place: _Place) -> Chart:
    rows, numbers = [], []
    behind: dict[str, Behind] = {}
    for label in totals.labels:
        of_label = (row for row in totals.rows(place.panel) if row["label"] == label)
        # Nine lines of single bins are a tangle.
        by_octave = sum_by(of_label, lambda row: place.bin(row["bin"]) // BINS_PER_OCTAVE)
        for octave, sums in _enough(by_octave).items():
            b = octave * BINS_PER_OCTAVE
            x, span = _point(place, b, BINS_PER_OCTAVE)
            mean = sums["nll"] / sums["tokens"] * BITS
            text = f"{span}, {label}: {number(mean, 2)} bits/token, {sums['tokens']:,} tokens"
            rows.append({"x": x, "y": mean, "series": label, "label": text})
            numbers.append((label, span, f"{sums['tokens']:,}", number(mean, 3)))
            if label in totals.sources:
                where = is_value("source", totals.sources[label])
                behind[text] = (_reaching(place, b, where),)
    svg = charts.draw_lines(rows, totals.labels, x_title=place.x_title, y_title="bits per token")
    columns = ("source", place.column, "number", "surprisal, bits")
    cells = Cells(columns, numbers, 2)
    return Chart("Surprisal by source", Markup(svg), cells, legend(totals.labels), behind)


def _point(place: _Place, b: int, num_bins: int = 1) -> tuple[float, str]:
    """The geometric middle of the places of bins from `b`, and their name."""
    first, last = place.ends(b, num_bins)
    return math.sqrt(first * last), place.name(first, last)


def _ends(b: int, num_bins: int = 1) -> tuple[int, int]:
    """The first and the last place of bins from `b`, counted from 1."""
    first = math.ceil(2.0 ** (b / BINS_PER_OCTAVE))
    return first, math.ceil(2.0 ** ((b + num_bins) / BINS_PER_OCTAVE)) - 1


def _reaching(place: _Place, b: int, *conditions: str) -> str:
    """The query for documents that may have a token in a bin of places."""
    first, _ = _ends(b)
    return find_documents(place.condition(first), *conditions, order="num_tokens_scored")
