"""What a decoder is, as data: one spec per model, one decoder for all of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch


@dataclass(frozen=True, kw_only=True)
class Rotary:
    """Rotary positions: which dimensions turn, and how fast."""

    dim: int
    """Leading dimensions of each head that turn."""
    max_positions: int
    """The config's `max_position_embeddings`, which `dynamic`, `yarn` and `longrope` refer to."""
    parameters: Mapping[str, Any] = field(default_factory=dict)
    """transformers' `rope_parameters`: `rope_type`, `rope_theta` and the type's own settings."""

    @property
    def depends_on_length(self) -> bool:
        """Whether a long sequence turns at other rates than a short one."""
        return self.parameters["rope_type"] in ("dynamic", "longrope")

    def frequencies(self, length: int) -> tuple[torch.Tensor, float]:
        """Radians a position, float32 [dim / 2], and the factor on cosine and sine.

        `length` is the sequence's number of tokens. The formulas are transformers' own
        (`modeling_rope_utils`), applied to each sequence alone.
        """
        kind = self.parameters["rope_type"]
        if kind == "dynamic":
            length = max(length, self.max_positions)
        elif kind == "longrope":
            # Two tables: one for sequences within the original positions, one for any longer.
            original = self.parameters["original_max_position_embeddings"]
            length = original + int(length > original)
        else:
            length = 0
        key = tuple((name, _frozen(value)) for name, value in sorted(self.parameters.items()))
        return _frequencies(self.dim, self.max_positions, key, length)


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


@lru_cache(maxsize=256)
def _frequencies(
    dim: int, max_positions: int, parameters: tuple[tuple[str, Any], ...], length: int
) -> tuple[torch.Tensor, float]:
    values: dict[str, Any] = {k: list(v) if isinstance(v, tuple) else v for k, v in parameters}
    kind = values["rope_type"]
    if kind == "default":
        exponents = torch.arange(0, dim, 2, dtype=torch.float32) / dim
        return 1.0 / values["rope_theta"] ** exponents, 1.0
    # A model that needs no scaled positions should not wait for these imports.
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    if kind not in ROPE_INIT_FUNCTIONS:
        known = ", ".join(["default", *ROPE_INIT_FUNCTIONS])
        raise ValueError(f"rope_type: {kind!r} is not one of {known}")
    config = LlamaConfig(
        hidden_size=dim,
        num_attention_heads=1,
        head_dim=dim,
        max_position_embeddings=max_positions,
        rope_parameters=values,
    )
    inv_freq, factor = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"), length or None)
    return inv_freq.float(), float(factor)


@dataclass(frozen=True, kw_only=True)
class DecoderSpec:
    """A pre-norm decoder: x += attention(norm(x)); x += feed_forward(norm(x)), layer by layer."""

    vocab_size: int
    """Rows of the head, which may be more than the tokenizer has tokens."""
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    rotary: Rotary
    max_positions: int
    """Longest sequence the model was made for."""
    activation: str = "silu"
    """A name of `kernels.activations.ACTIVATIONS`."""
    qk_norm: bool = False
    """Whether each query and key head is RMS-normalised before it is turned (Qwen3)."""
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    tied_head: bool = False
    """Whether the head is the embedding table."""
    windows: tuple[int | None, ...]
    """Sliding window of each layer's attention in tokens, None for full attention."""

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_key_value_heads: {self.num_kv_heads} does not divide "
                f"num_attention_heads {self.num_heads}"
            )
        assert len(self.windows) == self.num_layers

    @property
    def q_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.num_kv_heads * self.head_dim
