"""The day that a document belongs to, as ISO 8601 writes it: from a value of its row, or a path.

Never from a clock or a file's time: the same corpus has the same days wherever and whenever it is
read.
"""

from __future__ import annotations

import datetime
import re
from typing import Any

_DATE = r"(\d{4})-(\d{2})-(\d{2})(?!\d)"
_BEGINNING = re.compile(r"\s*(\d{4})([-/]?)(\d{2})\2(\d{2})(?!\d)")
_IN_PATH = (
    # dt=2026-11-23
    re.compile(rf"(?<![^/])(?:dt|ds|date|day)={_DATE}", re.IGNORECASE),
    # year=2026/month=11/day=23
    re.compile(r"(?<![^/])year=(\d{4})/month=(\d{1,2})/day=(\d{1,2})(?![^/])", re.IGNORECASE),
    # 2026/11/23/
    re.compile(r"(?<![^/])(\d{4})/(\d{2})/(\d{2})(?=/)"),
    re.compile(rf"(?<!\d){_DATE}"),
)


def day_of_value(value: Any) -> str:
    """The day of a date, of a timestamp (in UTC, if it has a time zone), or that a text begins
    with as in 2026-11-23, 2026/11/23 or 20261123; nothing for what is none of these or no day of
    the calendar."""
    if isinstance(value, datetime.datetime):
        return _day_of_time(value)
    if isinstance(value, datetime.date):
        return value.isoformat()
    if isinstance(value, bytes):
        value = value[:64].decode("utf-8", "replace")
    found = _BEGINNING.match(value) if isinstance(value, str) else None
    return _day(found[1], found[3], found[4]) if found else ""


def day_of_path(path: str) -> str:
    """The day that a path names, nothing for none: `dt=2026-11-23` (also `ds`, `date`, `day`),
    else `year=2026/month=11/day=23`, else `2026/11/23/`, else a bare `2026-11-23`; of several of
    one kind the last."""
    for kind in _IN_PATH:
        days = [day for found in kind.finditer(path) if (day := _day(*found.groups()))]
        if days:
            return days[-1]
    return ""


def _day_of_time(time: datetime.datetime) -> str:
    try:
        return (time.astimezone(datetime.UTC) if time.tzinfo else time).date().isoformat()
    except (ValueError, OverflowError):
        # Within a day of the calendar's ends, or no time at all (pandas' NaT).
        return ""


def _day(year: str, month: str, day: str) -> str:
    try:
        return datetime.date(int(year), int(month), int(day)).isoformat()
    except ValueError:
        return ""
