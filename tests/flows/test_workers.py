"""Shards in other processes: the same bytes, whoever dies, hangs or is sent away meanwhile."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from cluster import Cluster, wait_for
from flow_helpers import Score, digests
from logitmill.flows import Run, open_run
from logitmill.flows.corpus import CorpusSpec
from logitmill.flows.corpus.plan import Shard
from logitmill.flows.runners import Lost, run_all

TIMES = 50 if os.environ.get("LOGITMILL_LONG") else 2
"""Kills of each kind."""


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


# ---- real ones


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Two workers."""
    made = Cluster(tmp_path_factory.mktemp("cluster"))
    try:
        for _ in range(2):
            made.start_worker()
        yield made
    finally:
        made.close()


@pytest.fixture(scope="module")
def modules(tmp_path_factory: pytest.TempPathFactory) -> CorpusSpec:
    """Twelve shards of half a second's work each, or more."""
    folder = tmp_path_factory.mktemp("modules")
    text = Path(random.__file__).read_text() * 6
    for i in range(12):
        (folder / f"{i:02}.py").write_text(text[i * 9000 : (i + 1) * 9000])
    return CorpusSpec(uri=str(folder), shard_bytes=9_000)


@pytest.fixture(scope="module")
def whole(
    modules: CorpusSpec, demo_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, str]:
    """Bytes of a run in one process that nobody disturbed."""
    from logitmill.flows import score_corpus

    out = tmp_path_factory.mktemp("whole")
    return digests(open_run(score_corpus(str(demo_folder), modules, str(out), tiers=["tokens"])))


class Fault:
    """Counts what faults did to runs, for whoever reads the test's output."""

    def __init__(self, name: str, expected: dict[str, str]) -> None:
        self.name = name
        self.times = 0
        self._expected = expected

    def check(self, run: Run) -> None:
        ids = run.table(columns=["doc_id"])["doc_id"].to_pylist()
        found = digests(run)
        differing = sum(found.get(name) != value for name, value in self._expected.items())
        left = [path for path in Path(run.uri).rglob("*") if ".tmp-" in path.name]
        print(
            f"{self.name}: {self.times} times; rows lost {12 - len(set(ids))}, "
            f"duplicates {len(ids) - len(set(ids))}, parts differing {differing}, "
            f"temporary files {len(left)}"
        )
        assert len(ids) == len(set(ids)) == 12
        assert found == self._expected
        assert not left


@pytest.mark.slow
def test_processes_of_this_machine_give_the_same_bytes(
    score: Score, modules: CorpusSpec, whole: dict[str, str]
) -> None:
    run = score(modules, tiers=["tokens"], workers="2")
    assert digests(run) == whole


@pytest.mark.slow
def test_workers_that_are_killed_cost_the_shards_in_their_hands(
    cluster: Cluster, score: Score, modules: CorpusSpec, whole: dict[str, str], tmp_path: Path
) -> None:
    fault, rng = Fault("worker killed", whole), random.Random(4)
    while fault.times < TIMES:
        done = threading.Event()

        def kill(done: threading.Event = done) -> None:
            while not done.wait(rng.uniform(1.0, 6.0)) and fault.times < TIMES:
                if any(tmp_path.glob("runs/*/plan.json")) and cluster.is_at_work():
                    os.kill(rng.choice(sorted(cluster.workers().values())), signal.SIGKILL)
                    fault.times += 1

        killer = threading.Thread(target=kill)
        killer.start()
        try:
            run = score(modules, tiers=["tokens"], workers=cluster.address)
        finally:
            done.set()
            killer.join()
        fault.check(run)
        shutil.rmtree(tmp_path / "runs")
        wait_for(lambda: len(cluster.workers()) == 2)


@pytest.mark.slow
def test_a_worker_that_hangs_is_started_anew(
    cluster: Cluster,
    score: Score,
    modules: CorpusSpec,
    whole: dict[str, str],
    tmp_path: Path,
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
    fault = Fault("worker hung", whole)
    fault.times = 1
    fault.check(run)
    assert not Path(f"/proc/{victim}").exists()
    wait_for(lambda: len(cluster.workers()) == 2)
    assert address in caplog.text


FLOW = """
import sys
from logitmill.flows import score_corpus
from logitmill.flows.corpus import CorpusSpec
model, corpus, out, workers, shard_bytes = sys.argv[1:]
spec = CorpusSpec(uri=corpus, shard_bytes=int(shard_bytes))
# Batches of a second or so, as those of a GPU are.
engine = {"max_batch_tokens": 1024}
score_corpus(model, spec, out, tiers=["tokens"], workers=workers, engine=engine)
"""


def start_flow(model: Path, spec: CorpusSpec, out: Path, address: str, url: str) -> Any:
    """A process that scores."""
    arguments = [str(model), spec.uri, str(out), address, str(spec.shard_bytes)]
    return subprocess.Popen(
        [sys.executable, "-c", FLOW, *arguments],
        env={**os.environ, "PREFECT_API_URL": url},
        stderr=subprocess.DEVNULL,
    )


@pytest.mark.slow
def test_a_flow_that_is_cancelled_has_its_workers_stop(
    cluster: Cluster, demo_folder: Path, server_url: str, tmp_path: Path
) -> None:
    """SIGTERM is what a cancellation comes down to; the shard would take minutes."""
    library = str(Path(random.__file__).parent / "*.py")
    spec = CorpusSpec(uri=library, shard_bytes=1 << 30)
    flow = start_flow(demo_folder, spec, tmp_path / "runs", cluster.address, server_url)
    wait_for(lambda: not cluster.are_engines_free())
    flow.send_signal(signal.SIGTERM)
    sent_at = time.monotonic()
    wait_for(cluster.are_engines_free, 20)
    print(f"flow cancelled: engines free after {time.monotonic() - sent_at:.1f} s")
    flow.wait(60)
    assert not list(tmp_path.glob("runs/*/shards/*"))


@pytest.mark.slow
def test_a_flow_that_is_killed_loses_nothing(
    cluster: Cluster,
    score: Score,
    modules: CorpusSpec,
    whole: dict[str, str],
    demo_folder: Path,
    server_url: str,
    tmp_path: Path,
) -> None:
    """What its workers have in hand they may finish, beside the next run's."""
    fault = Fault("flow killed", whole)
    for _ in range(TIMES):
        flow = start_flow(demo_folder, modules, tmp_path / "runs", cluster.address, server_url)
        wait_for(lambda: any(tmp_path.glob("runs/*/shards/*.json")))
        flow.kill()
        flow.wait()
        fault.times += 1
        # What is written late would be taken for what a flow has left.
        wait_for(cluster.are_engines_free)
        assert not list(tmp_path.glob("runs/*/manifest.json"))
        fault.check(score(modules, tiers=["tokens"], workers=cluster.address))
        shutil.rmtree(tmp_path / "runs")


@pytest.mark.slow
def test_a_shard_that_kills_its_workers_is_named_and_the_others_are_kept(
    score: Score, modules: CorpusSpec, whole: dict[str, str], tmp_path: Path
) -> None:
    cluster = Cluster(tmp_path)
    try:
        cluster.start_worker(POISONED_SHARD="2")
        with pytest.raises(RuntimeError, match=r"1 of 12 shards failed.*shard 2: its worker was"):
            score(modules, tiers=["tokens"], workers=cluster.address)
        receipts = {path.stem for path in tmp_path.glob("runs/*/shards/*.json")}
        assert receipts == {f"{i:05d}" for i in range(12) if i != 2}
    finally:
        cluster.close()
    assert digests(score(modules, tiers=["tokens"])) == whole


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
