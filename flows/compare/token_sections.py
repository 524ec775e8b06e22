"""The sections of a comparison's page that show tokens and distributions, by llama.cpp's names."""

from __future__ import annotations

from markupsafe import Markup

from ..report import charts
from ..report.panel import Cells, Chart, Panel
from ..report.wording import percent, plural
from .comparison import Comparison
from .distributions import EXACT, Distributions
from .sums import Spread
from .tokens import Estimate, Tokens
from .wording import (
    estimate,
    fit_names,
    kl_name,
    list_names,
    name_group,
    say_omitted,
    signed,
    small,
)

_MAX_DRAWN, _MAX_LISTED = 12, 60
_TAILS = ("0.1", "1", "5", "10", "25")


def tokens_section(comparison: Comparison) -> Panel | None:
    """Probabilities of the true tokens."""
    found = comparison.tokens
    if found is None:
        return None
    about = (
        "What both make of the token that came: \u0394p is its probability in B less that in A. "
        "Tails of one length are noise; a longer lower tail is damage. Errors are as if tokens "
        "were independent (llama.cpp's), unless they say otherwise."
    )
    rows, numbers = [], []
    series = ("less likely to B", "likelier to B")
    for tail in _TAILS:
        upper = f"{100 - float(tail):g}"
        for name, value in zip(
            series,
            (-found.delta_p.percentiles[tail], found.delta_p.percentiles[upper]),
            strict=True,
        ):
            text = f"{tail} % of tokens are {name} by at least {percent(max(0.0, value))}"
            rows.append(
                {"name": f"{tail} %", "series": name, "value": max(0.0, value), "label": text}
            )
        numbers.append(
            (
                f"{tail} %",
                *(signed(100 * found.delta_p.percentiles[p], 4) + " %" for p in (tail, upper)),
            )
        )
    svg = charts.draw_groups(
        rows, series, x_title="share of tokens in the tail", y_title="|\u0394p| at least"
    )
    legend = [(name, charts.color(n)) for n, name in enumerate(series)]
    chart = Chart("Both tails of \u0394p", Markup(svg), Cells(("tail", *series), numbers), legend)
    notes = [
        f"{plural(found.tokens, 'token')} of {plural(found.documents, 'document')}. "
        "The excess loss of Rho-1, \u2212log p by B less that by A, is the negative of \u0394 log "
        "p; its mean is ln of the ratio of perplexities."
    ]
    if found.unlike.count:
        notes.append(
            f"{plural(found.unlike.count, 'document')} of other token ids left out: "
            f"{list_names(found.unlike)}."
        )
    if not found.delta_p.is_exact:
        notes.append("Of so many tokens, percentiles are those of a sketch, within 1 %.")
    tables = [
        ("Perplexity and agreement", perplexity_cells(found)),
        ("Percentiles", _delta_cells(found)),
    ]
    if len(found.groups) > 1:
        tables.append(("By source", _token_groups(found)))
        notes += say_omitted(len(found.groups), len(found.groups), _MAX_LISTED)
    return Panel("deltas", "True tokens", about, [chart], notes, tables)


def perplexity_cells(found: Tokens) -> Cells:
    """llama.cpp's statistics of perplexity and of the true token."""

    def share(value: float) -> str:
        return f"{100 * value:.4f} %"

    def shares(e: Estimate) -> str:
        return f"{share(e.value)} \u00b1 {share(e.error)}"

    rows = [
        ("Mean PPL(B)", estimate(found.other_perplexity)),
        ("Mean PPL(A), the base", estimate(found.base_perplexity)),
        ("Cor(ln PPL(B), ln PPL(A))", share(found.correlation)),
        ("Mean ln(PPL(B)/PPL(A))", estimate(found.ln_ratio)),
        ("Error of that mean, by document", f"\u00b1 {small(found.ln_ratio_error_by_document)}"),
        ("Mean PPL(B)/PPL(A)", estimate(found.ratio)),
        ("Mean PPL(B)-PPL(A)", estimate(found.difference)),
        ("Mean \u0394p", shares(Estimate(found.delta_p.mean, found.delta_p.error))),
        ("RMS \u0394p", shares(found.rms_delta_p)),
        ("Same top p", shares(found.same_top)),
    ]
    return Cells(("statistic", "value"), rows)


def percentile_rows(spread: Spread) -> list[tuple[str, float]]:
    """(name, value) from the largest to the least, as llama.cpp lists them."""
    names = {"50": "Median"}
    inner = [(names.get(p, f"{p} %"), v) for p, v in spread.percentiles.items()]
    return [("Maximum", spread.largest), *inner, ("Minimum", spread.least)]


def _delta_cells(found: Tokens) -> Cells:
    both = zip(percentile_rows(found.delta_p), percentile_rows(found.delta_logprob), strict=True)
    rows = [(name, f"{signed(100 * p)} %", signed(lp)) for (name, p), (_, lp) in both]
    return Cells(("percentile", "\u0394p", "\u0394 log p, nats"), rows)


def _token_groups(found: Tokens) -> Cells:
    rows = [
        (
            name_group(g.source, g.language),
            f"{g.tokens:,}",
            estimate(g.ln_ratio, "+"),
            percent(g.same_top.value),
            f"{signed(100 * g.mean_delta_p.value)} %",
            f"{100 * g.rms_delta_p.value:.4f} %",
        )
        for g in found.groups[:_MAX_LISTED]
    ]
    columns = ("source", "tokens", "mean ln ratio", "same top", "mean \u0394p", "RMS \u0394p")
    return Cells(columns, rows)


def distributions_section(comparison: Comparison) -> Panel | None:
    """KL and its like."""
    found = comparison.distributions
    if found is None:
        return None
    if found.tier == EXACT:
        about = (
            "How far the distributions over the vocabulary are apart at every token: KL(A \u2016 "
            "B), the nats that are lost by who expects B where A is true, and the Jensen-Shannon "
            "divergence, at most ln 2 = 0.693. Computed in float64 from the stored "
            "log-probabilities."
        )
    else:
        about = (
            "Lower bounds of how far the distributions over the vocabulary are apart at every "
            "token, from the likeliest tokens that both runs kept and, as one outcome, the mass of "
            "all others: KL(A \u2016 B) and the Jensen-Shannon divergence, nats."
        )
    groups = found.groups if len(found.groups) > 1 else []
    drawn = []
    if groups:
        largest = groups[:_MAX_DRAWN]
        names = [name_group(g.source, g.language) for g in largest]
        rows = [
            {
                "name": short,
                "value": g.kl.mean,
                "color": charts.color(0),
                "label": f"{name}: {small(g.kl.mean)} nats, {plural(g.tokens, 'token')}",
            }
            for short, name, g in zip(fit_names(names), names, largest, strict=True)
        ]
        svg = charts.draw_bars(rows, x_title=f"mean {kl_name(found)}, nats", x_format="~g")
        drawn.append(Chart("Mean KL by source", Markup(svg), _kl_groups(found)))
    tables = [("KL divergence", kl_cells(found))]
    if groups:
        tables.append(("By source", _kl_groups(found)))
    notes = [f"{plural(found.tokens, 'token')}; the same top: {_same_top(found)}."]
    notes += say_omitted(len(groups), _MAX_DRAWN, _MAX_LISTED)
    if not found.kl.is_exact:
        notes.append("Of so many tokens, percentiles are those of a sketch, within 1 %.")
    return Panel("kl", "Distributions", about, drawn, notes, tables)


def _same_top(found: Distributions) -> str:
    return f"{100 * found.same_top.value:.4f} % \u00b1 {100 * found.same_top.error:.4f} %"


def kl_cells(found: Distributions) -> Cells:
    """llama.cpp's statistics of the KL divergence, and the same of Jensen-Shannon's."""
    both = zip(percentile_rows(found.kl), percentile_rows(found.js), strict=True)
    rows = [
        ("Mean", *(estimate(Estimate(s.mean, s.error)) for s in (found.kl, found.js))),
        *((name, small(kl), small(js)) for (name, kl), (_, js) in both),
    ]
    return Cells(("statistic", f"{kl_name(found)}, nats", "Jensen-Shannon, nats"), rows)


def _kl_groups(found: Distributions) -> Cells:
    rows = [
        (
            name_group(g.source, g.language),
            f"{g.tokens:,}",
            small(g.kl.mean),
            small(g.kl.percentiles["50"]),
            small(g.kl.percentiles["99.9"]),
            small(g.kl.largest),
            percent(g.same_top.value),
        )
        for g in found.groups[:_MAX_LISTED]
    ]
    columns = ("source", "tokens", "mean KL", "median", "99.9 %", "maximum", "same top")
    return Cells(columns, rows)
