"""What parts hold: bytes that follow from the rows, and no more of them than were allowed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from logitmill.flows import parts, rows
from logitmill.flows.rows import LogitsWriter, TooManyLogits

VOCABULARY = 16


def rows_of(length: int, dtype: str, seed: int) -> tuple[np.ndarray, np.ndarray]:
    made = np.random.default_rng(seed)
    return made.normal(size=(length, VOCABULARY)).astype(dtype), made.normal(size=length)


def write(path: Path, lengths: Sequence[int], cuts: Sequence[int], dtype: str) -> bytes:
    """Documents of some lengths, handed over in one array that is overwritten, cut after `cuts`."""
    writer = LogitsWriter(path, {"run_key": "k"}, dtype=dtype)
    writer.room = 1 << 30
    for index, length in enumerate(lengths):
        logprobs, logsumexp = rows_of(length, dtype, index)
        room, sums = np.empty_like(logprobs), np.empty_like(logsumexp)
        for start, stop in pairwise(sorted({0, *(c for c in cuts if c < length), length})):
            count = stop - start
            room[:count], sums[:count] = logprobs[start:stop], logsumexp[start:stop]
            writer.add_rows(index, f"doc{index}", start, room[:count], sums[:count])
            room[:], sums[:] = np.nan, np.nan
    writer.close()
    return path.read_bytes()


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_rows_are_stored_alike_however_they_come(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    monkeypatch.setattr(rows, "_GROUP_BYTES", 7 * VOCABULARY * np.dtype(dtype).itemsize)
    lengths = (20, 1, 7, 14, 3)
    whole = write(tmp_path / "whole", lengths, [], dtype)
    for i, cuts in enumerate(([1], [7], [5, 6, 13], range(1, 20))):
        assert write(tmp_path / str(i), lengths, cuts, dtype) == whole, cuts
    stored = pq.read_table(tmp_path / "whole").to_pylist()
    assert [(row["doc_id"], row["first_row"], row["num_rows"]) for row in stored] == [
        ("doc0", 0, 7),
        ("doc0", 7, 7),
        ("doc0", 14, 6),
        ("doc1", 0, 1),
        ("doc2", 0, 7),
        ("doc3", 0, 7),
        ("doc3", 7, 7),
        ("doc4", 0, 3),
    ]
    for index in range(len(lengths)):
        logprobs, logsumexp = rows_of(lengths[index], dtype, index)
        own = [row for row in stored if row["doc_id"] == f"doc{index}"]
        assert b"".join(row["logprobs"] for row in own) == logprobs.tobytes()
        sums = np.concatenate([row["logsumexp"] for row in own])
        np.testing.assert_array_equal(sums, logsumexp.astype(np.float32))


def test_no_more_than_was_allowed_is_kept(tmp_path: Path) -> None:
    row_bytes = VOCABULARY * 2
    writer = LogitsWriter(tmp_path / "part", {}, dtype="float16")
    writer.room = 10 * row_bytes
    values, sums = rows_of(5, "float16", 0)
    writer.add_rows(0, "a", 0, values, sums)
    writer.add_rows(0, "a", 5, values, sums)
    with pytest.raises(TooManyLogits, match="max_logits_bytes: it is used up within document 'b'"):
        writer.add_rows(1, "b", 0, values[:1], sums[:1])


def test_a_table_comes_back_as_it_was_from_equal_bytes(tmp_path: Path) -> None:
    table = pa.table(
        {
            "text": ["a", None, "b", "a"],
            "length": pa.array([-1, 0, 1, 127], pa.int8()),
            "bin": pa.array([-(2**31), -1, 5, 2**31 - 1], pa.int32()),
            "count": pa.array([0, 1, None, 2**62], pa.int64()),
            "sum": [0.5, math.nan, None, -math.inf],
            "is_so": [True, None, False, True],
            "pieces": pa.array([["a", None], None, [], ["b"]], pa.list_(pa.string())),
            "logprob": pa.array([[0.5], None, [], [1.5, None]], pa.list_(pa.float32())),
            "rank": pa.array([[1], None, [], [2, None]], pa.list_(pa.int32())),
        }
    )
    for n, same in enumerate((table, pa.concat_tables([table.slice(0, 1), table.slice(1)]))):
        parts.write_table(same, tmp_path / str(n))
    assert (tmp_path / "0").read_bytes() == (tmp_path / "1").read_bytes()
    found = pq.read_table(tmp_path / "0")
    assert found.schema == table.schema
    assert found.to_pylist()[0] == table.to_pylist()[0]
    assert found.drop_columns(["sum"]).equals(table.drop_columns(["sum"]))
    duckdb = pytest.importorskip("duckdb")
    first = duckdb.sql(
        f"SELECT text, bin, logprob FROM read_parquet('{tmp_path / '0'}')"
    ).fetchall()[0]
    assert first == ("a", -(2**31), [0.5])
