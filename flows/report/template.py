"""How a page is made: its template filled, escaped, self-contained, with no script but its own."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from .wording import show_lines

REPORT = Path(__file__).parent
"""Where the style and the script lie that every page begins with, and its parts."""


_OPTION = re.compile(r"(?<!\S)--[a-z][a-z-]*")


def fill(folder: Path, *, styles: Sequence[Path], scripts: Sequence[Path], **values: Any) -> str:
    """`page.html` of a folder as text, everything in it escaped that is not marked safe.

    It may import from the report's `parts.html`, what all pages are made of.

    Args:
        folder: the template's.
        styles: files of its style, one after another.
        scripts: files of its one script, likewise. The page's policy names the script's hash, and
            lets no other run.
        values: what else the template names; all of it has to be there.
    """
    environment = Environment(
        loader=FileSystemLoader([folder, REPORT]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    style, script = ("\n".join(p.read_text("utf-8") for p in paths) for paths in (styles, scripts))
    environment.filters["command"] = _mark_command
    return environment.get_template("page.html").render(
        style=Markup(style),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        **values,
    )


def _mark_command(command: str) -> Markup:
    """A command, escaped; a line may end before an option and not within its name."""
    return Markup(_OPTION.sub(r'<span class="option">\g<0></span>', str(escape(command))))


def mark_up(piece: str) -> Markup:
    """A token's text, escaped; the signs of its line breaks and tabs are to see, not to hear."""
    text = str(escape(show_lines(piece)))
    for sign in ("\u21b5", "\u21e5"):
        text = text.replace(sign, f'<i aria-hidden="true">{sign}</i>')
    return Markup(text)
