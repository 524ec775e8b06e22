"""What no spec covers runs through transformers, with the same logits and the same records."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from logitmill.engine import pipeline
from logitmill.engine.fallback import Fallback
from logitmill.engine.families import FAMILIES
from logitmill.engine.pipeline import (
    EngineSettings,
    inspect_model,
    inspect_placement,
    load_pipeline,
)
from oracles import randomise, reference_logits, row_statistics_float64, save
from safetensors.torch import load_file, save_file

TOLERANCE = 1e-4
DOCUMENTS = [[3, 1, 4, 1, 5, 9, 2, 6], [27], list(range(60)), [8] * 17]

COMMON = {"vocab_size": 97, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
SMALL = COMMON | {
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "learned positions": (
        "OPT",
        SMALL | {"ffn_dim": 64, "word_embed_proj_dim": 48},
    ),
    "soft-capped logits": (
        "VaultGemma",
        SMALL
        | {
            "num_key_value_heads": 2,
            "head_dim": 16,
            "sliding_window": 8,
            "final_logit_softcapping": 3.0,
            "attn_logit_softcapping": 5.0,
            "query_pre_attn_scalar": 16,
        },
    ),
    "parallel residual": (
        "GPTJ",
        COMMON | {"n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": 64, "rotary_dim": 8},
    ),
    "no attention at all": (
        "Mamba",
        COMMON | {"hidden_size": 32, "state_size": 4, "num_hidden_layers": 2},
    ),
}


def write(folder: Path, name: str, dtype: torch.dtype = torch.float32) -> Path:
    import transformers

    family, settings = MODELS[name]
    config = getattr(transformers, f"{family}Config")(**settings)
    model = transformers.AutoModelForCausalLM.from_config(config)
    return save(randomise(model, seed=2), folder, dtype)


def from_folder(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_transformers(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path, name)
    with caplog.at_level(logging.WARNING):
        pipe = pipeline(tmp_path, device="cpu")
    assert "runs through transformers" in caplog.text
    packed = pipe.get_logits(DOCUMENTS)
    for ids, logits in zip(DOCUMENTS, packed, strict=True):
        expected = reference_logits(from_folder(tmp_path), ids)
        assert expected.std() > 0.1
        assert (logits - expected).abs().max() < TOLERANCE
        assert torch.equal(logits, pipe.get_logits(ids))


def test_records_are_those_of_its_logits(tmp_path: Path) -> None:
    write(tmp_path, "soft-capped logits")
    pipe = pipeline(tmp_path, device="cpu")
    for ids, score in zip(
        DOCUMENTS[2:], pipe.score(DOCUMENTS[2:], recipe="truncated", prefix="none"), strict=True
    ):
        logits = pipe.get_logits(ids)
        assert isinstance(logits, torch.Tensor)
        expected = row_statistics_float64(logits[:-1].numpy(), np.array(ids[1:]))
        for name, values in expected.items():
            np.testing.assert_allclose(getattr(score.tokens, name), values, atol=2e-5, rtol=1e-4)


def test_narrow_weights_get_a_wide_head(tmp_path: Path) -> None:
    """Log-probabilities of bfloat16 logits would stand on a grid of 2^-8 relative steps."""
    pipe = pipeline(write(tmp_path, "learned positions", torch.bfloat16), dtype="bfloat16")
    logits = pipe.get_logits(DOCUMENTS[0])
    assert isinstance(logits, torch.Tensor)
    assert not torch.equal(logits, logits.bfloat16().float())


def test_a_model_that_states_no_limit_takes_any_context(tmp_path: Path) -> None:
    pipe = pipeline(write(tmp_path, "no attention at all"), device="cpu")
    (score,) = pipe.score([list(range(90))], context=40, prefix="none")
    assert score.record.num_tokens_scored == 89
    assert score.record.num_windows == 3


def test_remote_code_is_asked_for_by_name(tmp_path: Path) -> None:
    config = {
        "architectures": ["OwnForCausalLM"],
        "model_type": "own",
        "auto_map": {
            "AutoConfig": "configuration_own.OwnConfig",
            "AutoModelForCausalLM": "modeling_own.OwnForCausalLM",
        },
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "configuration_own.py").write_text("raise SystemExit('was run')")
    with pytest.raises(ValueError, match="trust_remote_code=True if you have read it"):
        pipeline(tmp_path, device="cpu")


def test_what_is_no_language_model_is_a_line_that_says_so(tmp_path: Path) -> None:
    from transformers import T5Config, ViTConfig

    for config in (T5Config(architectures=["T5ForConditionalGeneration"]), ViTConfig()):
        config.architectures = config.architectures or ["ViTForImageClassification"]
        config.save_pretrained(tmp_path)
        with pytest.raises(ValueError, match="not run as a causal language model") as raised:
            inspect_model(tmp_path, EngineSettings(device="cpu"))
        assert str(raised.value).startswith(f"model: {tmp_path} holds a {config.model_type}")
        assert len(str(raised.value)) < 250


def test_a_model_that_sees_what_comes_later_is_refused(tmp_path: Path) -> None:
    """transformers loads BERT as a causal model, and its scores would be of no use."""
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(**SMALL | {"pad_token_id": 0})
    save(randomise(BertForMaskedLM(config), seed=1), tmp_path)
    said = "model: BertLMHeadModel sees tokens that come later"
    with pytest.raises(ValueError, match=said):
        inspect_model(tmp_path, EngineSettings(device="cpu"))
    with pytest.raises(ValueError, match=said):
        Fallback.load(
            tmp_path, device=torch.device("cpu"), dtype=torch.float32, trust_remote_code=False
        )


def test_a_decoder_in_an_encoders_class_is_taken(tmp_path: Path) -> None:
    from transformers import BertConfig, BertLMHeadModel

    config = BertConfig(**SMALL | {"pad_token_id": 0}, is_decoder=True)
    save(randomise(BertLMHeadModel(config), seed=1), tmp_path)
    inspect_placement(tmp_path, EngineSettings(device="cpu"))
    pipeline(tmp_path, device="cpu")


@pytest.mark.parametrize("change", ["missing", "misshapen"])
def test_tensors_that_transformers_would_make_up_are_named(change: str, tmp_path: Path) -> None:
    file = write(tmp_path, "learned positions") / "model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("layers.1.fc1.weight"))
    if change == "missing":
        tensors.pop(name)
    else:
        tensors[name] = torch.zeros(3, 5)
    save_file(tensors, file, {"format": "pt"})
    said = f"model: 1 tensors of {tmp_path} are missing or have another shape than .* is {name}"
    for look in (inspect_placement, load_pipeline):
        with pytest.raises(ValueError, match=said):
            look(tmp_path, EngineSettings(device="cpu"))


def test_a_tensor_without_a_place_is_said_and_transformers_says_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path, "learned positions") / "model.safetensors"
    save_file(load_file(file) | {"stray": torch.zeros(3)}, file, {"format": "pt"})
    capfd.readouterr()
    for look in (inspect_placement, load_pipeline):
        caplog.clear()
        look(tmp_path, EngineSettings(device="cpu"))
        assert (
            f"model: 1 tensors of {tmp_path} have no place in OPTForCausalLM and are left out, "
            "the first is stray"
        ) in caplog.messages
    out, err = capfd.readouterr()
    assert "LOAD REPORT" not in out + err + caplog.text
    assert "Loading weights" not in out + err


def test_an_unknown_architecture_is_an_error_that_names_the_folder(tmp_path: Path) -> None:
    config = {"architectures": ["NobodyKnows"], "model_type": "nobody_knows"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="transformers cannot load") as raised:
        pipeline(tmp_path, device="cpu")
    assert str(tmp_path) in str(raised.value)


def test_an_architecture_without_a_spec_is_said_in_a_line_that_can_be_read(tmp_path: Path) -> None:
    facts = inspect_model(write(tmp_path, "learned positions"), EngineSettings(device="cpu"))
    assert (
        facts.reason
        == f"OPTForCausalLM is none of the {len(FAMILIES)} in README.md's table of models"
    )


@pytest.mark.parametrize(
    ("field", "value"),
    [("rope_parameters", {"rope_type": "spiral", "rope_theta": 1e4}), ("hidden_act", "wave")],
)
def test_a_setting_that_transformers_lacks_too_is_named_with_what_is_known(
    field: str, value: Any, tmp_path: Path
) -> None:
    from test_families import make_model, shape

    save(make_model("Llama", shape(), seed=1), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | {field: value}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="transformers cannot load") as raised:
        inspect_model(tmp_path, EngineSettings(device="cpu"))
    known = {
        "rope_parameters": "model: rope_type: 'spiral' is not one of default, linear",
        "hidden_act": "model: hidden_act: 'wave' is not one of silu",
    }
    assert str(raised.value).startswith(known[field])
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_weights_that_are_not_finite_are_refused_by_name(value: float, tmp_path: Path) -> None:
    write(tmp_path, "learned positions")
    tensors = load_file(tmp_path / "model.safetensors")
    name = next(name for name in tensors if name.endswith("layers.1.fc1.weight"))
    tensors[name][0, 3] = value
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=rf"tensor {name} of .* holds NaN or infinite weights"):
        pipeline(tmp_path, device="cpu")


def test_a_cut_file_is_found_before_anything_loads(tmp_path: Path) -> None:
    file = write(tmp_path, "learned positions") / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match="not a whole safetensors file: it ends at byte"):
        inspect_model(tmp_path, EngineSettings(device="cpu"))
