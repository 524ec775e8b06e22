"""Causal attention over packed sequences, a tile of queries a program.

Legend: T packed queries, S packed keys, H query heads, G key/value heads, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

_LOG2_E = tl.constexpr(1.4426950408889634)

# Queries and keys of a tile, warps, stages of the key loop; by padded head size. Fixed, since the
# order of additions along a row of scores, and so its bits, goes by the number of keys.
CONFIGS = {
    64: (64, 64, 4, 2),
    128: (64, 64, 4, 3),
    256: (128, 64, 8, 2),
}


@triton.jit
def _fold(
    acc,
    total,
    top,
    q,
    keys,
    values,
    first_key,
    trunk,
    fork,
    n,
    column,
    position,
    num_keys,
    scale,
    soft_cap,
    window,
    BN: tl.constexpr,
    MASKED: tl.constexpr,
    WINDOW: tl.constexpr,
    CAP: tl.constexpr,
    FORKED: tl.constexpr,
):
    """Fold keys n ... n + BN - 1 into the running softmax; scores in units of log 2."""
    if FORKED:
        # They lie on one side of the fork, which is a multiple of BN.
        first_key = tl.where(n < fork, trunk, first_key)
    k = keys.load([first_key + n, column])
    s = tl.dot(q, tl.trans(k))
    if CAP:
        # scale holds 2 / cap, soft_cap the cap in units of log 2; tanh u = 1 - 2 / (e^2u + 1)
        s = soft_cap * (1.0 - 2.0 / (tl.exp(s * scale) + 1.0))
    if MASKED:
        key = n + tl.arange(0, BN)
        seen = key[None, :] <= position[:, None]
        if WINDOW:
            seen = seen & (key[None, :] > position[:, None] - window)
        s = tl.where(seen, s, float("-inf"))
    factor = 1.0 if CAP else scale
    new_top = tl.maximum(top, tl.max(s, 1) * factor)
    base = new_top
    if WINDOW:
        # A row may not have seen any key yet.
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
    p = tl.exp2(s * factor - base[:, None])
    shrink = tl.exp2(top - base)
    total = total * shrink + tl.sum(p, 1)
    acc = acc * shrink[:, None]
    v = values.load([first_key + n, column])
    if MASKED:
        # Rows beyond the sequence belong to another one: zero times its infinity is not zero.
        own = n + tl.arange(0, BN) < num_keys
        v = tl.where(own[:, None], v, 0.0)
    acc = tl.dot(p.to(v.dtype), v, acc)
    return acc, total, new_top


@triton.jit
def _attend(
    queries,
    keys,
    values,
    out,
    tiles,
    sinks,
    scale,
    soft_cap,
    window,
    num_heads: tl.constexpr,
    heads_per_group: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    WINDOW: tl.constexpr,
    CAP: tl.constexpr,
    SINKS: tl.constexpr,
    FORKED: tl.constexpr,
):
    tile = tiles + (tl.program_id(0) // num_heads) * (6 if FORKED else 4)
    head = tl.program_id(0) % num_heads
    first_query = tl.load(tile)
    num_queries = tl.load(tile + 1)
    first_key = tl.load(tile + 2)
    # Of the tile's first query among the keys of its sequence.
    start = tl.load(tile + 3)
    trunk = first_key
    fork = 0
    if FORKED:
        # So many of its first keys lie with another sequence's.
        trunk = tl.load(tile + 4)
        fork = tl.load(tile + 5)
    num_keys = start + num_queries
    column = (head // heads_per_group) * D
    dim = tl.arange(0, BLOCK_D)
    q = queries.load([first_query, head * D])
    if BLOCK_D != D:
        # The columns beyond are another head's.
        q = tl.where((dim < D)[None, :], q, 0.0)
    row = tl.arange(0, BM)
    position = start + row
    acc = tl.zeros([BM, BLOCK_D], tl.float32)
    total = tl.zeros([BM], tl.float32)
    top = tl.full([BM], float("-inf"), tl.float32)
    if SINKS:
        # A score that every query sees, of a value of zeros.
        top = tl.zeros([BM], tl.float32) + tl.load(sinks + head).to(tl.float32) * _LOG2_E
        total += 1.0
    if WINDOW:
        masked_from = tl.maximum(start - window + 1, 0) // BN * BN
    else:
        # The same for a position in whatever tile it is: the two ways may round otherwise.
        masked_from = start // BM * BM
        for n in tl.range(0, masked_from, BN):
            acc, total, top = _fold(
                acc, total, top, q, keys, values, first_key, trunk, fork, n, column, position,
                num_keys, scale, soft_cap, window, BN, False, WINDOW, CAP, FORKED,
            )  # fmt: skip
    for n in tl.range(masked_from, num_keys, BN):
        acc, total, top = _fold(
            acc, total, top, q, keys, values, first_key, trunk, fork, n, column, position,
            num_keys, scale, soft_cap, window, BN, True, WINDOW, CAP, FORKED,
        )  # fmt: skip
    acc = acc / total[:, None]
    at = (first_query + row)[:, None].to(tl.int64) * (num_heads * D) + head * D + dim[None, :]
    own = (row < num_queries)[:, None] & (dim < D)[None, :]
    tl.store(out + at, acc.to(out.dtype.element_ty), mask=own)


def lay_out_tiles(
    num_queries: Sequence[int] | np.ndarray,
    num_keys: Sequence[int] | np.ndarray,
    block: int,
    places: Sequence[tuple[int, int, int]] | None = None,
) -> np.ndarray:
    """int32 [tiles, 4]: first query, queries, first key, the first query's place among the keys.

    The last queries of a sequence face its last keys, and tiles end at multiples of `block` among
    the keys. Long tiles come first, so that short ones fill the end.

    Keys of a sequence lie side by side, those of the next one follow on them. With `places`, each
    sequence's are (where its first one would be, where another sequence's first one is, how many of
    its own are not there but with that one): int32 [tiles, 6], these last two at the end.
    """
    queries, keys = np.asarray(num_queries, np.int64), np.asarray(num_keys, np.int64)
    begun = keys - queries
    counts = np.where(queries > 0, -(-keys // block) - begun // block, 0)
    sequence = np.repeat(np.arange(len(queries)), counts)
    nth = np.arange(len(sequence)) - np.repeat(np.cumsum(counts) - counts, counts)
    begin = ((begun // block)[sequence] + nth) * block
    first = np.maximum(begin, begun[sequence])
    lie = (np.cumsum(keys) - keys)[:, None] if places is None else np.asarray(places, np.int64)
    tiles = np.column_stack(
        [
            (np.cumsum(queries) - queries - begun)[sequence] + first,
            np.minimum(begin + block, keys[sequence]) - first,
            lie[sequence, 0],
            first,
            lie[sequence, 1:],
        ]
    )
    return tiles[np.argsort(-tiles[:, 3], kind="stable")].astype(np.int32)


def attend(
    q_THD: torch.Tensor,
    k_SGD: torch.Tensor,
    v_SGD: torch.Tensor,
    tiles: torch.Tensor,
    out_THD: torch.Tensor,
    *,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks_H: torch.Tensor | None = None,
    config: tuple[int, int, int, int] | None = None,
) -> None:
    """Attention of all sequences into the contiguous `out_THD`; rows of no tile are left alone.

    `tiles` is `lay_out_tiles` on the device, for the block of queries of the head size's config.
    The heads of a token lie side by side in each of q, k, v; rows may have strides of their own.
    """
    _, num_heads, size = q_THD.shape
    padded = max(64, triton.next_power_of_2(size))
    queries, keys, warps, stages = config or CONFIGS[padded]
    if soft_cap is None:
        factor, cap = scale * _LOG2_E.value, 0.0
    else:
        factor, cap = 2.0 * scale / soft_cap, soft_cap * _LOG2_E.value
    _attend[(len(tiles) * num_heads,)](
        _describe(q_THD, [queries, padded]),
        _describe(k_SGD, [keys, padded]),
        _describe(v_SGD, [keys, padded]),
        out_THD,
        tiles,
        sinks_H if sinks_H is not None else out_THD,
        factor,
        cap,
        window or 0,
        num_heads=num_heads,
        heads_per_group=num_heads // k_SGD.shape[1],
        D=size,
        BLOCK_D=padded,
        BM=queries,
        BN=keys,
        WINDOW=window is not None,
        CAP=soft_cap is not None,
        SINKS=sinks_H is not None,
        FORKED=tiles.shape[1] == 6,
        num_warps=warps,
        num_stages=stages,
        enable_fp_fusion=True,
    )


def block_of(size: int) -> int:
    """Queries of a tile for a head size."""
    return CONFIGS[max(64, triton.next_power_of_2(size))][0]


def step_of(size: int) -> int:
    """Keys that a tile's queries are multiplied with at a time, for a head size."""
    return CONFIGS[max(64, triton.next_power_of_2(size))][1]


def _describe(x_THD: torch.Tensor, block: list[int]) -> TensorDescriptor:
    rows, heads, size = x_THD.shape
    return TensorDescriptor(x_THD, [rows, heads * size], [x_THD.stride(0), 1], block)
