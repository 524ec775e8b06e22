"""What the tables of a shard take on disk: a few kB, whatever its documents are like."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from logitmill.engine import metrics
from logitmill.engine.recipes import Recipe
from logitmill.engine.records import DocumentRecord, DocumentScore, TokenRecords
from logitmill.flows.parts import write_table
from logitmill.flows.summary import Summary

README = Path(__file__).parents[2].joinpath("README.md").read_text()
PIECES = re.findall(r" ?\w{1,8}|[^\w ]{1,3}", README)
LENGTHS = np.array([len(piece.encode()) for piece in PIECES])
NUM_TOKENS, LONGEST, NUM_PIECES = 1 << 20, 1 << 16, 200


class Tokens:
    """Tokens as they come in text: most are certain, ranks and surprisals have long tails."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.nll = self.rng.gamma(0.5, 5.0, NUM_TOKENS)
        self.entropy = self.rng.gamma(1.0, 1.3, NUM_TOKENS) + 0.3 * self.nll
        self.top1 = -self.rng.gamma(0.6, 1.2, NUM_TOKENS)
        ranks = np.exp(self.nll * self.rng.uniform(0.5, 1.0, NUM_TOKENS) - 0.7)
        self.rank = np.clip(ranks, 1, 1 << 17).astype(np.int32)

    def make(self, doc_id: str, **labels: str) -> DocumentScore:
        """A document of its own length, place and difficulty."""
        n = int(np.clip(self.rng.lognormal(6.2, 1.1), 20, LONGEST))
        first, scale = int(self.rng.integers(NUM_TOKENS - n)), self.rng.lognormal(0.0, 0.3)
        here, tokens = slice(first, first + n), TokenRecords.empty(n)
        # No token of a softmax is less likely than some e^-20, and no entropy above ln(vocabulary).
        tokens.logprob[:] = -np.minimum(scale * self.nll[here], 15.0 + 0.1 * self.nll[here])
        tokens.entropy[:] = np.minimum(scale * self.entropy[here], 10.0)
        tokens.top1_logprob[:], tokens.rank[:] = scale * self.top1[here], self.rank[here]
        start = int(self.rng.integers(len(PIECES)))
        ends = np.cumsum(np.resize(np.roll(LENGTHS, -start), n))
        tokens.byte_start[1:], tokens.byte_end[:] = ends[:-1], ends
        # No more is looked at than what is shown.
        text = "".join((PIECES[start:] + PIECES)[: min(n, NUM_PIECES)])
        total, num_bytes = float(tokens.logprob.sum(dtype=np.float64)), int(ends[-1])
        windows = Recipe(name="rolling", context=2048).windows(n + 1, has_prefix=True)
        record = DocumentRecord(
            doc_id,
            loglikelihood=total,
            num_tokens=n,
            num_tokens_scored=n,
            num_bytes=num_bytes,
            num_windows=len(windows),
            sum_entropy=float(tokens.entropy.sum(dtype=np.float64)),
            num_top1=int((tokens.rank == 1).sum()),
            nll_per_token=metrics.nll_per_token(total, n),
            token_perplexity=metrics.perplexity(total, n),
            bits_per_byte=metrics.bits(total, num_bytes),
            min_k_plus_plus_20=float(self.rng.normal(-1.2, 0.4)),
            **labels,
        )
        return DocumentScore(0, record, tokens, text, windows=windows)


def write_shard(folder: Path, num_documents: int, groups: tuple[int, int, int]) -> dict[str, int]:
    """Bytes of the tables of a shard with documents of (sources, languages, days)."""
    tokens, made = Tokens(1), Summary()
    for i in range(num_documents):
        source, language, day = (int(tokens.rng.integers(count)) for count in groups)
        labels = {
            "source": f"web/part-{source:05d}.parquet",
            "language": ("en", "de", "fr")[language],
            "day": f"2026-11-{10 + day}",
        }
        made.add(tokens.make(f"{labels['source']}#{i}", **labels))
        if i % 200 == 0:
            failed = DocumentRecord(f"failed-{i}", status="empty", error="no text", **labels)
            made.add(DocumentScore(0, failed))
    sizes = {}
    for name, table in (("counts", made.counts()), ("outliers", made.outliers())):
        path = folder / f"{name}.parquet"
        write_table(table, path)
        assert pq.read_table(path).equals(table)
        sizes[name] = path.stat().st_size
    return sizes


def test_an_ordinary_shard_has_a_few_kb(tmp_path: Path) -> None:
    sizes = write_shard(tmp_path, 3000, (1, 1, 1))
    counts = pq.read_table(tmp_path / "counts.parquet").to_pylist()
    assert sum(row["tokens"] for row in counts if row["panel"] == "status/ok") > 2_000_000
    assert sizes["counts"] < 12_000
    assert sizes["outliers"] < 8_000


def test_many_groups_take_less_than_half_a_kb_each(tmp_path: Path) -> None:
    sizes = write_shard(tmp_path, 3000, (10, 3, 7))
    assert sizes["counts"] < 210 * 450
    assert sizes["outliers"] < 8_000
