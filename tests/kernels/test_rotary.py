"""Rotary positions as complex numbers: dimension i and i + R/2 are one number that turns."""

from __future__ import annotations

import pytest
import torch
from logitmill.kernels.rotary import rotate


@pytest.mark.parametrize("turned", [16, 12, 2])
def test_pairs_turn_as_complex_numbers(turned: int) -> None:
    generator = torch.Generator().manual_seed(turned)
    x = torch.randn(7, 3, 16, generator=generator)
    angles = 10 * torch.rand(7, turned // 2, generator=generator)
    out = rotate(x, angles.cos(), angles.sin())
    half = turned // 2
    numbers = torch.complex(x[..., :half].double(), x[..., half:turned].double())
    expected = numbers * torch.polar(torch.ones_like(angles).double(), angles.double())[:, None]
    torch.testing.assert_close(out[..., :half].double(), expected.real, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(out[..., half:turned].double(), expected.imag, atol=1e-6, rtol=1e-6)
    assert torch.equal(out[..., turned:], x[..., turned:])


def test_products_depend_on_the_distance_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 1, 1, 64, generator=generator)
    rates = 10000.0 ** (-torch.arange(32) / 32)

    def product(i: int, j: int) -> float:
        at_i, at_j = (p * rates[None] for p in (i, j))
        turned_q, turned_k = (rotate(x, a.cos(), a.sin()) for x, a in ((q, at_i), (k, at_j)))
        return float((turned_q * turned_k).sum())

    assert product(50, 43) == pytest.approx(product(7, 0), abs=1e-4)
    assert abs(product(50, 43) - product(50, 40)) > 1e-2
