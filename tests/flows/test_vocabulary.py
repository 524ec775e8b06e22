"""Expected and observed counts of the vocabulary as runs keep them, and what is told of them."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from direct import score_directly
from logitmill.engine import Document, Frequencies, Frequency, Pipeline
from logitmill.flows import Run, open_run, vocabulary
from logitmill.flows.corpus import CorpusSpec
from logitmill.flows.publish import read_table, read_tables
from logitmill.flows.report.panel import Material
from logitmill.flows.report.vocabulary import vocabulary_panel
from logitmill.flows.request import Request, prepare
from logitmill.flows.store import find_receipts
from logitmill.flows.verify import verify_run
from logitmill.flows.vocabulary import SHARD, VOCABULARY, find_bias, merge_vocabulary, tabulate
from test_cli import in_process


@pytest.fixture(scope="module")
def run(corpus: Path, demo_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run of several shards whose folders are sources."""
    spec = CorpusSpec(uri=str(corpus), shard_bytes=3_000)
    return score_directly(demo_folder, spec, tmp_path_factory.mktemp("runs"), vocabulary=True)


def test_a_run_has_the_counts_of_its_documents(run: Run, corpus: Path, demo: Pipeline) -> None:
    frequencies = Frequencies()
    documents = [
        Document(path.name, text=path.read_text(), source=path.parent.name)
        for path in sorted(corpus.rglob("*.py"))
    ]
    list(demo.score(documents, frequencies=frequencies))
    table = run.summary("vocabulary")
    assert len(run.plan["corpus"]["shards"]) > 2 and table.schema.equals(VOCABULARY)
    assert not any(table["partial"].to_pylist())
    rows = table.to_pylist()
    assert [(r["source"], r["token_id"]) for r in rows] == sorted(
        (r["source"], r["token_id"]) for r in rows
    )
    for source, expected in frequencies.read().items():
        own = {r["token_id"]: r for r in rows if r["source"] == source}
        ids = np.flatnonzero((expected.expected > 0) | (expected.observed > 0))
        assert list(own) == ids.tolist()
        assert [own[i]["observed"] for i in own] == expected.observed[ids].tolist()
        np.testing.assert_allclose([own[i]["expected"] for i in own], expected.expected[ids])
        np.testing.assert_allclose([own[i]["variance"] for i in own], expected.variance[ids])
        assert all(r["token"] == demo.spelled[i] for i, r in own.items())
    assert sum(r["observed"] for r in rows) == run.manifest["tokens"]  # type: ignore[index]


def test_a_run_with_its_vocabulary_is_verified(run: Run) -> None:
    assert verify_run(run, sample=1) == []
    part = next(Path(run.uri, "shards").glob("*.vocabulary.parquet"))
    part.rename(part.with_suffix(".gone"))
    found = [str(f) for f in verify_run(run, sample=0)]
    part.with_suffix(".gone").rename(part)
    assert any(part.name in line for line in found)


def test_a_table_of_fewer_columns_is_verified_by_those(run: Run, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(run.uri, tmp_path / "copy"))
    stored = copy / "summary/vocabulary.parquet"
    manifest = json.loads((copy / "manifest.json").read_text())
    (part,) = (p for p in manifest["summaries"] if p["name"] == "summary/vocabulary.parquet")

    def store(table: pa.Table) -> list[str]:
        pq.write_table(table, stored)
        part["bytes"] = stored.stat().st_size
        part["sha256"] = hashlib.sha256(stored.read_bytes()).hexdigest()
        (copy / "manifest.json").write_text(json.dumps(manifest))
        return [str(finding) for finding in verify_run(open_run(str(copy)), sample=0)]

    table = pq.read_table(stored).drop_columns(["partial"])
    assert store(table) == []
    (found,) = store(table.slice(1))
    assert "not what the tables of the shards add up to" in found


def test_it_is_in_the_key_where_it_is_made(corpus: Path, demo_folder: Path, tmp_path: Path) -> None:
    def key(**options: bool) -> str:
        asked = Request(model=str(demo_folder), corpus=str(corpus), out=str(tmp_path), **options)  # type: ignore[arg-type]
        return prepare(asked).job.run_key

    assert key() == key(vocabulary=False) != key(vocabulary=True)


def some(source: str, seed: int, size: int = 50) -> Frequency:
    made = np.random.default_rng(seed)
    observed = made.integers(0, 5, size)
    expected = made.random(size) * (observed > 1)
    return Frequency(expected, expected / 2, observed)


def test_tables_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = [f"t{i}" for i in range(80)]
    shards = [
        {"a": some("a", 1), "b": some("b", 2, 80)},
        {"b": some("b", 3), "c": some("c", 4)},
        {"d": some("d", 5)},
        {},
    ]
    tables = [tabulate(shard, tokens) for shard in shards]
    merged = merge_vocabulary(tables)
    assert merged.equals(merge_vocabulary([pa.concat_tables(tables)]))
    rows = {(r["source"], r["token_id"]): r for r in merged.to_pylist()}
    one, two = shards[0]["b"], shards[1]["b"]
    for i in range(80):
        row = rows.get(("b", i), {"observed": 0, "expected": 0.0, "token": f"t{i}"})
        more = (two.observed[i], two.expected[i]) if i < 50 else (0, 0.0)
        assert row["observed"] == one.observed[i] + more[0]
        assert row["expected"] == one.expected[i] + more[1] and row["token"] == f"t{i}"
    monkeypatch.setattr(vocabulary, "MAX_SOURCES", 2)
    bounded = merge_vocabulary(tables)
    assert bounded["source"].unique().to_pylist() == ["(other)", "a", "b"]
    # What is called (other) takes no source's place.
    assert merge_vocabulary([bounded]).equals(bounded)
    total = sum(f.observed.sum() for shard in shards for f in shard.values())
    assert sum(bounded["observed"].to_pylist()) == total
    assert merge_vocabulary([]).equals(VOCABULARY.empty_table())


def test_a_source_that_some_shard_does_not_tell_apart_is_partial() -> None:
    tokens = [f"t{i}" for i in range(50)]
    shards = [
        {"a": some("a", 1), "b": some("b", 2), "(other)": some("", 3)},
        {"c": some("c", 4)},
        {"a": some("a", 5), "c": some("c", 6), "(other)": some("", 7)},
    ]
    merged = merge_vocabulary([tabulate(shard, tokens) for shard in shards])
    found = {r["source"]: r["partial"] for r in merged.to_pylist()}
    # What a shard without (other) does not have is not in it at all.
    assert found == {"(other)": False, "a": False, "b": True, "c": True}
    assert [find_bias(merged, s).partial for s in (None, "a", "b")] == [False, False, True]
    some_shards = merge_vocabulary([tabulate(shard, tokens) for shard in shards[:2]])
    assert set(some_shards.filter(some_shards["partial"])["source"].to_pylist()) == {"c"}
    told = vocabulary_panel(cast("Material", SimpleNamespace(vocabulary=merged)))
    assert told is not None and "may have more tokens among (other)" in told.notes[-1]
    labels = [row[0] for row in told.tables[0][1].rows]
    assert set(labels) == {"(other)", "a", "b (in part)", "c (in part)"}


def test_shards_are_read_while_they_are_added(run: Run) -> None:
    receipts = list(find_receipts(run.folder, 100).values())
    streams = list(read_tables(run.folder, "vocabulary", receipts))
    # One a shard, however small: what is beside (other) in one says nothing of the next.
    assert len(streams) == len(receipts) > 2
    assert all(pa.types.is_dictionary(s.schema.field("source").type) for s in streams)
    whole = [read_table(run.folder, f"shards/{r.shard:05d}.vocabulary.parquet") for r in receipts]
    assert all(table.schema.equals(SHARD) for table in whole)
    assert merge_vocabulary(streams).equals(merge_vocabulary(whole))
    assert merge_vocabulary(whole).equals(run.summary("vocabulary"))


def test_bias_by_its_definition() -> None:
    frequency = Frequency(
        expected=np.array([6.0, 1.0, 3.0, 0.0]),
        variance=np.array([2.25, 0.25, 1.0, 0.0]),
        observed=np.array([3, 4, 3, 0]),
    )
    other = Frequency(np.array([1.0, 1.0]), np.array([1.0, 1.0]), np.array([2, 0]))
    table = tabulate({"a": frequency, "b": other}, ["x", "y", "z", ""])
    found = find_bias(table, "a")
    assert found.num_tokens == 10
    o, e = np.array([0.3, 0.4, 0.3]), np.array([0.6, 0.1, 0.3])
    assert found.divergence == pytest.approx((o * np.log2(o / e)).sum())
    assert [(u.token, u.observed, u.z) for u in found.too_seldom] == [("y", 4, 3.0)]
    assert [(u.token, u.expected, u.z) for u in found.too_often] == [("x", 6.0, -2.0)]
    whole = find_bias(table)
    assert whole.num_tokens == 12
    assert [u.z for u in whole.too_often] == [(5 - 7) / np.sqrt(3.25)]
    with pytest.raises(ValueError, match=r"source: 'c' is not one of 'a', 'b'"):
        find_bias(table, "c")
    with pytest.raises(ValueError, match=r"count: 0 is not a number of tokens"):
        find_bias(table, count=0)


def test_rare_tokens_are_told_once_they_come_often() -> None:
    expected, variance = np.array([50.0, 0.0, 0.01]), np.array([9.0, 0.0, 0.01])
    found = find_bias(tabulate({"": Frequency(expected, variance, np.array([44, 7, 1]))}, []))
    assert [(u.token_id, u.z) for u in found.too_seldom] == [(1, 7.0), (2, 0.99)]
    assert [u.z for u in found.too_often] == [-2.0] and np.isfinite(found.divergence)


def test_the_command(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    status, said, _ = in_process(capsys, "vocabulary", run.uri, "--count", 3)
    assert status == 0 and len(re.findall(r"[+-]\S+ *$", said, re.MULTILINE)) == 6
    assert all(f"{name}: " in said for name in ("all sources", "one", "two"))
    _, said, _ = in_process(capsys, "vocabulary", run.uri, "--source", "one")
    assert "one: " in said and "two: " not in said
    status, _, said = in_process(capsys, "vocabulary", run.uri, "--source", "none")
    assert status == 2 and "--source: 'none' is not one of 'one', 'two'" in said
    plan = Path(run.uri, "plan.json")
    kept = plan.read_text()
    plan.write_text(json.dumps({**json.loads(kept), "vocabulary": None}))
    status, _, said = in_process(capsys, "vocabulary", run.uri)
    plan.write_text(kept)
    assert status == 2 and "score it with --vocabulary" in said


def test_the_command_tells_of_what_may_be_among_others(
    run: Run, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, said, _ = in_process(capsys, "vocabulary", run.uri)
    assert "in part" not in said
    table = run.summary("vocabulary")
    partial = pc.equal(table["source"], "two")
    marked = table.set_column(table.column_names.index("partial"), "partial", partial)
    monkeypatch.setattr(Run, "summary", lambda self, name: marked)
    _, said, _ = in_process(capsys, "vocabulary", run.uri)
    assert "one: " in said and "two (in part): " in said
    assert "may have more tokens among (other)" in said
    _, said, _ = in_process(capsys, "vocabulary", run.uri, "--source", "one")
    assert "in part" not in said
