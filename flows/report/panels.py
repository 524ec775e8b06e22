"""The panels of a report: what each shows in a sentence, its charts, and the numbers behind them.

A new panel is a function here that returns a `Panel`, and a line in `PANELS`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from ...engine.records import OK
from ..summary import (
    BIN_BITS_PER_BYTE,
    BIN_TOKEN_BITS,
    BINS_PER_OCTAVE,
    BITS_PER_BYTE,
    CALIBRATION,
    CALIBRATION_BINS,
    POSITION,
    RANK,
    STATUS,
    TOKEN_NLL,
)
from . import charts
from .totals import BITS, SUMS, Row, Totals, bits_per_byte, perplexity, ratio, sum_by
from .wording import edge, number, percent, plural, size

# Bars that half a page shows well, and the factors that make them of the summary's bins.
_MAX_BARS = 48
_FACTORS = (1, 2, 5, 10, 25, 50, 100, 250, 500, 1000)
# A mean over fewer tokens than this is noise.
_MIN_POINT_TOKENS = 30
_POSITION_TITLE = "position in the document (tokens, log scale)"


@dataclass(frozen=True)
class Cells:
    """A table: its columns, how many of them from the left are text, and rows of what to show."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    num_text: int = 1


@dataclass(frozen=True)
class Chart:
    """A drawing, its legend as (name, colour), and the numbers behind it."""

    title: str
    svg: Markup
    numbers: Cells
    legend: Sequence[tuple[str, str]] = ()


@dataclass(frozen=True)
class Panel:
    """A section of the page: a title, what it shows in a sentence, charts, notes, a table."""

    id: str
    title: str
    about: str
    charts: Sequence[Chart] = ()
    notes: Sequence[str] = ()
    table: Cells | None = None


def histogram_panel(totals: Totals) -> Panel:
    """Bits per byte of documents, by source."""
    about = (
        "How predictable the documents are: each is counted at its bits per byte, so low is text "
        "the model knows or text that repeats, high is text that is foreign to it, or noise."
    )
    notes: list[str] = []
    drawn: list[Chart] = []
    by_bin = totals.by(BITS_PER_BYTE, "bin")
    if by_bin:
        scale = _scale({b: row["documents"] for b, row in by_bin.items()}, BIN_BITS_PER_BYTE)
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
    return Panel("bits-per-byte", "Bits per byte", about, drawn, notes, _source_table(totals))


def position_panel(totals: Totals) -> Panel:
    """Surprisal and entropy by position in the document."""
    about = (
        "Bits per token by the token's place in its document. It falls while the model learns what "
        "it is reading and levels off; a saw-tooth is a trace of the recipe's windows. Entropy is "
        "the surprise that the model itself expected: a gap between the lines is a misjudgement."
    )
    by_bin = _enough(totals.by(POSITION, "bin"))
    drawn = []
    if by_bin:
        drawn.append(_position_chart(by_bin))
    if len(totals.labels) > 1 and by_bin:
        drawn.append(_position_by_source(totals))
    notes = [
        "A point stands for a quarter of an octave, by source for an octave. Far ones come from "
        "long documents only, so the curve's end speaks of those; points of fewer than "
        f"{_MIN_POINT_TOKENS} tokens are left out."
    ]
    return Panel("position", "Position in the document", about, drawn, notes if drawn else ())


def calibration_panel(totals: Totals) -> Panel:
    """Stated probability of the first choice against how often it was right."""
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
        drawn.append(_error_chart(totals))
    return Panel("calibration", "Calibration", about, drawn, [note])


def rank_panel(totals: Totals) -> Panel:
    """Ranks of the tokens that came, and the spread of surprisal."""
    about = (
        "Where the token that came stood in the model's list, 1 being its first choice, and how "
        "the surprise is spread over the tokens. Most tokens are easy; the bits come from few."
    )
    drawn = []
    if totals.rows(RANK):
        drawn.append(_rank_chart(totals))
    if totals.rows(TOKEN_NLL):
        drawn.append(_surprisal_chart(totals))
    return Panel("rank", "Rank and surprisal of tokens", about, drawn)


@dataclass(frozen=True)
class Scale:
    """Bars of a histogram: `factor` bins of the summary each, up to the one that holds `last`."""

    width: float
    factor: int
    last: int

    def bar(self, b: int) -> int:
        """The bar of a bin."""
        return min(b, self.last) // self.factor

    def start(self, b: int) -> float:
        """Where the bar of a bin begins."""
        return round(self.bar(b) * self.factor * self.width, 6)

    def stop(self, b: int) -> float:
        """Where the bar of a bin ends."""
        return round((self.bar(b) + 1) * self.factor * self.width, 6)


def _scale(weights: Mapping[int, int], width: float) -> Scale:
    """Bars that show all bins, or all but a long thin tail."""
    first, last = min(weights), max(weights)
    near = _quantile(weights, 0.995)
    if last - first > 1.5 * (near - first) + 5:
        last = near
    factor = next((f for f in _FACTORS if (last - first) / f < _MAX_BARS), _FACTORS[-1])
    return Scale(width, factor, last)


def _quantile(weights: Mapping[int, int], share: float) -> int:
    """The bin where the weights, added up, reach `share` of them all."""
    wanted, seen = share * sum(weights.values()), 0
    for b in sorted(weights):
        seen += weights[b]
        if seen >= wanted:
            return b
    return max(weights)


def _spread(by_bin: Mapping[int, Row]) -> list[str]:
    """Quantiles over documents, to a bin's width."""
    weights = {b: row["documents"] for b, row in by_bin.items()}
    if sum(weights.values()) < 20:
        return []
    low, middle, high = (
        number((_quantile(weights, q) + 0.5) * BIN_BITS_PER_BYTE, 2) for q in (0.05, 0.5, 0.95)
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
    return Chart(title, Markup(svg), Cells(columns, numbers), _legend(totals.labels))


def _source_table(totals: Totals) -> Cells | None:
    scored = totals.by(STATUS + OK, "label")
    measured = totals.by(BITS_PER_BYTE, "label")
    if not scored:
        return None
    nothing = dict.fromkeys(SUMS, 0)
    named = [
        (label, scored[label], measured.get(label, nothing))
        for label in totals.labels
        if label in scored
    ]
    if len(named) > 1:
        named.append(("All", totals.total(STATUS + OK), totals.total(BITS_PER_BYTE)))
    rows = [
        (
            label,
            f"{sums['documents']:,}",
            size(sums["bytes"]),
            f"{sums['tokens']:,}",
            number(bits_per_byte(with_bytes), 3),
            number(perplexity(sums), 2),
            percent(ratio(sums["hits"], sums["tokens"])),
        )
        for label, sums, with_bytes in named
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


def _enough(by_bin: Mapping[int, Row]) -> dict[int, Row]:
    """The bins with enough tokens for a mean, or all if none has."""
    kept = {b: row for b, row in by_bin.items() if row["tokens"] >= _MIN_POINT_TOKENS}
    return dict(sorted((kept or by_bin).items()))


def _position_chart(by_bin: Mapping[int, Row]) -> Chart:
    series = ("surprisal", "entropy")
    rows, numbers = [], []
    for b, sums in by_bin.items():
        means = (sums["nll"] / sums["tokens"] * BITS, sums["value"] / sums["tokens"] * BITS)
        x, span = _positions(b)
        for name, mean in zip(series, means, strict=True):
            text = f"{span}: {name} {number(mean, 2)} bits/token, {sums['tokens']:,} tokens"
            rows.append({"x": x, "y": mean, "series": name, "label": text})
        numbers.append((span, f"{sums['tokens']:,}", *(number(mean, 3) for mean in means)))
    svg = charts.draw_lines(rows, series, x_title=_POSITION_TITLE, y_title="bits per token")
    columns = ("tokens", "number", "surprisal, bits", "entropy, bits")
    return Chart("All sources", Markup(svg), Cells(columns, numbers), _legend(series))


def _position_by_source(totals: Totals) -> Chart:
    rows, numbers = [], []
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
    svg = charts.draw_lines(rows, totals.labels, x_title=_POSITION_TITLE, y_title="bits per token")
    columns = ("source", "tokens", "number", "surprisal, bits")
    return Chart(
        "Surprisal by source", Markup(svg), Cells(columns, numbers, 2), _legend(totals.labels)
    )


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
    for _, sums in sorted(by_bin.items()):
        stated, right = sums["value"] / sums["tokens"], sums["hits"] / sums["tokens"]
        share = sums["tokens"] / num_tokens
        text = (
            f"stated {percent(stated)}, right {percent(right)} of the time; "
            f"{percent(share)} of tokens"
        )
        rows.append({"x": stated, "y": right, "weight": share, "label": text})
        numbers.append((percent(stated), percent(right), f"{sums['tokens']:,}"))
    svg = charts.draw_reliability(
        rows, x_title="probability of the first choice", y_title="share that was the first choice"
    )
    columns = ("stated", "observed", "tokens")
    return Chart("Stated and observed", Markup(svg), Cells(columns, numbers))


def _error_chart(totals: Totals) -> Chart:
    rows, numbers = [], []
    for n, label in enumerate(totals.labels):
        of_label = [row for row in totals.rows(CALIBRATION) if row["label"] == label]
        error = _calibration_error(of_label)
        if error is not None:
            text = f"{label}: {percent(error)}"
            row = {"name": label, "value": error, "color": charts.color(n), "label": text}
            rows.append(row)
            numbers.append((label, percent(error)))
    title = f"expected calibration error ({CALIBRATION_BINS} bins)"
    svg = charts.draw_bars(rows, x_title=title, x_format="~%")
    return Chart("Calibration error by source", Markup(svg), Cells(("source", "error"), numbers))


def _rank_chart(totals: Totals) -> Chart:
    total, series = totals.total(RANK), ("share of tokens", "share of bits")
    rows, numbers = [], []
    for b, sums in sorted(totals.by(RANK, "bin").items()):
        name = "1" if b == 0 else f"{1 << b}\u2013{(2 << b) - 1}"
        shares = (ratio(sums["tokens"], total["tokens"]), ratio(sums["nll"], total["nll"]))
        for part, share in zip(series, shares, strict=True):
            text = f"rank {name}: {percent(share)} {part.removeprefix('share ')}"
            rows.append({"name": name, "series": part, "value": share or 0.0, "label": text})
        numbers.append((name, *map(percent, shares), f"{sums['tokens']:,}"))
    svg = charts.draw_groups(rows, series, x_title="rank (log scale)", y_title="share")
    columns = ("rank", *series, "tokens")
    return Chart("Rank", Markup(svg), Cells(columns, numbers), _legend(series))


def _surprisal_chart(totals: Totals) -> Chart:
    by_bin = totals.by(TOKEN_NLL, "bin")
    num_tokens = sum(row["tokens"] for row in by_bin.values())
    scale = _scale({b: row["tokens"] for b, row in by_bin.items()}, BIN_TOKEN_BITS)
    bars = sum_by(totals.rows(TOKEN_NLL), lambda row: scale.bar(row["bin"]))
    rows, numbers = [], []
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
    svg = charts.draw_histogram(
        rows, [""], x_title="surprisal (bits per token)", y_title="share of tokens", y_format="%"
    )
    columns = ("surprisal", "share of tokens", "tokens")
    return Chart("Surprisal", Markup(svg), Cells(columns, numbers))


def _legend(names: Sequence[str]) -> list[tuple[str, str]]:
    """Names with their colours; a single one needs no legend."""
    return [(name, charts.color(n)) for n, name in enumerate(names)] if len(names) > 1 else []


PANELS: tuple[Callable[[Totals], Panel], ...] = (
    histogram_panel,
    position_panel,
    calibration_panel,
    rank_panel,
)
"""In the order of the page."""
