"""A corpus cut down to the documents that a filter keeps: their ids, or their texts again."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ...engine.records import Document
from ..corpus import CorpusSpec
from ..folder import Folder, endpoint_options
from ..origin import find_corpus, read_documents, shard_names
from ..run import Run
from .columns import batch
from .cuts import Cuts, check_documents, group_scores

_DOCUMENTS_AT_ONCE = 1024

_Write = Callable[[int, pa.Table, np.ndarray], None]
# Is given a shard, its rows and which of them are kept.


@dataclass
class Tally:
    """Documents, and the bytes of their scored text."""

    documents: int = 0
    bytes: int = 0
    kept_documents: int = 0
    kept_bytes: int = 0

    def add(self, num_bytes: np.ndarray, kept: np.ndarray) -> None:
        """Count documents."""
        self.documents += len(kept)
        self.bytes += int(num_bytes.sum())
        self.kept_documents += int(kept.sum())
        self.kept_bytes += int(num_bytes[kept].sum())


@dataclass
class Kept:
    """What was kept."""

    total: Tally = field(default_factory=Tally)
    groups: dict[str, Tally] = field(default_factory=dict)
    """By language or source, as the cuts are."""
    no_score: int = 0
    """Documents without the score, which were not kept."""


def write_kept(
    run: Run,
    cuts: Cuts,
    out: str | None,
    *,
    texts: bool = False,
    endpoint_url: str | None = None,
    on_progress: Callable[[int, int], object] = lambda done, total: None,
) -> Kept:
    """Write the documents from the first of two cuts on and below the second.

    Args:
        out: a Parquet file, on any fsspec URI, of `doc_id, source, language, <score>`; with `texts`
            a folder, which gets a Parquet file `part-00017.parquet` a shard of the run that
            documents are kept of, with the same and `text` (`input_ids` of a corpus of ids). None
            counts what would be kept.
        texts: read the documents from the corpus again, and write them too.
        endpoint_url: the S3 server of corpus and output where it is not Amazon's.
        on_progress: is told how many shards of how many are done.

    Raises:
        ValueError: if the output is no such place, or holds files already, or the corpus is not
            what was scored.
    """
    check_documents(run)
    if len(cuts.percentiles) != 2:
        raise ValueError(f"cuts: {len(cuts.percentiles)} are not two, between which to keep")
    opened: AbstractContextManager[_Write] = nullcontext(lambda shard, rows, chosen: None)
    if out is not None:
        writer = _Texts(run, cuts, out, endpoint_url) if texts else _Ids(cuts, out, endpoint_url)
        opened = writer.open()
    kept, names = Kept(), shard_names(run)
    with opened as write:
        for done, (shard, name) in enumerate(names.items()):
            rows = _read(run, name, cuts)
            places = cuts.place(*group_scores(rows, cuts))
            chosen = places == 1
            _count(kept, rows, cuts, chosen)
            if chosen.any():
                write(shard, rows, chosen)
            on_progress(done + 1, len(names))
    return kept


def find_place(out: str, *, texts: bool, endpoint_url: str | None) -> tuple[Folder, str]:
    """The folder that is written to, and the file's name there (none of texts).

    Raises:
        ValueError: if it is no such place, cannot be written or holds texts already.
    """
    options = endpoint_options(out, endpoint_url)
    if not texts:
        parent, slash, name = out.rpartition("/")
        if not name.endswith(".parquet"):
            raise ValueError(
                f"out: {out!r} is no Parquet file; give a name as kept.parquet, or a folder with "
                "--text"
            )
        folder = Folder(parent or ("/" if slash else "."), options)
        folder.check_writable()
        return folder, name
    if out.endswith(".parquet"):
        raise ValueError(f"out: {out!r} is a file; documents go to a folder, give its name")
    folder = Folder(out, options)
    there = sum(name.endswith(".parquet") for name in folder.stats(""))
    if there:
        raise ValueError(f"out: {out!r} holds {there:,} Parquet files already; give another folder")
    folder.check_writable()
    return folder, ""


def check_texts(run: Run, endpoint_url: str | None) -> None:
    """ValueError for a run whose documents cannot be written again."""
    _content(find_corpus(run.plan, endpoint_url))


def _read(run: Run, name: str, cuts: Cuts) -> pa.Table:
    columns = ["doc_id", "source", "language", "status", "num_bytes", cuts.score]
    with run.folder.filesystem.open(run.folder.path(name), "rb") as file:
        return pq.ParquetFile(file).read(columns, use_threads=False)


def _count(kept: Kept, rows: pa.Table, cuts: Cuts, chosen: np.ndarray) -> None:
    groups, scores = group_scores(rows, cuts)
    there, num_bytes = ~np.isnan(scores), rows["num_bytes"].to_numpy()
    kept.no_score += int((~there).sum())
    kept.total.add(num_bytes[there], chosen[there])
    for group in np.unique(groups[there].astype(str)).tolist():
        own = there & (groups == group)
        kept.groups.setdefault(group, Tally()).add(num_bytes[own], chosen[own])


def _schema(cuts: Cuts, *more: pa.Field) -> pa.Schema:
    labels = [(name, pa.string()) for name in ("doc_id", "source", "language")]
    ends = {group: values for group, values in sorted(cuts.values.items())}
    said = {
        "score": cuts.score,
        "percentiles": cuts.percentiles,
        "by": cuts.by,
        "weight": cuts.weight,
        # JSON has no infinity.
        "cuts": {group: [str(value) for value in values] for group, values in ends.items()},
    }
    schema = pa.schema([*labels, (cuts.score, pa.float64()), *more])
    return schema.with_metadata({"logitmill.filter": json.dumps(said, sort_keys=True)})


class _Ids:
    """One file of ids and scores."""

    def __init__(self, cuts: Cuts, out: str, endpoint_url: str | None) -> None:
        self._folder, self._name = find_place(out, texts=False, endpoint_url=endpoint_url)
        self._schema = _schema(cuts)

    @contextmanager
    def open(self) -> Iterator[_Write]:
        with self._folder.scratch() as scratch:
            path = scratch / self._name
            with pq.ParquetWriter(path, self._schema, compression="zstd") as writer:

                def write(shard: int, rows: pa.Table, chosen: np.ndarray) -> None:
                    some = rows.filter(pa.array(chosen)).select(self._schema.names)
                    writer.write_table(some.cast(self._schema))

                yield write
            self._folder.publish(path, self._name)


class _Texts:
    """A folder of files of documents, one a shard."""

    def __init__(self, run: Run, cuts: Cuts, out: str, endpoint_url: str | None) -> None:
        self._run, self._spec = run, find_corpus(run.plan, endpoint_url)
        content = _content(self._spec)
        self._column = content.name
        self._schema = _schema(cuts, content)
        self._folder, _ = find_place(out, texts=True, endpoint_url=endpoint_url)

    @contextmanager
    def open(self) -> Iterator[_Write]:
        with self._folder.scratch() as scratch:

            def write(shard: int, rows: pa.Table, chosen: np.ndarray) -> None:
                path = scratch / f"part-{shard:05d}.parquet"
                with pq.ParquetWriter(path, self._schema, compression="zstd") as writer:
                    for some in self._batches(shard, rows, chosen):
                        writer.write_batch(some)
                self._folder.publish(path, path.name)

            yield write

    def _batches(self, shard: int, rows: pa.Table, chosen: np.ndarray) -> Iterator[pa.RecordBatch]:
        """The chosen documents of a shard, with their scores."""
        places: list[int] = []
        contents: list[object] = []
        ids = rows["doc_id"].to_pylist()
        documents = read_documents(self._run, self._spec, [shard])
        for place, document in enumerate(documents):
            if place >= len(ids) or document.doc_id != ids[place]:
                raise ValueError(
                    f"corpus: document {document.doc_id!r} of shard {shard} is not what the run "
                    "has in its place"
                )
            if not chosen[place]:
                continue
            places.append(place)
            contents.append(_take(document, self._column))
            if len(places) == _DOCUMENTS_AT_ONCE:
                yield self._batch(rows, places, contents)
                places, contents = [], []
        if places:
            yield self._batch(rows, places, contents)

    def _batch(self, rows: pa.Table, places: list[int], contents: list[object]) -> pa.RecordBatch:
        some = rows.take(pa.array(places))
        columns = [some[name] for name in self._schema.names[:-1]]
        last = pa.array(contents, self._schema.field(self._column).type)
        return batch(self._schema, *columns, last)


def _content(spec: CorpusSpec) -> pa.Field:
    """The column that documents' contents go to.

    Raises:
        ValueError: for chat messages, which have columns of their own.
    """
    if spec.messages_column is not None:
        raise ValueError(
            f"text: the corpus holds chat messages ({spec.messages_column!r}), which are not "
            "written again; leave --text out and choose them by their doc_id"
        )
    if spec.ids_column is not None:
        return pa.field("input_ids", pa.list_(pa.int32()))
    return pa.field("text", pa.string())


def _take(document: Document, column: str) -> object:
    return document.text if column == "text" else document.input_ids
