"""The table of shards against the receipts it is made of."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from flow_helpers import Score
from logitmill.flows import open_run, shards
from logitmill.flows.corpus import CorpusSpec, read_shard
from logitmill.flows.folder import Part
from logitmill.flows.operations import OPERATIONS, operations
from logitmill.flows.store import Receipt
from prometheus_client import REGISTRY
from test_cli import in_process

FIRST = Receipt(
    shard=3,
    parts=(
        Part("scores/part-00003.parquet", 100, "a"),
        Part("tokens/part-00003.parquet", 900, "b"),
        Part("shards/00003.counts.parquet", 30, "c"),
        Part("shards/00003.outliers.parquet", 7, "d"),
    ),
    documents=5,
    failed=1,
    tokens=400,
    bytes=1600,
    loglikelihood=-12.0,
    seconds=2.5,
    device="cpu",
    versions={"torch": "2"},
    device_seconds=2.0,
)


def test_a_row_holds_what_the_receipt_of_a_shard_says() -> None:
    fewer = replace(FIRST, shard=4, parts=FIRST.parts[:1], device="gpu", failed=0, attempt=2)
    table = operations(iter([FIRST, fewer]))
    assert table.column_names[: len(OPERATIONS)] == OPERATIONS.names
    common = {
        "seconds": 2.5,
        "device_seconds": 2.0,
        "documents": 5,
        "tokens": 400,
        "bytes": 1600,
        "bytes_scores": 100,
    }
    assert table.to_pylist() == [
        common
        | {"shard": 3, "device": "cpu", "failed": 1, "bytes_written": 1037}
        | {"bytes_summary": 37, "bytes_tokens": 900, "attempt": None},
        common
        | {"shard": 4, "device": "gpu", "failed": 0, "bytes_written": 100}
        | {"bytes_summary": 0, "bytes_tokens": 0, "attempt": 2},
    ]


def test_no_shards_make_no_rows() -> None:
    table = operations([])
    assert table.num_rows == 0
    assert table.column_names == [*OPERATIONS.names, "bytes_summary"]


def test_a_receipt_says_at_which_attempt_its_shard_was_done(
    score: Score, corpus: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: Counter[int] = Counter()

    def unlucky(spec: CorpusSpec, shard: Any) -> Any:
        calls[shard.index] += 1
        if (shard.index, calls[shard.index]) in ((1, 1), (1, 2), (2, 1)):
            raise MemoryError("not yet")
        return read_shard(spec, shard)

    spec = CorpusSpec(uri=str(corpus), shard_bytes=2500)
    monkeypatch.setattr(shards, "read_shard", unlucky)
    before = REGISTRY.get_sample_value("logitmill_shard_retries_total") or 0.0
    run = score(spec)
    assert REGISTRY.get_sample_value("logitmill_shard_retries_total") == before + 3
    attempts = run.operations()["attempt"].to_pylist()
    assert len(attempts) > 3
    assert attempts == [1, 3, 2] + [1] * (len(attempts) - 3)
    report = (Path(run.uri) / "report.html").read_text()
    assert "2 shards had to be done again: 3 retries" in report

    # As an older version left one, and a shard that is done again without Prefect.
    folder = Path(run.uri)
    receipt = folder / "shards/00001.json"
    older = json.loads(receipt.read_text())
    del older["attempt"]
    receipt.write_text(json.dumps(older))
    (folder / "manifest.json").unlink()
    (folder / "shards/00003.json").unlink()
    _, out, _ = in_process(capsys, "inspect", folder)
    assert "done, 1 of them after a retry; logitmill score" in out
    done = open_run(score(spec).uri).operations()["attempt"].to_pylist()
    assert done == [1, None, 2] + [1] * (len(attempts) - 3)
    assert "1 shard had to be done again: 1 retry, of tasks" in (folder / "report.html").read_text()
    assert "The receipts of 1 shard do not say." in (folder / "report.html").read_text()
