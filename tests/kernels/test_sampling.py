"""Draws from rows: their distribution, and what decides them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from logitmill.kernels import sampling
from logitmill.kernels.sampling import draw, uniforms
from scipy import stats

KEYS = torch.arange(20_000) * 7919 + 5


def splitmix64(state: int) -> int:
    """One number of the generator as its authors state it, from the state before the step."""
    z = (state + 0x9E3779B97F4A7C15) % 2**64
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return z ^ (z >> 31)


def test_numbers_are_splitmix64s() -> None:
    """Of the state 1234567 the first two are published with the generator."""
    assert [splitmix64(1234567), splitmix64(1234567 + 0x9E3779B97F4A7C15)] == [
        6457827717110365317,
        3203168211198807973,
    ]
    for key in (0, 1, -1, 2**62 + 12345, -(2**63)):
        (found,) = uniforms(torch.tensor([key]), 3).tolist()
        # The state is the key's own hash: neighbouring keys do not give overlapping sequences.
        state = splitmix64((key - 0x9E3779B97F4A7C15) % 2**64)
        expected = [
            (splitmix64((state + i * 0x9E3779B97F4A7C15) % 2**64) >> 11) / 2**53 for i in range(3)
        ]
        assert found == expected


def test_numbers_are_uniform_and_unrelated() -> None:
    found = uniforms(KEYS, 4).numpy()
    assert stats.kstest(found.ravel(), "uniform").pvalue > 1e-3
    related = np.corrcoef(np.concatenate([found[:-1], found[1:]], axis=1).T)
    assert np.abs(related - np.eye(8)).max() < 4.5 / np.sqrt(len(found))


@pytest.mark.parametrize("scale", [0.5, 3.0])
def test_draws_have_the_distribution_of_the_row(scale: float) -> None:
    logits = np.random.default_rng(0).normal(scale=scale, size=50).astype(np.float32)
    ids = draw(torch.from_numpy(logits).expand(len(KEYS), -1), KEYS, 8).numpy()
    assert ids.dtype == np.int32 and (np.diff(ids, axis=1) >= 0).all()
    p = np.exp(logits.astype(np.float64))
    expected = ids.size * p / p.sum()
    counts = np.bincount(ids.ravel(), minlength=50)
    kept = expected > 5
    found = [*counts[kept], counts[~kept].sum()]
    wanted = [*expected[kept], expected[~kept].sum()]
    if not wanted[-1]:
        found, wanted = found[:-1], wanted[:-1]
    assert stats.chisquare(found, wanted).pvalue > 1e-3


def test_what_has_no_weight_is_never_drawn() -> None:
    logits = torch.full((2000, 300), -torch.inf)
    logits[:, [0, 150, 299]] = torch.tensor([5.0, 5.0, -1e4])
    ids = draw(logits, KEYS[:2000], 16)
    assert set(ids.unique().tolist()) == {0, 150}
    assert draw(torch.zeros(3, 1), KEYS[:3], 4).tolist() == [[0] * 4] * 3


def test_a_row_and_its_key_decide_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.randn(40, 999, generator=torch.Generator().manual_seed(0)) * 4
    before = logits.clone()
    together = draw(logits, KEYS[:40], 12)
    assert torch.equal(logits, before)
    monkeypatch.setattr(sampling, "_SCRATCH", 3 * 999)
    order = torch.arange(39, -1, -1)
    assert torch.equal(draw(logits[order], KEYS[order], 12), together[order])
    wide = torch.full((40, 1100), torch.nan)
    wide[:, :999] = logits
    assert torch.equal(draw(wide[7:8, :999], KEYS[7:8], 12), together[7:8])
    assert not torch.equal(draw(logits, KEYS[40:80], 12), together)
    # Fewer draws are the first of more.
    assert uniforms(KEYS[:5], 3).tolist() == uniforms(KEYS[:5], 12)[:, :3].tolist()


def test_rows_without_a_distribution_give_ids_of_the_vocabulary() -> None:
    logits = torch.zeros(4, 64)
    logits[0, 3], logits[1, 63], logits[2] = torch.nan, torch.inf, -torch.inf
    ids = draw(logits, KEYS[:4], 9)
    assert ((ids >= 0) & (ids < 64)).all()


@pytest.mark.parametrize("size", [1, 700, 2048, 5003])
def test_the_kernel_draws_what_torch_draws(
    size: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for weights whose exp has another last bit: they move hardly any draw."""
    made = torch.Generator().manual_seed(size)
    logits = torch.randn(20, size, generator=made) * torch.linspace(0.1, 9, 20)[:, None]
    logits[4, ::3] = -torch.inf
    expected = draw(logits, KEYS[:20], 12)
    monkeypatch.setattr(sampling, "has_triton", lambda x: True)
    wide = torch.full((20, size + 3), torch.nan, device=device)
    rows = wide[:, :size].copy_(logits)
    found = draw(rows, KEYS[:20].to(device), 12).cpu()
    assert found.dtype == torch.int32 and (found.diff(dim=1) >= 0).all()
    assert (found == expected).float().mean() > 0.99
    assert torch.equal(draw(rows[7:8], KEYS[7:8].to(device), 12).cpu(), found[7:8])
    assert not (found[4] % 3 == 0).any() or size == 1


def test_the_kernel_gives_ids_of_the_vocabulary(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampling, "has_triton", lambda x: True)
    logits = torch.zeros(4, 64, device=device)
    logits[0, 3], logits[1, 63], logits[2] = torch.nan, torch.inf, -torch.inf
    ids = draw(logits, KEYS[:4].to(device), 9)
    assert ((ids >= 0) & (ids < 64)).all()
    assert draw(logits[:0], KEYS[:0].to(device), 9).shape == (0, 9)
