"""The flow for days gone by: `score_corpus` for each date of a range, one after another."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from prefect import Flow, get_run_logger, tags
from prefect.runtime import flow_run
from prefect.utilities.callables import get_call_parameters

from ..engine.pipeline import EngineSettings
from ..engine.recipes import Recipe
from .corpus import CorpusSpec
from .corpus.locations import Location
from .folder import endpoint_options, one_line
from .parameters import complete_schema
from .score import Tier, score_corpus
from .server import use_server


class _BackfillFlow(Flow[..., list[str]]):
    """A flow that brings its own server where none is set up, and tells it no credentials."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        complete_schema(self.parameters)

    def __call__(self, *args: Any, **options: Any) -> Any:
        given = {k: v for k, v in options.items() if k not in ("return_state", "wait_for")}
        corpus = get_call_parameters(self.fn, args, given)["corpus"]
        if isinstance(corpus, CorpusSpec) and corpus.storage_options:
            raise ValueError(
                "corpus: storage_options would be shown by the server; what opens the corpus of a "
                "backfill comes from the environment"
            )
        with use_server():
            return super().__call__(*args, **options)


# Days have the retries that Prefect's settings give every flow; the whole has none of its own.
@partial(_BackfillFlow, name="backfill", retries=0)
def backfill(
    model: str,
    corpus: str | CorpusSpec,
    out: str,
    first: datetime.date,
    last: datetime.date,
    recipe: str | Recipe = "rolling",
    tiers: Sequence[Tier] = ("scores",),
    engine: EngineSettings | None = None,
    endpoint_url: str | None = None,
    workers: str | None = None,
    deadline: float = 900.0,
) -> list[str]:
    """Score a corpus that lies in a folder a day, each day as a run of its own.

    A day without files is skipped, a day that is scored already costs nothing, and one that fails
    does not keep the next from being scored. Running it again does what is missing.

    Args:
        model: a model folder in Hugging Face layout, the URI of one (`s3://bucket/model/`), or a
            Hub id.
        corpus: as for `score_corpus`, with the day's place in it: `s3://web/date={date}/*.parquet`,
            or `s3://web/{date:%Y/%m/%d}/*.parquet` for other ways to write it.
        out: the folder that runs are kept in, on any fsspec URI: `runs`, `s3://bucket/runs`.
        first: the first day.
        last: the last day, which is scored too.
        recipe: as for `score_corpus`.
        tiers: what to keep, as for `score_corpus`.
        engine: device, dtype, batch size and memory of the engine.
        endpoint_url: the S3 server to use where it is not Amazon's.
        workers: where shards are scored: by default in this process; `gpus`, a number, or
            `tcp://host:8786`, as for `score_corpus`.
        deadline: seconds without progress after which a worker is taken for hung.

    Returns:
        The URIs of the runs, by day.

    Raises:
        ValueError: for a range without days, or a corpus without `{date}`.
        RuntimeError: naming the days that failed, once all others are scored.
    """
    log = get_run_logger()
    spec = CorpusSpec(uri=corpus) if isinstance(corpus, str) else corpus
    if first > last:
        raise ValueError(f"first: {first} is after last, {last}; give the earlier day first")
    if _uri_of(spec.uri, first) == _uri_of(spec.uri, first + datetime.timedelta(1)):
        raise ValueError(f"corpus: {spec.uri!r} is the same on all days; put {{date}} into it")
    runs, failed = [], {}
    days = [first + datetime.timedelta(i) for i in range((last - first).days + 1)]
    for day in days:
        uri = _uri_of(spec.uri, day)
        try:
            if not _has_files(uri, endpoint_url):
                log.info("%s is skipped: no files at %s", day, uri)
                continue
            with tags(*flow_run.tags):
                run = score_corpus(
                    model=model,
                    corpus=replace(spec, uri=uri),
                    out=out,
                    recipe=recipe,
                    tiers=tiers,
                    engine=engine,
                    endpoint_url=endpoint_url,
                    workers=workers,
                    deadline=deadline,
                )
        except Exception as error:
            failed[day] = one_line(error)
            log.error("%s failed: %s", day, failed[day])
        else:
            log.info("%s is scored: %s", day, run)
            runs.append(run)
    if failed:
        named = "; ".join(f"{day} ({why})" for day, why in failed.items())
        raise RuntimeError(
            f"{len(failed)} of {len(days)} days failed: {named}; run again to do them"
        )
    return runs


def _uri_of(template: str, day: datetime.date) -> str:
    try:
        return template.format(date=day)
    except (LookupError, ValueError, AttributeError):
        raise ValueError(
            f"corpus: {template!r} cannot be written for a day; its one field in braces is "
            "{date}, or {date:%Y/%m/%d} with a format of strftime"
        ) from None


def _has_files(uri: str, endpoint_url: str | None) -> bool:
    location = Location(uri, endpoint_options(uri, endpoint_url))
    with location.plain_errors("listed"):
        return any(location.fs.find(path) for path in location.fs.glob(location.path))
