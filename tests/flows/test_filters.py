"""Filters, against numpy and pandas on what the runs hold, and against closed forms."""

from __future__ import annotations

import copy
import inspect
import json
import random
import re
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from flow_helpers import Score, write_lines
from logitmill.engine import metrics
from logitmill.engine.recipes import find_recipe
from logitmill.flows import Run, filters, open_run, score_corpus
from logitmill.flows.corpus import CorpusSpec
from logitmill.flows.filters import (
    Cuts,
    buckets,
    excess_loss,
    find_cuts,
    ifd,
    keep,
    kept_between,
    kl_to,
    min_k,
    output,
    percentiles,
    write_kept,
)
from test_cli import in_process

NUM_DOCUMENTS = 24
COLUMNS = {"id_column": "id", "source_column": "source", "language_column": "lang"}


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents of three sources and two languages, one of them empty."""
    text = inspect.getsource(random)
    rows = [
        {
            "id": f"d{i}",
            "text": text[i * 500 : i * 500 + 60 + 23 * (i * 7 % 11)],
            "source": "abc"[i % 3],
            "lang": "xy"[i % 2],
        }
        for i in range(NUM_DOCUMENTS - 1)
    ]
    rows.insert(5, {"id": "empty", "text": "", "source": "a", "lang": "x"})
    return write_lines(tmp_path_factory.mktemp("lines") / "lines.jsonl", rows)


def score_lines(model: Path, lines: Path, out: Path, shard_bytes: int, **options: Any) -> Run:
    spec = CorpusSpec(uri=str(lines), shard_bytes=shard_bytes, **COLUMNS)
    return open_run(score_corpus(str(model), spec, str(out), **options))


@pytest.fixture(scope="module")
def run(lines: Path, demo_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    made = score_lines(
        demo_folder, lines, tmp_path_factory.mktemp("run"), 1_000, tiers=["tokens", "topk"]
    )
    assert len(made.paths()) > 2
    return made


@pytest.fixture(scope="module")
def reference(lines: Path, demo_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The same documents by the model in bfloat16, in shards that were cut otherwise."""
    out = tmp_path_factory.mktemp("reference")
    engine = {"dtype": "bfloat16"}
    return score_lines(demo_folder, lines, out, 2_500, tiers=["tokens", "topk"], engine=engine)


# ---- percentiles


def in_shards(frame: pd.DataFrame, size: int = 700) -> Iterator[percentiles.Rows]:
    for start in range(0, len(frame), size):
        rows = frame[start : start + size]
        yield rows.group.to_numpy(object), rows.score.to_numpy(), rows.weight.to_numpy()


@pytest.mark.parametrize("held", [percentiles._HELD, 0])
def test_percentiles_are_numpys_in_one_reading_and_in_four(
    held: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(percentiles, "_HELD", held)
    rng = np.random.default_rng(7)
    score = np.concatenate(
        [
            rng.normal(0, 3, 2000),
            np.round(rng.gamma(2, 1, 2000), 1),
            [-np.inf, np.inf, 0.0, -0.0, 5e-324, -5e-324, 1.7e308],
        ]
    )
    frame = pd.DataFrame({"score": score, "weight": rng.integers(0, 1000, len(score))})
    frame["group"] = rng.choice(["a", "", "bé"], len(score), p=[0.9, 0.09, 0.01])
    frame.loc[len(frame)] = [3.5, 0, "no weight"]
    frame["weight"] = frame.weight.astype(np.int64)
    at = [0.1, 30, 50, 60, 99.9, 100]
    found = percentiles.find_percentiles(lambda: in_shards(frame), at, len(frame))
    assert sorted(found) == ["", "a", "bé"]
    for group, rows in frame.groupby("group"):
        if group in found:
            shares = np.array(at) / 100
            expected = np.quantile(rows.score, shares, weights=rows.weight, method="inverted_cdf")
            assert found[group] == expected.tolist(), group


def test_many_small_shards_cost_no_more_than_few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(percentiles, "_LEAST_ADDED", 16)
    sorted_at_once: list[int] = []
    unique = np.unique

    def counted(values: np.ndarray, **options: Any) -> Any:
        sorted_at_once.append(len(values))
        return unique(values, **options)

    monkeypatch.setattr(np, "unique", counted)
    histogram, digits = percentiles._Histogram(), np.random.default_rng(5).permutation(4000)
    for digit in digits.astype(np.uint64):
        histogram.add(np.array([digit, 7], np.uint64), np.array([2, 1]))
    found, weights = histogram.sums()
    assert found.tolist() == list(range(4000))
    assert weights.tolist() == [2 + 4000 * (digit == 7) for digit in range(4000)]
    # Added up at each of them it would be 8 million.
    assert sum(sorted_at_once) < 10 * len(digits)


def test_a_percentile_of_few_is_one_of_them() -> None:
    frame = pd.DataFrame({"group": ["g"] * 10, "score": np.arange(10.0), "weight": [1] * 10})
    found = percentiles.find_percentiles(lambda: in_shards(frame), [10, 10.1, 30, 60, 100], 10)
    assert found == {"g": [0.0, 1.0, 2.0, 5.0, 9.0]}


# ---- buckets


@pytest.mark.parametrize(
    ("by", "weight", "column"),
    [
        ("language", "documents", None),
        ("source", "bytes", "num_bytes"),
        (None, "tokens", "num_tokens_scored"),
    ],
)
def test_buckets_are_those_of_pandas(
    run: Run, by: str | None, weight: str, column: str | None
) -> None:
    cuts = find_cuts(run, (30, 60), by=by, weight=weight)
    rows = run.to_pandas()
    ok = rows[rows.status == "ok"]
    groups = ok.groupby(by) if by else [("", ok)]
    expected: dict[str, str | None] = {"empty": None}
    for group, own in groups:
        weights = own[column] if column else np.ones(len(own))
        low, high = np.quantile(
            own.bits_per_byte, [0.3, 0.6], weights=weights, method="inverted_cdf"
        )
        assert cuts.values[str(group)] == (low, high)
        for doc_id, bits in zip(own.doc_id, own.bits_per_byte, strict=True):
            expected[doc_id] = "head" if bits < low else "middle" if bits < high else "tail"
    found = buckets(run, cuts).read_all()
    assert found.column_names == ["doc_id", "source", "language", "bits_per_byte", "bucket"]
    assert dict(zip(*(found[n].to_pylist() for n in ("doc_id", "bucket")), strict=True)) == expected
    table = cuts.table().to_pylist()
    assert {row[by or "group"]: (row["p30"], row["p60"]) for row in table} == cuts.values


def test_the_middle_is_what_is_kept_and_the_ends_are_open(run: Run) -> None:
    middle = buckets(run).read_all().to_pandas()
    kept = keep(run, 30, 60).read_all().to_pandas()
    assert kept.kept.tolist() == (middle.bucket == "middle").tolist()
    thirds = [keep(run, *ends).read_all()["kept"].to_numpy() for ends in ((0, 30), (60, 100))]
    together = kept.kept.to_numpy().astype(int) + thirds[0] + thirds[1]
    assert together.tolist() == (middle.doc_id != "empty").astype(int).tolist()


def test_cuts_of_another_corpus_apply(run: Run) -> None:
    cuts = Cuts("token_perplexity", (25.0, 50.0, 75.0), "language", "documents", {"x": (2, 10, 20)})
    found = buckets(run, cuts).read_all().to_pandas()
    rows = run.to_pandas()
    own = (rows.language == "x") & (rows.status == "ok")
    place = np.digitize(rows.token_perplexity[own], [2, 10, 20])
    names = ["0-25", "25-50", "50-75", "75-100"]
    assert found.bucket[own].tolist() == [names[i] for i in place]
    assert found.bucket[~own].isna().all()
    with pytest.raises(ValueError, match="cuts: 3 are not two"):
        kept_between(run, cuts)


def test_what_cannot_be_cut_is_named(run: Run) -> None:
    for options, message in (
        ({"percentiles": (60, 30)}, r"percentiles: 60, 30 are not ascending .* give 30 and 60"),
        ({"percentiles": (30, 101)}, "percentiles: 30, 101 are not"),
        ({"percentiles": ()}, "percentiles: none are not"),
        ({"score": "status"}, "score: 'status' is not one of loglikelihood, .*bits_per_byte"),
        ({"by": "day"}, "by: 'day' is not one of language, source"),
        ({"weight": "words"}, "weight: 'words' is not one of documents, bytes, tokens"),
    ):
        with pytest.raises(ValueError, match=message):
            find_cuts(run, **options)  # type: ignore[arg-type]
    stream = planned(run, recipe=asdict(find_recipe("disjoint-64")))
    with pytest.raises(
        ValueError, match=r"run: its recipe disjoint of context 64 .* as one stream"
    ):
        buckets(stream)


# ---- of tokens


@pytest.mark.parametrize("share", [0.05, 0.2, 1.0])
def test_min_k_at_any_share(run: Run, share: float) -> None:
    found = min_k(run, share).read_all().to_pandas().set_index("doc_id")
    scores = run.to_pandas().set_index("doc_id")
    assert len(found) == NUM_DOCUMENTS - 1
    for doc_id, row in found.iterrows():
        tokens = run.document(str(doc_id))["tokens"]
        lp = np.sort(tokens["logprob"].astype(float))
        count = max(1, int(share * len(lp)))
        assert row.min_k_prob == pytest.approx(lp[:count].mean(), rel=1e-12)
        if share == 0.2:
            assert row.min_k_prob == scores.min_k_prob_20[doc_id]
            assert row.min_k_plus_plus == scores.min_k_plus_plus_20[doc_id]
        if share == 1:
            assert -row.min_k_prob == pytest.approx(scores.nll_per_token[doc_id], rel=1e-6)
    for wrong in (0.0, 1.5, float("nan")):
        with pytest.raises(ValueError, match=r"share: .* give 0\.2"):
            min_k(run, wrong)


def test_excess_loss_by_document_and_by_token(run: Run, reference: Run) -> None:
    ours, theirs = (r.to_pandas().set_index("doc_id").nll_per_token for r in (run, reference))
    found = excess_loss(run, reference).read_all().to_pandas().set_index("doc_id").excess_loss
    assert len(found) == NUM_DOCUMENTS - 1
    np.testing.assert_allclose(found, (ours - theirs)[found.index], atol=1e-12)
    assert found.abs().max() > 1e-4, "bfloat16 is not float32"

    by_token = excess_loss(run, reference, per_token=True).read_all().to_pandas()
    for _, row in by_token.iterrows():
        tokens = [r.document(row.doc_id)["tokens"]["logprob"] for r in (run, reference)]
        expected = tokens[1].astype(float) - tokens[0].astype(float)
        np.testing.assert_allclose(row.token_excess_loss, expected, atol=1e-6)
        assert row.excess_loss == pytest.approx(expected.mean(), abs=1e-12)
    assert (excess_loss(run, run).read_all()["excess_loss"].to_numpy() == 0).all()


def test_kl_to_a_reference_is_a_lower_bound(run: Run, reference: Run) -> None:
    itself = kl_to(run, run).read_all().to_pandas()
    assert (itself[["kl", "max_kl"]] == 0).all().all() and len(itself) == NUM_DOCUMENTS - 1
    found = kl_to(run, reference).read_all().to_pandas().set_index("doc_id")
    rows = run.to_pandas().set_index("doc_id")
    assert (found.num_tokens == rows.num_tokens_scored[found.index]).all()
    for doc_id in ("d0", "d7"):
        base, other = (r.document(doc_id)["topk"] for r in (reference, run))
        expected = [
            coarse_kl(
                *(
                    dict(zip(t["top_ids"][i], t["top_logprobs"][i], strict=True))
                    for t in (base, other)
                )
            )
            for i in range(len(base["token_id"]))
        ]
        assert found.kl[doc_id] == pytest.approx(np.mean(expected), rel=0.05, abs=1e-5)
        assert found.max_kl[doc_id] == pytest.approx(np.max(expected), rel=0.05, abs=1e-4)


def coarse_kl(base: dict[int, float], other: dict[int, float]) -> float:
    """KL over what both name, and the rest as one outcome; from probabilities alone."""
    shared = sorted(base.keys() & other.keys())
    p, q = (np.exp(np.array([d[i] for i in shared], float)) for d in (base, other))
    p, q = np.append(p, 1 - p.sum()), np.append(q, 1 - q.sum())
    return float((p * np.log(p / q)).sum())


# ---- IFD


@pytest.fixture(scope="module")
def answers(demo_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Run]:
    """The same answers with an instruction and alone."""
    folder = tmp_path_factory.mktemp("answers")
    text = "    return [x * x for x in range(10)]\n"
    rows = [
        {"id": "given", "text": text, "ask": "def squares():\n    # squares of 0 to 9\n#"},
        {"id": "empty", "text": text, "ask": ""},
        {"id": "moved", "text": "return 1\n", "ask": "def one():\n    "},
    ]
    uri = str(write_lines(folder / "answers.jsonl", rows))
    plain = CorpusSpec(uri=uri, id_column="id")
    asked = CorpusSpec(uri=uri, id_column="id", context_column="ask")
    uris = [
        score_corpus(str(demo_folder), spec, str(folder / "runs"), recipe=recipe)
        for spec, recipe in ((asked, "conditional"), (plain, "rolling"))
    ]
    conditional, alone = map(open_run, uris)
    return conditional, alone


def test_ifd_is_the_ratio_of_perplexities(answers: tuple[Run, Run], tmp_path: Path) -> None:
    conditional, alone = answers
    found = ifd(conditional, alone).read_all().to_pandas().set_index("doc_id")
    ppl = [r.to_pandas().set_index("doc_id").token_perplexity for r in answers]
    assert found.ifd["given"] == pytest.approx(ppl[0]["given"] / ppl[1]["given"], rel=1e-12)
    assert found.ifd["given"] != pytest.approx(1, abs=1e-3)
    assert found.ifd["empty"] == pytest.approx(1, rel=1e-5), "an empty instruction"
    # The spaces that end the instruction belong to the answer there: other tokens.
    assert np.isnan(found.ifd["moved"])
    with pytest.raises(ValueError, match=r"conditional: its recipe is rolling .* --context-column"):
        ifd(alone, conditional)
    others = with_more_tokens(alone, tmp_path / "others", [0, 1])
    with pytest.raises(ValueError, match="unconditional: no answer has as many tokens"):
        ifd(conditional, others).read_all()


def with_more_tokens(run: Run, folder: Path, rows: list[int]) -> Run:
    """The run, but that these documents of its first shard have a token more."""
    shutil.copytree(run.uri, folder)
    part = folder / "scores/part-00000.parquet"
    table = pq.read_table(part)
    counts = table["num_tokens_scored"].to_numpy().copy()
    counts[rows] += 1
    at = table.schema.get_field_index("num_tokens_scored")
    pq.write_table(table.set_column(at, "num_tokens_scored", pa.array(counts)), part)
    return open_run(str(folder))


def test_kl_of_whole_distributions_is_exact(
    run: Run, reference: Run, lines: Path, demo_folder: Path, tmp_path: Path
) -> None:
    tiers: Any = ["logits"]
    ours = score_lines(demo_folder, lines, tmp_path / "run", 1_000, tiers=tiers)
    half = {"dtype": "bfloat16"}
    theirs = score_lines(demo_folder, lines, tmp_path / "half", 2_500, tiers=tiers, engine=half)
    itself = kl_to(ours, ours).read_all().to_pandas()
    assert (itself[["kl", "max_kl"]] == 0).all().all() and len(itself) == NUM_DOCUMENTS - 1
    exact = kl_to(ours, theirs)
    assert exact.schema.metadata == {b"tier": b"logits"}
    bound = kl_to(run, reference)
    assert bound.schema.metadata == {b"tier": b"topk"}
    found, least = (r.read_all().to_pandas().set_index("doc_id") for r in (exact, bound))
    assert (found.num_tokens == least.num_tokens[found.index]).all()
    # The candidates are rounded to float16.
    assert (found.kl >= 0.99 * least.kl[found.index] - 1e-6).all()
    for doc_id in found.index:
        p, q = (one.logprobs(doc_id).astype(float) for one in (theirs, ours))
        kl = (np.exp(p) * (p - q)).sum(1)
        assert found.kl[doc_id] == pytest.approx(kl.mean(), rel=1e-4, abs=1e-7)
        assert found.max_kl[doc_id] == pytest.approx(kl.max(), rel=1e-4, abs=1e-6)
    other = planned(theirs, model={**theirs.plan["model"], "vocab_size": 4160})
    with pytest.raises(ValueError, match=r"reference: its logits are over 4,160 tokens, and the"):
        kl_to(ours, other)
    with pytest.raises(ValueError, match=r"run: .* kept scores, logits; score it with --keep topk"):
        kl_to(ours, reference)


# ---- two runs that do not belong together


def planned(run: Run, **changes: Any) -> Run:
    """The run under another plan."""
    other = open_run(run.uri)
    other.plan |= changes
    return other


def test_unlike_runs_are_refused_by_name(run: Run) -> None:
    recipe = find_recipe("rolling", context=64)
    other = planned(run, recipe=asdict(recipe), recipe_hash=recipe.hash)
    for join in (excess_loss, kl_to):
        with pytest.raises(ValueError, match=r"reference: its recipe is rolling of context 64 \("):
            join(run, other)
    bare = planned(run, tiers=["scores"])
    with pytest.raises(ValueError, match=r"reference: .* kept scores; score it with --keep tokens"):
        excess_loss(run, bare, per_token=True)
    with pytest.raises(ValueError, match=r"run: .* kept scores; score it with --keep topk"):
        kl_to(bare, run)
    with pytest.raises(ValueError, match=r"run: .* kept scores; score it with --keep tokens"):
        min_k(bare)


def test_other_tokens_are_refused_by_their_document(
    run: Run, reference: Run, tmp_path: Path
) -> None:
    changed = with_more_tokens(reference, tmp_path / "changed", [1])
    with pytest.raises(ValueError, match=r"reference: document 'd1' has other tokens there"):
        excess_loss(run, changed).read_all()


# ---- a corpus cut down


def test_a_filter_is_applied_to_ids_and_texts(run: Run, lines: Path, tmp_path: Path) -> None:
    cuts = find_cuts(run, (20, 70), by="source", weight="bytes")
    kept = write_kept(run, cuts, str(tmp_path / "kept.parquet"))
    ids = pq.read_table(tmp_path / "kept.parquet")
    expected = keep(run, 20, 70, by="source", weight="bytes").read_all().to_pandas()
    assert ids["doc_id"].to_pylist() == expected.doc_id[expected.kept].tolist()
    said = json.loads(ids.schema.metadata[b"logitmill.filter"])
    assert said["percentiles"] == [20, 70]
    assert [float(v) for v in said["cuts"]["a"]] == list(cuts.values["a"])

    rows = run.to_pandas().set_index("doc_id")
    assert kept.no_score == 1
    assert (kept.total.kept_documents, kept.total.documents) == (len(ids), NUM_DOCUMENTS - 1)
    assert kept.total.kept_bytes == rows.num_bytes[ids["doc_id"].to_pylist()].sum()
    assert kept.total.bytes == rows.num_bytes.sum()
    assert sum(tally.kept_bytes for tally in kept.groups.values()) == kept.total.kept_bytes

    texts = write_kept(run, cuts, str(tmp_path / "texts"), texts=True)
    assert texts == kept == write_kept(run, cuts, None)
    names = sorted(path.name for path in (tmp_path / "texts").glob("*.parquet"))
    assert len(names) > 1 and names == sorted({*names} & {Path(p).name for p in run.paths()})
    table = pq.read_table(tmp_path / "texts")
    stored = {row["id"]: row["text"] for row in map(json.loads, lines.read_text().splitlines())}
    assert table["doc_id"].to_pylist() == ids["doc_id"].to_pylist()
    assert table["text"].to_pylist() == [stored[i] for i in ids["doc_id"].to_pylist()]
    again = tmp_path / "again"
    write_kept(run, cuts, str(again), texts=True)
    assert all((again / n).read_bytes() == (tmp_path / "texts" / n).read_bytes() for n in names)


def test_what_was_killed_is_gone_on_with(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cuts, out = find_cuts(run, (20, 70)), tmp_path / "texts"

    def stop(done: int, total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    def about() -> dict[str, Any]:
        return json.loads((out / ".filter.json").read_text())

    with pytest.raises(KeyboardInterrupt):
        write_kept(run, cuts, str(out), texts=True, on_progress=stop)
    begun = {path.name: path.stat().st_mtime_ns for path in out.glob("*.parquet")}
    assert 0 < len(begun) < len(run.paths()) and not about()["complete"]
    with pytest.raises(
        ValueError, match=r"out: .* already that is not of this filter .*; give another"
    ):
        write_kept(run, find_cuts(run, (20, 60)), str(out), texts=True)
    read: list[int] = []
    read_documents = output.read_documents
    monkeypatch.setattr(
        output, "read_documents", lambda *a: read.extend(a[2]) or read_documents(*a)
    )
    kept = write_kept(run, cuts, str(out), texts=True)
    assert len(read) == len(list(out.glob("*.parquet"))) - len(begun)
    assert about()["complete"]
    assert sum(part["documents"] for part in about()["parts"]) == kept.total.kept_documents
    write_kept(run, cuts, str(tmp_path / "whole"), texts=True)
    files = {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()}
    assert {path.name: path.read_bytes() for path in out.iterdir()} == files


def test_what_stands_for_parts_that_were_removed_is_not_believed(run: Run, tmp_path: Path) -> None:
    first, second = find_cuts(run, (20, 70)), find_cuts(run, (10, 90))
    out = tmp_path / "texts"

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    for cuts in (first, second):
        write_kept(run, first, str(out), texts=True)
        for part in out.glob("*.parquet"):
            part.unlink()
        with pytest.raises(KeyboardInterrupt):
            write_kept(run, cuts, str(out), texts=True, on_progress=stop)
        about = json.loads((out / ".filter.json").read_text())
        assert not about["complete"]
        assert about["percentiles"] == list(cuts.percentiles)
    with pytest.raises(ValueError, match="not of this filter"):
        write_kept(run, first, str(out), texts=True)
    kept = write_kept(run, second, str(out), texts=True)
    assert pq.read_table(out).num_rows == kept.total.kept_documents


def test_a_corpus_that_changed_is_not_written(run: Run, tmp_path: Path) -> None:
    corpus = copy.deepcopy(run.plan["corpus"])
    corpus["inputs"][0] |= {"etag": "another", "stamp": ""}
    with pytest.raises(ValueError, match="corpus changed"):
        write_kept(planned(run, corpus=corpus), find_cuts(run), str(tmp_path / "texts"), texts=True)
    assert not list((tmp_path / "texts").glob("*.parquet"))


def test_token_ids_are_written_as_such(score: Score, bare_model: Path, tmp_path: Path) -> None:
    rows = [{"ids": [3 + i, 4, 5, 6 + i]} for i in range(6)]
    uri = str(write_lines(tmp_path / "ids.jsonl", rows))
    made = score(CorpusSpec(uri=uri, ids_column="ids"), model=str(bare_model))
    with pytest.raises(ValueError, match=r"score: no document .* have token_perplexity"):
        find_cuts(made)
    cuts = find_cuts(made, (50, 100), score="token_perplexity")
    write_kept(made, cuts, str(tmp_path / "texts"), texts=True)
    found = pq.read_table(tmp_path / "texts")
    assert found["input_ids"].to_pylist() == [
        rows[i]["ids"]
        for i, kept in enumerate(keep(made, 50, 100, score="token_perplexity").read_all()["kept"])
        if kept.as_py()
    ]
    assert 0 < len(found) < 6


def test_duckdb_joins_what_filters_give(run: Run) -> None:
    with duckdb.connect() as database:
        database.register("scores", run.table())
        database.register("chosen", keep(run, 30, 60))
        query = "SELECT sum(num_bytes) FROM scores JOIN chosen USING (doc_id) WHERE kept"
        (joined,) = database.execute(query).fetchone() or (0,)
    assert joined == write_kept(run, find_cuts(run, (30, 60)), None).total.kept_bytes


def test_the_command(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "kept.parquet"
    code, said, _ = in_process(capsys, "filter", run.uri, "--keep", "30:60", "--out", out)
    kept = pq.read_table(out)
    assert code == 0 and said.splitlines()[-1] == str(out)
    total = next(line for line in said.splitlines() if line.startswith("all"))
    assert total.split()[1:3] == [str(kept.num_rows), str(NUM_DOCUMENTS - 1)]
    assert "1 document without the score not kept" in said
    bytes_before = out.read_bytes()
    assert in_process(capsys, "filter", run.uri, "--keep", "30:60", "--out", out)[0] == 0
    assert out.read_bytes() == bytes_before
    (tmp_path / "mine.parquet").write_text("not to be lost")
    for keeps, path in (("30:61", out), ("30:60", tmp_path / "mine.parquet")):
        code, _, err = in_process(capsys, "filter", run.uri, "--keep", keeps, "--out", path)
        assert code == 2 and f"--out: '{path}' is there already, and not of this filter" in err
    assert (tmp_path / "mine.parquet").read_text() == "not to be lost"
    for keeps, note in (
        ("0.3:0.6", "note: percentiles go to 100, so --keep=0.3:0.6 is at most one in a hundred; "
                    "shares of 0.3 to 0.6 are --keep=30:60"),
        ("1.1:1.2", "note: --keep=1.1:1.2 keeps nothing, groups are too small or their scores "
                    "equal; give percentiles further apart, or --by=none for a single group"),
    ):  # fmt: skip
        code, said, _ = in_process(capsys, "filter", run.uri, "--keep", keeps)
        assert code == 0 and said.splitlines()[-1] == note
    said = in_process(capsys, "filter", run.uri, "--keep", "0:100", "--by", "none")[1]
    assert "lowest  highest" in said and "inf" not in said
    (tmp_path / "full").mkdir()
    out.rename(tmp_path / "full/part.parquet")
    for arguments, message in (
        (("--keep", "60:30"), "--keep: '60:30' is not two percentiles from 0 to 100"),
        (("--keep", "30"), "--keep: '30' is not two percentiles"),
        (("--keep", "-5:20"), "from 0 to 100, the lower first; give LOW:HIGH, as in --keep=30:60"),
        (("--keep", "30:60", "--text"), "text: documents need a place; give --out a folder"),
        (("--keep", "30:60", "--out", tmp_path / "x"), f"--out: '{tmp_path / 'x'}' is no Parquet"),
        (("--keep", "30:60", "--text", "--out", out), f"--out: '{out}' is a file"),
        (
            ("--keep", "30:60", "--text", "--out", tmp_path / "full"),
            "holds something already",
        ),
        (("--keep", "30:60", "--score", "x"), "score: 'x' is not one of"),
    ):
        code, _, err = in_process(capsys, "filter", run.uri, *arguments)
        assert code == 2 and message in err and len(err.splitlines()) == 1, err


def test_what_cannot_be_written_again_is_named_before_scores_are_read(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    chat = Path(shutil.copytree(run.uri, tmp_path / "chat"))
    plan = json.loads((chat / "plan.json").read_text())
    plan["reading"]["messages_column"] = "turns"
    (chat / "plan.json").write_text(json.dumps(plan))
    monkeypatch.setattr(filters, "find_cuts", None)
    asked = ("--keep", "30:60", "--text", "--out", tmp_path / "texts")
    code, _, err = in_process(capsys, "filter", chat, *asked)
    assert code == 2 and "the corpus holds chat messages ('turns')" in err


# ---- formulas and sources


def test_every_filter_has_its_formula_and_source_in_code_and_guide() -> None:
    guide = (Path(__file__).parents[2] / "infra/guides/worth-keeping.md").read_text()
    table = guide.split("## Formulas and sources")[1]
    told = filters.__doc__ or ""
    for name in ("buckets", "keep", "min_k", "zlib_ratio", "ifd", "excess_loss", "kl_to"):
        assert f"`{name}`" in table and re.search(rf"^    {name} .*\[\d", told, re.MULTILINE), name
    sources = set(re.findall(r"arXiv:(\d+\.\d+)", told))
    assert sources == set(re.findall(r"\[arXiv:(\d+\.\d+)\]", table)) and len(sources) == 9
    assert all(f"(https://arxiv.org/abs/{source})" in table for source in sources)
    # What single functions cite is of the list, and by one venue.
    for module in (filters.cuts, metrics, filters.pairs, filters.scores):
        text = " ".join(inspect.getsource(module).split())
        cited = re.findall(r"(\w+ \d{4}), arXiv:(\d+\.\d+)", text)
        assert cited, module.__name__
        for venue, source in cited:
            assert re.search(rf"{venue}, arXiv:{source}", told), (venue, source)
