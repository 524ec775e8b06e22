"""Where a document was cut into windows, told by its recipe and its counts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ...engine.recipes import Recipe


@dataclass(frozen=True)
class Border:
    """Where a window begins to score."""

    token: int
    """Its first scored token, counted among the scored ones."""
    num_read: int | None
    """Inputs that the model read in this window before it predicted that token, a prefix token
    counted; None where that is not known."""


def find_borders(plan: Mapping[str, Any], record: Mapping[str, Any]) -> list[Border] | None:
    """The windows of a document in order; None where its counts are not those of the recipe.

    Whether a prefix token stood in front, which may depend on the document, follows from the
    numbers of its tokens and windows.
    """
    num_scored, num_windows = record["num_tokens_scored"], record["num_windows"]
    if not num_scored:
        return []
    recipe = Recipe(**plan["recipe"])
    if recipe.name == "conditional":
        # How long the context was is not stored, and there is one window.
        return [Border(0, None)]
    for num_prefix in (1, 0):
        length = record["num_tokens"] + num_prefix
        windows = recipe.windows(length, has_prefix=bool(num_prefix))
        counts = [window.num_targets for window in windows]
        if (len(windows), sum(counts)) == (num_windows, num_scored):
            starts = [sum(counts[:i]) for i in range(len(counts))]
            return [
                Border(start, window.first_target - window.start)
                for start, window in zip(starts, windows, strict=True)
            ]
    return None
