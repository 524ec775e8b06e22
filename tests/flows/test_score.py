"""A run from the caller's side: what it leaves, what decides its key, what resuming does."""

from __future__ import annotations

import json
import shutil
import threading
import weakref
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from flow_helpers import SECRET, Score, digests, write_lines
from logitmill.engine import Pipeline
from logitmill.engine.pipeline import EngineSettings
from logitmill.engine.records import TOKEN_DTYPES
from logitmill.flows import Run, score_corpus, shards
from logitmill.flows.corpus import CorpusSpec, plan_corpus, read_shard
from logitmill.flows.request import Job, Request, prepare
from prefect import Flow


def spec(corpus: Path, **settings: Any) -> CorpusSpec:
    return CorpusSpec(uri=str(corpus), **{"shard_bytes": 3_000, **settings})


def texts(corpus: Path) -> dict[str, str]:
    return {str(p.relative_to(corpus)): p.read_text() for p in sorted(corpus.rglob("*.py"))}


# ---- what a run leaves


def test_a_run_leaves_the_layout_of_the_design(finished: Run) -> None:
    num_shards = len(finished.plan["corpus"]["shards"])
    assert num_shards > 2
    expected = {"plan.json", "manifest.json", "report.html"}
    expected |= {"summary/counts.parquet", "summary/outliers.parquet"}
    for i in range(num_shards):
        expected |= {f"{tier}/part-{i:05d}.parquet" for tier in ("scores", "tokens", "logits")}
        expected |= {f"shards/{i:05d}{end}" for end in (".json", ".counts.parquet")}
        expected |= {f"shards/{i:05d}.outliers.parquet"}
    root = Path(finished.uri)
    assert {str(p.relative_to(root)) for p in root.rglob("*") if p.is_file()} == expected
    assert root.name == finished.plan["run_key"]


def test_the_manifest_names_every_part_by_its_hash(finished: Run) -> None:
    import hashlib

    manifest = finished.manifest
    assert manifest is not None
    parts = manifest["parts"] + manifest["summaries"]
    for part in parts:
        data = Path(finished.uri, part["name"]).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (part["bytes"], part["sha256"])
    tables = {str(p.relative_to(finished.uri)) for p in Path(finished.uri).rglob("*.parquet")}
    assert {part["name"] for part in parts} == tables
    rows = finished.table().to_pylist()
    assert manifest["documents"] == len(rows)
    assert manifest["tokens"] == sum(row["num_tokens_scored"] for row in rows)
    assert manifest["loglikelihood"] == pytest.approx(sum(row["loglikelihood"] for row in rows))


def test_rows_are_the_documents_in_corpus_order(finished: Run, corpus: Path) -> None:
    names = list(texts(corpus))
    assert finished.table().column("doc_id").to_pylist() == names
    assert finished.table("tokens", ["doc_id"]).column("doc_id").to_pylist() == names
    assert set(finished.table().column("source").to_pylist()) == {"one", "two"}
    planned = [s for s in plan_corpus(spec(corpus)).to_dict()["shards"]]
    assert finished.plan["corpus"]["shards"] == planned


def test_receipts_say_what_their_shard_holds(finished: Run) -> None:
    rows = 0
    for i, part in enumerate(finished.paths()):
        receipt = json.loads(Path(finished.uri, f"shards/{i:05d}.json").read_text())
        table = open_parquet(part)
        assert receipt["documents"] == table.num_rows
        assert receipt["tokens"] == sum(table.column("num_tokens_scored").to_pylist())
        assert set(receipt["versions"]) == {"logitmill", "torch", "triton", "transformers"}
        assert receipt["seconds"] > 0 and receipt["device"]
        rows += table.num_rows
    assert rows == 8


def open_parquet(uri: str) -> Any:
    import pyarrow.parquet as pq

    return pq.read_table(uri.removeprefix("file://"))


# ---- tiers


def test_records_of_the_run_are_the_engines_to_the_bit(
    finished: Run, corpus: Path, demo: Pipeline
) -> None:
    plan = plan_corpus(spec(corpus))
    documents = [d for shard in plan.shards for d in read_shard(spec(corpus), shard)]
    for expected in demo.score(documents):
        stored = finished.document(expected.record.doc_id)
        tokens = stored.pop("tokens")
        assert stored == vars(expected.record)
        for name, dtype in TOKEN_DTYPES.items():
            assert tokens[name].dtype == dtype
            np.testing.assert_array_equal(tokens[name], getattr(expected.tokens, name))


def test_logits_come_back(finished: Run, corpus: Path, demo: Pipeline, demo_folder: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(demo_folder)
    name, text = next(iter(texts(corpus).items()))
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert len(ids) < demo.max_positions, "one window"
    expected = np.asarray(demo.get_logits([tokenizer.bos_token_id, *ids]))[:-1]
    np.testing.assert_allclose(finished.logits(name), expected, atol=1e-4)
    logprobs = finished.logprobs(name)
    np.testing.assert_allclose(np.exp(logprobs.astype(float)).sum(1), 1, atol=1e-5)
    record = finished.document(name)["tokens"]
    np.testing.assert_array_equal(logprobs[np.arange(len(ids)), ids], record["logprob"])


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_logits_of_many_windows_are_in_order_and_batches_decide_no_bytes(
    score: Score, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    """Windows of 64, chunks of 64 rows, batches of one window and of many: rows in their place."""
    from logitmill.flows import rows

    monkeypatch.setattr(rows, "_GROUP_BYTES", 10 * 4096 * 4)
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a.txt").write_text("for i in range(10):\n    total += values[i] * 3\n" * 40)
    (folder / "b.txt").write_text("x = 1\n")
    (folder / "c.txt").write_text("while x:\n    x -= 1\n" * 9)
    run, other = (
        score(
            folder,
            tiers=["tokens", "logits"],
            recipe="rolling-64",
            logits_dtype=dtype,
            out=str(tmp_path / f"{budget}"),
            engine=EngineSettings(max_batch_tokens=budget, logits_memory=64 * 4096 * 12),
        )
        for budget in (1, 500)
    )
    assert digests(run) == digests(other)
    stored = run.table("logits", ["doc_id", "first_row", "num_rows"]).to_pylist()
    step = 10 if dtype == "float32" else 20
    for name, least in (("a.txt", 200), ("b.txt", 1), ("c.txt", 60)):
        tokens = run.document(name)["tokens"]
        num_rows = len(tokens["token_id"])
        assert num_rows >= least
        cut = [(row["first_row"], row["num_rows"]) for row in stored if row["doc_id"] == name]
        starts = range(0, num_rows, step)
        assert cut == [(start, min(step, num_rows - start)) for start in starts]
        logprobs = run.logprobs(name)
        picked = logprobs[np.arange(num_rows), tokens["token_id"]]
        np.testing.assert_array_equal(picked, tokens["logprob"].astype(dtype))
        np.testing.assert_array_equal(logprobs.max(1), tokens["top1_logprob"].astype(dtype))


def test_logits_as_float16_take_half(score: Score, finished: Run, corpus: Path) -> None:
    name = next(iter(texts(corpus)))
    run = score(corpus / name, tiers=["logits"], logits_dtype="float16")
    stored = run.logprobs(Path(name).name)
    assert stored.dtype == np.float16
    np.testing.assert_allclose(stored, finished.logprobs(name), rtol=1e-3, atol=1e-2)
    np.testing.assert_allclose(run.logits(Path(name).name), finished.logits(name), atol=4e-2)


def test_logits_beyond_the_limit_are_refused_and_confirmed_by_raising_it(
    demo_folder: Path, corpus: Path, tmp_path: Path, finished: Run
) -> None:
    request = Request(
        model=str(demo_folder), corpus=str(corpus), out=str(tmp_path / "o"), tiers=["logits"]
    )
    actual = sum(Path(p[7:]).stat().st_size for p in finished.paths("logits"))
    logits_bytes = prepare(request).logits_bytes
    assert logits_bytes is not None and actual / 2 < logits_bytes < actual * 2
    with pytest.raises(ValueError, match=r"max_logits_bytes: 1,000,000 .* raise it to confirm"):
        prepare(replace(request, max_logits_bytes=10**6))
    assert prepare(replace(request, max_logits_bytes=10**9)).logits_bytes == logits_bytes


def test_logits_beyond_the_limit_end_the_run_where_the_estimate_was_too_low(
    score: Score, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from logitmill.flows import request

    options: dict[str, Any] = {"tiers": ["logits"], "max_logits_bytes": 20 * 10**6}
    with monkeypatch.context() as patch:
        patch.setattr(request, "_check_size", lambda *args: 0)
        # Two are read side by side, and either may have its turn first.
        said = r"[34] of 5 shards failed, .* shard \d: max_logits_bytes: .* raise it"
        with pytest.raises(RuntimeError, match=said):
            score(spec(corpus), **options)
    run = score(spec(corpus), tiers=["logits"])
    assert run.manifest is not None and run.manifest["tokens"] * 4096 * 4 > 20 * 10**6


# ---- a server that is gone


def test_a_run_stands_without_its_artifacts(
    score: Score, corpus: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from logitmill.flows import score as module

    def refuse(**artifact: Any) -> None:
        raise httpx.ConnectError("[Errno 111] Connection refused")

    monkeypatch.setattr(module, "create_table_artifact", refuse)
    assert score(spec(corpus)).manifest is not None
    assert "no artifacts of it: [Errno 111] Connection refused" in caplog.text


def test_a_server_that_is_gone_is_named(
    score: Score, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any, **options: Any) -> None:
        raise httpx.ConnectError("[Errno 111] Connection refused")

    monkeypatch.setattr(Flow, "__call__", refuse)
    with pytest.raises(RuntimeError, match=r"Prefect's server is gone .*Errno 111.*run again"):
        score(spec(corpus))


# ---- the engine of a process


@pytest.mark.parametrize("tier", ["tokens", "logits"])
def test_the_engine_is_passed_on_with_the_last_batch_of_a_shard(
    score: Score, corpus: Path, monkeypatch: pytest.MonkeyPatch, tier: str
) -> None:
    """Logits keep it to the end: only then is known what is left for those of the next shard."""
    real = Pipeline.score
    held: list[bool] = []

    def watch(pipe: Pipeline, *args: Any, on_launched: Any = None, **options: Any) -> Any:
        def pass_on() -> None:
            held.append(shards._turn.locked())
            if on_launched is not None:
                on_launched()
            held.append(shards._turn.locked())

        return real(pipe, *args, on_launched=pass_on, **options)

    monkeypatch.setattr(Pipeline, "score", watch)
    run = score(CorpusSpec(uri=str(corpus), shard_bytes=1 << 30), tiers=[tier])
    assert held == [True, tier == "logits"]
    receipt = json.loads(Path(run.uri, "shards/00000.json").read_text())
    assert 0 < receipt["device_seconds"] <= receipt["seconds"]


def test_seconds_of_shards_do_not_overlap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "_spans", deque())
    monkeypatch.setattr(shards.time, "monotonic", iter([20.0, 26.0, 40.0, 51.0, 53.0]).__next__)
    # From 10 to 20, from 18 to 26, from 30 to 40; from 50 to 51 while the one from 45 had until 53.
    started = (10.0, 18.0, 30.0, 50.0, 45.0)
    assert list(map(shards._count_seconds, started)) == [10.0, 6.0, 10.0, 1.0, 8.0]


def test_an_engine_makes_room_once_nobody_uses_it(
    demo_folder: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Engine:
        pass

    made: list[weakref.ref[Engine]] = []

    def load(*args: Any) -> Engine:
        assert all(other() is None for other in made), "two at once"
        engine = Engine()
        made.append(weakref.ref(engine))
        return engine

    monkeypatch.setattr(shards, "load_pipeline", load)
    engine, used, done = shards._Engine(), threading.Event(), threading.Event()
    one = prepare(Request(model=str(demo_folder), corpus=str(corpus), out=str(tmp_path))).job
    other = replace(one, digest="another")

    def use(job: Job, until: threading.Event) -> None:
        with engine.use(job, is_worker=False):
            used.set()
            assert until.wait(30)

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(use, one, done)
        assert used.wait(30)
        second = pool.submit(use, other, done)
        assert not second.done() and len(made) == 1
        done.set()
        first.result(30)
        second.result(30)
    assert len(made) == 2


# ---- what decides the key


def test_the_key_changes_when_and_only_when_the_numbers_do(
    demo_folder: Path, corpus: Path, tmp_path: Path
) -> None:
    base = Request(model=str(demo_folder), corpus=spec(corpus), out=str(tmp_path / "a"))

    def key(**changes: Any) -> str:
        return prepare(replace(base, **changes)).job.run_key

    model = shutil.copytree(demo_folder, tmp_path / "model")
    moved = shutil.copytree(corpus, tmp_path / "moved")
    same = {
        "out": {"out": str(tmp_path / "b")},
        "batch": {"engine": EngineSettings(max_batch_tokens=99)},
        "device said": {"engine": EngineSettings(device="cpu", dtype="float32")},
        "plain said": {"engine": EngineSettings(quantization="none")},
        "logits' memory": {"engine": EngineSettings(logits_memory=64 << 20)},
        "model's folder": {"model": str(model)},
        "corpus' folder": {"corpus": spec(moved)},
        "order of tiers": {"tiers": ("scores",)},
        "recipe said": {"recipe": "rolling-1024"},
        "logits' limit": {"max_logits_bytes": 5},
        "unused dtype": {"logits_dtype": "float16"},
    }
    assert {name: key(**change) for name, change in same.items()} == dict.fromkeys(same, key())
    other_model = shutil.copytree(demo_folder, tmp_path / "other")
    weights = bytearray((other_model / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (other_model / "model.safetensors").write_bytes(weights)
    other_corpus = shutil.copytree(corpus, tmp_path / "changed")
    file = next(other_corpus.rglob("*.py"))
    file.write_bytes(file.read_bytes()[:-1] + b"#")
    different = [
        key(),
        key(model=str(other_model)),
        key(corpus=spec(other_corpus)),
        key(recipe="rolling-512"),
        key(engine=EngineSettings(dtype="bfloat16")),
        key(engine=EngineSettings(quantization="fp8")),
        key(engine=EngineSettings(quantization="int8")),
        key(engine=EngineSettings(fp8_head=True)),
        key(tiers=("tokens",)),
        key(tiers=("logits",)),
        key(tiers=("logits",), logits_dtype="float16"),
        key(limit=3),
        key(limit=4),
    ]
    assert len(set(different)) == len(different)


def test_software_and_device_decide_the_key_and_a_run_of_others_is_named(
    demo_folder: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from logitmill.flows import request

    base = Request(model=str(demo_folder), corpus=spec(corpus), out=str(tmp_path / "runs"))
    first = prepare(base)
    assert first.other is None
    first.write_plan()
    assert prepare(base).other is None, "it is the run itself"
    now = request.versions()
    for name in now:
        with monkeypatch.context() as patch:
            patch.setattr(request, "versions", lambda name=name: {**now, name: "0.7"})
            other = prepare(base)
            assert other.job.run_key != first.job.run_key
            assert other.other == (
                f"{first.job.folder.uri} holds the same with {name} {now[name]}, not 0.7; last "
                "bits can differ, so this is a run of its own"
            )
            assert prepare(replace(base, limit=3)).other is None
            assert prepare(replace(base, recipe="rolling-64")).other is None
    device = first.described["device"]
    monkeypatch.setattr(request, "name_device", lambda device: "Abacus")
    other = prepare(base)
    assert other.job.run_key != first.job.run_key
    assert other.other is not None and f"device {device}, not Abacus" in other.other


def test_shards_that_were_cut_otherwise_are_not_resumed(
    demo_folder: Path, corpus: Path, tmp_path: Path
) -> None:
    base = Request(model=str(demo_folder), corpus=spec(corpus), out=str(tmp_path / "runs"))
    prepared = prepare(base)
    prepared.write_plan()
    prepare(base)
    plan = dict(prepared.described["corpus"])
    plan["shards"] = plan["shards"][:-1]
    prepared.job.folder.write_json("plan.json", {**prepared.described, "corpus": plan})
    with pytest.raises(ValueError, match=r"out: .* whose shards were cut otherwise"):
        prepare(base)


# ---- the same bytes


def test_another_root_and_batch_give_the_same_bytes(
    score: Score, finished: Run, corpus: Path, tmp_path: Path
) -> None:
    run = score(
        spec(corpus),
        tiers=["tokens", "logits"],
        out=str(tmp_path / "elsewhere"),
        engine=EngineSettings(max_batch_tokens=300),
    )
    assert run.uri != finished.uri
    assert digests(run) == digests(finished)


# ---- resuming


def test_a_second_call_does_nothing(
    score: Score, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = score(spec(corpus))

    def times() -> dict[Path, int]:
        return {p: p.stat().st_mtime_ns for p in Path(run.uri).rglob("*")}

    def never(*args: Any, **options: Any) -> None:
        raise AssertionError("the engine was asked for")

    before = times()
    monkeypatch.setattr(shards._engine, "load", never)
    assert score(spec(corpus)).uri == run.uri
    assert times() == before


@pytest.mark.parametrize("harm", ["missing", "shortened", "torn", "no receipt", "no summary"])
def test_what_does_not_check_out_is_done_again_and_nothing_else(
    score: Score, corpus: Path, harm: str
) -> None:
    run = score(spec(corpus))
    root, before = Path(run.uri), digests(run)
    harmed = {
        "missing": "scores/part-00001.parquet",
        "shortened": "shards/00001.counts.parquet",
        "torn": "shards/00001.json",
        "no receipt": "shards/00001.json",
        "no summary": "summary/outliers.parquet",
    }[harm]
    if harm in ("missing", "no receipt", "no summary"):
        (root / harmed).unlink()
    else:
        data = (root / harmed).read_bytes()
        (root / harmed).write_bytes(data[: len(data) // 2])
    receipts = {p: p.stat().st_mtime_ns for p in root.glob("shards/*.json")}
    assert digests(score(spec(corpus))) == before
    redone = {p.stem for p, t in receipts.items() if p.stat().st_mtime_ns != t}
    assert redone <= {"00001"}
    assert bool(redone) == (harm in ("missing", "shortened", "torn"))
    assert len(list(root.glob("shards/*.json"))) == len(run.plan["corpus"]["shards"])


# ---- recipes that need more than documents


@pytest.mark.parametrize("recipe", ["disjoint-128", "strided-128"])
def test_a_recipe_that_concatenates_makes_one_document(
    score: Score, corpus: Path, recipe: str
) -> None:
    run = score(spec(corpus), recipe=recipe)
    (row,) = run.table().to_pylist()
    assert row["doc_id"] == "stream"
    size = sum(len(t.encode()) for t in texts(corpus).values()) + 2 * 7
    left_out = 128 * 10 if recipe.startswith("disjoint") else 20
    assert size - left_out < row["num_bytes"] <= size


def test_llamacpp_and_truncated_go_file_by_file(score: Score, corpus: Path) -> None:
    rows = score(spec(corpus), recipe="llamacpp-32").table().to_pylist()
    assert [row["doc_id"] for row in rows] == list(texts(corpus))
    assert all(row["num_tokens_scored"] == row["num_windows"] * 15 for row in rows)
    rows = score(spec(corpus), recipe="truncated-64").table().to_pylist()
    assert all(row["num_tokens_scored"] == 63 and row["truncated"] for row in rows)


def test_conditional_scores_the_text_alone(score: Score, demo: Pipeline, tmp_path: Path) -> None:
    rows = [{"q": "import numpy as", "a": " np\n"}, {"q": "def f(x):", "a": "\n    return x\n"}]
    file = write_lines(tmp_path / "pairs.jsonl", rows)
    run = score(
        CorpusSpec(uri=str(file), text_column="a", context_column="q"), recipe="conditional"
    )
    expected = demo.score([(r["q"], r["a"]) for r in rows], recipe="conditional")
    assert run.table().column("loglikelihood").to_pylist() == [
        e.record.loglikelihood for e in expected
    ]


# ---- other places


def test_memory_gives_the_same_bytes(score: Score, finished: Run, corpus: Path) -> None:
    run = score(spec(corpus), tiers=["tokens", "logits"], out="memory://somewhere/runs")
    assert digests(run) == digests(finished)
    name = next(iter(texts(corpus)))
    np.testing.assert_array_equal(run.logits(name), finished.logits(name))


def test_a_model_on_s3_is_the_model(
    score: Score,
    corpus: Path,
    demo_folder: Path,
    s3: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Wherever it lies, the run's key is the same, and what was scored is not scored again."""
    import s3fs

    monkeypatch.setenv("LOGITMILL_CACHE", str(tmp_path / "cache"))
    s3fs.S3FileSystem(endpoint_url=s3).put(f"{demo_folder}/", "bucket/model/", recursive=True)
    run = score(corpus, model="s3://bucket/model/", endpoint_url=s3)
    assert run.plan["model"]["name"] == "s3://bucket/model/"
    assert len(list((tmp_path / "cache/models").glob("model-*/model.safetensors"))) == 1
    assert score(corpus).uri == run.uri


def test_s3_gives_the_same_bytes_and_tells_no_secret(
    score: Score,
    finished: Run,
    corpus: Path,
    s3: str,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    import s3fs

    fs = s3fs.S3FileSystem(endpoint_url=s3)
    fs.put(f"{corpus}/", "bucket/corpus/", recursive=True)
    remote = CorpusSpec(uri="s3://bucket/corpus", shard_bytes=3_000)
    options: dict[str, Any] = {"tiers": ["tokens", "logits"], "endpoint_url": s3}
    run = score(remote, out="s3://bucket/runs", **options)
    assert score(remote, out="s3://bucket/runs", **options).uri == run.uri

    # The plan differs (S3 has ETags of its own), and with it the key that parts carry.
    local, there = finished.table("tokens"), run.table("tokens")
    assert there.replace_schema_metadata(None).equals(local.replace_schema_metadata(None))
    name = next(iter(texts(corpus)))
    np.testing.assert_array_equal(run.logits(name), finished.logits(name))
    from_file = score(spec(corpus), out="s3://bucket/from-file", **options)
    assert digests(from_file) == digests(finished)

    secrets = [SECRET, "key-of-the-tests"]
    for path in fs.find("bucket/runs"):
        data = fs.cat_file(path)
        assert not any(secret.encode() in data for secret in secrets), path
    out, err = capfd.readouterr()
    said = caplog.text + out + err + json.dumps(stored_on_server(), default=str)
    assert "score-corpus" in said
    assert not any(secret in said for secret in secrets)


def test_storage_options_stay_in_this_process(
    score: Score, corpus: Path, s3: str, server_url: str
) -> None:
    import s3fs

    fs = s3fs.S3FileSystem(endpoint_url=s3)
    fs.put(f"{corpus}/one/", "bucket/one/", recursive=True)
    hidden = "given-by-hand"
    remote = CorpusSpec(
        uri="s3://bucket/one",
        storage_options={"key": hidden, "secret": hidden, "endpoint_url": s3},
    )
    run = score(remote)
    again = score_corpus.with_options(name="renamed")
    assert again(corpus=remote, model=run.plan["model"]["name"], out=run.uri + "-2")
    assert run.table().num_rows == 4
    assert hidden not in json.dumps(stored_on_server(), default=str)
    for path in Path(run.uri).parent.rglob("*"):
        assert path.is_dir() or hidden.encode() not in path.read_bytes()


PAGE = 200
"""Most things that the server lists at a time."""


def stored_on_server() -> list[dict[str, Any]]:
    """Everything that the server of this process knows of its runs."""
    from logitmill.flows.server import use_server
    from prefect.client.orchestration import get_client

    with use_server(), get_client(sync_client=True) as client:
        kinds = ("flows", "flow_runs", "task_runs", "artifacts", "logs")
        found: list[dict[str, Any]] = []
        for kind in kinds:
            for offset in count(step=PAGE):
                asked = {"limit": PAGE, "offset": offset}
                page = client._client.post(f"/{kind}/filter", json=asked).json()
                found += page
                if len(page) < PAGE:
                    break
        return found


def test_the_server_gets_artifacts(score: Score, corpus: Path, server_url: str) -> None:
    run = score(spec(corpus))
    found = {a["key"]: a for a in stored_on_server() if a.get("key") and run.uri in str(a)}
    assert {"shards", "report"} <= set(found)
    table = json.loads(found["shards"]["data"])
    assert [row["shard"] for row in table] == list(range(len(table)))
    assert f"file://{run.uri}/report.html" in found["report"]["data"]
    progress = [a for a in stored_on_server() if a.get("type") == "progress"]
    assert 100.0 in [a["data"] for a in progress]
    assert any(
        r.get("name") == f"{corpus} by {run.plan['model']['name']}" for r in stored_on_server()
    )


def test_a_model_rewritten_in_place_is_another_model(
    score: Score, demo_folder: Path, corpus: Path, tmp_path: Path
) -> None:
    import shutil

    from safetensors.torch import load_file, save_file

    folder = tmp_path / "model"
    shutil.copytree(demo_folder, folder)
    before = score(corpus, model=str(folder)).table(columns=["loglikelihood"])
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"] * 2
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    after = score(corpus, model=str(folder)).table(columns=["loglikelihood"])
    assert not before.equals(after)


def test_empty_rows_are_part_of_a_stream(score: Score, tmp_path: Path, demo_folder: Path) -> None:
    from logitmill.engine import pipeline

    rows = ["a b c", "", "d e f"] * 40
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    run = score(file, recipe="disjoint-16")
    (stream,) = pipeline(demo_folder).score(rows, recipe="disjoint-16")
    assert run.table()["num_tokens"].to_pylist() == [stream.record.num_tokens]
    assert run.table()["loglikelihood"].to_pylist() == [stream.record.loglikelihood]


# ---- corpora that grow


def test_only_what_is_new_is_scored(
    score: Score, corpus: Path, demo_folder: Path, tmp_path: Path
) -> None:
    growing = Path(shutil.copytree(corpus, tmp_path / "growing"))
    newest = sorted(growing.rglob("*.py"))[-2:]
    held_back = {path: path.read_text() for path in newest}
    for path in newest:
        path.unlink()
    first = score(growing, only_new=True)
    assert first.table().num_rows == 6
    for path, text in held_back.items():
        path.write_text(text)
    # The same content under another name is not new.
    sorted(growing.rglob("*.py"))[0].rename(growing / "moved.py")
    second = score(growing, only_new=True)
    assert second.uri != first.uri
    assert second.table()["doc_id"].to_pylist() == [str(p.relative_to(growing)) for p in newest]
    runs = str(tmp_path / "runs")
    assert score_corpus(str(demo_folder), str(growing), runs, only_new=True) == runs
    # Other settings ask for other numbers.
    assert score(growing, only_new=True, recipe="rolling-64").table().num_rows == 8
    with pytest.raises(ValueError, match="limit: 3 cannot go with only_new"):
        score(growing, only_new=True, limit=3)


def test_a_run_with_a_limit_has_scored_nothing_whole(score: Score, corpus: Path) -> None:
    assert score(corpus, limit=8).table().num_rows == 8
    assert score(corpus, only_new=True).table().num_rows == 8


def test_a_plan_that_does_not_say_what_it_read_counts_for_nothing(
    score: Score, corpus: Path
) -> None:
    run = score(corpus)
    path = Path(run.uri) / "plan.json"
    plan = json.loads(path.read_text())
    del plan["reading"]
    other = path.parent.with_name("0" * 16)
    shutil.copytree(run.uri, other)
    (other / "plan.json").write_text(json.dumps(plan))
    shutil.rmtree(run.uri)
    assert score(corpus, only_new=True).table().num_rows == 8


def test_an_unfinished_run_has_scored_nothing(score: Score, corpus: Path, tmp_path: Path) -> None:
    run = score(corpus, only_new=True)
    (Path(run.uri) / "manifest.json").unlink()
    assert score(corpus, only_new=True).uri == run.uri


def test_a_run_that_was_begun_is_finished_before_what_came_later(
    score: Score, corpus: Path, tmp_path: Path
) -> None:
    growing = Path(shutil.copytree(corpus, tmp_path / "growing"))
    run = score(growing, only_new=True)
    (Path(run.uri) / "manifest.json").unlink()
    (growing / "later.py").write_text("x = 1\n")
    assert score(growing, only_new=True).uri == run.uri
    assert score(growing, only_new=True).table()["doc_id"].to_pylist() == ["later.py"]
