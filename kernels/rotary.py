"""Rotary position embedding (Su et al. 2021), in the half-split layout of Hugging Face weights."""

from __future__ import annotations

import torch


def rotate(x_THD: torch.Tensor, cos_TD: torch.Tensor, sin_TD: torch.Tensor) -> torch.Tensor:
    """Turn the leading rotary dimensions of every head by the token's angles.

    T tokens, H heads, D head size. `cos_TD` and `sin_TD` [T, R/2] hold the angles of the R <= D
    rotated dimensions; dimension i is paired with i + R/2, and what lies beyond R passes through.
    """
    half = cos_TD.shape[-1]
    cos, sin = cos_TD[:, None], sin_TD[:, None]
    out = torch.empty_like(x_THD)
    first, second = x_THD[..., :half], x_THD[..., half : 2 * half]
    torch.mul(first, cos, out=out[..., :half]).sub_(second * sin)
    torch.mul(second, cos, out=out[..., half : 2 * half]).add_(first * sin)
    if 2 * half < x_THD.shape[-1]:
        out[..., 2 * half :] = x_THD[..., 2 * half :]
    return out
