"""The mass beside the largest entries of a row: torch's way and the kernel's, against float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from logitmill.kernels import logits as torch_logits
from logitmill.kernels.logits import Tiles, log_tail_mass, row_statistics, top_k
from oracles import zipf


@pytest.fixture(params=["torch", "kernel"])
def run(request: pytest.FixtureRequest, device: torch.device, monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    """(logits, k) -> log of the mass of all but the k likeliest; rows of a wider tensor of NaN."""
    where = torch.device("cpu") if request.param == "torch" else device
    if request.param == "kernel":
        monkeypatch.setattr(torch_logits, "has_triton", lambda x: True)

    def run(logits: np.ndarray, k: int) -> np.ndarray:
        num_rows, num_columns = logits.shape
        wide = torch.full((num_rows, num_columns + 5), torch.nan, device=where)
        rows = wide[:, :num_columns].copy_(torch.from_numpy(logits.astype(np.float32)))
        targets = torch.zeros(num_rows, dtype=torch.int64, device=where)
        tiles = Tiles.of(rows)
        statistics = row_statistics(rows, targets, tiles=tiles)
        ids, _ = top_k(rows, k, tiles)
        return log_tail_mass(rows, statistics, ids, tiles).cpu().numpy()

    return run


def expected(logits: np.ndarray, k: int) -> np.ndarray:
    """By sorted values in float64, each row about its own maxima."""
    z = -np.sort(-logits.astype(np.float32).astype(np.float64), axis=1)
    rest = np.log(np.exp(z[:, k:] - z[:, k : k + 1]).sum(1)) + z[:, k]
    return rest - (np.log(np.exp(z - z[:, :1]).sum(1)) + z[:, 0])


@settings(max_examples=6)
@given(st.integers(0, 2**32 - 1), st.integers(2, 600), st.integers(1, 40), st.floats(0.01, 200))
def test_random_rows(run, seed: int, size: int, k: int, spread: float) -> None:  # type: ignore[no-untyped-def]
    logits = np.random.default_rng(seed).normal(scale=spread, size=(3, size)).astype(np.float32)
    k = min(k, size - 1)
    np.testing.assert_allclose(run(logits, k), expected(logits, k), rtol=2e-6, atol=5e-6)


def test_zipf_and_its_twenty_largest(run) -> None:  # type: ignore[no-untyped-def]
    logits = np.log(zipf(1000))[None] + 7
    np.testing.assert_allclose(run(logits, 20), [-0.655138174], atol=2e-6)


def test_a_tail_that_one_less_the_others_would_lose(run) -> None:  # type: ignore[no-untyped-def]
    """A mass of 1e-12 beside one entry, and of e^-300: nothing of it is left of 1 in float32."""
    logits = np.full((2, 1001), np.log(1e-15), np.float32)
    logits[:, 7] = 0.0
    logits[1] *= 300 / np.log(1e15)
    found = run(logits, 1)
    np.testing.assert_allclose(found, [np.log(1e-12), np.log(1000) - 300], rtol=1e-6)


def test_nothing_is_left(run) -> None:  # type: ignore[no-untyped-def]
    logits = np.random.default_rng(0).normal(size=(3, 40)).astype(np.float32)
    assert np.isneginf(run(logits, 40)).all()
    logits[:] = -np.inf
    logits[:, [3, 30]] = 1.0
    assert np.isneginf(run(logits, 2)).all()
    np.testing.assert_allclose(run(logits, 1), np.log(0.5), rtol=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_row_without_a_distribution_has_no_tail(run, bad: float) -> None:  # type: ignore[no-untyped-def]
    logits = np.random.default_rng(0).normal(size=(5, 300)).astype(np.float32)
    whole = run(logits, 5)
    logits[1, 250] = logits[3, 0] = bad
    found = run(logits, 5)
    assert np.isnan(found[[1, 3]]).all()
    np.testing.assert_array_equal(found[[0, 2, 4]], whole[[0, 2, 4]])
    assert np.isnan(run(np.full((1, 9), -np.inf), 3)).all()


def test_bits_do_not_depend_on_other_rows(run) -> None:  # type: ignore[no-untyped-def]
    logits = np.random.default_rng(1).normal(scale=4, size=(37, 300)).astype(np.float32)
    together = run(logits, 3)
    for rows in (slice(0, 1), slice(16, 19), slice(36, 37)):
        np.testing.assert_array_equal(run(logits[rows], 3), together[rows])
