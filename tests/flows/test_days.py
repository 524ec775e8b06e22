"""The day of a document, from its column or its path, to the plan's fingerprint."""

from __future__ import annotations

import datetime
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from flow_helpers import Score
from logitmill.flows.commands.words import show_totals
from logitmill.flows.corpus import CorpusSpec, plan_corpus, read_shard
from logitmill.flows.corpus.days import day_of_path, day_of_value
from logitmill.flows.operations import operations
from logitmill.flows.request import Request, prepare
from logitmill.flows.store import find_receipts
from logitmill.flows.summary import quantiles

UTC = datetime.UTC
DAY = datetime.date(2026, 11, 23)
NIGHT = datetime.datetime(2026, 11, 23, 23, 59, 59)


def days(path: Path | str, **settings: Any) -> list[str]:
    """The days of a corpus's documents, as they are read shard by shard."""
    spec = CorpusSpec(uri=str(path), **settings)
    shards = plan_corpus(spec).shards
    return [document.day for shard in shards for document in read_shard(spec, shard)]


def write(path: Path, column: pa.Array) -> Path:
    """A Parquet file of a text and a column `when`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"text": ["x"] * len(column), "when": column}), path)
    return path


@pytest.mark.parametrize(
    ("path", "day"),
    [
        ("s3://corpora/dt=2026-11-23/part-0.parquet", "2026-11-23"),
        ("a/DATE=2026-11-23/b", "2026-11-23"),
        ("a/ds=2026-11-23T00/b", "2026-11-23"),
        ("2026-01-01/day=2026-11-23/2026-01-02.txt", "2026-11-23"),
        ("year=2026/month=3/day=7/x.parquet", "2026-03-07"),
        ("crawl/2026/11/23/x.jsonl", "2026-11-23"),
        ("crawl-2026-11-23.jsonl.gz", "2026-11-23"),
        ("2026-11-22/from-2026-11-23.txt", "2026-11-23"),
        ("dt=2026-13-01/2026-11-23.txt", "2026-11-23"),
        ("2024-02-29", "2024-02-29"),
        ("2023-02-29", ""),
        ("2026/11/23", ""),
        ("1/2026/11/234/x", ""),
        ("x12026-11-23", ""),
        ("2026-11-231", ""),
        ("20261123/x.txt", ""),
        ("update=2026-11-2/x", ""),
        ("", ""),
    ],
)
def test_a_path_names_a_day(path: str, day: str) -> None:
    assert day_of_path(path) == day


@pytest.mark.parametrize(
    ("value", "day"),
    [
        ("2026-11-23", "2026-11-23"),
        (b" 2026-11-23T10:00:00-05:00", "2026-11-23"),
        ("2026-11-23 later", "2026-11-23"),
        ("2026/11/23", "2026-11-23"),
        ("20261123T100000Z", "2026-11-23"),
        ("2026-11/23", ""),
        ("1763856000", ""),
        (DAY, "2026-11-23"),
        (NIGHT, "2026-11-23"),
        (NIGHT.replace(tzinfo=UTC), "2026-11-23"),
        (NIGHT.replace(tzinfo=datetime.timezone(datetime.timedelta(hours=-5))), "2026-11-24"),
        (datetime.datetime.max.replace(tzinfo=datetime.timezone.min), ""),
        (datetime.date(987, 6, 5), "0987-06-05"),
        ("23.11.2026", ""),
        ("2026-11-31", ""),
        ("2026-11-234", ""),
        (b"\xff\xfe", ""),
        ("", ""),
        (None, ""),
        (20261123, ""),
        (True, ""),
        ([DAY], ""),
    ],
)
def test_a_value_is_of_a_day_or_of_none(value: Any, day: str) -> None:
    assert day_of_value(value) == day


@pytest.mark.parametrize(
    "column",
    [
        pa.array([DAY, None]),
        pa.array([DAY, None], pa.date64()),
        pa.array([NIGHT, None], pa.timestamp("ns")),
        pa.array([NIGHT, None], pa.timestamp("s")),
        pa.array([NIGHT, None], pa.timestamp("us", "UTC")),
        pa.array([NIGHT, None], pa.timestamp("ms", "America/New_York")),
        pa.array(["2026-11-23T23:59:59Z", "yesterday"]),
        pa.array([b"2026-11-23", b"\xff"], pa.large_binary()),
        pa.array(["2026-11-23", None]).dictionary_encode(),
        # Beyond what Python's calendar can say.
        pa.array([1_795_478_399 * 10**6, 1 << 62], pa.timestamp("us")),
        pa.array([20_780, 1 << 30], pa.int32()).cast(pa.date32()),
    ],
    ids=lambda column: str(column.type),
)
def test_columns_of_dates_timestamps_and_texts(column: pa.Array, tmp_path: Path) -> None:
    path = write(tmp_path / "x.parquet", column)
    assert days(path, day_column="when") == ["2026-11-23", ""]
    assert days(path) == ["", ""]


def test_where_a_column_says_nothing_the_path_does(tmp_path: Path) -> None:
    write(tmp_path / "dt=2026-11-22/a.parquet", pa.array([DAY, None]))
    write(tmp_path / "dt=2026-11-24/a.parquet", pa.array([None, None], pa.date32()))
    assert days(tmp_path, day_column="when") == [
        *("2026-11-23", "2026-11-22"),
        *("2026-11-24", "2026-11-24"),
    ]
    assert days(tmp_path / "dt=2026-11-22") == ["2026-11-22"] * 2


def test_lines_text_files_and_documents_that_cannot_be_read_have_days(tmp_path: Path) -> None:
    lines = [{"text": "x", "when": "2026-11-23"}, {"text": "x", "when": 5}, {"when": "2026-11-21"}]
    folder = tmp_path / "2026" / "11" / "20"
    folder.mkdir(parents=True)
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "a.jsonl").write_text(text + "no json\n")
    expected = ["2026-11-23", "2026-11-20", "2026-11-21", "2026-11-20"]
    assert days(tmp_path, day_column="when") == expected
    (folder / "a.jsonl").unlink()
    (folder / "b.txt").write_text("x")
    assert days(tmp_path / "2026") == ["2026-11-20"]


def test_a_saved_dataset_has_days(tmp_path: Path) -> None:
    import datasets

    table = pa.table({"text": ["x", "y"], "when": pa.array([NIGHT, None], pa.timestamp("us"))})
    where = tmp_path / "dt=2026-11-01"
    datasets.disable_progress_bars()
    datasets.Dataset(table).save_to_disk(str(where))
    assert days(where, day_column="when") == ["2026-11-23", "2026-11-01"]


def test_days_are_part_of_what_a_corpus_is(tmp_path: Path) -> None:
    spec = CorpusSpec(uri=str(tmp_path / "dt=2026-11-22"))
    write(tmp_path / "dt=2026-11-22/a.parquet", pa.array([DAY]))
    before = plan_corpus(spec).fingerprint
    assert plan_corpus(CorpusSpec(uri=spec.uri, day_column="when")).fingerprint != before
    (tmp_path / "dt=2026-11-22").rename(tmp_path / "dt=2026-11-23")
    moved = CorpusSpec(uri=str(tmp_path / "dt=2026-11-23"))
    assert plan_corpus(moved).fingerprint != before


@pytest.mark.parametrize(
    ("column", "said"),
    [
        (pa.array([20261123]), "day_column='when': dates, timestamps or text needed, but"),
        (pa.array([[DAY]]), "day_column='when': dates, timestamps or text needed, but"),
    ],
    ids=lambda given: None,
)
def test_columns_that_can_hold_no_day_are_refused(
    column: pa.Array, said: str, tmp_path: Path
) -> None:
    path = write(tmp_path / "x.parquet", column)
    with pytest.raises(ValueError, match=said):
        plan_corpus(CorpusSpec(uri=str(path), day_column="when"))
    with pytest.raises(ValueError, match="day_column='wen': no such column"):
        plan_corpus(CorpusSpec(uri=str(path), day_column="wen"))


def test_a_column_without_a_day_in_it_is_refused(tmp_path: Path) -> None:
    """By its first thousand rows, if they say anything at all."""
    late = [*["en"] * 1000, "2026-11-23"]
    for values, refused in ((late, True), (late[1:], False), ([None] * 3, False)):
        path = write(tmp_path / "x.parquet", pa.array(values, pa.string()))
        spec = CorpusSpec(uri=str(path), day_column="when")
        if refused:
            said = "day_column='when': of the first 1000 rows none has a day there; .* is 'en'"
            with pytest.raises(ValueError, match=said):
                plan_corpus(spec)
        else:
            plan_corpus(spec)
    lines = tmp_path / "x.jsonl"
    lines.write_text('{"text": "x", "when": 1763856000}\n{"text": "x"}\nnothing\n')
    with pytest.raises(ValueError, match=r"first 2 rows none has a day there; .* is 1763856000"):
        plan_corpus(CorpusSpec(uri=str(lines), day_column="when"))
    within = tmp_path / "dt=2026-11-23"
    within.mkdir()
    plan_corpus(CorpusSpec(uri=str(lines.rename(within / "x.jsonl")), day_column="when"))


def test_documents_without_a_day_are_told_of(
    score: Score, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "x.parquet", pa.array(["2026-11-23", "yesterday", None]))
    run = score(CorpusSpec(uri=str(path), day_column="when"))
    show_totals(run)
    assert "note: 2 documents of no day: neither their 'when' nor" in capsys.readouterr().out
    show_totals(score(CorpusSpec(uri=str(path))))
    assert "note" not in capsys.readouterr().out


def test_a_run_has_days_in_scores_and_summary(
    score: Score, demo_folder: Path, tmp_path: Path
) -> None:
    column = pa.array([DAY, DAY, None], pa.date32())
    path = write(tmp_path / "dt=2026-11-20" / "x.parquet", column)
    run = score(CorpusSpec(uri=str(path), day_column="when"))
    of_days = ["2026-11-23", "2026-11-23", "2026-11-20"]
    assert run.table("scores", ["day"])["day"].to_pylist() == of_days
    assert run.table().column_names.index("day") == run.table().column_names.index("language") + 1
    table = quantiles(run.summary("counts"), "bits_per_byte", [0.5], by=["day"])
    assert table.select(["day", "documents"]).to_pylist() == [
        {"day": "2026-11-20", "documents": 1},
        {"day": "2026-11-23", "documents": 2},
    ]
    # Texts are the same, and so are their scores.
    assert table["q50"].to_pylist() == pytest.approx(
        run.table()["bits_per_byte"].to_pylist()[:2], rel=0.0101
    )
    out = str(tmp_path / "runs")
    plain = Request(model=str(demo_folder), corpus=CorpusSpec(uri=str(path)), out=out)
    assert prepare(plain).job.run_key != run.plan["run_key"]
    asked = replace(plain, corpus=CorpusSpec(uri=str(path), day_column="when"))
    assert prepare(asked).job.run_key == run.plan["run_key"]
    written = operations(find_receipts(run.folder, 1).values())
    parts = run.folder.sizes("scores") | run.folder.sizes("shards")
    tables = [size for name, size in parts.items() if name.endswith(".parquet")]
    assert written["bytes_written"].to_pylist() == [sum(tables)]
