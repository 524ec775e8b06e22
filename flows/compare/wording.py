"""What numbers of a comparison are called, for people."""

from __future__ import annotations

import math
from collections.abc import Callable

from ..report.wording import MAX_LABEL, NOTHING, show
from .distributions import EXACT, Distributions
from .documents import MAX_NAMED, Few
from .tokens import Estimate


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


def estimate(found: Estimate, say: Callable[[float], str] = small) -> str:
    """A value and its error."""
    error = "" if math.isnan(found.error) else f" \u00b1 {small(found.error)}"
    return say(found.value) + error


def list_names(few: Few) -> str:
    names = ", ".join(show(name, MAX_LABEL) for name in few.named)
    return f"{names}, \u2026" if few.count > MAX_NAMED else names


def kl_name(found: Distributions) -> str:
    """What the KL is called: a bound where it is one."""
    return "KL" if found.tier == EXACT else "KL (lower bound)"
