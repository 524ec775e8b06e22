"""What numbers of a comparison are called, for people."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from ..report.wording import MAX_LABEL, NOTHING, show
from .distributions import EXACT, Distributions
from .documents import MAX_NAMED, Few
from .tokens import Estimate

_MAX_AXIS = 21


def signed(value: float | None, digits: int = 4) -> str:
    """A difference: its sign, and so many decimals; without a sign if these are all 0."""
    if value is None or math.isnan(value):
        return NOTHING
    said = f"{value:+z,.{digits}f}"
    return "0" if not value else said if round(value, digits) else said[1:]


def small(value: float) -> str:
    """A number of any size in four digits."""
    return NOTHING if math.isnan(value) else f"{value:.4g}"


def name_group(source: str, language: str) -> str:
    """A source and its language as the page names them."""
    parts = [show(part, MAX_LABEL) for part in (source, language) if part]
    return ", ".join(parts) or "(no source)"


def fit_names(names: Sequence[str]) -> list[str]:
    """Names as an axis has room for, their middles left out; each of its own still."""
    seen: Counter[str] = Counter()
    fitting = []
    for name in names:
        short = show(name, _MAX_AXIS)
        seen[short] += 1
        fitting.append(short if seen[short] == 1 else f"{short} ({seen[short]})")
    return fitting


def estimate(found: Estimate, sign: str = "") -> str:
    """A value and its error, which has two digits, and the value as many decimals.

    `sign` is "+" for a difference.
    """
    if not math.isfinite(found.value) or not 0 < found.error < math.inf:
        return signed(found.value) if sign else small(found.value)
    if found.error < 1e-7:
        return f"{found.value:{sign}.3g} \u00b1 {found.error:.2g}"
    decimals = max(0, 1 - math.floor(math.log10(found.error)))
    value = signed(found.value, decimals) if sign else f"{found.value:z,.{decimals}f}"
    return f"{value} \u00b1 {found.error:,.{decimals}f}"


def say_omitted(count: int, drawn: int, listed: int) -> list[str]:
    """That sources are too many to be drawn, or listed; nothing if they are not."""
    said = []
    if count > drawn:
        said.append(f"Of {count:,} sources the {drawn} largest are drawn.")
    if count > listed:
        said.append(f"Of {count:,} sources the {listed} largest are listed.")
    return said


def list_names(few: Few) -> str:
    names = ", ".join(show(name, MAX_LABEL) for name in few.named)
    return f"{names}, \u2026" if few.count > MAX_NAMED else names


def kl_name(found: Distributions) -> str:
    """What the KL is called: a bound where it is one."""
    return "KL" if found.tier == EXACT else "KL (lower bound)"
