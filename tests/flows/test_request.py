"""What is refused before anything is loaded: settings that do not go with the model or corpus."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from flow_helpers import write_lines
from logitmill.engine import EngineSettings, find_recipe
from logitmill.engine.intake import doubt_vocabulary
from logitmill.engine.tokenization import Tokenizer
from logitmill.flows import CorpusSpec
from logitmill.flows.request import Request, prepare
from safetensors.torch import load_file, save_file

ROW = {"text": "w3 w4", "context": "w5", "chat": [{"role": "user", "content": "w3"}], "ids": [3, 4]}


@pytest.fixture
def table(tmp_path: Path) -> Path:
    return write_lines(tmp_path / "rows.jsonl", [ROW])


@pytest.mark.parametrize(
    ("columns", "settings", "said"),
    [
        (
            {"context_column": "context"},
            {},
            "context_column: 'context' is not read by the recipe rolling; use conditional",
        ),
        ({}, {"recipe": "conditional"}, "context_column: None, but the recipe conditional"),
        (
            {"messages_column": "chat"},
            {},
            "messages_column: 'chat' needs a chat template, which the model's tokenizer does not",
        ),
        (
            {},
            {"recipe": find_recipe("rolling", prefix=32)},
            "prefix: 32 is not in the model's vocabulary of 32",
        ),
        (
            {"ids_column": "ids"},
            {"recipe": find_recipe("rolling", prefix=99)},
            "prefix: 99 is not in the model's vocabulary of 32",
        ),
        (
            {},
            {"engine": EngineSettings(logits_memory=1000)},
            "logits_memory: 1000 bytes is less than the 24576 bytes that 64 rows of 32 logits",
        ),
        (
            {},
            {"engine": EngineSettings(quantization="fp7")},
            "quantization: 'fp7' is not one of none, fp8",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(
    word_model: Path,
    table: Path,
    tmp_path: Path,
    columns: dict[str, str],
    settings: dict[str, Any],
    said: str,
) -> None:
    model = Path(shutil.copytree(word_model, tmp_path / "model"))
    # Nothing is loaded for it, or this would be what is refused.
    weights = load_file(model / "model.safetensors")
    nothing = {name: torch.full_like(weight, torch.nan) for name, weight in weights.items()}
    save_file(nothing, model / "model.safetensors")
    spec = CorpusSpec(uri=str(table), **columns)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=f"^{re.escape(said)}") as raised:
        prepare(Request(model=str(model), corpus=spec, out=str(tmp_path / "runs"), **settings))
    assert "\n" not in str(raised.value)


def test_a_file_of_weights_that_is_not_whole_is_refused(
    word_model: Path, table: Path, tmp_path: Path
) -> None:
    model = Path(shutil.copytree(word_model, tmp_path / "model"))
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"^model: .* is not a whole safetensors file: it ends at"):
        prepare(Request(model=str(model), corpus=str(table), out=str(tmp_path / "runs")))


def test_a_tokenizer_of_another_model_is_refused_where_there_is_text(
    word_model: Path, table: Path, tmp_path: Path
) -> None:
    model = Path(shutil.copytree(word_model, tmp_path / "model"))
    config = json.loads((model / "config.json").read_text()) | {"vocab_size": 20}
    (model / "config.json").write_text(json.dumps(config))
    request = Request(model=str(model), corpus=str(table), out=str(tmp_path / "runs"))
    with pytest.raises(
        ValueError, match=r"^tokenizer: its vocabulary has 32 ids, and the model's 20"
    ):
        prepare(request)
    prepare(replace(request, corpus=CorpusSpec(uri=str(table), ids_column="ids")))


def test_mappings_of_fields_are_settings(word_model: Path, table: Path, tmp_path: Path) -> None:
    """As in a deployment's parameters."""
    given: dict[str, Any] = {
        "corpus": {"uri": str(table), "storage_options": {"secret": 1}},
        "recipe": {"name": "rolling", "context": 8},
        "engine": {"quantization": "int8"},
    }
    request = Request(model=str(word_model), out=str(tmp_path), **given)
    assert request.engine == EngineSettings(quantization="int8")
    assert request.recipe == find_recipe("rolling-8")
    assert request.corpus == CorpusSpec(uri=str(table), storage_options={"secret": 1})
    assert request.public()["corpus"] == CorpusSpec(uri=str(table))
    for wrong, said in (
        ({"engine": {"quantization": "zz"}}, "quantization: 'zz' is not one of none, fp8"),
        ({"engine": {"quantisation": "fp8"}}, "engine: 'quantisation' is not one of device, dtype"),
        ({"engine": "fp8"}, "engine: 'fp8' is no EngineSettings, nor a mapping of EngineSettings'"),
        ({"corpus": table}, f"corpus: {table!r} is no text or CorpusSpec, nor a mapping"),
    ):
        with pytest.raises(ValueError, match=f"^{re.escape(said)}"):
            prepare(Request(model=str(word_model), out=str(tmp_path), **(given | wrong)))


def test_a_corpus_that_is_named_alone_is_called_corpus(word_model: Path, tmp_path: Path) -> None:
    missing = str(tmp_path / "uri='nope")
    for corpus, name in ((missing, "corpus"), (CorpusSpec(uri=missing), "uri")):
        with pytest.raises(ValueError, match=f"^{name}={re.escape(repr(missing))}"):
            prepare(Request(model=str(word_model), corpus=corpus, out=str(tmp_path / "runs")))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, None),
        ({"vocab_size": 64}, None),
        (
            {"vocab_size": 65},
            "tokenizer: its vocabulary has 32 ids, less than half of the model's 65",
        ),
        ({"eos_token_id": 7}, None),
        (
            {"eos_token_id": 7, "bos_token_id": None},
            "tokenizer: its EOS is 2, and 7 in config.json",
        ),
        ({"eos_token_id": [7, 2], "bos_token_id": 9}, None),
        (
            {"eos_token_id": [7, 8], "bos_token_id": 9},
            "tokenizer: its BOS is 1, and 9 in config.json, its EOS is 2, and [7, 8] in",
        ),
    ],
)
def test_a_tokenizer_that_may_be_another_models_is_doubted(
    word_model: Path, changes: dict[str, Any], said: str | None
) -> None:
    tokenizer = Tokenizer.load(word_model)
    assert tokenizer is not None
    config = json.loads((word_model / "config.json").read_text()) | changes
    doubt = doubt_vocabulary(tokenizer, config["vocab_size"], config)
    assert (doubt or "").startswith(said or "") and (doubt is None) == (said is None)


def test_a_doubt_is_said_and_stops_nothing(word_model: Path, table: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(word_model, tmp_path / "model"))
    config = json.loads((model / "config.json").read_text())
    config |= {"eos_token_id": 7, "bos_token_id": 9}
    (model / "config.json").write_text(json.dumps(config))
    request = Request(model=str(model), corpus=str(table), out=str(tmp_path / "runs"))
    assert "its BOS is 1, and 9" in (prepare(request).doubt or "")
    assert (
        prepare(replace(request, corpus=CorpusSpec(uri=str(table), ids_column="ids"))).doubt is None
    )
    assert prepare(replace(request, model=str(word_model))).doubt is None


def test_what_goes_together_is_not(word_model: Path, table: Path, tmp_path: Path) -> None:
    for columns, recipe in (
        ({"context_column": "context"}, "conditional"),
        ({}, find_recipe("rolling", prefix=31)),
    ):
        spec = CorpusSpec(uri=str(table), **columns)  # type: ignore[arg-type]
        engine = EngineSettings(logits_memory=24576, quantization="int8", fp8_head=True)
        request = Request(
            model=str(word_model), corpus=spec, out=str(tmp_path), recipe=recipe, engine=engine
        )
        described = prepare(request).described
        assert described["engine"] == {
            "dtype": "float32",
            "linears": {"none": "int8"},
            "fp8_head": True,
        }
        assert "int8" in described["quantization"]
