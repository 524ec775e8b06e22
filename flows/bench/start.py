"""How long this process has been running, from its very start on."""

from __future__ import annotations

import os
from pathlib import Path

_STAT, _UPTIME = Path("/proc/self/stat"), Path("/proc/uptime")
# Of what stands behind the process's name: the 22nd field of all, ticks since the system's start.
_START = 19


def process_age() -> float | None:
    """Seconds since this process was started; None where the system does not say."""
    if not _STAT.is_file():
        return None
    # The name, in brackets, may hold anything.
    fields = _STAT.read_text().rpartition(")")[2].split()
    up = float(_UPTIME.read_text().split()[0])
    return up - int(fields[_START]) / os.sysconf("SC_CLK_TCK")
