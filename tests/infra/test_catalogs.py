"""Runs published in catalogs that are servers: PostgreSQL, and Iceberg's REST protocol."""

from __future__ import annotations

import json
import shutil
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from iceberg_rest import serve
from logitmill.flows import Run, open_run, score_corpus
from logitmill.flows.catalog import TABLES, open_catalog, publish_run, root_of, withdraw_run
from services import run_database

TOKEN = "t0ken-of-the-tests"
Copy = Callable[[str], Run]


@pytest.fixture(scope="module")
def finished(demo_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("catalogs")
    (folder / "a.py").write_text("import json\n" * 20)
    return open_run(score_corpus(str(demo_folder), str(folder / "*.py"), str(folder / "runs")))


@pytest.fixture
def copy(finished: Run, tmp_path: Path) -> Copy:
    """A copy of the finished run under another key."""

    def make(key: str) -> Run:
        folder = Path(shutil.copytree(finished.uri, tmp_path / "runs" / key))
        plan = json.loads((folder / "plan.json").read_text()) | {"run_key": key}
        (folder / "plan.json").write_text(json.dumps(plan))
        return open_run(str(folder))

    return make


@pytest.fixture(scope="module")
def database() -> Iterator[str]:
    with run_database() as settings:
        if not settings:
            pytest.skip("no PostgreSQL")
        who, password, host, port, name = (
            settings[f"PREFECT_SERVER_DATABASE_{part}"]
            for part in ("USER", "PASSWORD", "HOST", "PORT", "NAME")
        )
        yield f"postgresql+psycopg://{who}:{password}@{host}:{port}/{name}"


@pytest.fixture(params=["postgresql", "rest"])
def lake(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[str]:
    """The name of a catalog that the environment sets up."""
    monkeypatch.setenv("PYICEBERG_CATALOG__LAKE__WAREHOUSE", (tmp_path / "lake").as_uri())
    if request.param == "postgresql":
        uri = request.getfixturevalue("database")
        monkeypatch.setenv("PYICEBERG_CATALOG__LAKE__URI", uri)
        yield "lake"
        return
    with serve(tmp_path / "kept", TOKEN) as address:
        monkeypatch.setenv("PYICEBERG_CATALOG__LAKE__URI", address)
        monkeypatch.setenv("PYICEBERG_CATALOG__LAKE__TOKEN", TOKEN)
        yield "lake"


def test_runs_are_published_once_by_any_number_at_once(lake: str, copy: Copy) -> None:
    runs = [copy("aaaa"), copy("bbbb")]
    errors: list[BaseException] = []

    def publish(run: Run) -> None:
        try:
            publish_run(run, catalog=lake)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=publish, args=[run]) for run in runs * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    opened = open_catalog(lake, root_of(runs[0].folder))
    for name in TABLES:
        if name == "tokens":
            continue
        rows = opened.load_table(("logitmill", name)).scan().to_arrow()
        keys = Counter(rows["run_key"].to_pylist())
        assert keys.keys() == {"aaaa", "bbbb"} and len(set(keys.values())) == 1
    assert set(publish_run(runs[0], catalog=lake).added.values()) == {0}
    for run in runs:
        withdraw_run(run.plan["run_key"], catalog=lake, root=root_of(run.folder))
    assert opened.load_table(("logitmill", "scores")).scan().to_arrow().num_rows == 0


def test_a_wrong_token_is_said_and_not_shown(
    copy: Copy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serve(tmp_path / "kept", TOKEN) as address:
        monkeypatch.setenv("PYICEBERG_CATALOG__LAKE__URI", address)
        monkeypatch.setenv("PYICEBERG_CATALOG__LAKE__TOKEN", "another-t0ken")
        with pytest.raises(ValueError, match=r"^catalog: 'lake' cannot be opened") as raised:
            publish_run(copy("aaaa"), catalog="lake")
    assert "another-t0ken" not in str(raised.value)
