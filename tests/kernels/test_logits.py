"""Statistics of a row of logits against float64, by definition."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from logitmill.kernels.logits import row_statistics
from oracles import entropy, row_statistics_float64, varentropy, zipf


def run(logits: np.ndarray, targets: np.ndarray) -> dict[str, np.ndarray]:
    result = row_statistics(
        torch.from_numpy(logits.astype(np.float32)), torch.from_numpy(targets.astype(np.int64))
    )
    return {name: column.numpy() for name, column in result._asdict().items()}


def assert_matches(logits: np.ndarray, targets: np.ndarray) -> None:
    logits = logits.astype(np.float32)
    found, expected = run(logits, targets), row_statistics_float64(logits, targets)
    for name in ("rank", "top1_id"):
        np.testing.assert_array_equal(found[name], expected[name])
    for name in ("logprob", "entropy", "top1_logprob", "logsumexp"):
        np.testing.assert_allclose(found[name], expected[name], rtol=2e-6, atol=5e-6)
    np.testing.assert_allclose(found["varentropy"], expected["varentropy"], rtol=1e-4, atol=1e-4)
    assert (found["varentropy"] >= 0).all()


@given(st.integers(0, 2**32 - 1), st.integers(1, 700), st.integers(1, 9), st.floats(0.01, 30))
def test_random_rows(seed: int, vocab_size: int, num_rows: int, spread: float) -> None:
    draw = np.random.default_rng(seed)
    logits = draw.normal(scale=spread, size=(num_rows, vocab_size)) + draw.normal(scale=50)
    assert_matches(logits, draw.integers(vocab_size, size=num_rows))


@given(st.integers(0, 2**32 - 1), st.integers(2, 50))
def test_ties_share_the_better_rank_and_the_lowest_id_is_first(seed: int, vocab_size: int) -> None:
    draw = np.random.default_rng(seed)
    logits = draw.integers(-2, 3, size=(8, vocab_size))
    assert_matches(logits, draw.integers(vocab_size, size=8))


def test_ties_by_hand() -> None:
    logits = np.array([[1.0, 3.0, 3.0, 2.0]] * 4)
    found = run(logits, np.arange(4))
    assert found["rank"].tolist() == [4, 1, 1, 3]
    assert found["top1_id"].tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize("offset", [0.0, 1e4, -1e4, 3e37])
def test_far_from_zero(offset: float) -> None:
    logits = np.array([[0.0, -1.0, -30.0], [0.0, 0.0, -1e4]]) + offset
    assert_matches(logits, np.array([2, 0]))


def test_one_hot_row_is_certain() -> None:
    logits = np.full((2, 1000), -200.0)
    logits[:, 7] = 200.0
    found = run(logits, np.array([7, 8]))
    assert found["logprob"].tolist() == [0.0, -400.0]
    assert found["entropy"].tolist() == [0.0, 0.0]
    assert found["varentropy"].tolist() == [0.0, 0.0]
    assert found["rank"].tolist() == [1, 2]


def test_impossible_tokens_are_allowed() -> None:
    """A masked token has a logit of -inf: fine unless it is what came."""
    logits = np.array([[0.0, -np.inf, 0.0], [0.0, -np.inf, 0.0]])
    found = run(logits, np.array([0, 1]))
    assert found["logprob"][0] == pytest.approx(-np.log(2))
    assert not np.isfinite(found["logprob"][1])


def test_a_row_that_holds_a_nan_says_so_and_leaves_the_others_alone() -> None:
    draw = np.random.default_rng(0)
    logits = draw.normal(size=(3, 40)).astype(np.float32)
    targets = np.array([1, 2, 3])
    expected = run(logits, targets)
    logits[1, 30] = np.nan
    found = run(logits, targets)
    assert np.isnan(found["logprob"][1])
    for name, column in expected.items():
        np.testing.assert_array_equal(found[name][[0, 2]], column[[0, 2]])


def test_an_infinite_row_has_no_logprob() -> None:
    assert np.isnan(run(np.array([[0.0, np.inf, 1.0]]), np.array([1]))["logprob"]).all()


@pytest.mark.parametrize(
    ("vocab_size", "expected"),
    [
        (256, 5.545177444),
        (32_000, 10.373491182),
        (50_257, 10.824905120),
        (128_256, 11.761783546),
        (151_936, 11.931214659),
    ],
)
def test_uniform_rows(vocab_size: int, expected: float) -> None:
    found = run(np.full((1, vocab_size), 3.25), np.array([vocab_size - 1]))
    assert found["logprob"][0] == pytest.approx(-expected, rel=1e-6)
    assert found["entropy"][0] == pytest.approx(expected, rel=1e-6)
    assert found["varentropy"][0] == 0.0
    assert found["rank"][0] == 1


def test_zipf_row() -> None:
    p = zipf(1000)
    found = run(np.log(p)[None], np.array([9]))
    assert entropy(p) == pytest.approx(5.191011033, abs=1e-9)
    assert varentropy(p) == pytest.approx(4.580029538, abs=1e-9)
    assert found["entropy"][0] == pytest.approx(5.191011033, rel=1e-6)
    assert found["varentropy"][0] == pytest.approx(4.580029538, rel=1e-5)
    assert found["rank"][0] == 10


def test_confident_rows_do_not_cancel() -> None:
    """E[x^2] - E[x]^2 about zero would lose these: p(top) = 1 - 3e-5 at a logit of 1e4."""
    logits = np.full((1, 8), 1e4 - 12.0)
    logits[0, 3] = 1e4
    expected = row_statistics_float64(logits.astype(np.float32), np.array([3]))
    found = run(logits, np.array([3]))
    np.testing.assert_allclose(found["varentropy"], expected["varentropy"], rtol=1e-3)
    np.testing.assert_allclose(found["entropy"], expected["entropy"], rtol=1e-3)


def test_a_row_has_the_same_bits_alone() -> None:
    draw = np.random.default_rng(1)
    logits = draw.normal(scale=4, size=(64, 1013))
    targets = draw.integers(1013, size=64)
    together = run(logits, targets)
    for i in (0, 17, 63):
        alone = run(logits[i : i + 1], targets[i : i + 1])
        assert all(alone[name][0] == together[name][i] for name in alone)
