"""Runs shards where they are scored: in this process, in others of this machine, on a cluster."""

from __future__ import annotations

import logging
import threading
import time
from asyncio import CancelledError as AsyncCancelledError
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError
from contextlib import ExitStack, contextmanager, suppress
from queue import Empty, SimpleQueue
from typing import Any, Protocol

from prefect.futures import PrefectWrappedFuture
from prefect.task_runners import ThreadPoolTaskRunner

from . import metrics, shards
from .cluster import FIRST_WORKER_SECONDS, THREADS, is_address, start_workers
from .corpus.plan import Shard
from .progress import TALLY, Count
from .request import Job
from .store import Receipt

_MOST_LOSSES = 3
"""Times that a shard may be lost with its worker before it is given up."""
_LOOK_SECONDS = 1.0
_STOP_SECONDS = 10.0

Future = PrefectWrappedFuture[Any, Any]
Log = logging.Logger | logging.LoggerAdapter[Any]


class Lost(Exception):
    """A shard's worker was lost."""


class Pool(Protocol):
    """Where tasks run."""

    def count(self) -> int:
        """Processes at work."""

    def submit(self, shard: Shard) -> Future:
        """Start a shard's task."""

    def result(self, shard: Shard, future: Future) -> Any:
        """What became of a task that has ended: what it returned, or its exception."""

    def check(self) -> None:
        """Look after the processes; called every second."""

    def stop(self) -> None:
        """Have the tasks in flight end soon: the run was interrupted."""


@contextmanager
def open_pool(job: Job, workers: str | None, deadline: float, log: Log) -> Iterator[Pool]:
    """Where the shards of a job are scored, for as long as the block runs.

    `workers` and `deadline` are those of `score_corpus`.
    """
    if workers is None:
        threads: ThreadPoolTaskRunner[Any] = ThreadPoolTaskRunner(max_workers=THREADS)
        with threads:
            yield _Here(job, threads)
        return
    from prefect.settings import PREFECT_CLIENT_SERVER_VERSION_CHECK_ENABLED, temporary_settings
    from prefect_dask import DaskTaskRunner

    with ExitStack() as stack:
        # Workers get the settings of this process. A task that may not ask the server for its
        # version needs no server.
        unasked = {PREFECT_CLIENT_SERVER_VERSION_CHECK_ENABLED: False}
        stack.enter_context(temporary_settings(unasked))
        address = workers
        if not is_address(workers):
            on_gpus = job.engine.resolve_device().type == "cuda"
            address = stack.enter_context(start_workers(workers, on_gpus=on_gpus))
        # It says where it connects to, which the caller has said better.
        logging.getLogger("prefect.task_runner.dask").setLevel(logging.WARNING)
        runner = stack.enter_context(DaskTaskRunner(address=address))
        pool = _Cluster(job, runner, deadline, log)
        stack.callback(pool.close)
        yield pool


class _Here:
    """Threads of this process that take turns with one engine."""

    def __init__(self, job: Job, runner: ThreadPoolTaskRunner[Any]) -> None:
        self._job = job
        self._runner = runner

    def count(self) -> int:
        return 1

    def submit(self, shard: Shard) -> Future:
        return self._runner.submit(shards.score_shard, {"job": self._job, "shard": shard})

    def result(self, shard: Shard, future: Future) -> Any:
        return future.result(raise_on_failure=False)

    def check(self) -> None:
        pass

    def stop(self) -> None:
        shards.stop(self._job.attempt)


class _Cluster:
    """Workers of a Dask scheduler, each with an engine of its own."""

    def __init__(self, job: Job, runner: Any, deadline: float, log: Log) -> None:
        self._job = job
        self._runner = runner
        self._client = runner.client
        self._deadline = deadline
        self._log = log
        self._topic = f"logitmill-{job.attempt}"
        self._manned = time.monotonic()
        """When there was a worker last."""
        self._moved: dict[str, float] = {}
        """When each worker that has tasks was last seen to get on."""
        self._flying: dict[str, tuple[Future, int]] = {}
        """Tasks in flight, and their shards, by Dask's names of them."""
        self._begun: Counter[int] = Counter()
        """Attempts at each shard, as far as it is known: a task that fails makes another one."""
        self._noting = threading.Lock()
        self._client.subscribe_topic(self._topic, self._hear)

    def count(self) -> int:
        with self._plain_errors():
            count = len(self._client.nthreads())
        now = time.monotonic()
        self._manned = now if count else self._manned
        if now - self._manned > FIRST_WORKER_SECONDS:
            raise RuntimeError(
                f"workers: there have been none for {now - self._manned:.0f} s; start some, and "
                "run again to do the rest"
            )
        return count

    def submit(self, shard: Shard) -> Future:
        parameters = {
            "job": self._job,
            "shard": shard,
            "topic": self._topic,
            "num_begun": self._begin_attempt(shard.index),
        }
        future = self._runner.submit(shards.score_shard, parameters)
        self._flying[future.wrapped_future.key] = future, shard.index
        return future

    def result(self, shard: Shard, future: Future) -> Any:
        from distributed import KilledWorker
        from distributed.comm import CommClosedError

        self._flying.pop(future.wrapped_future.key, None)
        try:
            result = future.result(raise_on_failure=False)
        except (KilledWorker, CommClosedError, CancelledError, AsyncCancelledError) as error:
            TALLY.drop(self._key(shard.index))
            _mark_lost(future)
            return Lost(type(error).__name__)
        except Exception as error:
            # What the task ended with cannot be sent.
            TALLY.drop(self._key(shard.index))
            return error
        if isinstance(result, Receipt):
            held = Count(result.documents, result.bytes, result.tokens, result.device_seconds)
            TALLY.finish(self._key(shard.index), held)
        else:
            TALLY.drop(self._key(shard.index))
        return result

    def check(self) -> None:
        """Start workers anew that have tasks and have not got on for the deadline."""
        now = time.monotonic()
        with self._plain_errors():
            everybodys = self._client.processing()
        # Workers may be at work for others as well.
        processing = {
            worker: ours
            for worker, keys in everybodys.items()
            if (ours := [key for key in keys if key in self._flying])
        }
        self._moved = {worker: self._moved.get(worker, now) for worker in processing}
        for worker in processing:
            moved = self._moved[worker]
            if now - moved <= self._deadline:
                continue
            self._log.warning(
                "worker %s has not got on for %.0f s: it is started anew", worker, now - moved
            )
            for key in processing[worker]:
                self._flying[key][0].wrapped_future.cancel(force=True)
            try:
                self._client.restart_workers([worker], raise_for_error=False)
            except Exception as error:
                # It has gone by itself, or has no nanny to start it.
                self._log.warning("worker %s cannot be started anew: %r", worker, error)
            self._moved[worker] = time.monotonic()

    def stop(self) -> None:
        # Beside the tasks, not in line behind them. A worker that hangs does not answer.
        def say() -> None:
            with suppress(Exception):
                self._client.run(shards.stop, self._job.attempt, on_error="ignore")

        thread = threading.Thread(target=say, name="logitmill-stop", daemon=True)
        thread.start()
        thread.join(_STOP_SECONDS)

    def close(self) -> None:
        self._client.unsubscribe_topic(self._topic)

    def _hear(self, event: tuple[float, Any]) -> None:
        """A worker says how far it is with its shards."""
        said = event[1]
        with self._noting:
            self._note_attempt(said["shard"], said["attempt"])
        # The last word of a task may come after its result.
        if all(shard != said["shard"] for _, shard in list(self._flying.values())):
            return
        is_news = TALLY.report(self._key(said["shard"]), Count(**said["count"]))
        if is_news or said["is_loading"]:
            self._moved[said["worker"]] = time.monotonic()

    def _begin_attempt(self, shard: int) -> int:
        """Note that an attempt at a shard is about to begin; how many were begun before."""
        with self._noting:
            begun = self._begun[shard]
            self._note_attempt(shard, begun + 1)
            return begun

    def _note_attempt(self, shard: int, number: int) -> None:
        """An attempt at a shard has begun, which may be known; for who holds the lock."""
        begun = self._begun[shard]
        if number > begun:
            self._begun[shard] = number
            metrics.record_retries(number - max(begun, 1))

    @contextmanager
    def _plain_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            address = self._client.scheduler.address
            raise RuntimeError(
                f"workers: the scheduler at {address} is gone ({type(error).__name__}); run again "
                "to do the rest"
            ) from None

    def _key(self, shard: int) -> tuple[str, int]:
        return self._job.attempt, shard


def run_all(
    pool: Pool, wanted: Sequence[Shard], *, note_workers: Callable[[int], None] = lambda _: None
) -> Iterator[tuple[Shard, Any]]:
    """(shard, its result or the exception that ended it), each as it is done.

    As many are in flight as there are threads, and one more, so that a shard that kills its worker
    takes few others with it. What was lost is done again, one at a time: another that was lost with
    it is not lost again.
    """
    fresh, lost = deque(wanted), deque[Shard]()
    flying: dict[Future, Shard] = {}
    losses: Counter[int] = Counter()
    ended: SimpleQueue[Any] = SimpleQueue()
    num_workers, looked = pool.count(), time.monotonic()
    note_workers(num_workers)

    def submit(shard: Shard) -> None:
        future = pool.submit(shard)
        flying[future] = shard
        future.add_done_callback(ended.put)

    while fresh or lost or flying:
        if lost and not any(losses[shard.index] for shard in flying.values()):
            submit(lost.popleft())
        while fresh and len(flying) < max(1, num_workers) * THREADS + (num_workers > 1):
            submit(fresh.popleft())
        try:
            future = ended.get(timeout=_LOOK_SECONDS)
        except Empty:
            future = None
        if time.monotonic() - looked >= _LOOK_SECONDS:
            pool.check()
            num_workers, looked = pool.count(), time.monotonic()
            note_workers(num_workers)
        if future is None:
            continue
        shard = flying.pop(future)
        result = pool.result(shard, future)
        if isinstance(result, Lost):
            losses[shard.index] += 1
            if losses[shard.index] < _MOST_LOSSES:
                lost.append(shard)
                continue
            result = Lost(f"its worker was lost {_MOST_LOSSES} times ({result})")
        yield shard, result


def _mark_lost(future: Future) -> None:
    """Say on the server that a task has crashed, which its worker cannot."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.objects import State
    from prefect.states import Crashed

    try:
        with get_client(sync_client=True) as client:
            crashed: State[Any] = Crashed(message="its worker was lost; the shard is done again")
            client.set_task_run_state(future.task_run_id, crashed, force=True)
    except Exception:
        logging.getLogger(__name__).debug("no state for a lost task", exc_info=True)
