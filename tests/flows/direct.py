"""Runs that are made without Prefect, by what its tasks and its flow call."""

from __future__ import annotations

import uuid
from dataclasses import replace
from pathlib import Path
from typing import Any

from logitmill.flows import Run, open_run, shards
from logitmill.flows.publish import publish
from logitmill.flows.request import Request, prepare


def score_directly(model: Path, corpus: Any, out: Path, **options: Any) -> Run:
    """What `score_corpus` leaves behind; `options` are its own."""
    corpus = str(corpus) if isinstance(corpus, Path) else corpus
    prepared = prepare(Request(model=str(model), corpus=corpus, out=str(out), **options))
    prepared.write_plan()
    # As in the flow: what one attempt has run into is not the next one's.
    job = replace(prepared.job, attempt=uuid.uuid4().hex)
    receipts = [shards.complete(job, shard) for shard in prepared.plan.shards]
    publish(prepared.job.folder, receipts)
    return open_run(prepared.job.folder.uri)
