"""A document as one self-contained HTML page, of the look of a run's report.

The report's `page.css` and `page.js` come first, this folder's after them. Ids and text of
documents are anybody's: the template escapes them all, and the page's own policy lets no other
script run.
"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup, escape

from .. import report
from ..report.panel import Cells
from ..report.template import REPORT, fill, mark_up
from ..report.wording import number, plural, show, show_piece
from .view import View
from .words import (
    COLUMNS,
    NUM_TEXT,
    describe_stretch,
    find_marks,
    lines,
    most_surprising,
    name_levels,
    summarize,
)

_HERE = Path(__file__).parent
MOST_IN_PAGE = 20_000
"""Tokens. Browsers lay out ten times as many for minutes."""
# A token of a better rank needs no badge to be seen.
_BADGE = 10
_NAME = 40
# Log-probabilities are kept in thousandths of a nat.
_PARTS = 1000
_NO_CHANCE = 10**6


def render_page(view: View) -> str:
    """The page: text coloured by surprisal, its candidates, and its most surprising tokens.

    Raises:
        ValueError: for a stretch of more tokens than a browser opens at ease.
    """
    if (count := view.rows.stop - view.rows.start) > MOST_IN_PAGE:
        raise ValueError(
            f"to: {count:,} tokens are more than the {MOST_IN_PAGE:,} that a page holds; write "
            "several with --from and --to"
        )
    plan, record = view.run.plan, view.record
    surprising = most_surprising(view)
    return fill(
        _HERE,
        styles=[REPORT / "page.css", _HERE / "page.css"],
        scripts=[REPORT / "page.js", _HERE / "page.js"],
        doc_id=show(record["doc_id"]),
        summary=summarize(view),
        tiles=_tiles(view),
        origin=show(view.origin),
        stretch=describe_stretch(view),
        command=_command(view),
        levels=name_levels(view),
        badge=_BADGE,
        has_ranks="rank" in view.tokens,
        tokens=_mark_tokens(view, {line.token for line in surprising}),
        candidates=_candidates(view),
        surprising=Cells(COLUMNS, [line.cells for line in surprising], NUM_TEXT),
        links={line.cells[0]: f"token-{line.token}" for line in surprising},
        recipe=report.describe_recipe(plan["recipe"]),
        facts=_facts(view),
    )


def _tiles(view: View) -> list[tuple[str, str, str]]:
    """The headline: (name, value, what it means)."""
    record = view.record
    tiles = [
        ("Token perplexity", number(record["token_perplexity"], 2), "of this document's tokens"),
        (
            "Tokens scored",
            f"{record['num_tokens_scored']:,}",
            f"of {record['num_tokens']:,}, in {plural(record['num_windows'], 'window')}",
        ),
    ]
    if record["bits_per_byte"] is not None:
        meaning = "surprise for a byte of text; 8 is pure noise"
        tiles.insert(0, ("Bits per byte", number(record["bits_per_byte"], 3), meaning))
    return tiles


def _facts(view: View) -> list[tuple[str, str]]:
    """Where the document stands and what scored it: (name, value), what is empty left out."""
    plan, record = view.run.plan, view.record
    facts = {
        "Run": view.run.uri,
        "Model": plan["model"]["name"],
        "Corpus": plan["uri"],
        "Source": record["source"],
        "Language": record["language"],
        "Recipe": f"{plan['recipe']['name']} ({plan['recipe_hash']})",
    }
    return [(name, show(str(value))) for name, value in facts.items() if value]


def _command(view: View) -> str:
    """The command that shows the stretch after this one, or all of a short document."""
    words = ["logitmill", "inspect", view.run.uri, "--doc", view.record["doc_id"]]
    if view.rows.stop < len(view.tokens["token_id"]):
        words += ["--from", str(view.rows.stop)]
    return show(shlex.join([*words, "--html", "FILE"]), 4000)


def _mark_tokens(view: View, linked: set[int]) -> Markup:
    """A span a token: class the level of surprisal, title the numbers, an id if it is linked to."""
    levels, marks = view.scale.levels(view.bits[view.rows]), find_marks(view)
    places = range(view.rows.start, view.rows.stop)
    spans = []
    for line, level, piece in zip(lines(view, places), levels, view.pieces, strict=True):
        token = line.token
        rank = int(view.tokens["rank"][token]) if "rank" in view.tokens else 1
        more = f' id="token-{token}"' if token in linked else ""
        if token in marks:
            more += f' data-mark="{escape(marks[token])}"'
        if rank >= _BADGE or not rank:
            more += f' data-rank="{line.rank}"'
        title = f"place {token:,}, {line.bits} bits, rank {line.rank}, entropy {line.entropy} bits"
        if view.borders is not None and len(view.borders) > 1:
            title += f", window {line.window}"
        spans.append(f'<span class="s{level}" title="{title}"{more}>{mark_up(piece)}</span>')
    # Token ids would run into one number.
    return Markup(("" if view.is_text else " ").join(spans))


def _candidates(view: View) -> dict[str, Any] | None:
    """For the script: names, and of each token [its name, -log p, -log of the others' mass,
    then name and -log p of each candidate], in thousandths of a nat."""
    if view.candidates is None:
        return None
    ids, names = view.candidates.ids, view.names
    own = view.tokens["token_id"][view.rows]
    used = np.unique(np.concatenate([ids.ravel(), own]))
    with np.errstate(divide="ignore"):
        tail = _thousandths(np.log(view.candidates.tail))
    columns = [
        np.searchsorted(used, own),
        _thousandths(view.tokens["logprob"][view.rows].astype(np.float64)),
        tail,
    ]
    for k in range(ids.shape[1]):
        columns += [np.searchsorted(used, ids[:, k]), _thousandths(view.candidates.logprobs[:, k])]
    return {
        "names": [show_piece(names[int(i)], _NAME) for i in used],
        "rows": np.stack(columns, axis=1).astype(int).tolist(),
    }


def _thousandths(logs: np.ndarray) -> np.ndarray:
    return np.round(np.clip(np.nan_to_num(-logs, nan=_NO_CHANCE), 0.0, _NO_CHANCE) * _PARTS)
