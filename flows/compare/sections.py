"""The sections of a comparison's page that show documents: how they moved, and where."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from markupsafe import Markup

from ..report.panel import Cells, Chart, Panel, quantile
from ..report.wording import NOTHING, edge, number, plural, show
from .charts import draw_cells, draw_intervals
from .comparison import Comparison, why_no_pairs
from .documents import BIN, Document, Documents, Drift, Few
from .shift import MIN_DOCUMENTS, is_crowd
from .tokens import Estimate
from .wording import estimate, fit_names, list_names, name_group, say_omitted, signed, small

_MAX_DRAWN, _MAX_LISTED = 12, 60
_MAX_CELLS = 32
_FACTORS = (1, 2, 5, 10, 25, 50)


def documents_section(comparison: Comparison) -> Panel | None:
    """Drift by source."""
    found = comparison.documents
    if found.all is None:
        return None
    # A single source is all there is.
    groups = found.groups if len(found.groups) > 1 else []
    drawn = [found.all, *groups[:_MAX_DRAWN]]
    about = (
        f"Each document that both runs scored, paired by its id: its {found.measure} by B less "
        "that by A. The dot is the median document, the line where the true median lies with a "
        "confidence of 95 %, told from order statistics and so for any distribution."
    )
    title = f"median change of {found.measure}, B less A"
    names = fit_names([_name(drift, found) for drift in drawn])
    rows = [_interval_row(drift, found, name) for drift, name in zip(drawn, names, strict=True)]
    svg = draw_intervals(rows, x_title=title)
    chart = Chart("Change of the median document", Markup(svg), _drift_cells(drawn, found))
    table = _drift_cells([found.all, *groups[:_MAX_LISTED]], found)
    notes = say_omitted(len(groups), _MAX_DRAWN, _MAX_LISTED)
    notes.append(
        "The mean's error is sd / \u221an over documents. "
        "\u0394 nats/token is the mean over documents too; \u201call text\u201d is bits over "
        f"{'bytes' if 'byte' in found.measure else 'tokens'} of all documents together."
    )
    if not found.is_exact:
        notes.append("Of so many documents, quantiles are those of a sketch, within 1 %.")
    tables = [("By source", table)]
    pairing = _pairing(found)
    if len(pairing.rows) > 1:
        tables.append(("What was paired", pairing))
    return Panel("documents", "Documents", about, [chart], notes, tables)


def _name(drift: Drift, found: Documents) -> str:
    return "All documents" if drift is found.all else name_group(drift.source, drift.language)


def _interval_row(drift: Drift, found: Documents, name: str) -> dict[str, object]:
    ends = [drift.median if end is None else end for end in (drift.low, drift.high)]
    whole = _name(drift, found)
    text = (
        f"{whole}: {signed(drift.median)} {_interval(drift)}, {plural(drift.documents, 'document')}"
    )
    return {"name": name, "value": drift.median, "low": ends[0], "high": ends[1], "label": text}


def _interval(drift: Drift) -> str:
    if drift.low is None or drift.high is None:
        return "(too few documents for an interval)"
    return f"[{signed(drift.low)}, {signed(drift.high)}]"


def _drift_cells(drifts: Sequence[Drift], found: Documents) -> Cells:
    rows = [
        (
            _name(drift, found),
            f"{drift.documents:,}",
            signed(drift.median),
            _interval(drift) if drift.low is not None else NOTHING,
            estimate(Estimate(drift.mean, drift.error), "+"),
            estimate(Estimate(drift.delta_nll, drift.delta_nll_error), "+"),
            f"{number(drift.base, 4)} \u2192 {number(drift.other, 4)}",
        )
        for drift in drifts
    ]
    unit = found.measure
    columns = (
        *("source", "documents", f"median \u0394 {unit}", "95 % interval", f"mean \u0394 {unit}"),
        *("mean \u0394 nats/token", f"{unit} of all text"),
    )
    return Cells(columns, rows)


def _pairing(found: Documents) -> Cells:
    assert found.all is not None
    rows = [("scored in both, and compared", f"{found.all.documents:,}", "")]
    for what, few in _left_out(found):
        if few.count:
            rows.append((what, f"{few.count:,}", list_names(few)))
    if found.unscored:
        rows.append(("scored in neither", f"{found.unscored:,}", ""))
    columns = ("documents", "which", "number")
    return Cells(columns, [(what, names, count) for what, count, names in rows], 2)


def _left_out(found: Documents) -> list[tuple[str, Few]]:
    return [
        ("in A alone", found.only_base),
        ("in B alone", found.only_other),
        ("of another text in B", found.changed),
        *(
            (f"{show(ours)} in A, {show(theirs)} in B", few)
            for (ours, theirs), few in found.moved.items()
        ),
    ]


def scatter_section(comparison: Comparison) -> Panel | None:
    """Model against model."""
    found = comparison.documents
    if found.all is None:
        return None
    unit = found.measure
    about = (
        f"Documents by their {unit} in A and in B: the stronger the colour, the more documents "
        "(log scale). On the dashed diagonal both agree; the solid line is the straight one that "
        "fits all documents best, and the circles are those farthest from it, which B treats "
        "unlike others of the kind."
    )
    cells, numbers, ends = _grid(found)
    points = [
        {
            "x": d.base,
            "y": d.other,
            "label": f"{show(d.doc_id)}: A {number(d.base, 3)}, B {number(d.other, 3)} {unit}",
        }
        for d in found.residual
    ]
    line = None if math.isnan(found.slope) else (found.slope, found.intercept)
    titles = {"x_title": f"A, {unit}", "y_title": f"B, {unit}"}
    svg = draw_cells(cells, points, line, ends=ends, **titles)
    chart = Chart("B over A", Markup(svg), numbers)
    notes = []
    if line is not None:
        said = f"B = {small(found.slope)} A {found.intercept:+.4f}"
        notes.append(f"The line: {said}; correlation {found.correlation:.5f}.")
    tables = [
        (title, _document_cells(rows, found))
        for title, rows in (
            ("More surprising to B", found.worse),
            ("Less surprising to B", found.better),
            ("Farthest from the line", found.residual),
        )
        if rows
    ]
    near = slice(0, _last_bin(found.counts) + 1)
    beyond = found.all.documents - int(found.counts[near, near].sum())
    if beyond:
        notes.append(f"{plural(beyond, 'document')} beyond the picture's end are not in it.")
    if tables:
        notes.append(
            "Documents below 64 bytes are neither circled nor in these tables unless there are no "
            "others."
        )
    return Panel("scatter", "Model against model", about, [chart], notes, tables)


def _grid(found: Documents) -> tuple[list[dict[str, object]], Cells, tuple[float, float]]:
    """Cells of the picture, the fullest of them as numbers, and where axes begin and end."""
    xs, ys = np.nonzero(found.counts)
    lowest, highest = int(min(xs.min(), ys.min())), _last_bin(found.counts)
    is_near = (xs <= highest) & (ys <= highest)
    xs, ys = xs[is_near], ys[is_near]
    factor = next((f for f in _FACTORS if highest // f - lowest // f < _MAX_CELLS), _FACTORS[-1])
    sums: dict[tuple[int, int], int] = {}
    for x, y, count in zip(
        (xs // factor).tolist(), (ys // factor).tolist(), found.counts[xs, ys].tolist(), strict=True
    ):
        sums[x, y] = sums.get((x, y), 0) + count
    step = factor * BIN
    most = max(sums.values())
    cells, numbers = [], []
    for (x, y), count in sorted(sums.items(), key=lambda item: (-item[1], item[0])):
        spans = [f"{edge(round(i * step, 6))} to {edge(round((i + 1) * step, 6))}" for i in (x, y)]
        share = math.log(count) / math.log(most) if most > 1 else 1.0
        text = f"A {spans[0]}, B {spans[1]}: {plural(count, 'document')}"
        place = {"x": x * step, "x2": (x + 1) * step, "y": y * step, "y2": (y + 1) * step}
        cells.append({**place, "share": share, "label": text})
        numbers.append((spans[0], spans[1], f"{count:,}"))
    ends = (lowest // factor * step, (highest // factor + 1) * step)
    columns = (f"A, {found.measure}", f"B, {found.measure}", "documents")
    return cells, Cells(columns, numbers[:_MAX_LISTED], 2), ends


def _last_bin(counts: np.ndarray) -> int:
    """The last bin of either run that is drawn: all, or all but a long thin tail."""
    lasts = []
    for axis in (0, 1):
        weights = counts.sum(axis)
        filled = np.flatnonzero(weights)
        first, last = int(filled[0]), int(filled[-1])
        near = quantile(dict(zip(filled.tolist(), weights[filled].tolist(), strict=True)), 0.995)
        lasts.append(near if last - first > 1.5 * (near - first) + 5 else last)
    return max(lasts)


def _document_cells(documents: Sequence[Document], found: Documents) -> Cells:
    rows = [
        (
            show(d.doc_id),
            name_group(d.source, d.language),
            signed(d.delta),
            number(d.base, 4),
            number(d.other, 4),
            signed(d.residual),
            f"{d.num_tokens:,}",
        )
        for d in documents
    ]
    unit = found.measure
    columns = ("document", "source", "\u0394", f"A, {unit}", f"B, {unit}", "off the line", "tokens")
    return Cells(columns, rows, 2)


def shift_section(comparison: Comparison) -> Panel | None:
    """How the corpora's distributions moved, whatever is paired."""
    if not comparison.shifts:
        return None
    about = (
        "The runs' documents as two crowds, paired or not, from the runs' summaries: where two "
        "nights hold other documents this is what there is to compare. The population stability "
        "index is taken over the tenths of A (up to 0.1 is taken for no change, from 0.25 for a "
        "large one); Wasserstein's distance says by how much a document would have to move on "
        "average."
    )
    if comparison.documents.all is None:
        about = f"Nothing is paired: {why_no_pairs(comparison.documents)}. {about}"
    rows = [
        (
            "All documents" if n == 0 else name_group(s.source, s.language),
            f"{s.base_documents:,}",
            f"{s.other_documents:,}",
            number(s.base_median, 2),
            number(s.other_median, 2),
            number(s.psi if is_crowd(s.base_documents, s.other_documents) else None, 4),
            number(s.psi_by_chance if is_crowd(s.base_documents, s.other_documents) else None, 4),
            number(s.wasserstein, 4),
        )
        for n, s in enumerate(comparison.shifts[: _MAX_LISTED + 1])
    ]
    columns = (
        *("source", "documents, A", "documents, B", "median bits/byte, A", "median bits/byte, B"),
        *("PSI", "by chance", "Wasserstein, bits/byte"),
    )
    notes = [
        "From bins of 0.02 bits/byte, weighted by documents; sources of fewer than "
        f"{MIN_DOCUMENTS} documents in either run are left out, and so few have no index. An empty "
        "tenth counts half "
        "a document. \u201cBy chance\u201d is the index that two draws from one population "
        "have on average."
    ]
    tables = [("Bits per byte", Cells(columns, rows))]
    return Panel("shift", "Distribution of documents", about, (), notes, tables)
