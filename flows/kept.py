"""What a run keeps besides document scores: which tiers, with which settings, of what size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ..engine.lens import check_layers
from ..engine.pipeline import DTYPES, MAX_DRAWS, NO_STATES, ModelFacts, Pipeline
from ..kernels.logits import MAX_K
from .parts import LOGITS_DTYPES, TIERS

if TYPE_CHECKING:
    from .request import Request

TOP_K, NUM_DRAWS = 20, 12
"""What `topk` and `sampled` are kept with unless it is said otherwise."""
_RANGES = {"top_k": (1, MAX_K), "num_draws": (1, MAX_DRAWS), "draw_seed": (0, 2**63 - 1)}
OF_TIERS = ("top_k", "num_draws", "draw_seed", "layers")
"""Settings of tiers, in the run key where they are kept."""
WHOLE = {"logits", "hidden"}
"""Tiers whose size has a bound."""


@dataclass(frozen=True)
class Kept:
    """What `topk`, `sampled` and `lens` are kept with; None where they are not."""

    top_k: int | None
    num_draws: int | None
    draw_seed: int | None
    layers: Sequence[int] | None


def check_ranges(request: Request, tiers: Sequence[str]) -> None:
    """What is wrong with the tiers' settings whatever the model is.

    Raises:
        ValueError: for tiers that hold the same twice, and for a setting that is out of range, or
            of a tier that is not kept.
    """
    if "logits" in tiers:
        for tier in ("topk", "sampled"):
            if tier in tiers:
                raise ValueError(
                    f"tiers: {tier!r} can be made of 'logits', which hold the whole distribution; "
                    "keep one of both"
                )
        if "hidden" in tiers:
            raise ValueError(
                "tiers: 'logits' can be made of 'hidden' by the model; keep one of both"
            )
    for tier, names in (("topk", ("top_k",)), ("sampled", ("num_draws", "draw_seed"))):
        for name in names:
            value = getattr(request, name)
            if value is not None and tier not in tiers:
                raise ValueError(
                    f"{name}: {value} is of the tier {tier}; keep that, or leave it out"
                )
            least, most = _RANGES[name]
            if value is not None and not (type(value) is int and least <= value <= most):
                raise ValueError(f"{name}: {value!r} is not an integer within {least} ... {most}")
    if "lens" not in tiers and request.layers is not None:
        raise ValueError(
            f"layers: {request.layers!r} is of the tier lens; keep that, or leave it out"
        )


def check_kept(request: Request, tiers: Sequence[str], facts: ModelFacts) -> Kept:
    """Settings of the tiers, which `check_ranges` has let pass.

    Raises:
        ValueError: for a tier that the model cannot give, or a setting that is beyond it.
    """
    if "hidden" in tiers and facts.hidden_size is None:
        raise ValueError(f"tiers: 'hidden' cannot be kept: {NO_STATES}")
    if request.top_k is not None and request.top_k > facts.vocab_size:
        least, _ = _RANGES["top_k"]
        raise ValueError(
            f"top_k: {request.top_k} is not an integer within {least} ... {facts.vocab_size}, the "
            "model's vocabulary"
        )

    def settle(tier: str, given: int | None, default: int) -> int | None:
        return (default if given is None else given) if tier in tiers else None

    return Kept(
        settle("topk", request.top_k, min(TOP_K, facts.vocab_size)),
        settle("sampled", request.num_draws, NUM_DRAWS),
        settle("sampled", request.draw_seed, 0),
        _settle_layers(request, tiers, facts),
    )


def _settle_layers(
    request: Request, tiers: Sequence[str], facts: ModelFacts
) -> Sequence[int] | None:
    """The layers of the tier `lens`, in order."""
    if "lens" not in tiers:
        return None
    if facts.num_layers is None:
        raise ValueError(
            "tiers: 'lens' cannot be kept: transformers runs this model, and its layers are its own"
        )
    return check_layers(request.layers, facts.num_layers)


def row_bytes(tiers: Sequence[str], model: ModelFacts | Pipeline, logits_dtype: str) -> int:
    """What a token takes in the tier that keeps whole distributions, before compression; else 0."""
    if "hidden" in tiers:
        return (model.hidden_size or 0) * DTYPES[model.dtype].itemsize
    if "logits" in tiers:
        return model.vocab_size * np.dtype(LOGITS_DTYPES[logits_dtype]).itemsize
    return 0


def check_tiers(tiers: Sequence[str]) -> list[str]:
    """The tiers in their own order, `scores` always among them."""
    if isinstance(tiers, str):
        tiers = [tiers]
    unknown = [tier for tier in tiers if tier not in TIERS]
    if unknown:
        raise ValueError(f"tiers: {unknown[0]!r} is not one of {', '.join(TIERS)}")
    return [tier for tier in TIERS if tier == "scores" or tier in tiers]
