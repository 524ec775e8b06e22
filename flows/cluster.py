"""Processes that score: those of a Dask cluster by its address, or of this machine, one a GPU.

Knows nothing of what they run.
"""

from __future__ import annotations

import logging
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, TypeVar

import torch

_T = TypeVar("_T")

GPUS = "gpus"
THREADS = 2
"""Of a process: the next shard is read, and the last one written, while the engine has another."""

_ADDRESS = re.compile(r"(tcp|tls|ucx|ws|wss)://.+:\d+")
# Seconds: for a scheduler to answer, for the first worker to be there, and for a worker to find its
# scheduler again before it ends.
_ANSWER, FIRST_WORKER_SECONDS, _ORPHAN = "10s", 120, 60
_TIMES_ASKED, _PATIENCE_SECONDS = 3, 5
_EXTRA = "pip install 'logitmill[dask]'"


def check_workers(workers: str | None) -> None:
    """ValueError for what says of no processes where they are."""
    if workers is not None and not isinstance(workers, str):
        raise ValueError(f"workers: {workers!r} is no text; a number is text here, too: '4'")
    if workers is None or is_address(workers):
        pass
    elif workers == GPUS:
        if not torch.cuda.is_available():
            raise ValueError(
                f"workers: {GPUS!r} is a process for each GPU, and this machine has none; leave it "
                "out, or give a number of processes"
            )
    elif not (workers.isascii() and workers.isdigit() and int(workers)):
        raise ValueError(
            f"workers: {workers!r} is neither {GPUS!r}, nor a number of processes, nor the address "
            "of a Dask scheduler (tcp://host:8786)"
        )
    if workers is not None:
        try:
            import distributed  # noqa: F401
            import prefect_dask  # noqa: F401
        except ImportError:
            raise ValueError(f"workers: {workers!r} needs Dask: {_EXTRA}") from None


def is_address(workers: str | None) -> bool:
    """Whether processes are those of a cluster that is there already, on any machine."""
    return workers is not None and _ADDRESS.fullmatch(workers) is not None


def ask(address: str, function: Callable[..., _T], *args: Any) -> dict[str, _T]:
    """What `function` returns on each worker of a cluster, by its address.

    Raises:
        ValueError: if there is no scheduler, or no worker within two minutes.
    """
    from distributed import Client, KilledWorker
    from distributed import TimeoutError as TimedOut

    try:
        client = Client(address, timeout=_ANSWER, set_as_default=False)
    except (OSError, TimedOut) as error:
        raise ValueError(
            f"workers: no Dask scheduler answers at {address!r} ({type(error).__name__}); start "
            "one with: dask scheduler"
        ) from None
    with client:
        for _ in range(_TIMES_ASKED):
            try:
                client.wait_for_workers(1, timeout=FIRST_WORKER_SECONDS)
            except TimedOut:
                raise ValueError(
                    f"workers: the cluster at {address!r} has none; start one for each GPU with: "
                    f"dask worker {address} --nthreads {THREADS} --memory-limit 0"
                ) from None
            for worker, threads in client.nthreads().items():
                if threads != THREADS:
                    raise ValueError(
                        f"workers: {worker} has {threads} threads, which would take turns with one "
                        f"engine; start it with --nthreads {THREADS}"
                    )
            # Ahead of the shards of others.
            asked = {
                worker: client.submit(function, *args, workers=[worker], pure=False, priority=10)
                for worker in client.nthreads()
            }
            found = {}
            for worker, answer in asked.items():
                # One that dies or leaves meanwhile is not needed.
                with suppress(KilledWorker, CancelledError):
                    while worker in client.nthreads():
                        with suppress(TimedOut):
                            found[worker] = answer.result(timeout=_PATIENCE_SECONDS)
                            break
            if found:
                return found
    raise ValueError(f"workers: those of the cluster at {address!r} die when asked what they are")


@contextmanager
def start_workers(workers: str, *, on_gpus: bool) -> Iterator[str]:
    """Processes of this machine for as long as the block runs; gives their scheduler's address.

    One that dies is started again by its nanny. They end by themselves if this process is killed.

    Args:
        workers: `gpus`, or a number.
        on_gpus: whether they share the GPUs there are. On a CPU each computes with as many threads
            as this process, so that the numbers are the same.
    """
    import dask
    from distributed import LocalCluster

    gpus = list_gpus() if on_gpus else []
    count = len(gpus) if workers == GPUS else int(workers)
    with ExitStack() as stack:
        # A shard whose worker died is taken back at once: who else was there must not pay for it.
        config = {
            "distributed.scheduler.allowed-failures": 0,
            "distributed.scheduler.worker-saturation": 1.0,
        }
        stack.enter_context(dask.config.set(config))
        # Who comes and goes is of no interest to whoever reads a run's log.
        logging.getLogger("distributed").setLevel(logging.ERROR)
        cluster = stack.enter_context(
            LocalCluster(
                n_workers=0, processes=True, dashboard_address="127.0.0.1:0", silence_logs="ERROR"
            )
        )
        command = [
            *(sys.executable, "-m", "dask", "worker", cluster.scheduler_address),
            *("--nthreads", str(THREADS), "--memory-limit", "0", "--no-dashboard"),
            *("--death-timeout", str(_ORPHAN)),
            # Imported while the scheduler waits for the others.
            *("--preload", "logitmill.flows.shards"),
        ]
        processes: list[subprocess.Popen[bytes]] = []
        stack.callback(_end, processes)
        for i in range(count):
            environment = os.environ | _environment(gpus[i % len(gpus)] if gpus else None, count)
            processes.append(
                subprocess.Popen(
                    [*command, "--name", f"worker-{i}"], env=environment, start_new_session=True
                )
            )
        yield cluster.scheduler_address


def list_gpus() -> list[str]:
    """Names of this machine's GPUs that may be used, as CUDA_VISIBLE_DEVICES has them."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name.strip() for name in visible.split(",") if name.strip() not in ("", "-1")]
    return [str(i) for i in range(torch.cuda.device_count())]


def _environment(gpu: str | None, count: int) -> Mapping[str, str]:
    # Where nothing is said, Dask sees to it that a worker has one thread for its arithmetic.
    threads = torch.get_num_threads() if gpu is None else max(1, (os.cpu_count() or 1) // count)
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    environment = dict.fromkeys(names, str(threads))
    if gpu is not None:
        environment["CUDA_VISIBLE_DEVICES"] = gpu
    return environment | {"DASK_DISTRIBUTED__LOGGING__DISTRIBUTED": "error"}


def _end(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """End workers, and what watches over them: at once, since no receipt is left to write."""
    for process in processes:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    for process in processes:
        process.wait()
