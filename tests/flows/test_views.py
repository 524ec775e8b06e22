"""The questions of a data team, each against pandas on the tables that runs keep."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from flow_helpers import write_lines
from logitmill.flows import Run, open_run, score_corpus
from logitmill.flows.catalog import publish_run
from logitmill.flows.corpus import CorpusSpec
from logitmill.flows.filters import buckets
from logitmill.flows.store import MANIFEST, find_receipts
from logitmill.flows.views import connect, find_questions, make_sql, write_database
from scipy.stats import wasserstein_distance

VIEWS = Path(__file__).parents[2] / "flows" / "views"
LN2 = math.log(2)


def rows() -> list[dict[str, Any]]:
    """Documents of three sources over three weeks, some of them twice, one of them empty."""
    text = Path(json.__file__).with_name("decoder.py").read_text()
    found: list[dict[str, Any]] = []
    for i in range(48):
        of = text[i * 200 : i * 200 + 120 + 17 * (i % 7)]
        row = {"id": f"d{i:02}", "source": "abc"[i % 3], "language": ("en", "de")[i % 2]}
        found.append({**row, "text": of, "day": f"2026-11-{1 + i % 21:02}"})
    found.append({**found[5], "id": "again", "day": "2026-11-20"})
    found.append({**found[5], "id": "and again", "day": "2026-11-21"})
    found.append({**found[0], "id": "empty", "text": ""})
    return found


@pytest.fixture(scope="module")
def run(demo_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("views")
    write_lines(folder / "corpus" / "all.jsonl", rows())
    spec = CorpusSpec(
        uri=str(folder / "corpus"),
        id_column="id",
        source_column="source",
        language_column="language",
        day_column="day",
        shard_bytes=4_000,
    )
    return open_run(score_corpus(str(demo_folder), spec, str(folder / "runs")))


@pytest.fixture(scope="module")
def root(run: Run) -> str:
    return run.uri.rpartition("/")[0]


@pytest.fixture(scope="module", params=["folder", "catalog"])
def db(request: pytest.FixtureRequest, run: Run, root: str) -> duckdb.DuckDBPyConnection:
    """The views over the folder of runs, and over the tables it was published in."""
    if request.param == "folder":
        return connect(root)
    publish_run(run)
    return connect(root, catalog="beside")


@pytest.fixture(scope="module")
def documents(run: Run) -> pd.DataFrame:
    frame = run.to_pandas()
    return frame[frame["status"] == "ok"].assign(day=pd.to_datetime(frame["day"]))


def bits(frame: pd.DataFrame) -> float:
    return float(-frame["loglikelihood"].sum() / LN2 / frame["num_bytes"].sum())


def test_by_day(db: duckdb.DuckDBPyConnection, documents: pd.DataFrame) -> None:
    found = db.sql("FROM by_day").df()
    want = {key: bits(of) for key, of in documents.groupby(["day", "source", "language"])}
    assert len(found) == len(want)
    for row in found.itertuples():
        key = (pd.Timestamp(row.day), row.source, row.language)
        assert row.bits_per_byte == pytest.approx(want[key], rel=1e-6)


def test_drift_this_week(db: duckdb.DuckDBPyConnection, documents: pd.DataFrame) -> None:
    found = db.sql("FROM drift_this_week").df()
    newest = documents["day"].max()
    assert len(found) == documents.groupby(["source", "language"]).ngroups
    for row in found.itertuples():
        of = documents[(documents.source == row.source) & (documents.language == row.language)]
        new = of[of.day > newest - pd.Timedelta(days=7)]
        before = of[of.day <= newest - pd.Timedelta(days=7)]
        before = before[before.day > newest - pd.Timedelta(days=14)]
        assert (row.documents, row.documents_before) == (len(new), len(before))
        assert row.bits_per_byte == pytest.approx(bits(new), rel=1e-6)
        assert row.change == pytest.approx(bits(new) - bits(before), abs=1e-5)
        bins = [np.floor(side.bits_per_byte / 0.02) * 0.02 for side in (new, before)]
        assert row.moved == pytest.approx(wasserstein_distance(*bins), rel=1e-9)
    assert list(found.change.abs()) == sorted(found.change.abs(), reverse=True)


def test_worst_sources(db: duckdb.DuckDBPyConnection, run: Run) -> None:
    found = db.sql("FROM worst_sources").df()
    everything = run.to_pandas()
    for row in found.itertuples():
        of = everything[(everything.source == row.source) & (everything.language == row.language)]
        ok = of[of.status == "ok"]
        assert (row.documents, row.failed) == (len(of), len(of) - len(ok))
        assert row.bits_per_byte == pytest.approx(bits(ok), rel=1e-6)
        nll = -ok.loglikelihood.sum() / ok.num_tokens_scored.sum()
        assert row.token_perplexity == pytest.approx(math.exp(nll), rel=1e-6)
    assert found.failed.sum() == 1
    assert list(found.bits_per_byte) == sorted(found.bits_per_byte, reverse=True)


def test_keep_the_middle(db: duckdb.DuckDBPyConnection, documents: pd.DataFrame, run: Run) -> None:
    want: dict[str, set[str]] = {"head": set(), "middle": set(), "tail": set()}
    for _, of in documents.groupby("language"):
        low, high = np.quantile(of.bits_per_byte, [0.3, 0.6], method="inverted_cdf")
        want["head"] |= set(of.doc_id[of.bits_per_byte < low])
        want["middle"] |= set(of.doc_id[(low <= of.bits_per_byte) & (of.bits_per_byte < high)])
        want["tail"] |= set(of.doc_id[of.bits_per_byte >= high])
    kept = db.sql("FROM keep_the_middle").df()
    assert set(kept.doc_id) == want["middle"] and len(kept) == len(want["middle"])
    sizes = db.sql("FROM bucket_sizes").df()
    for name, ids in want.items():
        of = documents[documents.doc_id.isin(ids)]
        in_sql = sizes[sizes.bucket == name]
        assert (in_sql.documents.sum(), in_sql.bytes.sum()) == (len(of), of.num_bytes.sum())
    # SQL and the command keep the same documents.
    in_filter = buckets(run).read_all().to_pandas()
    assert want == {name: set(in_filter.doc_id[in_filter.bucket == name]) for name in want}


def test_duplicates_by_score(db: duckdb.DuckDBPyConnection) -> None:
    size = len(rows()[5]["text"].encode())
    assert db.sql(
        "SELECT copies, bytes_to_spare, first_doc_id, doc_ids FROM duplicates_by_score"
    ).fetchall() == [(3, 2 * size, "again", ["again", "and again", "d05"])]


def test_calibration_by_source(db: duckdb.DuckDBPyConnection, run: Run) -> None:
    counts = run.summary("counts").to_pandas()
    counts = counts[counts.panel == "calibration"]
    found = db.sql("FROM calibration_by_source").df()
    assert set(found.source) == {"a", "b", "c"}
    for row in found.itertuples():
        bins = counts[counts.source == row.source].groupby("bin")[["tokens", "value", "hits"]].sum()
        share = bins.tokens / bins.tokens.sum()
        apart = (bins.value / bins.tokens - bins.hits / bins.tokens).abs()
        assert row.ece == pytest.approx((share * apart).sum(), rel=1e-6)
        ok = run.to_pandas()
        ok = ok[(ok.source == row.source) & (ok.status == "ok")]
        assert row.accuracy == pytest.approx(ok.num_top1.sum() / ok.num_tokens_scored.sum())


def test_failures_by_reason(db: duckdb.DuckDBPyConnection) -> None:
    asked = db.sql("SELECT source, language, status, documents FROM failures_by_reason")
    assert asked.fetchall() == [("a", "en", "empty", 1)]


def test_throughput(db: duckdb.DuckDBPyConnection, run: Run) -> None:
    (row,) = db.sql("FROM throughput").df().itertuples()
    receipts = find_receipts(run.folder, row.shards).values()
    assert len(receipts) == row.shards == len(run.plan["corpus"]["shards"])
    seconds, tokens = sum(r.seconds for r in receipts), sum(r.tokens for r in receipts)
    assert row.tokens_per_second == pytest.approx(tokens / seconds)
    assert row.hours == pytest.approx(seconds / 3600)
    busy = sum(r.device_seconds for r in receipts) / seconds
    assert row.device_busy == pytest.approx(busy)
    assert row.bytes_written == sum(part.bytes for r in receipts for part in r.parts)


def test_retries_of_runs_that_say_them(run: Run, tmp_path: Path) -> None:
    for key in ("a", "b"):
        folder = Path(copy_run(run, tmp_path, key).uri)
        for n, path in enumerate(sorted(folder.glob("shards/*.json"))):
            receipt = json.loads(path.read_text())
            assert receipt.pop("attempt") == 1
            said = {"attempt": 3 - n} if key == "a" and n < 2 else {}
            path.write_text(json.dumps(receipt | said))
    db = connect(str(tmp_path))
    asked = "SELECT retries FROM throughput ORDER BY run_key"
    assert db.sql(asked).fetchall() == [(3,), (None,)]
    # As in tables that were published before.
    db.execute("CREATE TABLE before AS SELECT * EXCLUDE (attempt) FROM shards")
    db.execute("CREATE OR REPLACE VIEW shards AS FROM before")
    assert db.sql(asked).fetchall() == [(None,), (None,)]


@pytest.mark.parametrize("name", ["runs", "shards", "counts", "scores"])
def test_a_folder_has_the_columns_and_rows_of_the_tables(run: Run, root: str, name: str) -> None:
    publish_run(run)
    ours, theirs = (connect(root, catalog=where).sql(f"FROM {name}") for where in (None, "beside"))
    assert ours.columns == theirs.columns
    if name in ("runs", "shards"):
        same = [column for column in ours.columns if column not in ("uri", "date")]
        assert [*map(str, ours.types)] == [*map(str, theirs.types)]
        frames = (one.df()[same] for one in (ours, theirs))
        pd.testing.assert_frame_equal(*(f.sort_values(same[:5], ignore_index=True) for f in frames))


def copy_run(run: Run, root: Path, key: str, **changes: Any) -> Run:
    shutil.copytree(run.uri, root / key)
    for name in ("plan.json", MANIFEST):
        path = root / key / name
        path.write_text(json.dumps(json.loads(path.read_text()) | {"run_key": key} | changes))
    return open_run(str(root / key))


def test_only_complete_runs_count_and_only_their_own_parts(run: Run, tmp_path: Path) -> None:
    copy_run(run, tmp_path, "aaaa")
    begun = copy_run(run, tmp_path, "bbbb")
    Path(begun.uri, MANIFEST).unlink()
    stray = tmp_path / "aaaa" / "scores" / "part-99999.parquet"
    shutil.copy(tmp_path / "aaaa" / "scores" / "part-00000.parquet", stray)
    db = connect(str(tmp_path))
    number = run.table("scores").num_rows
    assert db.sql("SELECT run_key, count(*) FROM scores GROUP BY ALL").fetchall() == [
        ("aaaa", number)
    ]
    # A run that becomes complete later counts from then on.
    shutil.copy(Path(run.uri, MANIFEST), Path(begun.uri, MANIFEST))
    assert db.sql("SELECT count(*) FROM runs").fetchall() == [(2,)]
    # The same corpus scored in the same way is asked about once.
    assert db.sql("SELECT count(*) FROM documents").fetchall() == [(number - 1,)]


def test_a_new_checkpoint_stands_in_for_the_last_of_its_name(run: Run, tmp_path: Path) -> None:
    copy_run(run, tmp_path, "aaaa")
    before = connect(str(tmp_path)).sql("SELECT sum(documents) FROM by_day").fetchall()
    copy_run(run, tmp_path, "bbbb", model=run.plan["model"] | {"digest": "another"})
    db = connect(str(tmp_path))
    assert db.sql("SELECT count(*) FROM runs").fetchall() == [(2,)]
    assert db.sql("SELECT sum(documents) FROM by_day").fetchall() == before


def test_a_document_of_two_runs_is_no_copy_of_itself(run: Run, tmp_path: Path) -> None:
    for key in ("aaaa", "bbbb"):
        copy_run(run, tmp_path, key, corpus_fingerprint=key)
    db = connect(str(tmp_path))
    assert db.sql("SELECT count(DISTINCT run_key) FROM documents").fetchall() == [(2,)]
    found = db.sql("SELECT copies, doc_ids FROM duplicates_by_score").fetchall()
    assert found == [(3, ["again", "and again", "d05"])]


def test_runs_of_earlier_versions_know_no_day(run: Run, tmp_path: Path) -> None:
    old = copy_run(run, tmp_path, "aaaa")
    for path in (*Path(old.uri, "scores").iterdir(), Path(old.uri, "summary/counts.parquet")):
        pq.write_table(pq.read_table(path).drop_columns(["day"]), path)
    db = connect(str(tmp_path))
    today = db.sql("SELECT date FROM runs").fetchall()
    assert db.sql("SELECT DISTINCT day FROM by_day").fetchall() == today
    for name in find_questions():
        db.sql(f"FROM {name}").fetchall()


def test_a_table_in_the_catalog_without_the_run_in_runs_is_not_asked(
    run: Run, root: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from logitmill.flows.catalog import publication

    publish_run(copy_run(run, tmp_path, "aaaa"))
    other = copy_run(run, tmp_path, "bbbb")
    monkeypatch.setattr(publication, "TABLES", ("scores", "counts"))
    publish_run(other)
    db = connect(str(tmp_path), catalog="beside")
    assert db.sql("SELECT DISTINCT run_key FROM scores").fetchall() == [("aaaa",)]
    assert db.sql("SELECT DISTINCT run_key FROM counts").fetchall() == [("aaaa",)]


def test_over_s3(run: Run, s3: str) -> None:
    import s3fs

    fs = s3fs.S3FileSystem(endpoint_url=s3)
    fs.put(run.uri, "bucket/asked/aaaa", recursive=True)
    db = connect("s3://bucket/asked", storage_options={"endpoint_url": s3})
    assert db.sql("SELECT count(*) FROM scores").fetchall() == [(run.table().num_rows,)]
    assert len(db.sql("FROM worst_sources").fetchall()) == 6


def test_mistakes_are_named(tmp_path: Path, run: Run) -> None:
    with pytest.raises(ValueError, match=r"^run: there is no complete run in"):
        connect(str(tmp_path))
    with pytest.raises(ValueError, match=r"^catalog: 'beside' has no table logitmill\.runs"):
        connect(str(tmp_path), catalog="beside")
    (tmp_path / "x.duckdb").write_text("no database")
    with pytest.raises(ValueError, match=r"^database: .*x\.duckdb' cannot be opened"):
        write_database(run.uri.rpartition("/")[0], str(tmp_path / "x.duckdb"))


def test_a_file_of_views_answers_by_itself(root: str, tmp_path: Path) -> None:
    write_database(root, str(tmp_path / "views.duckdb"))
    with duckdb.connect(str(tmp_path / "views.duckdb"), read_only=True) as db:
        assert len(db.sql("FROM worst_sources").fetchall()) == 6


def test_a_folder_with_a_quote_in_its_name(run: Run, tmp_path: Path) -> None:
    copy_run(run, tmp_path / "it's", "aaaa")
    assert connect(str(tmp_path / "it's")).sql("SELECT count(*) FROM runs").fetchall() == [(1,)]


def test_sql_is_as_its_linter_wants_it() -> None:
    lint = [str(Path(sys.executable).with_name("sqlfluff")), "lint", str(VIEWS)]
    done = subprocess.run(lint, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_every_question_is_one_and_says_so() -> None:
    asked = find_questions()
    assert len(asked) == len(list(VIEWS.glob("*.sql"))) - 2
    for name, question in asked.items():
        assert question.endswith("?") and question[0].isupper(), name
        assert f"VIEW {name} AS" in (VIEWS / f"{name}.sql").read_text()
    assert "getvariable" not in make_sql("runs")
