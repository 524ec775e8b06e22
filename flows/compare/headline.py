"""What a terminal shows of a comparison."""

from __future__ import annotations

from ..report.wording import percent
from .comparison import Comparison
from .token_sections import perplexity_cells
from .tokens import Estimate
from .wording import estimate, kl_name, signed, small

_KL = ("99.9", "99", "50")
_MOST_GROUPS = 5


def headline(found: Comparison) -> list[tuple[str, str]]:
    """(name, value) of what tells most, by llama.cpp's names where it has them."""
    lines: list[tuple[str, str]] = []
    drift, unit = found.documents.all, found.documents.measure
    if drift is not None:
        lines.append(("Documents compared", f"{drift.documents:,}"))
        span = ""
        if drift.low is not None and drift.high is not None:
            span = f" [{signed(drift.low)}, {signed(drift.high)}]"
        lines.append((f"Median \u0394 {unit}, 95 % interval", f"{signed(drift.median)}{span}"))
        mean = Estimate(drift.mean, drift.error)
        lines.append((f"Mean \u0394 {unit}", estimate(mean, "+")))
        groups = found.documents.groups
        for group in groups[:_MOST_GROUPS] if len(groups) > 1 else ():
            name = ", ".join(filter(None, (group.source, group.language))) or "(no source)"
            lines.append((f"  median of {name}", signed(group.median)))
        if len(groups) > _MOST_GROUPS:
            lines.append((f"  {len(groups) - _MOST_GROUPS:,} more on the page", ""))
    elif found.shifts:
        shift = found.shifts[0]
        lines.append(("Documents", f"{shift.base_documents:,} and {shift.other_documents:,}"))
        medians = f"{shift.base_median:.2f} and {shift.other_median:.2f}"
        lines.append(("Median bits/byte", medians))
        lines.append(("Population stability index", f"{shift.psi:.4f}"))
        lines.append(("Wasserstein distance, bits/byte", f"{shift.wasserstein:.4f}"))
    if found.tokens is not None:
        lines += [(name, value) for name, value in perplexity_cells(found.tokens).rows]
    if found.distributions is not None:
        apart = found.distributions
        kl, name = apart.kl, kl_name(apart)
        lines.append((f"Mean {name}, nats", estimate(Estimate(kl.mean, kl.error))))
        lines.append((f"Maximum {name}", small(kl.largest)))
        names = {"50": "Median"}
        lines += [(f"{names.get(p, f'{p} %')} {name}", small(kl.percentiles[p])) for p in _KL]
        if found.tokens is None:
            lines.append(("Same top p", percent(apart.same_top.value)))
    return lines
