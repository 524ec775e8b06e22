"""Where a filter writes to: a file of ids, or a folder of documents, and whose it is already."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ...engine.records import Document
from ..corpus import CorpusSpec
from ..folder import Folder, endpoint_options
from ..origin import find_corpus, read_documents
from ..run import Run
from .columns import batch
from .cuts import Cuts

ABOUT = ".filter.json"
"""Of a folder of documents: which filter they are of, and once `complete` is true its `parts`.
Hidden, since who reads the folder as a corpus or data set takes all files that are not."""
_METADATA = "logitmill.filter"
_DOCUMENTS_AT_ONCE = 1024

Write = Callable[[int, pa.Table, np.ndarray], None]
"""Is given a shard, its rows and which of them are kept."""


def describe(run: Run, cuts: Cuts) -> dict[str, Any]:
    """What decides a filter's output: the run, and where it cuts, if that is known already."""
    about: dict[str, Any] = {
        "run_key": run.plan["run_key"],
        "score": cuts.score,
        "percentiles": [float(p) for p in cuts.percentiles],
        "by": cuts.by,
        "weight": cuts.weight,
    }
    if cuts.values:
        # JSON has no infinity.
        about["cuts"] = {k: [str(value) for value in v] for k, v in sorted(cuts.values.items())}
    return about


def find_place(
    out: str, about: Mapping[str, Any], *, texts: bool, endpoint_url: str | None
) -> tuple[Folder, str]:
    """The folder that is written to, and the file's name there (none of texts).

    Args:
        about: of the filter, as `describe` has it; what the same filter has left is overwritten.

    Raises:
        ValueError: if it is no such place, cannot be written or holds what is not this filter's.
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
        if folder.size(name) is not None and not _is_of(about, _read_about(folder, name)):
            raise ValueError(
                f"out: {out!r} is there already, and not of this filter; give another name, or "
                "remove it"
            )
        folder.check_writable()
        return folder, name
    if out.endswith(".parquet"):
        raise ValueError(f"out: {out!r} is a file; documents go to a folder, give its name")
    folder = Folder(out, options)
    found = folder.read_json(ABOUT)
    there = {name.strip("/") for name in (*folder.stats(""), *folder.folders())}
    found = found if isinstance(found, dict) else None
    if found is not None and found.keys() >= about.keys():
        # Another filter's, whose parts are gone.
        there -= {ABOUT}
    if there and not _is_of(about, found):
        some = ", ".join(sorted(there)[:2])
        raise ValueError(
            f"out: {out!r} holds something already that is not of this filter ({some}); give "
            "another folder"
        )
    folder.check_writable()
    return folder, ""


def check_texts(run: Run, endpoint_url: str | None) -> None:
    """ValueError for a run whose documents cannot be written again."""
    _content(find_corpus(run.plan, endpoint_url))


class Ids:
    """One file of ids and scores."""

    def __init__(self, run: Run, cuts: Cuts, out: str, endpoint_url: str | None) -> None:
        about = describe(run, cuts)
        self._folder, self._name = find_place(out, about, texts=False, endpoint_url=endpoint_url)
        self._schema = _schema(cuts.score, about)

    @contextmanager
    def open(self) -> Iterator[Write]:
        """What takes the shards; the file is there once all have been taken."""
        with self._folder.scratch() as scratch:
            path = scratch / self._name
            with pq.ParquetWriter(path, self._schema, compression="zstd") as writer:

                def write(shard: int, rows: pa.Table, chosen: np.ndarray) -> None:
                    some = rows.filter(pa.array(chosen)).select(self._schema.names)
                    writer.write_table(some.cast(self._schema))

                yield write
            self._folder.publish(path, self._name)


class Texts:
    """A folder of files of documents, one a shard."""

    def __init__(self, run: Run, cuts: Cuts, out: str, endpoint_url: str | None) -> None:
        self._run, self._spec = run, find_corpus(run.plan, endpoint_url)
        content = _content(self._spec)
        self._column, self._about = content.name, describe(run, cuts)
        self._schema = _schema(cuts.score, self._about, content)
        self._folder, _ = find_place(out, self._about, texts=True, endpoint_url=endpoint_url)

    @contextmanager
    def open(self) -> Iterator[Write]:
        """What takes the shards; those that a killed writer has left are not written again."""
        parts: list[dict[str, Any]] = []
        # A part is put in place whole, and its name and bytes follow from the filter.
        there = {name.strip("/"): size for name, size in self._folder.sizes("").items()}
        if not self._is_whole(there):
            self._folder.write_json(ABOUT, {**self._about, "complete": False})
        with self._folder.scratch() as scratch:

            def write(shard: int, rows: pa.Table, chosen: np.ndarray) -> None:
                name = f"part-{shard:05d}.parquet"
                if name not in there:
                    self._write(scratch / name, shard, rows, chosen)
                    there[name] = self._folder.publish(scratch / name, name).bytes
                    (scratch / name).unlink(missing_ok=True)
                documents = int(chosen.sum())
                parts.append({"name": name, "bytes": there[name], "documents": documents})

            yield write
        self._folder.write_json(ABOUT, {**self._about, "complete": True, "parts": parts})

    def _is_whole(self, there: Mapping[str, int]) -> bool:
        """Whether this filter has completed the folder, and nothing is missing of it."""
        found = self._folder.read_json(ABOUT) or {}
        return (
            _is_of(self._about, found)
            and found["complete"]
            and all(there.get(part["name"]) == part["bytes"] for part in found["parts"])
        )

    def _write(self, path: Path, shard: int, rows: pa.Table, chosen: np.ndarray) -> None:
        with pq.ParquetWriter(path, self._schema, compression="zstd") as writer:
            for some in self._batches(shard, rows, chosen):
                writer.write_batch(some)

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


def _schema(score: str, about: Mapping[str, Any], *more: pa.Field) -> pa.Schema:
    labels = [(name, pa.string()) for name in ("doc_id", "source", "language")]
    schema = pa.schema([*labels, (score, pa.float64()), *more])
    return schema.with_metadata({_METADATA: json.dumps(about, sort_keys=True)})


def _read_about(folder: Folder, name: str) -> dict[str, Any] | None:
    """Of which filter a file is, None if it is of none."""
    try:
        with folder.filesystem.open(folder.path(name), "rb") as file:
            metadata = pq.read_schema(file).metadata or {}
    except (pa.ArrowInvalid, OSError):
        return None
    return json.loads(metadata.get(_METADATA.encode(), b"null"))


def _is_of(about: Mapping[str, Any], found: Mapping[str, Any] | None) -> bool:
    return found is not None and all(found.get(name) == about[name] for name in about)


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
