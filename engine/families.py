"""Families: a Hugging Face config and its tensor names become a spec.

A new family is one entry in `FAMILIES`: how its config reads (`spec`) and what its checkpoint
calls each tensor (`tensors`). The decoder never asks which family it runs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..kernels.activations import SWIGLU_CLAMPED, SWIGLU_LIMIT
from .spec import (
    DecoderSpec,
    Experts,
    FeedForward,
    Latent,
    Layer,
    Norm,
    NotNative,
    Rotary,
    Router,
)


@dataclass(frozen=True)
class Slice:
    """A tensor that is a part of a packed one in the checkpoint."""

    name: str
    take: Callable[[torch.Tensor, DecoderSpec, Mapping[str, int]], torch.Tensor]
    """(packed, spec, rows of every role that is packed) -> the role's rows."""


Tensors = Mapping[str, str | Slice]
"""Role -> checkpoint name without `.weight` or `.bias`; `{i}` is the layer, `{e}` the expert."""


@dataclass(frozen=True)
class Family:
    """How one family's config and checkpoint are read."""

    spec: Callable[[Mapping[str, Any]], DecoderSpec]
    """config.json -> spec; `NotNative` for a setting the decoder does not have."""
    tensors: Tensors | Callable[[Mapping[str, Any]], Tensors]
    """Names, or config.json -> names where they go by it."""
    prefixes: Sequence[str] = ()
    """What names begin with in `tensors`, and what they begin with in some checkpoints instead."""
    transposed: bool = False
    """Whether linears are stored [inputs, outputs]."""

    def tensors_of(self, config: Mapping[str, Any]) -> Tensors:
        """The names in a checkpoint with this config.json."""
        return self.tensors(config) if callable(self.tensors) else self.tensors


# ---- names -----------------------------------------------------------------------------------


def _stacked(name: str, *roles: str) -> dict[str, Slice]:
    """Roles whose rows lie one after another in one tensor."""

    def part(i: int) -> Callable[[torch.Tensor, DecoderSpec, Mapping[str, int]], torch.Tensor]:
        return lambda packed, spec, rows: packed.split([rows[role] for role in roles])[i]

    return {role: Slice(name, part(i)) for i, role in enumerate(roles)}


def _grouped(name: str) -> dict[str, Slice]:
    """For every key head its query heads, then the key, then the value."""

    def part(role: str) -> Callable[[torch.Tensor, DecoderSpec, Mapping[str, int]], torch.Tensor]:
        def take(packed: torch.Tensor, spec: DecoderSpec, rows: Mapping[str, int]) -> torch.Tensor:
            group = spec.num_heads // spec.num_kv_heads
            heads = packed.view(spec.num_kv_heads, group + 2, spec.head_dim, *packed.shape[1:])
            chosen = {"q": heads[:, :group], "k": heads[:, group], "v": heads[:, group + 1]}
            return chosen[role].reshape(-1, *packed.shape[1:])

        return take

    return {role: Slice(name, part(role)) for role in ("q", "k", "v")}


_Names = dict[str, str | Slice]

_LLAMA: _Names = {
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
_GATE_UP = _stacked("model.layers.{i}.mlp.gate_up_proj", "gate", "up")
_PHI3 = _LLAMA | _stacked("model.layers.{i}.self_attn.qkv_proj", "q", "k", "v") | _GATE_UP
_GEMMA2: _Names = _LLAMA | {
    "attention_post_norm": "model.layers.{i}.post_attention_layernorm",
    "mlp_norm": "model.layers.{i}.pre_feedforward_layernorm",
    "mlp_post_norm": "model.layers.{i}.post_feedforward_layernorm",
}
_GLM4 = (
    _LLAMA
    | _GATE_UP
    | {
        "attention_post_norm": "model.layers.{i}.post_self_attn_layernorm",
        "mlp_post_norm": "model.layers.{i}.post_mlp_layernorm",
    }
)
_INTERNLM2: _Names = {
    "embedding": "model.tok_embeddings",
    "final_norm": "model.norm",
    "head": "output",
    "attention_norm": "model.layers.{i}.attention_norm",
    **_grouped("model.layers.{i}.attention.wqkv"),
    "output": "model.layers.{i}.attention.wo",
    "mlp_norm": "model.layers.{i}.ffn_norm",
    "gate": "model.layers.{i}.feed_forward.w1",
    "up": "model.layers.{i}.feed_forward.w3",
    "down": "model.layers.{i}.feed_forward.w2",
}
_GPT2: _Names = {
    "embedding": "transformer.wte",
    "positions": "transformer.wpe",
    "final_norm": "transformer.ln_f",
    "head": "lm_head",
    "attention_norm": "transformer.h.{i}.ln_1",
    **_stacked("transformer.h.{i}.attn.c_attn", "q", "k", "v"),
    "output": "transformer.h.{i}.attn.c_proj",
    "mlp_norm": "transformer.h.{i}.ln_2",
    "up": "transformer.h.{i}.mlp.c_fc",
    "down": "transformer.h.{i}.mlp.c_proj",
}
_GPT_NEOX: _Names = {
    "embedding": "gpt_neox.embed_in",
    "final_norm": "gpt_neox.final_layer_norm",
    "head": "embed_out",
    "attention_norm": "gpt_neox.layers.{i}.input_layernorm",
    **_grouped("gpt_neox.layers.{i}.attention.query_key_value"),
    "output": "gpt_neox.layers.{i}.attention.dense",
    "mlp_norm": "gpt_neox.layers.{i}.post_attention_layernorm",
    "up": "gpt_neox.layers.{i}.mlp.dense_h_to_4h",
    "down": "gpt_neox.layers.{i}.mlp.dense_4h_to_h",
}


_QWEN_EXPERTS: _Names = {
    "router": "model.layers.{i}.mlp.gate",
    "expert_gate": "model.layers.{i}.mlp.experts.{e}.gate_proj",
    "expert_up": "model.layers.{i}.mlp.experts.{e}.up_proj",
    "expert_down": "model.layers.{i}.mlp.experts.{e}.down_proj",
    "shared_gate": "model.layers.{i}.mlp.shared_expert.gate_proj",
    "shared_up": "model.layers.{i}.mlp.shared_expert.up_proj",
    "shared_down": "model.layers.{i}.mlp.shared_expert.down_proj",
    "shared_expert_gate": "model.layers.{i}.mlp.shared_expert_gate",
}
_MIXTRAL_EXPERTS: _Names = {
    "router": "model.layers.{i}.block_sparse_moe.gate",
    "correction": "model.layers.{i}.block_sparse_moe.e_score_correction_bias",
    "expert_gate": "model.layers.{i}.block_sparse_moe.experts.{e}.w1",
    "expert_up": "model.layers.{i}.block_sparse_moe.experts.{e}.w3",
    "expert_down": "model.layers.{i}.block_sparse_moe.experts.{e}.w2",
}
_GPT_OSS: _Names = _LLAMA | {
    "sinks": "model.layers.{i}.self_attn.sinks",
    "router": "model.layers.{i}.mlp.router",
    "expert_gate_up": "model.layers.{i}.mlp.experts.gate_up_proj",
    "expert_down": "model.layers.{i}.mlp.experts.down_proj",
}
_DEEPSEEK: _Names = (
    _LLAMA
    | _QWEN_EXPERTS
    | {
        "q_down": "model.layers.{i}.self_attn.q_a_proj",
        "q_down_norm": "model.layers.{i}.self_attn.q_a_layernorm",
        "q_up": "model.layers.{i}.self_attn.q_b_proj",
        "kv_down": "model.layers.{i}.self_attn.kv_a_proj_with_mqa",
        "kv_down_norm": "model.layers.{i}.self_attn.kv_a_layernorm",
        "kv_up": "model.layers.{i}.self_attn.kv_b_proj",
        "correction": "model.layers.{i}.mlp.gate.e_score_correction_bias",
        "shared_gate": "model.layers.{i}.mlp.shared_experts.gate_proj",
        "shared_up": "model.layers.{i}.mlp.shared_experts.up_proj",
        "shared_down": "model.layers.{i}.mlp.shared_experts.down_proj",
    }
)


def _falcon_tensors(config: Mapping[str, Any]) -> Tensors:
    c = _read(config, "falcon")
    packed = "transformer.h.{i}.self_attention.query_key_value"
    stacked = c.multi_query and not c.new_decoder_architecture
    first, second = "input_layernorm", "post_attention_layernorm"
    if _falcon_norms(c) == 2:
        first, second = "ln_attn", "ln_mlp"
    return {
        "embedding": "transformer.word_embeddings",
        "final_norm": "transformer.ln_f",
        "head": "lm_head",
        "attention_norm": f"transformer.h.{{i}}.{first}",
        **(_stacked(packed, "q", "k", "v") if stacked else _grouped(packed)),
        "output": "transformer.h.{i}.self_attention.dense",
        "mlp_norm": f"transformer.h.{{i}}.{second}",
        "up": "transformer.h.{i}.mlp.dense_h_to_4h",
        "down": "transformer.h.{i}.mlp.dense_4h_to_h",
    }


# ---- configs ---------------------------------------------------------------------------------

_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "relu2": "relu2",
}


_COUNTS = (
    *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "n_embd", "n_layer", "n_head", "num_kv_heads"),
)


def _read(config: Mapping[str, Any], model_type: str) -> Any:
    """The config as transformers reads it: defaults filled in, rotary settings standardised."""
    from transformers import AutoConfig

    fields = {k: v for k, v in config.items() if k not in ("model_type", "auto_map")}
    for name in _COUNTS:
        if isinstance(fields.get(name), int) and fields[name] < 1:
            raise ValueError(
                f"model: config.json says {name} {fields[name]}, which is not at least 1"
            )
    try:
        return AutoConfig.for_model(model_type, **fields)
    except Exception as error:
        # transformers checks with exceptions of several libraries, some of many lines.
        said = " ".join(str(error).split())
        raise ValueError(f"model: config.json does not read as {model_type}: {said}") from None


def _activation(field: str, name: str) -> str:
    if name not in _ACTIVATIONS:
        raise NotNative(f"{field}: {name!r} is not one of {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[name]


def _rms(config: Any, *, offset: float = 0.0) -> Norm:
    return Norm(eps=config.rms_norm_eps, offset=offset)


def _head_dim(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _gated(config: Any, *, bias: bool = False, field: str = "hidden_act") -> FeedForward:
    return FeedForward(
        size=config.intermediate_size,
        activation=_activation(field, getattr(config, field)),
        up_bias=bias,
        down_bias=bias,
    )


def _plain(size: int, field: str, activation: str, *, bias: bool = True) -> FeedForward:
    return FeedForward(
        size=size,
        activation=_activation(field, activation),
        gated=False,
        up_bias=bias,
        down_bias=bias,
    )


def _expert(config: Any, size: int) -> FeedForward:
    return FeedForward(size=size, activation=_activation("hidden_act", config.hidden_act))


def _rotary(config: Any, parameters: Mapping[str, Any], interleaved: bool) -> Rotary:
    rest = dict(parameters)
    factor = rest.pop("partial_rotary_factor", None)
    rotary = Rotary(
        dim=int(_head_dim(config) * (1.0 if factor is None else factor)),
        max_positions=config.max_position_embeddings,
        parameters=rest,
        interleaved=interleaved,
    )
    try:
        rotary.frequencies(1)
    except KeyError as error:
        raise ValueError(
            f"rope_parameters: {rest['rope_type']!r} needs {error.args[0]!r}, which config.json "
            "does not give"
        ) from None
    return rotary


def _layers(
    config: Any,
    feed_forwards: FeedForward | Experts | Sequence[FeedForward | Experts],
    *,
    windows: str = "none",
    turned: Callable[[int, str], bool] = lambda i, kind: True,
    interleaved: bool = False,
) -> tuple[Layer, ...]:
    """Layers of a config.

    `windows` says which slide: `none`, whatever the config holds, `all`, or those that are
    `typed` so in `layer_types`; `turned` says of a layer and its type whether it has a rotary.
    """
    count = config.num_hidden_layers
    sliding = config.sliding_window if windows != "none" else None
    kinds = ["sliding_attention" if sliding else "full_attention"] * count
    if windows == "typed":
        kinds = config.layer_types
        if len(kinds) != count:
            raise ValueError(f"layer_types: {len(kinds)} layers, but num_hidden_layers is {count}")
    unknown = set(kinds) - {"sliding_attention", "full_attention"}
    if unknown:
        raise NotNative(f"layer_types: {min(unknown)!r} is not sliding_attention or full_attention")
    parameters = config.rope_parameters
    nested = not set(kinds).isdisjoint(parameters)
    rotaries = {
        kind: _rotary(config, parameters[kind] if nested else parameters, interleaved)
        for kind in set(kinds)
    }
    if isinstance(feed_forwards, FeedForward | Experts):
        feed_forwards = [feed_forwards] * count
    return tuple(
        Layer(
            window=sliding if kind == "sliding_attention" else None,
            rotary=rotaries[kind] if turned(i, kind) else None,
            feed_forward=feed_forwards[i],
        )
        for i, kind in enumerate(kinds)
    )


def _spec(config: Any, layers: tuple[Layer, ...], norm: Norm, **own: Any) -> DecoderSpec:
    """The spec of a config object with the usual names; `own` are fields that differ."""
    heads = config.num_attention_heads
    head_dim = _head_dim(config)
    usual = {
        "head_dim": head_dim,
        "num_kv_heads": getattr(config, "num_key_value_heads", None) or heads,
        "scale": head_dim**-0.5,
        "tied_head": bool(config.tie_word_embeddings),
    }
    return DecoderSpec(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        num_heads=heads,
        max_positions=config.max_position_embeddings,
        layers=layers,
        norm=norm,
        **(usual | own),
    )


def _llama(
    config: Mapping[str, Any], model_type: str = "llama", windows: str = "none", **own: Any
) -> DecoderSpec:
    c = _read(config, model_type)
    bias = bool(getattr(c, "attention_bias", False))
    feed_forward = _gated(c, bias=bool(getattr(c, "mlp_bias", False)))
    layers = _layers(c, feed_forward, windows=windows)
    return _spec(c, layers, _rms(c), **({"qkv_bias": bias, "output_bias": bias} | own))


def _mistral(config: Mapping[str, Any]) -> DecoderSpec:
    return _llama(config, "mistral", "all")


def _ministral(config: Mapping[str, Any]) -> DecoderSpec:
    return _llama(config, "ministral", "typed")


def _qwen2(config: Mapping[str, Any]) -> DecoderSpec:
    return _llama(config, "qwen2", "typed", qkv_bias=True)


def _qwen3(config: Mapping[str, Any]) -> DecoderSpec:
    return _llama(config, "qwen3", "typed", qk_norm=_rms(_read(config, "qwen3")))


def _internlm2(config: Mapping[str, Any]) -> DecoderSpec:
    # transformers has no class for it: it is Llama with its own tensor names.
    return _llama({**config, "attention_bias": bool(config.get("bias", False))})


def _internlm3(config: Mapping[str, Any]) -> DecoderSpec:
    # transformers has no class for it: it is Llama with biases of its own.
    bias = bool(config.get("bias", False))
    fields = {**config, "attention_bias": bias, "mlp_bias": bias}
    return _llama(fields, qkv_bias=bool(config.get("qkv_bias", False)), output_bias=bias)


def _phi3(config: Mapping[str, Any]) -> DecoderSpec:
    return _llama(config, "phi3", "all")


def _gemma(
    config: Mapping[str, Any], model_type: str = "gemma", windows: str = "none", **own: Any
) -> DecoderSpec:
    c = _read(config, model_type)
    if getattr(c, "use_bidirectional_attention", False):
        raise NotNative("use_bidirectional_attention: true, and the decoder is causal")
    field = "hidden_act" if model_type == "gemma" else "hidden_activation"
    bias = bool(c.attention_bias)
    usual = {
        "qkv_bias": bias,
        "output_bias": bias,
        "embedding_scale": c.hidden_size**0.5,
    }
    layers = _layers(c, _gated(c, field=field), windows=windows)
    return _spec(c, layers, _rms(c, offset=1.0), **(usual | own))


def _gemma2(config: Mapping[str, Any], model_type: str = "gemma2", **own: Any) -> DecoderSpec:
    c = _read(config, model_type)
    return _gemma(
        config,
        model_type,
        "typed",
        post_norm=True,
        scale=c.query_pre_attn_scalar**-0.5,
        soft_cap=c.attn_logit_softcapping,
        logit_cap=c.final_logit_softcapping,
        **own,
    )


def _gemma3(config: Mapping[str, Any]) -> DecoderSpec:
    c = _read(config, "gemma3_text")
    return _gemma2(config, "gemma3_text", qk_norm=_rms(c, offset=1.0))


def _glm(config: Mapping[str, Any], model_type: str = "glm", **own: Any) -> DecoderSpec:
    c = _read(config, model_type)
    layers = _layers(c, _gated(c), interleaved=True)
    return _spec(c, layers, _rms(c), qkv_bias=bool(c.attention_bias), **own)


def _glm4(config: Mapping[str, Any]) -> DecoderSpec:
    return _glm(config, "glm4", post_norm=True)


def _olmo2(
    config: Mapping[str, Any], model_type: str = "olmo2", windows: str = "none"
) -> DecoderSpec:
    return _llama(
        config,
        model_type,
        windows,
        pre_norm=False,
        post_norm=True,
        qk_norm=_rms(_read(config, model_type)),
        qk_norm_of_row=True,
    )


def _olmo3(config: Mapping[str, Any]) -> DecoderSpec:
    return _olmo2(config, "olmo3", "typed")


def _smollm3(config: Mapping[str, Any]) -> DecoderSpec:
    c = _read(config, "smollm3")
    if len(c.no_rope_layers) != c.num_hidden_layers:
        raise ValueError(
            f"no_rope_layers: {len(c.no_rope_layers)} layers, but num_hidden_layers is "
            f"{c.num_hidden_layers}"
        )
    bias = bool(c.attention_bias)
    layers = _layers(
        c,
        _gated(c, bias=bool(c.mlp_bias)),
        windows="typed" if c.use_sliding_window else "none",
        turned=lambda i, kind: bool(c.no_rope_layers[i]),
    )
    return _spec(c, layers, _rms(c), qkv_bias=bias, output_bias=bias)


def _granite(config: Mapping[str, Any]) -> DecoderSpec:
    c = _read(config, "granite")
    return _llama(
        config,
        "granite",
        scale=c.attention_multiplier,
        embedding_scale=c.embedding_multiplier,
        residual_scale=c.residual_multiplier,
        logit_scale=1.0 / c.logits_scaling,
    )


def _stablelm(config: Mapping[str, Any]) -> DecoderSpec:
    c = _read(config, "stablelm")
    if c.qk_layernorm:
        raise NotNative("qk_layernorm: true, and the decoder has no norm for each head alone")
    return _spec(
        c,
        _layers(c, _gated(c)),
        Norm(eps=c.layer_norm_eps, centred=True, bias=True),
        qkv_bias=bool(c.use_qkv_bias),
        parallel=bool(c.use_parallel_residual),
        shared_norm=bool(c.use_parallel_residual),
    )


def _cohere2(config: Mapping[str, Any]) -> DecoderSpec:
    c = _read(config, "cohere2")
    bias = bool(c.attention_bias)
    return _spec(
        c,
        # Only layers with a window know where their tokens are.
        _layers(
            c,
            _gated(c),
            windows="typed",
            turned=lambda i, kind: kind == "sliding_attention" and c.sliding_window is not None,
            interleaved=True,
        ),
        Norm(eps=c.layer_norm_eps, centred=True),
        parallel=True,
        shared_norm=True,
        qkv_bias=bias,
        output_bias=bias,
        logit_scale=c.logit_scale,
    )


def _gpt2(config: Mapping[str, Any]) -> DecoderSpec:
    c = _read(config, "gpt2")
    if c.scale_attn_by_inverse_layer_idx:
        raise NotNative("scale_attn_by_inverse_layer_idx: true, and the decoder has one scale")
    if c.add_cross_attention:
        raise NotNative("add_cross_attention: true, and the decoder attends to itself alone")
    feed_forward = _plain(c.n_inner or 4 * c.n_embd, "activation_function", c.activation_function)
    layer = Layer(window=None, rotary=None, feed_forward=feed_forward)
    return _spec(
        c,
        (layer,) * c.n_layer,
        Norm(eps=c.layer_norm_epsilon, centred=True, bias=True),
        positions=c.n_positions,
        qkv_bias=True,
        output_bias=True,
        **({} if c.scale_attn_weights else {"scale": 1.0}),
    )


def _gpt_neox(config: Mapping[str, Any]) -> DecoderSpec:
    c = _read(config, "gpt_neox")
    return _spec(
        c,
        _layers(c, _plain(c.intermediate_size, "hidden_act", c.hidden_act)),
        Norm(eps=c.layer_norm_eps, centred=True, bias=True),
        num_kv_heads=c.num_attention_heads,
        parallel=bool(c.use_parallel_residual),
        qkv_bias=bool(c.attention_bias),
        output_bias=bool(c.attention_bias),
    )


def _falcon_norms(config: Any) -> int:
    """Norms in front of the parts of a parallel layer."""
    if config.num_ln_in_parallel_attn is not None and config.new_decoder_architecture:
        return config.num_ln_in_parallel_attn
    return 2 if config.new_decoder_architecture else 1


def _falcon(config: Mapping[str, Any]) -> DecoderSpec:
    c = _read(config, "falcon")
    if c.alibi:
        raise NotNative("alibi: true, and the decoder turns queries and keys")
    parallel = bool(c.parallel_attn or c.new_decoder_architecture)
    if c.new_decoder_architecture:
        num_kv_heads = c.num_kv_heads
    else:
        num_kv_heads = 1 if c.multi_query else c.num_attention_heads
    return _spec(
        c,
        _layers(c, _plain(c.ffn_hidden_size, "activation", c.activation, bias=bool(c.bias))),
        Norm(eps=c.layer_norm_epsilon, centred=True, bias=True),
        num_kv_heads=num_kv_heads,
        parallel=parallel,
        shared_norm=parallel and _falcon_norms(c) == 1,
        qkv_bias=bool(c.bias),
        output_bias=bool(c.bias),
    )


def _mixtral(config: Mapping[str, Any]) -> DecoderSpec:
    c = _read(config, "mixtral")
    router = Router(num_experts=c.num_local_experts, top_k=c.num_experts_per_tok, normalised=True)
    experts = Experts(router=router, expert=_expert(c, c.intermediate_size))
    return _spec(c, _layers(c, experts, windows="all"), _rms(c))


def _qwen_experts(config: Any, shared_size: int | None) -> list[FeedForward | Experts]:
    """Qwen's layers: of experts every so many, but for those that are named."""
    c = config
    experts = Experts(
        router=Router(
            num_experts=c.num_experts,
            top_k=c.num_experts_per_tok,
            normalised=bool(c.norm_topk_prob),
        ),
        expert=_expert(c, c.moe_intermediate_size),
        shared=None if shared_size is None else _expert(c, shared_size),
        shared_gate=shared_size is not None,
    )
    dense = _gated(c)
    return [
        dense if i in c.mlp_only_layers or (i + 1) % c.decoder_sparse_step else experts
        for i in range(c.num_hidden_layers)
    ]


def _qwen2_moe(config: Mapping[str, Any]) -> DecoderSpec:
    c = _read(config, "qwen2_moe")
    parts = _qwen_experts(c, c.shared_expert_intermediate_size)
    return _spec(c, _layers(c, parts, windows="typed"), _rms(c), qkv_bias=bool(c.qkv_bias))


def _qwen3_moe(config: Mapping[str, Any]) -> DecoderSpec:
    c = _read(config, "qwen3_moe")
    bias = bool(c.attention_bias)
    return _spec(
        c,
        _layers(c, _qwen_experts(c, None), windows="all"),
        _rms(c),
        qk_norm=_rms(c),
        qkv_bias=bias,
        output_bias=bias,
    )


def _olmoe(config: Mapping[str, Any]) -> DecoderSpec:
    c = _read(config, "olmoe")
    if c.clip_qkv is not None:
        raise NotNative(f"clip_qkv: {c.clip_qkv}, and the decoder does not clip")
    bias = bool(c.attention_bias)
    router = Router(
        num_experts=c.num_experts,
        top_k=c.num_experts_per_tok,
        normalised=bool(c.norm_topk_prob),
    )
    return _spec(
        c,
        _layers(c, Experts(router=router, expert=_expert(c, c.intermediate_size))),
        _rms(c),
        qk_norm=_rms(c),
        qk_norm_of_row=True,
        qkv_bias=bias,
        output_bias=bias,
    )


def _gpt_oss(config: Mapping[str, Any]) -> DecoderSpec:
    c = _read(config, "gpt_oss")
    limit = getattr(c, "swiglu_limit", SWIGLU_LIMIT)
    if limit != SWIGLU_LIMIT:
        raise NotNative(f"swiglu_limit: {limit} is not {SWIGLU_LIMIT}")
    bias = bool(c.attention_bias)
    experts = Experts(
        router=Router(
            num_experts=c.num_local_experts,
            top_k=c.num_experts_per_tok,
            scores="softmax_top",
            bias=True,
        ),
        expert=FeedForward(
            size=c.intermediate_size, activation=SWIGLU_CLAMPED, up_bias=True, down_bias=True
        ),
    )
    return _spec(
        c,
        _layers(c, experts, windows="typed"),
        _rms(c),
        sinks=True,
        qkv_bias=bias,
        output_bias=bias,
    )


def _minimax_m2(config: Mapping[str, Any]) -> DecoderSpec:
    c = _read(config, "minimax_m2")
    # Its own code reads `rotary_dim`, which transformers does not.
    if "rotary_dim" in config and "partial_rotary_factor" not in c.rope_parameters:
        c.rope_parameters["partial_rotary_factor"] = config["rotary_dim"] / _head_dim(c)
    router = Router(
        num_experts=c.num_local_experts,
        top_k=c.num_experts_per_tok,
        scores="sigmoid",
        normalised=True,
        correction=True,
    )
    return _spec(
        c,
        _layers(c, Experts(router=router, expert=_expert(c, c.intermediate_size))),
        _rms(c),
        qk_norm=_rms(c),
        qk_norm_of_row=True,
    )


def _sharpen(parameters: Mapping[str, Any]) -> float:
    """What DeepSeek multiplies scores by where positions are scaled (YaRN's `mscale`, squared)."""
    mscale = parameters.get("mscale_all_dim", 0)
    if parameters["rope_type"] == "default" or not mscale or parameters["factor"] <= 1:
        return 1.0
    return (0.1 * mscale * math.log(parameters["factor"]) + 1.0) ** 2


def _deepseek_v3(config: Mapping[str, Any]) -> DecoderSpec:
    c = _read(config, "deepseek_v3")
    experts = Experts(
        router=Router(
            num_experts=c.n_routed_experts,
            top_k=c.num_experts_per_tok,
            scores="sigmoid",
            normalised=bool(c.norm_topk_prob),
            scale=c.routed_scaling_factor,
            correction=True,
            num_groups=c.n_group,
            top_groups=c.topk_group,
        ),
        expert=_expert(c, c.moe_intermediate_size),
        shared=_expert(c, c.moe_intermediate_size * c.n_shared_experts),
    )
    dense = _gated(c)
    parts = [dense if i < c.first_k_dense_replace else experts for i in range(c.num_hidden_layers)]
    head_dim = c.qk_nope_head_dim + c.qk_rope_head_dim
    bias = bool(c.attention_bias)
    return _spec(
        c,
        _layers(c, parts, interleaved=bool(c.rope_interleave)),
        _rms(c),
        head_dim=head_dim,
        num_kv_heads=c.num_attention_heads,
        scale=_sharpen(c.rope_parameters) * head_dim**-0.5,
        output_bias=bias,
        latent=Latent(
            q_rank=c.q_lora_rank,
            kv_rank=c.kv_lora_rank,
            rope_dim=c.qk_rope_head_dim,
            nope_dim=c.qk_nope_head_dim,
            value_dim=c.v_head_dim,
            # Whatever the config says of the others.
            norm=Norm(eps=1e-6),
            bias=bias,
        ),
    )


FAMILIES: dict[str, Family] = {
    "LlamaForCausalLM": Family(_llama, _LLAMA),
    "MistralForCausalLM": Family(_mistral, _LLAMA),
    "MinistralForCausalLM": Family(_ministral, _LLAMA),
    "Qwen2ForCausalLM": Family(_qwen2, _LLAMA),
    "Qwen3ForCausalLM": Family(_qwen3, _LLAMA),
    "InternLM2ForCausalLM": Family(_internlm2, _INTERNLM2),
    "InternLM3ForCausalLM": Family(_internlm3, _LLAMA),
    "Phi3ForCausalLM": Family(_phi3, _PHI3),
    "GemmaForCausalLM": Family(_gemma, _LLAMA),
    "Gemma2ForCausalLM": Family(_gemma2, _GEMMA2),
    "Gemma3ForCausalLM": Family(_gemma3, _GEMMA2),
    "GlmForCausalLM": Family(_glm, _LLAMA | _GATE_UP),
    "Glm4ForCausalLM": Family(_glm4, _GLM4),
    "Olmo2ForCausalLM": Family(_olmo2, _GEMMA2),
    "Olmo3ForCausalLM": Family(_olmo3, _GEMMA2),
    "SmolLM3ForCausalLM": Family(_smollm3, _LLAMA),
    "GraniteForCausalLM": Family(_granite, _LLAMA),
    "StableLmForCausalLM": Family(_stablelm, _LLAMA),
    "Cohere2ForCausalLM": Family(_cohere2, _LLAMA),
    "GPT2LMHeadModel": Family(_gpt2, _GPT2, prefixes=("transformer.", ""), transposed=True),
    "GPTNeoXForCausalLM": Family(_gpt_neox, _GPT_NEOX),
    "FalconForCausalLM": Family(_falcon, _falcon_tensors),
    "MixtralForCausalLM": Family(_mixtral, _LLAMA | _MIXTRAL_EXPERTS),
    "Qwen2MoeForCausalLM": Family(_qwen2_moe, _LLAMA | _QWEN_EXPERTS),
    "Qwen3MoeForCausalLM": Family(_qwen3_moe, _LLAMA | _QWEN_EXPERTS),
    "OlmoeForCausalLM": Family(_olmoe, _LLAMA | _QWEN_EXPERTS),
    "GptOssForCausalLM": Family(_gpt_oss, _GPT_OSS),
    "DeepseekV3ForCausalLM": Family(_deepseek_v3, _DEEPSEEK),
    "MiniMaxM2ForCausalLM": Family(_minimax_m2, _LLAMA | _MIXTRAL_EXPERTS),
}
"""By `architectures[0]` of config.json. What is not here runs through `fallback.py`."""


def find_family(architecture: str) -> Family:
    """The family of an architecture; `NotNative` if there is none."""
    if architecture not in FAMILIES:
        raise NotNative(
            f"{architecture} is none of the {len(FAMILIES)} in README.md's table of models"
        )
    return FAMILIES[architecture]
