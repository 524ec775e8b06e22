"""What is said of a document and its tokens, in a terminal and in a page alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from ..report.wording import MAX_LABEL, NOTHING, number, percent, plural, show, show_piece, size
from .view import BITS, View

MOST_SURPRISING = 10


@dataclass(frozen=True)
class Line:
    """A token in a line of a table."""

    token: int
    """Its place among the scored tokens, from 0."""
    piece: str
    bits: str
    rank: str
    entropy: str
    first_choice: str
    """The likeliest token and its probability."""
    window: str

    @property
    def cells(self) -> Sequence[str]:
        """Text first, then numbers; see `COLUMNS`."""
        place = f"{self.token:,}"
        return place, self.piece, self.first_choice, self.bits, self.rank, self.entropy, self.window


COLUMNS = ("place", "token", "first choice", "bits", "rank", "entropy", "window")
NUM_TEXT = 3
"""Columns that are text; the rest are numbers."""


def summarize(view: View) -> str:
    """The document's scores in a line."""
    record = view.record
    parts = [f"token perplexity {number(record['token_perplexity'], 2)}"]
    if record["bits_per_byte"] is not None:
        parts.insert(0, f"{number(record['bits_per_byte'], 3)} bits/byte")
    count = plural(record["num_tokens_scored"], "token")
    if record["num_tokens_scored"] < record["num_tokens"]:
        count = f"{record['num_tokens_scored']:,} of {plural(record['num_tokens'], 'token')} scored"
    windows = plural(record["num_windows"], "window")
    parts.append(f"{count} in {windows} of the recipe {show(record['recipe'], MAX_LABEL)}")
    if record["num_bytes"]:
        parts.append(size(record["num_bytes"]))
    return ", ".join(parts)


def describe_stretch(view: View) -> str | None:
    """Which part is looked at; None if it is all."""
    rows, count = view.rows, len(view.tokens["token_id"])
    if rows.stop - rows.start == count:
        return None
    return f"tokens {rows.start:,} to {rows.stop:,} of {count:,}"


def lines(view: View, places: Sequence[int]) -> list[Line]:
    """Tokens by their places in the document, which are within the stretch."""
    bits, found = view.bits, []
    for token in places:
        i = token - view.rows.start
        choice = NOTHING
        if view.candidates is not None:
            name = show_piece(view.names[int(view.candidates.ids[i, 0])])
            choice = f"{name} {percent(float(np.exp(view.candidates.logprobs[i, 0])))}"
        window = view.window(token)
        found.append(
            Line(
                token=token,
                piece=show_piece(view.pieces[i]),
                bits=number(float(bits[token]), 2),
                rank=_rank(view, token),
                entropy=_entropy(view, token),
                first_choice=choice,
                window=f"{window:,}" if window is not None else NOTHING,
            )
        )
    return found


def most_surprising(view: View, count: int = MOST_SURPRISING) -> list[Line]:
    """The most surprising tokens of the stretch, the first first among equals."""
    order = np.argsort(-view.bits[view.rows], kind="stable")[:count]
    return lines(view, [int(i) + view.rows.start for i in order])


def name_levels(view: View) -> list[str]:
    """What the levels of the scale stand for, bits; one name if all tokens are alike."""
    edges = [f"{bits:.2g}" for bits in view.scale.edges()]
    if not edges:
        return []
    inner = [f"{a}\u2013{b}" for a, b in pairwise(edges)]
    return [f"< {edges[0]}", *inner, f"\u2265 {edges[-1]}"]


def find_marks(view: View) -> dict[int, str]:
    """What stands before tokens of the stretch, by token: text that was not scored, a border."""
    borders = view.borders or []
    begun = {b.token: f"window {n:,}" for n, b in enumerate(borders, 1)} if borders[1:] else {}
    marks = {}
    for token in range(view.rows.start, view.rows.stop):
        gap = view.gap(token)
        parts = [f"{plural(gap, 'byte')} not scored"] if gap else []
        parts += [begun[token]] if token in begun else []
        if parts:
            marks[token] = ", ".join(parts)
    return marks


def _rank(view: View, token: int) -> str:
    """A token's rank; `beyond` where it is not among the candidates that were kept."""
    if "rank" not in view.tokens:
        return NOTHING
    rank = int(view.tokens["rank"][token])
    return f"{rank:,}" if rank else "beyond"


def _entropy(view: View, token: int) -> str:
    if "entropy" not in view.tokens:
        return NOTHING
    return number(float(view.tokens["entropy"][token]) * BITS, 2)
