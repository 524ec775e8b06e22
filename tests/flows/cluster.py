"""A Dask cluster of processes that tests may kill, stop and replace."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from distributed import Client

POISON = """
import os, signal
from logitmill.flows import shards

# This is run more than once in a process.
if not hasattr(shards, "read_whole"):
    shards.read_whole = shards.read_shard

def read(spec, shard):
    if os.environ.get("POISONED_SHARD") == str(shard.index):
        os.kill(os.getpid(), signal.SIGKILL)
    return shards.read_whole(spec, shard)

shards.read_shard = read
if "OTHER_VERSION" in os.environ:
    from logitmill.flows import request
    versions = request.versions()
    request.versions = lambda: {**versions, "torch": os.environ["OTHER_VERSION"]}
"""
"""What workers import first, so that the environment can make one of them fail."""


def wait_for(condition: Callable[[], bool], seconds: float = 90) -> None:
    """Returns once the condition holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come to that"
        time.sleep(0.05)


class Cluster:
    """A scheduler, and workers as an operations person would start them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._processes: list[subprocess.Popen[bytes]] = []
        file = folder / "scheduler.json"
        # A shard whose worker dies is taken back at once, as `start_workers` has it.
        config = {"DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES": "0"}
        options = ["--port", "0", "--host", "127.0.0.1", "--scheduler-file", str(file)]
        self._run("scheduler", *options, **config)
        wait_for(file.exists)
        (folder / "poison.py").write_text(POISON)
        with Client(scheduler_file=str(file), set_as_default=False) as client:
            self.address = client.scheduler.address

    def start_worker(self, **environment: str) -> None:
        """Start a worker, and wait until it is there."""
        before = len(self.workers())
        # Dask gives them one, and a CPU's name says how many it computes with.
        names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
        threads = dict.fromkeys(names, str(torch.get_num_threads()))
        options = ["--nthreads", "2", "--memory-limit", "0"]
        options += ["--local-directory", str(self._folder)]
        preload = ["--preload", str(self._folder / "poison.py")]
        self._run("worker", self.address, *options, *preload, **threads, **environment)
        wait_for(lambda: len(self.workers()) > before)

    def workers(self) -> dict[str, int]:
        """Processes of workers by address."""
        with Client(self.address, set_as_default=False) as client:
            return dict(client.run(os.getpid, on_error="ignore"))

    def is_at_work(self) -> bool:
        """Whether any worker has tasks."""
        with Client(self.address, set_as_default=False) as client:
            return any(client.processing().values())

    def are_engines_free(self) -> bool:
        """Whether no worker's engine has a shard, whatever the scheduler knows of it."""
        with Client(self.address, set_as_default=False) as client:
            turns = client.run(
                lambda: __import__("logitmill.flows.shards", fromlist=["_turn"])._turn.locked()
            )
            return not any(turns.values())

    def close(self) -> None:
        """End everything."""
        for process in self._processes:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def _run(self, kind: str, *arguments: str, **environment: str) -> None:
        quiet = {"DASK_DISTRIBUTED__LOGGING__DISTRIBUTED": "error"}
        self._processes.append(
            subprocess.Popen(
                [sys.executable, "-m", "dask", kind, *arguments, "--no-dashboard"],
                env={**os.environ, **quiet, **environment},
                start_new_session=True,
                stderr=subprocess.DEVNULL,
            )
        )
