"""Activations of the feed-forward part."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F

from .choice import has_triton
from .elementwise import apply
from .quantize import Activations, Layout, quantize

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
}


SWIGLU_CLAMPED = "swiglu_clamped"
"""gpt-oss's gate: (up + 1) * gate * sigmoid(1.702 gate), the gate at most 7 and up within +-7."""
SWIGLU_LIMIT, SWIGLU_ALPHA = 7.0, 1.702


def _clamp_and_gate(first: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    first, up = first.clamp(max=SWIGLU_LIMIT), up.clamp(-SWIGLU_LIMIT, SWIGLU_LIMIT)
    return (up + 1) * (first * apply(torch.sigmoid, SWIGLU_ALPHA * first))


def gate(
    gate_up_TF: torch.Tensor, activation: str, layout: Layout, *, gated: bool = True
) -> Activations:
    """activation(gate) * up as the next product takes it; [T, F].

    `activation` is a name of `ACTIVATIONS`, or `SWIGLU_CLAMPED`, which only gates. `gate_up`
    [T, 2F] holds both halves side by side; where it is not `gated`, [T, F] are all activated. In
    float32, rounded once.
    """
    if has_triton(gate_up_TF):
        from .gpu import activations

        return activations.gate(gate_up_TF, activation, layout, gated)
    wide = gate_up_TF.float()
    if gated:
        first, up = wide.chunk(2, dim=-1)
        clamped = activation == SWIGLU_CLAMPED
        mixed = (
            _clamp_and_gate(first, up) if clamped else apply(ACTIVATIONS[activation], first) * up
        )
    else:
        mixed = apply(ACTIVATIONS[activation], wide)
    return quantize(mixed if layout != Layout.PLAIN else mixed.to(gate_up_TF.dtype), layout)
