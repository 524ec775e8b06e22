"""The main flow: plan -> shards on GPU tasks -> publish."""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import httpx
from prefect import Flow, get_run_logger
from prefect.artifacts import create_link_artifact, create_table_artifact
from prefect.futures import PrefectFuture
from prefect.runtime import flow_run
from prefect.utilities.callables import get_call_parameters

from ..engine.pipeline import EngineSettings
from ..engine.recipes import Recipe
from . import metrics, shards
from .corpus import CorpusSpec
from .corpus.plan import Shard
from .folder import Folder, one_line
from .parameters import complete_schema
from .progress import Done, show_progress
from .publish import publish
from .request import NothingNew, Prepared, Request, prepare
from .runners import Pool, open_pool, run_all
from .server import start_server, use_server
from .store import REPORT, Receipt, find_receipts

Tier = Literal["scores", "tokens", "topk", "sampled", "lens", "hidden", "logits"]

IN_PLAN = {"in_plan": True}
"""Marks what is logged of a run that a command has shown with its plan."""

_prepared: ContextVar[Prepared | None] = ContextVar("prepared", default=None)
"""What a caller in this process has prepared for the flow run that it starts."""


class ScoringFlow(Flow[..., str]):
    """A flow whose callers need nothing set up, and learn of a mistake before anything starts.

    Called from Python, it brings its own server where none is set up, and hands the flow run what
    it has checked. What opens the corpus (`CorpusSpec.storage_options`) reaches the processes that
    score, through Dask's scheduler where that is a cluster's, and never the server, which keeps the
    parameters of its runs.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        complete_schema(self.parameters)

    def __call__(
        self, *args: Any, return_state: bool = False, wait_for: Any = None, **kwargs: Any
    ) -> Any:
        """The flow's result, or its final state."""
        given = get_call_parameters(self.fn, args, kwargs)
        given = {k: v.result() if isinstance(v, PrefectFuture) else v for k, v in given.items()}
        start_server()
        try:
            prepared = prepare(Request(**given))
        except NothingNew as found:
            if return_state:
                raise
            return found.uri
        return self.run_prepared(prepared, return_state=return_state, wait_for=wait_for)

    def run_prepared(self, prepared: Prepared, **options: Any) -> Any:
        """The flow's result for what is prepared; at once if the run is already complete."""
        if prepared.is_complete() and not options.get("return_state"):
            _publish_tables(prepared.request, prepared.job.folder)
            return prepared.job.folder.uri
        num_shards = len(prepared.plan.shards)
        is_here = prepared.request.workers is None
        if is_here and len(find_receipts(prepared.job.folder, num_shards)) < num_shards:
            shards.load_engine(prepared.job)
        token = _prepared.set(prepared)
        try:
            with use_server():
                return super().__call__(**prepared.request.public(), **options)
        except httpx.ConnectError as error:
            raise RuntimeError(
                f"Prefect's server is gone ({one_line(error)}); start it, and run again to do the "
                "rest"
            ) from None
        finally:
            _prepared.reset(token)

    def with_options(self, **options: Any) -> ScoringFlow:
        """The flow with other settings of Prefect's, otherwise the same."""
        changed = super().with_options(**options)
        changed.__class__ = type(self)
        changed.parameters = self.parameters
        return changed  # type: ignore[return-value]


def _name_run() -> str:
    corpus = flow_run.parameters["corpus"]
    uri = corpus.uri if isinstance(corpus, CorpusSpec) else corpus
    return f"{uri} by {flow_run.parameters['model']}"


@partial(ScoringFlow, name="score-corpus", flow_run_name=_name_run)
def score_corpus(
    model: str,
    corpus: str | CorpusSpec,
    out: str,
    recipe: str | Recipe = "rolling",
    tiers: Sequence[Tier] = ("scores",),
    engine: EngineSettings | None = None,
    limit: int | None = None,
    top_k: int | None = None,
    num_draws: int | None = None,
    draw_seed: int | None = None,
    layers: Sequence[int] | None = None,
    vocabulary: bool = False,
    logits_dtype: Literal["float32", "float16"] = "float32",
    max_logits_bytes: int = 10 * 10**9,
    endpoint_url: str | None = None,
    workers: str | None = None,
    deadline: float = 900.0,
    only_new: bool = False,
    catalog: str | None = None,
) -> str:
    """Score a corpus with a causal language model and leave the run in storage.

    Running it again with the same arguments resumes: shards that are done are not done again. What
    decides the numbers is hashed into the run's folder name. Credentials for storage come from the
    environment (`AWS_ACCESS_KEY_ID`, ...), never from parameters, which the server stores.

    Args:
        model: a model folder in Hugging Face layout, the URI of one (`s3://bucket/model/`), or a
            Hub id.
        corpus: files, a folder or a glob on any fsspec URI (Parquet, JSON lines, CSV, text, code),
            a Hugging Face dataset (`datasets:NAME`), or a `CorpusSpec` that also names columns.
        out: the folder that runs are kept in, on any fsspec URI: `runs`, `s3://bucket/runs`.
        recipe: `rolling`, `disjoint`, `strided`, `llamacpp`, `truncated`, `conditional`, each with
            an optional context as in `rolling-1024`, or a `Recipe`.
        tiers: what to keep: `scores` (a row a document, always), `tokens` (a record a token),
            `topk` (the likeliest tokens of every row, and the mass of all others), `sampled`
            (tokens drawn from its distribution), `lens` (what layers on the way would have said),
            `hidden` (what the model's head takes), `logits` (log-probabilities over the whole
            vocabulary, without `topk`, `sampled` or `hidden`).
        engine: device, dtype, batch size and memory of the engine.
        limit: at most this many documents, the first in plan order.
        top_k: tokens of a row in the tier `topk`, up to 256; 20 by default.
        num_draws: draws of a row in the tier `sampled`, up to 255; 12 by default.
        draw_seed: of these draws; another one gives others. 0 by default.
        layers: of the tier `lens`, from 0, or from the end if negative; all by default. With it,
            the recipe `conditional` computes contexts for each document anew.
        vocabulary: also add up, by source, how often every token was expected and how often it was
            there (`Run.summary("vocabulary")`).
        logits_dtype: what log-probabilities of the tier `logits` are stored in.
        max_logits_bytes: refuse to start a run whose `logits` or `hidden` would take more than
            this, before compression, and end one that turns out to.
        endpoint_url: the S3 server to use where it is not Amazon's.
        workers: where shards are scored: by default in this process; `gpus`, a process for each GPU
            of this machine; a number, so many processes of it; `tcp://host:8786`, the workers of
            the Dask cluster with this scheduler.
        deadline: seconds without progress after which one of these processes is taken for hung and
            started anew, and its shards are done again; to load the model is no progress.
        only_new: leave out the inputs that complete runs in `out`, of the same settings, have
            scored; content tells, not the name. A run that was begun is finished first, alone.
        catalog: make the complete run part of the Iceberg tables of this catalog of pyiceberg's
            settings, or `beside` for one beside the runs.

    Returns:
        The URI of the run's folder; `out` if there is nothing new to score.

    Raises:
        ValueError: for a mistake in the arguments, the model or the corpus, before any scoring.
        RuntimeError: if shards failed; the others are kept, run again to do the rest.
    """
    asked = locals()
    # Processes elsewhere get the flow with copies of all that it refers to.
    from . import score

    return score.carry_out(score.Request(**asked))


def carry_out(request: Request) -> str:
    """What the flow does, within its run."""
    log = get_run_logger()
    try:
        prepared = _prepared.get() or prepare(request)
    except NothingNew as found:
        log.info("%s", found)
        return found.uri
    plan, facts = prepared.plan, prepared.facts
    # A retry of the flow is not stopped with what it retries.
    job = replace(prepared.job, attempt=uuid.uuid4().hex)
    folder = job.folder
    if prepared.is_complete():
        log.info("%s is complete, nothing to do", folder.uri)
        _publish_tables(request, folder)
        return folder.uri
    done = find_receipts(folder, len(plan.shards))
    pending = [shard for shard in plan.shards if shard.index not in done]
    log.info(
        "%s: %d of %d shards done; recipe %s, %s on %s",
        folder.uri,
        len(done),
        len(plan.shards),
        job.recipe.name,
        facts.dtype,
        facts.device,
    )
    for line in (prepared.other, prepared.doubt):
        if line is not None:
            log.warning("%s", line, extra=IN_PLAN)
    if prepared.logits_bytes is not None:
        log.info("logits will take about %.2f GB", prepared.logits_bytes / 1e9, extra=IN_PLAN)
    if pending and request.workers is None:
        # What is wrong with the model shows once, not shard by shard.
        log.info("%s: %s", folder.uri, shards.load_engine(job).placement)
    prepared.write_plan()
    progress = Done(
        num_shards=len(plan.shards),
        total_bytes=plan.num_bytes,
        shards=len(done),
        bytes=plan.num_bytes - sum(shard.num_bytes for shard in pending),
        documents=sum(receipt.documents for receipt in done.values()),
    )
    failures: list[tuple[Shard, BaseException]] = []
    if pending:
        with (
            metrics.of_run(job.run_key, request.model),
            open_pool(job, request.workers, request.deadline, log) as pool,
            _stop_if_interrupted(pool),
        ):
            with show_progress(progress, log):
                for shard, result in run_all(pool, pending, note_workers=progress.note_workers):
                    if isinstance(result, shards.Unfit):
                        raise RuntimeError(str(result))
                    if isinstance(result, BaseException):
                        failures.append((shard, result))
                        metrics.record_failure()
                    else:
                        progress.shards += 1
                        metrics.record_shard(result)
    if failures:
        shard, error = failures[0]
        raise RuntimeError(
            f"{len(failures)} of {len(plan.shards)} shards failed, the first is shard "
            f"{shard.index}: {one_line(error)}; run again to do them"
        ) from error
    receipts = list(find_receipts(folder, len(plan.shards)).values())
    if len(receipts) != len(plan.shards):
        raise RuntimeError(
            f"{len(plan.shards) - len(receipts)} of {len(plan.shards)} shards are not in place, "
            "though they were scored: is another run writing other bytes here? run again"
        )
    publish(folder, receipts)
    _publish_tables(request, folder)
    try:
        _leave_artifacts(folder, receipts)
    except Exception as error:
        # The run stands, whatever the server has to say.
        log.warning("%s: no artifacts of it: %s", folder.uri, one_line(error))
    if 0 < sum(r.documents for r in receipts) == sum(r.failed for r in receipts):
        log.warning("%s: none of its documents could be scored", folder.uri)
    return folder.uri


def _publish_tables(request: Request, folder: Folder) -> None:
    """Make a complete run part of a catalog's tables, where one is named and it is not there."""
    if request.catalog is None:
        return
    from .catalog import publish_run
    from .run import open_run

    run = open_run(folder.uri, storage_options=folder.options)
    publish_run(run, catalog=request.catalog)


@contextmanager
def _stop_if_interrupted(pool: Pool) -> Iterator[None]:
    """Have the tasks in flight end soon where the block is left by Ctrl-C or a cancellation."""
    try:
        yield
    except BaseException:
        pool.stop()
        raise


def _leave_artifacts(folder: Folder, receipts: Sequence[Receipt]) -> None:
    """What the Prefect UI shows of the run: its shards and where the report lies."""
    create_table_artifact(
        key="shards",
        table=[
            {
                "shard": r.shard,
                "documents": r.documents,
                "failed": r.failed,
                "tokens": r.tokens,
                "seconds": round(r.seconds, 1),
                "tokens/s": round(r.tokens / r.seconds) if r.seconds else 0,
            }
            for r in receipts[:500]
        ],
        description=f"Shards of {folder.uri}",
    )
    create_link_artifact(key="report", link=folder.address(REPORT), link_text="report.html")
