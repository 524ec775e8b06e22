"""S3 that fails: the run completes with the undisturbed bytes, or it says why and a rerun does.

Each test prints a line: fault, how often, seconds, rows lost, duplicates, files whose bytes differ
(`pytest -rP` shows them). LOGITMILL_LONG=1 has every fault at many shares of the
requests, and at every place.
"""

from __future__ import annotations

import json
import logging
import os
import re
import tempfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

import pytest
import s3fs
from flow_helpers import SECRET, Score, digests
from logitmill.engine.checkpoint import find_model
from logitmill.flows import Run, folder, open_run
from logitmill.flows.corpus import CorpusSpec
from logitmill.flows.folder import Folder
from logitmill.flows.shards import RETRIES
from s3 import Fault, FaultyProxy

TOKEN = "token-of-the-session-of-the-tests"
LONG = bool(os.environ.get("LOGITMILL_LONG"))
SHARES = [0.02, 0.05, 0.1, 0.2, 0.3] if LONG else [0.06]
SPEC = CorpusSpec(uri="s3://bucket/faults/corpus", shard_bytes=3_000)


@pytest.fixture(autouse=True)
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where scratch folders of these tests lie; they have a session's credentials."""
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    monkeypatch.setenv("AWS_SESSION_TOKEN", TOKEN)
    # A server that does not answer is taken for gone after fifteen seconds otherwise.
    monkeypatch.setattr(s3fs.S3FileSystem, "read_timeout", 2)
    s3fs.S3FileSystem.clear_instance_cache()
    yield tmp_path / "tmp"
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that tries once, where it would for minutes."""
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)


@pytest.fixture
def proxy(s3: str) -> Iterator[FaultyProxy]:
    with FaultyProxy(s3) as proxy:
        yield proxy


@pytest.fixture(scope="module")
def undisturbed(s3: str, corpus: Path, demo_folder: Path) -> Run:
    """The run of the same corpus by a server that does not fail."""
    from logitmill.flows import score_corpus

    s3fs.S3FileSystem(endpoint_url=s3).put(f"{corpus}/", "bucket/faults/corpus/", recursive=True)
    uri = score_corpus(
        model=str(demo_folder),
        corpus=SPEC,
        out="s3://bucket/faults/undisturbed",
        tiers=["tokens"],
        endpoint_url=s3,
    )
    return open_run(uri, storage_options={"endpoint_url": s3})


def check(what: str, times: int, started: float, run: Run, whole: Run, scratch: Path) -> None:
    """Nothing is missing, twice, of other bytes or left over; and the line that says so."""
    rows = run.table(columns=["doc_id"]).column(0).to_pylist()
    wanted = whole.table(columns=["doc_id"]).column(0).to_pylist()
    lost, twice = len(set(wanted) - set(rows)), len(rows) - len(set(rows))
    ours, theirs = digests(run), digests(whole)
    differing = sum(ours.get(name) != theirs.get(name) for name in {*ours, *theirs})
    seconds = time.monotonic() - started
    print(
        f"{what:28} {times:3} times, {seconds:4.1f} s: {lost} rows lost, {twice} duplicates, "
        f"{differing} files differ"
    )
    assert (lost, twice, differing) == (0, 0, 0)
    assert not run.folder.filesystem.list_multipart_uploads("bucket")
    assert not list(scratch.rglob(".tmp-*"))


# ---- faults that pass


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize(
    "fault", ["500", "slow down", "reset", "late reset", "truncated", "dribble", "silence"]
)
def test_what_passes_is_not_noticed(
    fault: Fault,
    share: float,
    score: Score,
    undisturbed: Run,
    proxy: FaultyProxy,
    scratch: Path,
) -> None:
    started = time.monotonic()
    if fault == "silence":
        proxy.inject(fault, when=r"(PUT|GET) .*(part-00001|file2)", times=2)
    else:
        proxy.inject(fault, share=share)
    out = f"s3://bucket/faults/passing/{fault.replace(' ', '-')}-{share}"
    run = score(SPEC, tiers=["tokens"], out=out, endpoint_url=proxy.endpoint)
    proxy.heal()
    assert proxy.counts[fault] > 1
    check(f"{fault}, {share:.0%}", proxy.counts[fault], started, run, undisturbed, scratch)


# ---- faults that stay


WHERE = {
    "part": (r"PUT .*tokens/part-00001", RuntimeError, "shard 1: out: .*part-00001.*cannot"),
    "receipt": (r"PUT .*shards/00001\.json", RuntimeError, "shard 1: out: .*00001.json cannot"),
    "manifest": (r"PUT .*/manifest\.json", OSError, "^out: .*/manifest.json cannot be written: "),
    "listing": (r"GET /bucket\?.*prefix=faults%2Fstaying.*shards", OSError, "^out: .*shards can"),
    "corpus": (r"GET .*corpus/one/file2", RuntimeError, "shard .: uri='s3.*file2.py' cannot"),
    "all": (r"PUT .*staying", ValueError, "^out: 's3://bucket/faults/staying.* cannot be written"),
}  # fmt: skip
REASONS = {
    "500": "We encountered an internal error",
    "slow down": "reduce your request rate",
    "denied": "Access Denied",
    "skew": "difference between the request time and the current time",
    "reset": "onnect",
    "silence": "[Tt]ime",
}


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize(
    ("fault", "where"),
    [
        ("500", "part"),
        ("slow down", "receipt"),
        ("denied", "corpus"),
        ("denied", "all"),
        ("skew", "all"),
        ("500", "listing"),
        ("reset", "manifest"),
    ]
    if not LONG
    else [(fault, where) for fault in REASONS for where in WHERE],
)
def test_what_stays_is_said_in_a_line_and_a_rerun_completes(
    fault: Fault,
    where: str,
    score: Score,
    undisturbed: Run,
    proxy: FaultyProxy,
    scratch: Path,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    for name in ("logitmill", "prefect"):
        caplog.set_level(logging.DEBUG, logger=name)
    started = time.monotonic()
    pattern, kind, said = WHERE[where]
    proxy.inject(fault, when=pattern)
    out = f"s3://bucket/faults/staying/{fault.replace(' ', '-')}-{where}"
    with pytest.raises(kind, match=said) as raised:
        score(SPEC, tiers=["tokens"], out=out, endpoint_url=proxy.endpoint)
    assert "\n" not in str(raised.value)
    assert re.search(REASONS[fault], str(raised.value))
    assert proxy.counts[fault] > 0
    shown = (
        "".join(traceback.format_exception(raised.value)) + caplog.text + str(capfd.readouterr())
    )
    for secret in (SECRET, TOKEN, "key-of-the-tests"):
        assert secret not in shown
    proxy.heal()
    run = score(SPEC, tiers=["tokens"], out=out, endpoint_url=proxy.endpoint)
    check(f"{fault}, {where}", proxy.counts[fault], started, run, undisturbed, scratch)


@pytest.mark.usefixtures("impatient", "undisturbed")
def test_what_storage_sends_back_is_not_passed_on(
    score: Score, proxy: FaultyProxy, tmp_path: Path
) -> None:
    """The server's answer has the client's authorization and token in its text."""
    from test_score import stored_on_server

    there = {"endpoint_url": proxy.endpoint}
    place = Folder("s3://bucket/faults/echo", there)
    errors: list[BaseException] = []
    for fault in ("denied", "500"):
        proxy.inject(fault)  # type: ignore[arg-type]
        for act in (
            lambda: place.write("a", b"x"),
            lambda: place.sizes("a"),
            lambda: place.check_writable(),
            lambda: find_model("s3://bucket/faults/model", storage_options=there),
            lambda: score(SPEC, out=str(tmp_path / "runs"), endpoint_url=proxy.endpoint),
        ):
            with pytest.raises((OSError, ValueError)) as raised:
                act()
            errors.append(raised.value)
        proxy.heal()
    proxy.inject("denied", when=r"PUT .*part-00000")
    with pytest.raises(RuntimeError) as failed:
        score(SPEC, out="s3://bucket/faults/echo", endpoint_url=proxy.endpoint)
    shown = "".join(map("".join, map(traceback.format_exception, [*errors, failed.value])))
    known = json.dumps(stored_on_server(), default=str)
    assert "Signature=***" in shown and "part-00000" in known
    for secret in (SECRET, TOKEN, "key-of-the-tests"):
        assert secret not in shown + known
    assert not re.search(r"Signature=[0-9a-f]", shown + known)


# ---- a disk that is full


@pytest.mark.parametrize("place", ["s3", "disk"])
def test_a_full_disk_is_named_and_a_rerun_completes(
    place: str,
    score: Score,
    finished: Run,
    corpus: Path,
    s3: str,
    scratch: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Parts are written to /dev/full."""
    started = time.monotonic()
    make, calls = folder.make_scratch, 0

    def make_full(within: Path) -> tuple[Path, int]:
        nonlocal calls
        made = make(within)
        calls += 1
        (made[0] / "scores").symlink_to("/dev/full")
        return made

    out = "s3://bucket/faults/full" if place == "s3" else str(tmp_path / "runs")
    options = {"tiers": ["tokens", "logits"], "out": out, "endpoint_url": s3}
    spec = CorpusSpec(uri=str(corpus), shard_bytes=3_000)
    where = re.escape(str(scratch / "logitmill")) if place == "s3" else f"{out}/[0-9a-f]+"
    with monkeypatch.context() as patch:
        patch.setattr(folder, "make_scratch", make_full)
        with pytest.raises(
            RuntimeError, match=rf"shard \d: out: the disk of '{where}', .* full \(No space left"
        ) as raised:
            score(spec, **options)
    assert ("set TMPDIR" in str(raised.value)) == (place == "s3")
    run = score(spec, **options)
    shards = len(run.plan["corpus"]["shards"])
    # What is there for all to be full is not tried again; the run itself writes twice.
    assert calls == (1 + RETRIES) * shards if place == "s3" else calls <= shards + 2
    if place == "s3":
        check("full disk", calls, started, run, finished, scratch)
    else:
        assert digests(run) == digests(finished)
        assert not list(tmp_path.rglob(".tmp-*"))
