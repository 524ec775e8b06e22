"""Divergences against closed forms and scipy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch
from logitmill.flows.compare import divergences
from logitmill.flows.compare.divergences import Candidates, Divergences, diverge, diverge_coarsely


def exact(p: np.ndarray, q: np.ndarray) -> Divergences:
    """Of single rows of probabilities."""
    rows = (torch.from_numpy(np.log(x)[None] + shift) for x, shift in ((p, 3.0), (q, -1.0)))
    return diverge(*rows, device="cpu")


def keep(logprobs_TV: np.ndarray, k: int) -> Candidates:
    """The k likeliest of each row, the lowest id first among equals."""
    order = np.argsort(-logprobs_TV, axis=1, kind="stable")
    rest = np.take_along_axis(logprobs_TV, order[:, k:], 1)
    with np.errstate(divide="ignore"):
        tail = scipy.special.logsumexp(rest, axis=1) if rest.size else np.full(len(rest), -np.inf)
    return Candidates(order[:, :k], np.take_along_axis(logprobs_TV, order[:, :k], 1), tail)


def zipf() -> np.ndarray:
    weights = 1.0 / np.arange(1, 1001)
    return weights / weights.sum()


def circulant(stay: float, step: float) -> np.ndarray:
    row = np.full(64, (1 - stay - step) / 64)
    row[0] += stay
    row[1] += step
    return row


def test_circulant_and_zipf() -> None:
    p, q = circulant(0.5, 0.3), circulant(0.3, 0.3)
    found, reverse = exact(p, q), exact(q, p)
    assert found.kl_T[0] == pytest.approx(0.112363541, abs=1e-9)
    assert reverse.kl_T[0] == pytest.approx(0.119701789, abs=1e-9)
    assert found.js_T[0] == pytest.approx(0.028556050, abs=1e-9)
    assert reverse.js_T[0] == pytest.approx(found.js_T[0], rel=1e-12)
    uniform = np.full(1000, 1e-3)
    found = exact(zipf(), uniform)
    assert found.kl_T[0] == pytest.approx(1.716744246, abs=1e-9)
    assert exact(uniform, zipf()).kl_T[0] == pytest.approx(1.017336823, abs=1e-9)
    assert found.js_T[0] == pytest.approx(0.252885419, abs=1e-9)
    for temperature, kl in ((0.5, 1.662175682), (2.0, 0.521932209)):
        other = zipf() ** (1 / temperature)
        assert exact(zipf(), other / other.sum()).kl_T[0] == pytest.approx(kl, abs=1e-9)


def test_two_states() -> None:
    """Rows of the Markov chain [[.9, .1], [.5, .5]], each beside the other."""
    found = exact(np.array([0.9, 0.1]), np.array([0.5, 0.5]))
    assert found.kl_T[0] == pytest.approx(math.log(2) - 0.325082973, abs=1e-9)


def test_what_one_rules_out() -> None:
    with np.errstate(divide="ignore"):
        sure, other = np.log(np.array([[1.0, 0.0]])), np.log(np.array([[0.0, 1.0]]))
    apart = diverge(torch.from_numpy(sure), torch.from_numpy(other), "cpu")
    assert apart.kl_T.tolist() == [math.inf]
    assert apart.js_T[0] == pytest.approx(math.log(2))
    half = diverge(torch.from_numpy(sure), torch.zeros(1, 2), "cpu")
    assert half.kl_T[0] == pytest.approx(math.log(2))


def test_equal_rows_are_zero_apart_to_the_bit_and_none_is_below(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(divergences, "_ROWS_AT_ONCE", 7)
    rng = np.random.default_rng(0)
    base = torch.from_numpy(rng.normal(size=(50, 300)) * 3).float()
    same = diverge(base, base.clone(), "cpu")
    assert not same.kl_T.any() and not same.js_T.any() and same.same_top_T.all()
    near = diverge(base, base + 1e-9 * torch.randn(50, 300, dtype=torch.float64), "cpu")
    assert (near.kl_T >= 0).all() and (near.js_T >= 0).all()
    other = base + torch.from_numpy(rng.normal(size=(50, 300)))
    found = diverge(base, other, "cpu")
    p, q = (scipy.special.softmax(x.double().numpy(), axis=1) for x in (base, other))
    np.testing.assert_allclose(found.kl_T, scipy.stats.entropy(p, q, axis=1), rtol=1e-9)
    assert (found.js_T <= math.log(2)).all()


def test_a_sum_over_what_is_kept_alone_would_be_negative() -> None:
    """(0.6, 0.4) and (0.9, 0.1), one kept: -0.243 without the tail, all of 0.311239 with it."""
    base, other = (np.log(np.array([[a, 1 - a]])) for a in (0.6, 0.9))
    found = diverge_coarsely(keep(base, 1), keep(other, 1))
    assert found.kl_T[0] == pytest.approx(0.311239, abs=1e-6)


def test_the_first_twenty_of_zipf() -> None:
    base = np.log(zipf())[None]
    kept = keep(base, 20)
    assert kept.log_tail_T[0] == pytest.approx(-0.655138174, abs=1e-9)
    # A uniform model that happens to list the same twenty first.
    found = diverge_coarsely(kept, keep(np.full((1, 1000), -math.log(1000)), 20))
    assert found.kl_T[0] == pytest.approx(1.423138113, abs=1e-9)


@pytest.mark.parametrize("k", [1, 4, 64])
def test_seeing_less_brings_closer(k: int) -> None:
    rng = np.random.default_rng(k)
    logits = rng.normal(size=(200, 64)) * 2
    base = scipy.special.log_softmax(logits, axis=1)
    other = scipy.special.log_softmax(logits + rng.normal(size=logits.shape), axis=1)
    full = diverge(torch.from_numpy(base), torch.from_numpy(other), "cpu")
    found = diverge_coarsely(keep(base, k), keep(other, max(1, k - 2)))
    assert (found.kl_T >= 0).all() and (found.kl_T <= full.kl_T + 1e-12).all()
    assert (found.js_T <= full.js_T + 1e-12).all()
    np.testing.assert_array_equal(found.same_top_T, full.same_top_T)
    same = diverge_coarsely(keep(base, k), keep(base, k))
    assert not same.kl_T.any() and not same.js_T.any()
    if k == 64:
        whole = diverge_coarsely(keep(base, 64), keep(other, 64))
        np.testing.assert_allclose(whole.kl_T, full.kl_T, rtol=1e-9)
        np.testing.assert_allclose(whole.js_T, full.js_T, rtol=1e-9)


def test_other_candidates_count_among_the_rest() -> None:
    """By hand: 0.5, 0.3 and a tail of 0.2, beside another pair of which one is shared."""
    base = Candidates(np.array([[7, 3]]), np.log([[0.5, 0.3]]), np.log([0.2]))
    other = Candidates(np.array([[9, 7]]), np.log([[0.6, 0.1]]), np.log([0.3]))
    found = diverge_coarsely(base, other)
    expected = 0.5 * math.log(0.5 / 0.1) + 0.5 * math.log(0.5 / 0.9)
    assert found.kl_T[0] == pytest.approx(expected)
    assert found.same_top_T.tolist() == [False]
