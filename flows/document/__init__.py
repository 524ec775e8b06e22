"""One document of a run, token by token: what the model thought of it, in a terminal or a page."""

from .page import render_page
from .view import NoTokens, Stretch, View, open_document

__all__ = ["NoTokens", "Stretch", "View", "open_document", "render_page"]
