"""Quantiles from additive counts against numpy's of the values themselves."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from logitmill.engine.records import DocumentRecord, DocumentScore
from logitmill.flows.sketches import (
    LARGEST,
    RELATIVE_ERROR,
    SKETCHES,
    SMALLEST,
    WIDTH,
    quantile,
    quantiles,
    sketch_bin,
    sketch_value,
)
from logitmill.flows.summary import Summary, merge_counts

SHARES = (0.0, 0.001, 0.05, 0.3, 0.5, 0.6, 0.99, 1.0)
DRAWS: dict[str, Callable[[np.random.Generator, int], np.ndarray]] = {
    "bits_per_byte": lambda rng, n: rng.lognormal(0.0, 0.5, n),
    "token_perplexity": lambda rng, n: np.exp(rng.exponential(2.0, n)),
    "min_k_plus_plus_20": lambda rng, n: rng.normal(-0.5, 1.0, n),
}


def make_documents(seed: int, count: int) -> list[DocumentRecord]:
    """Records of random scores and sizes, of 3 sources in 2 languages on 2 days."""
    rng = np.random.default_rng(seed)
    scores = {name: DRAWS[name](rng, count) for name in SKETCHES}
    return [
        DocumentRecord(
            str(i),
            source="abc"[rng.integers(3)],
            language=("en", "de")[rng.integers(2)],
            day=("", "2026-11-23")[rng.integers(2)],
            loglikelihood=-1.0,
            num_tokens_scored=int(rng.integers(1, 5000)),
            num_bytes=int(rng.integers(0, 20000)),
            nll_per_token=1.0,
            **{name: float(values[i]) for name, values in scores.items()},
        )
        for i in range(count)
    ]


def count(records: list[DocumentRecord]) -> pa.Table:
    """The counts of one shard."""
    made = Summary()
    for record in records:
        made.add(DocumentScore(0, record))
    return made.counts()


def exact(records: list[DocumentRecord], score: str, share: float, weight: str) -> float:
    """What numpy says of the values, of a share from 0 to 1 or else the nearest of these."""
    values = np.array([getattr(record, score) for record in records])
    weights = {
        "documents": np.ones(len(records)),
        "tokens": np.array([record.num_tokens_scored for record in records]),
        "bytes": np.array([record.num_bytes for record in records]),
    }[weight]
    found = np.quantile(values, min(max(share, 0.0), 1.0), weights=weights, method="inverted_cdf")
    return float(found)


@pytest.mark.parametrize("weight", ["documents", "tokens", "bytes"])
@pytest.mark.parametrize("score", SKETCHES)
def test_quantiles_are_numpys_within_the_error(score: str, weight: str) -> None:
    records = make_documents(1, 3000)
    counts = merge_counts([count(records[:700]), count(records[700:])])
    for share in SHARES:
        found = quantile(counts, score, share, weight=weight)
        assert found is not None
        # Weights of a shard are rounded: the share is met to 1 %.
        apart = 0.0 if weight == "documents" else 0.01
        low, high = (exact(records, score, share + d, weight) for d in (-apart, apart))
        error = 1.0001 * RELATIVE_ERROR
        assert low - error * abs(low) <= found <= high + error * abs(high)


def test_quantiles_of_groups_are_those_of_their_documents() -> None:
    records = make_documents(2, 1500)
    shares = (0.3, 0.125)
    table = quantiles(
        count(records), "token_perplexity", shares, by=("language", "source"), weight="bytes"
    )
    assert table.column_names == [
        *("language", "source", "documents", "tokens", "bytes"),
        *("q30", "q12.5"),
    ]
    rows = table.to_pylist()
    keys = [(row["language"], row["source"]) for row in rows]
    assert keys == [(language, source) for language in ("de", "en") for source in "abc"]
    for row, (language, source) in zip(rows, keys, strict=True):
        inside = [r for r in records if (r.language, r.source) == (language, source)]
        # Documents of no bytes have no weight, but they are there.
        weighed = [r for r in inside if r.num_bytes]
        assert row["bytes"] == sum(r.num_bytes for r in weighed)
        assert row["documents"] == len(inside)
        for share, name in zip(shares, ("q30", "q12.5"), strict=True):
            expected = exact(inside, "token_perplexity", share, "bytes")
            assert row[name] == pytest.approx(expected, rel=1.0001 * RELATIVE_ERROR)


def test_counts_may_be_filtered_first() -> None:
    records = make_documents(3, 400)
    counts = count(records)
    german = counts.filter(pc.equal(counts["language"], "de"))
    expected = exact([r for r in records if r.language == "de"], "bits_per_byte", 0.5, "documents")
    assert quantile(german, "bits_per_byte", 0.5) == pytest.approx(expected, rel=0.0201)


def test_small_shares_are_whole_documents() -> None:
    records = [DocumentRecord(str(i), bits_per_byte=float(i), num_bytes=1) for i in range(1, 11)]
    counts = count([r for r in records if r.bits_per_byte])
    for share, expected in ((0.0, 1), (0.1, 1), (0.11, 2), (0.3, 3), (0.7, 7), (1.0, 10)):
        assert quantile(counts, "bits_per_byte", share) == pytest.approx(expected, rel=0.0201)


def test_nothing_has_no_quantile() -> None:
    records = [DocumentRecord("a", status="empty"), DocumentRecord("b", bits_per_byte=1.0)]
    counts = count(records)
    assert quantile(counts, "token_perplexity", 0.5) is None
    assert quantile(counts, "bits_per_byte", 0.5, weight="bytes") is None
    assert quantile(counts, "bits_per_byte", 0.5) == pytest.approx(1.0, rel=0.0201)
    assert quantiles(counts.slice(0, 0), "bits_per_byte", [0.5]).num_rows == 0


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"score": "perplexity"}, "score: 'perplexity' is not one of bits_per_byte"),
        ({"weight": "words"}, "weight: 'words' is not one of documents, tokens, bytes"),
        ({"shares": [30]}, "share: 30 is not from 0 to 1"),
        ({"shares": [math.nan]}, "share: nan is not from 0 to 1"),
        ({"by": ["doc_id"]}, "by: 'doc_id' is not one of source, language, length, day"),
    ],
)
def test_what_is_not_there_is_named(settings: dict[str, Any], said: str) -> None:
    asked = {"score": "bits_per_byte", "shares": [0.5], **settings}
    with pytest.raises(ValueError, match=said):
        quantiles(count([]), **asked)


@pytest.mark.parametrize("width", [1, WIDTH])
def test_bins_are_ordered_as_values_are_and_stand_for_them(width: int) -> None:
    rng = np.random.default_rng(4)
    sizes = 10.0 ** rng.uniform(-8, 11.9, 4000)
    values = np.sort(np.concatenate([sizes, -sizes, [0.0]]))
    bins = sketch_bin(values, width)
    assert bins.dtype == np.int32
    assert (np.diff(bins) >= 0).all()
    assert (bins % width == 0).all()
    np.testing.assert_array_equal(bins, -sketch_bin(-values, width))
    near = np.abs(values) < SMALLEST
    assert (bins[near] == 0).all()
    far = sketch_value(bins, width)[~near]
    np.testing.assert_allclose(far, values[~near], rtol=0.01001 * width)
    np.testing.assert_array_equal(sketch_bin(far, width), bins[~near])


def test_bins_of_older_runs_are_read_within_the_error() -> None:
    values = np.exp(np.random.default_rng(5).normal(0.0, 3.0, 4000))
    older = sketch_value(sketch_bin(values), WIDTH)
    np.testing.assert_allclose(older, values, rtol=RELATIVE_ERROR)


def test_what_is_beyond_the_last_bin_is_in_it() -> None:
    ends = np.array([-math.inf, -1e300, LARGEST, 1e300, math.inf])
    bins = sketch_bin(ends)
    np.testing.assert_array_equal(bins, bins[2] * np.array([-1, -1, 1, 1, 1]))
    assert sketch_value(bins[-1:])[0] == pytest.approx(LARGEST, rel=0.02)


def test_scores_that_are_no_numbers_are_left_out() -> None:
    records = [
        DocumentRecord(str(v), nll_per_token=1.0, min_k_plus_plus_20=v)
        for v in (math.nan, None, -2.0)
    ]
    counts = count(records)
    rows = counts.filter(pc.equal(counts["panel"], "sketch/min_k_plus_plus_20"))
    assert rows["documents"].to_pylist() == [1]
