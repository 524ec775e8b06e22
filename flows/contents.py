"""What the tables of a shard hold, held to its receipt: rows, sums, and the tokens of each tier."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ..engine.records import NONFINITE, OK, STATISTICS, TOKEN_DTYPES
from .distributions import check_layout
from .folder import Folder
from .parts import BLOBS, PartFile, schema_of
from .publish import read_table
from .store import Receipt
from .summary import STATUS

BLOCK = 4 << 20
"""Bytes that a part is read by."""
TOTALS = ("documents", "failed", "tokens", "bytes")
"""What a receipt counts, and a manifest adds up."""


@dataclass(frozen=True)
class Finding:
    """One thing that does not hold."""

    place: str
    """A file of the run, or what else it is about: a document, the corpus, the model."""
    problem: str

    def __str__(self) -> str:
        return f"{self.place}: {self.problem}"


def hold_rows(
    folder: Folder,
    plan: Mapping[str, Any],
    receipt: Receipt,
    shards: Sequence[Mapping[str, Any]],
) -> Iterator[Finding]:
    """Whether a shard's tables hold the rows and sums that its receipt says."""
    n = f"{receipt.shard:05d}"
    name = f"scores/part-{n}.parquet"
    sums: dict[str, Any] = dict.fromkeys(TOTALS, 0) | {"loglikelihood": 0.0}
    ids: set[str] = set()
    scored: list[tuple[str, int]] = []
    # Rows are kept before it is known that a document's numbers are not finite.
    nonfinite: set[str] = set()
    columns = ["doc_id", "status", "num_tokens_scored", "num_bytes", "loglikelihood"]
    for rows in _row_groups(folder, name, plan["run_key"], columns):
        for doc_id, status, tokens, num_bytes, loglikelihood in zip(
            *(rows[column].to_pylist() for column in columns), strict=True
        ):
            if doc_id in ids:
                yield Finding(name, f"document {doc_id!r} stands in it twice")
            ids.add(doc_id)
            if tokens:
                scored.append((doc_id, tokens))
            if status == NONFINITE:
                nonfinite.add(doc_id)
            sums["documents"] += 1
            sums["failed"] += status != OK
            sums["tokens"] += tokens
            sums["bytes"] += num_bytes
            # In the order of the rows, as it was added up: the sums have the same bits.
            sums["loglikelihood"] += loglikelihood or 0.0
    for total, value in sums.items():
        if getattr(receipt, total) != value:
            yield Finding(
                name,
                f"its rows have {value:,} {total}, its receipt says {getattr(receipt, total):,}",
            )
    planned = shards[receipt.shard]["num_documents"]
    if planned is not None and not plan["recipe"]["concatenate"] and planned != receipt.documents:
        yield Finding(name, f"it has {receipt.documents:,} documents, the plan says {planned:,}")
    if "tokens" in plan["tiers"]:
        name = f"tokens/part-{n}.parquet"
        yield from _hold_documents(name, scored, _count_tokens(folder, name, plan["run_key"]))
    for tier in plan["tiers"]:
        name = f"{tier}/part-{n}.parquet"
        if tier in ("topk", "sampled"):
            yield from _hold_documents(name, scored, _count_arrays(folder, name, plan))
        elif tier == "lens":
            yield from _hold_documents(name, scored, _count_layers(folder, name, plan))
        elif tier in ("hidden", "logits"):
            rows_of = _count_rows(folder, name, plan["run_key"])
            kept = (found for found in rows_of if found[0] not in nonfinite)
            yield from _hold_documents(name, scored, kept)
    counts = read_table(folder, f"shards/{n}.counts.parquet")
    of_status = counts.filter([panel.startswith(STATUS) for panel in counts["panel"].to_pylist()])
    for total in ("documents", "tokens"):
        counted = sum(of_status[total].to_pylist())
        if counted != sums[total]:
            yield Finding(
                f"shards/{n}.counts.parquet", f"it counts {counted:,} {total}, of {sums[total]:,}"
            )


def _hold_documents(
    name: str, scored: Iterable[tuple[str, int]], kept: Iterable[tuple[str, int]]
) -> Iterator[Finding]:
    """Whether a table is of the documents that were scored, in order, with all of their tokens."""
    for wanted, found in zip_longest(scored, kept):
        if wanted == found:
            continue
        there = f"{found[1]:,} tokens of {found[0]!r}" if found else "no document"
        expected = f"{wanted[1]:,} of {wanted[0]!r}" if wanted else "no more"
        yield Finding(name, f"it has {there} where the scores have {expected}")
        return


def _count_tokens(folder: Folder, name: str, run_key: str) -> Iterator[tuple[str, int]]:
    """(doc_id, its tokens) of every row."""
    lists = [column for column in TOKEN_DTYPES if column != "token_id"]
    for rows in _row_groups(folder, name, run_key, ["doc_id", "token_id"], same_length=lists):
        lengths = rows["token_id"].combine_chunks().value_lengths().to_pylist()
        yield from zip(rows["doc_id"].to_pylist(), lengths, strict=True)


def _count_arrays(folder: Folder, name: str, plan: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    """(doc_id, its tokens) of every row.

    Raises:
        ArrowInvalid: if the arrays of a row are not of one length.
        StoreError: if an earlier version has laid them out otherwise.
    """
    tier = name.split("/")[0]
    columns = schema_of(tier, plan["model"]["vocab_size"]).names
    with open_part(folder, name) as file:
        check_layout(PartFile(file), name, folder, plan)
    for rows in _row_groups(folder, name, plan["run_key"], columns):
        sizes = {
            column: pc.binary_length(rows[column]).to_numpy() // BLOBS[column].itemsize
            for column in columns
            if column in BLOBS
        }
        count = rows["num_tokens"].to_numpy()
        # What a row has so many of; of draws that is told by the row itself.
        if tier == "topk":
            most = count * plan["top_k"]
        else:
            most = np.array([int(_add_up(blob.as_buffer())) for blob in rows["num_ids"]])
        for column, size in sizes.items():
            wanted = most if column.startswith(("top_", "id_", "count")) else count
            if (size != wanted).any():
                raise pa.ArrowInvalid(f"{name} has arrays of {column} of another length")
        yield from zip(rows["doc_id"].to_pylist(), count.tolist(), strict=True)


def _count_layers(folder: Folder, name: str, plan: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    """(doc_id, its tokens) of every document, whose rows are those of the layers in their order.

    Raises:
        ArrowInvalid: if rows are missing, or their lists are not of one length.
    """
    layers, lists = plan["layers"], [name for name in STATISTICS if name != "logprob"]
    columns = ["doc_id", "layer", "logprob"]
    for rows in _row_groups(folder, name, plan["run_key"], columns, same_length=lists):
        doc_ids, found = rows["doc_id"].to_pylist(), rows["layer"].to_pylist()
        lengths = rows["logprob"].combine_chunks().value_lengths().to_pylist()
        for i in range(0, len(doc_ids), len(layers)):
            own = slice(i, i + len(layers))
            if found[own] != layers or len({*zip(doc_ids[own], lengths[own], strict=True)}) > 1:
                raise pa.ArrowInvalid(f"{name} has not all layers of {doc_ids[i]!r} in order")
            yield doc_ids[i], lengths[i]


def _add_up(blob: Any) -> int:
    return int(np.frombuffer(blob, BLOBS["num_ids"]).sum(dtype=np.int64))


def _count_rows(folder: Folder, name: str, run_key: str) -> Iterator[tuple[str, int]]:
    """(doc_id, its rows of logits or states), of documents whose rows follow each other."""
    document, count = None, 0
    columns = ["doc_id", "first_row", "num_rows"]
    for rows in _row_groups(folder, name, run_key, columns):
        for doc_id, first, number in zip(*(rows[c].to_pylist() for c in columns), strict=True):
            if first == 0 or doc_id != document:
                if document is not None:
                    yield document, count
                document, count = doc_id, 0
            count += number if first == count else 0
    if document is not None:
        yield document, count


def _row_groups(
    folder: Folder,
    name: str,
    run_key: str,
    columns: Sequence[str],
    *,
    same_length: Sequence[str] = (),
) -> Iterator[pa.Table]:
    """Columns of a part, a row group at a time.

    Raises:
        ArrowInvalid: if it is another run's, or lists of `same_length` do not hold as many values
            as the last of the columns does.
    """
    with open_part(folder, name) as file:
        parquet = PartFile(file)
        stated = (parquet.schema_arrow.metadata or {}).get(b"logitmill.run_key", b"").decode()
        if stated != run_key:
            raise pa.ArrowInvalid(f"{name} is of run {stated!r}, not of {run_key!r}")
        for group in range(parquet.num_row_groups):
            about = parquet.metadata.row_group(group)
            values = {
                column.path_in_schema.split(".")[0]: column.num_values
                for column in map(about.column, range(about.num_columns))
            }
            for other in same_length:
                if values[other] != values[columns[-1]]:
                    raise pa.ArrowInvalid(f"{name} has lists of {other} of another length")
            yield parquet.read_row_group(group, columns=list(columns))


def open_part(folder: Folder, name: str) -> Any:
    """A part's bytes; a block at a time is fetched ahead, where s3fs would fetch 50 MB."""
    return folder.filesystem.open(folder.path(name), "rb", block_size=BLOCK)
