"""What Prometheus gets to see of a run: counters and gauges that Prefect's client serves.

With `PREFECT_CLIENT_METRICS_ENABLED=true` Prefect serves the process's registry, this one's metrics
included, on `PREFECT_CLIENT_METRICS_PORT` for as long as the flow's process lives. Everything is
counted there, where the receipts of all workers come together: workers serve nothing. The key of
the run stands on one series alone, `logitmill_run_info`: what else there is has as many series
after a year of nights as after the first.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from prometheus_client import Counter, Gauge, Histogram, Info

if TYPE_CHECKING:
    from .progress import Seen
    from .store import Receipt

_SHARD_SECONDS = (1, 5, 15, 30, 60, 120, 300, 600, 1200, 1800, 3600)
"""Upper edges of the histogram's buckets: a shard is minutes of work."""

_documents = Counter("logitmill_documents", "Documents of finished shards.")
_failed_documents = Counter(
    "logitmill_documents_failed", "Documents of finished shards whose status is not ok."
)
_tokens = Counter("logitmill_tokens", "Scored tokens of finished shards.")
_bytes = Counter("logitmill_bytes", "UTF-8 bytes of the scored tokens of finished shards.")
_shards = Counter("logitmill_shards", "Shards, by how they ended: done or failed.", ["outcome"])
_retries = Counter(
    "logitmill_shard_retries",
    "Attempts at shards after the first: the one before failed, or was lost with its worker.",
)
_device_seconds = Counter(
    "logitmill_device_seconds", "Seconds that devices were at work on finished shards."
)
_shard_seconds = Histogram(
    "logitmill_shard_duration_seconds",
    "Seconds that the engine was at work on a shard.",
    buckets=_SHARD_SECONDS,
)

_run = Info("logitmill_run", "The run that this process is at work on.")
_run_shards = Gauge("logitmill_run_shards", "Shards of the run.")
_run_shards_done = Gauge("logitmill_run_shards_done", "Shards of the run that are done.")
_run_progress = Gauge("logitmill_run_progress_ratio", "Scored part of the run's corpus, 0 to 1.")
_run_left = Gauge("logitmill_run_left_seconds", "Seconds until the run is done; NaN if unknown.")
_run_speed = Gauge("logitmill_run_tokens_per_second", "Tokens scored a second, by all workers.")
_run_workers = Gauge("logitmill_run_workers", "Processes at work on the run.")
_run_busy = Gauge(
    "logitmill_run_device_busy_ratio",
    "Share of the last half minute that the workers' devices were at work; NaN if unknown.",
)

for _outcome in ("done", "failed"):
    # A series that is there from the start has a rate when it first moves.
    _shards.labels(_outcome)


@contextmanager
def of_run(run_key: str, model: str) -> Iterator[None]:
    """Count what is recorded in this block as the run's.

    Call it inside of the flow. Tasks that are submitted in the block serve no metrics of their own:
    Prefect hands them its settings, the port among them, and on the host of the flow's process
    every task would fail because that port is taken.
    """
    from prefect.settings import PREFECT_CLIENT_METRICS_ENABLED, temporary_settings

    _run.info({"run_key": run_key, "model": model})
    try:
        with temporary_settings({PREFECT_CLIENT_METRICS_ENABLED: False}):
            yield
    finally:
        # A process may go on with another run, on other workers.
        for gauge in (_run_left, _run_busy):
            gauge.set(float("nan"))
        for gauge in (_run_speed, _run_workers):
            gauge.set(0)


def record_shard(receipt: Receipt) -> None:
    """Count a shard that this flow run saw done."""
    _shards.labels("done").inc()
    _documents.inc(receipt.documents)
    _failed_documents.inc(receipt.failed)
    _tokens.inc(receipt.tokens)
    _bytes.inc(receipt.bytes)
    _device_seconds.inc(receipt.device_seconds)
    _shard_seconds.observe(receipt.seconds)


def record_failure() -> None:
    """Count a shard that was given up."""
    _shards.labels("failed").inc()


def record_retries(count: int = 1) -> None:
    """Count attempts at a shard that is begun again."""
    _retries.inc(count)


def record_progress(seen: Seen) -> None:
    """How far the run is."""
    _run_shards.set(seen.num_shards)
    _run_shards_done.set(seen.shards)
    _run_progress.set(seen.fraction)
    _run_left.set(float("nan") if seen.seconds_left is None else seen.seconds_left)
    _run_speed.set(seen.tokens_per_second)
    _run_workers.set(seen.workers)
    _run_busy.set(float("nan") if seen.busy is None else seen.busy)
