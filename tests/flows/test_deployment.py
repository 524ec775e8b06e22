"""What Prefect's server and UI know of the flows that are deployed, and what `backfill` does."""

from __future__ import annotations

import json
import shutil
from datetime import date
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from flow_helpers import SECRET
from logitmill.engine import PRESETS
from logitmill.flows import CorpusSpec, open_run, score_corpus
from logitmill.flows.backfill import backfill
from logitmill.flows.parts import TIERS
from prefect import Flow

FIRST, LAST = date(2026, 2, 27), date(2026, 3, 2)


@pytest.mark.parametrize(
    ("flow", "dates"),
    [(score_corpus, {}), (backfill, {"first": "2026-02-27", "last": "2026-03-02"})],
    ids=["score-corpus", "backfill"],
)
def test_parameters_are_typed_and_described(flow: Flow[..., Any], dates: dict[str, str]) -> None:
    schema = flow.parameters.model_dump()
    for name, field in schema["properties"].items():
        assert field["description"], name
    assert schema["properties"]["tiers"]["items"]["enum"] == list(TIERS)
    recipe = schema["properties"]["recipe"]["anyOf"][0]
    assert recipe["enum"] == list(PRESETS)
    for definition in ("CorpusSpec", "EngineSettings", "Recipe"):
        fields = schema["definitions"][definition]["properties"]
        undescribed = [n for n, field in fields.items() if not field.get("description")]
        assert undescribed == []
    given: dict[str, Any] = {
        "model": "m",
        "corpus": "c",
        "out": "o",
        "recipe": "rolling-64",
        **dates,
    }
    jsonschema.validate(given, schema)
    jsonschema.validate({**given, "engine": {"quantization": "fp8", "fp8_head": True}}, schema)
    for engine in ({"quantization": "fp7"}, {"dtype": "int3"}, {"fp7_head": True}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate({**given, "engine": engine}, schema)


def test_days_are_asked_for_as_dates() -> None:
    schema = backfill.parameters.model_dump()
    assert {schema["properties"][name]["format"] for name in ("first", "last")} == {"date"}
    assert {"first", "last", "corpus", "model", "out"} <= set(schema["required"])


def test_parameters_have_no_place_for_credentials() -> None:
    assert "storage_options" not in json.dumps(backfill.parameters.model_dump())
    schema = score_corpus.with_options(name="other").parameters.model_dump()
    assert "storage_options" not in json.dumps(schema)
    given = {"uri": "s3://x", "storage_options": {"secret": "s"}}
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"model": "m", "corpus": given, "out": "o"}, schema)


@pytest.fixture
def days(corpus: Path, tmp_path: Path) -> str:
    """A corpus of a folder a day, a file each, and none on the last of February."""
    files = sorted(corpus.rglob("*.py"))
    for day, file in zip(("2026-02-27", "2026-03-01", "2026-03-02"), files, strict=False):
        folder = tmp_path / "days" / f"date={day}"
        folder.mkdir(parents=True)
        shutil.copy(file, folder)
    return str(tmp_path / "days" / "date={date}" / "*.py")


def test_a_backfill_scores_the_days_that_have_files(
    days: str, demo_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    given: dict[str, Any] = {"model": str(demo_folder), "out": str(tmp_path / "runs")}
    uris = backfill(corpus=days, first=FIRST, last=LAST, **given)
    read = [open_run(uri).manifest for uri in uris]
    assert [manifest["documents"] for manifest in read if manifest] == [1, 1, 1]
    plans = [json.loads(Path(uri, "plan.json").read_text()) for uri in uris]
    corpora = [plan["uri"].split("date=")[1][:10] for plan in plans]
    assert corpora == ["2026-02-27", "2026-03-01", "2026-03-02"]
    assert [line for line in caplog.messages if "skipped" in line] == [
        f"2026-02-28 is skipped: no files at {days.format(date='2026-02-28')}"
    ]
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "runs").rglob("*.json")}
    assert backfill(corpus=days, first=FIRST, last=LAST, **given) == uris
    after = {file: file.stat().st_mtime_ns for file in (tmp_path / "runs").rglob("*.json")}
    assert after == before


def test_a_backfill_goes_on_after_days_that_fail_and_names_them(
    days: str, demo_folder: Path, tmp_path: Path
) -> None:
    for day in (FIRST, LAST):
        Path(days.format(date=day)).with_name("broken.parquet").write_bytes(b"PAR1 no more")
    given: dict[str, Any] = {"model": str(demo_folder), "out": str(tmp_path / "runs")}
    corpus = CorpusSpec(uri=days.replace("*.py", ""), source_column=None)
    with pytest.raises(RuntimeError) as failure:
        backfill(corpus=corpus, first=FIRST, last=LAST, **given)
    said = str(failure.value)
    assert said.startswith("2 of 4 days failed: 2026-02-27 (")
    assert "; 2026-03-02 (" in said and "broken.parquet" in said
    assert "2026-03-01" not in said
    assert len(list((tmp_path / "runs").glob("*/manifest.json"))) == 1


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"first": LAST, "last": FIRST}, "first: 2026-03-02 is after last, 2026-02-27"),
        ({"corpus": "s3://web/*.parquet"}, "put {date} into it"),
        ({"corpus": "s3://web/{day}/*.parquet"}, "its one field in braces is {date}"),
        ({"corpus": "s3://web/{date.when}/*.parquet"}, "its one field in braces is {date}"),
    ],
)
def test_a_backfill_that_cannot_be_is_refused(changed: dict[str, Any], says: str) -> None:
    given = {"corpus": "s3://web/{date}/*", "first": FIRST, "last": LAST, **changed}
    with pytest.raises(ValueError, match=r"^(first|corpus): ") as refused:
        backfill(model="m", out="o", **given)
    assert says in str(refused.value)


def test_a_backfill_keeps_credentials_from_the_server() -> None:
    corpus = CorpusSpec(uri="s3://web/{date}/*", storage_options={"secret": SECRET})
    with pytest.raises(ValueError, match=r"^corpus: storage_options") as refused:
        backfill(model="m", out="o", corpus=corpus, first=FIRST, last=LAST)
    assert SECRET not in str(refused.value)


def test_other_ways_to_write_a_day() -> None:
    from logitmill.flows.backfill import _uri_of

    assert _uri_of("s3://web/{date:%Y/%m/%d}/*", FIRST) == "s3://web/2026/02/27/*"
