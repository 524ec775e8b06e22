"""What a decoder is, as data: one spec per model, one decoder for all of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch


class NotNative(ValueError):
    """A setting that the decoder does not have: transformers has to run the model."""


@dataclass(frozen=True, kw_only=True)
class Rotary:
    """Rotary positions: which dimensions turn, and how fast."""

    dim: int
    """Leading dimensions of each head that turn."""
    max_positions: int
    """The config's `max_position_embeddings`, which `dynamic`, `yarn` and `longrope` refer to."""
    parameters: Mapping[str, Any] = field(default_factory=dict)
    """transformers' `rope_parameters`: `rope_type`, `rope_theta` and the type's own settings."""
    interleaved: bool = False
    """Whether neighbours turn together in the checkpoint, and not i with i + dim / 2."""

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
        raise NotNative(f"rope_type: {kind!r} is not one of {known}")
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
class Norm:
    """y = (x - mean(x)) / sqrt(mean(x^2) + eps) * weight + bias; the mean only where `centred`."""

    eps: float
    centred: bool = False
    """Whether it is a LayerNorm; else it is an RMSNorm."""
    bias: bool = False
    offset: float = 0.0
    """What is added to the weight as it is stored (Gemma stores it less one)."""


@dataclass(frozen=True, kw_only=True)
class FeedForward:
    """down(activation(gate(x)) * up(x)), or down(activation(up(x))) where there is no gate."""

    size: int
    """Columns in between."""
    activation: str = "silu"
    """A name of `kernels.activations.ACTIVATIONS`, or `SWIGLU_CLAMPED`."""
    gated: bool = True
    up_bias: bool = False
    down_bias: bool = False


@dataclass(frozen=True, kw_only=True)
class Router:
    """Which experts take a token, and how much of each; scores are float32."""

    num_experts: int
    top_k: int
    scores: str = "softmax"
    """`softmax` over all experts, `sigmoid` of each, or `softmax_top` over the chosen ones."""
    normalised: bool = False
    """Whether the chosen scores are divided by their sum."""
    scale: float = 1.0
    """What the weights are multiplied by, last."""
    bias: bool = False
    """Whether the router's linear has a bias, which is part of the scores (gpt-oss)."""
    correction: bool = False
    """Whether a bias for each expert is added for the choice alone (DeepSeek-V3)."""
    num_groups: int = 1
    """Groups of neighbouring experts; the best `top_groups` by the sum of their two best scores
    may be chosen from."""
    top_groups: int = 1

    def __post_init__(self) -> None:
        if not 0 < self.top_k <= self.num_experts:
            raise ValueError(
                f"num_experts_per_tok: {self.top_k} is not from 1 to the {self.num_experts} experts"
            )
        if self.num_experts % self.num_groups or not 0 < self.top_groups <= self.num_groups:
            raise ValueError(
                f"n_group, topk_group: {self.num_groups} groups do not divide {self.num_experts} "
                f"experts, or {self.top_groups} of them are not to be had"
            )


@dataclass(frozen=True, kw_only=True)
class Experts:
    """A sum of feed-forwards that a router chooses for each token, and of one that all share."""

    router: Router
    expert: FeedForward
    """The shape of every expert."""
    shared: FeedForward | None = None
    """What every token also passes through."""
    shared_gate: bool = False
    """Whether the shared part is multiplied by the sigmoid of a linear of its own (Qwen2-MoE)."""


@dataclass(frozen=True, kw_only=True)
class Latent:
    """Queries, keys and values through narrow latents (multi-head latent attention)."""

    q_rank: int | None
    """Columns of the queries' latent; None where they have none."""
    kv_rank: int
    rope_dim: int
    """Dimensions of a head that are turned, in keys one part for all heads."""
    nope_dim: int
    """Dimensions of a head that are not."""
    value_dim: int
    norm: Norm
    """Of the latents."""
    bias: bool = False
    """Whether the linears to the latents have biases."""


@dataclass(frozen=True, kw_only=True)
class Layer:
    """What layers of one model may differ in."""

    window: int | None
    """Sliding window of attention in tokens, None for full attention."""
    rotary: Rotary | None
    """None for a layer that does not know where its tokens are."""
    feed_forward: FeedForward | Experts

    def __post_init__(self) -> None:
        if self.window is not None and self.window < 1:
            raise ValueError(f"sliding_window: {self.window} is not at least 1")


@dataclass(frozen=True, kw_only=True)
class DecoderSpec:
    """A decoder: x += attention(norm(x)); x += feed_forward(norm(x)), layer by layer.

    Norms may also (`post_norm`) or only (not `pre_norm`) stand behind attention and feed-forward;
    with `parallel` both take the same x.
    """

    vocab_size: int
    """Rows of the head, which may be more than the tokenizer has tokens."""
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_positions: int
    """Longest sequence the model was made for."""
    layers: tuple[Layer, ...]
    norm: Norm
    pre_norm: bool = True
    post_norm: bool = False
    parallel: bool = False
    shared_norm: bool = False
    """Whether a parallel layer has one norm for both of its parts."""
    scale: float
    """What products of queries and keys are multiplied by."""
    soft_cap: float | None = None
    """c of c * tanh(score / c), which scores pass through."""
    sinks: bool = False
    """Whether each head has one more score, of nothing, that the others compete with."""
    qk_norm: Norm | None = None
    """Of queries and keys before they are turned."""
    qk_norm_of_row: bool = False
    """Whether it is of all heads together, with a weight for each of their columns."""
    qkv_bias: bool = False
    output_bias: bool = False
    latent: Latent | None = None
    """How queries, keys and values are made, where it is not by a linear."""
    positions: int | None = None
    """Rows of a table that is added to the embeddings, by position (GPT-2)."""
    embedding_scale: float | None = None
    """What embeddings are multiplied by, rounded to their dtype before."""
    residual_scale: float = 1.0
    """What attention and feed-forward are multiplied by before they are added."""
    tied_head: bool = False
    """Whether the head is the embedding table."""
    logit_scale: float = 1.0
    logit_cap: float | None = None
    """c of c * tanh(logit / c)."""

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_key_value_heads: {self.num_kv_heads} does not divide "
                f"num_attention_heads {self.num_heads}"
            )

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def q_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.num_kv_heads * self.head_dim

    @property
    def value_dim(self) -> int:
        """Columns of a value's head."""
        return self.head_dim if self.latent is None else self.latent.value_dim
