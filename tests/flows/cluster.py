"""A Dask cluster of processes that tests may kill, stop and replace."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from distributed import Client

_POISON = Path(__file__).with_name("poison.py")
_T = TypeVar("_T")


def wait_for(condition: Callable[[], bool], seconds: float = 240) -> None:
    """Returns once the condition holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come to that"
        time.sleep(0.05)


class Cluster:
    """A scheduler, and workers as an operations person would start them."""

    def __init__(self, folder: Path, host: str = "127.0.0.1") -> None:
        self._folder = folder
        self._faults = folder / "faults.json"
        self._processes: list[subprocess.Popen[bytes]] = []
        self.scratch = folder / "logitmill"
        """Where workers have their scratch folders if their output is not local."""
        file = folder / "scheduler.json"
        # A shard whose worker dies is taken back at once, as `start_workers` has it.
        config = {"DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES": "0"}
        config["DASK_DISTRIBUTED__SCHEDULER__WORKER_SATURATION"] = "1.0"
        options = ["--port", "0", "--host", host, "--scheduler-file", str(file)]
        self._run(["scheduler", *options], config)
        wait_for(file.exists)
        with Client(scheduler_file=str(file), set_as_default=False) as client:
            self.address = client.scheduler.address

    def start_worker(self, *, within: Sequence[str] = (), **environment: str) -> str:
        """Start a worker, and wait until it is there; gives its address.

        `within` is a command that runs the worker's elsewhere, with more words of `environment`.
        """
        before = self.workers()
        # Dask gives them one, and a CPU's name says how many it computes with.
        names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
        threads = dict.fromkeys(names, str(torch.get_num_threads()))
        options = ["--nthreads", "2", "--memory-limit", "0", "--preload", str(_POISON)]
        options += ["--local-directory", str(self._folder), "--death-timeout", "60"]
        own = {"FAULTS": str(self._faults), "TMPDIR": str(self._folder)}
        self._run(["worker", self.address, *options], threads | own | environment, within)
        wait_for(lambda: len(self.workers()) > len(before))
        return next(iter(self.workers().keys() - before.keys()))

    def stop_worker(self) -> None:
        """End the worker that was started last, and what looks after it."""
        before = len(self.workers())
        self._end(self._processes.pop())
        wait_for(lambda: len(self.workers()) < before)

    @contextmanager
    def poisoned(self, **faults: Any) -> Iterator[None]:
        """For as long as the block runs, workers fail as poison.py says."""
        new = self._faults.with_suffix(".new")
        new.write_text(json.dumps(faults))
        new.replace(self._faults)
        try:
            yield
        finally:
            self._faults.unlink()

    def count_full(self) -> int:
        """How often a worker's memory ran out."""
        noted = self._faults.with_suffix(".full")
        return len(noted.read_text()) if noted.exists() else 0

    def workers(self) -> dict[str, int]:
        """Processes of workers by address."""
        return self.ask(os.getpid)

    def ask(self, function: Callable[[], _T]) -> dict[str, _T]:
        """What a function returns in each worker's process, by address."""
        with Client(self.address, set_as_default=False) as client:
            return dict(client.run(function, on_error="ignore"))

    def tasks(self) -> dict[str, int]:
        """How many tasks each worker has, by address."""
        with Client(self.address, set_as_default=False) as client:
            return {worker: len(tasks) for worker, tasks in client.processing().items()}

    def is_at_work(self) -> bool:
        """Whether any worker has tasks."""
        return any(self.tasks().values())

    def is_scoring(self) -> bool:
        """Whether any worker's engine has a shard."""

        def look() -> bool:
            from logitmill.flows import shards

            return shards._turn.locked()

        return any(self.ask(look).values())

    def is_idle(self) -> bool:
        """Whether no worker has a shard in hand, whatever the scheduler knows of it."""

        def look() -> bool:
            from logitmill.flows.progress import TALLY

            return bool(TALLY.running())

        return not any(self.ask(look).values())

    def close(self) -> None:
        """End everything."""
        for process in self._processes:
            self._end(process)

    def _run(
        self, words: Sequence[str], environment: dict[str, str], within: Sequence[str] = ()
    ) -> None:
        quiet = {"DASK_DISTRIBUTED__LOGGING__DISTRIBUTED": "error"}
        self._processes.append(
            subprocess.Popen(
                [*within, sys.executable, "-m", "dask", *words, "--no-dashboard"],
                env={**os.environ, **quiet, **environment},
                start_new_session=True,
                stderr=subprocess.DEVNULL,
            )
        )

    def _end(self, process: subprocess.Popen[bytes]) -> None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
