"""Normalisation over the last dimension, alone and after a residual addition."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .choice import has_triton
from .quantize import Activations, Layout, quantize


@dataclass(frozen=True)
class NormWeights:
    """RMSNorm (Zhang & Sennrich 2019), or LayerNorm (Ba et al. 2016) where `centred`."""

    weight: torch.Tensor
    """[D], or of any shape that goes with the last dimensions of what is normalised."""
    eps: float
    bias: torch.Tensor | None = None
    centred: bool = False


def normalise(x: torch.Tensor, norm: NormWeights) -> torch.Tensor:
    """(x - mean) / sqrt(mean((x - mean)^2) + eps) * weight + bias over the last dimension.

    The mean is zero for an RMSNorm. In float32 whatever the dtype of `x` [..., D] and of the
    weights; the result is float32.
    """
    wide = x.float()
    if norm.centred:
        wide = wide - wide.mean(-1, keepdim=True)
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + norm.eps)
    normed = wide * scale * norm.weight.float()
    return normed if norm.bias is None else normed + norm.bias.float()


def add_norm(
    x_TD: torch.Tensor,
    delta_TD: torch.Tensor | None,
    norm: NormWeights | None,
    layout: Layout,
    *,
    scale: float = 1.0,
) -> Activations:
    """x += scale * delta, in place; then its norm as the next product takes it.

    `x` is the residual stream; the norm is of the sum as it is stored, and is rounded once, from
    float32 to the layout's numbers. Without a norm it is the sum itself that is rounded.
    """
    if has_triton(x_TD):
        from .gpu import norms

        return norms.add_norm(x_TD, delta_TD, norm, layout, scale)
    if delta_TD is not None:
        x_TD += delta_TD if scale == 1.0 else delta_TD.float() * scale
    if norm is None:
        # A copy: the stream goes on changing.
        return quantize(x_TD if layout != Layout.PLAIN else x_TD.clone(), layout)
    normed = normalise(x_TD, norm)
    return quantize(normed if layout != Layout.PLAIN else normed.to(x_TD.dtype), layout)
