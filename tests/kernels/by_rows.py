"""What the tests of kernels that end in `store_rows` share; nothing happens on import."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from logitmill.kernels.quantize import Activations, Layout

LAYOUTS = list(Layout)
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
# One row, fewer than a program holds, more than one program; no power of two but 128.
SHAPES = [(1, 896), (3, 1536), (53, 80), (9, 128), (2, 4224)]
# A wide row's statistics are float32 sums in another order, which a narrow dtype rounds away.
_STEPS = {torch.float32: 8}


def takes(layout: Layout, num_columns: int) -> bool:
    """Whether rows of so many columns have the layout."""
    return layout != Layout.FP8_GROUPS or num_columns % 128 == 0


def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill fresh memory with what no kernel writes: NaN, and -128 in int8."""
    empty: Callable[..., torch.Tensor] = torch.empty

    def poisoned(*args: Any, **kwargs: Any) -> torch.Tensor:
        out = empty(*args, **kwargs)
        return out.fill_(torch.nan) if out.is_floating_point() else out.fill_(-128)

    monkeypatch.setattr(torch, "empty", poisoned)


def assert_same_bits(out: torch.Tensor, expected: torch.Tensor) -> None:
    assert out.dtype == expected.dtype and out.shape == expected.shape
    out, expected = (x.cpu().flatten().view(torch.uint8) for x in (out, expected))
    assert torch.equal(out, expected)


def place(x: torch.Tensor) -> torch.Tensor:
    """Every number's place among the numbers of its dtype; both zeros have place 0."""
    if x.dtype == torch.int8:
        return x.long()
    size = x.dtype.itemsize
    bits = x.contiguous().view({1: torch.int8, 2: torch.int16, 4: torch.int32}[size]).long()
    return torch.where(bits < 0, -(1 << (8 * size - 1)) - bits, bits)


def assert_near(out: torch.Tensor, expected: torch.Tensor, *, atol: float = 0.0) -> None:
    """Neighbours in their dtype, eight places apart in float32, or `atol` apart."""
    assert out.dtype == expected.dtype and out.shape == expected.shape
    out = out.cpu()
    assert not out.float().isnan().any()
    steps = (place(out) - place(expected)).abs() <= _STEPS.get(out.dtype, 1)
    assert (steps | ((out.double() - expected.double()).abs() <= atol)).all()


def assert_near_activations(out: Activations, expected: Activations, *, atol: float = 0.0) -> None:
    """`assert_near`; of 8-bit values, that few lie on the other side of a tie."""
    if expected.scales is None:
        assert out.scales is None
        assert_near(out.values_TK, expected.values_TK, atol=atol)
        return
    assert out.scales is not None
    torch.testing.assert_close(out.scales.cpu(), expected.scales, atol=0, rtol=1e-6)
    assert_near(out.values_TK, expected.values_TK)
    others = (place(out.values_TK.cpu()) != place(expected.values_TK)).sum().item()
    assert others <= max(1, 0.002 * expected.values_TK.numel())
