"""Rotary positions as complex numbers: dimension i and i + R are one number that turns."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from by_rows import DTYPES, assert_near, assert_same_bits
from logitmill.kernels.norms import NormWeights, normalise
from logitmill.kernels.rotary import rotate

gpu = pytest.importorskip("logitmill.kernels.gpu.rotary")


def draw_angles(num_tokens: int, half: int) -> torch.Tensor:
    return 10 * torch.rand(num_tokens, half, generator=torch.Generator().manual_seed(half))


def draw_heads(num_tokens: int, num_heads: int, size: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(num_heads * size)
    return torch.randn(num_tokens, num_heads, size, generator=generator).to(dtype)


def draw_norms(size: int, dtype: torch.dtype) -> dict[str, NormWeights]:
    q, k = 1 + 0.3 * torch.randn(2, size, generator=torch.Generator().manual_seed(size))
    return {"q_norm": NormWeights(q.to(dtype), 1e-3), "k_norm": NormWeights(k.to(dtype), 1e-3)}


def turned(heads: torch.Tensor, angles: torch.Tensor, **options: Any) -> torch.Tensor:
    """`rotate` of a copy; all heads are queries unless it is said."""
    out = heads.clone()
    rotate(out, angles.cos(), angles.sin(), **{"num_queries": heads.shape[1], **options})
    return out


def formula(heads: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """In float64."""
    half = angles.shape[1]
    wide = heads.double()
    numbers = torch.complex(wide[..., :half], wide[..., half : 2 * half])
    # The angles' cosines are float32, as they are given.
    numbers = numbers * torch.complex(angles.cos().double(), angles.sin().double())[:, None]
    return torch.cat([numbers.real, numbers.imag, wide[..., 2 * half :]], dim=-1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_turned", [16, 12, 2])
def test_pairs_turn_as_complex_numbers(num_turned: int, dtype: torch.dtype) -> None:
    x = draw_heads(7, 3, 16, dtype)
    angles = draw_angles(7, num_turned // 2)
    out = turned(x, angles)
    rtol = max(1e-6, torch.finfo(dtype).eps / 2 * 1.001)
    torch.testing.assert_close(out.double(), formula(x, angles), atol=1e-6, rtol=rtol)
    assert_same_bits(out[..., num_turned:], x[..., num_turned:])


@pytest.mark.parametrize("num_turned", [16, 6])
def test_heads_are_normalised_before_they_turn(num_turned: int) -> None:
    x = draw_heads(7, 5, 16, torch.float32)
    angles = draw_angles(7, num_turned // 2)
    norms = draw_norms(16, torch.float32)
    out = turned(x, angles, num_queries=3, **norms)
    for heads, name in ((slice(0, 3), "q_norm"), (slice(3, 5), "k_norm")):
        expected = formula(normalise(x[:, heads], norms[name]), angles)
        torch.testing.assert_close(out[:, heads].double(), expected, atol=1e-6, rtol=1e-6)


def test_products_depend_on_the_distance_alone() -> None:
    q, k = draw_heads(2, 1, 64, torch.float32).split(1)
    rates = 10000.0 ** (-torch.arange(32) / 32)

    def product(i: int, j: int) -> float:
        return float((turned(q, i * rates[None]) * turned(k, j * rates[None])).sum())

    assert product(50, 43) == pytest.approx(product(7, 0), abs=1e-4)
    assert abs(product(50, 43) - product(50, 40)) > 1e-2


@pytest.mark.parametrize("num_turned", [32, 8, 0])
@pytest.mark.parametrize("normed", [False, True])
def test_heads_may_turn_on_their_way(num_turned: int, normed: bool) -> None:
    x = draw_heads(7, 5, 32, torch.float32)
    angles = draw_angles(7, num_turned // 2)
    norms = draw_norms(32, torch.float32) if normed else {}
    before, out = x.clone(), torch.full((7, 6, 32), torch.nan)
    rotate(x, angles.cos(), angles.sin(), num_queries=3, **norms, out_THD=out[:, :5])
    assert_same_bits(out[:, :5], turned(before, angles, num_queries=3, **norms))
    assert_same_bits(x, before)
    assert out[:, 5:].isnan().all()


@pytest.mark.parametrize("num_turned", [32, 8])
def test_transformers_agree(num_turned: int) -> None:
    """GPT-NeoX's function turns the leading dimensions; with all of them it is Llama's."""
    from transformers.models.gpt_neox.modeling_gpt_neox import apply_rotary_pos_emb as partial
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb as whole

    x = draw_heads(7, 5, 32, torch.float32)
    angles = draw_angles(7, num_turned // 2)
    both = torch.cat([angles, angles], dim=-1)[None]
    apply = whole if num_turned == 32 else partial
    q, k = (part.transpose(0, 1)[None] for part in (x[:, :3], x[:, 3:]))
    theirs = apply(q, k, both.cos(), both.sin())
    expected = torch.cat([part[0].transpose(0, 1) for part in theirs], dim=1)
    out = turned(x, angles, num_queries=3)
    torch.testing.assert_close(out, expected, atol=1e-6, rtol=1e-6)


def test_transformers_agree_on_norms_of_heads() -> None:
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm, apply_rotary_pos_emb

    x = draw_heads(7, 5, 32, torch.float32)
    angles = draw_angles(7, 16)
    norms = draw_norms(32, torch.float32)
    both = torch.cat([angles, angles], dim=-1)[None]
    parts = []
    for heads, name in ((slice(0, 3), "q_norm"), (slice(3, 5), "k_norm")):
        module = Qwen3RMSNorm(32, eps=norms[name].eps)
        module.weight.data.copy_(norms[name].weight)
        parts.append(module(x[:, heads]).transpose(0, 1)[None].detach())
    theirs = apply_rotary_pos_emb(*parts, both.cos(), both.sin())
    expected = torch.cat([part[0].transpose(0, 1) for part in theirs], dim=1)
    out = turned(x, angles, num_queries=3, **norms)
    torch.testing.assert_close(out, expected, atol=2e-6, rtol=1e-6)


# Tokens, heads, queries among them, head size, dimensions that turn.
CASES = [
    (1, 1, 1, 64, 64),
    (3, 12, 10, 128, 128),
    (5, 9, 8, 80, 80),
    (9, 4, 2, 96, 48),
    (5, 3, 1, 128, 32),
    (6, 18, 16, 16, 2),
    (3, 5, 3, 64, 0),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize(("num_tokens", "num_heads", "num_queries", "size", "num_turned"), CASES)
def test_the_kernel(
    device: torch.device,
    num_tokens: int,
    num_heads: int,
    num_queries: int,
    size: int,
    num_turned: int,
    normed: bool,
    dtype: torch.dtype,
) -> None:
    """Of heads that are a view, as queries and keys are in front of the values."""
    rows = draw_heads(num_tokens, num_heads + 3, size, dtype)
    rows[:, num_heads:] = torch.nan
    angles = draw_angles(num_tokens, num_turned // 2)
    cos, sin = angles.cos(), angles.sin()
    norms = draw_norms(size, dtype) if normed else {}
    there = rows.to(device, copy=True)
    before = rows.clone()
    rotate(rows[:, :num_heads], cos, sin, num_queries=num_queries, **norms)
    weights = [
        NormWeights(norms[name].weight.to(device), norms[name].eps) if normed else None
        for name in ("q_norm", "k_norm")
    ]
    heads, elsewhere = there[:, :num_heads], torch.full_like(there, torch.nan)
    for out in (elsewhere[:, :num_heads], heads):
        gpu.rotate(heads, cos.to(device), sin.to(device), num_queries, *weights, out)
    assert_same_bits(elsewhere[:, :num_heads], there[:, :num_heads])
    assert elsewhere[:, num_heads:].isnan().all()
    # Where two products cancel, float32's rounding of each stands out.
    assert_near(there[:, :num_heads], rows[:, :num_heads], atol=3e-6)
    assert_same_bits(there[:, num_heads:], before[:, num_heads:])
    if not normed:
        assert_same_bits(there[..., num_turned:], before[..., num_turned:])
