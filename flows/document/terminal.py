"""A document in a terminal: its text coloured by surprisal, or a plain table of its tokens."""

from __future__ import annotations

from rich.console import Console
from rich.style import Style
from rich.table import Table
from rich.text import Text

from ..report.wording import show, show_lines
from .scale import LEVELS
from .view import View
from .words import (
    COLUMNS,
    NUM_TEXT,
    Line,
    describe_stretch,
    find_marks,
    lines,
    most_surprising,
    name_levels,
    summarize,
)

# From dark to bright in even steps of lightness, whatever the terminal makes of the hues; what is
# least surprising is plain. Letters are of the colour that can be read there.
_GROUNDS = (None, None, "#3b0f4f", "#6d1d5c", "#a52c50", "#d6493a", "#f0801f", "#fbc94d")
_BRIGHT = 6
_STYLES = [
    Style(color="#101010" if i >= _BRIGHT else "#f4f4f4", bgcolor=ground) if ground else Style()
    for i, ground in enumerate(_GROUNDS)
]
assert len(_STYLES) == LEVELS


def print_document(view: View, console: Console) -> None:
    """Print it: in colours where the console has them, else as a table of all its tokens."""
    head = Text(show(view.record["doc_id"]), "bold")
    labels = [show(view.record[name]) for name in ("source", "language") if view.record[name]]
    console.print(head, Text(", ".join(labels)), soft_wrap=True)
    console.print(Text(summarize(view)), soft_wrap=True)
    console.print(Text(show(view.origin)), soft_wrap=True)
    stretch = describe_stretch(view)
    if stretch is not None:
        console.print(Text(f"{stretch}; --from and --to show others"))
    console.print()
    if console.color_system is None or console.no_color:
        rows = range(view.rows.start, view.rows.stop)
        _print_plain(lines(view, rows), console)
        return
    console.print(_legend(view))
    console.print()
    console.print(_colour(view), overflow="fold")
    console.print()
    console.print(_table(most_surprising(view)))


def _legend(view: View) -> Text:
    text = Text("bits ")
    for name, style in zip(name_levels(view), _STYLES, strict=False):
        text.append(f" {name} ", style)
    return text


def _colour(view: View) -> Text:
    text = Text()
    levels, marks = view.scale.levels(view.bits[view.rows]), find_marks(view)
    for i, (piece, level) in enumerate(zip(view.pieces, levels, strict=True)):
        if mark := marks.get(view.rows.start + i):
            text.append(f"\u2502{mark}\u2502", "reverse dim")
        if i and not view.is_text:
            text.append(" ")
        text.append(show_lines(piece), _STYLES[level])
    return text


def _table(rows: list[Line]) -> Table:
    table = Table(box=None, header_style="bold", title="most surprising", title_justify="left")
    for i, name in enumerate(COLUMNS):
        table.add_column(name, justify="left" if 0 < i < NUM_TEXT else "right")
    for row in rows:
        table.add_row(*map(Text, row.cells))
    return table


def _print_plain(rows: list[Line], console: Console) -> None:
    """A line a token in columns of one width each, never cut to a terminal's."""
    cells = [COLUMNS, *(row.cells for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for row in cells:
        padded = [
            cell.ljust(width) if 0 < i < NUM_TEXT else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        console.print(Text("  ".join(padded).rstrip()), soft_wrap=True)
