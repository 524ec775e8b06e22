"""Bad input, storage that fails, runs at the same time: nothing is lost and nobody is misled."""

from __future__ import annotations

import json
import shutil
import ssl
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import requests
from botocore.exceptions import (
    ClientError,
    EndpointConnectionError,
    NoCredentialsError,
    ProfileNotFound,
)
from flow_helpers import Score, digests, write_lines
from logitmill.engine.remote import remedy, scrub
from logitmill.flows import Run, open_run, score_corpus, scratch, shards
from logitmill.flows.corpus import CorpusSpec, read_shard
from logitmill.flows.folder import Folder, StoreError, endpoint_options, one_line
from logitmill.flows.progress import Attempt
from logitmill.flows.request import Request, prepare
from logitmill.flows.scratch import sweep
from prefect import Flow
from s3fs.errors import translate_boto_error

GOOD = {"text": "def f(x):\n    return x + 1\n"}


def statuses(run: Run) -> dict[str, str]:
    rows = run.table(columns=["doc_id", "status", "error"]).to_pylist()
    for row in rows:
        assert (row["error"] is None) == (row["status"] == "ok")
    return {row["doc_id"]: row["status"] for row in rows}


# ---- a bad document is a row that says so


def test_files_that_cannot_be_scored_become_rows(score: Score, tmp_path: Path) -> None:
    folder = tmp_path / "files"
    folder.mkdir()
    (folder / "a.txt").write_text(GOOD["text"])
    (folder / "b.txt").write_bytes(b"")
    (folder / "c.txt").write_text(" \n\t\n")
    (folder / "d.txt").write_bytes(b"caf\xe9")
    (folder / "e.txt").write_text("x = 1\n")
    run = score(folder, tiers=["tokens", "logits"])
    assert statuses(run) == {
        "a.txt": "ok",
        "b.txt": "empty",
        "c.txt": "ok",
        "d.txt": "invalid_utf8",
        "e.txt": "ok",
    }
    assert run.manifest is not None
    assert (run.manifest["documents"], run.manifest["failed"]) == (5, 2)
    assert run.logits("b.txt").shape == (0, 4096) and "tokens" not in run.document("b.txt")
    assert len(run.logits("e.txt")) == len(run.document("e.txt")["tokens"]["logprob"])
    assert run.document("c.txt")["num_bytes"] == 4


def test_rows_that_cannot_be_scored_become_rows(score: Score, tmp_path: Path) -> None:
    rows: list[Any] = [GOOD, {"text": ""}, {"other": 1}, {"text": None}, {"text": "\ud800"}, GOOD]
    file = write_lines(tmp_path / "rows.jsonl", rows)
    found = list(statuses(score(file)).values())
    assert found == ["ok", "empty", "invalid_value", "invalid_value", "invalid_utf8", "ok"]


def test_ids_outside_the_vocabulary_become_rows(
    score: Score, bare_model: Path, tmp_path: Path
) -> None:
    ids = [[3, 4, 5, 6], [3, 32, 5], [3, -1], [7, 8, 9], []]
    file = write_lines(tmp_path / "ids.jsonl", [{"ids": row} for row in ids])
    run = score(
        CorpusSpec(uri=str(file), ids_column="ids"), model=str(bare_model), recipe="truncated-8"
    )
    found = list(statuses(run).values())
    assert found == ["ok", "invalid_ids", "invalid_ids", "ok", "empty"]
    errors = run.table().column("error").to_pylist()
    assert errors[1] == "input_ids: 32 at position 1 is not in the model's vocabulary of 32"


def test_ten_megabytes_on_one_line(score: Score, word_model: Path, tmp_path: Path) -> None:
    """Long words that the vocabulary does not hold, so that they are few tokens."""
    line = " ".join(["w3", "w4", "x" * 300] * 33_000)
    rows = [{"text": "w3 w4"}, {"text": line}, {"text": "w5"}]
    file = write_lines(tmp_path / "long.jsonl", rows)
    assert file.stat().st_size > 10_000_000
    run = score(file, model=str(word_model))
    found = run.table().to_pylist()
    assert [row["status"] for row in found] == ["ok"] * 3
    assert [row["num_tokens"] for row in found] == [2, 99_000, 1]
    assert found[1]["num_bytes"] == len(line)
    assert found[1]["num_tokens_scored"] == 99_000


def test_weights_that_overflow_make_rows_without_scores(
    score: Score, bare_model: Path, tmp_path: Path
) -> None:
    """Finite weights whose products are not."""
    from safetensors.torch import load_file, save_file

    model = Path(shutil.copytree(bare_model, tmp_path / "overflowing"))
    weights = load_file(model / "model.safetensors")
    weights["lm_head.weight"][5] = 3e38
    weights["model.norm.weight"][:] = 3e38
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    file = write_lines(tmp_path / "ids.jsonl", [{"ids": [3, 4, 5]}, {"ids": [6, 7]}])
    spec = CorpusSpec(uri=str(file), ids_column="ids")
    run = score(spec, model=str(model), recipe="truncated-8", tiers=["tokens", "logits"])
    assert set(statuses(run).values()) == {"nonfinite"}
    assert run.manifest is not None and run.manifest["tokens"] == 0


# ---- a mistake is one line before work starts


def refusal(match: str, **arguments: Any) -> str:
    with pytest.raises(ValueError, match=match) as raised:
        score_corpus(**arguments)
    message = str(raised.value)
    assert "\n" not in message
    return message


def test_mistakes_are_refused_before_anything_runs(
    demo_folder: Path,
    bare_model: Path,
    broken_model: Path,
    corpus: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def never(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a flow run was started")

    monkeypatch.setattr(Flow, "__call__", never)
    good: dict[str, Any] = {
        "model": str(demo_folder),
        "corpus": str(corpus),
        "out": str(tmp_path / "runs"),
    }
    table = tmp_path / "table.parquet"
    pq.write_table(pa.table({"body": ["a b"] * 3, "key": ["k", "l", "k"]}), table)
    (tmp_path / "torn.parquet").write_bytes(table.read_bytes()[:-20])
    (tmp_path / "file").write_text("")

    def spec(**settings: Any) -> CorpusSpec:
        return CorpusSpec(**{"uri": str(table), "text_column": "body", **settings})

    cases: list[tuple[dict[str, Any], str]] = [
        ({"corpus": spec(text_column="text")}, "text_column='text'.*body"),
        ({"corpus": str(tmp_path / "torn.parquet")}, r"torn\.parquet"),
        ({"corpus": str(corpus / "*.rs")}, r"\*\.rs.*matches nothing"),
        ({"corpus": spec(id_column="key")}, "id_column='key': 'k' stands twice"),
        ({"out": str(tmp_path / "file/runs")}, "out: '.*/runs' cannot be .*: '.*/file' is a file"),
        ({"model": str(bare_model)}, "tokenizer: the model folder '.*bare' has none"),
        ({"model": str(broken_model)}, "model.norm.weight in .* holds NaN"),
        ({"model": str(demo_folder) + "x"}, "model: there is no folder '.*modelx'"),
        ({"recipe": "roling"}, "recipe: 'roling' is not one of rolling"),
        ({"recipe": "rolling-9999"}, "context: 9999 is more than the model's 1024"),
        ({"recipe": "conditional"}, "context_column: None"),
        ({"recipe": "strided", "corpus": spec(ids_column="body", text_column="text")}, "recipe: "),
        ({"tiers": ["token"]}, "tiers: 'token' is not one of scores, tokens, topk, "),
        ({"logits_dtype": "int8"}, "logits_dtype: 'int8' is not one of"),
        ({"limit": -1}, "limit=-1"),
        ({"out": "s3://key:word@bucket/x"}, r"out: 's3://\*\*\*@bucket/x' holds a credential"),
        ({"out": "nosuch://x"}, "out: 'nosuch://x' cannot be opened"),
    ]
    for change, match in cases:
        refusal(match, **{**good, **change})
    assert not list((tmp_path / "runs").glob("*/scores"))


def test_output_that_cannot_be_written_is_named(
    demo_folder: Path, corpus: Path, s3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fsspec.implementations.memory import MemoryFileSystem

    said = refusal(
        "out: 's3://nobucket/runs' cannot be written",
        model=str(demo_folder),
        corpus=str(corpus),
        out="s3://nobucket/runs",
        endpoint_url=s3,
    )
    assert "nobucket" in said

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise PermissionError(13, "read-only https://host/x?signature=abc")

    monkeypatch.setattr(MemoryFileSystem, "pipe_file", refuse)
    said = refusal(
        "out: 'memory://ro' cannot be written",
        model=str(demo_folder),
        corpus=str(corpus),
        out="memory://ro",
    )
    assert "read-only" in said and "signature" not in said


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ("file", "out: 'file' cannot be written: '.*/file' is a file; name a folder"),
        ("file/below", "out: 'file/below' cannot be written: '.*/file' is a file; name a folder"),
        (
            "barred",
            "out: 'barred' cannot be written: Permission denied to write in '.*/barred'; na",
        ),
    ],
)
def test_a_place_that_is_none_is_named_and_no_file_of_ours(
    place: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any, **kwargs: Any) -> str:
        raise PermissionError(13, "Permission denied", str(tmp_path / "barred/.tmp-x"))

    # Of root's nothing is barred.
    monkeypatch.setattr(scratch, "mkdtemp", refuse)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    (tmp_path / "barred").mkdir()
    for use in (Folder.check_writable, lambda folder: folder.write("name", b"")):
        with pytest.raises(StoreError, match=said) as raised:
            use(Folder(place))
        assert ".tmp" not in str(raised.value)


@pytest.mark.parametrize(
    ("kind", "helps"),
    [
        (EndpointConnectionError(endpoint_url="http://nowhere"), "; check endpoint_url or AWS_END"),
        (
            NoCredentialsError(),
            "; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE, or",
        ),
        (ProfileNotFound(profile="x"), "; check AWS_PROFILE"),
        (
            translate_boto_error(ClientError({"Error": {"Code": "InvalidAccessKeyId"}}, "get")),
            "; check what the credentials may do there: AWS_ACCESS_KEY_ID and",
        ),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_helps_against_an_error_of_s3_is_said(kind: Exception, helps: str) -> None:
    for said in (one_line(kind), scrub(kind, {})):
        assert helps in said
    assert remedy(PermissionError(13, "no")) == remedy(OSError("x")) == ""
    with pytest.raises(ValueError, match="endpoint_url: 'localhost:9' is no server's URL; give"):
        endpoint_options("s3://bucket", "localhost:9")


def test_what_helps_with_s3_is_not_said_of_other_servers() -> None:
    refused = PermissionError(13, "no")
    refused.__cause__ = requests.HTTPError(response=requests.Response())
    for error in (refused, requests.exceptions.SSLError("certificate"), ssl.SSLError("x")):
        assert remedy(error) == ""


# ---- storage that fails, shards that are poisoned


def fail(times: int, error: Exception, when: Callable[..., bool]) -> Callable[[Any], Any]:
    """Wrap a function: it raises `error` the first `times` that `when` holds for its arguments."""
    left = [times]

    def wrap(function: Any) -> Any:
        def failing(*args: Any, **kwargs: Any) -> Any:
            if left[0] and when(*args, **kwargs):
                left[0] -= 1
                raise error
            return function(*args, **kwargs)

        return failing

    return wrap


def test_a_write_that_fails_once_is_tried_again(
    score: Score, finished: Run, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = fail(1, OSError(5, "Input/output error"), lambda self, local, name: "00001" in name)
    monkeypatch.setattr(Folder, "publish", full(Folder.publish))
    spec = CorpusSpec(uri=str(corpus), shard_bytes=3000)
    assert digests(score(spec, tiers=["tokens", "logits"])) == digests(finished)


def test_s3_that_fails_mid_shard_leaves_the_others_and_a_rerun_completes(
    score: Score, corpus: Path, s3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from s3fs import S3FileSystem

    put_file = S3FileSystem._put_file

    async def broken(self: Any, local: str, remote: str, *args: Any, **options: Any) -> Any:
        if "part-00001" in remote:
            raise ConnectionResetError("reset https://host/x?X-Amz-Signature=abc")
        return await put_file(self, local, remote, *args, **options)

    spec = CorpusSpec(uri=str(corpus), shard_bytes=3000)
    options: dict[str, Any] = {"endpoint_url": s3, "out": "s3://bucket/faulty"}
    with monkeypatch.context() as patch:
        patch.setattr(S3FileSystem, "_put_file", broken)
        S3FileSystem.clear_instance_cache()
        with pytest.raises(
            RuntimeError, match=r"^1 of \d+ shards failed.*shard 1: out: s3://"
        ) as e:
            score(spec, **options)
    S3FileSystem.clear_instance_cache()
    assert "run again" in str(e.value) and "abc" not in str(e.value)
    there = {"endpoint_url": s3}
    partial = open_run("s3://bucket/faulty", partial=True, storage_options=there)
    num_shards = len(partial.plan["corpus"]["shards"])
    assert len(partial.paths()) == num_shards - 1
    with pytest.raises(ValueError, match="is not complete"):
        open_run("s3://bucket/faulty", storage_options=there)
    whole = score(spec, **options)
    assert len(whole.paths()) == num_shards
    assert digests(whole) == digests(score(spec))


def test_a_poisoned_shard_takes_no_other_with_it(
    score: Score, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []

    def poisoned(spec: CorpusSpec, shard: Any) -> Any:
        calls.append(shard.index)
        if shard.index == 1:
            raise MemoryError("poison")
        return read_shard(spec, shard)

    spec = CorpusSpec(uri=str(corpus), shard_bytes=3000)
    with monkeypatch.context() as patch:
        patch.setattr(shards, "read_shard", poisoned)
        with pytest.raises(RuntimeError, match=r"shard 1: poison; run again"):
            score(spec)
    assert calls.count(1) == 1 + shards.RETRIES
    num_shards = max(calls) + 1
    assert num_shards > 2 and set(calls) == set(range(num_shards))
    receipts = {p.stem for p in tmp_path.glob("runs/*/shards/*.json")}
    assert receipts == {f"{i:05d}" for i in range(num_shards)} - {"00001"}
    assert not list(tmp_path.rglob(".tmp-*"))
    assert score(spec).table().num_rows == 8


def test_a_mistake_found_in_a_shard_is_not_tried_again(
    score: Score, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []

    def changed(spec: CorpusSpec, shard: Any) -> Any:
        calls.append(shard.index)
        raise ValueError("corpus changed: ...")

    monkeypatch.setattr(shards, "read_shard", changed)
    with pytest.raises(RuntimeError, match="corpus changed"):
        score(corpus)
    assert calls == [0]


# ---- two at once


def test_two_runs_of_one_key_at_once_end_with_the_same_bytes(
    score: Score, finished: Run, corpus: Path
) -> None:
    spec = CorpusSpec(uri=str(corpus), shard_bytes=3000)
    results: list[Run] = []
    threads = [
        threading.Thread(target=lambda: results.append(score(spec, tiers=["tokens", "logits"])))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    first, second = results
    assert first.uri == second.uri
    assert digests(first) == digests(finished)
    assert not list(Path(first.uri).rglob(".tmp-*"))


def test_sweeping_leaves_live_writers_alone(tmp_path: Path) -> None:
    folder = Folder(str(tmp_path))
    dead = tmp_path / ".tmp-dead"
    dead.mkdir()
    (dead / "tokens").write_text("half a part")
    with folder.scratch() as scratch:
        (scratch / "tokens").write_text("half a part")
        folder.sweep()
        assert (scratch / "tokens").exists()
        assert not dead.exists()
        assert folder.publish(scratch / "tokens", "tokens/part-0").bytes == 11
    assert {p.name for p in tmp_path.rglob("*")} == {"tokens", "part-0"}


def test_writers_hold_out_against_sweepers(tmp_path: Path) -> None:
    folder, done = Folder(str(tmp_path)), threading.Event()

    def keep_sweeping() -> None:
        while not done.is_set():
            sweep(tmp_path)

    sweeper = threading.Thread(target=keep_sweeping)
    sweeper.start()
    try:
        for i in range(300):
            folder.write(f"file{i % 3}", b"x" * i)
            assert folder.read(f"file{i % 3}") == b"x" * i
    finally:
        done.set()
        sweeper.join()


def test_a_file_is_there_whole_or_not_at_all(tmp_path: Path, monkeypatch: Any) -> None:
    folder = Folder(str(tmp_path))
    folder.write_json("a.json", {"n": 1})

    def die(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", die)
    with pytest.raises(KeyboardInterrupt):
        folder.write_json("a.json", {"n": 2})
    assert json.loads((tmp_path / "a.json").read_text()) == {"n": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]
    with pytest.raises(StoreError, match="cannot be opened"):
        Folder("nosuch://x")


def test_an_interrupted_flow_stops_its_task_at_the_next_document(
    score: Score, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Attempt.add_document

    def interrupt(attempt: Attempt, *, scored: bool) -> None:
        shards.stopped.update(attempt for attempt, _ in shards.TALLY.running())
        original(attempt, scored=scored)

    with monkeypatch.context() as patch:
        patch.setattr(Attempt, "add_document", interrupt)
        with pytest.raises(RuntimeError, match="interrupted"):
            score(corpus)
    assert not list(tmp_path.glob("runs/*/scores/*"))
    assert score(corpus).table().num_rows == 8


def test_preparing_leaves_nothing_behind_and_the_plan_is_all_that_is_written(
    demo_folder: Path, corpus: Path, tmp_path: Path
) -> None:
    prepared = prepare(Request(model=str(demo_folder), corpus=str(corpus), out=str(tmp_path)))
    assert not list(tmp_path.rglob("*"))
    prepared.write_plan()
    files = [str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()]
    assert files == [f"{prepared.job.run_key}/plan.json"]
