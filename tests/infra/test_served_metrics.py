"""`logitmill.flows.metrics` as Prometheus sees it: scraped from a process that runs a flow."""

from __future__ import annotations

import math
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from logitmill.flows import metrics
from logitmill.flows.progress import Seen
from logitmill.flows.store import Receipt
from prometheus_client import REGISTRY
from prometheus_client.openmetrics.parser import text_string_to_metric_families

# The flow's own tasks run in processes of the same host, which know the same settings.
FLOW = """
import os, sys, urllib.request
from logitmill.flows import metrics
from logitmill.flows.progress import Seen
from logitmill.flows.store import Receipt
from prefect import flow, task
from prefect.task_runners import ProcessPoolTaskRunner

RECEIPT = Receipt(shard=0, parts=(), documents=5, failed=2, tokens=700, bytes=2100,
                  loglikelihood=-1.0, seconds=42.0, device_seconds=40.0, device="cpu",
                  versions={})

@task
def score(shard):
    return os.getpid()

@flow(name="scraped", task_runner=ProcessPoolTaskRunner(max_workers=1))
def scraped():
    with metrics.of_run("0123abc", "some/model"):
        assert score.submit(0).result() != os.getpid()
        metrics.record_shard(RECEIPT)
        metrics.record_shard(RECEIPT)
        metrics.record_failure()
        metrics.record_retries()
        metrics.record_progress(Seen(fraction=0.75, shards=3, num_shards=4, documents=9, workers=2,
                                     tokens_per_second=130000.0, busy=0.97,
                                     seconds_left=90.0))
        print(scrape())
    print("=====")
    print(scrape())

def scrape():
    request = urllib.request.Request(f"http://127.0.0.1:{sys.argv[1]}/metrics",
                                     headers={"Accept": "application/openmetrics-text"})
    with urllib.request.urlopen(request) as answer:
        return answer.read().decode()

if __name__ == "__main__":
    scraped()
"""


def values(text: str) -> dict[str, float]:
    """Sample -> value of logitmill's metrics in an OpenMetrics text."""
    return {
        sample.name
        + "".join(f"{{{k}={v}}}" for k, v in sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name.startswith("logitmill_") and not sample.name.endswith("_created")
    }


@pytest.mark.slow
def test_a_flow_that_runs_is_scraped(server_url: str, tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    (tmp_path / "scraped.py").write_text(FLOW)
    done = subprocess.run(
        [sys.executable, "scraped.py", str(port)],
        cwd=tmp_path,
        env={
            **os.environ,
            "PREFECT_API_URL": server_url,
            "PREFECT_CLIENT_METRICS_ENABLED": "true",
            "PREFECT_CLIENT_METRICS_PORT": str(port),
        },
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    during, after = (values(text.strip() + "\n") for text in done.stdout.split("=====\n"))
    buckets = {name: during.pop(name) for name in list(during) if "_bucket" in name}
    assert buckets["logitmill_shard_duration_seconds_bucket{le=30.0}"] == 0
    assert buckets["logitmill_shard_duration_seconds_bucket{le=60.0}"] == 2
    expected = {
        "logitmill_documents_total": 10,
        "logitmill_documents_failed_total": 4,
        "logitmill_tokens_total": 1400,
        "logitmill_bytes_total": 4200,
        "logitmill_device_seconds_total": 80,
        "logitmill_shards_total{outcome=done}": 2,
        "logitmill_shards_total{outcome=failed}": 1,
        "logitmill_shard_retries_total": 1,
        "logitmill_shard_duration_seconds_count": 2,
        "logitmill_shard_duration_seconds_sum": 84,
        "logitmill_run_info{model=some/model}{run_key=0123abc}": 1,
        "logitmill_run_shards": 4,
        "logitmill_run_shards_done": 3,
        "logitmill_run_progress_ratio": 0.75,
        "logitmill_run_left_seconds": 90,
        "logitmill_run_tokens_per_second": 130000,
        "logitmill_run_workers": 2,
        "logitmill_run_device_busy_ratio": 0.97,
    }
    assert during == expected
    assert (after["logitmill_tokens_total"], after["logitmill_run_workers"]) == (1400, 0)


def test_series_do_not_grow_with_runs() -> None:
    def count() -> int:
        families = [f for f in REGISTRY.collect() if f.name.startswith("logitmill_")]
        return sum(len(family.samples) for family in families)

    receipt = Receipt(
        shard=0, parts=(), documents=1, failed=0, tokens=1, bytes=1, loglikelihood=0.0,
        seconds=1.0, device="cpu", versions={},
    )  # fmt: skip
    with metrics.of_run("before", "model-before"):
        pass
    counts = set()
    for key in ("a", "b", "c"):
        with metrics.of_run(key, f"model-{key}"):
            metrics.record_shard(receipt)
            counts.add(count())
    assert len(counts) == 1


def test_what_is_not_known_is_no_number() -> None:
    seen = Seen(fraction=0.0, shards=0, num_shards=4, documents=0, workers=1,
                tokens_per_second=0.0, busy=None, seconds_left=None)  # fmt: skip
    metrics.record_progress(seen)
    for name in ("logitmill_run_left_seconds", "logitmill_run_device_busy_ratio"):
        value = REGISTRY.get_sample_value(name)
        assert value is not None and math.isnan(value)


def test_workers_do_not_take_the_port_of_the_flow() -> None:
    from prefect.settings import PREFECT_CLIENT_METRICS_ENABLED as ENABLED
    from prefect.settings import temporary_settings

    with temporary_settings({ENABLED: True}):
        with metrics.of_run("k", "m"):
            assert ENABLED.value() is False
        assert ENABLED.value() is True
