"""Charts of a report: aggregated rows in, SVG text out.

Drawn once, on the server: a page of ten charts is a tenth of Vega's own JavaScript, needs none,
and passes a content security policy that lets no script but the page's own run. Colours are CSS
variables, so that one drawing serves light and dark. What a mark stands for is its `aria-label`,
which screen readers say and the page's script shows as a tooltip.

Knows nothing of summary tables or HTML.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import altair as alt

Row = Mapping[str, Any]

# Drawn for half of a laptop's page; a phone shows it at about this size.
_WIDTH, _HEIGHT = 430, 265

_CONFIG = {
    "font": "system-ui, sans-serif",
    "view": {"stroke": None},
    "axis": {
        "labelColor": "var(--muted)",
        "titleColor": "var(--ink)",
        "gridColor": "var(--line)",
        "domainColor": "var(--axis)",
        "tickColor": "var(--axis)",
        "labelFontSize": 13,
        "titleFontSize": 13,
        "titleFontWeight": "normal",
        "titlePadding": 8,
        "labelPadding": 4,
        "tickSize": 4,
    },
    "axisX": {"grid": False},
    "axisY": {"domain": False, "ticks": False},
}


def color(index: int) -> str:
    """The page's colour for the series of this index."""
    return f"var(--c{index})"


def draw_histogram(
    rows: Sequence[Row],
    series: Sequence[str],
    *,
    x_title: str,
    y_title: str,
    y_format: str = "~s",
    x_step: float = 0.0,
) -> str:
    """Stacked bars. Rows: `start, stop, series, order, value, label`, `order` from below.

    Ticks on x are `x_step` apart, or more.
    """
    import altair as alt

    # A little less than the bin: the page shows between the bars.
    gap = 0.08
    drawn = [{**r, "stop": r["stop"] - gap * (r["stop"] - r["start"])} for r in rows]
    chart = (
        alt.Chart(make_data(drawn))
        .mark_bar()
        .encode(
            x=alt.X("start:Q", bin="binned")
            .title(x_title)
            .axis(tickCount=7, tickMinStep=x_step, format=".6~g"),
            x2="stop:Q",
            y=alt.Y("value:Q").title(y_title).axis(tickCount=5, format=y_format).stack("zero"),
            color=_series(series),
            order=alt.Order("order:Q"),
            description="label:N",
        )
    )
    return render_svg(chart)


def draw_lines(
    rows: Sequence[Row],
    series: Sequence[str],
    *,
    x_title: str,
    y_title: str,
    rules: Sequence[float] = (),
) -> str:
    """Lines over a logarithmic x. Rows: `x`, `y`, `series`, `label`; `rules`: upright lines."""
    import altair as alt

    base = alt.Chart(make_data(rows)).encode(
        x=alt.X("x:Q")
        .scale(type="log", base=10, nice=False)
        .title(x_title)
        .axis(tickCount=6, format="~s"),
        y=alt.Y("y:Q").scale(zero=True).title(y_title).axis(tickCount=5),
        color=_series(series),
    )
    points = base.mark_point(filled=True, size=22, opacity=1).encode(description="label:N")
    drawn = base.mark_line(strokeWidth=1.8, aria=False) + points
    if rules:
        upright = alt.Chart(make_data([{"x": x} for x in rules]))
        drawn = (
            upright.mark_rule(strokeDash=[3, 3], aria=False).encode(
                x="x:Q", color=alt.ColorValue("var(--axis)")
            )
            + drawn
        )
    return render_svg(drawn)


def draw_reliability(rows: Sequence[Row], *, x_title: str, y_title: str) -> str:
    """Points on and off the diagonal, by area. Rows: `x`, `y`, `weight`, `label`."""
    import altair as alt

    unit = alt.Scale(domain=[0, 1])
    diagonal = (
        alt.Chart(make_data([{"x": 0, "y": 0}, {"x": 1, "y": 1}]))
        .mark_line(strokeDash=[4, 4], strokeWidth=1.2, aria=False)
        .encode(x="x:Q", y="y:Q", color=alt.ColorValue("var(--axis)"))
    )
    base = alt.Chart(make_data(rows)).encode(
        x=alt.X("x:Q", scale=unit).title(x_title).axis(tickCount=5, format="%", grid=True),
        y=alt.Y("y:Q", scale=unit).title(y_title).axis(tickCount=5, format="%"),
        color=alt.ColorValue(color(0)),
    )
    size = alt.Size("weight:Q", legend=None).scale(range=[12, 320], zero=True)
    points = base.mark_point(filled=True, opacity=0.85).encode(size=size, description="label:N")
    return render_svg(diagonal + base.mark_line(strokeWidth=1.5, aria=False) + points)


def draw_groups(rows: Sequence[Row], series: Sequence[str], *, x_title: str, y_title: str) -> str:
    """Bars side by side at every name on x. Rows: `name`, `series`, `value`, `label`."""
    import altair as alt

    names = list(dict.fromkeys(row["name"] for row in rows))
    chart = (
        alt.Chart(make_data(rows))
        .mark_bar()
        .encode(
            x=alt.X("name:N", sort=names).title(x_title).axis(labelAngle=-40, labelOverlap=False),
            xOffset=alt.XOffset("series:N", sort=list(series)),
            y=alt.Y("value:Q").title(y_title).axis(tickCount=5, format="%"),
            color=_series(series),
            description="label:N",
        )
    )
    return render_svg(chart)


def draw_bars(rows: Sequence[Row], *, x_title: str, x_format: str) -> str:
    """One bar a name, across. Rows: `name`, `value`, `color`, `label`."""
    import altair as alt

    names = [row["name"] for row in rows]
    chart = (
        alt.Chart(make_data(rows))
        .mark_bar(height={"band": 0.7})
        .encode(
            x=alt.X("value:Q")
            .title(x_title)
            .axis(tickCount=5, format=x_format, grid=True, labelFlush=False, labelOverlap=True),
            y=alt.Y("name:N", sort=names).title(None).axis(labelLimit=150),
            color=alt.Color("color:N", scale=None),
            description="label:N",
        )
    )
    # Names are measured in one font and shown in another, which may be a fifth wider.
    return render_svg(chart, left=30)


def make_data(rows: Sequence[Row]) -> alt.InlineData:
    import altair as alt

    # A sum that is not finite has no place in a drawing, nor in JSON.
    drawn = [dict(row) for row in rows if all(map(_is_finite, row.values()))]
    return alt.InlineData(values=drawn)


def _is_finite(value: Any) -> bool:
    return not isinstance(value, float) or math.isfinite(value)


def _series(names: Sequence[str]) -> alt.Color:
    import altair as alt

    colors = [color(i) for i in range(len(names))]
    return alt.Color("series:N", legend=None).scale(domain=list(names), range=colors)


def render_svg(chart: alt.Chart | alt.LayerChart, *, left: int = 2) -> str:
    import altair as alt
    import vl_convert

    fit = alt.AutoSizeParams(type="fit", contains="padding")
    padding = {"left": left, "top": 2, "right": 16, "bottom": 2}
    sized = chart.properties(
        width=_WIDTH, height=_HEIGHT, autosize=fit, padding=padding, background="transparent"
    )
    # Altair checks colours against a list that knows no CSS variables; Vega takes any.
    spec = {**sized.to_dict(), "config": _CONFIG}
    return vl_convert.vegalite_to_svg(spec, allowed_base_urls=[])
