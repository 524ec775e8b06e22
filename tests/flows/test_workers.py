"""Shards in other processes: the same bytes, whoever dies, hangs or is sent away meanwhile."""

from __future__ import annotations

import logging
import os
import random
import shutil
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import CancelledError
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from cluster import Cluster, wait_for
from faults import Fault, Whole, finish, striking
from flow_helpers import Score, digests, start_flow
from logitmill.flows import runners
from logitmill.flows.corpus import CorpusSpec
from logitmill.flows.corpus.plan import Shard
from logitmill.flows.runners import Lost, run_all
from prometheus_client import REGISTRY

TIMES = 50 if os.environ.get("LOGITMILL_LONG") else 2
"""Kills of each kind."""
CountFault = Callable[[str, Whole], Fault]


# ---- what is in flight, and what is done again


class Future:
    """Has ended when its turn comes; whoever asks for that first has it end."""

    def __init__(self, pool: Pool, shard: Shard) -> None:
        self.pool = pool
        self.shard = shard
        self.is_lost = False

    def add_done_callback(self, callback: Callable[[Any], None]) -> None:
        self.pool.wait_for(self, callback)


class Pool:
    """Tasks that end in the order of their start, each once the window is full or all are started;
    a `deadly` shard takes the one beside it with it."""

    def __init__(self, workers: int = 2, deadly: tuple[int, ...] = ()) -> None:
        self.workers = workers
        self.deadly = deadly
        self.flying: list[tuple[Future, Callable[[Any], None]]] = []
        self.starts: list[int] = []
        self.most = 0

    def count(self) -> int:
        return self.workers

    def submit(self, shard: Shard) -> Any:
        self.starts.append(shard.index)
        return Future(self, shard)

    def wait_for(self, future: Future, callback: Callable[[Any], None]) -> None:
        self.flying.append((future, callback))
        self.most = max(self.most, len(self.flying))
        threading.Timer(0.02, self._end_first).start()

    def _end_first(self) -> None:
        is_deadly = bool(self.flying) and self.flying[0][0].shard.index in self.deadly
        for _ in range(min(len(self.flying), 1 + is_deadly)):
            future, callback = self.flying.pop(0)
            future.is_lost = is_deadly
            callback(future)

    def result(self, shard: Shard, future: Any) -> Any:
        return Lost("killed") if future.is_lost else shard.index

    def check(self) -> None:
        pass

    def stop(self) -> None:
        pass


SHARDS = [Shard(i, ()) for i in range(40)]


def test_a_window_of_shards_is_in_flight() -> None:
    pool = Pool(workers=3)
    assert sorted(result for _, result in run_all(pool, SHARDS)) == list(range(40))
    assert pool.most == 7
    assert pool.starts == list(range(40))
    assert list(run_all(pool, [])) == []


def test_a_deadly_shard_is_given_up_and_takes_no_other_with_it() -> None:
    pool = Pool(deadly=(3, 17))
    results = {shard.index: result for shard, result in run_all(pool, SHARDS)}
    given_up = {i for i, result in results.items() if isinstance(result, Lost)}
    assert given_up == {3, 17}
    assert "lost 3 times" in str(results[3])
    assert pool.starts.count(3) == pool.starts.count(17) == 3
    assert set(results) == set(range(40))
    # Those that flew beside a deadly one when it was first met are done again, once or twice.
    assert max(pool.starts.count(i) for i in given_up ^ set(range(40))) < 3


class LostFuture:
    """A task whose worker has died."""

    wrapped_future = SimpleNamespace(key="task")

    def result(self, raise_on_failure: bool) -> Any:
        raise CancelledError

    task_run_id = None


def test_an_attempt_that_failed_and_one_that_was_lost_are_both_counted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    submitted: list[int] = []

    def submit(task: Any, parameters: dict[str, Any]) -> Any:
        submitted.append(parameters["num_begun"])
        return LostFuture()

    client = SimpleNamespace(subscribe_topic=lambda topic, hear: None)
    runner = SimpleNamespace(client=client, submit=submit)
    monkeypatch.setattr(runners, "_mark_lost", lambda future: None)
    job: Any = SimpleNamespace(attempt="a")
    pool = runners._Cluster(job, runner, 900.0, logging.getLogger())
    retries = partial(REGISTRY.get_sample_value, "logitmill_shard_retries_total")
    before = retries() or 0.0

    def say(attempt: int) -> None:
        count = {"documents": 0, "bytes": 0, "tokens": 0, "device_seconds": 0.0}
        said = {"shard": 5, "attempt": attempt, "worker": "w", "count": count, "is_loading": False}
        pool._hear((0.0, said))

    lost = pool.submit(SHARDS[5])
    for attempt in (1, 1, 2):
        say(attempt)
    assert isinstance(pool.result(SHARDS[5], lost), Lost)
    # The worker's last word may come late.
    say(2)
    pool.submit(SHARDS[5])
    say(3)
    assert submitted == [0, 2] and retries() == before + 2
    # Where no word came, the task that was lost is one all the same.
    pool.submit(SHARDS[6])
    pool.submit(SHARDS[6])
    assert submitted == [0, 2, 0, 1] and retries() == before + 3


# ---- real ones


@pytest.mark.slow
def test_processes_of_this_machine_give_the_same_bytes(
    score: Score, modules: CorpusSpec, whole: Whole
) -> None:
    run = score(modules, tiers=["tokens"], workers="2")
    assert digests(run) == whole.digests


@pytest.mark.slow
def test_workers_that_are_killed_cost_the_shards_in_their_hands(
    cluster: Cluster,
    score: Score,
    modules: CorpusSpec,
    whole: Whole,
    count_fault: CountFault,
    tmp_path: Path,
) -> None:
    fault, rng = count_fault("worker killed", whole), random.Random(4)

    def strike() -> None:
        wait_for(lambda: bool(cluster.workers()))
        os.kill(rng.choice(sorted(cluster.workers().values())), signal.SIGKILL)

    def is_time() -> bool:
        return any(tmp_path.glob("runs/*/plan.json")) and cluster.is_at_work()

    while fault.times < TIMES:
        # Some a run: with two workers that live for seconds, nothing would ever be done.
        times = min(TIMES, fault.times + rng.randint(1, 5))
        with striking(fault, strike, is_time, times, 7):
            # A shard whose workers are killed three times is left to the next run.
            run = finish(lambda: score(modules, tiers=["tokens"], workers=cluster.address))
        fault.check(run)
        shutil.rmtree(tmp_path / "runs")
        wait_for(lambda: len(cluster.workers()) == 2)


@pytest.mark.slow
def test_a_worker_that_hangs_is_started_anew(
    cluster: Cluster,
    score: Score,
    modules: CorpusSpec,
    whole: Whole,
    tmp_path: Path,
    count_fault: CountFault,
    caplog: Any,
) -> None:
    before = cluster.workers()
    address, victim = sorted(before.items())[0]
    hung = threading.Event()

    def hang() -> None:
        wait_for(lambda: any(tmp_path.glob("runs/*/plan.json")) and cluster.is_at_work())
        os.kill(victim, signal.SIGSTOP)
        hung.set()

    thread = threading.Thread(target=hang)
    thread.start()
    run = score(modules, tiers=["tokens"], workers=cluster.address, deadline=12)
    thread.join()
    assert hung.is_set()
    fault = count_fault("worker hung", whole)
    fault.strike()
    fault.check(run)
    # What it had was lost with it, and tried again.
    assert 2 in run.operations()["attempt"].to_pylist()
    assert not Path(f"/proc/{victim}").exists()
    wait_for(lambda: len(cluster.workers()) == 2)
    assert address in caplog.text


@pytest.mark.slow
def test_a_flow_that_is_cancelled_has_its_workers_stop(
    cluster: Cluster, demo_folder: Path, server_url: str, tmp_path: Path
) -> None:
    """SIGTERM is what a cancellation comes down to; the shard would take minutes."""
    library = str(Path(random.__file__).parent / "*.py")
    spec = CorpusSpec(uri=library, shard_bytes=1 << 30)
    flow = start_flow(demo_folder, spec, tmp_path / "runs", cluster.address, server_url)
    wait_for(cluster.is_scoring)
    flow.send_signal(signal.SIGTERM)
    sent_at = time.monotonic()
    wait_for(cluster.is_idle, 20)
    print(f"flow cancelled: workers free after {time.monotonic() - sent_at:.1f} s")
    flow.wait(60)
    assert not list(tmp_path.glob("runs/*/shards/*"))


@pytest.mark.slow
def test_a_flow_that_is_killed_loses_nothing(
    cluster: Cluster,
    score: Score,
    modules: CorpusSpec,
    whole: Whole,
    demo_folder: Path,
    server_url: str,
    count_fault: CountFault,
    tmp_path: Path,
) -> None:
    """What its workers have in hand they may finish, beside the next run's."""
    fault = count_fault("flow killed", whole)
    for _ in range(TIMES):
        flow = start_flow(demo_folder, modules, tmp_path / "runs", cluster.address, server_url)
        wait_for(lambda: any(tmp_path.glob("runs/*/shards/*.json")))
        flow.kill()
        flow.wait()
        fault.strike()
        # What is written late would be taken for what a flow has left.
        wait_for(cluster.is_idle)
        assert not list(tmp_path.glob("runs/*/manifest.json"))
        fault.check(score(modules, tiers=["tokens"], workers=cluster.address))
        shutil.rmtree(tmp_path / "runs")


@pytest.mark.slow
def test_workers_of_another_kind_are_refused(
    cluster: Cluster, score: Score, modules: CorpusSpec, tmp_path: Path
) -> None:
    other = Cluster(tmp_path)
    try:
        other.start_worker()
        other.start_worker(OTHER_VERSION="9.9")
        with pytest.raises(ValueError, match=r"workers: tcp.* torch 9\.9.* of one kind"):
            score(modules, workers=other.address)
    finally:
        other.close()
    assert not list(tmp_path.glob("runs/*"))


@pytest.mark.parametrize(
    ("workers", "said"),
    [
        ("gpus", "workers: 'gpus' is a process for each GPU"),
        ("many", "workers: 'many' is neither 'gpus', nor a number"),
        ("0", "workers: '0' is neither"),
        ("tcp://127.0.0.1:1", "workers: no Dask scheduler answers at 'tcp://127.0.0.1:1'"),
    ],
)
def test_workers_that_cannot_be_are_refused(
    score: Score, modules: CorpusSpec, workers: str, said: str
) -> None:
    if workers == "gpus" and __import__("torch").cuda.is_available():
        pytest.skip("needs a machine without GPUs")
    with pytest.raises(ValueError, match=said):
        score(modules, workers=workers)
