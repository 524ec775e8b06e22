"""Panels of tokens: calibration, ranks, and how surprisal is spread."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from markupsafe import Markup

from ..summary import (
    BIN_TOKEN_BITS,
    CALIBRATION,
    CALIBRATION_BINS,
    ENTROPY,
    RANK,
    TOKEN_NLL,
)
from . import charts
from .panel import (
    Behind,
    Cells,
    Chart,
    Material,
    Panel,
    behind_source,
    find_tokens,
    legend,
    make_scale,
)
from .totals import Row, Totals, ratio, sum_by
from .wording import edge, percent


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
    by_bin = totals.by(RANK, "bin")
    for b in range(min(by_bin), max(by_bin) + 1):
        # A bar that is missing would bring its neighbours together.
        sums = by_bin.get(b, {"tokens": 0, "nll": 0.0})
        name = "1" if b == 0 else f"{1 << b}\u2013{(2 << b) - 1}"
        shares = (ratio(sums["tokens"], total["tokens"]), ratio(sums["nll"], total["nll"]))
        for part, share in zip(series, shares, strict=True):
            text = f"rank {name}: {percent(share)} {part.removeprefix('share ')}"
            rows.append({"name": name, "series": part, "value": share or 0.0, "label": text})
            if b in by_bin:
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
