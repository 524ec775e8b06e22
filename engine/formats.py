"""Weight formats: how a linear layer's weights are held and multiplied.

A format knows nothing of families. `Dense` is the plain one; a quantized format is another class
with the same two faces, a constructor from checkpoint tensors and a call on packed tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from ..kernels import linear


class Linear(Protocol):
    """A linear layer over packed tokens: x [T, K] -> [T, N]."""

    def __call__(self, x_TK: torch.Tensor) -> torch.Tensor: ...


@dataclass(frozen=True)
class Dense:
    """Weights in the dtype of the arithmetic: fp32, bf16 or fp16."""

    weight_NK: torch.Tensor
    bias_N: torch.Tensor | None = None

    def __call__(self, x_TK: torch.Tensor) -> torch.Tensor:
        return linear.multiply(x_TK, self.weight_NK, self.bias_N)
