"""Tiers as data sets with typed columns, against the run's own readers."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pytest
from direct import score_directly
from logitmill import flows
from logitmill.engine import EngineSettings
from logitmill.flows import Run, open_run
from logitmill.flows.corpus import CorpusSpec
from logitmill.flows.parts import BLOBS, SCHEMAS

TABLES = Path(__file__).parents[2] / "infra/guides/tables.md"
V, D, K, M = 4096, 256, 5, 6


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of `datasets`."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
    return folder


@pytest.fixture(scope="module")
def made(corpus: Path, demo_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Runs of a corpus in several shards, by what they keep."""
    spec, out = CorpusSpec(uri=str(corpus), shard_bytes=3_000), tmp_path_factory.mktemp("runs")
    half = EngineSettings(dtype="bfloat16")
    return {
        "few": score_directly(
            demo_folder, spec, out, tiers=["topk", "sampled", "hidden"], top_k=K, num_draws=M
        ),
        "bfloat16": score_directly(demo_folder, spec, out, tiers=["hidden"], engine=half),
        "logits": score_directly(demo_folder, spec, out, tiers=["logits"], logits_dtype="float16"),
    }


@pytest.fixture
def run(made: Any) -> Run:
    return made["few"]


def test_candidates_are_lists_of_k_a_token(run: Run) -> None:
    dataset = run.to_dataset("topk")
    lists = {name: str(dataset.features[name]) for name in ("top_ids", "top_logprobs", "token_id")}
    assert lists == {
        "top_ids": f"List(List(Value('int32'), length={K}))",
        "top_logprobs": f"List(List(Value('float16'), length={K}))",
        "token_id": "List(Value('int32'))",
    }
    assert dataset["doc_id"][:] == run.table("topk", ["doc_id"])["doc_id"].to_pylist()
    for row in dataset:
        stored = run.document(row["doc_id"])["topk"]
        assert row["num_tokens"] == len(stored["token_id"])
        assert row.keys() == {"doc_id", "num_tokens", "first_input", *stored}
        for name, values in stored.items():
            np.testing.assert_array_equal(row[name], values)


def test_draws_are_lists_of_m_a_token(run: Run) -> None:
    examples = {e["doc_id"]: e for e in run.distillation("sampled", vocab_size=V)}
    dataset = run.to_dataset("sampled", ["doc_id", "sample_ids"]).with_format("torch")
    assert len(dataset) == len(examples)
    for row in dataset:
        assert row["sample_ids"].tolist() == examples[row["doc_id"]]["sample_ids"].tolist()


@pytest.mark.parametrize("name", ["few", "bfloat16"])
def test_states_are_lists_of_d_a_row(made: Any, name: str) -> None:
    dataset = made[name].to_dataset("hidden")
    assert str(dataset.features["states"]) == f"List(List(Value('float32'), length={D}))"
    for row in dataset.with_format("numpy"):
        stored = made[name].states(row["doc_id"]).float().numpy()
        assert row["num_rows"] == len(stored)
        np.testing.assert_array_equal(row["states"], stored)


def test_whole_distributions_are_lists_of_v_a_row(made: Any) -> None:
    dataset = made["logits"].to_dataset("logits")
    assert str(dataset.features["logprobs"]) == f"List(List(Value('float16'), length={V}))"
    row = dataset.with_format("numpy")[3]
    np.testing.assert_array_equal(row["logprobs"], made["logits"].logprobs(row["doc_id"]))
    logits = row["logprobs"] + row["logsumexp"][:, None]
    np.testing.assert_allclose(logits, made["logits"].logits(row["doc_id"]), rtol=1e-6)


def test_it_is_made_once_and_mapped(
    run: Run, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = run.to_dataset("topk", ["top_ids"])
    (path,) = cache.rglob("*.arrow")
    assert dataset.cache_files == [{"filename": str(path)}]
    # It can be used alone, and read again without the run.
    dataset.save_to_disk(tmp_path / "saved")
    assert datasets.load_from_disk(tmp_path / "saved")[0] == dataset[0]
    with monkeypatch.context() as patch:
        patch.setattr(Run, "open_part", lambda *_: pytest.fail("read again"))
        assert run.to_dataset("topk", ["top_ids"])[:] == dataset[:]
    assert run.to_dataset("topk", ["doc_id"]).column_names == ["doc_id"]


def test_what_fails_leaves_nothing(run: Run, cache: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(run.uri.removeprefix("file://"), tmp_path / "copy"))
    (copy / "topk/part-00001.parquet").write_bytes(b"nothing")
    with pytest.raises(Exception, match="Parquet"):
        open_run(str(copy)).to_dataset("topk")
    assert not [path for path in cache.rglob("*") if path.is_file()]
    for columns, message in (
        (["top_id_0"], "columns: 'top_id_0' is not one of doc_id, num_tokens, "),
        ("doc_id", r"columns: 'doc_id' is text; give a list"),
    ):
        with pytest.raises(ValueError, match=message):
            run.to_dataset("topk", columns)
    with pytest.raises(ValueError, match="tier: 'logits' was not kept"):
        run.to_dataset("logits")


# ---- the page that says what is in the tables


def test_the_page_of_tables_is_the_schema() -> None:
    said = {}
    for section in TABLES.read_text().split("\n## ")[1:]:
        title, _, text = section.partition("\n")
        said[title.strip("`")] = re.findall(r"^\| `(\w+)` \| `(.+?)` \|", text, re.MULTILINE)
    assert said == {
        tier: [(field.name, name_type(field)) for field in schema]
        for tier, schema in SCHEMAS.items()
    }


def name_type(field: pa.Field) -> str:
    if pa.types.is_binary(field.type):
        return f"binary of {BLOBS[field.name].str.lstrip('|')}"
    return re.sub(r"<\w+: ", "<", str(field.type))


def test_bytes_are_decoded_as_the_page_says(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flows, "open_run", lambda uri: run)
    found: dict[str, Any] = {}
    for code in re.findall(r"^```python\n(.*?)^```$", TABLES.read_text(), re.MULTILINE | re.DOTALL):
        exec(code, found)
    doc_id = run.table("topk", ["doc_id"])["doc_id"][0].as_py()
    stored = run.document(doc_id)
    for name in ("top_ids", "top_logprobs"):
        np.testing.assert_array_equal(found[name], stored["topk"][name])
    (example,) = (e for e in run.distillation("sampled", vocab_size=V) if e["doc_id"] == doc_id)
    np.testing.assert_array_equal(found["sample_ids"], example["sample_ids"])
    np.testing.assert_array_equal(found["states"], run.states(doc_id))
