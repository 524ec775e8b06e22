"""RMS normalisation against its formula in float64."""

from __future__ import annotations

import pytest
import torch
from logitmill.kernels.norms import rms_norm


@pytest.mark.parametrize("shape", [(5, 72), (5, 3, 80), (1, 1)])
@pytest.mark.parametrize("eps", [1e-6, 1e-2])
def test_formula(shape: tuple[int, ...], eps: float) -> None:
    generator = torch.Generator().manual_seed(0)
    x = 3 * torch.randn(*shape, generator=generator)
    weight = torch.randn(shape[-1], generator=generator)
    wide = x.double()
    expected = wide / (wide.square().mean(-1, keepdim=True) + eps).sqrt() * weight.double()
    torch.testing.assert_close(rms_norm(x, weight, eps).double(), expected, atol=1e-6, rtol=1e-6)


def test_narrow_rows_are_averaged_wide() -> None:
    """300^2 is beyond float16: the mean square must not be taken there."""
    x = torch.full((2, 64), 300.0, dtype=torch.float16)
    out = rms_norm(x, torch.ones(64, dtype=torch.float16), 1e-6)
    assert out.dtype == torch.float16
    assert torch.equal(out, torch.ones_like(x))


def test_a_row_of_zeros_stays_zero() -> None:
    assert not rms_norm(torch.zeros(2, 8), torch.ones(8), 1e-6).any()
