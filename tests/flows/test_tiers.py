"""What runs keep of distributions: `topk`, `sampled` and `hidden`, written, read and checked."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from direct import score_directly
from flow_helpers import write_lines
from logitmill.engine import EngineSettings, Pipeline, pipeline
from logitmill.engine.records import STATISTICS, TokenRecords
from logitmill.flows import Run, distributions, open_run, parts, shards
from logitmill.flows.corpus import CorpusSpec
from logitmill.flows.distributions import SampledWriter, TopKWriter, read_draws, read_top_k
from logitmill.flows.estimate import TABLES, estimate_run
from logitmill.flows.folder import Part
from logitmill.flows.parts import LensWriter
from logitmill.flows.request import Request, prepare
from logitmill.flows.store import Receipt
from logitmill.flows.summary import Summary
from logitmill.flows.verify import verify_run
from logitmill.kernels.logits import RowStatistics

ALL: Any = {
    "tiers": ["tokens", "topk", "sampled", "lens", "hidden"],
    "top_k": 7,
    "num_draws": 9,
    "layers": [-1, 0, 2],
}


@pytest.fixture(scope="module")
def run(corpus: Path, demo_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run of all tiers that go together, in several shards, with a document that is none."""
    folder = Path(shutil.copytree(corpus, tmp_path_factory.mktemp("corpus") / "of"))
    (folder / "one/empty.py").write_text("")
    spec = CorpusSpec(uri=str(folder), shard_bytes=3_000)
    return score_directly(demo_folder, spec, tmp_path_factory.mktemp("runs"), **ALL)


def scored(run: Run) -> list[str]:
    table = run.table("scores", ["doc_id", "status"]).to_pylist()
    return [row["doc_id"] for row in table if row["status"] == "ok"]


def probabilities(demo: Pipeline, found: dict[str, Any]) -> np.ndarray:
    """Of the rows that scored a document's tokens with BOS in front, float64 [n, V]."""
    z = demo.get_logits([0, *found["token_id"][:-1]]).double().numpy()
    p = np.exp(z - z.max(1, keepdims=True))
    return p / p.sum(1, keepdims=True)


@pytest.mark.parametrize(
    ("make", "most"),
    [
        (lambda path: TopKWriter(path, {}, top_k=256, vocab_size=500), 3_932_160),
        (
            lambda path: SampledWriter(path, {}, num_draws=64, draw_seed=0, vocab_size=500),
            15_728_640,
        ),
    ],
    ids=["topk", "sampled"],
)
def test_a_document_that_no_value_can_hold_is_named(tmp_path: Path, make: Any, most: int) -> None:
    one = score_of(most + 1)
    with pytest.raises(
        ValueError, match=f"tiers: document 'long' has {most + 1:,} .* {most:,} that"
    ):
        make(tmp_path / "part").add(one)


@pytest.mark.parametrize("recipe", ["rolling", "strided"])
def test_a_document_that_is_too_long_is_refused_before_it_is_scored(
    recipe: str, corpus: Path, demo_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def score(**options: Any) -> Run:
        return score_directly(demo_folder, corpus, tmp_path, recipe=recipe, **options)

    kept: Any = {"tiers": ["topk", "sampled"], "top_k": 7, "num_draws": 5}
    lengths = score().table("scores")["num_tokens_scored"].to_pylist()
    # As many as the longest has, and one fewer.
    monkeypatch.setattr(distributions, "_VALUE_BYTES", 2 * 7 * max(lengths))
    assert score(**kept).table("topk")["num_tokens"].to_pylist() == lengths
    monkeypatch.setattr(distributions, "_VALUE_BYTES", 2 * 7 * max(lengths) - 1)
    monkeypatch.setattr(Summary, "add", lambda *_: pytest.fail("it was scored"))
    monkeypatch.setattr(shards, "get_run_logger", logging.getLogger)
    shutil.rmtree(tmp_path)
    with pytest.raises(
        ValueError, match=rf"has {max(lengths):,} scored .* the {max(lengths) - 1:,} that a row of"
    ):
        score(**kept)


def score_of(num_tokens: int) -> Any:
    """A document of so many tokens, which take no memory."""
    none = np.broadcast_to(np.zeros((), np.float32), num_tokens)
    tokens = TokenRecords(**{field.name: none for field in fields(TokenRecords)})
    return SimpleNamespace(record=SimpleNamespace(doc_id="long"), tokens=tokens)


def test_top_k_is_what_the_engine_gives(run: Run, demo: Pipeline) -> None:
    for doc_id in scored(run):
        record = run.document(doc_id)
        found, tokens = record["topk"], record["tokens"]
        n = record["num_tokens_scored"]
        assert found["top_ids"].shape == found["top_logprobs"].shape == (n, 7)
        dtypes = {name: str(values.dtype) for name, values in found.items()}
        assert (dtypes["top_ids"], dtypes["top_logprobs"]) == ("int32", "float16")
        for name in ("token_id", "logprob", "byte_start", "byte_end"):
            np.testing.assert_array_equal(found[name], tokens[name])
        p = probabilities(demo, found)
        order = np.argsort(-p, axis=1, kind="stable")[:, :7]
        np.testing.assert_array_equal(found["top_ids"], order)
        kept = np.take_along_axis(p, order, axis=1)
        np.testing.assert_allclose(found["top_logprobs"], np.log(kept), rtol=6e-4, atol=2e-5)
        np.testing.assert_allclose(np.exp(found["log_tail_mass"]), 1 - kept.sum(1), atol=2e-6)
        np.testing.assert_array_equal(found["top_ids"][:, 0], tokens["top1_id"])


def test_draws_are_what_the_engine_gives(run: Run, demo: Pipeline) -> None:
    total = 0.0
    for doc_id in scored(run):
        found = run.document(doc_id)["sampled"]
        rows = np.repeat(np.arange(len(found["token_id"])), found["num_ids"])
        assert len(rows) == len(found["ids"]) == len(found["counts"])
        np.testing.assert_array_equal(np.bincount(rows, found["counts"]), 9)
        p = probabilities(demo, found)
        # sum_v (count / m - p) (log p) is 0 on average: in units of its standard deviation.
        logp = np.log(p[rows, found["ids"]])
        estimates = np.bincount(rows, found["counts"] * logp) / 9
        means = (p * np.log(p)).sum(1)
        variances = (p * np.log(p) ** 2).sum(1) - means**2
        total += float((estimates - means).sum() / np.sqrt(variances.sum() / 9))
    assert abs(total / np.sqrt(len(scored(run)))) < 4


def test_the_lens_is_what_the_engine_gives(run: Run, demo: Pipeline) -> None:
    fields = STATISTICS
    assert fields == RowStatistics._fields
    for doc_id in scored(run):
        record = run.document(doc_id)
        ids = record["tokens"]["token_id"].tolist()
        (lens,) = demo.lens([ids], layers=[0, 2, 4])
        assert list(record["lens"]) == list(lens.layers) == [0, 2, 4]
        for layer, expected in lens.layers.items():
            for name in fields:
                np.testing.assert_array_equal(record["lens"][layer][name], getattr(expected, name))
        for name in fields:
            np.testing.assert_array_equal(record["lens"][4][name], record["tokens"][name])


def test_states_replay_to_the_bits_of_the_run(run: Run, demo: Pipeline) -> None:
    for doc_id in scored(run)[:3]:
        tokens = run.document(doc_id)["tokens"]
        states = run.states(doc_id)
        assert states.shape == (len(tokens["logprob"]), 256)
        logprobs = np.empty(len(states), np.float32)
        for rows, logits in run.replay(doc_id, demo):
            z = logits.numpy()
            target, best = tokens["token_id"][rows], tokens["top1_id"][rows]
            i = np.arange(len(z))
            # As the engine rounds: (z - max z) + log p of the likeliest token.
            logprobs[rows] = (z[i, target] - z[i, best]) + tokens["top1_logprob"][rows]
        np.testing.assert_array_equal(logprobs.view(np.int32), tokens["logprob"].view(np.int32))


def test_states_of_another_head_are_refused(run: Run, demo_folder: Path) -> None:
    other = pipeline(demo_folder, device="cpu", fp8_head=True)
    with pytest.raises(ValueError, match=r"pipe: its head is .*, and the states are for"):
        run.replay(scored(run)[0], other)


def test_bfloat16_states_come_back_as_they_were(demo_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("import os\n" * 9)
    engine = EngineSettings(dtype="bfloat16")
    run = score_directly(
        demo_folder, tmp_path / "a.py", tmp_path / "runs", tiers=["hidden", "tokens"], engine=engine
    )
    pipe = pipeline(demo_folder, device="cpu", dtype="bfloat16")
    kept = []
    list(pipe.score(["import os\n" * 9], on_states=lambda i, d, first, rows: kept.append(rows)))
    states = run.states("a.py")
    assert str(states.dtype) == "torch.bfloat16"
    assert states.equal(kept[0])
    assert len(list(run.replay("a.py", pipe))) == 1


def test_what_was_not_scored_has_no_rows(run: Run, demo: Pipeline) -> None:
    (empty,) = {row["doc_id"] for row in run.table().to_pylist()} - set(scored(run))
    assert not {"tokens", "topk", "sampled", "lens"} & run.document(empty).keys()
    assert run.states(empty).shape == (0, 256)
    assert list(run.replay(empty, demo)) == []
    for tier in ("topk", "sampled", "lens", "hidden"):
        assert set(run.table(tier, ["doc_id"])["doc_id"].to_pylist()) == set(scored(run))


def test_schemas_are_those_that_are_stated(run: Run) -> None:
    for tier in ("topk", "sampled", "lens", "hidden"):
        schema = pq.read_schema(run.paths(tier)[0].removeprefix("file://"))
        assert schema.remove_metadata().equals(parts.schema_of(tier, 4096))
        about = {k.decode(): v.decode() for k, v in schema.metadata.items()}
        assert about["logitmill.run_key"] == run.plan["run_key"]
    assert {"logitmill.hidden_size", "logitmill.head_digest"} <= about.keys()
    assert "top_id_2" not in parts.schema_of("topk", 65_536).names
    assert "top_id_2" in parts.schema_of("topk", 65_537).names
    assert (run.plan["top_k"], run.plan["num_draws"], run.plan["prefix_token"]) == (7, 9, 0)
    assert run.manifest is not None
    written = [p["bytes"] for p in run.manifest["parts"] if p["name"].startswith("topk/")]
    assert run.operations()["bytes_topk"].to_pylist() == written


def test_ids_of_a_large_vocabulary_come_back(tmp_path: Path, demo: Pipeline) -> None:
    (score,) = demo.score(["a b c d"], top_k=3, num_draws=4)
    ids = np.arange(len(score.tokens) * 3, dtype=np.int32).reshape(-1, 3) * 17_000 % 262_144
    score.tokens.top_ids = ids
    writer = TopKWriter(tmp_path / "part", {}, top_k=3, vocab_size=262_144)
    writer.add(score)
    writer.close()
    (row,) = pq.read_table(tmp_path / "part").to_pylist()
    assert ids.max() > 65_535
    np.testing.assert_array_equal(read_top_k(row, 3)["top_ids"], ids)


def test_batches_decide_no_bytes(
    run: Run, demo_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = CorpusSpec(uri=run.plan["uri"], shard_bytes=3_000)
    engine = EngineSettings(max_batch_tokens=100, logits_memory=64 * 4096 * 12)
    other = score_directly(demo_folder, spec, tmp_path / "runs", engine=engine, **ALL)
    assert other.plan["run_key"] == run.plan["run_key"]
    for tier in run.tiers:
        for ours, theirs in zip(run.paths(tier), other.paths(tier), strict=True):
            read = (Path(p.removeprefix("file://")).read_bytes() for p in (ours, theirs))
            assert len({hashlib.sha256(data).hexdigest() for data in read}) == 1, tier


# ---- what is asked for


def key_of(model: Path, corpus: Path, out: Path, **options: Any) -> str:
    return prepare(
        Request(model=str(model), corpus=str(corpus), out=str(out), **options)
    ).job.run_key


def test_settings_of_kept_tiers_are_in_the_key(
    demo_folder: Path, corpus: Path, tmp_path: Path
) -> None:
    plain = key_of(demo_folder, corpus, tmp_path)
    both: Any = {"tiers": ["topk", "sampled"]}
    keys = [
        key_of(demo_folder, corpus, tmp_path, **options)
        for options in (
            {},
            {"tiers": ["hidden"]},
            {"tiers": ["lens"]},
            {"tiers": ["lens"], "layers": [1]},
            both,
            {**both, "top_k": 19},
            {**both, "num_draws": 11},
            {**both, "draw_seed": 1},
        )
    ]
    assert keys[0] == plain and len(set(keys)) == len(keys)
    # What is left out is what is written out.
    said = {**both, "top_k": 20, "num_draws": 12, "draw_seed": 0}
    assert key_of(demo_folder, corpus, tmp_path, **said) == keys[4]
    said = {"tiers": ["lens"], "layers": [-1, 3, 2, 1, 0, 0]}
    assert key_of(demo_folder, corpus, tmp_path, **said) == keys[2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tiers": ["topk"], "top_k": 0}, "top_k: 0 is not an integer within 1 ... 256"),
        ({"tiers": ["topk"], "top_k": 257}, "top_k: 257 is not an integer within 1 ... 256"),
        ({"tiers": ["topk"], "top_k": 2.5}, "top_k: 2.5 is not an integer"),
        ({"top_k": 5}, "top_k: 5 is of the tier topk; keep that, or leave it out"),
        ({"tiers": ["sampled"], "num_draws": 256}, "num_draws: 256 is not an integer within 1"),
        ({"tiers": ["sampled"], "draw_seed": -1}, "draw_seed: -1 is not an integer within 0"),
        ({"draw_seed": 3}, "draw_seed: 3 is of the tier sampled"),
        ({"layers": [1]}, r"layers: \[1\] is of the tier lens; keep that, or leave it out"),
        ({"tiers": ["lens"], "layers": [5]}, r"layers: 5 is not one of the model's, 0 \.\.\. 4"),
        ({"tiers": ["lens"], "layers": []}, "layers: none are given"),
        ({"tiers": ["topk", "logits"]}, "tiers: 'topk' can be made of 'logits'"),
        ({"tiers": ["sampled", "logits"]}, "tiers: 'sampled' can be made of 'logits'"),
        ({"tiers": ["hidden", "logits"]}, "tiers: 'logits' can be made of 'hidden'"),
        (
            {"tiers": ["hidden"], "max_logits_bytes": 1000},
            "max_logits_bytes: 1,000 bytes is less than the .* that hidden states of about",
        ),
    ],
)
def test_a_mistake_is_named_before_anything_is_scored(
    demo_folder: Path, corpus: Path, tmp_path: Path, options: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        key_of(demo_folder, corpus, tmp_path, **options)
    assert list(tmp_path.iterdir()) == []


def test_a_small_vocabulary_is_kept_whole(bare_model: Path, tmp_path: Path) -> None:
    rows = [{"ids": [3, 4, 5, 6, 7]}]
    spec = CorpusSpec(uri=str(write_lines(tmp_path / "a.jsonl", rows)), ids_column="ids")
    with pytest.raises(ValueError, match=r"top_k: 33 is not an integer within 1 \.\.\. 32"):
        score_directly(bare_model, spec, tmp_path / "runs", tiers=["topk"], top_k=33)
    run = score_directly(bare_model, spec, tmp_path / "runs", tiers=["topk"], top_k=32)
    found = run.document(run.table()["doc_id"][0].as_py())["topk"]
    assert np.isneginf(found["log_tail_mass"]).all()
    np.testing.assert_array_equal(np.sort(found["top_ids"], axis=1), [np.arange(32)] * 4)
    assert run.table("topk")["first_input"].to_pylist() == [3]


def test_states_beyond_what_was_expected_end_the_run(
    demo_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.py").write_text("import os\n" * 50)
    monkeypatch.setattr("logitmill.flows.request._check_size", lambda *a: 1)
    monkeypatch.setattr("logitmill.flows.shards.get_run_logger", logging.getLogger)
    hidden: Any = {"tiers": ["hidden"], "max_logits_bytes": 50_000}
    with pytest.raises(RuntimeError, match=r"max_logits_bytes: it is used up .* keep topk or"):
        score_directly(demo_folder, tmp_path / "a.py", tmp_path / "runs", **hidden)


# ---- whether it is still what it was


def test_a_run_of_all_tiers_verifies(run: Run) -> None:
    said: list[str] = []
    assert verify_run(run, sample=4, on_line=said.append) == []
    assert "compared bit for bit" in said[-1]


def changed(run: Run, tmp_path: Path, tier: str, column: str, *, resize: bool = False) -> Run:
    """A copy whose first part of a tier has another byte, or another size, in its first row.

    The receipt is written anew to say so.
    """
    copy = Path(shutil.copytree(run.uri.removeprefix("file://"), tmp_path / "copy"))
    name = f"{tier}/part-00000.parquet"
    table = pq.read_table(copy / name)
    values = table[column].to_pylist()
    first = bytearray(values[0])
    first[0] ^= 1
    values[0] = bytes(first[: -len(first) // 2]) if resize else bytes(first)
    at = table.schema.get_field_index(column)
    column_of = pa.array(values, table.schema[at].type)
    return rewrite(copy, name, table.set_column(at, table.schema[at], column_of))


def rewrite(copy: Path, name: str, table: pa.Table) -> Run:
    """The copy of a run with another table in a part's place, of which its receipt knows."""
    pq.write_table(table, copy / name)
    data = (copy / name).read_bytes()
    part = Part(name, len(data), hashlib.sha256(data).hexdigest())
    for file in ("shards/00000.json", "manifest.json"):
        stated = json.loads((copy / file).read_text())
        for one in stated["parts"]:
            if one["name"] == name:
                one |= {"bytes": part.bytes, "sha256": part.sha256}
        (copy / file).write_text(json.dumps(stated))
    assert Receipt.read(open_run(str(copy)).folder, 0) is not None
    return open_run(str(copy))


@pytest.mark.parametrize(
    ("tier", "column", "problem"),
    [
        ("topk", "top_logprob_1", "entry 0 of top_logprob_1 of topk is stored as"),
        ("topk", "log_tail_mass", "entry 0 of log_tail_mass of topk is stored as"),
        ("sampled", "count", "entry 0 of count of sampled is stored as"),
        ("hidden", "states", "its hidden states are stored with other bits"),
    ],
)
def test_a_bit_that_is_not_the_models_is_found(
    run: Run, tmp_path: Path, tier: str, column: str, problem: str
) -> None:
    copy = changed(run, tmp_path, tier, column)
    documents = run.table().num_rows
    found = [str(finding) for finding in verify_run(copy, sample=documents)]
    assert len(found) == 1 and problem in found[0]


@pytest.mark.parametrize(
    ("row", "wrong", "sample", "problem"),
    [
        (1, {"rank": 0}, 9, "entry 0 of rank of layer 2 of lens is stored as 0, and is "),
        (0, {"layer": 1}, 0, "has not all layers of "),
        (1, {"doc_id": "other"}, 0, "has not all layers of "),
    ],
)
def test_a_layer_that_is_not_the_models_is_found(
    run: Run, tmp_path: Path, row: int, wrong: dict[str, Any], sample: int, problem: str
) -> None:
    copy = Path(shutil.copytree(run.uri.removeprefix("file://"), tmp_path / "copy"))
    name = "lens/part-00000.parquet"
    table = pq.read_table(copy / name)
    rows = table.to_pylist()
    for column, value in wrong.items():
        if isinstance(rows[row][column], list):
            rows[row][column][0] = value
        else:
            rows[row][column] = value
    found = verify_run(rewrite(copy, name, pa.Table.from_pylist(rows, table.schema)), sample=sample)
    assert len(found) == 1 and problem in str(found[0])


def test_layers_of_many_short_documents_stay_together(tmp_path: Path) -> None:
    tokens = TokenRecords.empty(1)
    tokens.lens = np.arange(130 * 7, dtype=np.float32).reshape(1, 130, 7)
    writer = LensWriter(tmp_path / "part", {}, layers=range(130))
    one: Any = SimpleNamespace(record=SimpleNamespace(doc_id="a"), tokens=tokens)
    for _ in range(8_200):
        writer.add(one)
    writer.close()
    file = pq.ParquetFile(tmp_path / "part")
    sizes = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
    # More rows than Parquet's writer puts into a group unasked.
    assert sizes == [8_192 * 130, 8 * 130]
    found = file.read_row_group(1, ["logprob"])["logprob"].slice(129, 2).to_pylist()
    assert found == [[129.0 * 7], [0.0]]


@pytest.mark.parametrize(("tier", "column"), [("topk", "top_id_1"), ("sampled", "id_0")])
def test_arrays_of_other_lengths_are_found(
    run: Run, tmp_path: Path, tier: str, column: str
) -> None:
    copy = changed(run, tmp_path, tier, column, resize=True)
    (found,) = verify_run(copy, sample=0)
    assert f"has arrays of {column} of another length" in found.problem


@pytest.mark.parametrize("tier", ["topk", "sampled"])
def test_a_part_that_is_laid_out_otherwise_is_refused(run: Run, tmp_path: Path, tier: str) -> None:
    copy = Path(shutil.copytree(run.uri.removeprefix("file://"), tmp_path / "copy"))
    name = f"{tier}/part-00000.parquet"
    table = pq.read_table(copy / name)
    column = "top_id_0" if tier == "topk" else "id_0"
    pq.write_table(table.drop_columns([column]), copy / name)
    with pytest.raises(ValueError, match=rf"{name} of .* no column '{column}'; .* score the"):
        open_run(str(copy)).table(tier)
    (found,) = verify_run(rewrite(copy, name, pq.read_table(copy / name)), sample=0)
    assert f"no column '{column}'; it is of logitmill" in str(found)


def test_on_another_device_values_are_compared_within_a_tolerance(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    from logitmill.flows import rescore

    real = rescore._load

    def load(*args: Any) -> Any:
        pipe, _ = real(*args)
        return pipe, lambda receipt: "scored on another device"

    monkeypatch.setattr(rescore, "_load", load)
    said: list[str] = []
    assert verify_run(run, sample=3, on_line=said.append) == []
    assert "compared within 0.001 nats a token" in said[-1]


def test_draws_read_as_they_were_drawn(run: Run, demo: Pipeline) -> None:
    doc_id = scored(run)[1]
    text = next(Path(run.plan["uri"]).rglob(Path(doc_id).name)).read_text()
    (score,) = demo.score([text], num_draws=9)
    row = run.table("sampled").filter(pc.field("doc_id") == doc_id).to_pylist()[0]
    found = read_draws(row)
    np.testing.assert_array_equal(
        np.repeat(found["ids"], found["counts"]).reshape(-1, 9), score.tokens.drawn_ids
    )


# ---- what it will be


def test_sizes_are_as_expected(
    run: Run, demo_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = CorpusSpec(uri=run.plan["uri"], shard_bytes=3_000)
    assert run.manifest is not None
    found = dict.fromkeys(run.tiers, 0)
    for part in run.manifest["parts"]:
        if (tier := part["name"].split("/")[0]) in found:
            found[tier] += part["bytes"]
    asked = Request(model=str(demo_folder), corpus=spec, out=str(tmp_path / "runs"), **ALL)
    measured = estimate_run(prepare(asked))
    assert measured.sizes["hidden"] == measured.tokens * 256 * 4
    monkeypatch.setattr("logitmill.flows.estimate._LOADED_BYTES", {"cpu": 0})
    stated = estimate_run(prepare(asked))
    assert (measured.rate is not None, stated.rate) == (True, None)
    out = str(Path(run.uri.removeprefix("file://")).parent)
    earlier = estimate_run(prepare(replace(asked, out=out)))
    for expected, within in ((measured, 1.4), (stated, 2.5), (earlier, 1.4)):
        assert expected.sizes.keys() == {*run.tiers, TABLES}
        for tier, size in found.items():
            if tier == "scores" and expected is stated:
                # Of so few documents what a file takes besides is most of it.
                continue
            assert 1 / within < expected.sizes[tier] / size < within, (tier, expected.sized_by)
    assert earlier.sized_by.startswith("as in ")
