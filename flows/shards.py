"""The task: one shard scored, its parts in place, and the receipt that says so."""

from __future__ import annotations

import gc
import json
import socket
import threading
import time
import weakref
from collections import deque
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import cast

import torch
from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.runtime import task_run
from prefect.tasks import exponential_backoff

from ..engine.checkpoint import digest, find_model
from ..engine.frequencies import Frequencies
from ..engine.pipeline import EngineSettings, Pipeline, load_pipeline
from ..engine.records import OK, DocumentScore
from . import metrics
from .corpus import read_shard
from .corpus.plan import Shard
from .folder import FullDisk, one_line
from .kept import row_bytes
from .parts import write_table
from .progress import TALLY, Attempt, Count
from .request import Job, describe
from .rows import TooManyLogits
from .store import Receipt, find_receipts
from .summary import Summary
from .versions import versions
from .vocabulary import tabulate
from .writers import Writers

RETRIES = 2
_REPORT_SECONDS = 1.0
_TIMES_COLLECTED = 20

stopped: set[str] = set()
"""Flow runs (`Job.attempt`) that were interrupted: their tasks in this process end soon."""

_kept: dict[tuple[str, int], int] = {}
"""Tokens of shards that this process has kept rows of, by flow run; receipts come a bit later."""

_turn = threading.Lock()
"""Held by the task whose shard the engine is given. Others read theirs, or write it."""

_clock = threading.Lock()
_spans: deque[tuple[float, float]] = deque(maxlen=64)
"""Moments in which the engine was given the last shards, and was done with them."""


def stop(attempt: str) -> None:
    """Have the tasks of a flow run in this process end after the batch at hand."""
    stopped.add(attempt)


class Unfit(Exception):
    """A worker is not what the run was planned for. The message says how."""


class Stopped(Exception):
    """The run was interrupted while its shard was scored."""


# A mistake stays one, a full disk is so for all, and what was stopped is not wanted: only the rest
# may pass.
_LASTING = (ValueError, Stopped, FullDisk, TooManyLogits, Unfit)


@task(
    name="score-shard",
    task_run_name="shard-{shard.index}",
    retries=RETRIES,
    retry_delay_seconds=exponential_backoff(backoff_factor=10),
    retry_condition_fn=lambda task, run, state: (
        not isinstance(state.result(raise_on_failure=False), _LASTING)
    ),
    cache_policy=NO_CACHE,
    persist_result=False,
)
def score_shard(job: Job, shard: Shard, topic: str | None = None, num_begun: int = 0) -> Receipt:
    """Score one shard, leave its parts and its receipt; returns the receipt.

    With `topic`, a Dask worker says there how far it is. `num_begun` attempts at the same shard
    were begun by tasks that were lost with their workers.
    """
    # A task reaches other processes with copies of all that it refers to; what they share is here.
    from . import shards

    return shards.complete(job, shard, topic, num_begun)


def complete(job: Job, shard: Shard, topic: str | None = None, num_begun: int = 0) -> Receipt:
    """What the task does."""
    receipt = Receipt.read(job.folder, shard.index)
    if receipt is None or not job.folder.holds(receipt.parts):
        key = (job.attempt, shard.index)
        # A call that is no task of Prefect's has no count.
        number = num_begun + (task_run.run_count or 1)
        if topic is None and number > 1:
            metrics.record_retries()
        try:
            with (
                TALLY.attempt(key) as attempt,
                _report(key, topic, number),
                _engine.use(job, is_worker=topic is not None) as pipe,
            ):
                receipt = _score(job, shard, attempt, pipe)
                receipt = replace(receipt, attempt=number)
                receipt.write(job.folder)
        except Exception as error:
            if isinstance(error, (TooManyLogits, FullDisk)):
                # The other shards have no more room than this one.
                stopped.add(job.attempt)
            said = one_line(error)
            if 0 < (task_run.run_count or 0) <= RETRIES and not isinstance(error, _LASTING):
                said += f"; attempt {number + 1} follows in a moment"
            get_run_logger().warning("shard %d: %s", shard.index, said)
            raise
    # Else another run of the same key, or an earlier start of this task, was here first.
    return receipt


@contextmanager
def _report(key: tuple[str, int], topic: str | None, number: int) -> Iterator[None]:
    """Say on a topic of the Dask cluster, now and every second, what is done of a shard.

    `number` is that of the attempt: whoever loses the worker is to know of it.
    """
    if topic is None:
        yield
        return
    from distributed import get_worker

    worker, ended = get_worker(), threading.Event()

    def say() -> None:
        while True:
            count = TALLY.running().get(key, Count())
            said = {
                "shard": key[1],
                "attempt": number,
                "worker": worker.address,
                "count": asdict(count),
                "is_loading": _engine.is_loading,
            }
            worker.log_event(topic, said)
            if ended.wait(_REPORT_SECONDS):
                break

    thread = threading.Thread(target=say, name="logitmill-report", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()


def _score(job: Job, shard: Shard, attempt: Attempt, pipe: Pipeline) -> Receipt:
    name = f"{shard.index:05d}"
    metadata = {
        "run_key": job.run_key,
        "recipe": json.dumps(asdict(job.recipe), sort_keys=True),
        "recipe_hash": job.recipe.hash,
        "units": "nats",
    }
    counts = {"documents": 0, "failed": 0, "tokens": 0, "bytes": 0}
    loglikelihood, device_seconds = 0.0, 0.0
    summary = Summary()
    frequencies = Frequencies() if job.vocabulary else None
    with job.folder.scratch() as scratch:
        writers = Writers(job, pipe, scratch, metadata)
        rows = writers.rows

        def on_batch(tokens: int, num_bytes: int) -> None:
            nonlocal device_seconds
            seconds = pipe.take_device_seconds()
            device_seconds += seconds
            attempt.add_batch(tokens, num_bytes, seconds)
            # Documents come many batches at a time.
            _end_if_stopped(job)

        turn = _Turn()
        # Its documents are read and tokenized from here on, while another shard has its turn.
        scores = pipe.score(
            writers.check(read_shard(job.corpus, shard)),
            recipe=job.recipe,
            on_batch=on_batch,
            # What rows may take is known once the shard before is through.
            on_launched=turn.pass_on if rows is None else None,
            frequencies=frequencies,
            **writers.wanted,
        )
        with turn, closing(cast("Generator[DocumentScore]", scores)):
            if rows is not None:
                rows.room = _room(job, pipe)
            started = time.monotonic()
            for score in scores:
                _end_if_stopped(job)
                record = score.record
                for writer in writers.all:
                    writer.add(score)
                summary.add(score)
                counts["documents"] += 1
                counts["failed"] += record.status != OK
                counts["tokens"] += record.num_tokens_scored
                counts["bytes"] += record.num_bytes
                loglikelihood += record.loglikelihood or 0.0
                attempt.add_document(scored=record.status == OK)
            seconds = _count_seconds(started)
            if rows is not None:
                _kept[job.attempt, shard.index] = counts["tokens"]
        parts = []
        for writer in writers.all:
            writer.close()
            part_name = f"{writer.tier}/part-{name}.parquet"
            parts.append(job.folder.publish(scratch / writer.tier, part_name))
        tables = {"counts": summary.counts(), "outliers": summary.outliers()}
        if frequencies is not None:
            tables["vocabulary"] = tabulate(frequencies.read(), pipe.spelled)
        for table_name, table in tables.items():
            write_table(table, scratch / table_name)
            part_name = f"shards/{name}.{table_name}.parquet"
            parts.append(job.folder.publish(scratch / table_name, part_name))
    return Receipt(
        shard=shard.index,
        parts=tuple(parts),
        loglikelihood=loglikelihood,
        seconds=seconds,
        device_seconds=device_seconds,
        device=pipe.device_name,
        versions=versions(),
        **counts,
    )


def _count_seconds(started: float) -> float:
    """Seconds that the engine had a shard, until now; the end of the shard before is not its.

    A small shard may be done before the one that it follows is.
    """
    now = time.monotonic()
    with _clock:
        before = [ended for began, ended in _spans if began < started]
        _spans.append((started, now))
    return max(0.0, now - max(started, *before, 0.0))


def _end_if_stopped(job: Job) -> None:
    if job.attempt in stopped:
        raise Stopped("interrupted")


def _room(job: Job, pipe: Pipeline) -> int:
    """Bytes of rows that the run may still keep: what its finished shards hold is used."""
    kept = {n: tokens for (attempt, n), tokens in _kept.items() if attempt == job.attempt}
    receipts = find_receipts(job.folder, job.num_shards)
    tokens = sum((kept | {n: receipt.tokens for n, receipt in receipts.items()}).values())
    return job.max_logits_bytes - tokens * row_bytes(job.tiers, pipe, job.logits_dtype)


class _Turn:
    """One task's turn with the engine."""

    def __init__(self) -> None:
        self._is_held = False

    def __enter__(self) -> None:
        _turn.acquire()
        self._is_held = True

    def __exit__(self, *_: object) -> None:
        self.pass_on()

    def pass_on(self) -> None:
        """Leave the engine to the next one, if this has not happened yet."""
        if self._is_held:
            self._is_held = False
            _turn.release()


class _Engine:
    """The engine of this process, and of what it is."""

    def __init__(self) -> None:
        self.loading = threading.Lock()
        """Held by who looks for an engine, loads one, or waits until nobody uses another."""
        self.is_loading = False
        self._kept: tuple[tuple[str, EngineSettings], Pipeline] | None = None
        self._users = 0
        self._changed = threading.Condition()

    @contextmanager
    def use(self, job: Job, *, is_worker: bool) -> Iterator[Pipeline]:
        """The engine for a job, which stays for as long as the block runs."""
        with self.loading:
            pipe = self.load(job, is_worker=is_worker)
            self._count_users(1)
        try:
            yield pipe
        finally:
            self._count_users(-1)

    def load(self, job: Job, *, is_worker: bool) -> Pipeline:
        """The engine for a job. `loading` is held by the caller."""
        key = job.digest, job.engine
        if self._kept is not None and self._kept[0] == key:
            return self._kept[1]
        # Both need the same memory. To wait for it is no progress, as whoever has it may hang.
        self.release()
        self.is_loading = True
        try:
            folder = Path(job.model)
            if job.is_elsewhere:
                folder = find_model(job.model, storage_options=dict(job.model_options))
            if is_worker:
                _check_worker(job, folder)
            pipe = load_pipeline(folder, job.engine)
        finally:
            self.is_loading = False
        self._kept = key, pipe
        return pipe

    def release(self) -> None:
        """Give back what the engine takes, once nobody uses it. `loading` is held by the caller."""
        if self._kept is None:
            return
        with self._changed:
            self._changed.wait_for(lambda: not self._users)
        kept, self._kept = weakref.ref(self._kept[1]), None
        for _ in range(_TIMES_COLLECTED):
            gc.collect()
            if kept() is None:
                break
            # Its last user is on his way out.
            time.sleep(0.1)
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()

    def _count_users(self, change: int) -> None:
        with self._changed:
            self._users += change
            self._changed.notify_all()


_engine = _Engine()


def load_engine(job: Job) -> Pipeline:
    """The engine of this process: loaded once for a model's digest, kept between shards.

    Raises:
        ValueError: naming what is wrong with the model or the settings.
    """
    with _engine.loading:
        return _engine.load(job, is_worker=False)


def release_engine() -> None:
    """Give back the memory of this process's engine; the next shard loads one again."""
    with _engine.loading:
        _engine.release()


def _check_worker(job: Job, folder: Path) -> None:
    """Unfit if what this process would compute is not what the run was planned with.

    It may have joined the cluster after that, or be another GPU of the same machine.
    """
    host = socket.gethostname()
    found = describe(folder, job.engine).made
    if found != job.made:
        raise Unfit(
            f"workers: one on {host} has {found}, and the run was planned for {job.made}; give the "
            "run workers of one kind"
        )
    if job.is_elsewhere and digest(folder) != job.digest:
        raise Unfit(
            f"model: on {host}, {str(folder)!r} holds other files than the run was planned with; "
            "give all workers the same model"
        )
