"""Looking into a decoder's layers, and changing what goes from one to the next.

Legend: T packed tokens, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True)
class PackedTokens:
    """The tokens of one batch, sequence after sequence."""

    ids_T: torch.Tensor
    """int64 on the device."""
    positions_T: np.ndarray
    """int64: each token's place in its sequence, from 0."""
    sequences_T: np.ndarray
    """int64: which sequence of the batch it belongs to, from 0."""


Hook = Callable[[int, torch.Tensor, PackedTokens], torch.Tensor | None]
"""(layer from 0, residual stream after the layer [T, D], its tokens) -> what takes its place.

The states are a copy in the model's dtype on its device: changed in place they change nothing. With
None the stream goes on as it was, to the bit.
"""


def apply(
    hooks: Sequence[Hook], layer: int, states_TD: torch.Tensor, tokens: PackedTokens
) -> torch.Tensor | None:
    """What the hooks make of the states, one after the other; None if all leave them alone.

    Raises:
        ValueError: for states of another shape or dtype, or on another device.
    """
    changed = None
    for hook in hooks:
        before = states_TD if changed is None else changed
        after = hook(layer, before.clone(), tokens)
        if after is None:
            continue
        if not isinstance(after, torch.Tensor):
            raise ValueError(
                f"hook: it returned a {type(after).__name__} after layer {layer}; "
                "return a tensor, or None to change nothing"
            )
        for name in ("shape", "dtype", "device"):
            wanted, found = getattr(before, name), getattr(after, name)
            if wanted != found:
                raise ValueError(
                    f"hook: after layer {layer} it returned states of {name} {found}, "
                    f"and the layer's have {wanted}"
                )
        changed = after
    return changed
