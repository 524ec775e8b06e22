"""Document scores from token records: each by its published example or its definition."""

from __future__ import annotations

import math
import zlib

import numpy as np
import pytest
from logitmill.engine import metrics


@pytest.mark.parametrize(
    ("text", "words"), [(" a b ", 4), ("", 1), ("a", 1), ("a\n\n b\tc", 3), ("\u3000a", 2)]
)
def test_words_are_counted_as_lm_evaluation_harness_does(text: str, words: int) -> None:
    assert metrics.count_words(text) == words


def test_aggregation_three_means_of_one_corpus() -> None:
    """(1 token, 10 nats) and (99 tokens, 1 nat): evaluate#560 against a token-weighted mean."""
    documents = [(-10.0, 1), (-99.0, 99)]
    total, count = map(sum, zip(*documents, strict=True))
    assert metrics.perplexity(total, count) == pytest.approx(2.974274, abs=1e-6)
    each = [metrics.nll_per_token(*d) for d in documents]
    assert math.exp(np.mean(each)) == pytest.approx(244.691932, abs=1e-6)
    each = [metrics.perplexity(*d) for d in documents]
    assert np.mean(each) == pytest.approx(11014.592038, abs=1e-6)


def test_a_uniform_byte_model_has_eight_bits_a_byte() -> None:
    assert metrics.bits(-1000 * math.log(256), 1000) == pytest.approx(8.0, rel=1e-12)
    assert metrics.perplexity(-1000 * math.log(256), 1000) == pytest.approx(256.0, rel=1e-12)


def test_a_perplexity_beyond_float64_is_infinite() -> None:
    assert metrics.perplexity(-1000.0, 1) == math.inf


@pytest.mark.parametrize(("n", "lowest"), [(1, 1), (4, 1), (5, 1), (9, 1), (10, 2), (100, 20)])
def test_min_k_takes_the_lowest_fifth_and_one_at_least(n: int, lowest: int) -> None:
    """floor(k n) = 0 gives NaN on short text elsewhere."""
    logprob = -np.random.default_rng(n).exponential(size=n).astype(np.float32)
    expected = np.sort(logprob)[:lowest].astype(np.float64).mean()
    assert metrics.min_k_prob(logprob, 0.2) == pytest.approx(expected, rel=1e-12)


def test_min_100_percent_is_the_mean() -> None:
    logprob = -np.random.default_rng(0).exponential(size=33).astype(np.float32)
    mean = logprob.astype(np.float64).mean()
    assert metrics.min_k_prob(logprob, 1.0) == pytest.approx(mean, rel=1e-12)


def test_min_k_plus_plus_normalises_by_the_models_own_spread() -> None:
    logprob = np.array([-1.0, -4.0, -2.0], np.float32)
    entropy = np.array([1.0, 2.0, 0.5], np.float32)
    varentropy = np.array([4.0, 0.25, 1.0], np.float32)
    scaled = [0.0, -4.0, -1.5]
    assert metrics.min_k_plus_plus(logprob, entropy, varentropy, 0.2) == pytest.approx(-4.0)
    whole = metrics.min_k_plus_plus(logprob, entropy, varentropy, 1.0)
    assert whole == pytest.approx(np.mean(scaled))


def test_min_k_plus_plus_of_a_uniform_model_is_zero_and_no_nan() -> None:
    flat = np.full(8, math.log(50), np.float32)
    assert metrics.min_k_plus_plus(-flat, flat, np.zeros(8, np.float32), 0.2) == 0.0


def test_zlib_ratio_is_of_the_mean() -> None:
    text = b"to be or not to be, that is the question" * 3
    assert metrics.zlib_bytes(text) == len(zlib.compress(text))
    assert metrics.zlib_ratio(-30.0, 10, 60) == pytest.approx(-0.05)
