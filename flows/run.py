"""Reads a run back: tables, summaries, documents and logits, on any fsspec URI."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from .distributions import check_layout, read_draws, read_top_k
from .folder import Folder, StoreError
from .index import Index, shard_names
from .parts import LOGITS_DTYPES, PartFile, rows_of, schema_of
from .store import MANIFEST, PLAN, REPORT, find_receipts

if TYPE_CHECKING:
    import datasets
    import pandas
    import torch

    from ..engine import Pipeline
    from .distillation import DistillationDataset

# Runs that an error names, and folders that are looked into for one.
_MOST_NAMED, _MOST_SOUGHT = 5, 10


def open_run(
    uri: str,
    *,
    partial: bool = False,
    storage_options: Mapping[str, Any] | None = None,
    field: str = "run",
) -> Run:
    """Open a run's folder, or a folder that holds one run.

    Args:
        uri: `<root>/<run key>`, or `<root>` if there is a single run below it.
        partial: also open a run that is not complete, and read the shards that are.
        storage_options: what fsspec opens the URI with.
        field: the argument that named it, which errors begin with.

    Raises:
        ValueError: if there is no run, more than one, or only an incomplete one.
    """
    folder = Folder(uri, storage_options, field=field)
    found = find_runs(folder)
    if not found:
        raise no_run(folder)
    if len(found) > 1:
        raise several_runs(folder, found)
    return Run(found[0], partial=partial)


def find_runs(folder: Folder) -> list[Folder]:
    """The folder if it is a run's, else those of the runs directly in it, complete or not."""
    if folder.read_json(PLAN) is not None:
        return [folder]
    below = [folder.below(name) for name in folder.folders() if not name.startswith(".")]
    return [run for run in below if run.read_json(PLAN) is not None]


def several_runs(folder: Folder, found: Sequence[Folder]) -> StoreError:
    """What to raise for a place with more runs than one, where one is meant."""
    return StoreError(
        f"{folder.field}: {folder.uri!r} holds {len(found)} runs, name one: {_name(found)}"
    )


def no_run(folder: Folder) -> StoreError:
    """What to raise for a place without a run: what is there instead, and what would work."""
    files, place = folder.filesystem, folder.path("").rstrip("/")
    makes = f"`logitmill score MODEL CORPUS --out {folder.uri}` makes one"
    why = f", no {PLAN} in it or in a folder of it; {makes}"
    try:
        root, slash, _ = folder.uri.rpartition("/")
        around = Folder(root or slash or ".", folder.options, field=folder.field)
        below = [folder.below(name) for name in folder.folders()[:_MOST_SOUGHT]]
        deeper = [
            one.below(name)
            for one in below
            for name in one.folders()[:_MOST_SOUGHT]
            if one.size(f"{name}/{PLAN}") is not None
        ]
        if deeper:
            why = f", but one folder deeper; name one of them: {_name(deeper)}"
        elif files.isfile(place):
            why = ", which is a file; name the folder of a run"
        elif around.size(PLAN) is not None:
            why = f", which is a part of one; name the run: {around.uri}"
        elif not files.exists(place):
            why = f", nor anything else; {makes}"
    except Exception:  # A place that cannot be looked at has no more to say.
        pass
    return StoreError(f"{folder.field}: there is no run in {folder.uri!r}{why}")


def _name(runs: Sequence[Folder]) -> str:
    return ", ".join(run.uri for run in runs[:_MOST_NAMED]) + ", ..." * (len(runs) > _MOST_NAMED)


def not_complete(uri: str, plan: Mapping[str, Any], so_far: str = "") -> str:
    """That a run is not complete, what is known of how far it is, and what does the rest."""
    root = uri.rpartition("/")[0] or "."
    command = ["logitmill", "score", plan["model"]["name"], plan["uri"], "--out", root]
    return (
        f"not complete{so_far}; {shlex.join(command)}, with the options it was begun with, does "
        "the rest"
    )


class Run:
    """A run that was scored. Make one with `open_run`."""

    def __init__(self, folder: Folder, *, partial: bool) -> None:
        self.uri = folder.uri
        """Where the run lies."""
        self.plan: dict[str, Any] = folder.read_json(PLAN) or {}
        """What was to be scored and how: `plan.json`."""
        self.manifest: dict[str, Any] | None = folder.read_json(MANIFEST)
        """What the run is made of: `manifest.json`; None for a partial run."""
        self.folder = folder
        """The run's folder, for what lies beside its tables."""
        if self.manifest is not None:
            names = [part["name"] for part in self.manifest["parts"]]
        elif partial:
            receipts = find_receipts(folder, len(self.plan["corpus"]["shards"]))
            names = [part.name for r in receipts.values() for part in r.parts]
        else:
            raise StoreError(
                f"{folder.field}: {folder.uri!r} is {not_complete(folder.uri, self.plan)}, and "
                "open_run(..., partial=True) reads what there is"
            )
        self._parts: dict[str, list[str]] = {}
        for name in names:
            self._parts.setdefault(name.split("/")[0], []).append(name)
        self._index = Index(self)

    @property
    def tiers(self) -> list[str]:
        """Which tables the run kept."""
        return list(self.plan["tiers"])

    @property
    def report_path(self) -> str:
        """Where the run's report lies."""
        return f"{self.uri}/{REPORT}"

    def table(self, tier: str = "scores", columns: Sequence[str] | None = None) -> pa.Table:
        """Rows of a tier in corpus order: `scores` one a document, `tokens` lists a document.

        Of the other tiers arrays are bytes, for `distributions.read_top_k` and `read_draws`, or as
        infra/guides/tables.md has it; `to_dataset` has lists.

        Raises:
            ValueError: if the run did not keep the tier, or the tier has not the columns.
        """
        tables = [self._read(name, columns) for name in self._names(tier)]
        if not tables:
            schema = schema_of(tier, self.plan["model"]["vocab_size"])
            _check_columns(columns, schema.names)
            empty = schema.empty_table()
            return empty.select(list(columns)) if columns is not None else empty
        return pa.concat_tables(tables)

    def paths(self, tier: str = "scores") -> list[str]:
        """Full paths of a tier's Parquet files, for readers of one's own (DuckDB, Polars)."""
        return [self.folder.address(name) for name in self._names(tier)]

    def to_pandas(
        self, tier: str = "scores", columns: Sequence[str] | None = None
    ) -> pandas.DataFrame:
        """The rows of a tier as a pandas data frame."""
        return self.table(tier, columns).to_pandas()

    def to_dataset(
        self, tier: str = "scores", columns: Sequence[str] | None = None
    ) -> datasets.Dataset:
        """The rows of a tier as a Hugging Face dataset, with columns of its own types.

        Where a tier's table has bytes there are lists, of k candidates a token for instance; the
        columns are those of `features.schema_of_lists`. These tiers are unpacked a row group at a
        time into a file in the cache of `datasets` (`HF_DATASETS_CACHE`), larger than the parts,
        and mapped from there; the next time it is found.

        Raises:
            ValueError: if the run did not keep the tier, or the tier has not the columns.
        """
        import datasets

        from .features import UNPACKED, schema_of_lists, write_lists

        if tier not in UNPACKED:
            return datasets.Dataset(self.table(tier, columns).replace_schema_metadata(None))
        self._names(tier)
        _check_columns(columns, schema_of_lists(self, tier).names)
        return datasets.Dataset.from_file(str(write_lists(self, tier, columns)))

    def summary(self, name: str = "counts") -> pa.Table:
        """A merged summary table: `counts`, `outliers`, or `vocabulary` where it was asked for.

        Only a complete run has them.
        """
        if self.manifest is None:
            raise StoreError(
                f"{self.folder.field}: {self.uri!r} is {not_complete(self.uri, self.plan)}"
            )
        names = [part["name"] for part in self.manifest["summaries"]]
        if f"summary/{name}.parquet" not in names:
            known = ", ".join(n.split("/")[1].split(".")[0] for n in names)
            raise StoreError(f"summary: {name!r} is not one of {known}")
        return self._read(f"summary/{name}.parquet", None)

    def operations(self) -> pa.Table:
        """How each shard was scored, by its receipt: device, seconds, bytes written by tier."""
        from .operations import operations

        num_shards = len(self.plan["corpus"]["shards"])
        return operations(find_receipts(self.folder, num_shards).values())

    def document(self, doc_id: str) -> dict[str, Any]:
        """The document's record, with its arrays by tier: `tokens`, `topk`, `sampled`, `lens`.

        As far as they were kept: `tokens` are its token records, `lens` what they would be by
        layer; the others are as `distributions.read_top_k` and `read_draws` give them, row i that
        of its token record i. A document that was not scored has none.

        Raises:
            KeyError: if the run has no such document.
        """
        shard, row = self.find(doc_id)
        record = self._read(shard_names(self)[shard], None).slice(row, 1).to_pylist()[0]
        if "tokens" in self.tiers:
            tokens = self._rows("tokens", shard, doc_id)
            if len(tokens):
                record["tokens"] = _flatten(tokens.drop_columns(["doc_id"]))
        for tier in ("topk", "sampled"):
            if tier in self.tiers and len(rows := self._rows(tier, shard, doc_id)):
                row = rows.to_pylist()[0]
                top_k = self.plan["top_k"]
                record[tier] = read_top_k(row, top_k) if tier == "topk" else read_draws(row)
        if "lens" in self.tiers and len(rows := self._rows("lens", shard, doc_id)):
            layers = rows["layer"].to_pylist()
            lists = rows.drop_columns(["doc_id", "layer"])
            record["lens"] = {layer: _flatten(lists.slice(i, 1)) for i, layer in enumerate(layers)}
        return record

    def find(self, doc_id: str) -> tuple[int, int]:
        """The shard that a document is of, and its row of the scores there.

        Raises:
            KeyError: if the run has no such document.
        """
        return self._index.find(doc_id)

    def logprobs(self, doc_id: str) -> np.ndarray:
        """Log-probabilities over the vocabulary, [n, V]: row i scored the document's i-th token.

        Nats, in the dtype they were stored in. Needs the tier `logits`.

        Raises:
            KeyError: if the run has no such document.
        """
        return np.concatenate([rows for rows, _ in self._logits(doc_id)])

    def logits(self, doc_id: str) -> np.ndarray:
        """Logits, float32 [n, V]: row i scored the document's i-th scored token.

        With a prefix token in front (the default recipe) these are the rows that `get_logits`
        gives for prefix + document, the last left out, but for the rounding of the
        log-probabilities that they are made of: 4e-6 in float32. Needs the tier `logits`.

        Raises:
            KeyError: if the run has no such document.
        """
        return np.concatenate(
            [rows.astype(np.float32) + lse[:, None] for rows, lse in self._logits(doc_id)]
        )

    def states(self, doc_id: str) -> torch.Tensor:
        """Hidden states after the final norm, [n, D]: row i scored the document's i-th token.

        In the dtype they were scored in. Needs the tier `hidden`.

        Raises:
            KeyError: if the run has no such document.
        """
        import torch

        from .rows import read_states

        self._names("hidden")
        shard, _ = self.find(doc_id)
        with self.open_part(shard_names(self, "hidden")[shard]) as parquet:
            about = {k.decode(): v.decode() for k, v in parquet.schema_arrow.metadata.items()}
        dtype, size = about["logitmill.hidden_dtype"], int(about["logitmill.hidden_size"])
        rows = self._rows("hidden", shard, doc_id)["states"]
        found = [read_states(blob.as_py(), dtype, size) for blob in rows]
        return torch.cat(found) if found else torch.empty(0, size, dtype=getattr(torch, dtype))

    def replay(self, doc_id: str, pipe: Pipeline) -> Iterator[tuple[slice, torch.Tensor]]:
        """(rows, their logits [rows, V] float32) of a document, made of its states, by chunks.

        On the device and software of the run these are the bits that it scored with. Needs the tier
        `hidden`. All of a document at once:

            torch.cat([logits for _, logits in run.replay(doc_id, pipe)])

        Args:
            pipe: the run's model, from `logitmill.engine.pipeline`.

        Raises:
            KeyError: if the run has no such document.
            ValueError: if the model's head is another one than the run's.
        """
        from .examples import check_head

        check_head(self, pipe)
        return pipe.replay(self.states(doc_id))

    def distillation(
        self,
        tier: str = "topk",
        *,
        vocab_size: int,
        tokenizer: str | Path | None = None,
        pipe: Pipeline | None = None,
        context: int | None = None,
        spans: bool = False,
        shuffle_buffer: int = 0,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        check: bool = True,
    ) -> DistillationDataset:
        """A torch `IterableDataset` of inputs and what the model thought follows each.

        Args:
            tier: `topk`, `sampled`, `hidden` or `logits`.
            vocab_size: columns of the student's logits. An id beyond is an error.
            tokenizer: the student's model folder; an error if its tokens are not the run's.
            pipe: the run's model, which makes log-probabilities of the states (`hidden` alone).
            context: cut documents into examples of at most so many inputs; each is a document
                otherwise.
            spans: also give the bytes of the document that each target stands for, by which another
                tokenizer's tokens can be aligned.
            shuffle_buffer: how many examples wait, of which one is drawn at random, with shards in
                a random order; 0 keeps the order of the corpus.
            seed: of the order; `set_epoch` changes it as well.
            rank: which of `world_size` processes this is: each reads other shards.
            world_size: how many there are.
            check: hold every part to its sha256 in the manifest before it is read.

        Raises:
            ValueError: naming what does not fit, now; while it is read, for an id that the student
                does not have, and a part that is not the manifest's.
        """
        from .distillation import DistillationDataset

        return DistillationDataset(
            self,
            tier,
            vocab_size=vocab_size,
            tokenizer=tokenizer,
            pipe=pipe,
            context=context,
            spans=spans,
            shuffle_buffer=shuffle_buffer,
            seed=seed,
            rank=rank,
            world_size=world_size,
            check=check,
        )

    def parts(self, tier: str) -> list[str]:
        """The tier's files below the run's folder, in the order of the corpus.

        Raises:
            ValueError: if the run did not keep the tier.
        """
        return self._names(tier)

    def _logits(self, doc_id: str) -> list[tuple[np.ndarray, np.ndarray]]:
        self._names("logits")
        shard, _ = self.find(doc_id)
        stored = self._rows("logits", shard, doc_id)
        dtype = np.dtype(LOGITS_DTYPES[self.plan["logits_dtype"]]).newbyteorder("<")
        if not len(stored):
            empty = np.zeros((0, self.plan["model"]["vocab_size"]), dtype)
            return [(empty, np.zeros(0, np.float32))]
        return [
            (
                np.frombuffer(row["logprobs"], dtype).reshape(row["num_rows"], -1),
                np.array(row["logsumexp"], np.float32),
            )
            for row in stored.to_pylist()
        ]

    def _rows(self, tier: str, shard: int, doc_id: str) -> pa.Table:
        with self.open_part(shard_names(self, tier)[shard]) as parquet:
            found = list(rows_of(parquet, doc_id))
            return pa.concat_tables(found) if found else parquet.schema_arrow.empty_table()

    def _names(self, tier: str) -> list[str]:
        if tier not in self.tiers:
            kept = ", ".join(self.tiers)
            raise StoreError(f"tier: {tier!r} was not kept by this run, which has {kept}")
        return self._parts.get(tier, [])

    def _read(self, name: str, columns: Sequence[str] | None) -> pa.Table:
        with self.open_part(name) as parquet:
            _check_columns(columns, parquet.schema_arrow.names)
            return parquet.read(list(columns) if columns is not None else None)

    @contextmanager
    def open_part(self, name: str) -> Iterator[PartFile]:
        """A part of the run, by its name below the folder.

        Raises:
            StoreError: if it is not there.
        """
        path = self.folder.path(name)
        # Arrow reads a local file itself, without the copies that Python's files make.
        is_local, files = self.folder.is_local, self.folder.filesystem
        try:
            opened = pa.OSFile(path) if is_local else files.open(path, "rb")
        except FileNotFoundError:
            raise StoreError(
                f"{self.folder.field}: {self.uri!r} lacks {name}, which is a part of it; "
                f"{shlex.join(['logitmill', 'inspect', self.uri, '--verify'])} lists all that is "
                "missing"
            ) from None
        with opened as file:
            part = PartFile(file)
            check_layout(part, name, self.folder, self.plan)
            yield part


def _flatten(lists: pa.Table) -> dict[str, np.ndarray]:
    return {name: lists[name].combine_chunks().flatten().to_numpy() for name in lists.column_names}


def _check_columns(columns: Sequence[str] | None, there: Sequence[str]) -> None:
    """StoreError for a column that is not there: Parquet's reader would leave it out."""
    if isinstance(columns, str):
        raise StoreError(f"columns: {columns!r} is text; give a list, [{columns!r}]")
    given = list(columns or ())
    for i, column in enumerate(given):
        if column not in there:
            raise StoreError(f"columns: {column!r} is not one of {', '.join(there)}")
        if column in given[:i]:
            raise StoreError(f"columns: {column!r} is named twice; name it once")
