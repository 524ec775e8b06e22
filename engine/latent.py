"""Queries, keys and values through narrow latents (multi-head latent attention, DeepSeek-V2).

Legend: T tokens, H heads, D size of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..kernels.norms import NormWeights, add_norm
from ..kernels.quantize import Activations, Layout
from .formats import Linear
from .spec import Latent


@dataclass(frozen=True)
class LatentProjection:
    """Normed activations -> query, key and value heads of one size, side by side.

    Keys share one turned part. Heads lie with the turned part first; values are filled up with
    zeros to the size of a head. Nothing is absorbed: a prefill has as many queries as keys.
    """

    shape_of: Latent
    num_heads: int
    down: Linear
    """The query's latent (or the queries themselves), the keys' latent, and the turned part."""
    q_norm: NormWeights | None
    q_up: Linear | None
    """None where queries have no latent."""
    kv_norm: NormWeights
    kv_up: Linear
    """Of every head the part of the key that is not turned, then the value."""

    @property
    def layout(self) -> Layout:
        """How it takes its input."""
        return self.down.layout

    @property
    def linears(self) -> Sequence[Linear]:
        """Its products of all rows, whose bits may go by the number of rows."""
        return [x for x in (self.down, self.q_up, self.kv_up) if x is not None]

    def __call__(self, x: Activations) -> torch.Tensor:
        """[T, 3 H D] in the dtype of the arithmetic."""
        sizes = self.shape_of
        turned, still = sizes.rope_dim, sizes.nope_dim
        compressed = self.down(x)
        rest = sizes.kv_rank + turned
        q, kv, shared = compressed.split([compressed.shape[1] - rest, sizes.kv_rank, turned], 1)
        if self.q_up is not None:
            assert self.q_norm is not None
            q = self.q_up(add_norm(q.contiguous(), None, self.q_norm, self.q_up.layout))
        kv = self.kv_up(add_norm(kv.contiguous(), None, self.kv_norm, self.kv_up.layout))
        q_THD, kv_THD = q.unflatten(1, (self.num_heads, -1)), kv.unflatten(1, (self.num_heads, -1))
        out = kv.new_empty(len(kv), 3, self.num_heads, turned + still)
        out[:, 0, :, :turned] = q_THD[..., still:]
        out[:, 0, :, turned:] = q_THD[..., :still]
        out[:, 1, :, :turned] = shared[:, None]
        out[:, 1, :, turned:] = kv_THD[..., :still]
        out[:, 2, :, : sizes.value_dim] = kv_THD[..., still:]
        out[:, 2, :, sizes.value_dim :] = 0
        return out.flatten(1)
