"""Scoring recipes: which tokens of a document are scored, and what each of them gets to see.

"Perplexity" without a recipe is not a number: one model on one corpus comes out at 5.1, 5.5, 5.8,
8.8 or 61.0 by convention alone. A recipe is a small frozen object; its name and hash stand in
every output.

The sequence of a document is its tokens, with the prefix token in front if there is one. A window
feeds part of that sequence to the model and scores the tokens that follow its last inputs:

    sequence   P  a  b  c  d  e  f  g      window(start=2, stop=6, first_target=4)
    inputs           b  c  d  e            rows 0..3
    targets                d  e  f         row r predicts sequence[start + r + 1]
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

AUTO, BOS, EOS, NONE, TOKENIZER = "auto", "bos", "eos", "none", "tokenizer"
PREFIXES = (AUTO, BOS, EOS, NONE, TOKENIZER)
TOKEN, DOCUMENT = "token", "document"
WEIGHTINGS = (TOKEN, DOCUMENT)
JOINER = "\n\n"
"""What stands between the documents of a recipe that reads its corpus as one stream."""


@dataclass(frozen=True)
class Window:
    """Inputs sequence[start:stop]; targets sequence[first_target:stop + 1]."""

    start: int
    stop: int
    first_target: int
    overwrite_first: bool = False
    """Feed the prefix token in place of the first input (llama.cpp)."""

    @property
    def num_targets(self) -> int:
        return self.stop + 1 - self.first_target


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A named rule from a document's tokens to windows."""

    name: str
    """`rolling`, `disjoint`, `strided`, `llamacpp`, `truncated` or `conditional`; what is left out
    below is as in the preset of that name."""
    context: int | None = None
    """Longest window in input tokens; None is the preset's 2,048 (`disjoint`) or 512 (`llamacpp`),
    else the model's own limit."""
    overlap: int | None = None
    """`rolling`: inputs that stand before the first target of every later window; None is 1."""
    stride: int | None = None
    """`strided`: tokens between the starts of neighbouring windows; None is half the context."""
    prefix: str | int | None = None
    """What stands in front: `auto` (BOS, else EOS), `bos`, `eos`, `none`, `tokenizer` (BOS where
    the tokenizer adds one by itself) or a token id."""
    concatenate: bool | None = None
    """Whether the corpus is one stream, documents joined by a blank line."""
    weighting: str | None = None
    """How documents make one perplexity: `token` (sums) or `document` (mean of perplexities)."""

    def __post_init__(self) -> None:
        if self.name not in _PRESETS:
            raise ValueError(f"recipe: {self.name!r} is not one of {', '.join(_PRESETS)}")
        for field, value in _PRESETS[self.name].items():
            if getattr(self, field) is None:
                object.__setattr__(self, field, value)
        for field in ("context", "stride", "overlap"):
            value = getattr(self, field)
            if value is not None and value < 1:
                raise ValueError(f"{field}: {value} is not at least 1")
        prefix = self.prefix
        if prefix not in PREFIXES and not (isinstance(prefix, int) and prefix >= 0):
            raise ValueError(
                f"prefix: {self.prefix!r} is not a token id or one of {', '.join(PREFIXES)}"
            )
        if self.weighting not in WEIGHTINGS:
            raise ValueError(f"weighting: {self.weighting!r} is not one of {', '.join(WEIGHTINGS)}")
        self._check_meaning()

    def _check_meaning(self) -> None:
        """ValueError for a setting that would change nothing, or what the recipe is."""
        if self.overlap != 1 and self.name != "rolling":
            raise ValueError(
                f"overlap: {self.overlap} has no meaning for recipe {self.name}, only rolling"
            )
        if self.stride is not None and self.name != "strided":
            raise ValueError(
                f"stride: {self.stride} has no meaning for recipe {self.name}, only strided"
            )
        if self.concatenate and self.name in ("truncated", "conditional"):
            raise ValueError(
                f"concatenate: True has no meaning for recipe {self.name}, which is one of "
                "documents; leave it out"
            )
        if self.concatenate and self.weighting != TOKEN:
            raise ValueError(
                f"weighting: {self.weighting!r} has no meaning for one stream, only token"
            )

    def resolve(self, max_positions: int) -> Recipe:
        """The recipe with a definite context and stride for a model of `max_positions`.

        Raises:
            ValueError: if a setting does not fit the model or the others.
        """
        context = self.context or max_positions
        if context > max_positions:
            raise ValueError(
                f"context: {context} is more than the model's {max_positions} positions"
            )
        if self.overlap is not None and self.overlap > context:
            raise ValueError(f"overlap: {self.overlap} is more than the context of {context}")
        if context < 2 and self.name != "rolling":
            raise ValueError(f"context: {context} is not at least 2, which {self.name} needs")
        if self.name != "strided":
            return replace(self, context=context)
        stride = self.stride or max(1, context // 2)
        if stride > context:
            raise ValueError(
                f"stride: {stride} is more than the context of {context}, tokens would be skipped"
            )
        return replace(self, context=context, stride=stride)

    def windows(self, length: int, *, has_prefix: bool, num_context: int = 0) -> list[Window]:
        """Windows over a sequence of `length` tokens, the prefix counted.

        `num_context` tokens at its start are read but not scored (`conditional`). Empty if the
        sequence is too short for the recipe. The recipe must be resolved.
        """
        assert self.context is not None
        return _WINDOWS[self.name](self, length, has_prefix, num_context)

    @property
    def hash(self) -> str:
        """12 hex digits over everything that decides the windows."""
        text = json.dumps(asdict(self), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]


def _rolling(recipe: Recipe, length: int, has_prefix: bool, num_context: int) -> list[Window]:
    """lm-evaluation-harness: every token once, a short last window filled up on its left."""
    context, overlap = recipe.context, recipe.overlap
    assert context is not None and overlap is not None
    last = length - 1
    if last < 1:
        return []
    done = min(context, last)
    windows = [Window(0, done, 1)]
    while done < last:
        stop = min(done + context - overlap + 1, last)
        windows.append(Window(stop - context, stop, done + 1))
        done = stop
    return windows


def _disjoint(recipe: Recipe, length: int, has_prefix: bool, num_context: int) -> list[Window]:
    """GPTQ, AWQ, SparseGPT: windows side by side, first token of each unscored, no tail."""
    context = recipe.context
    assert context is not None
    starts = range(0, length - context + 1, context)
    return [Window(s, s + context - 1, s + 1) for s in starts]


def _strided(recipe: Recipe, length: int, has_prefix: bool, num_context: int) -> list[Window]:
    """Hugging Face's guide: overlapping windows, each scoring what none before it covered."""
    context, stride = recipe.context, recipe.stride
    assert context is not None and stride is not None
    windows: list[Window] = []
    covered = 0
    for start in range(0, length, stride):
        stop = min(start + context, length)
        first_target = max(covered, start + 1)
        if first_target < stop:
            windows.append(Window(start, stop - 1, first_target))
        covered = stop
        if stop == length:
            break
    return windows


def _llamacpp(recipe: Recipe, length: int, has_prefix: bool, num_context: int) -> list[Window]:
    """llama-perplexity: chunks side by side, second half scored, BOS over each first token."""
    context = recipe.context
    assert context is not None
    if length < 2 * context:
        return []
    starts = range(0, length - context + 1, context)
    return [Window(s, s + context - 1, s + context // 2 + 1, has_prefix) for s in starts]


def _truncated(recipe: Recipe, length: int, has_prefix: bool, num_context: int) -> list[Window]:
    """Hugging Face's `evaluate`: the first `context` tokens of each document, prefix included."""
    assert recipe.context is not None
    stop = min(recipe.context, length) - 1
    return [Window(0, stop, 1)] if stop >= 1 else []


def _conditional(recipe: Recipe, length: int, has_prefix: bool, num_context: int) -> list[Window]:
    """The continuation given its context, cut from the left where both are too long."""
    assert recipe.context is not None
    last = length - 1
    start = max(0, last - recipe.context)
    first_target = max(num_context, start + 1)
    return [Window(start, last, first_target)] if last >= first_target else []


_WINDOWS: dict[str, Callable[[Recipe, int, bool, int], list[Window]]] = {
    "rolling": _rolling,
    "disjoint": _disjoint,
    "strided": _strided,
    "llamacpp": _llamacpp,
    "truncated": _truncated,
    "conditional": _conditional,
}

_SHARED: dict[str, Any] = {
    "overlap": 1,
    "prefix": AUTO,
    "concatenate": False,
    "weighting": TOKEN,
}
_STREAM: dict[str, Any] = {**_SHARED, "prefix": TOKENIZER, "concatenate": True}
_PRESETS: dict[str, dict[str, Any]] = {
    "rolling": _SHARED,
    "disjoint": {**_STREAM, "context": 2048},
    "strided": _STREAM,
    "llamacpp": {**_SHARED, "prefix": TOKENIZER, "context": 512},
    "truncated": {**_SHARED, "weighting": DOCUMENT},
    "conditional": _SHARED,
}
"""What a recipe's fields are where they are left out."""

PRESETS = {name: Recipe(name=name) for name in _PRESETS}


def find_recipe(
    name: str | Recipe,
    *,
    context: int | None = None,
    overlap: int | None = None,
    stride: int | None = None,
    prefix: str | int | None = None,
) -> Recipe:
    """A preset by name, `rolling`, or `disjoint-2048` with its context, with settings changed.

    Raises:
        ValueError: naming the field, its value and what would work.
    """
    if isinstance(name, Recipe):
        recipe = name
    else:
        base, dash, number = name.partition("-")
        if base not in PRESETS or (dash and not re.fullmatch("[0-9]+", number)):
            raise ValueError(
                f"recipe: {name!r} is not one of {', '.join(PRESETS)}, "
                "each with an optional context as in disjoint-2048"
            )
        if number and context is not None and context != int(number):
            raise ValueError(f"context: {context} contradicts the recipe {name!r}")
        recipe = PRESETS[base]
        context = int(number) if number else context
    if isinstance(prefix, str) and re.fullmatch("[0-9]+", prefix):
        prefix = int(prefix)
    settings = {"context": context, "overlap": overlap, "stride": stride, "prefix": prefix}
    changes = {field: value for field, value in settings.items() if value is not None}
    return replace(recipe, **changes)  # type: ignore[arg-type]
