"""`infra/prefect.yaml` for real: deployed, picked up by a worker, run to its manifest."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from logitmill.engine import PRESETS
from logitmill.flows import open_run, score_corpus
from prefect.client.orchestration import SyncPrefectClient, get_client

ROOT = Path(__file__).parents[2]


@pytest.fixture
def client(server_url: str) -> Iterator[SyncPrefectClient]:
    from logitmill.flows.server import use_server

    with use_server(), get_client(sync_client=True) as client:
        yield client


def test_parameters_are_typed_and_described() -> None:
    schema = score_corpus.parameters.model_dump()
    for name, field in schema["properties"].items():
        assert field["description"], name
    assert schema["properties"]["tiers"]["items"]["enum"] == ["scores", "tokens", "logits"]
    recipe = schema["properties"]["recipe"]["anyOf"][0]
    assert recipe["enum"] == list(PRESETS)
    for definition in ("CorpusSpec", "EngineSettings", "Recipe"):
        fields = schema["definitions"][definition]["properties"]
        undescribed = [n for n, field in fields.items() if not field.get("description")]
        assert undescribed == []
    given: dict[str, Any] = {"model": "m", "corpus": "c", "out": "o", "recipe": "rolling-64"}
    jsonschema.validate(given, schema)
    jsonschema.validate({**given, "engine": {"quantization": "fp8", "fp8_head": True}}, schema)
    for engine in ({"quantization": "fp7"}, {"dtype": "int3"}, {"fp7_head": True}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate({**given, "engine": engine}, schema)


def test_parameters_have_no_place_for_credentials() -> None:
    schema = score_corpus.with_options(name="other").parameters.model_dump()
    assert "storage_options" not in json.dumps(schema)
    given = {"uri": "s3://x", "storage_options": {"secret": "s"}}
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"model": "m", "corpus": given, "out": "o"}, schema)


@pytest.mark.slow
def test_the_deployments_run(
    client: SyncPrefectClient, server_url: str, demo_folder: Path, corpus: Path, tmp_path: Path
) -> None:
    environment = {**os.environ, "PREFECT_API_URL": server_url}

    def prefect(*arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "prefect", *arguments],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    prefect("work-pool", "create", "scoring", "--type", "process")
    prefect("--no-prompt", "deploy", "--all", "--prefect-file", "infra/prefect.yaml")
    nightly = client.read_deployment_by_name("score-corpus/nightly")
    (schedule,) = nightly.schedules
    assert (schedule.schedule.cron, schedule.schedule.timezone) == ("0 2 * * *", "UTC")
    jsonschema.validate(nightly.parameters, nightly.parameter_openapi_schema)
    on_demand = client.read_deployment_by_name("score-corpus/on-demand")
    assert not on_demand.schedules
    assert on_demand.entrypoint == "logitmill.flows.score.score_corpus"

    parameters = {
        "model": str(demo_folder),
        "corpus": {"uri": str(corpus), "shard_bytes": 3000},
        "out": str(tmp_path / "runs"),
        "tiers": ["scores", "tokens"],
        "limit": 5,
    }
    run = client.create_flow_run_from_deployment(on_demand.id, parameters=parameters)
    prefect("worker", "start", "--pool", "scoring", "--run-once")
    finished = client.read_flow_run(run.id)
    assert finished.state is not None and finished.state.is_completed(), finished.state
    scored = open_run(str(tmp_path / "runs"))
    assert scored.manifest is not None and scored.manifest["documents"] == 5
    assert scored.tiers == ["scores", "tokens"]
