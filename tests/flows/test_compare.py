"""Two runs compared, against numpy, scipy and closed forms, on runs written by hand."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import scipy.special
import scipy.stats
from logitmill.engine.recipes import Recipe
from logitmill.engine.records import DocumentRecord
from logitmill.flows import open_run
from logitmill.flows.compare import Comparison, compare, compare_runs, comparison, pairing, sums
from logitmill.flows.compare.page import find_alerts, show_against
from logitmill.flows.compare.shift import measure_shift
from logitmill.flows.compare.sums import Moments, Values
from logitmill.flows.compare.tokens import Estimate
from logitmill.flows.compare.wording import estimate, fit_names, signed
from logitmill.flows.counts import merge_counts
from logitmill.flows.parts import LOGITS, SCORES, schema_of
from logitmill.flows.run import Run
from logitmill.flows.summary import COUNTS

VOCABULARY = 50
LN2 = math.log(2.0)


class Corpus:
    """Documents as one model sees them: token ids, and log-probabilities over the vocabulary."""

    def __init__(
        self, num_documents: int, seed: int, *, sources: Sequence[str] = ("a", "b")
    ) -> None:
        rng = np.random.default_rng(seed)
        self.sources = sources
        lengths = rng.integers(16, 40, num_documents)
        self.ids = [rng.integers(0, VOCABULARY, n).astype(np.int32) for n in lengths]
        self.logits = [rng.normal(size=(n, VOCABULARY)) * 2 for n in lengths]

    def moved(self, size: float, seed: int) -> Corpus:
        """The same documents by another model, whose logits are off by noise of this size."""
        rng = np.random.default_rng(seed)
        other = object.__new__(Corpus)
        other.__dict__ = dict(self.__dict__)
        other.logits = [x + size * rng.normal(size=x.shape) for x in self.logits]
        return other

    def logprobs(self, i: int) -> np.ndarray:
        """Float32 [n, V], as a run stores them."""
        return scipy.special.log_softmax(self.logits[i], axis=-1).astype(np.float32)

    def target(self, i: int) -> np.ndarray:
        return self.logprobs(i)[np.arange(len(self.ids[i])), self.ids[i]]


def write_run(
    folder: Path,
    corpus: Corpus,
    *,
    tiers: Sequence[str] = ("scores", "tokens", "logits"),
    order: Sequence[int] | None = None,
    per_shard: int = 4,
    recipe: Recipe | None = None,
    dtype: str = "float32",
    name: Callable[[int], str] = "doc-{}".format,
    change: Callable[[int, DocumentRecord], None] = lambda i, record: None,
    top_k: int = 5,
) -> Run:
    """A complete run of these documents, in this order, so many a shard."""
    order = range(len(corpus.ids)) if order is None else order
    recipe = recipe or Recipe(name="rolling").resolve(64)
    shards = [list(order[i : i + per_shard]) for i in range(0, len(order), per_shard)]
    parts = []
    records: list[DocumentRecord] = []
    for shard, rows in enumerate(shards):
        found = [_record(corpus, i, name(i)) for i in rows]
        for i, record in zip(rows, found, strict=True):
            change(i, record)
        records += found
        ok = [i for i, record in zip(rows, found, strict=True) if record.status == "ok"]
        tables = {"scores": pa.Table.from_pylist([vars(r) for r in found], SCORES)}
        makers = {"tokens": _tokens, "logits": _logits, "topk": _topk}
        for tier in tiers:
            if tier != "scores":
                tables[tier] = makers[tier](corpus, ok, name, dtype if tier == "logits" else top_k)
        for tier, table in tables.items():
            file = folder / tier / f"part-{shard:05d}.parquet"
            file.parent.mkdir(parents=True, exist_ok=True)
            pq.write_table(table, file, row_group_size=1 if tier == "logits" else 3)
            parts.append({"name": f"{tier}/{file.name}", "bytes": 1, "sha256": "", "shard": shard})
    plan: dict[str, Any] = {
        "run_key": folder.name,
        "uri": "corpus",
        "model": {"name": "model", "digest": "d", "vocab_size": VOCABULARY, "architecture": "x"},
        "engine": {"dtype": "float32", "linears": {}, "fp8_head": False},
        "recipe": asdict(recipe),
        "recipe_hash": recipe.hash,
        "tiers": list(tiers),
        "logits_dtype": dtype,
        "corpus": {
            "inputs": [],
            "shards": [[name(i) for i in rows] for rows in shards],
            "fingerprint": "f",
        },
    }
    scored = [r for r in records if r.status == "ok"]
    manifest = {
        "parts": parts,
        "summaries": [{"name": "summary/counts.parquet"}],
        "documents": len(records),
        "failed": len(records) - len(scored),
        "tokens": sum(r.num_tokens_scored for r in scored),
        "bytes": sum(r.num_bytes for r in scored),
    }
    (folder / "summary").mkdir()
    pq.write_table(_counts(scored), folder / "summary/counts.parquet")
    (folder / "plan.json").write_text(json.dumps(plan))
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return open_run(str(folder))


def _record(corpus: Corpus, i: int, doc_id: str) -> DocumentRecord:
    loglikelihood, n = float(corpus.target(i).astype(np.float64).sum()), len(corpus.ids[i])
    return DocumentRecord(
        doc_id=doc_id,
        source=corpus.sources[i % len(corpus.sources)],
        loglikelihood=loglikelihood,
        num_tokens=n,
        num_tokens_scored=n,
        num_bytes=3 * n,
        num_words=n,
        zlib_bytes=2 * n + i,
        nll_per_token=-loglikelihood / n,
        bits_per_byte=-loglikelihood / (3 * n * LN2),
    )


def _tokens(corpus: Corpus, rows: Sequence[int], name: Callable[[int], str], _: Any) -> pa.Table:
    return pa.table(
        {
            "doc_id": pa.array([name(i) for i in rows], pa.string()),
            "token_id": pa.array([corpus.ids[i] for i in rows], pa.list_(pa.int32())),
            "logprob": pa.array([corpus.target(i) for i in rows], pa.list_(pa.float32())),
            "top1_id": pa.array(
                [corpus.logprobs(i).argmax(1).astype(np.int32) for i in rows], pa.list_(pa.int32())
            ),
        }
    )


def _logits(
    corpus: Corpus, rows: Sequence[int], name: Callable[[int], str], dtype: str
) -> pa.Table:
    found = []
    for i in rows:
        # Chunks are of so many bytes: the narrower the type, the more rows in one.
        step = {"float32": 7, "float16": 14}[dtype]
        for first in range(0, len(corpus.ids[i]), step):
            block = corpus.logprobs(i)[first : first + step]
            found.append(
                {
                    "doc_id": name(i),
                    "first_row": first,
                    "num_rows": len(block),
                    "logsumexp": [0.0] * len(block),
                    "logprobs": block.astype(dtype).tobytes(),
                }
            )
    return pa.Table.from_pylist(found, LOGITS)


def _topk(corpus: Corpus, rows: Sequence[int], name: Callable[[int], str], k: int) -> pa.Table:
    found = []
    for i in rows:
        logprobs = corpus.logprobs(i).astype(np.float64)
        top = np.argsort(-logprobs, axis=1, kind="stable")
        rest = np.take_along_axis(logprobs, top[:, k:], 1)
        ids = top[:, :k].astype("<u2")[..., None].view(np.uint8)
        halves = np.take_along_axis(logprobs, top[:, :k], 1).astype("<f2")[..., None].view(np.uint8)
        found.append(
            {
                "doc_id": name(i),
                "token_id": corpus.ids[i].astype("<i4").tobytes(),
                "logprob": corpus.target(i).astype("<f4").tobytes(),
                **{f"top_id_{n}": ids[..., n].tobytes() for n in range(2)},
                **{f"top_logprob_{n}": halves[..., n].tobytes() for n in range(2)},
                "log_tail_mass": scipy.special.logsumexp(rest, axis=1).astype("<f4").tobytes(),
            }
        )
    return pa.Table.from_pylist(found, schema_of("topk", VOCABULARY))


def _counts(records: Sequence[DocumentRecord]) -> pa.Table:
    rows = [
        {
            **dict.fromkeys(COUNTS.names, 0),
            **{"panel": "bits_per_byte", "source": r.source, "language": "", "day": ""},
            **{"length": -1, "bin": int((r.bits_per_byte or 0.0) / 0.02), "documents": 1},
        }
        for r in records
    ]
    return merge_counts([pa.Table.from_pylist(rows, COUNTS)])


@pytest.fixture
def base() -> Corpus:
    return Corpus(30, seed=1)


@pytest.fixture
def other(base: Corpus) -> Corpus:
    return base.moved(0.7, seed=2)


def stack(corpus: Corpus) -> tuple[np.ndarray, np.ndarray]:
    """Log-probabilities of all tokens over the vocabulary, and of the true tokens; float64."""
    n = range(len(corpus.ids))
    logprobs = np.concatenate([corpus.logprobs(i).astype(np.float64) for i in n])
    return logprobs, np.concatenate([corpus.target(i).astype(np.float64) for i in n])


# ---- documents -------------------------------------------------------------------------------


def test_documents_against_numpy(tmp_path: Path, base: Corpus, other: Corpus) -> None:
    found = compare(write_run(tmp_path / "a", base), write_run(tmp_path / "b", other)).documents
    n = np.arange(30)
    bits = [
        np.array([-c.target(i).astype(np.float64).sum() / (3 * len(c.ids[i]) * LN2) for i in n])
        for c in (base, other)
    ]
    delta = bits[1] - bits[0]
    assert found.all is not None
    assert (found.measure, found.all.documents) == ("bits/byte", 30)
    assert found.all.median == pytest.approx(np.median(delta), rel=1e-12)
    assert found.all.mean == pytest.approx(delta.mean(), rel=1e-12)
    assert found.all.error == pytest.approx(scipy.stats.sem(delta), rel=1e-12)
    nll = delta * 3 * LN2
    assert found.all.delta_nll == pytest.approx(nll.mean(), rel=1e-12)
    assert found.all.delta_nll_error == pytest.approx(scipy.stats.sem(nll), rel=1e-12)
    # Of 30, the tenth from either end: at most nine heads of 30 coins come in 2.14 % of cases.
    ordered = np.sort(delta)
    assert (found.all.low, found.all.high) == pytest.approx((ordered[9], ordered[20]))
    line = scipy.stats.linregress(*bits)
    assert (found.slope, found.intercept) == pytest.approx((line.slope, line.intercept))
    assert found.correlation == pytest.approx(line.rvalue)
    a = next(drift for drift in found.groups if drift.source == "a")
    assert a.documents == 15
    assert a.median == pytest.approx(np.median(delta[::2]), rel=1e-12)
    # A document below 64 bytes tells nothing by its extremes.
    is_long = np.array([3 * len(ids) >= 64 for ids in base.ids])
    residual = bits[1] - (line.intercept + line.slope * bits[0])
    for named, size in ((found.worse, delta), (found.residual, np.abs(residual))):
        order = np.argsort(-np.where(is_long, size, -np.inf))[:10]
        assert [d.doc_id for d in named] == [f"doc-{i}" for i in order if size[i] > 0]
    assert found.counts.sum() == 30


def test_the_order_and_cut_of_either_run_do_not_matter(
    tmp_path: Path, base: Corpus, other: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiers = ("scores", "tokens", "logits", "topk")
    a = write_run(tmp_path / "a", base, tiers=tiers)
    straight = compare(a, write_run(tmp_path / "b", other, tiers=tiers))
    monkeypatch.setattr(pairing, "_FILE_BYTES", 500)
    order = np.random.default_rng(3).permutation(30).tolist()
    c = write_run(tmp_path / "c", other, tiers=tiers, order=order, per_shard=7)
    assert not pairing.are_cut_alike(a, c)
    dealt = compare(a, c)
    ours, theirs = (flat(comparison.to_dict()) for comparison in (straight, dealt))
    assert ours.keys() == theirs.keys()
    # But for the last bits of sums in another order.
    for key, value in ours.items():
        if not key.startswith("other"):
            is_sum = isinstance(value, float)
            assert theirs[key] == (pytest.approx(value, 1e-9, 1e-12) if is_sum else value), key


def flat(value: Any, path: str = "") -> dict[str, Any]:
    """Leaves of plain JSON by their paths."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    found: dict[str, Any] = {}
    for key, inner in items:
        if isinstance(inner, (dict, list)):
            found |= flat(inner, f"{path}/{key}")
        else:
            found[f"{path}/{key}".lstrip("/")] = inner
    return found


def test_what_is_not_paired_is_counted_and_named(tmp_path: Path, base: Corpus) -> None:
    def change(i: int, record: DocumentRecord) -> None:
        if i == 3:
            record.num_bytes += 1
        if i == 4:
            record.status, record.loglikelihood, record.bits_per_byte = "nonfinite", None, None

    a = write_run(tmp_path / "a", base, order=range(1, 30))
    b = write_run(tmp_path / "b", base, order=range(0, 28), change=change)
    found = compare(a, b).documents
    assert (found.only_base.count, found.only_base.named) == (2, ["doc-28", "doc-29"])
    assert (found.only_other.count, found.only_other.named) == (1, ["doc-0"])
    assert found.changed.named == ["doc-3"]
    assert {key: few.named for key, few in found.moved.items()} == {("ok", "nonfinite"): ["doc-4"]}
    assert found.all is not None
    assert found.all.documents == 25
    # Bytes and bits of what is paired alone.
    assert found.all.base == found.all.other


def make_ids(i: int, record: DocumentRecord) -> None:
    """Make of a document's record that of a document of ids."""
    record.num_bytes, record.bits_per_byte = 0, None
    record.num_words = record.zlib_bytes = None


def test_documents_of_ids_compare_in_bits_a_token(
    tmp_path: Path, base: Corpus, other: Corpus
) -> None:
    runs = [write_run(tmp_path / n, c, change=make_ids) for n, c in (("a", base), ("b", other))]
    found = compare(*runs, level="documents").documents
    assert found.measure == "bits/token"
    assert found.all is not None
    nll = [-c.target(5).astype(np.float64).mean() / LN2 for c in (base, other)]
    assert compare(*runs).documents.all == found.all
    row = next(d for d in (*found.worse, *found.better) if d.doc_id == found.worse[0].doc_id)
    assert row.delta == pytest.approx(row.other - row.base)
    assert (
        found.all.base == pytest.approx(-stack(base)[1].sum() / LN2 / len(stack(base)[1]))
        and nll[0] > 0
    )


def test_text_beside_ids_is_the_same_only_of_as_many_tokens(
    tmp_path: Path, base: Corpus, other: Corpus
) -> None:
    """What one run scored as text and the other as ids, of which half are of another number."""

    def change(i: int, record: DocumentRecord) -> None:
        make_ids(i, record)
        record.num_tokens += i % 2

    a = write_run(tmp_path / "a", base)
    b = write_run(tmp_path / "b", other, change=change)
    for ours, theirs in ((a, b), (b, a)):
        found = compare(ours, theirs, level="documents").documents
        assert found.measure == "bits/token" and found.all is not None
        assert (found.all.documents, found.changed.count) == (15, 15)
    even = range(0, 30, 2)
    bits = [sum(-c.target(i).astype(np.float64).sum() for i in even) / LN2 for c in (other, base)]
    tokens = sum(len(base.ids[i]) for i in even)
    assert (found.all.base, found.all.other) == pytest.approx([x / tokens for x in bits])


def test_all_text_is_over_the_size_of_either_run(tmp_path: Path, base: Corpus) -> None:
    """A document that one run cut is compared still, and its bytes are what was scored of it."""

    def cut(i: int, record: DocumentRecord) -> None:
        record.num_words = None
        if i == 0:
            record.num_bytes //= 2

    a, b = write_run(tmp_path / "a", base), write_run(tmp_path / "b", base, change=cut)
    drift = compare(a, b, level="documents").documents.all
    assert drift is not None and drift.documents == 30
    tables = [run.table(columns=["loglikelihood", "num_bytes"]).to_pandas() for run in (a, b)]
    expected = [-t["loglikelihood"].sum() / LN2 / t["num_bytes"].sum() for t in tables]
    assert (drift.base, drift.other) == pytest.approx(expected)
    assert expected[0] < expected[1]


# ---- tokens ----------------------------------------------------------------------------------


def test_tokens_against_numpy(tmp_path: Path, base: Corpus, other: Corpus) -> None:
    found = compare(write_run(tmp_path / "a", base), write_run(tmp_path / "b", other)).tokens
    assert found is not None
    (base_all, ours), (other_all, theirs) = stack(base), stack(other)
    n = len(ours)
    assert (found.tokens, found.documents) == (n, 30)
    for perplexity, nll in ((found.base_perplexity, -ours), (found.other_perplexity, -theirs)):
        assert perplexity.value == pytest.approx(math.exp(nll.mean()), rel=1e-12)
        # README of llama.cpp's tool: PPL sqrt(var / (n - 1)) of population variance.
        error = math.exp(nll.mean()) * math.sqrt(nll.var() / (n - 1))
        assert perplexity.error == pytest.approx(error, rel=1e-9)
    assert found.correlation == pytest.approx(np.corrcoef(ours, theirs)[0, 1])
    excess = ours - theirs
    assert found.ln_ratio.value == pytest.approx(excess.mean())
    assert found.ln_ratio.error == pytest.approx(scipy.stats.sem(excess))
    assert found.ratio.value == pytest.approx(math.exp(excess.mean()))
    a, b = math.exp(-ours.mean()), math.exp(-theirs.mean())
    gradient = np.array([-a, b])
    variance = gradient @ (np.cov(-ours, -theirs) / n) @ gradient
    assert found.difference.value == pytest.approx(b - a)
    assert found.difference.error == pytest.approx(math.sqrt(variance))

    delta_p = np.exp(theirs) - np.exp(ours)
    assert found.delta_p.mean == pytest.approx(delta_p.mean())
    percents = {p: np.quantile(delta_p, float(p) / 100) for p in found.delta_p.percentiles}
    assert found.delta_p.percentiles == pytest.approx(percents)
    assert (found.delta_p.least, found.delta_p.largest) == (delta_p.min(), delta_p.max())
    assert found.rms_delta_p.value == pytest.approx(math.sqrt((delta_p**2).mean()))
    rms_error = scipy.stats.sem(delta_p**2) / (2 * math.sqrt((delta_p**2).mean()))
    assert found.rms_delta_p.error == pytest.approx(rms_error)
    assert found.delta_logprob.percentiles["50"] == pytest.approx(np.median(theirs - ours))
    same = (base_all.argmax(1) == other_all.argmax(1)).mean()
    assert found.same_top.value == pytest.approx(same)
    assert found.same_top.error == pytest.approx(math.sqrt(same * (1 - same) / (n - 1)))
    assert sum(group.tokens for group in found.groups) == n
    of_a = np.concatenate([base.target(i) - other.target(i) for i in range(0, 30, 2)])
    a_group = next(group for group in found.groups if group.source == "a")
    assert a_group.ln_ratio.value == pytest.approx(of_a.mean(), rel=1e-5)


def test_the_error_by_document_is_that_of_a_jackknife(
    tmp_path: Path, base: Corpus, other: Corpus
) -> None:
    """Leave out a document at a time: nearly the same as the sandwich estimate."""
    runs = [write_run(tmp_path / n, c) for n, c in (("a", base), ("b", other))]
    found = compare(*runs).tokens
    assert found is not None
    sums_d = np.array(
        [(base.target(i) - other.target(i)).astype(np.float64).sum() for i in range(30)]
    )
    lengths = np.array([len(ids) for ids in base.ids])
    left = (sums_d.sum() - sums_d) / (lengths.sum() - lengths)
    jackknife = math.sqrt(29 / 30 * ((left - left.mean()) ** 2).sum())
    assert found.ln_ratio_error_by_document == pytest.approx(jackknife, rel=0.05)


def test_topk_tells_of_tokens_where_tokens_were_not_kept(
    tmp_path: Path, base: Corpus, other: Corpus
) -> None:
    whole = compare(write_run(tmp_path / "a", base), write_run(tmp_path / "b", other)).tokens
    c = write_run(tmp_path / "c", base, tiers=("scores", "topk"))
    assert compare(c, open_run(str(tmp_path / "b"))).tokens == whole
    d = write_run(tmp_path / "d", other, tiers=("scores", "topk"), order=[3, 4, 29])
    few = compare(c, d).tokens
    assert few is not None
    assert few.documents == 3


# ---- distributions ---------------------------------------------------------------------------


def full_kl(base: Corpus, other: Corpus) -> tuple[np.ndarray, np.ndarray]:
    """KL and Jensen-Shannon of all tokens, by scipy."""
    (p, _), (q, _) = stack(base), stack(other)
    p, q = scipy.special.softmax(p, axis=1), scipy.special.softmax(q, axis=1)
    return scipy.stats.entropy(p, q, axis=1), scipy.spatial.distance.jensenshannon(
        p, q, axis=1
    ) ** 2


def test_logits_against_scipy(tmp_path: Path, base: Corpus, other: Corpus) -> None:
    found = compare(write_run(tmp_path / "a", base), write_run(tmp_path / "b", other))
    kl, js = full_kl(base, other)
    apart = found.distributions
    assert apart is not None
    assert (apart.tier, apart.tokens) == ("logits", len(kl))
    assert apart.kl.mean == pytest.approx(kl.mean(), rel=1e-9)
    assert apart.kl.error == pytest.approx(scipy.stats.sem(kl), rel=1e-9)
    assert apart.kl.largest == pytest.approx(kl.max(), rel=1e-9)
    percents = {p: np.quantile(kl, float(p) / 100) for p in apart.kl.percentiles}
    assert apart.kl.percentiles == pytest.approx(percents, rel=1e-8)
    assert apart.js.mean == pytest.approx(js.mean(), rel=1e-9)
    assert found.tokens is not None
    assert apart.same_top == found.tokens.same_top
    by_document = np.repeat(np.arange(30), [len(ids) for ids in base.ids])
    of_b = next(group for group in apart.groups if group.source == "b")
    assert of_b.kl.mean == pytest.approx(kl[by_document % 2 == 1].mean(), rel=1e-9)


def test_logits_of_half_precision_are_cut_otherwise_and_compare(
    tmp_path: Path, base: Corpus
) -> None:
    """Rounding to float16 alone is what is left: KL of some 1e-7."""
    a, b = write_run(tmp_path / "a", base), write_run(tmp_path / "b", base, dtype="float16")
    apart = compare(a, b).distributions
    assert apart is not None
    assert apart.tokens == sum(map(len, base.ids))
    assert 0 < apart.kl.mean < 2e-6
    rounded = np.concatenate([base.logprobs(i).astype(np.float16) for i in range(30)])
    p, q = (scipy.special.softmax(x.astype(np.float64), axis=1) for x in (stack(base)[0], rounded))
    assert apart.kl.mean == pytest.approx(scipy.stats.entropy(p, q, axis=1).mean(), rel=1e-6)


def test_topk_gives_a_lower_bound(tmp_path: Path, base: Corpus, other: Corpus) -> None:
    tiers = ("scores", "topk")
    means = []
    for k in (1, 5, 20, VOCABULARY - 1):
        a = write_run(tmp_path / f"a{k}", base, tiers=tiers, top_k=k)
        b = write_run(tmp_path / f"b{k}", other, tiers=tiers, top_k=k)
        apart = compare(a, b).distributions
        assert apart is not None
        assert apart.tier == "topk" and apart.kl.least >= 0
        means.append(apart.kl.mean)
    kl, _ = full_kl(base, other)
    assert means == sorted(means)
    # All but one of the vocabulary is the whole, but for what float16 rounds.
    assert means[-1] <= kl.mean() * 1.002
    assert means[0] < 0.5 * kl.mean() < means[2]


def test_a_run_beside_itself_is_zero_to_the_bit(tmp_path: Path, base: Corpus) -> None:
    for tiers in (("scores", "tokens", "logits"), ("scores", "topk")):
        a = write_run(tmp_path / tiers[1], base, tiers=tiers)
        found = compare(a, open_run(a.uri))
        documents, tokens, apart = found.documents, found.tokens, found.distributions
        assert documents.all is not None and tokens is not None and apart is not None
        drift = documents.all
        assert (drift.median, drift.low, drift.high, drift.mean, drift.error) == (0, 0, 0, 0, 0)
        assert documents.worse == documents.better == documents.residual == []
        assert (documents.slope, documents.intercept, documents.correlation) == (1, 0, 1)
        for spread in (tokens.delta_p, tokens.delta_logprob, apart.kl, apart.js):
            assert (spread.mean, spread.error, spread.least, spread.largest) == (0, 0, 0, 0)
            assert set(spread.percentiles.values()) == {0}
        assert (tokens.ratio.value, tokens.difference.value, tokens.correlation) == (1, 0, 1)
        assert tokens.difference.error == tokens.rms_delta_p.value == 0
        assert tokens.same_top.value == apart.same_top.value == 1
        assert (found.shifts[0].psi, found.shifts[0].wasserstein) == (0, 0)


# ---- what cannot be compared -----------------------------------------------------------------


def test_other_recipes_are_refused_by_what_differs(tmp_path: Path, base: Corpus) -> None:
    a = write_run(tmp_path / "a", base)
    b = write_run(tmp_path / "b", base, recipe=Recipe(name="rolling").resolve(32))
    with pytest.raises(ValueError, match=r"recipe: A .* rolling, context 64, B .* context 32;"):
        compare_runs(a.uri, b.uri)
    assert not (tmp_path / "compare").exists()


def test_other_tokenizers_compare_by_documents_alone(tmp_path: Path, base: Corpus) -> None:
    other = base.moved(0.1, seed=3)
    other.ids = [(ids + 1) % VOCABULARY for ids in base.ids]
    a, b = write_run(tmp_path / "a", base), write_run(tmp_path / "b", other)
    found = compare(a, b)
    assert found.documents.all is not None
    assert found.tokens is None and found.distributions is None
    assert "tokenizers do" in found.missing["tokens"]
    for level in ("tokens", "distributions"):
        with pytest.raises(ValueError, match=f"level: '{level}' cannot be compared: .*token ids"):
            compare(a, b, level=level)


def test_a_document_of_other_tokens_is_left_out(
    tmp_path: Path, base: Corpus, other: Corpus
) -> None:
    other.ids = [ids.copy() for ids in base.ids]
    other.ids[7][3] = (other.ids[7][3] + 1) % VOCABULARY
    found = compare(write_run(tmp_path / "a", base), write_run(tmp_path / "b", other)).tokens
    assert found is not None
    assert (found.documents, found.unlike.named) == (29, ["doc-7"])
    assert found.tokens == sum(map(len, base.ids)) - len(base.ids[7])


def test_tiers_that_are_missing_are_named(
    tmp_path: Path, base: Corpus, other: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    a = write_run(tmp_path / "a", base, tiers=("scores",))
    b = write_run(tmp_path / "b", other)
    found = compare(a, b)
    assert found.missing["tokens"] == "A kept no tokens; score it with --keep tokens"
    assert "--keep topk" in found.missing["distributions"]
    # What the plans say is said before anything is read.
    monkeypatch.setattr(comparison, "compare_documents", None)
    with pytest.raises(ValueError, match="level: 'tokens' cannot be compared: A kept no tokens"):
        compare(a, b, level="tokens")
    with pytest.raises(ValueError, match=r"level: 'distributions' cannot be .* --keep topk"):
        compare(a, b, level="distributions")
    with pytest.raises(ValueError, match="level: 'deep' is not one of documents, tokens"):
        compare(a, b, level="deep")


def test_no_common_document_leaves_distributions_of_documents(tmp_path: Path, base: Corpus) -> None:
    later = Corpus(60, seed=9, sources=("a",))
    a, b = write_run(tmp_path / "a", base), write_run(tmp_path / "b", later, name="new-{}".format)
    found = compare_runs(a.uri, b.uri)
    assert found.documents.all is None
    assert (found.documents.only_base.count, found.documents.only_other.count) == (30, 60)
    bins = [
        np.floor(r.table(columns=["bits_per_byte"])["bits_per_byte"].to_numpy() / 0.02)
        for r in (a, b)
    ]
    total = found.shifts[0]
    expected = scipy.stats.wasserstein_distance(*(bins[i] * 0.02 for i in range(2)))
    assert total.wasserstein == pytest.approx(expected)
    edges = np.quantile(bins[0], np.arange(1, 10) / 10, method="inverted_cdf")
    p, q = (np.bincount(np.searchsorted(edges, x), minlength=10) for x in bins)
    p, q = np.maximum(p, 0.5) / len(bins[0]), np.maximum(q, 0.5) / len(bins[1])
    assert total.psi == pytest.approx(((q - p) * np.log(q / p)).sum())
    assert total.psi_by_chance == pytest.approx(9 * (1 / 30 + 1 / 60))
    page = (tmp_path / "compare/a-b/compare.html").read_text()
    assert "no document is in both runs" in page
    assert set(found.missing) == {"documents", "tokens", "distributions"}
    with pytest.raises(ValueError, match="no document is in both runs"):
        compare(a, b, level="documents")
    (alert,) = find_alerts(found)
    assert alert.endswith("Only distributions are compared.")
    (alert,) = find_alerts(replace(found, shifts=[]))
    assert alert.startswith("Nothing is paired") and "distributions" not in alert


def test_the_median_of_a_histogram_is_within_its_bin(tmp_path: Path, base: Corpus) -> None:
    """Of 1, 2 and 1 documents in three bins it is the middle; of 3 and 1, two thirds of one."""

    def count(documents: Sequence[int]) -> pa.Table:
        bins = list(range(40, 40 + len(documents)))
        names = {"panel": "bits_per_byte", "source": "a", "language": "en"}
        columns = {name: [value] * len(bins) for name, value in names.items()}
        return pa.table({**columns, "bin": bins, "documents": documents})

    (total, *_) = measure_shift(count([1, 2, 1]), count([3, 1]))
    assert total.base_median == pytest.approx(41.5 * 0.02)
    assert total.other_median == pytest.approx((40 + 2 / 3) * 0.02)


def test_the_command_of_runs_in_two_folders_says_where_the_page_goes(
    tmp_path: Path, base: Corpus
) -> None:
    a, b = write_run(tmp_path / "x/a", base), write_run(tmp_path / "y/b", base)
    near = write_run(tmp_path / "x/c", base)
    command = f"logitmill compare {a.uri} {near.uri}"
    assert show_against(compare(a, near)).command == command
    command = f"logitmill compare {a.uri} {b.uri} --out compare"
    assert show_against(compare(a, b)).command == command


def test_a_part_that_is_gone_is_named(tmp_path: Path, base: Corpus) -> None:
    a, b = write_run(tmp_path / "a", base), write_run(tmp_path / "b", base)
    (tmp_path / "b/tokens/part-00003.parquet").unlink()
    with pytest.raises(ValueError, match=r"run: .*/b' lacks tokens/part-00003.parquet"):
        compare(a, b)


def test_the_index_by_chance_is_its_mean_over_draws_of_one_population() -> None:
    """Of two classes, since two bins hold all documents."""
    rng, indices = np.random.default_rng(3), []
    for _ in range(2000):
        sides = [rng.multinomial(count, [0.5, 0.5]) for count in (400, 900)]
        ours, theirs = (
            pa.table(
                {
                    "panel": ["bits_per_byte"] * 2,
                    "source": ["a"] * 2,
                    "language": ["en"] * 2,
                    "bin": [40, 41],
                    "documents": side,
                }
            )
            for side in sides
        )
        (total, _) = measure_shift(ours, theirs)
        indices.append(total.psi)
    assert total.psi_by_chance == pytest.approx(1 / 400 + 1 / 900)
    # The mean's own error is about 3 % of it.
    assert np.mean(indices) == pytest.approx(total.psi_by_chance, rel=0.12)


def test_other_vocabularies_have_no_exact_divergence(tmp_path: Path, base: Corpus) -> None:
    a, b = write_run(tmp_path / "a", base), write_run(tmp_path / "b", base)
    b.plan["model"]["vocab_size"] += 1
    assert "logits are over 50 tokens in A and 51 in B" in compare(a, b).missing["distributions"]


def test_an_incomplete_run_is_refused(tmp_path: Path, base: Corpus) -> None:
    a, b = write_run(tmp_path / "a", base), write_run(tmp_path / "b", base)
    (tmp_path / "b/manifest.json").unlink()
    with pytest.raises(ValueError, match=r"run: .*/b' is not complete"):
        compare_runs(a.uri, b.uri)


# ---- sums ------------------------------------------------------------------------------------


def test_quantiles_beyond_what_is_held_are_within_one_percent() -> None:
    rng = np.random.default_rng(5)
    drawn = np.concatenate([-np.exp(rng.normal(-3, 2, 20_000)), np.exp(rng.normal(-3, 2, 30_000))])
    rng.shuffle(drawn)
    values = Values(most=1000)
    for part in np.array_split(drawn, 50):
        values.add(part)
    assert not values.is_exact
    shares = [0, 0.001, 0.01, 0.1, 0.3, 0.5, 0.9, 0.999, 1]
    exact = np.quantile(drawn, shares, method="lower")
    assert values.quantiles(shares) == pytest.approx(exact.tolist(), rel=0.0101, abs=1e-6)
    assert values.quantiles([0, 1]) == [drawn.min(), drawn.max()]


@pytest.mark.parametrize("count", [5, 6, 17, 100, 999, 1001, 4000])
def test_the_median_lies_in_its_interval_in_95_of_100_cases(count: int) -> None:
    values = Values()
    values.add(np.arange(count, dtype=np.float64))
    interval = values.median_interval()
    if count < 6:
        assert interval is None
        return
    assert interval is not None
    low, high = (int(end) for end in interval)
    assert low + high == count - 1
    # The median is outside if no more than `low` draws lie below it.
    outside = 2 * scipy.stats.binom.cdf(low, count, 0.5)
    assert outside <= 0.05
    assert 2 * scipy.stats.binom.cdf(low + 2, count, 0.5) > 0.05


def test_moments_of_parts_are_those_of_all() -> None:
    rng = np.random.default_rng(6)
    # A mean a million times the spread, which a sum of squares would drown.
    x = 1e6 + rng.normal(size=5000)
    y = 2 * x + rng.normal(size=5000)
    moments = Moments(2)
    for cut in np.array_split(np.arange(5000), 37):
        moments.add(x[cut], y[cut])
    assert moments.mean == pytest.approx([x.mean(), y.mean()])
    expected = np.cov(x - 1e6, y - 2e6)
    assert moments.covariance(0, 1) == pytest.approx(expected[0, 1], rel=1e-6)
    assert moments.correlation(0, 1) == pytest.approx(np.corrcoef(x - 1e6, y - 2e6)[0, 1])


def test_sources_beyond_the_bound_are_added_up_as_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sums, "MAX_GROUPS", 3)
    corpus = Corpus(30, seed=1, sources=tuple("abcdef"))
    runs = [write_run(tmp_path / n, c) for n, c in (("a", corpus), ("b", corpus.moved(1, 2)))]
    found: Comparison = compare(*runs)
    assert {d.source: d.documents for d in found.documents.groups} == {
        **{"a": 5, "b": 5, "c": 5},
        "(other)": 15,
    }


@pytest.mark.parametrize(
    ("value", "said"),
    [(0.0, "0"), (-0.0004, "0.000"), (0.0004, "0.000"), (-2.0, "-2.000"), (1234.5, "+1,234.500")],
)
def test_differences_have_a_sign_where_there_is_one_to_see(value: float, said: str) -> None:
    assert signed(value, 3) == said


@pytest.mark.parametrize(
    ("value", "error", "sign", "said"),
    [
        (1.00412, 0.0003173, "", "1.00412 \u00b1 0.00032"),
        (0.121732, 0.0060194, "+", "+0.1217 \u00b1 0.0060"),
        (-25.36, 1.234, "+", "-25.4 \u00b1 1.2"),
        (12345.6, 234.5, "", "12,346 \u00b1 234"),
        (3e-9, 2e-10, "", "3e-09 \u00b1 2e-10"),
        (0.25, math.nan, "+", "+0.2500"),
        (0.0, 0.0, "+", "0"),
        (0.0, 0.001, "+", "0 \u00b1 0.0010"),
        (math.nan, math.nan, "", "\u2013"),
    ],
)
def test_a_value_has_the_digits_of_its_error(
    value: float, error: float, sign: str, said: str
) -> None:
    assert estimate(Estimate(value, error), sign) == said


def test_names_of_an_axis_are_short_and_unlike() -> None:
    names = ["short", *(f"very/long/source/name/{end}/of/many" for end in ("a", "b", "c"))]
    fitting = fit_names(names)
    assert fitting[0] == "short" and len(set(fitting)) == 4
    assert fitting[1] == "very/long/sour\u2026of/many" and fitting[3] == f"{fitting[1]} (3)"
    assert fit_names(["wiki_en", "wiki", "wiki"]) == ["wiki_en", "wiki", "wiki (2)"]
