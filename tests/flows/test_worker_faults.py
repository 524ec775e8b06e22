"""Workers, and what goes wrong around them: the same bytes whatever dies, fills up or is cut off.

LOGITMILL_LONG=1 kills servers by the fifties.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import boto3
import psutil
import pytest
import s3fs
from ceph import Ceph
from cluster import Cluster, wait_for
from debian import NoPackageError
from faults import Fault, Whole, attempt, finish, striking
from flow_helpers import Score, free_port, start_flow
from logitmill.flows import Run, shards
from logitmill.flows.corpus import CorpusSpec
from moto.server import ThreadedMotoServer
from prefect.settings import PREFECT_API_URL, temporary_settings
from s3 import S3Server

LONG = bool(os.environ.get("LOGITMILL_LONG"))
TIMES = 50 if LONG else 1
"""Kills of each server."""
CountFault = Callable[[str, Whole], Fault]

pytestmark = pytest.mark.slow


# ---- Prefect's server


class PrefectServer:
    """A server of its own, as an operations person would start it, with its own database."""

    def __init__(self, home: Path) -> None:
        self._home = home
        self._port = str(free_port())
        self.url = f"http://127.0.0.1:{self._port}/api"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it on what it held, and return once it answers."""
        command = ["server", "start", "--host", "127.0.0.1", "--port", self._port]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "prefect", *command],
            env={**os.environ, "PREFECT_HOME": str(self._home), "PREFECT_UI_ENABLED": "false"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

        def answers() -> bool:
            try:
                with urllib.request.urlopen(f"{self.url}/health", timeout=5):
                    return True
            except OSError:
                return False

        wait_for(answers, 180)

    def kill(self) -> None:
        """SIGKILL, for all of it."""
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None


@pytest.fixture
def prefect_server(tmp_path: Path) -> Iterator[PrefectServer]:
    server = PrefectServer(tmp_path / "home")
    server.start()
    yield server
    server.kill()


def test_a_prefect_server_that_is_killed_and_started_again(
    cluster: Cluster,
    score: Score,
    modules: CorpusSpec,
    whole: Whole,
    count_fault: CountFault,
    prefect_server: PrefectServer,
    tmp_path: Path,
) -> None:
    fault, rng = count_fault("Prefect's server killed, started again", whole), random.Random(5)

    def strike() -> None:
        prefect_server.kill()
        time.sleep(rng.uniform(0, 3))
        prefect_server.start()

    def is_time() -> bool:
        return any(tmp_path.glob("runs/*/plan.json")) and cluster.is_at_work()

    with temporary_settings({PREFECT_API_URL: prefect_server.url}):
        while fault.times < TIMES:
            with striking(fault, strike, is_time, TIMES, 4):
                run = finish(lambda: score(modules, tiers=["tokens"], workers=cluster.address))
            fault.check(run)
            shutil.rmtree(tmp_path / "runs")


@pytest.mark.skipif(not LONG, reason="five minutes, of which most is waiting: LOGITMILL_LONG=1")
def test_a_prefect_server_that_never_comes_back(
    cluster: Cluster,
    score: Score,
    modules: CorpusSpec,
    whole: Whole,
    count_fault: CountFault,
    prefect_server: PrefectServer,
    tmp_path: Path,
) -> None:
    fault = count_fault("Prefect's server killed, for good", whole)

    def kill() -> None:
        wait_for(lambda: any(tmp_path.glob("runs/*/shards/*.json")))
        prefect_server.kill()

    with ThreadPoolExecutor(1) as pool, temporary_settings({PREFECT_API_URL: prefect_server.url}):
        killer = pool.submit(kill)
        attempt(lambda: score(modules, tiers=["tokens"], workers=cluster.address))
        killer.result()
    fault.strike()
    fault.check(score(modules, tiers=["tokens"], workers=cluster.address))


# ---- object storage


@pytest.fixture
def keys(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The gateway's keys, which those of the workers are, and a client that knows no others."""
    s3fs.S3FileSystem.clear_instance_cache()
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", Ceph.key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", Ceph.secret)
    yield
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture
def lasting_s3(tmp_path: Path) -> Iterator[Ceph]:
    """A real server of our own, whose data outlive it, with the bucket `bucket`."""
    try:
        server = Ceph(tmp_path / "ceph", lasting=True)
        server.start()
    except (NoPackageError, RuntimeError, OSError) as error:
        (pytest.fail if LONG else pytest.skip)(f"no S3 server: {error}")
    S3Server(server.endpoint, server.key, server.secret).make_bucket("bucket")
    yield server
    server.stop()


@pytest.mark.usefixtures("keys")
def test_an_s3_server_that_is_killed_and_started_again(
    cluster: Cluster,
    score: Score,
    modules: CorpusSpec,
    whole: Whole,
    count_fault: CountFault,
    lasting_s3: Ceph,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fault, rng = count_fault("S3 server killed, started again", whole), random.Random(6)
    # An outage is worth waiting for; what the wait is otherwise, a run has time for.
    patient = shards.score_shard.with_options(retry_delay_seconds=3)
    monkeypatch.setattr(shards, "score_shard", patient)
    fs = s3fs.S3FileSystem(**lasting_s3.options, use_listings_cache=False)

    def strike() -> None:
        lasting_s3.kill()
        time.sleep(rng.uniform(0, 2))
        lasting_s3.start()

    while fault.times < TIMES:
        with striking(fault, strike, cluster.is_at_work, TIMES, 4):
            run = finish(
                lambda: score(
                    modules,
                    tiers=["tokens"],
                    workers=cluster.address,
                    out="s3://bucket/runs",
                    endpoint_url=lasting_s3.endpoint,
                )
            )
        fault.check(run, cluster.scratch)
        fs.rm("bucket/runs", recursive=True)


# ---- documents, and memory


def test_a_document_that_crashes_the_tokenizer(
    cluster: Cluster,
    score: Score,
    modules: CorpusSpec,
    whole: Whole,
    count_fault: CountFault,
    tmp_path: Path,
) -> None:
    """Of native code: the process is gone. The shard is named, the others are kept."""
    fault = count_fault("document that crashes the tokenizer", whole)
    with cluster.poisoned(text="# POISON"):
        with pytest.raises(RuntimeError, match=r"1 of 12 shards failed.*shard 2: its worker was"):
            score(modules, tiers=["tokens"], workers=cluster.address)
    fault.strike()
    assert receipts(tmp_path) == {i for i in range(12) if i != 2}
    fault.check(score(modules, tiers=["tokens"], workers=cluster.address))


def test_memory_that_runs_out_halves_batches(
    cluster: Cluster, score: Score, modules: CorpusSpec, whole: Whole, count_fault: CountFault
) -> None:
    fault = count_fault("device memory full: a batch", whole)
    with cluster.poisoned(memory=1_100):
        run = score(modules, tiers=["tokens"], workers=cluster.address)
    fault.strike(cluster.count_full())
    fault.check(run)


def test_memory_that_one_window_does_not_fit(
    cluster: Cluster,
    score: Score,
    modules: CorpusSpec,
    whole: Whole,
    count_fault: CountFault,
    tmp_path: Path,
) -> None:
    """Only the long file has windows of the whole context."""
    fault = count_fault("device memory full: a window", whole)
    said = r"1 of 12 shards failed, .* shard 5: device memory: a window of 10\d\d tokens"
    with cluster.poisoned(memory=900):
        with pytest.raises(RuntimeError, match=said):
            score(modules, tiers=["tokens"], workers=cluster.address)
    fault.strike()
    assert receipts(tmp_path) == {i for i in range(12) if i != 5}
    fault.check(score(modules, tiers=["tokens"], workers=cluster.address))


def receipts(folder: Path) -> set[int]:
    """Shards that are done."""
    return {int(path.stem) for path in folder.glob("runs/*/shards/*.json")}


# ---- flows


@pytest.mark.skipif(not LONG, reason="starts workers twice: LOGITMILL_LONG=1")
def test_workers_of_a_flow_that_is_killed_end_by_themselves(
    score: Score,
    modules: CorpusSpec,
    whole: Whole,
    count_fault: CountFault,
    demo_folder: Path,
    server_url: str,
    tmp_path: Path,
) -> None:
    fault = count_fault("flow killed that had its own workers", whole)
    flow = start_flow(demo_folder, modules, tmp_path / "runs", "2", server_url)
    wait_for(lambda: bool(receipts(tmp_path)))
    processes = psutil.Process(flow.pid).children(recursive=True)
    # Two, and who looks after them.
    assert len([p for p in processes if "dask" in p.cmdline()]) >= 2
    flow.kill()
    flow.wait()
    fault.strike()
    killed_at = time.monotonic()
    _, left = psutil.wait_procs(processes, 60)
    print(f"flow killed: its workers ended after {time.monotonic() - killed_at:.1f} s")
    assert not left
    assert not list(tmp_path.glob("runs/*/manifest.json"))
    fault.check(score(modules, tiers=["tokens"], workers="2"))


def test_the_same_run_started_twice(
    cluster: Cluster,
    score: Score,
    modules: CorpusSpec,
    whole: Whole,
    count_fault: CountFault,
    demo_folder: Path,
    server_url: str,
    tmp_path: Path,
) -> None:
    fault = count_fault("the same run started twice", whole)
    with cluster.poisoned(hold=True):
        first = start_flow(demo_folder, modules, tmp_path / "runs", cluster.address, server_url)
        wait_for(cluster.is_at_work)

        def start_second() -> Run:
            return score(modules, tiers=["tokens"], workers=cluster.address)

        pool = ThreadPoolExecutor(1)
        before = sum(cluster.tasks().values())
        second = pool.submit(start_second)
        wait_for(lambda: sum(cluster.tasks().values()) > before)
    run = second.result()
    pool.shutdown()
    assert first.wait(120) == 0
    fault.strike()
    fault.check(run)


def test_a_worker_that_joins_takes_shards(
    cluster: Cluster, score: Score, modules: CorpusSpec, whole: Whole, count_fault: CountFault
) -> None:
    fault = count_fault("worker joins", whole)

    def scored() -> int:
        from logitmill.flows.progress import TALLY

        return TALLY.total().documents

    try:
        with ThreadPoolExecutor(1) as pool, cluster.poisoned(hold=True):
            run = pool.submit(score, modules, tiers=["tokens"], workers=cluster.address)
            wait_for(cluster.is_at_work)
            joined = cluster.start_worker()
            fault.strike()
            wait_for(lambda: cluster.tasks().get(joined, 0) > 0)
        assert cluster.ask(scored)[joined] > 0
    finally:
        cluster.stop_worker()
    fault.check(run.result())


# ---- hosts


class Host:
    """Another host, as far as its network and its scratch go: a namespace with a link to this."""

    def __init__(self, scratch: Path) -> None:
        number = os.getpid() % 250
        self._name, self._here, self._there = f"logitmill{number}", f"lm{number}a", f"lm{number}b"
        self.near, self._far = f"10.213.{number}.1", f"10.213.{number}.2"
        self._scratch = scratch
        scratch.mkdir()

    def start(self) -> None:
        """Raises OSError where nobody may make namespaces."""
        self._ip("netns", "add", self._name)
        self._ip("link", "add", self._here, "type", "veth", "peer", "name", self._there,
                 "netns", self._name)  # fmt: skip
        self._ip("address", "add", f"{self.near}/30", "dev", self._here)
        self._ip("link", "set", self._here, "up")
        for words in (["link", "set", "lo", "up"],
                      ["address", "add", f"{self._far}/30", "dev", self._there]):  # fmt: skip
            self._ip("-n", self._name, *words)
        self.connect(True)

    def connect(self, on: bool) -> None:
        """Plug the cable in, or pull it out."""
        self._ip("-n", self._name, "link", "set", self._there, "up" if on else "down")

    def start_worker(self, cluster: Cluster, **environment: str) -> None:
        """Start a worker there, whose scratch nobody here sees."""
        alone = 'mount -t tmpfs none "$TMPDIR" && exec "$@"'
        within = ["ip", "netns", "exec", self._name, "unshare", "--mount", "sh", "-c", alone, "sh"]
        cluster.start_worker(within=within, TMPDIR=str(self._scratch), **environment)

    def stop(self) -> None:
        # The link goes with it.
        subprocess.run(["ip", "netns", "del", self._name], capture_output=True)

    def _ip(self, *words: str) -> None:
        done = subprocess.run(["ip", *words], capture_output=True, text=True)
        if done.returncode:
            raise OSError(done.stderr.strip())


@pytest.fixture
def far(tmp_path: Path) -> Iterator[Host]:
    """A second host."""
    host = Host(tmp_path / "far")
    try:
        host.start()
    except OSError as error:
        host.stop()
        pytest.skip(f"network namespaces cannot be made here: {error}")
    yield host
    host.stop()


@pytest.mark.parametrize("seconds", [4, 15, 45] if LONG else [4])
def test_a_link_between_hosts_that_is_cut_for_a_while(
    far: Host,
    score: Score,
    modules: CorpusSpec,
    whole: Whole,
    count_fault: CountFault,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    seconds: int,
) -> None:
    """The worker is there; scheduler, flow and storage are here. Prefect's server it never sees."""
    fault = count_fault("link between hosts cut", whole)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    storage = ThreadedMotoServer(ip_address=far.near, port=0, verbose=False)
    storage.start()
    endpoint = "http://{}:{}".format(*storage.get_host_and_port())
    client = boto3.client("s3", endpoint_url=endpoint)
    client.create_bucket(Bucket="hosts")
    cluster = Cluster(tmp_path, far.near)

    def receipts_there() -> bool:
        found = client.list_objects_v2(Bucket="hosts").get("Contents", [])
        return any("/shards/" in entry["Key"] for entry in found)

    def cut() -> None:
        wait_for(receipts_there)
        far.connect(False)
        fault.strike()
        time.sleep(seconds)
        far.connect(True)

    def run() -> Run:
        if not cluster.workers():
            far.start_worker(cluster)
        options: dict[str, Any] = {"out": "s3://hosts/runs", "endpoint_url": endpoint}
        return score(modules, tiers=["tokens"], workers=cluster.address, **options)

    try:
        with ThreadPoolExecutor(1) as pool:
            cutter = pool.submit(cut)
            done = finish(run)
            cutter.result()
        assert not list((tmp_path / "far").iterdir())
        fault.check(done, tmp_path / "logitmill")
    finally:
        cluster.close()
        storage.stop()
        s3fs.S3FileSystem.clear_instance_cache()
