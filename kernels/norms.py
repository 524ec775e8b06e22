"""Root-mean-square normalisation over the last dimension, alone and after a residual addition."""

from __future__ import annotations

import torch

from .choice import has_triton
from .quantize import Activations, Layout, quantize


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension (Zhang & Sennrich 2019).

    In float32 whatever the dtype of `x` [..., D] and `weight` [D]; the result is float32.
    """
    wide = x.float()
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return wide * scale * weight.float()


def add_norm(
    x_TD: torch.Tensor,
    delta_TD: torch.Tensor | None,
    weight_D: torch.Tensor,
    eps: float,
    layout: Layout,
) -> Activations:
    """x += delta, in place; then its norm as the next product takes it.

    `x` is the residual stream; the norm is of the sum as it is stored, and is rounded once, from
    float32 to the layout's numbers.
    """
    if has_triton(x_TD):
        from .gpu import norms

        return norms.add_norm(x_TD, delta_TD, weight_D, eps, layout)
    if delta_TD is not None:
        x_TD += delta_TD
    normed = rms_norm(x_TD, weight_D, eps)
    return quantize(normed if layout != Layout.PLAIN else normed.to(x_TD.dtype), layout)
