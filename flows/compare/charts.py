"""Charts of a comparison, in the manner of a report's: rows in, SVG text out."""

from __future__ import annotations

from collections.abc import Sequence

from ..report import charts
from ..report.charts import Row


def draw_intervals(rows: Sequence[Row], *, x_title: str) -> str:
    """A dot and its interval a name, across, beside a line at 0.

    Rows: `name`, `value`, `low`, `high`, `label`; without interval the ends are the value.
    """
    import altair as alt

    names = [row["name"] for row in rows]
    y = alt.Y("name:N", sort=names).title(None).axis(labelLimit=150, grid=True)
    base = alt.Chart(charts.make_data(rows)).encode(y=y, color=alt.ColorValue(charts.color(0)))
    x = (
        alt.X("low:Q")
        .title(x_title)
        .axis(tickCount=4, grid=True, labelOverlap=True, format=".3~g")
        .scale(zero=True)
    )
    lines = base.mark_rule(strokeWidth=2.5, aria=False, opacity=0.55).encode(x=x, x2="high:Q")
    dots = base.mark_point(filled=True, size=70, opacity=1).encode(
        x=alt.X("value:Q"), description="label:N"
    )
    zero = (
        alt.Chart(charts.make_data([{"at": 0}]))
        .mark_rule(strokeDash=[4, 4], strokeWidth=1.2, aria=False)
        .encode(x="at:Q", color=alt.ColorValue("var(--axis)"))
    )
    return charts.render_svg(zero + lines + dots, left=30)


def draw_cells(
    cells: Sequence[Row],
    points: Sequence[Row],
    line: tuple[float, float] | None,
    *,
    x_title: str,
    y_title: str,
    ends: tuple[float, float],
) -> str:
    """A picture of how often pairs of values come, with single points, a line and the diagonal.

    Line: slope and intercept. Cells: `x`, `x2`, `y`, `y2`, `share` (0 to 1, the strength), `label`.
    Points: `x`, `y`, `label`.
    """
    import altair as alt

    # Circles on the ends are whole.
    margin = 0.03 * (ends[1] - ends[0])
    scale = alt.Scale(domain=[ends[0] - margin, ends[1] + margin], nice=False)
    x = alt.X("x:Q", scale=scale).title(x_title).axis(tickCount=6)
    y = alt.Y("y:Q", scale=scale).title(y_title).axis(tickCount=6)
    picture = (
        alt.Chart(charts.make_data(cells))
        .mark_rect(clip=True)
        .encode(
            x=x,
            x2="x2:Q",
            y=y,
            y2="y2:Q",
            color=alt.ColorValue(charts.color(0)),
            opacity=alt.Opacity("share:Q", legend=None).scale(domain=[0, 1], range=[0.16, 1]),
            description="label:N",
        )
    )
    diagonal = (
        alt.Chart(charts.make_data([{"x": end, "y": end} for end in ends]))
        .mark_line(strokeDash=[4, 4], strokeWidth=1.2, aria=False)
        .encode(x="x:Q", y="y:Q", color=alt.ColorValue("var(--muted)"))
    )
    dots = (
        alt.Chart(charts.make_data(points))
        .mark_point(filled=False, size=60, strokeWidth=2, opacity=1, clip=True)
        .encode(x="x:Q", y="y:Q", color=alt.ColorValue(charts.color(6)), description="label:N")
    )
    layers = picture + diagonal
    if line is not None:
        slope, intercept = line
        fitted = [{"x": end, "y": intercept + slope * end} for end in ends]
        layers += (
            alt.Chart(charts.make_data(fitted))
            .mark_line(strokeWidth=1.2, aria=False, clip=True)
            .encode(x="x:Q", y="y:Q", color=alt.ColorValue("var(--muted)"))
        )
    return charts.render_svg(layers + dots)
