"""Runs as tables of an Iceberg catalog: whole or not at all, once, and as others read them."""

from __future__ import annotations

import datetime
import json
import os
import random
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import typer
from flow_helpers import SECRET
from logitmill.flows import Run, open_run, score_corpus
from logitmill.flows.catalog import (
    PARTITION,
    TABLES,
    check_catalog,
    open_catalog,
    publication,
    publish_run,
    root_of,
    withdraw_run,
)
from logitmill.flows.catalog.tables import name_corpus
from logitmill.flows.commands.publish import publish
from logitmill.flows.corpus import CorpusSpec
from logitmill.flows.folder import Folder
from logitmill.flows.store import MANIFEST, PLAN, find_receipts
from logitmill.flows.views import connect
from pyiceberg.catalog.sql import SqlCatalog
from pyiceberg.expressions import EqualTo
from pyiceberg.table import Table

LONG = bool(os.environ.get("LOGITMILL_LONG"))
Copy = Callable[..., Run]


@pytest.fixture(scope="module")
def finished(corpus: Path, demo_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A finished run with tokens, in several shards. Not to be changed."""
    spec = CorpusSpec(uri=str(corpus / "one"), shard_bytes=2_000)
    out = str(tmp_path_factory.mktemp("published"))
    return open_run(score_corpus(str(demo_folder), spec, out, tiers=["tokens"]))


@pytest.fixture
def copy(finished: Run, tmp_path: Path) -> Copy:
    """A copy of the finished run below `tmp_path / "runs"`, under another key."""

    def make(key: str, model: str = "a/model", uri: str = "corpus/*.py") -> Run:
        folder = tmp_path / "runs" / key
        shutil.copytree(finished.uri, folder)
        plan = json.loads((folder / PLAN).read_text())
        plan |= {"run_key": key, "uri": uri, "model": plan["model"] | {"name": model}}
        (folder / PLAN).write_text(json.dumps(plan))
        return open_run(str(folder))

    return make


def table_of(run: Run, name: str, catalog: str = "beside") -> Table:
    return open_catalog(catalog, root_of(run.folder)).load_table(("logitmill", name))


def keys_of(run: Run, name: str = "scores") -> Counter[str]:
    """How many rows of each run a table has."""
    return Counter(table_of(run, name).scan().to_arrow()["run_key"].to_pylist())


def test_tables_hold_the_rows_of_runs_and_where_they_come_from(copy: Copy) -> None:
    runs = [copy("aaaa", model="one"), copy("bbbb", model="two", uri="s3://c/dt=2026-11-22/*")]
    for run in runs:
        added = publish_run(run).added
        assert added == {
            "tokens": len(run.paths("tokens")),
            "scores": len(run.paths("scores")),
            **dict.fromkeys(("counts", "shards", "runs"), 1),
        }
    today = datetime.datetime.now(datetime.UTC).date()
    origins = [("one", "corpus/*.py", today, "aaaa"), ("two", "s3://c/dt=*/*", today, "bbbb")]
    for name, rows_of in {
        "scores": lambda run: run.table("scores"),
        "tokens": lambda run: run.table("tokens"),
        "counts": lambda run: run.summary("counts"),
    }.items():
        table = table_of(runs[0], name)
        assert len([s for s in table.snapshots() if s.summary]) == len(runs)
        for run, origin in zip(runs, origins, strict=True):
            found = table.scan(row_filter=EqualTo("run_key", origin[3])).to_arrow()
            for column, value in zip(PARTITION, origin, strict=True):
                assert set(found[column].to_pylist()) == {value}
            want = rows_of(run)
            # Iceberg has neither int8 nor an order of files.
            found = found.select(want.column_names)
            assert sorted(map(repr, found.to_pylist())) == sorted(map(repr, want.to_pylist()))


def test_a_run_is_a_row_that_says_what_its_manifest_and_receipts_do(copy: Copy) -> None:
    run = copy("aaaa")
    publish_run(run, corpus="code", date="2026-11-01")
    (row,) = table_of(run, "runs").scan().to_arrow().to_pylist()
    assert [row[name] for name in PARTITION] == [
        "a/model", "code", datetime.date(2026, 11, 1), "aaaa"
    ]  # fmt: skip
    assert run.manifest is not None
    for name in ("documents", "failed", "tokens", "bytes", "loglikelihood", "recipe_hash", "tiers"):
        assert row[name] == run.manifest[name]
    assert row["model_digest"] == run.plan["model"]["digest"]
    receipts = find_receipts(run.folder, row["shards"]).values()
    assert row["seconds"] == sum(r.seconds for r in receipts)
    shards = table_of(run, "shards").scan().to_arrow()
    assert sum(shards["tokens"].to_pylist()) == row["tokens"]
    assert sum(shards["bytes_written"].to_pylist()) == row["bytes_written"]


def test_parts_are_not_copied_and_their_bytes_are_the_runs_own(copy: Copy) -> None:
    run = copy("aaaa")
    before = {path: Path(run.uri, path).read_bytes() for path in ("scores/part-00000.parquet",)}
    publish_run(run)
    for name in ("scores", "tokens"):
        files = {t.file.file_path for t in table_of(run, name).scan().plan_files()}
        assert files == set(run.paths(name))
    assert before == {path: Path(run.uri, path).read_bytes() for path in before}
    assert not any("aaaa" in path.name for path in Path(run.uri).rglob("*"))


def test_publishing_again_adds_nothing(copy: Copy) -> None:
    run = copy("aaaa")
    publish_run(run)
    before = {name: table_of(run, name).metadata_location for name in TABLES}
    files = sorted(p for p in Path(run.uri).parent.rglob("*") if p.is_file())
    assert set(publish_run(run, date="2020-01-01").added.values()) == {0}
    assert {name: table_of(run, name).metadata_location for name in TABLES} == before
    assert sorted(p for p in Path(run.uri).parent.rglob("*") if p.is_file()) == files


class Killed(BaseException):
    """The process dies here."""


def test_killed_before_or_after_any_write_to_the_catalog(
    copy: Copy, monkeypatch: pytest.MonkeyPatch
) -> None:
    writes = ("create_namespace", "create_table", "commit_table")
    real = {name: getattr(SqlCatalog, name) for name in writes}
    left = [0]

    def dying(name: str) -> Callable[..., Any]:
        def write(*args: Any, **options: Any) -> Any:
            left[0] -= 1
            if left[0] == 0:
                raise Killed
            result = real[name](*args, **options)
            left[0] -= 1
            if left[0] == 0:
                raise Killed
            return result

        return write

    for name in writes:
        monkeypatch.setattr(SqlCatalog, name, dying(name))
    names = TABLES if LONG else ("scores", "runs")
    monkeypatch.setattr(publication, "TABLES", names)
    run, deaths = copy("aaaa"), 0
    for moment in range(1, 200):
        tables = Path(run.uri).parent / "tables"
        shutil.rmtree(tables, ignore_errors=True)
        left[0] = moment
        try:
            publish_run(run)
        except Killed:
            deaths += 1
        else:
            break
        left[0] = -1
        publish_run(run)
        for name in names:
            assert len(table_of(run, name).snapshots()) == 1
        assert table_of(run, "scores").scan().count() == run.table("scores").num_rows
        assert table_of(run, "runs").scan().count() == 1
    # A namespace, that the second table asks for too, and each table's making, columns and files.
    assert deaths == 2 * (1 + 3 * len(names)) + len(names) - 1


@pytest.mark.skipif(not LONG, reason="the long form")
def test_processes_killed_at_random_moments(copy: Copy) -> None:
    runs, chance = [copy(f"{i:04}") for i in range(12)], random.Random(0)
    command = [
        sys.executable,
        "-m",
        "logitmill.flows.cli",
        "publish",
        str(Path(runs[0].uri).parent),
    ]
    for _ in range(50):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(chance.uniform(4, 12))
        process.kill()
        process.wait()
    assert subprocess.run(command, check=False).returncode == 0
    rows = runs[0].table("scores").num_rows
    assert keys_of(runs[0]) == {f"{i:04}": rows for i in range(12)}
    assert keys_of(runs[0], "runs") == {f"{i:04}": 1 for i in range(12)}


def test_the_same_run_and_others_at_once(copy: Copy) -> None:
    runs = [copy(f"{i:04}") for i in range(3)]
    errors: list[BaseException] = []
    start = threading.Barrier(6)

    def publish(run: Run) -> None:
        start.wait()
        try:
            publish_run(run)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=publish, args=[run]) for run in runs * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    rows = runs[0].table("scores").num_rows
    assert keys_of(runs[0]) == {f"{i:04}": rows for i in range(3)}
    assert keys_of(runs[0], "runs") == {f"{i:04}": 1 for i in range(3)}
    files = list((Path(runs[0].uri).parent / "tables").rglob("data/*.parquet"))
    assert len(files) == 3 * 3  # What lost the race is gone.


def test_another_publishes_the_same_run_just_before(
    copy: Copy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """pyiceberg's own retry would put our files on top of the other's."""
    run, other = copy("aaaa"), copy("bbbb")
    publish_run(other)
    real, inside = SqlCatalog.commit_table, [False]

    def commit(self: SqlCatalog, table: Table, requirements: Any, updates: Any) -> Any:
        if not inside[0] and table.name()[-1] == "scores" and len(updates) > 1:
            inside[0] = True
            publish_run(open_run(run.uri))
        return real(self, table, requirements, updates)

    monkeypatch.setattr(SqlCatalog, "commit_table", commit)
    assert publish_run(run).added["scores"] == 0
    assert inside == [True]
    rows = run.table("scores").num_rows
    assert keys_of(run) == {"aaaa": rows, "bbbb": rows}
    assert table_of(run, "scores").properties.get("commit.retry.num-retries") is None


def rewrite(run: Run, change: Callable[[pa.Table], pa.Table]) -> None:
    """Change the parts with scores as another version would have written them."""
    for receipt in Path(run.uri, "shards").glob("*.json"):
        said = json.loads(receipt.read_text())
        for part in said["parts"]:
            if part["name"].startswith("scores/"):
                path = Path(run.uri, part["name"])
                pq.write_table(change(pq.read_table(path)), path)
                part["bytes"] = path.stat().st_size
        receipt.write_text(json.dumps(said))


def test_later_runs_may_have_more_columns_and_earlier_ones_fewer(copy: Copy) -> None:
    new, old, wide = copy("aaaa"), copy("bbbb"), copy("cccc")
    rewrite(old, lambda table: table.drop_columns(["zlib_ratio", "language"]))
    rewrite(wide, lambda table: table.append_column("extra", pc.utf8_length(table["doc_id"])))
    for run in (old, new, wide):
        publish_run(run)
    found = table_of(new, "scores").scan().to_arrow()
    for key, column, number in (
        ("bbbb", "zlib_ratio", 0),
        ("aaaa", "zlib_ratio", len(pc.drop_null(new.table("scores")["zlib_ratio"]))),
        ("aaaa", "extra", 0),
        ("cccc", "extra", wide.table("scores").num_rows),
    ):
        of_run = found.filter(pc.field("run_key") == key)
        assert len(of_run) == new.table("scores").num_rows
        assert len(pc.drop_null(of_run[column])) == number


def test_a_column_of_another_type_is_refused_by_name(copy: Copy) -> None:
    publish_run(copy("aaaa"))
    other = copy("bbbb")

    def spell(table: pa.Table) -> pa.Table:
        at = table.column_names.index("num_bytes")
        return table.set_column(at, "num_bytes", table["num_bytes"].cast("string"))

    rewrite(other, spell)
    with pytest.raises(
        ValueError, match=r"^catalog: logitmill\.scores has other columns:.*num_byt"
    ):
        publish_run(other)
    assert keys_of(other).keys() == {"aaaa"}


def test_a_run_with_a_part_that_is_not_its_own_is_refused(copy: Copy) -> None:
    run = copy("aaaa")
    Path(run.uri, "scores/part-00001.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=r"^run: .* 1 of its \d+ shards are not what"):
        publish_run(run)


def test_withdrawn_runs_are_gone_and_may_come_again(copy: Copy) -> None:
    run, other = copy("aaaa"), copy("bbbb")
    for each in (run, other):
        publish_run(each)
    root = root_of(run.folder)
    gone = withdraw_run("aaaa", root=root)
    assert gone == {
        "scores": len(run.paths("scores")),
        "tokens": len(run.paths("tokens")),
        **dict.fromkeys(("counts", "shards", "runs"), 1),
    }
    assert set(withdraw_run("aaaa", root=root).values()) == {0}
    shutil.rmtree(run.uri)
    for name in TABLES:
        assert keys_of(other, name).keys() == {"bbbb"}
    again = copy("aaaa")
    publish_run(again)
    assert keys_of(again)["aaaa"] == again.table("scores").num_rows


def test_mistakes_are_named(copy: Copy, tmp_path: Path) -> None:
    run = copy("aaaa")
    for options, said in (
        ({"date": "23.11.2026"}, r"^date: '23.11.2026' is no date; give one as 2026-11-23"),
        ({"corpus": ""}, "^corpus: '' is no name"),
        ({"catalog": "lake"}, r"^catalog: 'lake' is not set up.*PYICEBERG_CATALOG__LAKE__URI"),
    ):
        with pytest.raises(ValueError, match=said):
            publish_run(run, **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^catalog: 's3://bucket/runs' is no place for SQLite"):
        check_catalog("beside", Folder("s3://bucket/runs"))
    Path(run.uri, MANIFEST).unlink()
    with pytest.raises(ValueError, match=r"^run: .*aaaa' is not complete"):
        publish_run(open_run(run.uri, partial=True))
    assert not (tmp_path / "runs" / "tables").exists()


def test_a_table_of_somebody_elses_is_left_alone(copy: Copy) -> None:
    run = copy("aaaa")
    opened = open_catalog("beside", root_of(run.folder))
    opened.create_namespace("logitmill")
    opened.create_table(("logitmill", "tokens"), pa.schema({"x": pa.int64()}))
    with pytest.raises(ValueError, match=r"^catalog: logitmill\.tokens is partitioned by nothing"):
        publish_run(run)


def test_on_s3_with_a_catalog_from_the_environment(
    finished: Run, s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import s3fs

    fs = s3fs.S3FileSystem(endpoint_url=s3)
    root, key = "s3://bucket/published", finished.plan["run_key"]
    fs.put(finished.uri, f"{root}/{key}", recursive=True)
    run = open_run(f"{root}/{key}", storage_options={"endpoint_url": s3})
    monkeypatch.setenv("PYICEBERG_CATALOG__LAKE__URI", f"sqlite:///{tmp_path}/lake.db")
    monkeypatch.setenv("PYICEBERG_CATALOG__LAKE__WAREHOUSE", "s3://bucket/warehouse")
    assert publish_run(run, catalog="lake").added["scores"] == len(run.paths("scores"))
    assert set(publish_run(run, catalog="lake").added.values()) == {0}
    found = table_of(run, "scores", "lake").scan().to_arrow()
    assert sorted(found["doc_id"].to_pylist()) == sorted(run.table()["doc_id"].to_pylist())
    assert set(found["run_key"].to_pylist()) == {key}
    # Nothing that opens the storage, nor where it is, came into a table.
    stored = b"".join(fs.cat(fs.find("bucket/warehouse")).values())
    stored += (tmp_path / "lake.db").read_bytes()
    for secret in (SECRET, os.environ["AWS_ACCESS_KEY_ID"], s3):
        assert secret.encode() not in stored


def test_an_error_of_the_catalog_shows_no_password(
    copy: Copy, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = "p4ss-of-nobody"
    monkeypatch.setenv("PYICEBERG_CATALOG__LAKE__URI",
                       f"postgresql+psycopg://me:{secret}@127.0.0.1:1/catalog")  # fmt: skip
    monkeypatch.setenv("PYICEBERG_CATALOG__LAKE__WAREHOUSE", "s3://bucket/warehouse")
    with pytest.raises((ValueError, OSError), match=r"^catalog: 'lake' cannot be opened") as raised:
        publish_run(copy("aaaa"), catalog="lake")
    assert secret not in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("uri", "corpus"),
    [
        ("s3://c/web/dt=2026-11-23/*.parquet", "s3://c/web/dt=*/*.parquet"),
        ("s3://c/2026/11/23/x.jsonl", "s3://c/*/x.jsonl"),
        ("datasets:imdb", "datasets:imdb"),
        ("v2026-1-2/build", "v2026-1-2/build"),
    ],
)
def test_dates_do_not_make_a_corpus(uri: str, corpus: str) -> None:
    assert name_corpus(uri) == corpus


def test_the_command_publishes_what_is_complete_and_takes_it_out_again(
    copy: Copy, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, begun = copy("aaaa"), copy("bbbb")
    Path(begun.uri, MANIFEST).unlink()
    root = str(Path(whole.uri).parent)
    number = len(whole.paths("scores"))
    publish(root, corpus="code")
    said = capsys.readouterr().out
    assert f"published: tokens {number} files, scores {number} files, counts 1 file" in said
    assert "left out: 1 run not complete yet" in said
    assert set(table_of(whole, "runs").scan().to_arrow()["corpus"].to_pylist()) == {"code"}
    publish(whole.uri)
    assert capsys.readouterr().out == f"{whole.uri}  is there already\n"
    publish(root, withdraw=True)
    assert "withdrawn: runs 1 file" in capsys.readouterr().out
    assert keys_of(whole) == {}


def test_a_run_that_is_gone_is_withdrawn_by_its_key(
    copy: Copy, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gone, other = copy("aaaa"), copy("bbbb")
    publish(str(Path(gone.uri).parent))
    shutil.rmtree(gone.uri)
    capsys.readouterr()
    publish(gone.uri, withdraw=True)
    assert capsys.readouterr().out.startswith(f"{gone.uri}  withdrawn: runs 1 file, shards 1 file")
    assert set(keys_of(other)) == {"bbbb"}
    for place, said in (
        (gone.uri, f"run: there is no run in '{gone.uri}', nor one of key 'aaaa' in the tables"),
        (str(tmp_path / "elsewhere/aaaa"), "--catalog: nothing is published beside the runs in"),
    ):
        with pytest.raises(typer.Exit) as raised:
            publish(place, withdraw=True)
        assert raised.value.exit_code == 2
        assert capsys.readouterr().err.startswith(f"error: {said}")
    assert not (tmp_path / "elsewhere").exists()


def test_a_run_that_was_moved_is_withdrawn_by_the_uri_that_it_had(
    copy: Copy, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = copy("aaaa")
    root, moved = Path(run.uri).parent, tmp_path / "moved/aaaa"
    publish(run.uri)
    moved.parent.mkdir()
    shutil.move(run.uri, moved)
    for place, said in (
        (str(moved), "of a run that was moved give the URI that it had"),
        (str(root), f"by the URI that it had, {root}/KEY; keys there: aaaa"),
        (f"{root}/bbbb", "give RUNS/KEY, the URI that it had; keys there: aaaa"),
    ):
        with pytest.raises(typer.Exit):
            publish(place, withdraw=True)
        assert said in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"^catalog: a file of scores is gone .* withdraw its run"):
        connect(str(root), catalog="beside")
    publish(run.uri, withdraw=True)
    assert "withdrawn: runs 1 file" in capsys.readouterr().out


def test_tables_that_were_moved_say_so(copy: Copy, tmp_path: Path) -> None:
    run = copy("aaaa")
    publish_run(run)
    root = Path(run.uri).parent
    shutil.move(root, tmp_path / "moved")
    with pytest.raises(OSError, match=r"^catalog: 'beside' .* were moved: move them back"):
        publish_run(open_run(str(tmp_path / "moved/aaaa")))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"date": "tomorrow"}, "error: --date: 'tomorrow' is no date; give one as 2026-11-23"),
        ({"catalog": "lake"}, "error: --catalog: 'lake' is not set up for pyiceberg"),
        ({"withdraw": True, "date": "2026-11-23"}, "error: --date: '2026-11-23' does not go with"),
    ],
)
def test_a_mistake_in_the_command_is_one_line(
    copy: Copy, capsys: pytest.CaptureFixture[str], options: dict[str, Any], said: str
) -> None:
    with pytest.raises(typer.Exit) as raised:
        publish(copy("aaaa").uri, **options)
    assert raised.value.exit_code == 2
    error = capsys.readouterr().err
    assert error.startswith(said) and error.count("\n") == 1


def test_a_scoring_run_publishes_itself_also_when_it_is_already_there(
    corpus: Path, demo_folder: Path, tmp_path: Path
) -> None:
    out = str(tmp_path / "runs")
    score = partial(score_corpus, str(demo_folder), str(corpus / "two"), out)
    with pytest.raises(ValueError, match="catalog: 'lake'"):
        score(catalog="lake")
    assert not Path(out).exists(), "a mistake is told before anything is scored"
    uri = score()
    # It is complete, and not yet published.
    assert score(catalog="beside") == uri
    assert score(catalog="beside") == uri
    run = open_run(uri)
    assert run.manifest is not None
    assert keys_of(run) == {run.plan["run_key"]: run.manifest["documents"]}
    anew = open_run(score(tiers=["tokens"], catalog="beside"))
    assert keys_of(anew, "runs") == {run.plan["run_key"]: 1, anew.plan["run_key"]: 1}
