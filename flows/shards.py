"""The task: one shard scored, its parts in place, and the receipt that says so."""

from __future__ import annotations

import gc
import json
import socket
import threading
import time
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import cast

import numpy as np
import torch
from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.tasks import exponential_backoff

from ..engine.checkpoint import digest, find_model
from ..engine.pipeline import EngineSettings, Pipeline, load_pipeline
from ..engine.records import OK, DocumentScore
from .corpus import read_shard
from .corpus.plan import Shard
from .folder import one_line
from .parts import (
    LOGITS_DTYPES,
    LogitsWriter,
    ScoresWriter,
    TokensWriter,
    TooManyLogits,
    write_table,
)
from .progress import TALLY, Attempt, Count
from .request import Job, describe
from .store import Receipt, find_receipts
from .summary import Summary
from .versions import versions

RETRIES = 2
_REPORT_SECONDS = 1.0

stopped: set[str] = set()
"""Flow runs (`Job.attempt`) that were interrupted: their tasks in this process end soon."""

_kept: dict[tuple[str, int], int] = {}
"""Tokens of shards that this process has kept logits of, by flow run; receipts come a bit later."""

_turn = threading.Lock()
"""Held by the task whose shard the engine is at work on. Others read theirs, or write it."""


def stop(attempt: str) -> None:
    """Have the tasks of a flow run in this process end after the batch at hand."""
    stopped.add(attempt)


class Unfit(Exception):
    """A worker is not what the run was planned for. The message says how."""


class Stopped(Exception):
    """The run was interrupted while its shard was scored."""


@task(
    name="score-shard",
    task_run_name="shard-{shard.index}",
    retries=RETRIES,
    retry_delay_seconds=exponential_backoff(backoff_factor=10),
    # A mistake stays one, and what was stopped is not wanted: only the rest may pass.
    retry_condition_fn=lambda task, run, state: (
        not isinstance(
            state.result(raise_on_failure=False), (ValueError, Stopped, TooManyLogits, Unfit)
        )
    ),
    cache_policy=NO_CACHE,
    persist_result=False,
)
def score_shard(job: Job, shard: Shard, topic: str | None = None) -> Receipt:
    """Score one shard, leave its parts and its receipt; returns the receipt.

    With `topic`, a Dask worker says there how far it is.
    """
    # A task reaches other processes with copies of all that it refers to; what they share is here.
    from . import shards

    return shards.complete(job, shard, topic)


def complete(job: Job, shard: Shard, topic: str | None = None) -> Receipt:
    """What the task does."""
    receipt = Receipt.read(job.folder, shard.index)
    if receipt is None or not job.folder.holds(receipt.parts):
        key = (job.attempt, shard.index)
        try:
            with TALLY.attempt(key) as attempt, _report(key, topic):
                pipe = load_engine(job, is_worker=topic is not None)
                receipt = _score(job, shard, attempt, pipe)
        except Exception as error:
            if isinstance(error, TooManyLogits):
                # The other shards have no more room than this one.
                stopped.add(job.attempt)
            get_run_logger().warning("shard %d: %s", shard.index, one_line(error))
            raise
        receipt.write(job.folder)
    # Else another run of the same key, or an earlier start of this task, was here first.
    return receipt


@contextmanager
def _report(key: tuple[str, int], topic: str | None) -> Iterator[None]:
    """Say on a topic of the Dask cluster, every second, what is done of a shard."""
    if topic is None:
        yield
        return
    from distributed import get_worker

    worker, ended = get_worker(), threading.Event()

    def say() -> None:
        while not ended.wait(_REPORT_SECONDS):
            count = TALLY.running().get(key, Count())
            said = {
                "shard": key[1],
                "worker": worker.address,
                "count": asdict(count),
                "is_loading": _engine.loading.locked(),
            }
            worker.log_event(topic, said)

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
    loglikelihood = 0.0
    summary = Summary()
    with job.folder.scratch() as scratch:
        writers: list[ScoresWriter | TokensWriter | LogitsWriter] = []
        logits: LogitsWriter | None = None
        if "tokens" in job.tiers:
            writers.append(TokensWriter(scratch / "tokens", metadata))
        if "logits" in job.tiers:
            logits = LogitsWriter(scratch / "logits", metadata, dtype=job.logits_dtype)
            writers.append(logits)
        writers.append(ScoresWriter(scratch / "scores", metadata))

        def on_batch(tokens: int, num_bytes: int) -> None:
            attempt.add_batch(tokens, num_bytes)
            # Documents come many batches at a time.
            _end_if_stopped(job)

        # Its documents are read and tokenized from here on, while another shard has its turn.
        scores = pipe.score(
            read_shard(job.corpus, shard),
            recipe=job.recipe,
            on_logits=None if logits is None else logits.add_rows,
            logits_dtype=job.logits_dtype,
            on_batch=on_batch,
        )
        with _turn, closing(cast("Generator[DocumentScore]", scores)):
            if logits is not None:
                logits.room = _logits_room(job, pipe.vocab_size)
            started = time.monotonic()
            for score in scores:
                _end_if_stopped(job)
                record = score.record
                for writer in writers:
                    writer.add(score)
                summary.add(score)
                counts["documents"] += 1
                counts["failed"] += record.status != OK
                counts["tokens"] += record.num_tokens_scored
                counts["bytes"] += record.num_bytes
                loglikelihood += record.loglikelihood or 0.0
                attempt.add_document(scored=record.status == OK)
            seconds = time.monotonic() - started
            if logits is not None:
                _kept[job.attempt, shard.index] = counts["tokens"]
        parts = []
        for writer in writers:
            writer.close()
            part_name = f"{writer.tier}/part-{name}.parquet"
            parts.append(job.folder.publish(scratch / writer.tier, part_name))
        for table_name, table in (("counts", summary.counts()), ("outliers", summary.outliers())):
            write_table(table, scratch / table_name)
            part_name = f"shards/{name}.{table_name}.parquet"
            parts.append(job.folder.publish(scratch / table_name, part_name))
    return Receipt(
        shard=shard.index,
        parts=tuple(parts),
        loglikelihood=loglikelihood,
        seconds=seconds,
        device=pipe.device_name,
        versions=versions(),
        **counts,
    )


def _end_if_stopped(job: Job) -> None:
    if job.attempt in stopped:
        raise Stopped("interrupted")


def _logits_room(job: Job, vocab_size: int) -> int:
    """Bytes of logits that the run may still keep: what its finished shards hold is used."""
    kept = {n: tokens for (attempt, n), tokens in _kept.items() if attempt == job.attempt}
    receipts = find_receipts(job.folder, job.num_shards)
    tokens = sum((kept | {n: receipt.tokens for n, receipt in receipts.items()}).values())
    row_bytes = vocab_size * np.dtype(LOGITS_DTYPES[job.logits_dtype]).itemsize
    return job.max_logits_bytes - tokens * row_bytes


class _Engine:
    """The engine of this process, and of what it is."""

    def __init__(self) -> None:
        self.loading = threading.Lock()
        self._kept: tuple[tuple[str, EngineSettings], Pipeline] | None = None

    def find(self, key: tuple[str, EngineSettings]) -> Pipeline | None:
        """The engine if it is this one; another makes room, for both need the same memory."""
        if self._kept is not None and self._kept[0] == key:
            return self._kept[1]
        if self._kept is not None:
            # Whoever has its turn goes on to the end of his shard.
            with _turn:
                self._kept = None
            gc.collect()
            if torch.cuda.is_initialized():
                torch.cuda.empty_cache()
        return None

    def keep(self, key: tuple[str, EngineSettings], pipe: Pipeline) -> Pipeline:
        """Keep it for the next shards."""
        self._kept = key, pipe
        return pipe


_engine = _Engine()


def load_engine(job: Job, *, is_worker: bool = False) -> Pipeline:
    """The engine of this process: loaded once for a model's digest, kept between shards.

    Raises:
        ValueError: naming what is wrong with the model or the settings.
        Unfit: if this process is a worker of another kind than the run was planned for.
    """
    key = job.digest, job.engine
    with _engine.loading:
        if (pipe := _engine.find(key)) is not None:
            return pipe
        folder = Path(job.model)
        if job.is_elsewhere:
            folder = find_model(job.model, storage_options=dict(job.model_options))
        if is_worker:
            _check_worker(job, folder)
        return _engine.keep(key, load_pipeline(folder, job.engine))


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
