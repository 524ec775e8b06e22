"""Attention over packed sequences against the textbook, one sequence and one query at a time."""

from __future__ import annotations

import pytest
import torch
from logitmill.kernels.attention import attend


def textbook(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, window: int | None
) -> torch.Tensor:
    """softmax over the keys that each query may see, in float64; [length, H, D]."""
    length, num_heads, _ = q.shape
    group = num_heads // k.shape[1]
    out = torch.zeros_like(q, dtype=torch.float64)
    for h in range(num_heads):
        keys, values = k[:, h // group].double(), v[:, h // group].double()
        for t in range(length):
            first = 0 if window is None else max(0, t - window + 1)
            scores = keys[first : t + 1] @ q[t, h].double() * scale
            out[t, h] = scores.softmax(0) @ values[first : t + 1]
    return out


def draw(num_rows: int, heads: int, kv_heads: int, dim: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(num_rows * dim)
    return tuple(
        torch.randn(num_rows, n, dim, generator=generator) for n in (heads, kv_heads, kv_heads)
    )


@pytest.mark.parametrize("window", [None, 1, 4, 9, 40])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(3, 1, 64), (6, 2, 80), (4, 4, 16)])
def test_each_sequence_is_the_textbook_of_itself(
    heads: int, kv_heads: int, dim: int, window: int | None
) -> None:
    lengths = [1, 9, 30, 9, 9, 2]
    q, k, v = draw(sum(lengths) + 4, heads, kv_heads, dim)
    out = attend(q, k, v, lengths, scale=0.3, window=window)
    start = 0
    for n in lengths:
        rows = slice(start, start + n)
        expected = textbook(q[rows], k[rows], v[rows], 0.3, window)
        torch.testing.assert_close(out[rows].double(), expected, atol=2e-6, rtol=1e-5)
        start += n
    assert not out[start:].any(), "rows of padding are zeros"


def test_long_windows_in_blocks_are_the_mask_as_a_whole() -> None:
    q, k, v = draw(2500, 2, 1, 8)
    out = attend(q, k, v, [2500], scale=0.3, window=700)
    positions = torch.arange(2500)
    seen = (positions[None] <= positions[:, None]) & (positions[None] > positions[:, None] - 700)
    scores = torch.einsum("qhd,kd->hqk", q.double(), k[:, 0].double()) * 0.3
    weight = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    expected = torch.einsum("hqk,kd->qhd", weight, v[:, 0].double())
    torch.testing.assert_close(out.double(), expected, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("window", [None, 16])
def test_a_sequence_keeps_its_bits_whatever_it_is_packed_with(window: int | None) -> None:
    q, k, v = draw(300, 6, 2, 64)
    rows = slice(100, 163)
    alone = attend(q[rows], k[rows], v[rows], [63], scale=0.125, window=window)
    for lengths in ([100, 63, 137], [37, 63, 63, 63, 5], [50, 50, 63, 1]):
        packed = attend(q, k, v, lengths, scale=0.125, window=window)
        assert torch.equal(packed[rows], alone)


def test_the_future_is_not_seen() -> None:
    q, k, v = draw(20, 2, 2, 16)
    before = attend(q, k, v, [20], scale=0.25)
    k[10:] += 5.0
    v[10:] -= 5.0
    after = attend(q, k, v, [20], scale=0.25)
    assert torch.equal(before[:10], after[:10])
    assert not torch.equal(before[10:], after[10:])
