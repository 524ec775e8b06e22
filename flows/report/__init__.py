"""Summary tables -> one self-contained HTML page."""

from .page import describe_recipe, render_report

__all__ = ["describe_recipe", "render_report"]
