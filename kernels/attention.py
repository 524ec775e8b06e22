"""Causal attention over packed sequences: each sequence sees itself alone.

Legend: T packed tokens, H query heads, G key/value heads (H a multiple of G), D head size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F

# Queries of one block of a sliding window; bounds the mask to block x (block + window).
_WINDOW_BLOCK = 1024


def attend(
    q_THD: torch.Tensor,
    k_TGD: torch.Tensor,
    v_TGD: torch.Tensor,
    lengths: Sequence[int],
    *,
    scale: float,
    window: int | None = None,
) -> torch.Tensor:
    """softmax(scale * q k^T + causal mask) v within each of the packed sequences; [T, H, D].

    `lengths` are the sequences' tokens in packed order; rows beyond their sum are padding and
    come out as zeros. With `window`, token i sees tokens i - window + 1 ... i (transformers'
    `sliding_window`). Runs of equal lengths share one call: the library computes every
    (sequence, head) alone, so a sequence keeps its bits whatever it is packed with.
    """
    out_THD = torch.zeros_like(q_THD)
    start = 0
    for count, length in _runs(lengths):
        stop = start + count * length
        part = slice(start, stop)
        q, k, v = (
            x[part].view(count, length, *x.shape[1:]).transpose(1, 2) for x in (q_THD, k_TGD, v_TGD)
        )
        if window is None or length <= window:
            out = F.scaled_dot_product_attention(
                q, k, v, is_causal=True, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
            )
        else:
            out = _attend_window(q, k, v, scale, window)
        out_THD[part] = out.transpose(1, 2).reshape(count * length, *q_THD.shape[1:])
        start = stop
    return out_THD


def _runs(lengths: Sequence[int]) -> Iterator[tuple[int, int]]:
    """(count, length) of each run of equal neighbours."""
    count = 0
    for i, length in enumerate(lengths):
        count += 1
        if i + 1 == len(lengths) or lengths[i + 1] != length:
            yield count, length
            count = 0


def _attend_window(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, window: int
) -> torch.Tensor:
    """Sliding-window attention of [sequences, heads, length, D], a block of queries at a time."""
    length = q.shape[2]
    blocks = []
    for start in range(0, length, _WINDOW_BLOCK):
        stop = min(start + _WINDOW_BLOCK, length)
        first = max(0, start - window + 1)
        queries = torch.arange(start, stop, device=q.device)[:, None]
        keys = torch.arange(first, stop, device=q.device)[None]
        seen = (keys <= queries) & (keys > queries - window)
        blocks.append(
            F.scaled_dot_product_attention(
                q[:, :, start:stop],
                k[:, :, first:stop],
                v[:, :, first:stop],
                attn_mask=seen,
                scale=scale,
                enable_gqa=q.shape[1] != k.shape[1],
            )
        )
    return torch.cat(blocks, dim=2)
