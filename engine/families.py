"""Families: a Hugging Face config and its tensor names become a spec.

A new family is one entry in `FAMILIES`: how its config reads (`spec`) and what its checkpoint
calls each tensor (`tensors`). The decoder never asks which family it runs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from .spec import DecoderSpec, Rotary


@dataclass(frozen=True)
class Slice:
    """A tensor that is a part of a packed one in the checkpoint."""

    name: str
    take: Callable[[torch.Tensor, DecoderSpec], torch.Tensor]


@dataclass(frozen=True)
class Family:
    """How one family's config and checkpoint are read."""

    spec: Callable[[Mapping[str, Any]], DecoderSpec]
    """config.json -> spec; ValueError for a setting the decoder does not have."""
    tensors: Mapping[str, str | Slice]
    """Role -> checkpoint name without `.weight` or `.bias`; `{i}` is the layer."""


_LLAMA_TENSORS: dict[str, str | Slice] = {
    "embedding": "model.embed_tokens",
    "final_norm": "model.norm",
    "head": "lm_head",
    "attention_norm": "model.layers.{i}.input_layernorm",
    "q": "model.layers.{i}.self_attn.q_proj",
    "k": "model.layers.{i}.self_attn.k_proj",
    "v": "model.layers.{i}.self_attn.v_proj",
    "q_norm": "model.layers.{i}.self_attn.q_norm",
    "k_norm": "model.layers.{i}.self_attn.k_norm",
    "output": "model.layers.{i}.self_attn.o_proj",
    "mlp_norm": "model.layers.{i}.post_attention_layernorm",
    "gate": "model.layers.{i}.mlp.gate_proj",
    "up": "model.layers.{i}.mlp.up_proj",
    "down": "model.layers.{i}.mlp.down_proj",
}


def _internlm2_part(part: str) -> Callable[[torch.Tensor, DecoderSpec], torch.Tensor]:
    """Rows of `wqkv`: for every key head its query heads, then the key, then the value."""

    def take(packed: torch.Tensor, spec: DecoderSpec) -> torch.Tensor:
        group = spec.num_heads // spec.num_kv_heads
        heads = packed.view(spec.num_kv_heads, group + 2, spec.head_dim, *packed.shape[1:])
        chosen = {"q": heads[:, :group], "k": heads[:, group], "v": heads[:, group + 1]}[part]
        return chosen.reshape(-1, *packed.shape[1:])

    return take


_INTERNLM2_TENSORS: dict[str, str | Slice] = {
    "embedding": "model.tok_embeddings",
    "final_norm": "model.norm",
    "head": "output",
    "attention_norm": "model.layers.{i}.attention_norm",
    **{
        part: Slice("model.layers.{i}.attention.wqkv", _internlm2_part(part))
        for part in ("q", "k", "v")
    },
    "output": "model.layers.{i}.attention.wo",
    "mlp_norm": "model.layers.{i}.ffn_norm",
    "gate": "model.layers.{i}.feed_forward.w1",
    "up": "model.layers.{i}.feed_forward.w3",
    "down": "model.layers.{i}.feed_forward.w2",
}

_HIDDEN_ACT = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}


def _read(config: Mapping[str, Any], model_type: str) -> Any:
    """The config as transformers reads it: defaults filled in, rotary settings standardised."""
    from transformers import AutoConfig

    fields = {k: v for k, v in config.items() if k not in ("model_type", "auto_map")}
    return AutoConfig.for_model(model_type, **fields)


def _spec(config: Any, **biases: bool) -> DecoderSpec:
    """The spec of a Llama-like config object; `biases` are the spec's own fields."""
    if config.hidden_act not in _HIDDEN_ACT:
        raise ValueError(
            f"hidden_act: {config.hidden_act!r} is not one of {', '.join(_HIDDEN_ACT)}"
        )
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    sliding = getattr(config, "sliding_window", None)
    layer_types = getattr(config, "layer_types", None) or (
        ["sliding_attention" if sliding else "full_attention"] * config.num_hidden_layers
    )
    return DecoderSpec(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_layers=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads or config.num_attention_heads,
        head_dim=head_dim,
        norm_eps=config.rms_norm_eps,
        rotary=Rotary(
            dim=head_dim,
            max_positions=config.max_position_embeddings,
            parameters=config.rope_parameters,
        ),
        max_positions=config.max_position_embeddings,
        activation=_HIDDEN_ACT[config.hidden_act],
        tied_head=bool(config.tie_word_embeddings),
        windows=tuple(sliding if kind == "sliding_attention" else None for kind in layer_types),
        **biases,
    )


def _llama(config: Mapping[str, Any]) -> DecoderSpec:
    c = _read(config, "llama")
    bias = bool(c.attention_bias)
    return _spec(c, qkv_bias=bias, output_bias=bias, mlp_bias=bool(c.mlp_bias))


def _mistral(config: Mapping[str, Any]) -> DecoderSpec:
    return _spec(_read(config, "mistral"))


def _qwen2(config: Mapping[str, Any]) -> DecoderSpec:
    return _spec(_read(config, "qwen2"), qkv_bias=True)


def _qwen3(config: Mapping[str, Any]) -> DecoderSpec:
    c = _read(config, "qwen3")
    bias = bool(c.attention_bias)
    return _spec(c, qkv_bias=bias, output_bias=bias, qk_norm=True)


def _internlm2(config: Mapping[str, Any]) -> DecoderSpec:
    # InternLM2 is Llama with its own tensor names; transformers has no class for it.
    bias = bool(config.get("bias", False))
    return _llama({**config, "attention_bias": bias})


FAMILIES: dict[str, Family] = {
    "LlamaForCausalLM": Family(_llama, _LLAMA_TENSORS),
    "MistralForCausalLM": Family(_mistral, _LLAMA_TENSORS),
    "Qwen2ForCausalLM": Family(_qwen2, _LLAMA_TENSORS),
    "Qwen3ForCausalLM": Family(_qwen3, _LLAMA_TENSORS),
    "InternLM2ForCausalLM": Family(_internlm2, _INTERNLM2_TENSORS),
}
"""By `architectures[0]` of config.json. What is not here runs through `fallback.py`."""
