"""Panels of tokens: surprisal by position, calibration, ranks, and how surprisal is spread."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from markupsafe import Markup

from ...engine.recipes import Recipe
from ..summary import (
    BIN_TOKEN_BITS,
    BINS_PER_OCTAVE,
    CALIBRATION,
    CALIBRATION_BINS,
    ENTROPY,
    POSITION,
    RANK,
    TOKEN_NLL,
)
from . import charts
from .explorer import is_value
from .panel import (
    Behind,
    Cells,
    Chart,
    Material,
    Panel,
    behind_source,
    find_documents,
    find_tokens,
    legend,
    make_scale,
)
from .totals import BITS, Row, Totals, ratio, sum_by
from .wording import edge, number, percent

# A mean over fewer tokens than this is noise.
_MIN_POINT_TOKENS = 30
_MAX_BORDERS = 8
_POSITION_TITLE = "position in the document (tokens, log scale)"


def position_panel(material: Material) -> Panel:
    """Surprisal and entropy by position in the document."""
    totals = material.totals
    about = (
        "Bits per token by the token's place in its document. It falls while the model learns what "
        "it is reading and levels off; a saw-tooth is a trace of the recipe's windows. Entropy is "
        "the surprise that the model itself expected: a gap between the lines is a misjudgement."
    )
    by_bin = _enough(totals.by(POSITION, "bin"))
    borders = _borders(material.facts.get("recipe") or {}, max(by_bin, default=0))
    drawn = []
    if by_bin:
        drawn.append(_position_chart(by_bin, borders))
    if len(totals.labels) > 1 and by_bin:
        drawn.append(_position_by_source(totals))
    notes = [
        "A point stands for a quarter of an octave, by source for an octave. Far ones come from "
        "long documents only, so the curve's end speaks of those; points of fewer than "
        f"{_MIN_POINT_TOKENS} tokens are left out."
    ]
    if borders:
        notes.append("Upright lines: where the recipe's first windows begin to score.")
    return Panel("position", "Position in the document", about, drawn, notes if drawn else ())


def calibration_panel(material: Material) -> Panel:
    """Stated probability of the first choice against how often it was right."""
    totals = material.totals
    about = (
        "Whether the model's confidence can be believed: of the tokens where its first choice has "
        "a probability of 70 %, about 70 % should be that choice. Points below the diagonal are "
        "overconfidence; a point's area is its share of the tokens."
    )
    by_bin = totals.by(CALIBRATION, "bin")
    if not by_bin:
        return Panel("calibration", "Calibration", about)
    note = (
        f"Expected calibration error: {percent(_calibration_error(by_bin.values()))}, the mean "
        f"distance from the diagonal over tokens, in {CALIBRATION_BINS} bins of equal width."
    )
    drawn = [_reliability_chart(by_bin)]
    if len(totals.labels) > 1:
        drawn.append(_error_chart(material))
    return Panel("calibration", "Calibration", about, drawn, [note])


def rank_panel(material: Material) -> Panel:
    """Ranks of the tokens that came, and the spread of surprisal."""
    totals = material.totals
    about = (
        "Where the token that came stood in the model's list, 1 being its first choice, and how "
        "the surprise is spread over the tokens. Most tokens are easy; the bits come from few. "
        "Entropy is the surprise that the model expected of itself."
    )
    drawn = []
    if totals.rows(RANK):
        drawn.append(_rank_chart(totals))
    if totals.rows(TOKEN_NLL):
        drawn.append(_bits_chart(totals, TOKEN_NLL, "Surprisal", "logprob", "-"))
    if totals.rows(ENTROPY):
        drawn.append(_bits_chart(totals, ENTROPY, "Entropy", "entropy", ""))
    return Panel("rank", "Ranks and surprisal", about, drawn)


def _enough(by_bin: Mapping[int, Row]) -> dict[int, Row]:
    """The bins with enough tokens for a mean, or all if none has."""
    kept = {b: row for b, row in by_bin.items() if row["tokens"] >= _MIN_POINT_TOKENS}
    return dict(sorted((kept or by_bin).items()))


def _borders(recipe: Mapping[str, Any], last_bin: int) -> list[int]:
    """Where the windows of a long document begin to score, counted from 1; the first few."""
    if recipe.get("concatenate") or not recipe.get("context"):
        return []
    try:
        known = Recipe(**recipe)
    except (TypeError, ValueError):
        return []
    length = min(int(2.0 ** ((last_bin + 1) / BINS_PER_OCTAVE)), _MAX_BORDERS * recipe["context"])
    windows = known.windows(length + 1, has_prefix=True)
    return [window.first_target for window in windows[1 : _MAX_BORDERS + 1]]


def _position_chart(by_bin: Mapping[int, Row], borders: Sequence[int]) -> Chart:
    series = ("surprisal", "entropy")
    rows, numbers = [], []
    behind: dict[str, Behind] = {}
    for b, sums in by_bin.items():
        means = (sums["nll"] / sums["tokens"] * BITS, sums["value"] / sums["tokens"] * BITS)
        x, span = _positions(b)
        for name, mean in zip(series, means, strict=True):
            text = f"{span}: {name} {number(mean, 2)} bits/token, {sums['tokens']:,} tokens"
            rows.append({"x": x, "y": mean, "series": name, "label": text})
            behind[text] = (_reaching(b),)
        numbers.append((span, f"{sums['tokens']:,}", *(number(mean, 3) for mean in means)))
    svg = charts.draw_lines(
        rows, series, x_title=_POSITION_TITLE, y_title="bits per token", rules=borders
    )
    columns = ("tokens", "number", "surprisal, bits", "entropy, bits")
    return Chart("All sources", Markup(svg), Cells(columns, numbers), legend(series), behind)


def _reaching(b: int, *conditions: str) -> str:
    """The query for documents that are long enough to have a token in a bin of positions."""
    first = math.ceil(2.0 ** (b / BINS_PER_OCTAVE))
    return find_documents(f"num_tokens_scored >= {first}", *conditions, order="num_tokens_scored")


def _position_by_source(totals: Totals) -> Chart:
    rows, numbers = [], []
    behind: dict[str, Behind] = {}
    for label in totals.labels:
        of_label = (row for row in totals.rows(POSITION) if row["label"] == label)
        # Nine lines of single bins are a tangle.
        by_octave = sum_by(of_label, lambda row: row["bin"] // BINS_PER_OCTAVE)
        for octave, sums in _enough(by_octave).items():
            x, span = _positions(octave * BINS_PER_OCTAVE, BINS_PER_OCTAVE)
            mean = sums["nll"] / sums["tokens"] * BITS
            text = f"{span}, {label}: {number(mean, 2)} bits/token, {sums['tokens']:,} tokens"
            rows.append({"x": x, "y": mean, "series": label, "label": text})
            numbers.append((label, span, f"{sums['tokens']:,}", number(mean, 3)))
            if label in totals.sources:
                where = is_value("source", totals.sources[label])
                behind[text] = (_reaching(octave * BINS_PER_OCTAVE, where),)
    svg = charts.draw_lines(rows, totals.labels, x_title=_POSITION_TITLE, y_title="bits per token")
    columns = ("source", "tokens", "number", "surprisal, bits")
    cells = Cells(columns, numbers, 2)
    return Chart("Surprisal by source", Markup(svg), cells, legend(totals.labels), behind)


def _positions(b: int, num_bins: int = 1) -> tuple[float, str]:
    """The geometric middle of the positions of bins from `b`, counted from 1, and their name."""
    first = math.ceil(2.0 ** (b / BINS_PER_OCTAVE))
    last = math.ceil(2.0 ** ((b + num_bins) / BINS_PER_OCTAVE)) - 1
    span = f"token {first:,}" if first == last else f"tokens {first:,} to {last:,}"
    return math.sqrt(first * last), span


def _calibration_error(rows: Iterable[Row]) -> float | None:
    """ECE: sum over bins of |hits - sum of p| / tokens, between 0 and 1."""
    rows = list(rows)
    away = sum(abs(row["hits"] - row["value"]) for row in rows)
    return ratio(away, sum(row["tokens"] for row in rows))


def _reliability_chart(by_bin: Mapping[int, Row]) -> Chart:
    num_tokens = sum(row["tokens"] for row in by_bin.values())
    rows, numbers = [], []
    behind: dict[str, Behind] = {}
    for b, sums in sorted(by_bin.items()):
        stated, right = sums["value"] / sums["tokens"], sums["hits"] / sums["tokens"]
        share = sums["tokens"] / num_tokens
        text = (
            f"stated {percent(stated)}, right {percent(right)} of the time; "
            f"{percent(share)} of tokens"
        )
        rows.append({"x": stated, "y": right, "weight": share, "label": text})
        low, high = b / CALIBRATION_BINS, (b + 1) / CALIBRATION_BINS
        until = "" if b == CALIBRATION_BINS - 1 else f" AND exp(x) < {high:g}"
        behind[text] = (find_tokens("top1_logprob", f"exp(x) >= {low:g}{until}"),)
        numbers.append((percent(stated), percent(right), f"{sums['tokens']:,}"))
    svg = charts.draw_reliability(
        rows, x_title="probability of the first choice", y_title="share that was the first choice"
    )
    columns = ("stated", "observed", "tokens")
    return Chart("Stated and observed", Markup(svg), Cells(columns, numbers), behind=behind)


def _error_chart(material: Material) -> Chart:
    totals = material.totals
    behind: dict[str, Behind] = {}
    rows, numbers = [], []
    for n, label in enumerate(totals.labels):
        of_label = [row for row in totals.rows(CALIBRATION) if row["label"] == label]
        error = _calibration_error(of_label)
        if error is not None:
            text = f"{label}: {percent(error)}"
            row = {"name": label, "value": error, "color": charts.color(n), "label": text}
            rows.append(row)
            numbers.append((label, percent(error)))
            found = behind_source(material, label)
            if found:
                behind[text] = found
    title = f"expected calibration error ({CALIBRATION_BINS} bins)"
    svg = charts.draw_bars(rows, x_title=title, x_format="~%")
    cells = Cells(("source", "error"), numbers)
    return Chart("Calibration error by source", Markup(svg), cells, behind=behind)


def _rank_chart(totals: Totals) -> Chart:
    total, series = totals.total(RANK), ("share of tokens", "share of bits")
    rows, numbers = [], []
    behind: dict[str, Behind] = {}
    for b, sums in sorted(totals.by(RANK, "bin").items()):
        name = "1" if b == 0 else f"{1 << b}\u2013{(2 << b) - 1}"
        shares = (ratio(sums["tokens"], total["tokens"]), ratio(sums["nll"], total["nll"]))
        for part, share in zip(series, shares, strict=True):
            text = f"rank {name}: {percent(share)} {part.removeprefix('share ')}"
            rows.append({"name": name, "series": part, "value": share or 0.0, "label": text})
            behind[text] = (find_tokens("rank", f"x >= {1 << b} AND x < {2 << b}"),)
        numbers.append((name, *map(percent, shares), f"{sums['tokens']:,}"))
    svg = charts.draw_groups(rows, series, x_title="rank (log scale)", y_title="share")
    columns = ("rank", *series, "tokens")
    return Chart("Rank", Markup(svg), Cells(columns, numbers), legend(series), behind)


def _bits_chart(totals: Totals, panel: str, title: str, column: str, sign: str) -> Chart:
    """Tokens by a number of bits that each has, `sign` times its column in nats."""
    by_bin = totals.by(panel, "bin")
    num_tokens = sum(row["tokens"] for row in by_bin.values())
    scale = make_scale({b: row["tokens"] for b, row in by_bin.items()}, BIN_TOKEN_BITS)
    bars = sum_by(totals.rows(panel), lambda row: scale.bar(row["bin"]))
    rows, numbers = [], []
    behind: dict[str, Behind] = {}
    for bar, sums in sorted(bars.items()):
        start, stop = scale.start(bar * scale.factor), scale.stop(bar * scale.factor)
        share = sums["tokens"] / num_tokens
        beyond = bar == scale.bar(scale.last) and scale.last < max(by_bin)
        span = f"{edge(start)} bits and more" if beyond else f"{edge(start)} to {edge(stop)} bits"
        text = f"{span}: {percent(share)} of tokens"
        rows.append(
            {"start": start, "stop": stop, "series": "", "order": 0, "value": share, "label": text}
        )
        numbers.append((span, percent(share), f"{sums['tokens']:,}"))
        bits = f"{sign}x / ln(2)"
        until = "" if beyond else f" AND {bits} < {edge(stop)}"
        # The first bin begins with what rounding has left below 0.
        since = f"{bits} >= {edge(start)}" if start else "true"
        behind[text] = (find_tokens(column, since + until),)
    svg = charts.draw_histogram(
        rows,
        [""],
        x_title=f"{title.lower()} (bits per token)",
        y_title="share of tokens",
        y_format="%",
    )
    columns = (title.lower(), "share of tokens", "tokens")
    return Chart(title, Markup(svg), Cells(columns, numbers), behind=behind)
