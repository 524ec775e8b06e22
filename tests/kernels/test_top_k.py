"""The largest entries of rows: torch's and the kernels', against a stable sort by definition."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from logitmill.kernels.logits import Tiles, row_statistics, top_k


def expected_top_k(logits: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """By value descending, then by id."""
    ids = np.argsort(-logits.astype(np.float64), axis=1, kind="stable")[:, :k]
    return ids, np.take_along_axis(logits, ids, axis=1)


@pytest.fixture(params=["torch", "kernel", "kernel with tiles"])
def run(request: pytest.FixtureRequest, device: torch.device):  # type: ignore[no-untyped-def]
    """(logits, k) -> (ids, values); the rows lie in a wider tensor of NaN."""

    def run(logits: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        num_rows, num_columns = logits.shape
        wide = torch.full((num_rows, num_columns + 5), torch.nan)
        rows = wide[:, :num_columns].copy_(torch.from_numpy(logits))
        if request.param == "torch":
            ids, values = top_k(rows, k)
        else:
            from logitmill.kernels.gpu import logits as gpu

            tiles = None
            if request.param == "kernel with tiles":
                tiles = Tiles.of(rows)
                row_statistics(rows, torch.zeros(num_rows, dtype=torch.int64), tiles=tiles)
                tiles = Tiles(*(column.to(device) for column in tiles))
            ids, values = gpu.top_k(wide.to(device)[:, :num_columns], k, tiles)
        assert ids.dtype == torch.int32 and values.dtype == torch.float32
        return ids.cpu().numpy(), values.cpu().numpy()

    return run


def assert_matches(run, logits: np.ndarray, k: int) -> None:  # type: ignore[no-untyped-def]
    logits = logits.astype(np.float32)
    ids, values = run(logits, k)
    expected_ids, expected_values = expected_top_k(logits, k)
    np.testing.assert_array_equal(ids, expected_ids)
    np.testing.assert_array_equal(values.view(np.int32), expected_values.view(np.int32))


@settings(max_examples=15)
@given(st.integers(0, 2**32 - 1), st.integers(1, 1300), st.integers(1, 256), st.floats(0.01, 1e6))
def test_random_rows(run, seed: int, size: int, k: int, spread: float) -> None:  # type: ignore[no-untyped-def]
    draw = np.random.default_rng(seed)
    assert_matches(run, draw.normal(scale=spread, size=(2, size)), min(k, size))


@settings(max_examples=15)
@given(st.integers(0, 2**32 - 1), st.integers(1, 1300), st.integers(1, 256))
def test_ties_go_by_id(run, seed: int, size: int, k: int) -> None:  # type: ignore[no-untyped-def]
    draw = np.random.default_rng(seed)
    assert_matches(run, draw.integers(-2, 3, size=(2, size)), min(k, size))


@pytest.mark.parametrize(
    ("size", "k"),
    [
        *((1, 1), (127, 127), (128, 128), (129, 1), (129, 2), (129, 129), (300, 3), (300, 4)),
        *((1000, 256), (2560, 20), (33_000, 129), (33_000, 256)),
    ],
)
def test_sizes_about_those_of_tiles(run, size: int, k: int) -> None:  # type: ignore[no-untyped-def]
    draw = np.random.default_rng(size)
    assert_matches(run, draw.normal(size=(2, size)), k)


@pytest.mark.parametrize("k", [1, 7, 64])
def test_rows_that_are_hard(run, k: int) -> None:  # type: ignore[no-untyped-def]
    """Constant; all in one tile; in the short last tile; rising; extremes; nearly nothing."""
    draw = np.random.default_rng(0)
    rows = np.zeros((8, 1100))
    rows[1] = draw.normal(size=1100)
    rows[1, 256:384] += 100
    rows[2, 1024:] = draw.normal(size=76) + 100
    rows[3] = np.arange(1100)
    rows[4] = -3.4e38
    rows[4, ::50] = 3.4e38
    rows[5] = -np.inf
    rows[5, [3, 700, 1099]] = [-1e38, 1e-45, -1e-45]
    rows[6] = -np.inf
    # Beyond the middle of the row no two differ by more than one unit in the last place.
    rows[7] = np.where(np.arange(1100) % 3 == 0, 1.0, np.nextafter(np.float32(1), np.float32(2)))
    assert_matches(run, rows, k)


def test_both_zeros_are_equal(run) -> None:  # type: ignore[no-untyped-def]
    rows = np.full((1, 300), -1.0)
    rows[0, [5, 150, 290]] = [-0.0, 0.0, -0.0]
    ids, values = run(rows.astype(np.float32), 3)
    assert ids.tolist() == [[5, 150, 290]]
    assert np.signbit(values).tolist() == [[True, False, True]]


@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf])
@pytest.mark.parametrize("k", [2, 20])
def test_a_row_that_holds_a_nan_has_no_order(run, bad: float, k: int) -> None:  # type: ignore[no-untyped-def]
    logits = np.random.default_rng(0).normal(size=(3, 700)).astype(np.float32)
    expected = expected_top_k(logits, k)
    logits[1, 650] = bad
    ids, values = run(logits, k)
    assert ids[1].tolist() == list(range(k)) and np.isnan(values[1]).all()
    np.testing.assert_array_equal(ids[[0, 2]], expected[0][[0, 2]])
    np.testing.assert_array_equal(values[[0, 2]], expected[1][[0, 2]])


def test_the_first_is_the_maximum_of_the_statistics(run) -> None:  # type: ignore[no-untyped-def]
    logits = np.random.default_rng(0).integers(0, 9, size=(16, 500)).astype(np.float32)
    statistics = row_statistics(torch.from_numpy(logits), torch.zeros(16, dtype=torch.int64))
    ids, _ = run(logits, 1)
    np.testing.assert_array_equal(ids[:, 0], statistics.top1_id.numpy())


@pytest.mark.parametrize("k", [0, 6, 257])
def test_a_k_that_is_impossible(k: int) -> None:
    with pytest.raises(ValueError, match=f"k: {k} entries"):
        top_k(torch.zeros(2, 5 if k < 10 else 1000), k)


def test_no_rows() -> None:
    ids, values = top_k(torch.zeros(0, 5), 3)
    assert ids.shape == values.shape == (0, 3)
