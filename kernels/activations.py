"""Gated activations of the feed-forward part."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
}


def gate(gate_up: torch.Tensor, activation: str) -> torch.Tensor:
    """activation(gate) * up, where `gate_up` [T, 2F] holds both halves side by side; [T, F]."""
    gated, up = gate_up.chunk(2, dim=-1)
    return ACTIVATIONS[activation](gated) * up
