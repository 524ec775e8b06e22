"""Divergences from stored distributions, against closed forms and float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from logitmill.engine.losses import full_kl, sampled_cross_entropy, top_k_kl
from oracles import zipf
from scipy.special import log_softmax, logsumexp, rel_entr


def stored(p: np.ndarray, k: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The k likeliest tokens of each row, and the tail."""
    ids = np.argsort(-p, axis=-1, kind="stable")[..., :k]
    kept = np.take_along_axis(p, ids, -1)
    rest = p.copy()
    np.put_along_axis(rest, ids, 0.0, -1)
    with np.errstate(divide="ignore"):
        tail = np.log(rest.sum(-1))
    return (
        torch.from_numpy(ids.astype(np.int32)),
        torch.from_numpy(np.log(kept)),
        torch.from_numpy(tail),
    )


def test_the_tail_makes_it_a_divergence() -> None:
    """(0.6, 0.4) against (0.9, 0.1), k = 1: without the tail -0.243279, with it 0.311239."""
    p, logits = np.array([[0.6, 0.4]]), torch.tensor([[0.9, 0.1]]).log()
    assert top_k_kl(logits, *stored(p, 1)).item() == pytest.approx(0.311239, abs=2e-6)
    assert full_kl(logits, torch.from_numpy(np.log(p))).item() == pytest.approx(0.311239, abs=2e-6)
    assert 0.6 * np.log(0.6 / 0.9) == pytest.approx(-0.243279, abs=1e-6)


def test_zipf_to_uniform() -> None:
    p, logits = zipf(1000)[None], torch.zeros(1, 1000)
    assert full_kl(logits, torch.from_numpy(np.log(p))).item() == pytest.approx(
        1.716744246, abs=3e-6
    )
    assert top_k_kl(logits, *stored(p, 20)).item() == pytest.approx(1.423138113, abs=3e-6)
    back = full_kl(torch.from_numpy(np.log(p)), torch.zeros(1, 1000))
    assert back.item() == pytest.approx(1.017336823, abs=3e-6)


def test_the_circulant_both_ways() -> None:
    def row(stay: float, following: float, rest: float) -> np.ndarray:
        p = np.full(64, rest / 64)
        p[0] += stay
        p[1] += following
        return np.log(p[None])

    p, q = row(0.5, 0.3, 0.2), row(0.3, 0.3, 0.4)
    found = [full_kl(torch.from_numpy(a), torch.from_numpy(b)).item() for a, b in ((q, p), (p, q))]
    assert found == pytest.approx([0.112363541, 0.119701789], abs=1e-6)


@settings(max_examples=60)
@given(st.integers(0, 2**32 - 1), st.integers(1, 30), st.floats(0.1, 60), st.floats(0.1, 60))
def test_it_is_that_of_k_and_one_outcomes_and_at_most_the_full_one(
    seed: int, k: int, spread: float, other: float
) -> None:
    made = np.random.default_rng(seed)
    teacher = log_softmax(made.normal(scale=spread, size=(4, 30)), axis=-1)
    student = made.normal(scale=other, size=(4, 30))
    ids, logprobs, tail = stored(np.exp(teacher), k)
    found = top_k_kl(torch.from_numpy(student), ids, logprobs, tail).item()
    q = np.exp(log_softmax(student, axis=-1))
    kept = np.take_along_axis(q, ids.numpy().astype(int), -1)
    p_k = np.exp(logprobs.numpy())
    p_rest, q_rest = np.exp(tail.numpy()), q.copy()
    np.put_along_axis(q_rest, ids.numpy().astype(int), 0.0, -1)
    expected = (rel_entr(p_k, kept).sum(-1) + rel_entr(p_rest, q_rest.sum(-1))).mean()
    whole = full_kl(torch.from_numpy(student), torch.from_numpy(teacher)).item()
    assert found == pytest.approx(expected, rel=2e-4, abs=2e-5)
    assert whole == pytest.approx(rel_entr(np.exp(teacher), q).sum(-1).mean(), rel=2e-4, abs=2e-5)
    assert 0 <= found <= whole * (1 + 1e-4) + 1e-5


@settings(max_examples=40)
@given(st.integers(0, 2**32 - 1), st.floats(0.01, 30))
def test_it_is_never_negative_of_a_student_that_is_nearly_the_teacher(
    seed: int, spread: float
) -> None:
    made = np.random.default_rng(seed)
    z = made.normal(scale=spread, size=(5, 200)).astype(np.float32)
    ids, logprobs, tail = stored(np.exp(log_softmax(z.astype(float), axis=-1)), 20)
    for student in (z, z + made.normal(scale=1e-6, size=z.shape).astype(np.float32)):
        logits = torch.from_numpy(student)
        for values in (logprobs, logprobs.half()):
            found = top_k_kl(logits, ids, values, tail).item()
            assert 0 <= found < 1e-5
        assert 0 <= full_kl(logits, torch.from_numpy(z)).item() < 1e-9


def test_gradients_are_those_of_the_plain_formula() -> None:
    made = torch.Generator().manual_seed(0)
    teacher = (torch.randn(6, 50, generator=made) * 3).double().log_softmax(-1)
    ids, logprobs, tail = stored(teacher.exp().numpy(), 8)
    for spread in (1.0, 30.0):
        start = (torch.randn(6, 50, generator=made) * spread).double()
        logits = start.clone().requires_grad_()
        full_kl(logits, teacher).backward()
        # Of the cross-entropy to the teacher: (q - p) / rows.
        expected = (start.softmax(-1) - teacher.exp()) / 6
        torch.testing.assert_close(logits.grad, expected, atol=2e-6, rtol=1e-4)
        logits = start.clone().requires_grad_()
        top_k_kl(logits, ids, logprobs, tail).backward()
        ours, logits.grad = logits.grad, None
        q = logits.log_softmax(-1)
        kept = q.gather(-1, ids.long())
        rest = q.scatter(-1, ids.long(), -torch.inf).logsumexp(-1)
        plain = -(logprobs.exp() * kept).sum(-1) - tail.exp() * rest
        plain.mean().backward()
        torch.testing.assert_close(ours, logits.grad, atol=2e-6, rtol=1e-4)


def test_what_has_no_mass_has_a_gradient_without_nan() -> None:
    teacher = torch.tensor([[0.0, -torch.inf, -torch.inf]])
    logits = torch.tensor([[1.0, 200.0, -200.0]], requires_grad=True)
    found = full_kl(logits, teacher)
    found.backward()
    assert found.item() == pytest.approx(199.0, rel=1e-5)
    assert logits.grad is not None and torch.isfinite(logits.grad).all()
    whole = torch.zeros(2, 3, requires_grad=True)
    ids = torch.arange(3, dtype=torch.int32).expand(2, 3)
    thirds = torch.full((2, 3), 1 / 3).log()
    found = top_k_kl(whole, ids, thirds, torch.full((2,), -torch.inf))
    found.backward()
    assert found.item() == pytest.approx(0, abs=1e-7)
    assert whole.grad is not None and torch.isfinite(whole.grad).all()


def test_masked_rows_count_for_nothing() -> None:
    p = np.exp(log_softmax(np.random.default_rng(0).normal(size=(2, 5, 9)), axis=-1))
    logits = torch.randn(2, 5, 9)
    mask = torch.zeros(2, 5, dtype=torch.bool)
    mask[0, :2] = True
    some = top_k_kl(logits, *stored(p, 3), mask=mask)
    alone = top_k_kl(logits[0, :2], *stored(p[0, :2], 3))
    torch.testing.assert_close(some, alone)
    assert top_k_kl(logits, *stored(p, 3), mask=mask & False).item() == 0


def test_draws_estimate_the_cross_entropy() -> None:
    made = np.random.default_rng(0)
    teacher = log_softmax(made.normal(size=7))
    logits = torch.from_numpy(made.normal(size=7)).expand(4000, 7)
    draws = torch.from_numpy(made.choice(7, p=np.exp(teacher), size=(4000, 12)))
    q = logits[0].numpy() - logsumexp(logits[0].numpy())
    expected = -(np.exp(teacher) * q).sum()
    deviation = np.sqrt((np.exp(teacher) * (q + expected) ** 2).sum() / 48_000)
    assert abs(sampled_cross_entropy(logits, draws).item() - expected) < 4 * deviation


def test_what_does_not_fit_is_named() -> None:
    ids, logprobs, tail = stored(np.full((2, 9), 1 / 9), 9)
    with pytest.raises(ValueError, match="top_ids: 8 is not in the student's vocabulary of 8"):
        top_k_kl(torch.zeros(2, 8), ids, logprobs, tail)
    with pytest.raises(ValueError, match=r"student_logits: of shape \(2, 8\), beside \(2, 9\)"):
        full_kl(torch.zeros(2, 8), torch.zeros(2, 9))
    with pytest.raises(ValueError, match=r"student_logits: of shape \(3,\), beside \(2,\)"):
        top_k_kl(torch.zeros(3, 9), ids, logprobs, tail)
