"""A corpus scored from where it is stored to where its parts are: what all around the engine costs.

Uses the flow's own task runners, tasks and storage, for which Prefect is needed.
"""

from __future__ import annotations

import shutil
import time
import uuid
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from ...engine.pipeline import EngineSettings
from ...engine.recipes import Recipe
from ...engine.records import Document

if TYPE_CHECKING:
    from ..request import Prepared
    from ..store import Receipt

# Documents of a shard that warms a worker up.
_WARM_DOCUMENTS = 60


@dataclass(frozen=True)
class Stored:
    """A pass from texts in storage to parts in storage."""

    seconds: float
    """From the first shard's start to the last one's receipt; engines were loaded before."""
    targets: int
    loglikelihood: float
    device_seconds: float
    """Of all workers."""


class Corpus:
    """Documents' texts as a corpus in a folder of its own, and what is made of it beside it."""

    def __init__(self, root: str, documents: Sequence[Document], endpoint_url: str | None) -> None:
        from ..folder import Folder, endpoint_options

        name = f"bench-{uuid.uuid4().hex[:8]}"
        options = endpoint_options(root, endpoint_url)
        self._folder = Folder(root, options).below(name)
        self._documents = documents
        self._endpoint_url = endpoint_url
        self._runs = count()
        self._largest: Counter[str] = Counter()
        """Bytes of the largest file's texts, as a plan weighs them."""

    def write(self, num_shards: int) -> None:
        """Write as many files as there are to be shards, and a smaller one for each to warm up."""
        per_file = -(-len(self._documents) // num_shards)
        for i in range(num_shards):
            some = self._documents[i * per_file : (i + 1) * per_file]
            self._write("corpus", i, some)
            self._write("warm", i, some[:_WARM_DOCUMENTS])

    def _write(self, which: str, index: int, documents: Sequence[Document]) -> None:
        table = pa.table(
            {
                "id": [document.doc_id for document in documents],
                "text": [document.text for document in documents],
            }
        )
        with self._folder.scratch() as scratch:
            path = Path(scratch, "file")
            pq.write_table(table, path)
            weight = pq.read_metadata(path).row_group(0).column(1).total_uncompressed_size
            self._largest[which] = max(self._largest[which], weight)
            self._folder.publish(path, f"{which}/{index:03d}.parquet")

    def prepare(
        self, which: str, model: Path, recipe: Recipe, engine: EngineSettings, workers: str | None
    ) -> Prepared:
        """A run of the texts, or with `which` "warm" of some of them."""
        from ..corpus import CorpusSpec
        from ..request import Request, prepare

        spec = CorpusSpec(
            uri=f"{self._folder.uri}/{which}",
            text_column="text",
            id_column="id",
            # A file is a shard; small ones may be one together.
            shard_bytes=self._largest[which],
        )
        out = f"{self._folder.uri}/runs-{next(self._runs)}"
        return prepare(
            Request(
                model=str(model),
                corpus=spec,
                out=out,
                recipe=recipe,
                engine=engine,
                workers=workers,
                endpoint_url=self._endpoint_url,
            )
        )

    def remove(self) -> None:
        """Remove the corpus and all that was made of it."""
        if self._folder.is_local:
            shutil.rmtree(self._folder.path(""), ignore_errors=True)
        else:
            self._folder.filesystem.rm(self._folder.path("").rstrip("/"), recursive=True)


def check_stores(stores: Sequence[str], endpoint_url: str | None, processes: Sequence[int]) -> None:
    """ValueError for stores that cannot be written, and for workers that cannot be."""
    from ..cluster import check_workers
    from ..folder import Folder, endpoint_options

    for store in stores:
        Folder(store, endpoint_options(store, endpoint_url)).check_writable()
    for number in processes:
        check_workers(str(number))


@contextmanager
def store_corpus(
    root: str, documents: Sequence[Document], num_shards: int, endpoint_url: str | None
) -> Iterator[Corpus]:
    """The documents as a corpus below `root`, for as long as the block runs."""
    corpus = Corpus(root, documents, endpoint_url)
    try:
        corpus.write(num_shards)
        yield corpus
    finally:
        corpus.remove()


def time_stored(
    corpus: Corpus,
    model: Path,
    recipe: Recipe,
    engine: EngineSettings,
    *,
    processes: int | None,
    repeat: int,
) -> Stored:
    """The fastest of `repeat` passes in this process, or by so many processes of this machine."""
    with ExitStack() as stack:
        workers = None
        if processes is not None:
            workers = stack.enter_context(_start(processes, engine))
        warm = corpus.prepare("warm", model, recipe, engine, workers)
        _carry_out(warm, workers)
        runs = []
        for _ in range(repeat):
            prepared = corpus.prepare("corpus", model, recipe, engine, workers)
            runs.append(_carry_out(prepared, workers))
        if workers is None:
            from .. import shards

            shards.release_engine()
        return min(runs, key=lambda run: run.seconds)


@contextmanager
def _start(processes: int, engine: EngineSettings) -> Iterator[str]:
    """Processes of this machine, once all of them are there."""
    from distributed import Client

    from ..cluster import FIRST_WORKER_SECONDS, start_workers

    on_gpus = engine.resolve_device().type == "cuda"
    with start_workers(str(processes), on_gpus=on_gpus) as address:
        with Client(address, set_as_default=False) as client:
            client.wait_for_workers(processes, timeout=FIRST_WORKER_SECONDS)
        yield address


def _carry_out(prepared: Prepared, workers: str | None) -> Stored:
    """Score all shards of a run as the flow does, and time it; leaves no manifest."""
    from prefect import flow, get_run_logger

    from .. import shards
    from ..runners import open_pool, run_all
    from ..server import use_server

    job = replace(prepared.job, attempt=uuid.uuid4().hex)
    if workers is None:
        shards.load_engine(job)
    prepared.write_plan()

    @flow(name="bench", log_prints=False, validate_parameters=False)
    def score_all() -> tuple[float, list[Receipt]]:
        with open_pool(job, workers, 900.0, get_run_logger()) as pool:
            started = time.perf_counter()
            results: list[Any] = [result for _, result in run_all(pool, prepared.plan.shards)]
            seconds = time.perf_counter() - started
        for result in results:
            if isinstance(result, BaseException):
                raise result
        return seconds, results

    with use_server():
        seconds, receipts = score_all()
    return Stored(
        seconds=seconds,
        targets=sum(receipt.tokens for receipt in receipts),
        loglikelihood=sum(receipt.loglikelihood for receipt in receipts),
        device_seconds=sum(receipt.device_seconds for receipt in receipts),
    )
