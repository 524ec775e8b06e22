"""Deployments for real: PostgreSQL, Prefect's server and worker, as infra/compose.yaml has them."""

from __future__ import annotations

import os
import runpy
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from logitmill.flows import open_run
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.objects import FlowRun
from prefect.settings import PREFECT_API_URL, temporary_settings
from services import COMPOSE, ROOT, Process, command_of, free_port, run_server, started


class Site:
    """A site that has been set up as infra/README.md says, with its own infra/prefect.yaml."""

    def __init__(self, folder: Path, url: str, client: SyncPrefectClient) -> None:
        self.folder = folder
        self.client = client
        self.environment = {
            "PREFECT_API_URL": url,
            "PREFECT_HOME": str(folder / "home"),
            "DO_NOT_TRACK": "1",
        }

    def set_up(self, deployments: dict[str, Any]) -> None:
        """What compose's service of this name does."""
        infra = self.folder / "infra"
        infra.mkdir(exist_ok=True)
        (infra / "prefect.yaml").write_text(yaml.safe_dump(deployments))
        shutil.copy(ROOT / "infra/automations.py", infra)
        programs = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        done = subprocess.run(
            COMPOSE["setup"]["command"],
            cwd=self.folder,
            env={**os.environ, **self.environment, "PATH": programs},
            capture_output=True,
            text=True,
            timeout=180,
        )
        assert done.returncode == 0, done.stdout + done.stderr

    def start_worker(self) -> Process:
        port = str(free_port())
        environment = {**self.environment, "PREFECT_WORKER_WEBSERVER_PORT": port}
        worker = Process(command_of("worker"), environment, self.folder)
        worker.wait_for(f"http://127.0.0.1:{port}/health")
        return worker

    def wait(self, read: Callable[[], FlowRun | None], until: str, seconds: float) -> FlowRun:
        """The flow run that is read, once its state has the name."""
        deadline = time.monotonic() + seconds
        run = read()
        while run is None or run.state is None or run.state.name != until:
            assert time.monotonic() < deadline, run and run.state
            assert run is None or run.state is None or not run.state.is_final(), run.state
            time.sleep(0.5)
            run = read()
        return run


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("site")
    with run_server(folder) as url, temporary_settings({PREFECT_API_URL: url}):
        with get_client(sync_client=True) as client:
            yield Site(folder, url, client)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Three files of code."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    for name in ("decoder", "encoder", "scanner"):
        source = Path(yaml.__file__).with_name("scanner.py").read_text()
        (folder / f"{name}.py").write_text(source[: 300 * len(name)])
    return folder


def deployments(model: Path, corpus: Path, out: Path, first_night: datetime) -> dict[str, Any]:
    """infra/prefect.yaml as a site would edit it."""
    edited: dict[str, Any] = yaml.safe_load((ROOT / "infra/prefect.yaml").read_text())
    for deployment in edited["deployments"]:
        here = {"model": str(model), "out": str(out)}
        deployment["parameters"].update(here)
        # Tests share this machine, and its ports.
        variables = deployment["work_pool"]["job_variables"]["env"]
        variables["PREFECT_CLIENT_METRICS_PORT"] = str(free_port())
    nightly = edited["deployments"][0]
    nightly["parameters"]["corpus"] = f"{corpus}/**/*.py"
    # Were the set-up slower than expected, the next one would be soon too.
    nightly["schedules"] = [{"interval": 120, "anchor_date": first_night.isoformat()}]
    return edited


@pytest.mark.slow
def test_a_nightly_run_comes_by_itself(
    site: Site, demo_folder: Path, corpus: Path, tmp_path: Path
) -> None:
    out = tmp_path / "runs"
    soon = datetime.now(UTC) + timedelta(seconds=25)
    site.set_up(deployments(demo_folder, corpus, out, soon))
    nightly = site.client.read_deployment_by_name("score-corpus/nightly")
    assert nightly.concurrency_options is not None
    for name in ("score-corpus/nightly", "score-corpus/on-demand", "backfill/backfill"):
        deployment = site.client.read_deployment_by_name(name)
        given = {"model": "m", "corpus": "c/{date}", **deployment.parameters}
        given |= {"first": "2026-01-01", "last": "2026-01-02"} if "backfill" in name else {}
        assert deployment.enforce_parameter_schema
        jsonschema.validate(given, deployment.parameter_openapi_schema)
    assert site.client.read_work_pool("scoring").concurrency_limit == 1
    automations = [a.name for a in site.client.read_automations()]
    assert automations == ["logitmill: a run whose process is gone has crashed"]

    def first() -> FlowRun | None:
        runs = site.client.read_flow_runs()
        return min(runs, key=lambda run: run.expected_start_time or soon, default=None)

    with started(site.start_worker()) as worker:
        run = site.wait(first, "Completed", 240)
        assert run.deployment_id == nightly.id and run.auto_scheduled
        assert run.start_time is not None and run.start_time > soon - timedelta(seconds=1)
        assert run.empirical_policy.retries == 2
        assert worker.stop() == 0, worker.said()
    scored = [open_run(str(path.parent)) for path in out.glob("*/manifest.json")]
    assert [s.manifest["documents"] for s in scored if s.manifest] == [3]


@pytest.mark.slow
def test_setting_up_again_renews_what_is_there(
    site: Site, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = runpy.run_path(str(ROOT / "infra/automations.py"))

    def run(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["automations.py", *arguments])
        return int(script["main"]())

    for seconds in ("120", "75"):
        assert run("--silence", seconds) == 0
    (automation,) = site.client.read_automations()
    assert automation.trigger.within == timedelta(seconds=75)  # type: ignore[union-attr]
    assert run("--notify", "slack-webhook/nowhere") == 2
    said = capsys.readouterr().err
    assert said.startswith("--notify: the server has no block 'slack-webhook/nowhere'")


@pytest.mark.slow
@pytest.mark.skipif("LOGITMILL_LONG" not in os.environ, reason="three minutes: LOGITMILL_LONG=1")
def test_a_run_whose_host_is_gone_crashes_and_the_next_one_finishes_it(
    site: Site, demo_folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "runs"
    later = datetime.now(UTC) + timedelta(days=1)
    site.set_up(deployments(demo_folder, tmp_path, out, later))
    silence = ["--silence", "65"]
    command = [sys.executable, str(ROOT / "infra/automations.py"), *silence]
    subprocess.run(command, env={**os.environ, **site.environment}, check=True, timeout=60)
    source = Path(os.__file__).parent / "asyncio"
    parameters = {"corpus": {"uri": f"{source}/*.py", "shard_bytes": 20_000}}
    parameters["corpus"]["limit"] = 30
    on_demand = site.client.read_deployment_by_name("score-corpus/on-demand")

    def order() -> Callable[[], FlowRun]:
        made = site.client.create_flow_run_from_deployment(on_demand.id, parameters=parameters)
        return lambda: site.client.read_flow_run(made.id)

    read = order()
    with started(site.start_worker()) as worker:
        site.wait(read, "Running", 60)
        while not list(out.glob("*/shards/*.json")):
            time.sleep(0.1)
        worker.vanish()
    assert not list(out.glob("*/manifest.json"))
    gone = time.monotonic()
    crashed = site.wait(read, "Crashed", 240)
    assert crashed.state is not None and "no sign of life for 65 s" in str(crashed.state.message)
    print(f"crashed {time.monotonic() - gone:.0f} s after its host was gone")
    with started(site.start_worker()):
        site.wait(order(), "Completed", 120)
    (manifest,) = out.glob("*/manifest.json")
    scored = open_run(str(manifest.parent))
    assert scored.manifest is not None and scored.manifest["documents"] == 30
