"""Every family against transformers: the same random weights, the same logits."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from logitmill.engine import pipeline
from oracles import randomise, reference_logits, save, shard
from safetensors.torch import load_file, save_file

# Agreement asked for of float32 logits, absolute.
TOLERANCE = 1e-4

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
}


def make_model(family: str, settings: dict[str, Any], seed: int) -> Any:
    import transformers

    config = getattr(transformers, f"{family}Config")(**settings)
    return randomise(getattr(transformers, f"{family}ForCausalLM")(config), seed)


def from_folder(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def sequences(vocab_size: int, seed: int) -> list[list[int]]:
    """Awkward lengths, below and beyond every limit that the configs name."""
    draw = random.Random(seed)
    return [[draw.randrange(vocab_size) for _ in range(n)] for n in (1, 7, 23, 25, 24, 90, 61)]


def assert_agrees(
    folder: Path, make: Callable[[Path], Any] = from_folder, oracle: Path | None = None
) -> None:
    """Within TOLERANCE of transformers on every sequence, and the same bits packed or alone."""
    pipe = pipeline(folder, device="cpu", dtype="float32")
    documents = sequences(pipe.vocab_size, seed=1)
    packed = pipe.get_logits(documents)
    assert isinstance(packed, list)
    for ids, logits in zip(documents, packed, strict=True):
        expected = reference_logits(oracle or folder, make, ids)
        assert logits.shape == expected.shape
        assert expected.std() > 0.3, "weights too small to tell a right model from a wrong one"
        assert (logits - expected).abs().max() < TOLERANCE
        assert torch.equal(logits, pipe.get_logits(ids))


@pytest.mark.parametrize("name", CASES)
def test_logits_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    family, settings = CASES[name]
    assert_agrees(save(make_model(family, settings, seed=3), tmp_path))


@pytest.mark.parametrize("seed", range(6))
def test_logits_of_drawn_configs_are_those_of_transformers(seed: int, tmp_path: Path) -> None:
    draw = random.Random(seed)
    family = draw.choice(["Llama", "Mistral", "Qwen2", "Qwen3"])
    head_dim = draw.choice([16, 64, 80, 96, 128])
    kv_heads, group = draw.choice([1, 2, 3]), draw.choice([1, 2, 3, 4])
    heads = kv_heads * group
    settings = shape(
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        hidden_size=heads * head_dim if family == "Qwen2" else 8 * draw.randrange(4, 12),
        intermediate_size=draw.randrange(20, 150),
        num_hidden_layers=draw.choice([1, 2, 3]),
        vocab_size=draw.randrange(50, 300),
        tie_word_embeddings=draw.random() < 0.5,
        rms_norm_eps=draw.choice([1e-6, 1e-5, 1e-3]),
    )
    if family in ("Llama", "Qwen3"):
        settings["attention_bias"] = draw.random() < 0.5
    if family == "Mistral":
        settings["sliding_window"] = draw.choice([None, 1, 5, 24, 64])
    kinds: list[dict[str, Any]] = [{"rope_type": "default"}, YARN, LLAMA3, longrope(head_dim)]
    settings |= rope(**draw.choice(kinds))
    assert_agrees(save(make_model(family, settings, seed), tmp_path))


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


# ---- settings the decoder does not have ------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"hidden_act": "relu6"}, "hidden_act: 'relu6' is not one of silu"),
        ({"num_key_value_heads": 4}, "num_key_value_heads: 4 does not divide"),
    ],
)
def test_a_setting_the_decoder_lacks_is_named(
    change: dict[str, Any], said: str, tmp_path: Path
) -> None:
    save(make_model("Llama", shape(num_hidden_layers=1), seed=1), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | change
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=said):
        pipeline(tmp_path, device="cpu")
