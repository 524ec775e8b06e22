"""Every family against transformers: the same random weights, the same logits."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from logitmill.engine import pipeline
from logitmill.engine.pipeline import EngineSettings, inspect_model, inspect_placement
from oracles import randomise, reference_logits, save, shard
from safetensors.torch import load_file, save_file

# Agreement asked for of float32 logits, in units of their spread where that is more than one.
TOLERANCE = 1e-4

SLIDING, FULL = "sliding_attention", "full_attention"
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 24}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 24,
}


def longrope(head_dim: int) -> dict[str, Any]:
    half = head_dim // 2
    return {
        "rope_type": "longrope",
        "short_factor": [1.0 + 0.01 * i for i in range(half)],
        "long_factor": [2.0 + 0.1 * i for i in range(half)],
        "original_max_position_embeddings": 24,
        "factor": 4.0,
    }


def shape(heads: int = 6, kv_heads: int = 2, head_dim: int = 64, **more: Any) -> dict[str, Any]:
    """A small awkward shape: grouped heads 3:1, a hidden size that is not heads x head size."""
    return {
        "vocab_size": 131,
        "hidden_size": 72,
        "intermediate_size": 100,
        "num_hidden_layers": 3,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "max_position_embeddings": 96,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
        **more,
    }


def gpt2(**more: Any) -> dict[str, Any]:
    sizes = {"vocab_size": 131, "n_embd": 72, "n_head": 6, "n_layer": 3, "n_positions": 96}
    return sizes | {"bos_token_id": None, "eos_token_id": None} | more


def deepseek(**more: Any) -> dict[str, Any]:
    sizes = {"q_lora_rank": 40, "kv_lora_rank": 32, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16}
    experts = {"n_routed_experts": 12, "n_group": 4, "topk_group": 2, "num_experts_per_tok": 3}
    given = shape(heads=4, kv_heads=4, v_head_dim=12, moe_intermediate_size=20)
    del given["head_dim"]
    return given | sizes | experts | {"first_k_dense_replace": 1} | more


def falcon(**more: Any) -> dict[str, Any]:
    """6 heads of 64."""
    given = shape(hidden_size=384, tie_word_embeddings=True, ffn_hidden_size=100)
    for name in ("num_key_value_heads", "head_dim", "intermediate_size"):
        del given[name]
    return given | more


def rope(**parameters: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_theta": 10000.0, **parameters}}


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", shape()),
    "llama head 80 tied": ("Llama", shape(head_dim=80, tie_word_embeddings=True)),
    "llama biases": ("Llama", shape(attention_bias=True, mlp_bias=True)),
    "llama gelu, one kv head": ("Llama", shape(kv_heads=1, hidden_act="gelu_pytorch_tanh")),
    "llama linear": ("Llama", shape(**rope(rope_type="linear", factor=4.0))),
    "llama dynamic": (
        "Llama",
        shape(**rope(rope_type="dynamic", factor=2.0)) | {"max_position_embeddings": 24},
    ),
    "llama yarn": ("Llama", shape(**rope(**YARN))),
    "llama llama3": ("Llama", shape(head_dim=128, **rope(**LLAMA3))),
    "llama longrope": ("Llama", shape(**rope(**longrope(64)))),
    "mistral window 9": ("Mistral", shape(head_dim=96, sliding_window=9)),
    "mistral window 40": ("Mistral", shape(sliding_window=40, tie_word_embeddings=True)),
    "mistral no window": ("Mistral", shape(sliding_window=None)),
    "qwen2": ("Qwen2", shape(heads=3, kv_heads=1, hidden_size=192)),
    "qwen2 tied, sliding layers": (
        "Qwen2",
        shape(
            heads=3,
            kv_heads=1,
            hidden_size=192,
            tie_word_embeddings=True,
            use_sliding_window=True,
            sliding_window=7,
            max_window_layers=1,
        ),
    ),
    "qwen2 yarn": ("Qwen2", shape(heads=3, kv_heads=1, hidden_size=192, **rope(**YARN))),
    "qwen3": ("Qwen3", shape(head_dim=128)),
    "qwen3 tied, biases": (
        "Qwen3",
        shape(head_dim=80, tie_word_embeddings=True, attention_bias=True),
    ),
    "qwen3 sliding layers": (
        "Qwen3",
        shape(
            use_sliding_window=True,
            sliding_window=11,
            max_window_layers=2,
            **rope(rope_type="linear", factor=2.0),
        ),
    ),
    "ministral": ("Ministral", shape(sliding_window=9, layer_types=[SLIDING, FULL, SLIDING])),
    "phi3": ("Phi3", shape(hidden_size=384, **rope(partial_rotary_factor=0.75))),
    "phi3 longrope, window": (
        "Phi3",
        shape(hidden_size=384, sliding_window=30, tie_word_embeddings=True, **rope(**longrope(64)))
        | {"original_max_position_embeddings": 24},
    ),
    "gemma": ("Gemma", shape(head_dim=80, tie_word_embeddings=True)),
    "gemma gelu": ("Gemma", shape(hidden_act="gelu", hidden_activation=None)),
    "gemma2": (
        "Gemma2",
        shape(sliding_window=11, query_pre_attn_scalar=50, tie_word_embeddings=True),
    ),
    "gemma2 caps that bend": (
        "Gemma2",
        shape(sliding_window=24, attn_logit_softcapping=2.0, final_logit_softcapping=1.5),
    ),
    "gemma2 without caps": (
        "Gemma2",
        shape(attn_logit_softcapping=None, final_logit_softcapping=None, attention_bias=True),
    ),
    "gemma3": (
        "Gemma3",
        shape(sliding_window=13, query_pre_attn_scalar=70, num_hidden_layers=7),
    ),
    "gemma3 two rotaries": (
        "Gemma3",
        shape(
            sliding_window=13,
            rope_parameters={
                FULL: {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                SLIDING: {"rope_type": "default", "rope_theta": 1e4},
            },
            layer_types=[SLIDING, FULL, FULL],
            tie_word_embeddings=True,
        ),
    ),
    "glm": ("Glm", shape(attention_bias=True)),
    "glm4": ("Glm4", shape(head_dim=96, **rope(partial_rotary_factor=0.25))),
    "olmo2": ("Olmo2", shape(hidden_size=384, attention_bias=True)),
    "olmo3": ("Olmo3", shape(hidden_size=384, sliding_window=9, num_hidden_layers=5)),
    "olmo3 yarn": (
        "Olmo3",
        shape(
            hidden_size=384,
            sliding_window=9,
            layer_types=[SLIDING, FULL, SLIDING],
            rope_parameters={
                FULL: {"rope_theta": 5e5, **YARN},
                SLIDING: {"rope_type": "default", "rope_theta": 5e5},
            },
        ),
    ),
    "smollm3": ("SmolLM3", shape(hidden_size=384, num_hidden_layers=5)),
    "smollm3 window, biases": (
        "SmolLM3",
        shape(
            hidden_size=384,
            use_sliding_window=True,
            sliding_window=9,
            no_rope_layers=[1, 0, 1],
            attention_bias=True,
            mlp_bias=True,
        ),
    ),
    "granite": (
        "Granite",
        shape(
            hidden_size=384,
            embedding_multiplier=12.0,
            attention_multiplier=0.02,
            residual_multiplier=0.22,
            logits_scaling=0.3,
            tie_word_embeddings=True,
        ),
    ),
    "stablelm": ("StableLm", shape(hidden_size=384, use_qkv_bias=True)),
    "stablelm parallel": ("StableLm", shape(hidden_size=384, use_parallel_residual=True)),
    "cohere2": (
        "Cohere2",
        shape(hidden_size=384, sliding_window=9, num_hidden_layers=5, logit_scale=1.5),
    ),
    "cohere2 biases": (
        "Cohere2",
        shape(hidden_size=384, sliding_window=30, attention_bias=True, logit_scale=0.5),
    ),
    "gpt2": ("GPT2", gpt2()),
    "gpt2 unscaled, wider": (
        "GPT2",
        gpt2(scale_attn_weights=False, n_inner=100, activation_function="relu"),
    ),
    "gpt neox": ("GPTNeoX", shape(kv_heads=6, hidden_size=384)),
    "gpt neox sequential": (
        "GPTNeoX",
        shape(
            hidden_size=192, heads=3, kv_heads=3, use_parallel_residual=False, attention_bias=False
        )
        | rope(partial_rotary_factor=0.5),
    ),
    "falcon 7b": ("Falcon", falcon(multi_query=True, parallel_attn=True)),
    "falcon 7b sequential": (
        "Falcon",
        falcon(multi_query=True, parallel_attn=False, bias=True, tie_word_embeddings=False),
    ),
    "falcon heads": ("Falcon", falcon(multi_query=False, parallel_attn=True, bias=True)),
    "falcon 40b": ("Falcon", falcon(new_decoder_architecture=True, num_kv_heads=2)),
    "falcon 11b": (
        "Falcon",
        falcon(new_decoder_architecture=True, num_kv_heads=3, num_ln_in_parallel_attn=1),
    ),
    "mixtral": ("Mixtral", shape(num_local_experts=5, num_experts_per_tok=2, sliding_window=9)),
    "qwen2 moe": (
        "Qwen2Moe",
        shape(
            num_experts=6,
            num_experts_per_tok=3,
            moe_intermediate_size=20,
            shared_expert_intermediate_size=44,
            decoder_sparse_step=2,
        ),
    ),
    "qwen2 moe normalised, windows": (
        "Qwen2Moe",
        shape(
            num_experts=6,
            num_experts_per_tok=2,
            moe_intermediate_size=20,
            shared_expert_intermediate_size=44,
            norm_topk_prob=True,
            qkv_bias=False,
            use_sliding_window=True,
            sliding_window=9,
            mlp_only_layers=[1],
        ),
    ),
    "qwen3 moe": (
        "Qwen3Moe",
        shape(num_experts=8, num_experts_per_tok=3, moe_intermediate_size=20, norm_topk_prob=True),
    ),
    "qwen3 moe biases, window": (
        "Qwen3Moe",
        shape(
            num_experts=8,
            num_experts_per_tok=1,
            moe_intermediate_size=20,
            attention_bias=True,
            use_sliding_window=True,
            sliding_window=9,
            mlp_only_layers=[0],
            tie_word_embeddings=True,
        ),
    ),
    "olmoe": ("Olmoe", shape(hidden_size=384, num_experts=7, num_experts_per_tok=3)),
    "gpt oss": (
        "GptOss",
        shape(num_local_experts=6, num_experts_per_tok=2, sliding_window=9, num_hidden_layers=4),
    ),
    "deepseek v3": ("DeepseekV3", deepseek()),
    "deepseek v3 without a latent of queries, in halves": (
        "DeepseekV3",
        deepseek(q_lora_rank=None, rope_interleave=False, v_head_dim=24, attention_bias=True),
    ),
    "deepseek v3 yarn": (
        "DeepseekV3",
        deepseek(
            norm_topk_prob=False,
            n_shared_experts=2,
            rope_parameters={"rope_theta": 1e4, "mscale_all_dim": 1.0, "mscale": 1.0, **YARN},
        ),
    ),
    "minimax m2": (
        "MiniMaxM2",
        shape(
            num_local_experts=8,
            num_experts_per_tok=3,
            rope_parameters={"rope_theta": 1e4, "partial_rotary_factor": 0.5},
        ),
    ),
}


CONFIGS = {"Gemma3": "Gemma3Text"}
"""Families whose config is not called after them."""


def make_model(family: str, settings: dict[str, Any], seed: int) -> Any:
    import transformers

    config_name = CONFIGS.get(family, family)
    model_name = {"GPT2": "GPT2LMHeadModel"}.get(family, f"{family}ForCausalLM")
    config = getattr(transformers, f"{config_name}Config")(**settings)
    return randomise(getattr(transformers, model_name)(config), seed)


def from_folder(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    # The other implementations of attention leave soft caps and sinks out.
    exact = "eager" if "attn_logit_softcapping" in (folder / "config.json").read_text() else None
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation=exact
    )


def sequences(vocab_size: int, seed: int) -> list[list[int]]:
    """Awkward lengths, below and beyond every limit that the configs name."""
    draw = random.Random(seed)
    return [[draw.randrange(vocab_size) for _ in range(n)] for n in (1, 7, 23, 25, 24, 90, 61)]


def assert_agrees(
    folder: Path, make: Callable[[Path], Any] = from_folder, oracle: Path | None = None
) -> None:
    """Within TOLERANCE of transformers on every sequence, and the same bits packed or alone."""
    pipe = pipeline(folder, device="cpu", dtype="float32")
    told = inspect_placement(folder, EngineSettings(device="cpu", dtype="float32"))
    assert told == pipe.placement, "headers alone tell where layers live"
    documents = sequences(pipe.vocab_size, seed=1)
    packed = pipe.get_logits(documents)
    assert isinstance(packed, list)
    reference = make(oracle or folder)
    for ids, logits in zip(documents, packed, strict=True):
        expected = reference_logits(copy.deepcopy(reference), ids)
        assert logits.shape == expected.shape
        assert expected.std() > 0.3, "weights too small to tell a right model from a wrong one"
        assert (logits - expected).abs().max() < TOLERANCE * max(1.0, expected.std().item())
        assert torch.equal(logits, pipe.get_logits(ids))


@pytest.mark.parametrize("name", CASES)
def test_logits_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    family, settings = CASES[name]
    assert_agrees(save(make_model(family, settings, seed=3), tmp_path))


def draw_settings(draw: random.Random, family: str) -> dict[str, Any]:
    """A config drawn from what the family's config class allows."""
    head_dim = draw.choice([16, 64, 80, 96, 128])
    kv_heads, group = draw.choice([1, 2, 3]), draw.choice([1, 2, 3, 4])
    heads = kv_heads * group
    num_layers = draw.choice([1, 2, 3, 5])
    # transformers' experts take columns in whole groups of 16 bytes.
    unit = 4 if family in SPARSE else 1
    free_size = family in (
        "Llama",
        "Mistral",
        "Ministral",
        "Qwen3",
        "Gemma",
        "Gemma2",
        "Gemma3",
        "Glm4",
    )
    settings = shape(
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        hidden_size=heads * head_dim if not free_size else heads * 2 * draw.randrange(4, 12),
        intermediate_size=unit * draw.randrange(5, 40),
        num_hidden_layers=num_layers,
        vocab_size=draw.randrange(50, 300),
        tie_word_embeddings=draw.random() < 0.5,
    )
    eps = draw.choice([1e-6, 1e-5, 1e-3])
    settings |= {"rms_norm_eps": eps, "layer_norm_eps": eps, "layer_norm_epsilon": eps}
    flag = lambda: draw.random() < 0.5  # noqa: E731
    settings |= {"sliding_window": draw.choice([1, 5, 24, 64]), "use_sliding_window": flag()}
    settings["max_window_layers"] = draw.randrange(num_layers + 1)
    biased = ("Llama", "Qwen3", "Gemma2", "Gemma3", "Glm", "Glm4", "Olmo2", "Olmo3", "SmolLM3")
    if family in (*biased, "Granite", "Cohere2"):
        settings["attention_bias"] = flag()
    if family in ("Llama", "SmolLM3", "Granite"):
        settings["mlp_bias"] = flag()
    if family in ("Gemma2", "Gemma3", "Ministral", "Cohere2", "Olmo3"):
        settings["layer_types"] = [draw.choice([SLIDING, FULL]) for _ in range(num_layers)]
    if family in ("Mistral", "Phi3"):
        settings["sliding_window"] = draw.choice([None, 1, 5, 24, 64])
    caps = [None, 2.0, 30.0]
    own: dict[str, dict[str, Any]] = {
        "Gemma2": {
            "query_pre_attn_scalar": draw.randrange(10, 300),
            "attn_logit_softcapping": draw.choice(caps),
            "final_logit_softcapping": draw.choice(caps),
        },
        "Granite": {
            "embedding_multiplier": draw.uniform(0.5, 3),
            "attention_multiplier": draw.uniform(0.01, 0.1),
            "residual_multiplier": draw.uniform(0.2, 1.5),
            "logits_scaling": draw.uniform(0.3, 0.5),
        },
        "StableLm": {"use_qkv_bias": flag(), "use_parallel_residual": flag()},
        "Cohere2": {"logit_scale": draw.uniform(0.5, 2.0)},
        "SmolLM3": {"no_rope_layer_interval": draw.randrange(1, 4)},
        "GPTNeoX": {"use_parallel_residual": flag(), "attention_bias": flag()},
        "Falcon": {
            **draw.choice(
                [
                    {"new_decoder_architecture": True, "num_kv_heads": kv_heads},
                    {"multi_query": True, "parallel_attn": flag()},
                    {"multi_query": False, "parallel_attn": flag()},
                ]
            ),
            "bias": flag(),
            "num_ln_in_parallel_attn": draw.choice([None, 1, 2]),
            "ffn_hidden_size": draw.choice([None, 100]),
        },
        "GPT2": {
            "n_embd": heads * head_dim,
            "n_head": heads,
            "n_layer": num_layers,
            "n_positions": 96,
            "n_inner": draw.choice([None, 90]),
            "scale_attn_weights": flag(),
            "activation_function": draw.choice(["gelu_new", "gelu", "relu"]),
        },
        "DeepseekV3": {
            "q_lora_rank": draw.choice([None, 24]),
            "kv_lora_rank": draw.choice([16, 40]),
            "qk_rope_head_dim": (turned := draw.choice([8, 16])),
            "head_dim": turned,
            "qk_nope_head_dim": draw.choice([8, 24]),
            "v_head_dim": draw.choice([8, 24]),
            "num_key_value_heads": heads,
            "n_routed_experts": 8,
            "n_group": (groups := draw.choice([1, 2, 4])),
            "topk_group": draw.randrange(1, groups + 1),
            "first_k_dense_replace": draw.randrange(num_layers + 1),
            "rope_interleave": flag(),
        },
        "MiniMaxM2": {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}},
    }
    settings |= {
        "num_experts": 8,
        "num_local_experts": 8,
        "num_experts_per_tok": draw.choice([1, 2]),
        "moe_intermediate_size": 4 * draw.randrange(4, 20),
        "shared_expert_intermediate_size": 4 * draw.randrange(4, 20),
        "norm_topk_prob": flag(),
        "decoder_sparse_step": draw.choice([1, 2]),
    }
    settings |= own.get(family, {})
    parts = {"Phi3": [0.5, 1.0], "Glm": [0.5, 1.0], "Glm4": [0.25, 0.5], "StableLm": [0.25, 1.0]}
    part = draw.choice(parts.get(family, [1.0]))
    if family in ("Llama", "Mistral", "Qwen2", "Qwen3", "Granite", "Olmo2", "SmolLM3", "Ministral"):
        kinds: list[dict[str, Any]] = [{"rope_type": "default"}, YARN, LLAMA3, longrope(head_dim)]
        settings |= rope(**draw.choice(kinds))
    elif part != 1.0:
        settings |= rope(partial_rotary_factor=part)
    import transformers

    config_class = getattr(transformers, f"{CONFIGS.get(family, family)}Config")
    known = {*config_class().to_dict(), *config_class.attribute_map}
    return {name: value for name, value in settings.items() if name in known}


DENSE = ["Llama", "Mistral", "Ministral", "Qwen2", "Qwen3", "Phi3", "Gemma", "Gemma2", "Gemma3"]
DENSE += ["Glm", "Glm4", "Olmo2", "Olmo3", "SmolLM3", "Granite", "StableLm", "Cohere2", "GPT2"]
DENSE += ["GPTNeoX", "Falcon"]
SPARSE = ["Mixtral", "Qwen2Moe", "Qwen3Moe", "Olmoe", "GptOss", "DeepseekV3", "MiniMaxM2"]


@pytest.mark.parametrize("family", DENSE + SPARSE)
@pytest.mark.parametrize("seed", range(2))
def test_logits_of_drawn_configs_are_those_of_transformers(
    seed: int, family: str, tmp_path: Path
) -> None:
    settings = draw_settings(random.Random(f"{family} {seed}"), family)
    assert_agrees(save(make_model(family, settings, seed), tmp_path))


def test_gpt2_as_it_was_published(tmp_path: Path) -> None:
    """Names without a prefix, and the masks that old versions stored."""
    save(make_model("GPT2", gpt2(), seed=4), tmp_path / "new")
    tensors = load_file(tmp_path / "new" / "model.safetensors")
    bare = {name.removeprefix("transformer."): x.contiguous() for name, x in tensors.items()}
    for i in range(3):
        bare[f"h.{i}.attn.bias"] = torch.ones(1, 1, 96, 96).tril()
    (tmp_path / "old").mkdir()
    save_file(bare, tmp_path / "old" / "model.safetensors")
    config = (tmp_path / "new" / "config.json").read_bytes()
    (tmp_path / "old" / "config.json").write_bytes(config)
    assert_agrees(tmp_path / "old", oracle=tmp_path / "new")


def test_a_window_that_the_family_does_not_have_is_left_out(tmp_path: Path) -> None:
    """Models converted to Llama's layout carry settings over that transformers does not read."""
    save(make_model("Llama", shape(), seed=8), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"sliding_window": 8, "use_sliding_window": True, "layer_types": [SLIDING] * 3}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert_agrees(tmp_path)


def test_a_table_of_positions_has_an_end(tmp_path: Path) -> None:
    pipe = pipeline(save(make_model("GPT2", gpt2(), seed=4), tmp_path), device="cpu")
    assert pipe.get_logits([1] * 96).shape == (96, 131)
    with pytest.raises(ValueError, match="97 tokens is longer than the 96 positions"):
        pipe.get_logits([1] * 97)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_stored_narrow_are_computed_wide(dtype: torch.dtype, tmp_path: Path) -> None:
    assert_agrees(save(make_model("Qwen3", shape(), seed=5), tmp_path, dtype))


@pytest.mark.parametrize("tied", [True, False])
def test_sharded_checkpoints_read_as_single_ones(tied: bool, tmp_path: Path) -> None:
    save(make_model("Llama", shape(tie_word_embeddings=tied), seed=6), tmp_path)
    whole = pipeline(tmp_path, device="cpu").get_logits(list(range(50)))
    shard(tmp_path, 4)
    assert torch.equal(pipeline(tmp_path, device="cpu").get_logits(list(range(50))), whole)
    assert_agrees(tmp_path)


def test_config_without_head_dim_splits_the_hidden_size(tmp_path: Path) -> None:
    settings = shape(heads=3, kv_heads=1, hidden_size=192)
    del settings["head_dim"]
    save(make_model("Llama", settings, seed=7), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config.pop("head_dim", None)
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert_agrees(tmp_path)


def test_a_published_config_of_old_reads_as_todays(tmp_path: Path) -> None:
    """Before transformers 5, `rope_theta` and `rope_scaling` stood beside each other."""
    save(make_model("Llama", shape(**rope(**LLAMA3)), seed=8), tmp_path / "new")
    config = json.loads((tmp_path / "new" / "config.json").read_text())
    scaling = config.pop("rope_parameters")
    config["rope_theta"] = scaling.pop("rope_theta")
    config["rope_scaling"] = scaling
    config["torch_dtype"] = config.pop("dtype")
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "config.json").write_text(json.dumps(config))
    tensors = (tmp_path / "new" / "model.safetensors").read_bytes()
    (tmp_path / "old" / "model.safetensors").write_bytes(tensors)
    assert_agrees(tmp_path / "old", oracle=tmp_path / "new")


# ---- InternLM2: no class in transformers, so a Llama's tensors are packed as it packs them ----


def write_internlm2(
    folder: Path, llama: Path, *, bias: bool = False, scaling: dict[str, Any] | None = None
) -> Path:
    """A Llama's checkpoint in InternLM2's published layout."""
    config = json.loads((llama / "config.json").read_text())
    source = load_file(llama / "model.safetensors")
    kv_heads, dim = config["num_key_value_heads"], config["head_dim"]
    group = config["num_attention_heads"] // kv_heads

    def packed(i: int, suffix: str) -> torch.Tensor:
        q, k, v = (source[f"model.layers.{i}.self_attn.{p}_proj.{suffix}"] for p in "qkv")
        rows: list[torch.Tensor] = []
        for g in range(kv_heads):
            rows += [q[(g * group + j) * dim : (g * group + j + 1) * dim] for j in range(group)]
            rows += [k[g * dim : (g + 1) * dim], v[g * dim : (g + 1) * dim]]
        return torch.cat(rows)

    tensors = {
        "model.tok_embeddings.weight": source["model.embed_tokens.weight"],
        "model.norm.weight": source["model.norm.weight"],
        "output.weight": source["lm_head.weight"],
    }
    renamed = {
        "input_layernorm": "attention_norm",
        "post_attention_layernorm": "ffn_norm",
        "self_attn.o_proj": "attention.wo",
        "mlp.gate_proj": "feed_forward.w1",
        "mlp.up_proj": "feed_forward.w3",
        "mlp.down_proj": "feed_forward.w2",
    }
    for i in range(config["num_hidden_layers"]):
        for suffix in ("weight", "bias") if bias else ("weight",):
            tensors[f"model.layers.{i}.attention.wqkv.{suffix}"] = packed(i, suffix)
        for old, new in renamed.items():
            for suffix in ("weight", "bias"):
                name = f"model.layers.{i}.{old}.{suffix}"
                if name in source:
                    tensors[f"model.layers.{i}.{new}.{suffix}"] = source[name]
    published = {
        "architectures": ["InternLM2ForCausalLM"],
        "attn_implementation": "eager",
        "auto_map": {
            "AutoConfig": "configuration_internlm2.InternLM2Config",
            "AutoModelForCausalLM": "modeling_internlm2.InternLM2ForCausalLM",
        },
        "bias": bias,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "model_type": "internlm2",
        "pad_token_id": 2,
        "rope_scaling": scaling,
        "rope_theta": 1000000,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.41.0",
        "use_cache": True,
    }
    kept = (
        "hidden_size",
        "intermediate_size",
        "max_position_embeddings",
        "num_attention_heads",
        "num_hidden_layers",
        "num_key_value_heads",
        "rms_norm_eps",
        "vocab_size",
    )
    published |= {name: config[name] for name in kept}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(published))
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("scaling", [None, {"type": "dynamic", "factor": 2.0}])
def test_internlm2_is_the_llama_whose_tensors_it_packs(
    bias: bool, scaling: dict[str, Any] | None, tmp_path: Path
) -> None:
    parameters = {"rope_theta": 1000000.0, "rope_type": "default"}
    if scaling is not None:
        parameters |= {"rope_type": "dynamic", "factor": 2.0}
    settings = shape(heads=6, kv_heads=2, head_dim=64, hidden_size=384, num_hidden_layers=2)
    settings |= {"attention_bias": bias, "max_position_embeddings": 24}
    llama = save(
        make_model("Llama", settings | {"rope_parameters": parameters}, seed=9), tmp_path / "llama"
    )
    folder = write_internlm2(tmp_path / "internlm2", llama, bias=bias, scaling=scaling)
    assert_agrees(folder, oracle=llama)


@pytest.mark.parametrize("bias", [False, True])
def test_internlm3_is_a_llama_with_biases_of_its_own(bias: bool, tmp_path: Path) -> None:
    settings = shape(attention_bias=bias, mlp_bias=bias, **rope(rope_type="dynamic", factor=6.0))
    llama = save(make_model("Llama", settings, seed=9), tmp_path / "llama")
    config = json.loads((llama / "config.json").read_text())
    for name in ("attention_bias", "mlp_bias", "rope_parameters"):
        del config[name]
    config |= {
        "architectures": ["InternLM3ForCausalLM"],
        "model_type": "internlm3",
        "bias": bias,
        "qkv_bias": bias,
        "rope_scaling": {"factor": 6.0, "rope_type": "dynamic"},
        "rope_theta": 10000,
    }
    folder = tmp_path / "internlm3"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").write_bytes((llama / "model.safetensors").read_bytes())
    assert_agrees(folder, oracle=llama)


# ---- settings the decoder does not have ------------------------------------------------------


def test_a_shape_that_cannot_be_is_named(tmp_path: Path) -> None:
    save(make_model("Llama", shape(num_hidden_layers=1), seed=1), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | {"num_key_value_heads": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="num_key_value_heads: 4 does not divide"):
        pipeline(tmp_path, device="cpu")


NOT_NATIVE: list[tuple[str, dict[str, Any], str]] = [
    ("Llama", {"hidden_act": "relu6"}, "hidden_act: 'relu6' is not one of silu"),
    ("StableLm", {"qk_layernorm": True}, "qk_layernorm: true"),
    ("Falcon", {"alibi": True}, "alibi: true"),
    ("GPT2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx: true"),
]


@pytest.mark.parametrize(("family", "change", "said"), NOT_NATIVE)
def test_a_setting_the_decoder_lacks_runs_through_transformers(
    family: str,
    change: dict[str, Any],
    said: str,
    tmp_path: Path,
) -> None:
    """And says so; what only the decoder can do is refused."""
    settings = {"GPT2": gpt2(), "Falcon": falcon()}.get(family, shape(hidden_size=384))
    save(make_model(family, settings | change, seed=1), tmp_path)
    facts = inspect_model(tmp_path, EngineSettings(device="cpu"))
    assert facts.reason is not None and facts.reason.startswith(said)
    assert_agrees(tmp_path)
    with pytest.raises(ValueError, match="quantization: 'int8' needs a model"):
        pipeline(tmp_path, device="cpu", quantization="int8")


WRONG: list[tuple[str, dict[str, Any], str]] = [
    ("Llama", {"hidden_size": "abc"}, "hidden_size"),
    ("Llama", {"num_hidden_layers": None}, "num_hidden_layers"),
    ("Llama", {"num_attention_heads": 0}, "num_attention_heads"),
    ("Llama", {"rope_parameters": {"rope_type": "yarn"}}, "factor"),
    ("Qwen3", {"layer_types": [FULL]}, "layer"),
    ("SmolLM3", {"no_rope_layers": [1]}, "no_rope_layers: 1 layers"),
    ("Mistral", {"sliding_window": -1}, "sliding_window: -1 is not at least 1"),
    ("DeepseekV3", {"n_group": 5}, "n_group, topk_group: 5 groups do not divide"),
    ("DeepseekV3", {"n_group": 2, "topk_group": 5}, "5 of them are not to be had"),
    ("Mixtral", {"num_experts_per_tok": 9}, "num_experts_per_tok: 9 is not from 1 to the 8"),
]


@pytest.mark.parametrize(("family", "change", "said"), WRONG)
def test_a_config_that_is_wrong_is_one_line(
    family: str, change: dict[str, Any], said: str, tmp_path: Path
) -> None:
    settings = deepseek() if family == "DeepseekV3" else shape(hidden_size=384)
    save(make_model(family, settings, seed=1), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | change
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=said) as caught:
        inspect_model(tmp_path, EngineSettings(device="cpu"))
    assert "\n" not in str(caught.value)


def test_positions_that_the_decoder_does_not_know_are_told_before_it_loads(tmp_path: Path) -> None:
    save(make_model("Llama", shape(), seed=1), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": "spiral", "rope_theta": 1e4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="spiral"):
        inspect_model(tmp_path, EngineSettings(device="cpu", quantization="int8"))
