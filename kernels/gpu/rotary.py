"""Per-head norm and rotation of queries and keys, where they lie or on their way elsewhere."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..norms import NormWeights

# Tokens and heads of a program; a head's halves are the columns.
_TOKENS, _HEADS = 4, 8


@triton.jit(do_not_specialize=["num_tokens"])
def _rotate(
    heads,
    out,
    cos,
    sin,
    q_norm,
    k_norm,
    num_tokens,
    stride,
    out_stride,
    eps,
    num_heads: tl.constexpr,
    num_queries: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,
    NORM: tl.constexpr,
    MOVES: tl.constexpr,
    TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
):
    pair = tl.arange(0, TOKENS * HEADS)
    token = tl.program_id(0) * TOKENS + pair // HEADS
    head = tl.program_id(1) * HEADS + pair % HEADS
    column = tl.arange(0, HALF)
    there = ((token < num_tokens) & (head < num_heads))[:, None]
    turned = there & (column < R)[None, :]
    wide = token[:, None].to(tl.int64)
    inside = head[:, None] * D + column[None, :]
    at = heads + wide * stride + inside
    into = out + wide * out_stride + inside
    first = tl.load(at, mask=turned, other=0.0).to(tl.float32)
    second = tl.load(at + R, mask=turned, other=0.0).to(tl.float32)
    # What lies beyond the turned dimensions, at most D - 2R columns.
    beyond = there & (column < D - 2 * R)[None, :]
    if NORM or MOVES:
        rest = tl.load(at + 2 * R, mask=beyond, other=0.0).to(tl.float32)
    if NORM:
        total = tl.sum(first * first, 1) + tl.sum(second * second, 1) + tl.sum(rest * rest, 1)
        scale = tl.rsqrt(total / D + eps)[:, None]
        is_query = (head < num_queries)[:, None]
        here = column[None, :] + tl.zeros_like(head)[:, None]
        first = first * scale * _norm_weight(q_norm, k_norm, here, is_query, here < R)
        second = second * scale * _norm_weight(q_norm, k_norm, here + R, is_query, here < R)
        own = here < D - 2 * R
        rest = rest * scale * _norm_weight(q_norm, k_norm, here + 2 * R, is_query, own)
    if NORM or MOVES:
        tl.store(into + 2 * R, rest.to(out.dtype.element_ty), mask=beyond)
    angle = wide * R + column[None, :]
    c = tl.load(cos + angle, mask=turned, other=0.0)
    s = tl.load(sin + angle, mask=turned, other=0.0)
    tl.store(into, (first * c - second * s).to(out.dtype.element_ty), mask=turned)
    tl.store(into + R, (second * c + first * s).to(out.dtype.element_ty), mask=turned)


@triton.jit
def _norm_weight(q_norm, k_norm, column, is_query, inside):
    q = tl.load(q_norm + column, mask=is_query & inside, other=0.0).to(tl.float32)
    k = tl.load(k_norm + column, mask=~is_query & inside, other=0.0).to(tl.float32)
    return q + k


def rotate(
    heads_THD: torch.Tensor,
    cos_TR: torch.Tensor,
    sin_TR: torch.Tensor,
    num_queries: int,
    q_norm: NormWeights | None,
    k_norm: NormWeights | None,
    out_THD: torch.Tensor,
) -> None:
    """`kernels.rotary.rotate`; heads of a token lie side by side."""
    num_tokens, num_heads, size = heads_THD.shape
    half = cos_TR.shape[1]
    norm = q_norm is not None and k_norm is not None
    moves = out_THD is not heads_THD
    widest = max(half, size - 2 * half) if norm or moves else half
    _rotate[(triton.cdiv(num_tokens, _TOKENS), triton.cdiv(num_heads, _HEADS))](
        heads_THD,
        out_THD,
        cos_TR,
        sin_TR,
        q_norm.weight if q_norm is not None else cos_TR,
        k_norm.weight if k_norm is not None else cos_TR,
        num_tokens,
        heads_THD.stride(0),
        out_THD.stride(0),
        q_norm.eps if q_norm is not None else 0.0,
        num_heads=num_heads,
        num_queries=num_queries,
        D=size,
        R=half,
        NORM=norm,
        MOVES=moves,
        TOKENS=_TOKENS,
        HEADS=_HEADS,
        HALF=triton.next_power_of_2(max(widest, 1)),
        num_warps=4,
        enable_fp_fusion=False,
    )
