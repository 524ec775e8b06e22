"""Damage of every kind to a run is found and named, and an intact run passes."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from flow_helpers import Score, write_lines
from logitmill.engine.pipeline import EngineSettings
from logitmill.flows import CorpusSpec, Run, open_run
from logitmill.flows.verify import verify_run


@pytest.fixture
def copy(finished: Run, tmp_path: Path) -> Path:
    """A finished run of all tiers in several shards, to be damaged."""
    return Path(shutil.copytree(finished.uri, tmp_path / "copy"))


def problems(run: Path | str, **options: Any) -> list[str]:
    return [str(finding) for finding in verify_run(str(run), **{"sample": 0} | options)]


def edit(file: Path, change: Callable[[Any], None]) -> None:
    """Change a JSON file in place."""
    value = json.loads(file.read_text())
    change(value)
    file.write_text(json.dumps(value))


def sign(run: Path, shard: int, name: str) -> None:
    """Make the receipt and the manifest say that a part is what it is now."""
    data = (run / name).read_bytes()

    def change(parts: list[dict[str, Any]]) -> None:
        (part,) = (part for part in parts if part["name"] == name)
        part |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}

    edit(run / f"shards/{shard:05d}.json", lambda receipt: change(receipt["parts"]))
    edit(run / "manifest.json", lambda manifest: change(manifest["parts"]))


def rewrite(file: Path, change: Callable[[pa.Table], pa.Table]) -> None:
    """Change a table in place; what its metadata says stays."""
    table = pq.read_table(file)
    pq.write_table(change(table).replace_schema_metadata(table.schema.metadata), file)


def with_value(column: str, row: int, value: Any) -> Callable[[pa.Table], pa.Table]:
    def change(table: pa.Table) -> pa.Table:
        values = table[column].to_pylist()
        values[row] = value(values[row])
        i = table.schema.get_field_index(column)
        return table.set_column(i, table.schema[i], pa.array(values, table.schema[i].type))

    return change


# ---- what is whole


def test_an_intact_run_passes_and_every_document_has_its_bits(finished: Run) -> None:
    lines: list[str] = []
    read: list[tuple[int, int]] = []
    found = verify_run(
        finished, sample=100, on_line=lines.append, on_progress=lambda *seen: read.append(seen)
    )
    assert found == []
    count = len(finished.plan["corpus"]["shards"])
    assert lines[0].endswith(f" files of {count} of {count} shards")
    assert lines[1:] == ["scored 8 of 8 documents again: compared bit for bit"]
    done, total = max(read)
    assert done == total == sum(part["bytes"] for part in finished.manifest["parts"])  # type: ignore[index]


def test_an_intact_run_on_s3_passes_and_a_flipped_byte_does_not(
    score: Score, corpus: Path, s3: str
) -> None:
    run = score(
        CorpusSpec(uri=str(corpus), shard_bytes=3_000),
        out="s3://bucket/verified",
        tiers=["tokens"],
        endpoint_url=s3,
    )
    assert verify_run(run, sample=2) == []
    assert verify_run(run.uri, sample=0, endpoint_url=s3) == []
    fs, path = run.folder.filesystem, run.folder.path("tokens/part-00001.parquet")
    data = bytearray(fs.cat_file(path))
    data[len(data) // 2] ^= 1
    fs.pipe_file(path, bytes(data))
    fs.pipe_file(run.folder.path("scores/part-00001.parquet.part"), b"half")
    fs.invalidate_cache()
    found = verify_run(run, sample=0)
    assert [finding.place for finding in found] == [
        "tokens/part-00001.parquet",
        "scores/part-00001.parquet.part",
    ]
    assert "sha256" in found[0].problem and "left over" in found[1].problem


def test_an_upload_that_nobody_finished_is_left_over(score: Score, corpus: Path, s3: str) -> None:
    import boto3

    run = score(corpus, out="s3://bucket/begun", endpoint_url=s3)
    key = f"begun/{run.plan['run_key']}/scores/part-00000.parquet"
    boto3.client("s3", endpoint_url=s3).create_multipart_upload(Bucket="bucket", Key=key)
    (found,) = verify_run(run, sample=0)
    assert found.place == "scores/part-00000.parquet"
    assert "an upload of " in found.problem and "never finished" in found.problem


def test_the_sample_is_spread_and_the_seed_decides_it(finished: Run) -> None:
    from logitmill.flows.rescore import _choose

    assert _choose([10, 10, 10, 10], 4, 0).keys() == {0, 1, 2, 3}
    assert _choose([1000, 1000], 4, 0) == _choose([1000, 1000], 4, 0) != _choose([1000, 1000], 4, 1)
    assert _choose([2, 0, 1], 8, 0) == {0: [0, 1], 2: [0]}
    assert _choose([0, 0], 8, 0) == {}


def test_a_run_that_is_not_complete_is_held_to_what_there_is(copy: Path) -> None:
    (copy / "manifest.json").unlink()
    (copy / "shards/00001.json").unlink()
    assert problems(copy, sample=100) == []
    (copy / "scores/part-00000.parquet").unlink()
    assert problems(copy) == ["scores/part-00000.parquet: it is missing"]


def test_a_negative_sample_is_a_mistake(finished: Run) -> None:
    with pytest.raises(ValueError, match="sample: -1 is not a number of documents"):
        verify_run(finished, sample=-1)


# ---- what is damaged


def test_a_flipped_byte(copy: Path) -> None:
    file = copy / "tokens/part-00000.parquet"
    data = bytearray(file.read_bytes())
    data[100] ^= 1
    file.write_bytes(data)
    (found,) = problems(copy)
    assert found.startswith("tokens/part-00000.parquet: its sha256 is ")


def test_a_part_that_is_cut_short(copy: Path) -> None:
    file = copy / "scores/part-00000.parquet"
    size = file.stat().st_size
    file.write_bytes(file.read_bytes()[:-1])
    assert problems(copy) == [
        f"scores/part-00000.parquet: it has {size - 1:,} bytes, its receipt says {size:,}"
    ]


def test_a_part_that_is_missing(copy: Path) -> None:
    (copy / "logits/part-00001.parquet").unlink()
    assert problems(copy) == ["logits/part-00001.parquet: it is missing"]


def test_another_shards_part(copy: Path) -> None:
    """Whose receipt may even have been made to fit."""
    name = "tokens/part-00001.parquet"
    shutil.copy(copy / "tokens/part-00000.parquet", copy / name)
    (found,) = problems(copy)
    assert found.startswith(f"{name}: it")
    sign(copy, 1, name)
    (found,) = problems(copy)
    assert found.startswith(f"{name}: it has ") and "where the scores have" in found


def test_a_part_of_another_run(copy: Path, score: Score, corpus: Path) -> None:
    other = score(CorpusSpec(uri=str(corpus), shard_bytes=3_000), recipe="rolling-32")
    name = "scores/part-00000.parquet"
    shutil.copy(Path(other.uri, name), copy / name)
    sign(copy, 0, name)
    (found,) = problems(copy)
    assert "is of run" in found and other.plan["run_key"] in found


def test_a_number_that_only_scoring_again_can_see(copy: Path) -> None:
    name = "scores/part-00000.parquet"
    rewrite(copy / name, with_value("token_perplexity", 0, lambda value: value * (1 + 1e-15)))
    sign(copy, 0, name)
    assert problems(copy) == []
    (found,) = problems(copy, sample=100)
    assert "of shard 0: token_perplexity is stored as" in found


def test_a_token_that_only_scoring_again_can_see(copy: Path) -> None:
    name = "tokens/part-00001.parquet"

    def change(values: list[float]) -> list[float]:
        return [values[0], values[1] + 1e-6, *values[2:]]

    rewrite(copy / name, with_value("entropy", 0, change))
    sign(copy, 1, name)
    assert problems(copy) == []
    (found,) = problems(copy, sample=100)
    assert "of shard 1: entropy of token 1 is stored as" in found and "; 1 of " in found


def test_rows_and_sums_that_the_receipt_does_not_know(copy: Path) -> None:
    name = "scores/part-00000.parquet"
    rewrite(copy / name, with_value("loglikelihood", 0, lambda value: value - 1.0))
    sign(copy, 0, name)
    (found,) = problems(copy)
    assert found.startswith(f"{name}: its rows have ") and "loglikelihood" in found

    rewrite(copy / name, lambda table: pa.concat_tables([table, table.slice(0, 1)]))
    sign(copy, 0, name)
    found = "; ".join(problems(copy))
    for words in ("stands in it twice", "documents, its receipt says", "tokens, its receipt says"):
        assert words in found


def test_lists_of_another_length(copy: Path) -> None:
    name = "tokens/part-00000.parquet"
    rewrite(copy / name, with_value("rank", 0, lambda value: value[:-1]))
    sign(copy, 0, name)
    (found,) = problems(copy)
    assert "lists of rank of another length" in found


def test_a_file_that_nothing_names(copy: Path) -> None:
    (copy / "scores/part-00099.parquet").write_bytes(b"old")
    (copy / ".tmp-dead").mkdir()
    (copy / ".tmp-dead/scores").write_bytes(b"half a part")
    assert problems(copy) == [
        ".tmp-dead/scores: nothing names it: 11 bytes left over",
        "scores/part-00099.parquet: nothing names it: 3 bytes left over",
    ]


def test_what_a_killed_run_left_is_for_the_next_start(copy: Path) -> None:
    (copy / "manifest.json").unlink()
    (copy / ".tmp-dead").mkdir()
    (copy / ".tmp-dead/scores").write_bytes(b"half a part")
    assert not any("left over" in problem for problem in problems(copy))


def test_what_somebody_is_writing_is_not_left_over(copy: Path) -> None:
    from logitmill.flows.folder import Folder

    with Folder(str(copy)).scratch() as scratch:
        (scratch / "scores").write_bytes(b"half a part")
        assert problems(copy) == []


def test_a_manifest_that_misses_a_shard(copy: Path) -> None:
    def change(manifest: dict[str, Any]) -> None:
        manifest["parts"] = [part for part in manifest["parts"] if part["shard"] != 1]

    edit(copy / "manifest.json", change)
    found = problems(copy)
    said = "manifest.json: it misses scores/part-00001.parquet, which the receipt of shard 1 names"
    assert said in found
    assert len(found) == 5 and all("it misses " in line for line in found)


def test_a_manifest_of_other_totals(copy: Path) -> None:
    edit(copy / "manifest.json", lambda manifest: manifest.update(tokens=3))
    (found,) = problems(copy)
    assert found.startswith("manifest.json: it says 3 tokens, the receipts ")


def test_a_receipt_that_is_missing_or_broken(copy: Path) -> None:
    (copy / "shards/00000.json").unlink()
    (copy / "shards/00001.json").write_text('{"shard": 1')
    found = problems(copy)
    assert "shards/00001.json: it is no whole receipt" in found
    assert any(line.startswith("shards/00000.json: it is missing") for line in found)


def test_a_summary_that_is_not_the_sum(copy: Path) -> None:
    name = "summary/counts.parquet"
    rewrite(copy / name, with_value("documents", 0, lambda value: value + 1))
    data = (copy / name).read_bytes()

    def change(manifest: dict[str, Any]) -> None:
        (part,) = (part for part in manifest["summaries"] if part["name"] == name)
        part |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}

    (found,) = problems(copy)
    assert found.startswith(f"{name}: it")
    edit(copy / "manifest.json", change)
    assert problems(copy) == [f"{name}: it is not what the tables of the shards add up to"]


# ---- what it was made of


def test_a_corpus_that_changed_is_named(score: Score, corpus: Path, tmp_path: Path) -> None:
    own = Path(shutil.copytree(corpus, tmp_path / "own"))
    run = score(own)
    (own / "one/file0.py").write_text("something else")
    (found,) = problems(run.uri, sample=100)
    assert found.startswith("corpus: corpus changed: 'one/file0.py' in ")


def test_another_model_is_named(
    score: Score, corpus: Path, demo_folder: Path, tmp_path: Path
) -> None:
    model = Path(shutil.copytree(demo_folder, tmp_path / "model"))
    run = score(corpus, model=str(model))
    assert problems(run.uri, sample=2) == []
    edit(model / "generation_config.json", lambda config: config.update(temperature=2.0))
    (found,) = problems(run.uri, sample=2)
    assert found == (
        f"not scored again: model: {str(model)!r} is not the model that the plan was made for"
    )
    shutil.rmtree(model)
    (found,) = problems(run.uri, sample=2)
    assert found.startswith("not scored again: model: there is no folder")


def test_settings_are_the_plans(score: Score, corpus: Path) -> None:
    run = score(
        corpus,
        recipe="strided-64",
        tiers=["tokens"],
        engine=EngineSettings(quantization="int8", dtype="bfloat16", max_batch_tokens=512),
    )
    assert problems(run.uri, sample=100) == []


def test_one_stream_is_one_document(score: Score, corpus: Path) -> None:
    run = score(corpus, recipe="disjoint-128", tiers=["tokens"])
    lines: list[str] = []
    assert verify_run(run, on_line=lines.append) == []
    assert lines[-1].startswith("scored 1 of 1 documents again")


def test_other_software_is_compared_within_a_tolerance(copy: Path) -> None:
    for receipt in copy.glob("shards/*.json"):
        edit(receipt, lambda value: value["versions"].update(torch="2.11.0"))
    name = "scores/part-00000.parquet"
    rewrite(copy / name, with_value("token_perplexity", 0, lambda value: value * (1 + 1e-15)))
    sign(copy, 0, name)
    lines: list[str] = []
    assert verify_run(str(copy), sample=100, on_line=lines.append) == []
    assert (
        "compared within 0.001 nats a token, as bits can differ: scored with torch 2.11.0"
        in (lines[-1])
    )
    rewrite(copy / name, with_value("nll_per_token", 0, lambda value: value + 0.01))
    sign(copy, 0, name)
    (found,) = problems(copy, sample=100)
    assert "nll_per_token is stored as" in found and "more than 0.001 apart" in found


def test_documents_of_columns_are_found_by_the_plan(score: Score, tmp_path: Path) -> None:
    rows = [{"body": f"def f{i}():\n    return {i}\n", "name": f"f{i}"} for i in range(5)]
    rows.insert(2, {"body": "", "name": "nothing"})
    lines = write_lines(tmp_path / "corpus.jsonl", rows)
    run = score(CorpusSpec(uri=str(lines), text_column="body", id_column="name"), tiers=["tokens"])
    plan = Path(run.uri, "plan.json")
    edit(plan, lambda value: value.pop("reading", None))
    (found,) = problems(run.uri, sample=100)
    assert "of which columns" in found and "is not in the plan" in found
    edit(plan, lambda value: value.update(reading={"text_column": "body", "id_column": "name"}))
    assert problems(run.uri, sample=100) == []
    edit(plan, lambda value: value.update(reading={"text_column": "name"}))
    assert "doc_id is stored as 'f0', and is 'corpus.jsonl#0'" in problems(run.uri, sample=100)[0]


def test_a_run_is_found_like_any_other(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="run: there is no run in"):
        verify_run(str(tmp_path))


def test_the_run_that_was_opened_may_be_partial(copy: Path) -> None:
    assert verify_run(open_run(str(copy), partial=True), sample=0) == []
