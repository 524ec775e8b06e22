"""A document of a run as it is looked at: a stretch of its tokens, what they spell and stand for.

Knows nothing of how it is drawn.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...engine.intake import Intake
from ...engine.recipes import Recipe
from ...engine.records import DocumentScore
from ..run import Run
from .borders import Border, find_borders
from .candidates import Candidates, find_candidates
from .scale import Scale
from .text import Names, cut, find_document, join_bytes, scored_text

BITS = 1.0 / np.log(2.0)
TOKENS, BYTES = "tokens", "bytes"


@dataclass(frozen=True)
class Stretch:
    """A part of a document to look at, of its scored tokens or of its bytes."""

    first: int = 0
    last: int | None = None
    """Where it ends, not included; None: `most` tokens on, or the document's end."""
    unit: str = TOKENS
    most: int = 2_000

    @classmethod
    def between(cls, first: str | None, last: str | None, *, most: int) -> Stretch:
        """Of two ends as people write them: `5000` is a token, `4096b` a byte.

        Raises:
            ValueError: if one is neither, or they are not of one unit.
        """
        ends = {name: text for name, text in (("from", first), ("to", last)) if text is not None}
        units = set()
        for name, text in ends.items():
            if not re.fullmatch(r"[0-9]+b?", text):
                raise ValueError(
                    f"{name}: {text!r} is no place; give a token as in 5000, or a byte as in 4096b"
                )
            units.add(BYTES if text.endswith("b") else TOKENS)
        if len(units) > 1:
            raise ValueError(f"to: {last!r} is not of the unit of {first!r}; give both alike")
        numbers = {name: int(text.rstrip("b")) for name, text in ends.items()}
        unit = units.pop() if units else TOKENS
        return cls(numbers.get("from", 0), numbers.get("to"), unit, most)

    def rows(self, tokens: Mapping[str, np.ndarray]) -> slice:
        """The tokens of the stretch: of bytes, those that have one of them.

        Raises:
            ValueError: if the document has none there.
        """
        count = len(tokens["token_id"])
        length = count if self.unit == TOKENS else int(tokens["byte_end"].max(initial=0))
        if not 0 <= self.first < max(1, length):
            raise ValueError(f"from: {self.first:,} is not within the {length:,} {self.unit}")
        if self.last is not None and self.last <= self.first:
            raise ValueError(f"to: {self.last:,} is not beyond {self.first:,}, where it begins")
        if self.unit == TOKENS:
            first, last = self.first, self.last
        else:
            first = int(np.searchsorted(tokens["byte_end"], self.first, side="right"))
            last = self.last
            if last is not None:
                last = int(np.searchsorted(tokens["byte_start"], last, side="left"))
        rows = slice(first, min(count, first + self.most if last is None else last))
        if rows.stop <= rows.start:
            raise ValueError(
                f"from: no scored token is in {self.unit} {self.first:,} to {self.last:,}"
            )
        return rows


@dataclass(frozen=True)
class View:
    """A document, and the stretch of its tokens that is looked at."""

    run: Run
    record: dict[str, Any]
    """Its row of the scores."""
    tokens: Mapping[str, np.ndarray]
    """Records of all its tokens, [n] each; `entropy` and `rank` may be missing, and a rank of 0 is
    one beyond the kept candidates."""
    rows: slice
    """Those that are looked at."""
    pieces: list[str]
    """What each of these spells, as text or as its id."""
    is_text: bool
    """Whether pieces are text; else ids."""
    origin: str
    """Where they come from, in words."""
    candidates: Candidates | None
    """Of these."""
    names: Mapping[int, str]
    """What candidates are called, by id."""
    borders: list[Border] | None
    """Windows of the whole document, None where they are not known."""
    scale: Scale
    """Of the whole document."""

    @property
    def bits(self) -> np.ndarray:
        """Surprisal of all tokens, float64 [n]."""
        return np.maximum(0.0, -self.tokens["logprob"].astype(np.float64) * BITS)

    def window(self, token: int) -> int | None:
        """The window that scored a token, counted from 1."""
        if self.borders is None:
            return None
        return bisect_right(self.borders, token, key=lambda border: border.token)

    def gap(self, token: int) -> int:
        """Bytes of the document right before a token that were not scored."""
        before = int(self.tokens["byte_end"][token - 1]) if token else 0
        return max(0, int(self.tokens["byte_start"][token]) - before)


class NoTokens(ValueError):
    """The run did not keep what a document's tokens can be told from."""


def open_document(
    run: Run,
    doc_id: str,
    stretch: Stretch | None = None,
    *,
    endpoint_url: str | None = None,
) -> View:
    """A document with its tokens, of a run that kept `tokens`, `topk`, `sampled` or `logits`.

    Args:
        stretch: what to look at; default the first 2,000 tokens.
        endpoint_url: the S3 server of corpus and model where it is not Amazon's.

    Raises:
        KeyError: if the run has no such document.
        NoTokens: if it kept none of these, or the document was not scored, saying so.
        ValueError: if the stretch is not within the document.
    """
    record = run.document(doc_id)
    names = Names(run, endpoint_url)
    kept = {name: record.pop(name) for name in run.tiers if name in record}
    tokens = _tokens(run, record, kept, names, endpoint_url)
    rows = (stretch or Stretch()).rows(tokens)
    names.hold_to({name: column[rows] for name, column in tokens.items()})
    pieces, is_text, origin = _pieces(run, record, tokens, rows, names, endpoint_url)
    candidates = find_candidates(run, {**record, **kept}, rows)
    shown = [] if candidates is None else candidates.ids.ravel().tolist()
    bits = np.maximum(0.0, -tokens["logprob"].astype(np.float64) * BITS)
    return View(
        run=run,
        record=record,
        tokens=tokens,
        rows=rows,
        pieces=pieces,
        is_text=is_text,
        origin=origin,
        candidates=candidates,
        names=names.name([*shown, *tokens["token_id"][rows].tolist()]),
        borders=find_borders(run.plan, record),
        scale=Scale.of(bits),
    )


def _tokens(
    run: Run,
    record: Mapping[str, Any],
    kept: Mapping[str, Any],
    names: Names,
    endpoint_url: str | None,
) -> dict[str, np.ndarray]:
    """Records of the document's tokens, of whichever tier has the most of them."""
    if record["num_tokens_scored"] == 0:
        raise NoTokens(f"{record['doc_id']!r} has no scored tokens: {record['status']}")
    if "tokens" in kept:
        return dict(kept["tokens"])
    for tier in ("topk", "sampled"):
        if tier in kept:
            return _of_arrays(kept[tier])
    if "logits" in run.tiers:
        return _of_logits(run, record, names, endpoint_url)
    raise NoTokens("the run kept document scores alone; score with --keep tokens to see tokens")


def _of_arrays(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Of the tiers `topk` and `sampled`. Of draws, which tell no rank, there is none."""
    names = ("token_id", "byte_start", "byte_end", "logprob")
    tokens = {name: arrays[name] for name in names}
    if "top_ids" in arrays:
        places = arrays["top_ids"] == tokens["token_id"][:, None]
        tokens["rank"] = np.where(places.any(1), places.argmax(1) + 1, 0)
    return tokens


def _of_logits(
    run: Run, record: Mapping[str, Any], names: Names, endpoint_url: str | None
) -> dict[str, np.ndarray]:
    """Of log-probabilities over the vocabulary; which token stands where, the corpus says."""
    needed = "tier logits: it holds no token ids, which come from the corpus and the tokenizer"
    try:
        document = find_document(run, record["doc_id"], endpoint_url)
        recipe, size = Recipe(**run.plan["recipe"]), run.plan["model"]["vocab_size"]
        work = next(Intake(recipe, names.tokenizer, size).take([document]))
    except ValueError as error:
        raise NoTokens(f"{needed}: {error}; score with --keep tokens to need neither") from None
    logprobs = run.logprobs(record["doc_id"])
    if isinstance(work, DocumentScore) or len(work.tokens) != len(logprobs):
        raise NoTokens(f"{needed}: these do not fit; score with --keep tokens to need neither")
    ids = work.tokens.token_id
    own = np.take_along_axis(logprobs, ids[:, None], 1)
    return {
        "token_id": ids,
        "byte_start": work.tokens.byte_start,
        "byte_end": work.tokens.byte_end,
        "logprob": own[:, 0].astype(np.float32),
        "rank": 1 + (logprobs > own).sum(1),
    }


def _pieces(
    run: Run,
    record: Mapping[str, Any],
    tokens: Mapping[str, np.ndarray],
    rows: slice,
    names: Names,
    endpoint_url: str | None,
) -> tuple[list[str], bool, str]:
    """What each token spells, whether that is text, and where it comes from."""
    ids = tokens["token_id"][rows].tolist()
    why = "its documents are token ids"
    if record["num_bytes"] and tokens["byte_end"].any():
        try:
            text = scored_text(find_document(run, record["doc_id"], endpoint_url), names)
            return cut(text, tokens, rows), True, f"text from the corpus {run.plan['uri']}"
        except ValueError as error:
            why = f"no text from the corpus ({error})"
    spelled = names.spell(ids)
    if spelled is not None:
        tokenizer = f"spelled by the tokenizer of {run.plan['model']['name']}"
        return join_bytes(spelled), True, f"token ids {tokenizer}: {why}"
    return [str(i) for i in ids], False, f"token ids: {why}, and no tokenizer ({names.why_not})"
