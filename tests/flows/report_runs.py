"""Summaries of documents that were never scored: what reports are made of in tests."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from logitmill.engine import Frequency, metrics
from logitmill.engine.recipes import Recipe
from logitmill.engine.records import DocumentRecord, DocumentScore, TokenRecords
from logitmill.flows.summary import Summary
from logitmill.flows.vocabulary import tabulate

EVIL = "</script><img src=x onerror=alert(1)>"

FACTS: dict[str, Any] = {
    "run_key": "0123abcd",
    "uri": "s3://bucket/runs/0123abcd",
    "model": "org/model",
    "model_digest": "sha256:feed",
    "corpus": "s3://bucket/text/*.parquet",
    "recipe": {"name": "rolling", "context": 2048, "overlap": 1, "stride": None, "prefix": "auto"},
    "recipe_hash": "cafe01234567",
    "engine": {"dtype": "float32", "max_batch_tokens": None},
    "tiers": ["scores", "tokens"],
    "versions": {"torch": "2.11.0"},
    "device": "cpu",
    "created": None,
    "seconds": 4.0,
    "documents": 41,
    "tokens": 8000,
    "bytes": 32000,
}


def make(doc_id: str, bits: np.ndarray, text: str, source: str = "a") -> DocumentScore:
    """A scored document; its text is split evenly among the tokens."""
    n, num_bytes = len(bits), len(text.encode())
    tokens = TokenRecords.empty(n)
    tokens.logprob[:] = -bits * math.log(2.0)
    tokens.rank[:] = 1 + (np.arange(n) % 7) ** 3
    tokens.entropy[:] = 1.5
    tokens.top1_logprob[:] = np.log(0.05 + 0.9 * (np.arange(n) % 10) / 10)
    edges = np.linspace(0, num_bytes, n + 1).astype(np.int64)
    tokens.byte_start[:], tokens.byte_end[:] = edges[:-1], edges[1:]
    total = float(tokens.logprob.sum(dtype=np.float64))
    record = DocumentRecord(
        doc_id,
        source=source,
        loglikelihood=total,
        num_tokens=n,
        num_tokens_scored=n,
        num_bytes=num_bytes,
        sum_entropy=1.5 * n,
        num_top1=int((tokens.rank == 1).sum()),
        nll_per_token=metrics.nll_per_token(total, n),
        token_perplexity=metrics.perplexity(total, n),
        bits_per_byte=metrics.bits(total, num_bytes),
    )
    return DocumentScore(0, record, tokens, text)


def make_run(num_sources: int = 3) -> Summary:
    """40 documents of 200 tokens and 800 bytes, and one that failed."""
    rng, made = np.random.default_rng(0), Summary()
    for i in range(40):
        bits = rng.exponential(2.0 + i / 10, 200)
        made.add(make(f"doc{i:02}", bits, "word" * 200, f"source{i % num_sources}"))
    failed = DocumentRecord("broken", source="source0", status="invalid_utf8", error="byte 7")
    made.add(DocumentScore(0, failed))
    return made


SOURCES = ("web", "code", 'it\'s "quoted"', "line\nbreak\x01")
LANGUAGES = ("en", "de", "")
SHORT: dict[str, Any] = {"name": "rolling", "context": 64, "overlap": 1, "prefix": "auto"}
"""A recipe that cuts most documents into several windows."""


PIECES = (EVIL, *(f" piece {i}" for i in range(1, 40)))
"""A vocabulary."""


def make_mixed(num_documents: int = 400) -> list[DocumentScore]:
    """Documents of several sources, languages and lengths, and three that failed."""
    rng = np.random.default_rng(1)
    made = []
    for i in range(num_documents):
        source = SOURCES[min(3, int(rng.exponential(1)))]
        n = int(rng.integers(20, 300))
        num_bytes = n * int(rng.integers(2, 30))
        scale = 1.0 + SOURCES.index(source) + rng.random()
        text = ("some words of text\n" * (num_bytes // 19 + 1))[:num_bytes]
        bits = rng.exponential(scale * num_bytes / n / 4, n)
        score = make(f"{LANGUAGES[i % 3]}/doc-{i:03}.txt", bits, text, source)
        score.record.language = LANGUAGES[i % 3]
        score.windows = Recipe(**SHORT).windows(n + 1, has_prefix=True)
        score.record.num_windows = len(score.windows)
        score.record.min_k_plus_plus_20 = float(rng.normal())
        score.record.truncated = i % 50 == 7
        score.tokens.token_id[:] = np.arange(n) * (i + 1) % len(PIECES)
        score.tokens.top1_id[:] = np.arange(n) * (i + 2) % len(PIECES)
        made.append(score)
    for status in ("empty", "invalid_utf8", "nonfinite"):
        failed = DocumentRecord(status, source="web", language="en", status=status, error="why")
        made.append(DocumentScore(0, failed))
    return made


def make_vocabulary(documents: list[DocumentScore]) -> pa.Table:
    """How often each token was there, and was expected by what is made up; one source."""
    ids = np.concatenate([d.tokens.token_id for d in documents])
    observed = np.bincount(ids, minlength=len(PIECES))
    expected = observed[::-1] + 0.5
    return tabulate({"web": Frequency(expected, expected, observed)}, PIECES)


def write_run(documents: list[DocumentScore], folder: Path) -> None:
    """The Parquet files that the page's queries read, in two shards."""
    columns = ("doc_id", "source", "language", "status", "bits_per_byte")
    columns += ("num_tokens_scored", "num_windows", "num_bytes")
    lists = ("token_id", "top1_id", "logprob", "rank", "entropy", "top1_logprob")
    for shard in (0, 1):
        part = documents[shard::2]
        scores = [{n: getattr(d.record, n) for n in columns} for d in part]
        tokens = [
            {"doc_id": d.record.doc_id, **{n: getattr(d.tokens, n) for n in lists}}
            for d in part
            if len(d.tokens)
        ]
        for tier, rows in (("scores", scores), ("tokens", tokens)):
            (folder / tier).mkdir(parents=True, exist_ok=True)
            table = pa.Table.from_pylist(rows)
            pq.write_table(table, folder / tier / f"part-{shard:05}.parquet")


OPERATIONS = pa.table(
    {
        "shard": pa.array([0, 1], pa.int32()),
        "device": ["NVIDIA H200", "NVIDIA H200"],
        "seconds": [2.0, 3.0],
        "device_seconds": [1.9, 2.7],
        "documents": [201, 202],
        "failed": [1, 2],
        "tokens": [40000, 30000],
        "bytes": [500000, 400000],
        "bytes_written": [90000, 80000],
        "attempt": pa.array([3, 1], pa.int32()),
        "bytes_scores": [10000, 10000],
        "bytes_summary": [80000, 70000],
    }
)
