"""Expected and observed counts by group: torch's way and the kernel's, against float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from logitmill.kernels import frequencies
from logitmill.kernels.frequencies import UNIT, add_frequencies
from logitmill.kernels.logits import row_statistics

SIZES = [(1, 1), (3, 600), (130, 1037)]


@pytest.fixture(params=["torch", "kernel"])
def run(request: pytest.FixtureRequest, device: torch.device, monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    """(logits, targets, groups, number of groups) -> sums; rows of a wider tensor of NaN."""
    where = torch.device("cpu") if request.param == "torch" else device
    if request.param == "kernel":
        monkeypatch.setattr(frequencies, "has_triton", lambda x: True)

    def run(
        logits: torch.Tensor, targets: torch.Tensor, groups: torch.Tensor, count: int
    ) -> torch.Tensor:
        num_rows, num_columns = logits.shape
        wide = torch.full((num_rows, num_columns + 5), torch.nan, device=where)
        rows = wide[:, :num_columns].copy_(logits)
        statistics = row_statistics(rows, targets.to(where))
        sums = torch.zeros(count, 3, num_columns, dtype=torch.int64, device=where)
        add_frequencies(rows, statistics, targets.to(where), groups.to(where), sums)
        return sums.cpu()

    return run


def draw(num_rows: int, num_columns: int, count: int) -> tuple[torch.Tensor, ...]:
    made = torch.Generator().manual_seed(num_rows)
    logits = 4 * torch.randn(num_rows, num_columns, generator=made)
    targets = torch.randint(num_columns, (num_rows,), generator=made)
    groups = torch.randint(-1, count, (num_rows,), generator=made).sort().values
    return logits, targets, groups


@pytest.mark.parametrize("size", SIZES)
def test_sums_are_those_of_the_softmax(run, size) -> None:  # type: ignore[no-untyped-def]
    logits, targets, groups = draw(*size, 3)
    sums = run(logits, targets, groups, 3)
    p = torch.softmax(logits.double(), 1).numpy()
    for group in range(3):
        own = groups.numpy() == group
        expected = p[own].sum(0), (p[own] * (1 - p[own])).sum(0)
        for found, wanted in zip(sums[group, :2].numpy() * UNIT, expected, strict=True):
            # A rounding to units a row, besides those of float32.
            np.testing.assert_allclose(found, wanted, rtol=2e-5, atol=own.sum() * UNIT)
        counts = np.bincount(targets[own], minlength=size[1])
        assert np.array_equal(sums[group, 2].numpy(), counts)
        assert abs(sums[group, 0].sum() * UNIT - own.sum()) < 1e-4 * max(1, own.sum())


def test_neither_order_nor_company_moves_a_bit(run) -> None:  # type: ignore[no-untyped-def]
    logits, targets, groups = draw(130, 700, 2)
    together = run(logits, targets, groups, 2)
    order = torch.randperm(130, generator=torch.Generator().manual_seed(1))
    parts = [run(logits[i], targets[i], groups[i], 2) for i in order.split(37)]
    assert torch.equal(sum(parts[1:], parts[0]), together)


def test_rows_without_a_distribution_count_for_nothing(run) -> None:  # type: ignore[no-untyped-def]
    logits = torch.zeros(4, 8)
    logits[1, 3], logits[2, :] = torch.nan, -torch.inf
    logits[3, 1:] = -torch.inf
    sums = run(logits, torch.tensor([5, 3, 0, 0]), torch.zeros(4, dtype=torch.int64), 1)
    assert sums[0, 2].tolist() == [1, 0, 0, 0, 0, 1, 0, 0]
    assert (sums[0, 0] * UNIT).tolist() == [1.125, *[0.125] * 7]
    # What is certain does not vary.
    assert (sums[0, 1] * UNIT).tolist() == [0.125 * 0.875] * 8
