"""The main flow: plan -> shards on GPU tasks -> publish."""

from __future__ import annotations

import importlib.metadata
import json
import logging
import os
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

# Read when prefect is imported: its own embedded server needs longer than the default 20 s on a
# small machine.
os.environ.setdefault("PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS", "180")

from prefect import flow, get_run_logger, task
from prefect.artifacts import create_link_artifact, create_table_artifact
from prefect.cache_policies import NO_CACHE
from prefect.tasks import exponential_backoff

from ..engine.checkpoint import digest, find_model
from ..engine.pipeline import EngineSettings, ModelFacts, Pipeline, inspect_model, load_pipeline
from ..engine.recipes import Recipe, find_recipe
from ..engine.scorer import LogitsSink, prefix_token
from ..engine.tokenization import Tokenizer
from .corpus import CorpusSpec, plan_corpus, read_shard
from .parts import LOGITS_DTYPES, TIERS, LogitsWriter, ScoresWriter, TokensWriter, write_table
from .plan import Plan, Shard
from .progress import TALLY, show_progress
from .publish import publish
from .runners import make_runner, run_all
from .store import MANIFEST, PLAN, Folder, Receipt, find_receipts, hash_json
from .summary import Summary

log = logging.getLogger(__name__)

Tier = Literal["scores", "tokens", "logits"]

_SAMPLE_DOCUMENTS, _SAMPLE_CHARS = 50, 1 << 18


@dataclass(frozen=True)
class Job:
    """All that a task needs to score any shard of a run."""

    folder: Folder
    corpus: CorpusSpec
    model: str
    """Local model folder."""
    engine: EngineSettings
    recipe: Recipe
    tiers: Sequence[str]
    logits_dtype: str
    run_key: str


@flow(name="score-corpus", flow_run_name="{corpus} by {model}", task_runner=make_runner())
def score_corpus(
    model: str,
    corpus: str | CorpusSpec,
    out: str,
    recipe: str | Recipe = "rolling",
    tiers: Sequence[Tier] = ("scores",),
    engine: EngineSettings | None = None,
    limit: int | None = None,
    logits_dtype: Literal["float32", "float16"] = "float32",
    max_logits_bytes: int = 10 * 10**9,
    endpoint_url: str | None = None,
) -> str:
    """Score a corpus with a causal language model and leave the run in storage.

    Running it again with the same arguments resumes: shards that are done are not done again. What
    decides the numbers is hashed into the run's folder name. Credentials for storage come from the
    environment (`AWS_ACCESS_KEY_ID`, ...), never from parameters, which the server stores.

    Args:
        model: a model folder in Hugging Face layout, or a Hub id.
        corpus: files, a folder or a glob on any fsspec URI (Parquet, JSON lines, text, code), a
            Hugging Face dataset (`datasets:NAME`), or a `CorpusSpec` that also names columns.
        out: the folder that runs are kept in, on any fsspec URI: `runs`, `s3://bucket/runs`.
        recipe: `rolling`, `disjoint`, `strided`, `llamacpp`, `truncated`, `conditional`, each with
            an optional context as in `rolling-1024`, or a `Recipe`.
        tiers: what to keep: `scores` (a row a document, always), `tokens` (a record a token),
            `logits` (log-probabilities over the whole vocabulary).
        engine: device, dtype, batch size and memory of the engine.
        limit: at most this many documents, the first in plan order.
        logits_dtype: what log-probabilities of the tier `logits` are stored in.
        max_logits_bytes: refuse to start a run whose `logits` would take more than this.
        endpoint_url: the S3 server to use where it is not Amazon's.

    Returns:
        The URI of the run's folder.

    Raises:
        ValueError: for a mistake in the arguments, the model or the corpus, before any scoring.
        RuntimeError: if shards failed; the others are kept, run again to do the rest.
    """
    run_log = get_run_logger()
    request = Request(
        model=model,
        corpus=corpus,
        out=out,
        recipe=recipe,
        tiers=tuple(tiers),
        engine=engine or EngineSettings(),
        limit=limit,
        logits_dtype=logits_dtype,
        max_logits_bytes=max_logits_bytes,
        endpoint_url=endpoint_url,
    )
    job, plan, facts = prepare(request)
    folder = job.folder
    if is_complete(job, plan):
        run_log.info("%s is complete, nothing to do", folder.uri)
        return folder.uri
    done = find_receipts(folder, len(plan.shards))
    run_log.info(
        "%s: %d shards, %d of them done; recipe %s, %s on %s",
        folder.uri,
        len(plan.shards),
        len(done),
        job.recipe.name,
        facts.dtype,
        facts.device,
    )
    pending = [shard for shard in plan.shards if shard.index not in done]
    done_bytes = sum(shard.num_bytes for shard in plan.shards if shard.index in done)
    failures: list[tuple[Shard, BaseException]] = []
    with show_progress(plan.num_bytes, done_bytes):
        for shard, result in run_all(lambda s: score_shard.submit(job, s), pending):
            if isinstance(result, BaseException):
                failures.append((shard, result))
    if failures:
        shard, error = failures[0]
        raise RuntimeError(
            f"{len(failures)} of {len(plan.shards)} shards failed, the first is shard "
            f"{shard.index}: {error}; run again to do them"
        ) from error
    receipts = find_receipts(folder, len(plan.shards))
    publish(folder, [receipts[shard.index] for shard in plan.shards])
    _leave_artifacts(folder, list(receipts.values()))
    return folder.uri


@task(
    name="score-shard",
    task_run_name="shard-{shard.index}",
    retries=2,
    retry_delay_seconds=exponential_backoff(backoff_factor=10),
    retry_condition_fn=lambda task, run, state: (
        not isinstance(state.result(raise_on_failure=False), ValueError)
    ),
    cache_policy=NO_CACHE,
    persist_result=False,
)
def score_shard(job: Job, shard: Shard) -> int:
    """Score one shard, leave its parts and its receipt; returns the number of documents."""
    started = time.monotonic()
    pipe = load_engine(job.model, job.engine)
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
            logits = LogitsWriter(scratch / "logits", metadata, dtype=job.logits_dtype)
            writers.append(logits)
            on_logits = logits.add_rows
        writers.append(ScoresWriter(scratch / "scores", metadata))
        documents = read_shard(job.corpus, shard)
        for score in pipe.score(documents, recipe=job.recipe, on_logits=on_logits):
            record = score.record
            for writer in writers:
                writer.add(score)
            summary.add(score)
            counts["documents"] += 1
            counts["failed"] += record.status != "ok"
            counts["tokens"] += record.num_tokens_scored
            counts["bytes"] += record.num_bytes
            loglikelihood += record.loglikelihood or 0.0
            TALLY.add(num_bytes=record.num_bytes, tokens=record.num_tokens_scored)
        parts = []
        for writer in writers:
            writer.close()
            part_name = f"{writer.tier}/part-{name}.parquet"
            parts.append(job.folder.publish(scratch / writer.tier, part_name))
        for table_name, table in (("counts", summary.counts()), ("outliers", summary.outliers())):
            write_table(table, scratch / table_name)
            part_name = f"shards/{name}.{table_name}.parquet"
            parts.append(job.folder.publish(scratch / table_name, part_name))
    Receipt(
        shard=shard.index,
        parts=tuple(parts),
        loglikelihood=loglikelihood,
        seconds=time.monotonic() - started,
        device=pipe.device_name,
        versions=versions(),
        **counts,
    ).write(job.folder)
    return counts["documents"]


@dataclass(frozen=True, kw_only=True)
class Request:
    """The arguments of `score_corpus`, as they were given."""

    model: str
    corpus: str | CorpusSpec
    out: str
    recipe: str | Recipe = "rolling"
    tiers: tuple[str, ...] = ("scores",)
    engine: EngineSettings = field(default_factory=EngineSettings)
    limit: int | None = None
    logits_dtype: str = "float32"
    max_logits_bytes: int = 10 * 10**9
    endpoint_url: str | None = None


_prepared: dict[Request, tuple[Job, Plan, ModelFacts]] = {}


def prepare_ahead(request: Request) -> tuple[Job, Plan, ModelFacts]:
    """`prepare` now what the flow will ask for once: mistakes show before any server is up."""
    _prepared[request] = _prepare(request)
    return _prepared[request]


def prepare(request: Request) -> tuple[Job, Plan, ModelFacts]:
    """Check everything that can be checked before scoring, and write the plan.

    Raises:
        ValueError: naming the field, its value and what would work.
    """
    return _prepared.pop(request, None) or _prepare(request)


def _prepare(request: Request) -> tuple[Job, Plan, ModelFacts]:
    engine, endpoint_url, logits_dtype = request.engine, request.endpoint_url, request.logits_dtype
    tiers = _check_tiers(request.tiers)
    if logits_dtype not in LOGITS_DTYPES:
        raise ValueError(f"logits_dtype: {logits_dtype!r} is not one of {', '.join(LOGITS_DTYPES)}")
    root = Folder(request.out, _options(request.out, endpoint_url))
    root.check_writable()
    model_folder = find_model(request.model)
    facts = inspect_model(model_folder, engine)
    corpus = request.corpus
    spec = CorpusSpec(uri=corpus) if isinstance(corpus, str) else corpus
    spec = replace(
        spec, storage_options={**_options(spec.uri, endpoint_url), **spec.storage_options}
    )
    if request.limit is not None:
        spec = replace(spec, limit=request.limit)
    chosen = find_recipe(request.recipe).resolve(facts.max_positions)
    tokenizer = load_tokenizer(model_folder, engine.trust_remote_code)
    if tokenizer is None and spec.ids_column is None:
        raise ValueError(
            f"tokenizer: the model folder {model_folder} has none, so text cannot be scored; add "
            "its tokenizer.json or score a column of token ids (ids_column)"
        )
    prefix_token(chosen, tokenizer)
    if chosen.name == "conditional" and spec.context_column is None:
        raise ValueError("context_column: None, but the recipe conditional needs a column")
    if chosen.concatenate:
        # One stream is one document, so it is one shard.
        spec = replace(spec, shard_bytes=1 << 60)
    plan = plan_corpus(spec)
    if "logits" in tiers:
        limit = request.max_logits_bytes
        _check_size(spec, plan, tokenizer, facts.vocab_size, logits_dtype, limit)
    model_digest = digest(model_folder)
    described: dict[str, Any] = {
        "format": 1,
        "model": {
            "name": request.model,
            "digest": model_digest,
            "architecture": facts.architecture,
            "vocab_size": facts.vocab_size,
        },
        "engine": {
            "dtype": facts.dtype,
            "device": facts.device,
            "logits_memory": engine.logits_memory,
            "logitmill": importlib.metadata.version("logitmill"),
        },
        "recipe": asdict(chosen),
        "recipe_hash": chosen.hash,
        "tiers": tiers,
        "logits_dtype": logits_dtype,
        "shard_bytes": spec.shard_bytes,
    }
    # The same model under another name gives the same numbers.
    decisive = {**described, "model": facts.architecture, "digest": model_digest}
    run_key = hash_json({**decisive, "corpus": plan.fingerprint})[:16]
    folder = root.below(run_key)
    if folder.size(PLAN) is None:
        folder.write_json(
            PLAN, {**described, "run_key": run_key, "uri": spec.uri, "corpus": plan.to_dict()}
        )
    job = Job(folder, spec, str(model_folder), engine, chosen, tiers, logits_dtype, run_key)
    return job, plan, facts


def is_complete(job: Job, plan: Plan) -> bool:
    """Whether the run stands: its manifest is there, and every part that its receipts name."""
    if job.folder.size(MANIFEST) is None:
        return False
    return len(find_receipts(job.folder, len(plan.shards))) == len(plan.shards)


_engine_lock = threading.Lock()


def load_engine(model: str, settings: EngineSettings) -> Pipeline:
    """The engine of this process: loaded once, kept between shards."""
    with _engine_lock:
        return _load_engine(model, settings)


@lru_cache(maxsize=1)
def _load_engine(model: str, settings: EngineSettings) -> Pipeline:
    return load_pipeline(Path(model), settings)


@lru_cache(maxsize=1)
def load_tokenizer(folder: Path, trust_remote_code: bool) -> Tokenizer | None:
    """The tokenizer of a model folder, None where there is none."""
    return Tokenizer.load(folder, trust_remote_code=trust_remote_code)


def versions() -> dict[str, str]:
    """Versions of what the numbers come from."""
    return {
        name: importlib.metadata.version(name) for name in ("logitmill", "torch", "transformers")
    }


def _check_tiers(tiers: Sequence[str]) -> list[str]:
    """The tiers in their own order, `scores` always among them."""
    unknown = [tier for tier in tiers if tier not in TIERS]
    if unknown:
        raise ValueError(f"tiers: {unknown[0]!r} is not one of {', '.join(TIERS)}")
    return [tier for tier in TIERS if tier == "scores" or tier in tiers]


def _check_size(
    spec: CorpusSpec,
    plan: Plan,
    tokenizer: Tokenizer | None,
    vocab_size: int,
    logits_dtype: str,
    limit: int,
) -> None:
    """Say what the logits of the corpus would take, from a sample of its documents.

    Raises:
        ValueError: if that is more than `limit` bytes.
    """
    tokens, sampled = 0, 0
    shard = plan.shards[0]
    for i, document in enumerate(read_shard(spec, shard)):
        if i >= _SAMPLE_DOCUMENTS or sampled >= _SAMPLE_CHARS:
            break
        if document.input_ids is not None:
            tokens += len(document.input_ids)
            sampled += 8 * len(document.input_ids)
        elif document.text is not None and tokenizer is not None:
            text = document.text[:_SAMPLE_CHARS]
            tokens += len(tokenizer.encode([text])[0].ids)
            sampled += len(text.encode())
    per_byte = tokens / sampled if sampled else 0.25
    width = 2 if logits_dtype == "float16" else 4
    expected = int(plan.num_bytes * per_byte * vocab_size * width)
    log.info("logits will take about %.1f GB", expected / 1e9)
    if expected > limit:
        raise ValueError(
            f"max_logits_bytes: {limit / 1e9:.1f} GB is less than the {expected / 1e9:.1f} GB that "
            f"the logits of about {int(plan.num_bytes * per_byte):,} tokens take; raise it to "
            "confirm, score fewer documents (limit), or keep tokens instead"
        )


def _options(uri: str, endpoint_url: str | None) -> Mapping[str, Any]:
    if endpoint_url is not None and uri.startswith(("s3://", "s3a://")):
        return {"endpoint_url": endpoint_url}
    return {}


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
    create_link_artifact(
        key="report", link=f"{folder.filesystem.unstrip_protocol(folder.path('report.html'))}"
    )
