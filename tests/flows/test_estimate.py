"""What a run is expected to be, held to what it then is; nothing is left behind."""

from __future__ import annotations

import argparse
import gzip
import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
from flow_helpers import write_lines
from logitmill.engine.pipeline import EngineSettings
from logitmill.engine.recipes import find_recipe
from logitmill.flows import CorpusSpec, Run, cli, estimate, open_run, score_corpus
from logitmill.flows.estimate import TABLES, Estimate, estimate_run, without_traces
from logitmill.flows.request import Prepared, Request, prepare

DECODER = Path(json.__file__).with_name("decoder.py").read_text()


def prepare_run(model: Path, corpus: Any, out: Path, **options: Any) -> Prepared:
    return prepare(Request(model=str(model), corpus=corpus, out=str(out), **options))


def sizes_of(run: Run) -> dict[str, int]:
    """Bytes of what a run keeps, by tier."""
    found: dict[str, int] = {}
    for file in Path(run.uri).rglob("*"):
        tier = file.parent.name if file.parent.name in run.tiers else TABLES
        if file.is_file() and file.name not in ("plan.json", "manifest.json"):
            found[tier] = found.get(tier, 0) + file.stat().st_size
    return found


def check(expected: Estimate, run: Run, *, within: float, sizes_within: float) -> None:
    assert run.manifest is not None
    tokens = run.manifest["tokens"]
    assert tokens / within <= expected.tokens <= tokens * within
    documents = run.manifest["documents"]
    assert documents / within <= expected.documents <= documents * within
    found = sizes_of(run)
    assert found.keys() == expected.sizes.keys()
    for tier, size in found.items():
        factor = expected.sizes[tier] / size
        assert 1 / sizes_within <= factor <= sizes_within, (tier, factor)


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """80 files of code of uneven length, 0.3 to 2.5 KB."""
    root = tmp_path_factory.mktemp("many")
    for i in range(80):
        start = (i * 700) % len(DECODER)
        (root / f"file{i:02}.py").write_text(DECODER[start : start + 300 + (i * 37) % 75 * 30])
    return root


def test_a_run_is_as_it_was_expected(
    many: Path, demo_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From a sample that is a quarter of it: tokens within a tenth, sizes within a half."""
    monkeypatch.setattr(estimate, "_TAKEN_BYTES", 1 << 13)
    spec = CorpusSpec(uri=str(many), shard_bytes=1 << 15)
    prepared = prepare_run(demo_folder, spec, tmp_path, tiers=["tokens"])
    expected = estimate_run(prepared)
    assert expected.num_sampled < 40
    assert expected.rate is not None and "scored here" in expected.rate.source
    assert expected.shards_left == len(prepared.plan.shards) > 2
    assert expected.tokens_left == expected.tokens
    score_corpus(model=str(demo_folder), corpus=spec, out=str(tmp_path), tiers=["tokens"])
    run = open_run(str(tmp_path))
    check(expected, run, within=1.1, sizes_within=1.5)

    after = estimate_run(prepare_run(demo_folder, spec, tmp_path, tiers=["tokens"]))
    check(after, run, within=1.1, sizes_within=1.5)
    assert after.rate is not None and after.rate.source == f"as in {run.uri}"
    assert (after.shards_left, after.tokens_left, after.seconds_left) == (0, 0, 0.0)


@pytest.mark.parametrize("compressed", [False, True], ids=["lines", "gzip"])
def test_rows_are_weighed_by_what_is_scored_of_them(
    demo_folder: Path, tmp_path: Path, compressed: bool
) -> None:
    """What else is in a file, or how it is compressed, adds no token."""
    rows = [
        {"text": DECODER[i * 90 : i * 90 + 400 + i % 7 * 90], "noise": f"{i}" * 900}
        for i in range(100)
    ]
    corpus = write_lines(tmp_path / "corpus.jsonl", rows)
    if compressed:
        corpus = tmp_path / "corpus.jsonl.gz"
        corpus.write_bytes(gzip.compress((tmp_path / "corpus.jsonl").read_bytes()))
    spec = CorpusSpec(uri=str(corpus), shard_bytes=1 << 15)
    expected = estimate_run(prepare_run(demo_folder, spec, tmp_path / "runs"))
    score_corpus(model=str(demo_folder), corpus=spec, out=str(tmp_path / "runs"))
    check(expected, open_run(str(tmp_path / "runs")), within=1.1, sizes_within=1.5)


def test_of_a_large_shard_the_beginning_is_read(
    demo_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compressed rows of one shard: how many there are is told from how well they compress."""
    monkeypatch.setattr(estimate, "_READ_BYTES", 1 << 15)
    source = Path(argparse.__file__).read_text()
    rows = [{"text": source[i * 300 : i * 300 + 300]} for i in range(300)]
    lines = write_lines(tmp_path / "corpus.jsonl", rows).read_bytes()
    (tmp_path / "corpus.jsonl.gz").write_bytes(gzip.compress(lines))
    for name in ("corpus.jsonl", "corpus.jsonl.gz"):
        spec = CorpusSpec(uri=str(tmp_path / name))
        expected = estimate_run(prepare_run(demo_folder, spec, tmp_path / "runs"))
        assert 300 / 1.3 <= expected.documents <= 300 * 1.3, name


@pytest.mark.parametrize("recipe", ["truncated-64", "disjoint-256"])
def test_tokens_are_those_of_the_recipe(
    many: Path, demo_folder: Path, tmp_path: Path, recipe: str
) -> None:
    expected = estimate_run(prepare_run(demo_folder, str(many), tmp_path, recipe=recipe))
    score_corpus(model=str(demo_folder), corpus=str(many), out=str(tmp_path), recipe=recipe)
    manifest = open_run(str(tmp_path)).manifest
    assert manifest is not None
    assert manifest["tokens"] / 1.1 <= expected.tokens <= manifest["tokens"] * 1.1
    assert expected.documents == manifest["documents"]


def test_logits_and_ids(bare_model: Path, tmp_path: Path) -> None:
    corpus = write_lines(tmp_path / "ids.jsonl", [{"ids": list(range(3, 20))}] * 50)
    spec = CorpusSpec(uri=str(corpus), ids_column="ids")
    options = {"tiers": ["logits"], "recipe": find_recipe("rolling", prefix="none")}
    expected = estimate_run(prepare_run(bare_model, spec, tmp_path / "runs", **options))
    assert expected.tokens == 50 * 16
    assert expected.sizes["logits"] == 50 * 16 * 32 * 4


def test_a_model_that_takes_long_to_load_is_not_loaded(
    many: Path, demo_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(estimate, "_LOADED_BYTES", {"cpu": 1000})
    monkeypatch.setattr(estimate, "load_pipeline", None)
    prepared = prepare_run(demo_folder, str(many), tmp_path, tiers=["tokens"])
    expected = estimate_run(prepared)
    assert (expected.rate, expected.seconds_left) == (None, None)
    assert expected.sized_by == "from stated figures"
    score_corpus(model=str(demo_folder), corpus=str(many), out=str(tmp_path), tiers=["tokens"])
    check(expected, open_run(str(tmp_path)), within=1.1, sizes_within=1.6)
    # A run of other settings tells nothing of this one.
    other = prepare_run(demo_folder, str(many), tmp_path, engine=EngineSettings(dtype="bfloat16"))
    assert estimate_run(other).rate is None


# ---- the command


def test_a_dry_run_says_it_all_and_leaves_nothing(
    many: Path,
    demo_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    out = tmp_path / "not" / "there"
    arguments = ["score", str(demo_folder), str(many), "--out", str(out), "--keep", "tokens"]
    price = ["--price-per-gb-month", "1000"]

    def run(*more: str) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["logitmill", *arguments, *more])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        said = capsys.readouterr()
        return int(ended.value.code or 0), said.out, said.err

    code, said, err = run("--dry-run", *price)
    assert (code, err) == (0, "")
    lines = dict(line.split(maxsplit=1) for line in said.splitlines())
    assert lines["corpus"].startswith(f"{many}: 80 documents, ")
    assert lines["layers"].startswith("all 5 layers resident")
    assert "80 documents that were tokenized" in lines["tokens"]
    assert "scores " in lines["storage"] and "tables " in lines["storage"]
    assert lines["cost"].endswith(" a month, at 1000 a GB and month")
    assert " tokens/s (from a sample of " in lines["time"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["scratch"]
    assert list(scratch.iterdir()) == []
    code, said, err = run(*price)
    assert (code, said) == (2, "")
    assert err.startswith("error: --price-per-gb-month: 1000 is for --dry-run")


def test_a_folder_that_is_there_stays(tmp_path: Path) -> None:
    with without_traces(str(tmp_path / "a" / "b")):
        (tmp_path / "a" / "b").mkdir(parents=True)
        (tmp_path / "a" / "kept").write_text("")
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["kept"]
    (tmp_path / "empty").mkdir()
    with without_traces(str(tmp_path / "empty")):
        pass
    assert (tmp_path / "empty").is_dir()


def test_a_dry_run_on_s3_leaves_no_object(many: Path, demo_folder: Path, s3: str) -> None:
    prepared = prepare(
        Request(
            model=str(demo_folder), corpus=str(many), out="s3://bucket/dry/runs", endpoint_url=s3
        )
    )
    expected = estimate_run(prepared)
    assert expected.rate is not None
    assert prepared.job.folder.filesystem.find("bucket/dry") == []
