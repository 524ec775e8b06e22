"""`logitmill compare` on runs of the bundled model: page, command, storage, flow."""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from logitmill.engine import EngineSettings
from logitmill.flows import Run, compare_runs, open_run
from logitmill.flows.cli import app
from logitmill.flows.compare import compare, comparison
from logitmill.flows.compare.page import render_comparison
from logitmill.flows.corpus import CorpusSpec
from logitmill.flows.folder import Folder
from logitmill.flows.run import find_runs
from logitmill.flows.score import score_corpus
from typer.testing import CliRunner


@pytest.fixture(scope="module")
def plain(finished: Run, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A copy of the finished run in a folder of this module's."""
    copy = tmp_path_factory.mktemp("compared") / finished.plan["run_key"]
    return open_run(str(shutil.copytree(finished.uri, copy)))


@pytest.fixture(scope="module")
def quantized(plain: Run, corpus: Path, demo_folder: Path) -> Run:
    """The same documents in fp8, beside the first run and cut into other shards."""
    uri = score_corpus(
        model=str(demo_folder),
        corpus=CorpusSpec(uri=str(corpus), shard_bytes=2_000),
        out=str(Path(plain.uri).parent),
        tiers=["tokens", "logits"],
        engine=EngineSettings(quantization="fp8"),
    )
    return open_run(uri)


def test_what_fp8_costs_is_what_the_stored_logits_say(plain: Run, quantized: Run) -> None:
    found = compare_runs(plain.uri, quantized.uri, level="distributions")
    kl, tokens = [], 0
    for doc_id in plain.table(columns=["doc_id"])["doc_id"].to_pylist():
        p, q = (run.logprobs(doc_id).astype(np.float64) for run in (plain, quantized))
        kl.append((np.exp(p) * (p - q)).sum(1))
        tokens += len(p)
    assert found.distributions is not None and found.tokens is not None
    assert found.distributions.kl.mean == pytest.approx(np.concatenate(kl).mean(), rel=1e-4)
    assert found.tokens.tokens == found.distributions.tokens == tokens
    assert found.documents.all is not None
    assert found.documents.all.documents == 8
    assert found.uri == f"{Path(plain.uri).parent}/compare/{found.uri.split('/')[-2]}/compare.html"
    numbers = json.loads(Path(found.uri).with_name("compare.json").read_text())
    assert numbers["distributions"]["kl"]["mean"] == found.distributions.kl.mean
    # The folder of comparisons is no run: what reads all runs of a root goes on.
    root = Folder(str(Path(plain.uri).parent))
    assert {run.uri for run in find_runs(root)} == {plain.uri, quantized.uri}


def test_the_page_is_whole_and_escaped(plain: Run, quantized: Run, tmp_path: Path) -> None:
    found = compare(plain, quantized)
    page = render_comparison(found)
    for section in ("documents", "scatter", "kl", "deltas", "shift", "tokens", "provenance"):
        assert f'<section id="{section}"' in page
    assert "Engine: linears" in page
    assert not re.search(r'(src|href)="(?!#)', page)
    told = re.search(r'<div class="tokens".*?</div>', page, re.DOTALL)
    assert told is not None and 'class="worse' in told[0]
    # What the tokens spell is the document.
    (first, *_) = found.told
    text = re.sub(r"<i [^>]*>.</i>|<[^>]+>", "", told[0])
    assert len(text) > 100 and first in page

    evil = "<script>alert(1)</script>\u202e"
    for document in (*found.documents.worse, *found.documents.better):
        found.told[evil] = found.told.get(document.doc_id, next(iter(found.told.values())))
        object.__setattr__(document, "doc_id", evil)
        object.__setattr__(document, "source", evil)
    page = render_comparison(found)
    assert "<script>alert" not in page and "\u202e" not in page
    assert "&lt;script&gt;alert" in page


def test_the_page_of_many_sources_is_small(plain: Run, quantized: Run) -> None:
    found = compare(plain, quantized)
    documents = found.documents
    (drift, *_) = documents.groups
    groups = [replace(drift, source="\u00e4<" * 200 + str(i), language="de") for i in range(257)]
    counts = np.ones((800, 800), np.int64)
    named = [replace(documents.worse[0], doc_id="\u00e4<" * 5000 + str(i)) for i in range(10)]
    worst = replace(documents, groups=groups, counts=counts, worse=named, residual=named)
    page = render_comparison(replace(found, documents=worst))
    assert len(page.encode()) < 1_000_000


def test_the_command_shows_a_table_and_where_the_page_is(
    plain: Run, quantized: Run, tmp_path: Path
) -> None:
    runner = CliRunner()
    out = str(tmp_path / "there.html")
    result = runner.invoke(app, ["compare", plain.uri, quantized.uri, "--out", out])
    assert result.exit_code == 0, result.output
    for name in (
        "Median \u0394 bits/byte",
        "Mean PPL(B)",
        "Same top p",
        "RMS \u0394p",
        "99.9 % KL",
    ):
        assert name in result.output
    assert result.output.rstrip().endswith(f"page    {out}")
    assert (tmp_path / "there.json").exists()
    assert "<code>there.json</code>" in Path(out).read_text()


def test_mistakes_of_the_command(plain: Run, quantized: Run, tmp_path: Path) -> None:
    runner = CliRunner()
    elsewhere = shutil.copytree(quantized.uri, tmp_path / "elsewhere" / "b")
    nowhere = str(tmp_path / "nowhere")
    shutil.copytree(plain.uri, tmp_path / "runs/a")
    beside = shutil.copytree(quantized.uri, tmp_path / "runs/b")
    for arguments, words in (
        ([plain.uri, nowhere], "run: there is no run in"),
        ([plain.uri, str(elsewhere)], "--out: .* are in different folders"),
        ([nowhere], "holds no two complete runs of one recipe"),
        ([str(elsewhere)], "is one run, and two are compared; none of its recipe is beside it"),
        (
            [str(beside)],
            f"two are compared; name one of its recipe beside it, as {tmp_path}/runs/a",
        ),
        ([plain.uri, plain.uri, "--out", "s3://k:s@bucket/x"], "holds a credential"),
        ([plain.uri, plain.uri, "--out", "s3://x.html"], "--out: 's3://x.html' names no bucket"),
    ):
        result = runner.invoke(app, ["compare", *arguments])
        assert result.exit_code == 2, result.output
        assert re.search(words, result.output), result.output


def test_the_last_two_runs_of_a_folder(plain: Run, quantized: Run, tmp_path: Path) -> None:
    for name, run, at in (("b", plain, 100), ("a", quantized, 200), ("c", quantized, 300)):
        copy = Path(shutil.copytree(run.uri, tmp_path / name))
        os.utime(copy / "manifest.json", (at, at))
    (tmp_path / "c/manifest.json").unlink()
    base, other = comparison.find_latest(str(tmp_path))
    assert (base, other) == (f"{tmp_path}/b", f"{tmp_path}/a")


def test_no_more_manifests_are_read_than_it_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for n in range(6):
        (tmp_path / f"r{n}").mkdir()
        (tmp_path / f"r{n}/manifest.json").write_text(json.dumps({"recipe_hash": "abc"[n % 3]}))
        os.utime(tmp_path / f"r{n}/manifest.json", (n, n))
    read, read_json = [], Folder.read_json
    monkeypatch.setattr(
        Folder, "read_json", lambda self, name: read.append(name) or read_json(self, name)
    )
    assert comparison.find_latest(str(tmp_path)) == (f"{tmp_path}/r2", f"{tmp_path}/r5")
    assert read.count("manifest.json") == 4


def test_runs_on_s3_and_the_flow(plain: Run, quantized: Run, s3: str) -> None:
    from logitmill.flows.compare.flow import compare_scheduled

    options = {"endpoint_url": s3}
    for run in (plain, quantized):
        folder = Folder(f"s3://bucket/{run.plan['run_key']}", options)
        folder.filesystem.put(run.uri, folder.path("").rstrip("/"), recursive=True)
    base, other = (f"s3://bucket/{run.plan['run_key']}" for run in (plain, quantized))
    uri = compare_scheduled(base, other, level="tokens", endpoint_url=s3)
    assert uri.startswith("s3://bucket/compare/") and uri.endswith("/compare.html")
    there = Folder(uri.rsplit("/", 1)[0], options)
    numbers = there.read_json("compare.json")
    assert numbers is not None
    here = compare(plain, quantized, level="tokens").to_dict()
    assert numbers["tokens"] == here["tokens"] and numbers["documents"] == here["documents"]
    assert (there.read("compare.html") or b"").startswith(b"<!doctype html>")
