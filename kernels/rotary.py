"""Rotary position embedding (Su et al. 2021), in the half-split layout of Hugging Face weights."""

from __future__ import annotations

import torch

from .choice import has_triton
from .norms import NormWeights, normalise


def rotate(
    heads_THD: torch.Tensor,
    cos_TR: torch.Tensor,
    sin_TR: torch.Tensor,
    *,
    num_queries: int,
    q_norm: NormWeights | None = None,
    k_norm: NormWeights | None = None,
    out_THD: torch.Tensor | None = None,
) -> None:
    """Normalise every head, if there are norms, and turn it by the token's angles.

    In place, or into `out`. `heads` and `out` [T, H, D] hold `num_queries` query heads, then key
    heads; each may be a view with a row stride of its own. Norms are RMSNorms of a head, without
    bias. `cos` and `sin` float32 [T, R] hold the angles of the 2R <= D leading dimensions: i is
    paired with i + R, and what lies beyond 2R is not turned. In float32, rounded once.
    """
    out_THD = heads_THD if out_THD is None else out_THD
    if has_triton(heads_THD):
        from .gpu import rotary

        rotary.rotate(heads_THD, cos_TR, sin_TR, num_queries, q_norm, k_norm, out_THD)
        return
    half = cos_TR.shape[-1]
    cos, sin = cos_TR[:, None], sin_TR[:, None]
    for heads, norm in ((slice(num_queries), q_norm), (slice(num_queries, None), k_norm)):
        part, out = heads_THD[:, heads], out_THD[:, heads]
        wide = part.float() if norm is None else normalise(part, norm)
        first, second = wide[..., :half], wide[..., half : 2 * half]
        turned = second * cos + first * sin
        out[..., :half] = first * cos - second * sin
        out[..., half : 2 * half] = turned
        if 2 * half < part.shape[-1] and (norm is not None or out_THD is not heads_THD):
            out[..., 2 * half :] = wide[..., 2 * half :]
