"""Reading a run back."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import duckdb
import pyarrow.parquet as pq
import pytest
import s3fs
from flow_helpers import note_reads
from logitmill.flows import Run, index, open_run
from logitmill.flows.folder import Folder
from logitmill.flows.index import shard_names
from logitmill.flows.store import find_receipts


def test_a_run_opens_by_its_root_too(finished: Run) -> None:
    assert open_run(str(Path(finished.uri).parent)).uri == finished.uri


def test_no_run_is_an_error_that_names_the_place(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"run: there is no run in '{tmp_path}'"):
        open_run(str(tmp_path))
    with pytest.raises(ValueError, match=r"there is no run in .*, nor anything else; `logitmill"):
        open_run(str(tmp_path / "nowhere"))


def test_a_place_beside_a_run_leads_to_it(finished: Run, tmp_path: Path) -> None:
    for name in ("a", "b"):
        shutil.copytree(finished.uri, tmp_path / "runs" / name)
    for place, said in (
        (tmp_path, f"one folder deeper; name one of them: {tmp_path}/runs/a, {tmp_path}/runs/b"),
        (tmp_path / "runs/a/plan.json", "a file; name the folder of a run"),
        (tmp_path / "runs/a/scores", f"a part of one; name the run: {tmp_path}/runs/a"),
    ):
        with pytest.raises(ValueError, match=f"there is no run in .*{said}"):
            open_run(str(place))


def test_several_runs_are_named(finished: Run, tmp_path: Path) -> None:
    for name in ("a", "b"):
        shutil.copytree(finished.uri, tmp_path / name)
    with pytest.raises(ValueError, match=f"holds 2 runs, name one: {tmp_path}/a, {tmp_path}/b"):
        open_run(str(tmp_path))


def test_an_incomplete_run_opens_only_as_partial(finished: Run, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(finished.uri, tmp_path / "copy"))
    (copy / "manifest.json").unlink()
    (copy / "shards/00001.json").unlink()
    with pytest.raises(ValueError, match=r"is not complete; logitmill score .*partial=True"):
        open_run(str(copy))
    run = open_run(str(copy), partial=True)
    left_out = finished.paths()[1]
    (missing,) = {Path(p).name for p in finished.paths()} - {Path(p).name for p in run.paths()}
    assert missing == Path(left_out).name
    assert 0 < run.table().num_rows < finished.table().num_rows
    assert run.document(run.table().column("doc_id")[-1].as_py())["status"] == "ok"
    with pytest.raises(ValueError, match="is not complete"):
        run.summary()
    for receipt in copy.glob("shards/*.json"):
        receipt.unlink()
    empty = open_run(str(copy), partial=True).table(columns=["doc_id"])
    assert (empty.num_rows, empty.column_names) == (0, ["doc_id"])
    with pytest.raises(ValueError, match=r"columns: 'nope' is not one of doc_id, "):
        open_run(str(copy), partial=True).table(columns=["nope"])


def test_tables_go_to_pandas_datasets_and_duckdb(finished: Run) -> None:
    table = finished.table()
    frame = finished.to_pandas(columns=["doc_id", "loglikelihood"])
    assert list(frame.columns) == ["doc_id", "loglikelihood"]
    assert frame.loglikelihood.tolist() == table.column("loglikelihood").to_pylist()
    dataset = finished.to_dataset("tokens", ["doc_id", "logprob"])
    assert dataset[0]["logprob"] == table_row(finished, 0)
    paths = [path.removeprefix("file://") for path in finished.paths("scores")]
    query = "select sum(loglikelihood), count(*) from read_parquet(?)"
    total, count = duckdb.execute(query, [paths]).fetchone() or (0, 0)
    assert count == 8
    assert total == pytest.approx(sum(frame.loglikelihood))


def table_row(run: Run, row: int) -> list[float]:
    return run.table("tokens", ["logprob"]).column("logprob")[row].as_py()


def test_a_document_is_its_row_and_its_tokens(finished: Run) -> None:
    row = finished.table().to_pylist()[3]
    found = finished.document(row["doc_id"])
    assert found.pop("tokens")["logprob"].tolist() == table_row(finished, 3)
    assert found == row


def read_ids(path: str) -> list[str]:
    return pq.read_table(path)["doc_id"].to_pylist()


def test_documents_are_found_in_bounded_memory(
    finished: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [
        (shard, row, doc_id)
        for shard, name in shard_names(finished).items()
        for row, doc_id in enumerate(read_ids(finished.folder.path(name)))
    ]
    for held in (0, 60, 1 << 20):
        monkeypatch.setattr(index, "_HELD_BYTES", held)
        one = index.Index(finished)
        for _ in range(2):
            assert [(*one.find(doc_id), doc_id) for _, _, doc_id in rows] == rows
        assert sum(ids.nbytes for ids in one._held.values()) <= held
    assert len(one._held) == len(finished.paths())


def test_shards_of_more_digits_are_told_apart() -> None:
    shards = [17, 99_999, 100_000, 100_017]
    names = [f"scores/part-{shard:05d}.parquet" for shard in shards]
    run: Any = SimpleNamespace(parts=lambda tier: names)
    assert shard_names(run) == dict(zip(shards, names, strict=True))


def test_what_is_not_there_is_named(finished: Run, tmp_path: Path) -> None:
    for read in (finished.document, finished.logits, finished.logprobs):
        with pytest.raises(ValueError, match="doc_id: 5 is not text; ids are text, as '5'"):
            read(5)  # type: ignore[arg-type]
        with pytest.raises(KeyError, match="doc_id: 'nobody' is not in the run"):
            read("nobody")
    with pytest.raises(ValueError, match=r"tier: 'hidden' was not kept .* scores, tokens, logits"):
        finished.table("hidden")
    for columns in (["nope"], ["doc_id", "nope"]):
        with pytest.raises(ValueError, match=r"columns: 'nope' is not one of doc_id, source, "):
            finished.table("scores", columns)
    with pytest.raises(ValueError, match=r"columns: 'doc_id' is text; give a list, \['doc_id'\]"):
        finished.to_pandas(columns="doc_id")
    with pytest.raises(ValueError, match="summary: 'x' is not one of counts, outliers"):
        finished.summary("x")


def test_summaries_add_up_to_the_manifest(finished: Run) -> None:
    assert finished.manifest is not None
    counts = finished.summary().to_pandas()
    ok = counts[counts.panel == "status/ok"]
    assert ok.documents.sum() == finished.manifest["documents"] == 8
    assert ok.tokens.sum() == finished.manifest["tokens"]
    assert "lowest" in finished.summary("outliers").column("kind").to_pylist()


# ---- how it is read


def test_a_receipt_is_read_once_and_again_when_it_has_changed(
    finished: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Folder(str(shutil.copytree(finished.uri, tmp_path / "run")))
    num_shards = len(finished.plan["corpus"]["shards"])
    read = note_reads(monkeypatch)
    found = find_receipts(folder, num_shards)
    assert find_receipts(Folder(folder.uri), num_shards) == found
    assert list(found) == list(range(num_shards)) == sorted(read)

    read.clear()
    replace(found[1], seconds=1234.0).write(folder)
    (tmp_path / "run/shards/00000.json").write_text("{")
    changed = find_receipts(folder, num_shards)
    assert changed[1].seconds == 1234.0 and sorted(read) == [0, 1]
    assert list(changed) == list(range(1, num_shards))

    (tmp_path / "run" / found[2].parts[0].name).unlink()
    (tmp_path / "run/shards/00001.json").unlink()
    assert list(find_receipts(folder, num_shards)) == list(range(3, num_shards))
    assert sorted(read) == [0, 1]


def test_a_small_file_is_one_request(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Folder("s3://bucket/one-request", {"endpoint_url": s3})
    folder.write("file", b"bytes")
    asked: list[str] = []
    real = s3fs.S3FileSystem._call_s3

    async def note(self: Any, method: str, *args: Any, **options: Any) -> Any:
        asked.append(method)
        return await real(self, method, *args, **options)

    monkeypatch.setattr(s3fs.S3FileSystem, "_call_s3", note)
    assert folder.read("file") == b"bytes"
    assert asked == ["get_object"]
    assert folder.read("no file") is None
