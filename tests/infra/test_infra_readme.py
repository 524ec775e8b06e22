"""infra/README.md says what is so: files, metrics and settings by their names."""

from __future__ import annotations

import re

import pytest
import yaml
from logitmill.flows import metrics
from prefect.settings import Settings
from prefect.settings.legacy import _get_valid_setting_names
from prometheus_client import REGISTRY
from services import ROOT

README = (ROOT / "infra/README.md").read_text()
PAGES = ["README.md", "prefect.yaml", "compose.yaml", "kubernetes/worker.yaml", "automations.py"]


def anchor(heading: str) -> str:
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def test_links_lead_somewhere() -> None:
    anchors = {anchor(h) for h in re.findall(r"^#+ (.+)$", README, re.MULTILINE)}
    for target in re.findall(r"\]\(([^)]+)\)", README):
        if target.startswith("#"):
            assert target[1:] in anchors, target
        else:
            assert (ROOT / "infra" / target).exists(), target


def test_metrics_are_those_that_are_served() -> None:
    metrics._run.info({"run_key": "k", "model": "m"})
    served = {
        family.name + {"counter": "_total", "info": "_info"}.get(family.type, "")
        for family in REGISTRY.collect()
        if family.name.startswith("logitmill_")
    }
    named = set(re.findall(r"\blogitmill_[a-z_]+\b", README.split("## Metrics")[1]))
    assert named == served


@pytest.mark.parametrize("page", PAGES)
def test_settings_are_ones_that_prefect_has(page: str) -> None:
    text = (ROOT / "infra" / page).read_text()
    named = set(re.findall(r"\bPREFECT_[A-Z_]+[A-Z]\b", text))
    assert named - set(_get_valid_setting_names(Settings)) == set()


def test_numbers_that_files_share_are_the_same() -> None:
    deployments = yaml.safe_load((ROOT / "infra/prefect.yaml").read_text())["deployments"]
    environment = deployments[0]["work_pool"]["job_variables"]["env"]
    script = (ROOT / "infra/automations.py").read_text()
    (silence,) = re.findall(r"^SILENCE_SECONDS = (\d+)$", script, re.MULTILINE)
    assert int(silence) == 6 * int(environment["PREFECT_FLOWS_HEARTBEAT_FREQUENCY"])
    assert f"no sign of life for {silence} s" in README
    assert f"on port {environment['PREFECT_CLIENT_METRICS_PORT']}" in re.sub(r"\s+", " ", README)
    compose = yaml.safe_load((ROOT / "infra/compose.yaml").read_text())["services"]
    assert compose["worker"]["ports"] == ["127.0.0.1:4201:4201"]
