"""The task: one shard scored, its parts in place, and the receipt that says so."""

from __future__ import annotations

import json
import threading
import time
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path

import numpy as np
from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.tasks import exponential_backoff

from ..engine.pipeline import EngineSettings, Pipeline, load_pipeline
from ..engine.records import OK
from ..engine.scorer import LogitsSink
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
from .progress import TALLY
from .request import Job
from .store import Receipt, find_receipts
from .summary import Summary
from .versions import versions

RETRIES = 2

stopped: set[str] = set()
"""Keys of runs that were interrupted: their tasks in this process end at the next document."""


class Stopped(Exception):
    """The run was interrupted while its shard was scored."""


@task(
    name="score-shard",
    task_run_name="shard-{shard.index}",
    retries=RETRIES,
    retry_delay_seconds=exponential_backoff(backoff_factor=10),
    # A mistake stays one, and what was stopped is not wanted: only the rest may pass.
    retry_condition_fn=lambda task, run, state: (
        not isinstance(state.result(raise_on_failure=False), (ValueError, Stopped, TooManyLogits))
    ),
    cache_policy=NO_CACHE,
    persist_result=False,
)
def score_shard(job: Job, shard: Shard) -> int:
    """Score one shard, leave its parts and its receipt; returns the number of documents."""
    found = Receipt.read(job.folder, shard.index)
    if found is not None and job.folder.holds(found.parts):
        # Another run of the same key, or an earlier start of this task, was here first.
        return found.documents
    try:
        with TALLY.attempt():
            receipt = _score(job, shard)
    except Exception as error:
        if isinstance(error, TooManyLogits):
            # The other shards have no more room than this one.
            stopped.add(job.run_key)
        get_run_logger().warning("shard %d: %s", shard.index, one_line(error))
        raise
    receipt.write(job.folder)
    return receipt.documents


def _score(job: Job, shard: Shard) -> Receipt:
    started = time.monotonic()
    pipe = load_engine(job)
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
        on_logits: LogitsSink | None = None
        if "tokens" in job.tiers:
            writers.append(TokensWriter(scratch / "tokens", metadata))
        if "logits" in job.tiers:
            logits = LogitsWriter(
                scratch / "logits",
                metadata,
                dtype=job.logits_dtype,
                max_bytes=_logits_room(job, pipe.vocab_size),
            )
            writers.append(logits)
            on_logits = logits.add_rows
        writers.append(ScoresWriter(scratch / "scores", metadata))
        documents = read_shard(job.corpus, shard)
        scores = pipe.score(
            documents,
            recipe=job.recipe,
            on_logits=on_logits,
            logits_dtype=job.logits_dtype,
            on_batch=TALLY.add_batch,
        )
        for score in scores:
            if job.run_key in stopped:
                raise Stopped("interrupted")
            record = score.record
            for writer in writers:
                writer.add(score)
            summary.add(score)
            counts["documents"] += 1
            counts["failed"] += record.status != OK
            counts["tokens"] += record.num_tokens_scored
            counts["bytes"] += record.num_bytes
            loglikelihood += record.loglikelihood or 0.0
            TALLY.add_document(scored=record.status == OK)
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
        seconds=time.monotonic() - started,
        device=pipe.device_name,
        versions=versions(),
        **counts,
    )


def _logits_room(job: Job, vocab_size: int) -> int:
    """Bytes of logits that the run may still keep: what its finished shards hold is used."""
    tokens = sum(receipt.tokens for receipt in find_receipts(job.folder, job.num_shards).values())
    row_bytes = vocab_size * np.dtype(LOGITS_DTYPES[job.logits_dtype]).itemsize
    return job.max_logits_bytes - tokens * row_bytes


_loading = threading.Lock()


def load_engine(job: Job) -> Pipeline:
    """The engine of this process: loaded once for a model's digest, kept between shards.

    Raises:
        ValueError: naming what is wrong with the model or the settings.
    """
    with _loading:
        return _load_engine(job.model, job.digest, job.engine)


@lru_cache(maxsize=1)
def _load_engine(model: str, digest: str, settings: EngineSettings) -> Pipeline:
    return load_pipeline(Path(model), settings)
