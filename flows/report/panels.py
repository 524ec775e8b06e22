"""The panels of a report.

A new panel is a function of the material that returns a `Panel`, or None where there is nothing to
say, and a line in `PANELS`.
"""

from __future__ import annotations

from collections.abc import Callable

from .documents import histogram_panel, languages_panel
from .operations import operations_panel
from .panel import Material, Panel
from .positions import position_panel, window_panel
from .tokens import calibration_panel, rank_panel
from .vocabulary import vocabulary_panel

PANELS: tuple[Callable[[Material], Panel | None], ...] = (
    histogram_panel,
    languages_panel,
    position_panel,
    window_panel,
    calibration_panel,
    rank_panel,
    vocabulary_panel,
    operations_panel,
)
"""In the order of the page."""
