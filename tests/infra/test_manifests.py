"""Dockerfile, compose.yaml and kubernetes/ against the schemas of those who read them.

Nothing is built or started from them here: `test_scheduled.py` runs compose's commands.
"""

from __future__ import annotations

import copy
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from prefect.utilities.templating import apply_values
from services import ROOT, Process, free_port, started

COMPOSE = (ROOT / "infra/compose.yaml").read_text()
KUBERNETES = ROOT / "infra/kubernetes"
DOCKERFILE = (ROOT / "infra/Dockerfile").read_text()
SECRET = re.compile(r"(password|secret|token|_key)[\"']?\s*[:=]\s*[\"']?[^\s\"'{$]", re.IGNORECASE)


def manifests() -> list[dict[str, Any]]:
    """Every object of infra/kubernetes that is applied."""
    listed = yaml.safe_load((KUBERNETES / "kustomization.yaml").read_text())["resources"]
    return [part for name in listed for part in yaml.safe_load_all((KUBERNETES / name).read_text())]


def pod_specs() -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, pod spec) of all that runs in the cluster, the flow's own pod included."""
    for manifest in [*manifests(), job()]:
        if "template" in manifest.get("spec", {}):
            name = manifest["metadata"].get("name", "run")
            yield name, manifest["spec"]["template"]["spec"]


def job(**given: Any) -> dict[str, Any]:
    """The Job that Prefect's worker makes of work-pool.json for a deployment of infra/prefect.yaml.

    As `prefect_kubernetes` does: defaults of the pool, what the deployment changes, and then the
    environment as a list.
    """
    template = json.loads((KUBERNETES / "work-pool.json").read_text())
    variables = template["variables"]["properties"]
    values = {n: field["default"] for n, field in variables.items() if "default" in field}
    deployments = yaml.safe_load((ROOT / "infra/prefect.yaml").read_text())["deployments"]
    values |= deployments[0]["work_pool"]["job_variables"]
    values |= {"name": "nightly", "command": ["prefect", "flow-run", "execute"], **given}
    jsonschema.validate(values | {"command": "x"}, template["variables"])
    made = apply_values(template["job_configuration"], values)["job_manifest"]
    (container,) = made["spec"]["template"]["spec"]["containers"]
    container["env"] = [{"name": n, "value": v} for n, v in container["env"].items()]
    return made  # type: ignore[no-any-return]


# -- Dockerfile --------------------------------------------------------------------------------


def hadolint(text: str) -> str:
    """What hadolint has against a Dockerfile, from warnings on."""
    program = Path(sys.executable).with_name("hadolint")
    command = [program if program.exists() else "hadolint", "--failure-threshold", "warning", "-"]
    done = subprocess.run(
        command, input=text, capture_output=True, text=True, timeout=60, check=False
    )
    return done.stdout + done.stderr if done.returncode else ""


def test_the_image_is_built_by_the_rules() -> None:
    assert hadolint(DOCKERFILE) == ""


@pytest.mark.parametrize(
    ("before", "after", "rule"),
    [
        ("USER 10001:10001\n", "USER root\n", "DL3002"),
        ("python:3.11.13-slim-bookworm", "python", "DL3006"),
        ("    PIP_NO_CACHE_DIR=1 \\\n", "", "DL3042"),
        ('CMD ["prefect", "worker"', 'CMD prefect "worker"', "DL3025"),
        ("pip install -c constraints.txt -r wanted.txt", "pip install prefect", "DL3013"),
        ("FROM cpu AS cuda", "FRMO cpu AS cuda", "unexpected"),
    ],
)
def test_an_image_against_the_rules_is_found(before: str, after: str, rule: str) -> None:
    assert before in DOCKERFILE
    assert rule in hadolint(DOCKERFILE.replace(before, after))


def test_the_image_holds_what_is_there_at_the_versions_that_are_pinned() -> None:
    copied = [
        line.split()[1:-1] for line in DOCKERFILE.splitlines() if re.match("COPY (?!--)", line)
    ]
    for source in [name for names in copied for name in names]:
        assert (ROOT / source).exists(), source
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert "dask" in project["optional-dependencies"]
    constraints = (ROOT / "infra/constraints.txt").read_text()
    assert len(re.findall("^torch==", constraints, re.MULTILINE)) == 1
    names = {canonicalize_name(Requirement(d).name) for d in project["dependencies"]}
    pinned = {canonicalize_name(line.split("==")[0]) for line in constraints.splitlines()}
    # Builds of torch for CUDA bring their own triton.
    assert names - pinned - {"triton"} == set()


def test_targets_run_as_nobody_and_name_no_package_index() -> None:
    stages = re.findall(r"^FROM (\S+) AS (\S+)", DOCKERFILE, re.MULTILINE)
    assert {"cpu", "cuda"} <= {name for _, name in stages}
    for stage in re.split(r"^FROM ", DOCKERFILE, flags=re.MULTILINE)[1:]:
        if re.match(r"\S+ AS (cpu|cuda)", stage):
            assert re.findall(r"^USER (\S+)", stage, re.MULTILINE)[-1] == "10001:10001"
    assert re.findall(r"https?://(?!127\.0\.0\.1)\S+", DOCKERFILE) == []
    assert not SECRET.search(DOCKERFILE)


# -- compose.yaml ------------------------------------------------------------------------------


def compose_schema() -> dict[str, Any]:
    vendored = resources.files("check_jsonschema") / "builtin_schemas/vendor/compose-spec.json"
    return json.loads(vendored.read_text())  # type: ignore[no-any-return]


def check_compose(compose: dict[str, Any]) -> None:
    jsonschema.validate(compose, compose_schema())
    services = compose["services"]
    for name, service in services.items():
        for other, condition in service.get("depends_on", {}).items():
            healthy = condition["condition"] == "service_healthy"
            test = services[other].get("healthcheck", {}).get("test")
            assert not healthy or test, f"{name} waits for {other} to be healthy"
            # What is always on cannot wait for what is on with a profile only.
            assert set(service.get("profiles", [])) <= set(services[other].get("profiles", [])) or (
                "profiles" not in services[other]
            ), f"{name} waits for {other}"
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            there = (ROOT / "infra" / source).exists() or source in compose["volumes"]
            assert there, f"{name} mounts {source}"
        for word in service.get("environment", {}):
            assert not re.search("PASSWORD|SECRET|ACCESS_KEY", word), f"{name} has {word} inline"
        image = service["image"]
        assert image.startswith("logitmill:") or re.search(r":\d", image), f"{image} is not pinned"


def test_compose_is_whole() -> None:
    check_compose(yaml.safe_load(COMPOSE))


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("    healthcheck:\n", "    healthchek:\n"),
        ("depends_on:\n      database: {condition: service_healthy}", "depends_on: {databas: {}}"),
        ("volumes: [database:/var", "volumes: [databse:/var"),
        ("      POSTGRES_USER: prefect", "      POSTGRES_PASSWORD: prefect"),
        ("postgres:17.6-alpine", "postgres:latest"),
        ("shm_size: 256mb", "shm_size: [256mb]"),
        ("capabilities: [gpu]", "capability: [gpu]"),
    ],
)
def test_a_compose_file_that_is_broken_is_found(before: str, after: str) -> None:
    assert before in COMPOSE
    with pytest.raises((jsonschema.ValidationError, AssertionError, KeyError)):
        check_compose(yaml.safe_load(COMPOSE.replace(before, after, 1)))


def test_each_gpu_has_one_process() -> None:
    services = yaml.safe_load(COMPOSE)["services"]
    gpus = [s for name, s in services.items() if name.startswith("gpu-")]
    devices = [s["deploy"]["resources"]["reservations"]["devices"][0]["device_ids"] for s in gpus]
    assert devices == [[str(i)] for i in range(len(gpus))]
    for service in gpus:
        assert {"--nworkers=1", "--nthreads=2"} <= set(service["command"])
    # The API and the storage are for this host: neither asks who is there.
    published = [port for s in services.values() for port in s.get("ports", [])]
    assert all(port.startswith("127.0.0.1:") for port in published)


# -- kubernetes/ -------------------------------------------------------------------------------


def check(manifest: dict[str, Any]) -> None:
    """By the schema of Kubernetes, where a field that it does not know is a mistake."""
    kubernetes_validate.validate(manifest, "1.37", strict=True)


@pytest.mark.parametrize(
    "manifest", manifests(), ids=lambda m: f"{m['kind']}-{m['metadata']['name']}"
)
def test_kubernetes_knows_every_field(manifest: dict[str, Any]) -> None:
    check(manifest)
    namespaced = manifest["kind"] != "Namespace"
    assert not namespaced or manifest["metadata"]["namespace"] == "logitmill"


def test_the_pool_makes_jobs_that_kubernetes_knows() -> None:
    made = job()
    check(made)
    (container,) = made["spec"]["template"]["spec"]["containers"]
    environment = {entry["name"]: entry["value"] for entry in container["env"]}
    port = int(environment["PREFECT_CLIENT_METRICS_PORT"])
    assert [p["containerPort"] for p in container["ports"]] == [port]
    annotations = made["spec"]["template"]["metadata"]["annotations"]
    assert annotations["prometheus.io/port"] == str(port)
    assert container["image"] == "logitmill:cuda"
    # By the name the worker finds the container whose log it reads.
    assert container["name"] == "prefect-job"


def _break(path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    *way, last = path.split("/")

    def change(manifest: dict[str, Any]) -> None:
        place: Any = manifest
        for name in way:
            place = place[int(name)] if name.isdigit() else place[name]
        place[last] = value

    return change


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("Deployment", _break("spec/replicas", "two")),
        ("Deployment", _break("spec/template/spec/completions", 1)),
        ("Deployment", _break("spec/template/spec/containers/0/livenesProbe", {})),
        (
            "Deployment",
            _break("spec/template/spec/containers/0/securityContext/runAsNonroot", True),
        ),
        ("PodDisruptionBudget", _break("spec/maxUnavailible", 1)),
        ("NetworkPolicy", _break("spec/policyTypes", "Ingress")),
        ("Role", _break("rules", [{"verbs": "get"}])),
        ("ConfigMap", _break("data/PORT", 1)),
    ],
)
def test_a_manifest_that_is_broken_is_found(
    kind: str, change: Callable[[dict[str, Any]], None]
) -> None:
    manifest = copy.deepcopy(next(m for m in manifests() if m["kind"] == kind))
    change(manifest)
    with pytest.raises(kubernetes_validate.ValidationError):
        check(manifest)


@pytest.mark.parametrize(("name", "spec"), list(pod_specs()), ids=[n for n, _ in pod_specs()])
def test_pods_are_confined(name: str, spec: dict[str, Any]) -> None:
    """What the namespace's pod security asks of every pod: Kubernetes would refuse it otherwise."""
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    for container in spec["containers"]:
        context = container["securityContext"]
        assert context["allowPrivilegeEscalation"] is False
        assert context["readOnlyRootFilesystem"] is True
        assert context["capabilities"] == {"drop": ["ALL"]}
        assert container["resources"]["requests"]["memory"]
        assert container["resources"]["limits"]["memory"]
        if spec.get("restartPolicy") != "Never":
            assert container["livenessProbe"] and container["startupProbe"]
        mounts = {mount["name"] for mount in container["volumeMounts"]}
        assert mounts == {volume["name"] for volume in spec["volumes"]}
        # By reference, and what is not one is no secret.
        for entry in container.get("env", []):
            assert not re.search("PASSWORD|SECRET|ACCESS_KEY|TOKEN", entry["name"])


def test_gpus_are_asked_for_one_a_process() -> None:
    by_name = {m["metadata"]["name"]: m for m in manifests() if m["kind"] == "Deployment"}
    (worker,) = by_name["dask-gpu"]["spec"]["template"]["spec"]["containers"]
    assert worker["resources"]["limits"]["nvidia.com/gpu"] == 1
    assert {"--nworkers=1", "--nthreads=2"} <= set(worker["args"])
    for name in ("prefect-worker", "dask-scheduler"):
        (container,) = by_name[name]["spec"]["template"]["spec"]["containers"]
        assert "nvidia.com/gpu" not in container["resources"]["limits"]


def test_names_that_belong_together_are_the_same() -> None:
    found = {(m["kind"], m["metadata"]["name"]): m for m in manifests()}
    service = found["Service", "dask-scheduler"]["spec"]
    for kind, name in (("Deployment", "dask-scheduler"), ("Deployment", "dask-gpu")):
        template = found[kind, name]["spec"]["template"]
        labels = template["metadata"]["labels"].items()
        assert found[kind, name]["spec"]["selector"]["matchLabels"].items() <= labels
    labels = found["Deployment", "dask-scheduler"]["spec"]["template"]["metadata"]["labels"].items()
    assert service["selector"].items() <= labels
    budget = found["PodDisruptionBudget", "dask-gpu"]["spec"]["selector"]["matchLabels"].items()
    assert (
        budget <= found["Deployment", "dask-gpu"]["spec"]["template"]["metadata"]["labels"].items()
    )
    address = f"tcp://dask-scheduler:{service['ports'][0]['port']}"
    assert (
        address
        in found["Deployment", "dask-gpu"]["spec"]["template"]["spec"]["containers"][0]["args"]
    )
    accounts = {name for kind, name in found if kind == "ServiceAccount"}
    assert {spec["serviceAccountName"] for _, spec in pod_specs()} <= accounts
    assert found["RoleBinding", "prefect-worker"]["roleRef"]["name"] == "prefect-worker"
    settings = {
        reference["configMapRef"]["name"]
        for _, spec in pod_specs()
        for container in spec["containers"]
        for reference in container.get("envFrom", [])
        if "configMapRef" in reference
    }
    assert settings == {name for kind, name in found if kind == "ConfigMap"}


@pytest.mark.slow
def test_dask_answers_where_its_probes_ask(tmp_path: Path) -> None:
    """Scheduler and worker as in kubernetes/dask.yaml, but for ports and addresses."""
    by_name = {m["metadata"]["name"]: m for m in manifests() if m["kind"] == "Deployment"}
    ports = {"8786": free_port(), "8787": free_port(), "8790": free_port()}

    def start(name: str) -> Process:
        (container,) = by_name[name]["spec"]["template"]["spec"]["containers"]
        words = [word.replace("dask-scheduler:", "127.0.0.1:") for word in container["args"]]
        for before, after in ports.items():
            words = [word.replace(f":{before}", f":{after}") for word in words]
            words = [word.replace(f"--port={before}", f"--port={after}") for word in words]
        words = [
            word.replace("--local-directory=/tmp", f"--local-directory={tmp_path}")
            for word in words
        ]
        environment = {
            e["name"]: e["value"] for e in container.get("env", []) if e["name"] != "HOME"
        }
        program = str(Path(sys.executable).with_name(words[0]))
        return Process([program, *words[1:]], environment, tmp_path)

    def probed(name: str) -> str:
        (container,) = by_name[name]["spec"]["template"]["spec"]["containers"]
        probe = container["livenessProbe"]["httpGet"]
        named = {port["name"]: port["containerPort"] for port in container["ports"]}
        return f"http://127.0.0.1:{ports[str(named[probe['port']])]}{probe['path']}"

    from distributed import Client

    def read_settings() -> list[Any]:
        import dask

        names = ("allowed-failures", "worker-saturation")
        return [dask.config.get(f"distributed.scheduler.{name}") for name in names]

    with started(start("dask-scheduler")) as scheduler, started(start("dask-gpu")) as worker:
        scheduler.wait_for(probed("dask-scheduler"))
        worker.wait_for(probed("dask-gpu"))
        with Client(f"tcp://127.0.0.1:{ports['8786']}", timeout="20s") as client:
            client.wait_for_workers(1, timeout=30)
            (told,) = client.scheduler_info()["workers"].values()
            assert (told["nthreads"], told["resources"]) == (2, {"GPU": 1.0})
            assert client.run_on_scheduler(read_settings) == [0, 1.0]
