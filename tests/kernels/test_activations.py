"""Gated activations against their formulas."""

from __future__ import annotations

import math

import pytest
import torch
from logitmill.kernels.activations import ACTIVATIONS, gate

FORMULAS = {
    "silu": lambda x: x / (1 + math.exp(-x)),
    "gelu": lambda x: x * 0.5 * (1 + math.erf(x / math.sqrt(2))),
    "gelu_tanh": lambda x: (
        0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    ),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_the_first_half_gates_the_second(name: str) -> None:
    gated = torch.linspace(-6, 6, 25)
    up = torch.linspace(3, -2, 25)
    out = gate(torch.cat([gated, up])[None], name)
    expected = [FORMULAS[name](g.item()) * u.item() for g, u in zip(gated, up, strict=True)]
    torch.testing.assert_close(out[0], torch.tensor(expected), atol=2e-6, rtol=1e-5)
