"""Values as text for people, for the report: numbers with units, and text from anywhere."""

from __future__ import annotations

import math

NOTHING = "\u2013"
"""What stands for a number that there is none of."""
MAX_LABEL, MAX_TEXT, MAX_PIECE = 48, 300, 24
"""Characters of a name in a chart or table, of any other text, and of a token."""
_SIGNS = {ord(" "): "\u2423", ord("\n"): "\u21b5", ord("\t"): "\u21e5"}


def show(text: str, limit: int = MAX_TEXT) -> str:
    """`text` as it can safely be looked at: invisible characters visible, its middle left out."""
    if len(text) > limit:
        text = text[: limit * 2 // 3] + "\u2026" + text[len(text) - limit // 3 :]
    return text.translate(_VISIBLE)


def show_piece(text: str, limit: int = MAX_PIECE) -> str:
    """A token's text in one line: its spaces, line breaks and tabs can be seen."""
    return show(text.translate(_SIGNS), limit)


def show_lines(text: str) -> str:
    """`text` as it stands, with a mark before every line break and for every tab."""
    return text.translate(_IN_TEXT)


def _visible() -> dict[int, str]:
    pictures = {code: chr(0x2400 + code) for code in range(32)} | {127: "\u2421"}
    # What turns the direction of writing would make a page read other than it is.
    turns = [0x061C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A)]
    # Not characters that HTML has.
    barred = [*range(0x80, 0xA0), *range(0xD800, 0xE000), 0xFFFE, 0xFFFF]
    return pictures | {code: f"[U+{code:04X}]" for code in (*turns, *barred)}


_VISIBLE = _visible()
_IN_TEXT = _VISIBLE | {ord("\n"): "\u21b5\n", ord("\t"): "\u21e5\t"}


def number(value: float | None, digits: int) -> str:
    """With `digits` decimals; large numbers in powers of ten; a dash for what is not a number."""
    if value is None or math.isnan(value):
        return NOTHING
    if math.isinf(value):
        return "\u221e"
    return f"{value:,.{digits}f}" if abs(value) < 1e9 else f"{value:.2e}"


def edge(value: float) -> str:
    """A bin's edge, as short as it can be written."""
    return f"{value:g}"


def percent(share: float | None) -> str:
    """A share of 1, to a tenth of a percent."""
    return NOTHING if share is None or not math.isfinite(share) else f"{100.0 * share:.1f} %"


def plural(number: int, noun: str) -> str:
    """`1 token`, `2 tokens`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def size(num_bytes: int) -> str:
    """Bytes in decimal units."""
    number, units = float(num_bytes), ["B", "kB", "MB", "GB", "TB", "PB"]
    while number >= 999.5 and len(units) > 1:
        number, units = number / 1000.0, units[1:]
    return f"{number:.3g} {units[0]}"


def duration(seconds: float) -> str:
    """Seconds, minutes or hours."""
    if seconds < 120:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"
