"""The Superset dashboard: its files fit the views, and it shows them."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import duckdb
import pyarrow.parquet as pq
import pytest
import yaml
from chromium import need_browser
from logitmill.flows.parts import SCORES
from logitmill.flows.summary import COUNTS
from logitmill.flows.views import connect, write_database
from services import Process, free_port, started

BUNDLE = Path(__file__).parents[2] / "infra" / "dashboards" / "superset"
REQUIREMENTS = BUNDLE.with_suffix(".txt")
VERSIONS = BUNDLE.with_name("superset-constraints.txt")
# Superset's commands, one after the other in one process: importing it takes each most of its time.
COMMANDS = """
import json, sys
from flask.cli import ScriptInfo
from superset.app import create_app
from superset.cli.main import superset
app = ScriptInfo(create_app=create_app)
for command in json.loads(sys.argv[1]):
    superset.main(command, obj=app, standalone_mode=False)
"""
# What a chart says it shows, and where in its settings.
_COLUMNS = ("all_columns", "groupby")
_METRICS = ("metric", "metrics")


def read(folder: str) -> list[dict[str, Any]]:
    return [yaml.safe_load(path.read_text()) for path in sorted(BUNDLE.glob(f"{folder}/**/*.yaml"))]


def by_uuid(folder: str) -> dict[str, dict[str, Any]]:
    return {each["uuid"]: each for each in read(folder)}


def listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


@pytest.fixture(scope="module")
def db(tmp_path_factory: pytest.TempPathFactory) -> duckdb.DuckDBPyConnection:
    """The views over a run without documents."""
    root = tmp_path_factory.mktemp("runs")
    run = root / "aaaa"
    for name, schema in (("scores/part-00000", SCORES), ("summary/counts", COUNTS)):
        path = run / f"{name}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(schema.empty_table(), path)
    part = {"name": "scores/part-00000.parquet", "bytes": 1, "sha256": ""}
    sums = dict.fromkeys(("documents", "failed", "tokens", "bytes", "loglikelihood"), 0)
    manifest = {"run_key": "aaaa", "model": {}, "parts": [part | {"shard": 0}], **sums}
    receipt = {"shard": 0, "device": "", "seconds": 0.0, "device_seconds": 0.0, **sums}
    (run / "shards").mkdir()
    for name, value in (
        ("manifest", manifest),
        ("plan", {"uri": "c"}),
        ("shards/00000", receipt),
    ):
        (run / f"{name}.json").write_text(json.dumps(value))
    return connect(str(root))


def test_datasets_are_views_with_all_their_columns(db: duckdb.DuckDBPyConnection) -> None:
    for dataset in read("datasets"):
        there = {row[0]: row[1] for row in db.sql(f"DESCRIBE {dataset['table_name']}").fetchall()}
        said = {column["column_name"]: column["type"] for column in dataset["columns"]}
        assert said == there, dataset["table_name"]
        assert dataset["main_dttm_col"] in {None, *(c for c in said if said[c] == "DATE")}
        for metric in dataset["metrics"]:
            db.sql(f"SELECT {metric['expression']} FROM {dataset['table_name']}").fetchall()


def mistakes(charts: list[dict[str, Any]], datasets: dict[str, dict[str, Any]]) -> list[str]:
    """What charts show that their datasets do not have."""
    found = []
    for chart in charts:
        dataset, shown = datasets[chart["dataset_uuid"]], chart["params"]
        columns = {column["column_name"] for column in dataset["columns"]}
        metrics = {metric["metric_name"] for metric in dataset["metrics"]}
        asked = [c for name in (*_COLUMNS, "x_axis") for c in listed(shown.get(name))]
        asked += [json.loads(order)[0] for order in shown.get("order_by_cols", ())]
        asked += list(shown.get("column_config", {}))
        found += [f"{chart['slice_name']}: no column {c}" for c in asked if c not in columns]
        asked = [m for name in _METRICS for m in listed(shown.get(name))]
        found += [f"{chart['slice_name']}: no metric {m}" for m in asked if m not in metrics]
    return found


def test_charts_show_what_is_there() -> None:
    charts, datasets = read("charts"), by_uuid("datasets")
    assert mistakes(charts, datasets) == []
    table = next(chart for chart in charts if "all_columns" in chart["params"])
    table["params"]["all_columns"].append("perplexity")
    line = next(chart for chart in charts if "metrics" in chart["params"])
    line["params"]["metrics"] = ["perplexity"]
    assert sorted(mistakes(charts, datasets)) == sorted(
        [
            f"{table['slice_name']}: no column perplexity",
            f"{line['slice_name']}: no metric perplexity",
        ]
    )


def test_the_dashboard_has_every_chart_once_and_nothing_overflows() -> None:
    (dashboard,) = read("dashboards")
    position = dashboard["position"]
    places = [each for each in position.values() if isinstance(each, dict)]
    shown = [each["meta"]["uuid"] for each in places if each["type"] == "CHART"]
    assert sorted(shown) == sorted(by_uuid("charts"))
    for each in places:
        assert all(each["id"] in position[child]["parents"] for child in each.get("children", ()))
        if each["type"] == "ROW":
            assert sum(position[child]["meta"]["width"] for child in each["children"]) <= 12
    datasets = by_uuid("datasets")
    for filter_ in dashboard["metadata"]["native_filter_configuration"]:
        for target in filter_["targets"]:
            columns = datasets[target["datasetUuid"]]["columns"]
            assert target["column"]["name"] in {column["column_name"] for column in columns}


def test_references_hold_and_nothing_is_kept_that_opens_anything() -> None:
    (database,) = read("databases")
    assert {dataset["database_uuid"] for dataset in read("datasets")} == {database["uuid"]}
    assert "password" not in database and "@" not in database["sqlalchemy_uri"]
    assert database["sqlalchemy_uri"].endswith("?access_mode=read_only")
    kinds = ("databases", "datasets", "charts", "dashboards")
    uuids = [each["uuid"] for kind in kinds for each in read(kind)]
    assert len(set(uuids)) == len(uuids)


def install() -> Path:
    """Python of an environment with Superset below the user's cache; made if need be."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "logitmill/superset")
    folder.mkdir(parents=True, exist_ok=True)
    wanted = "".join([sys.base_prefix, *(path.read_text() for path in (REQUIREMENTS, VERSIONS))])
    python, done = folder / "bin" / "python", folder / ".installed"
    with folder.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists() or done.read_text() != wanted:
            subprocess.run(
                [sys.executable, "-m", "venv", "--clear", "--without-pip", folder], check=True
            )
            # Only what is imported is compiled, and then.
            pip = [sys.executable, "-m", "pip", "--python", python, "install", "--no-compile"]
            pip += ["-q", "--retries", "2"]
            made = subprocess.run([*pip, "-r", REQUIREMENTS], capture_output=True, text=True)
            if made.returncode and "connection broken" in made.stderr:
                pytest.skip("Superset comes from a package index, and none is reached")
            assert made.returncode == 0, made.stderr
            done.write_text(wanted)
    return python


@contextmanager
def run_superset(python: Path, folder: Path, database: Path) -> Iterator[str]:
    """A Superset that has imported the bundle, over a DuckDB file; gives its address."""
    (folder / "superset_config.py").write_text(
        f"SECRET_KEY = {os.urandom(24).hex()!r}\n"
        f"SQLALCHEMY_DATABASE_URI = 'sqlite:///{folder}/superset.db'\n"
        "TALISMAN_ENABLED = False\nWTF_CSRF_ENABLED = False\n"
    )
    bundle = Path(shutil.copytree(BUNDLE, folder / "superset"))
    about = bundle / "databases" / "logitmill.yaml"
    about.write_text(about.read_text().replace("/var/lib/logitmill/views.duckdb", str(database)))
    with zipfile.ZipFile(folder / "bundle.zip", "w") as file:
        for path in bundle.rglob("*.yaml"):
            file.write(path, path.relative_to(folder))
    settings = {
        "SUPERSET_CONFIG_PATH": str(folder / "superset_config.py"),
        "SUPERSET_HOME": str(folder),
        "PYTHONPATH": "",
    }
    who = ["--username", "admin", "--password", "admin", "--email", "admin@example.com"]
    port = free_port()
    commands = [
        ["db", "upgrade"],
        ["fab", "create-admin", *who, "--firstname", "An", "--lastname", "Admin"],
        ["init"],
        ["import-dashboards", "-p", str(folder / "bundle.zip"), "-u", "admin"],
        ["run", "-p", str(port), "--with-threads"],
    ]
    command = [str(python), "-c", COMMANDS, json.dumps(commands)]
    with started(Process(command, settings, folder, cwd=folder)) as process:
        process.wait_for(f"http://127.0.0.1:{port}/health")
        yield f"http://127.0.0.1:{port}"


def big_numbers(runs: str) -> Iterator[str]:
    """What the charts of one number should say, by DuckDB alone."""
    datasets, views = by_uuid("datasets"), connect(runs)
    for chart in read("charts"):
        if chart["viz_type"] == "big_number_total":
            dataset, shown = datasets[chart["dataset_uuid"]], chart["params"]
            metrics = {each["metric_name"]: each["expression"] for each in dataset["metrics"]}
            query = f"SELECT {metrics[shown['metric']]} FROM {dataset['table_name']}"
            ((value,),) = views.sql(query).fetchall()
            yield format(value, shown["y_axis_format"].replace("d", ".0f"))


@pytest.mark.slow
@pytest.mark.skipif(sys.version_info >= (3, 13), reason="Superset's pandas is for Python 3.12")
def test_superset_shows_it(demo_folder: Path, tmp_path: Path) -> None:
    from logitmill.flows import score_corpus
    from logitmill.flows.corpus import CorpusSpec

    source = Path(json.__file__).with_name("decoder.py").read_text()
    # The first has nothing to score, the last is a copy.
    texts = [source[i * 150 : i * 150 + 120 + 17 * (i % 7)] if i else "" for i in range(59)]
    rows = [
        {
            "text": text,
            "source": ("web", "books", "code")[i % 3],
            "language": ("en", "de")[i % 2],
            "day": f"2026-11-{1 + i % 21:02}",
        }
        for i, text in enumerate([*texts, texts[-1]])
    ]
    corpus, runs = tmp_path / "corpus.jsonl", str(tmp_path / "runs")
    corpus.write_text("".join(json.dumps(row) + "\n" for row in rows))
    columns = {f"{name}_column": name for name in ("source", "language", "day")}
    folder = tmp_path / "superset-home"
    folder.mkdir()
    with need_browser() as browser:
        python = install()
        score_corpus(str(demo_folder), CorpusSpec(uri=str(corpus), **columns), runs)
        write_database(runs, str(tmp_path / "views.duckdb"))
        with run_superset(python, folder, tmp_path / "views.duckdb") as url:
            context = browser.new_context(viewport={"width": 1400, "height": 3000})
            login = {"username": "admin", "password": "admin"}
            context.request.post(f"{url}/login/", form=login, timeout=120_000, max_redirects=0)
            page = context.new_page()
            refused: list[str] = []
            page.on("response", lambda r: refused.append(r.url) if r.status >= 400 else None)
            page.goto(f"{url}/superset/dashboard/logitmill/", timeout=120_000)
            page.get_by_text("59", exact=True).first.wait_for(timeout=120_000)
            page.wait_for_function("!document.querySelector('.loading')", timeout=120_000)
            page.screenshot(path=str(tmp_path / "dashboard.png"))
            said = page.inner_text("body")
    # Every chart has asked its view, and none was told that it cannot or that nothing is there.
    assert refused == []
    assert not re.search(r"[Uu]nexpected error|Error\b|An error occurred|No results", said)
    for chart in read("charts"):
        assert chart["slice_name"] in said
    for value in ("web", "books", "code", *big_numbers(runs)):
        assert value in said
