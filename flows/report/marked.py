"""Documents token by token, coloured by surprisal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from markupsafe import Markup

from ..document.borders import find_borders
from ..document.scale import Scale
from ..summary import HIGHEST, LOWEST, SAMPLE
from .template import mark_up
from .totals import BITS, Row
from .wording import number, plural, show

_WHY = {
    LOWEST: "among the most predictable",
    HIGHEST: "among the most surprising",
    SAMPLE: "drawn at random",
}


@dataclass(frozen=True)
class Marked:
    """A document of the heatmap: why it is there, its numbers, and its tokens as coloured text."""

    id: str
    doc_id: str
    why: str
    about: str
    tokens: Markup


@dataclass(frozen=True)
class Heatmap:
    """Documents coloured on one scale, and the scale's levels in words, the faintest first."""

    documents: Sequence[Marked]
    levels: Sequence[str]
    has_borders: bool

    @classmethod
    def of(cls, rows: Sequence[Row], recipe: Mapping[str, Any]) -> Heatmap:
        """Those of rows of schema `OUTLIERS` that hold tokens, each document once."""
        shown: dict[tuple[str, float | None], Row] = {}
        for row in rows:
            if row["pieces"] is not None and row["kind"] in _WHY:
                shown.setdefault((row["doc_id"], row["bits_per_byte"]), row)
        bits = [_bits(row) for row in shown.values()]
        scale = Scale.of(np.concatenate(bits) if bits else np.zeros(0))
        borders = [_borders(row, recipe) for row in shown.values()]
        documents = [
            Marked(
                id=f"document-{n + 1}",
                doc_id=show(row["doc_id"]),
                why=_WHY[row["kind"]],
                about=_about(row),
                tokens=_mark_tokens(row, scale, borders[n]),
            )
            for n, row in enumerate(shown.values())
        ]
        return cls(documents, _level_names(scale), any(borders))


def _bits(row: Row) -> np.ndarray:
    """Surprisal of a row's tokens, bits."""
    return np.maximum(-np.array(row["logprob"], np.float64) * BITS, 0.0)


def _borders(row: Row, recipe: Mapping[str, Any]) -> dict[int, int]:
    """Which window begins to score at which of the tokens shown; the first is left out."""
    if row["num_windows"] < 2 or recipe.get("concatenate") or not recipe.get("context"):
        return {}
    num_scored = row["num_tokens"]
    # The first token is not scored where no prefix stands before it.
    for num_tokens in (num_scored, num_scored + 1):
        counts = {"num_tokens": num_tokens, "num_tokens_scored": num_scored}
        try:
            found = find_borders({"recipe": recipe}, {**counts, "num_windows": row["num_windows"]})
        except (TypeError, ValueError):
            # Of a recipe that this version does not know.
            return {}
        if found:
            last = len(row["pieces"])
            return {b.token: n + 1 for n, b in enumerate(found) if 0 < b.token < last}
    return {}


def _about(row: Row) -> str:
    about = f"token perplexity {number(row['token_perplexity'], 2)}, "
    if row["bits_per_byte"] is not None:
        about = f"{number(row['bits_per_byte'], 3)} bits/byte, {about}"
    if len(row["pieces"]) < row["num_tokens"]:
        about += f"first {len(row['pieces']):,} of "
    return about + plural(row["num_tokens"], "token")


def _mark_tokens(row: Row, scale: Scale, borders: Mapping[int, int]) -> Markup:
    """A span a token: its class the level of surprisal, its title the numbers, its rank a badge."""
    spans = []
    bits = _bits(row)
    levels = scale.levels(bits).tolist()
    tokens = zip(row["pieces"], bits.tolist(), row["rank"], row["entropy"], strict=True)
    for i, (piece, surprisal, rank, entropy) in enumerate(tokens):
        title = f"{number(surprisal, 1)} bits, rank {rank:,}, "
        title += f"entropy {number(entropy * BITS, 1)} bits"
        names = f"s{levels[i]}"
        if i in borders:
            names += " w"
            title += f", first of window {borders[i]:,}"
        badge = f' data-r="{_short(rank)}"' if rank > 1 else ""
        spans.append(f'<span class="{names}" title="{title}"{badge}>{mark_up(piece)}</span>')
    # Token ids, which stand for a document without text, would run into one number.
    return Markup(("" if row["num_bytes"] else " ").join(spans))


def _short(rank: int) -> str:
    return str(rank) if rank < 1000 else f"{rank // 1000}k"


def _level_names(scale: Scale) -> list[str]:
    """What the levels stand for, bits."""
    edges = [f"{bits:.2g}" if bits < 10 else f"{bits:.0f}" for bits in scale.edges()]
    if not edges:
        return []
    inner = [f"{a}\u2013{b}" for a, b in pairwise(edges)]
    return [f"< {edges[0]}", *inner, f"\u2265 {edges[-1]}"]
