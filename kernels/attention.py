"""Causal attention over packed sequences: each sequence sees itself alone.

Legend: T packed tokens, H query heads, G key/value heads (H a multiple of G), D head size.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F

from .choice import choose
from .linear import multiply

# Lengths at which blocks of matrix products beat the library's attention on a CPU in float32.
# The choice goes by a sequence's own length, so it is the same in every batch.
_BLOCKS_FROM, _BLOCKS_TO = 513, 8192
_BLOCK = 256
# Queries of one block of a sliding window; bounds the mask to block x (block + window).
_WINDOW_BLOCK = 1024
# The largest head that the kernels for packed sequences take; any is a multiple of 8.
_PACKED_HEAD = 256


def attend(
    q_THD: torch.Tensor,
    k_TGD: torch.Tensor,
    v_TGD: torch.Tensor,
    lengths: Sequence[int],
    *,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks_H: torch.Tensor | None = None,
) -> torch.Tensor:
    """softmax(scale * q k^T + causal mask) v within each of the packed sequences; [T, H, D].

    `lengths` are the sequences' tokens in packed order; rows beyond their sum are padding and
    come out as zeros. With `window`, token i sees tokens i - window + 1 ... i (transformers'
    `sliding_window`). With `soft_cap`, a score s becomes soft_cap * tanh(s / soft_cap) (Gemma 2).
    With `sinks_H`, every query of a head has one more score, of a value of zeros (gpt-oss). On a
    CPU runs of equal lengths share one call, where the library computes every (sequence, head)
    alone; a GPU's may go by their number, so there each has its own. A sequence keeps its bits
    whatever it is packed with.
    """
    changed = soft_cap is not None or sinks_H is not None
    if q_THD.dtype in (torch.bfloat16, torch.float16):
        choice, size = choose(q_THD.device), q_THD.shape[2]
        packable = _is_packable(size)
        if packable and not changed and choice.takes_cudnn(size, window):
            from .gpu import cudnn

            if cudnn.suits(q_THD, k_TGD, v_TGD, scale=scale, window=window):
                out_THD, packed = _make_room(q_THD, lengths), tuple(lengths)
                cudnn.attend(q_THD, k_TGD, v_TGD, packed, out_THD, scale=scale, window=window)
                return out_THD
        if choice.attention == "triton" and packable:
            return _attend_triton(
                q_THD, k_TGD, v_TGD, tuple(lengths), scale, window, soft_cap, sinks_H
            )
        if choice.attention == "flash" and packable and not changed:
            return _attend_flash(q_THD, k_TGD, v_TGD, tuple(lengths), scale, window)
    out_THD = _make_room(q_THD, lengths)
    start = 0
    for count, length in (
        _runs(lengths) if q_THD.device.type == "cpu" and not changed else ((1, n) for n in lengths)
    ):
        stop = start + count * length
        part = slice(start, stop)
        q, k, v = (
            x[part].view(count, length, *x.shape[1:]).transpose(1, 2) for x in (q_THD, k_TGD, v_TGD)
        )
        if changed:
            out = _attend_plain(q, k, v, scale, window, soft_cap, sinks_H)
        elif window is not None and length > window:
            out = _attend_window(q, k, v, scale, window)
        elif _takes_blocks(q_THD) and _BLOCKS_FROM <= length <= _BLOCKS_TO:
            for sequence in range(count):
                rows = slice(start + sequence * length, start + (sequence + 1) * length)
                _attend_blocks(q_THD[rows], k_TGD[rows], v_TGD[rows], scale, out_THD[rows])
            start = stop
            continue
        else:
            out = F.scaled_dot_product_attention(
                q, k, v, is_causal=True, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
            )
        out_THD[part] = out.transpose(1, 2).reshape(count * length, *q_THD.shape[1:])
        start = stop
    return out_THD


def takes_kernel(device: torch.device, dtype: torch.dtype, size: int) -> bool:
    """Whether the kernel of our own takes heads like these, where nothing else is faster."""
    is_short = dtype in (torch.bfloat16, torch.float16)
    return is_short and choose(device).attention == "triton" and _is_packable(size)


def _is_packable(size: int) -> bool:
    return size % 8 == 0 and size <= _PACKED_HEAD


def _runs(lengths: Sequence[int]) -> Iterator[tuple[int, int]]:
    """(count, length) of each run of equal neighbours."""
    count = 0
    for i, length in enumerate(lengths):
        count += 1
        if i + 1 == len(lengths) or lengths[i + 1] != length:
            yield count, length
            count = 0


def _make_room(q_THD: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
    """Where results go, [T, H, D]: rows of padding are zeros, all others are to be written."""
    out_THD = torch.empty(q_THD.shape, dtype=q_THD.dtype, device=q_THD.device)
    out_THD[sum(lengths) :] = 0
    return out_THD


def _attend_triton(
    q_THD: torch.Tensor,
    k_TGD: torch.Tensor,
    v_TGD: torch.Tensor,
    lengths: tuple[int, ...],
    scale: float,
    window: int | None,
    soft_cap: float | None,
    sinks_H: torch.Tensor | None,
) -> torch.Tensor:
    """The kernel of our own over all sequences at once; a row keeps its bits in any packing."""
    from .gpu import attention

    out_THD = _make_room(q_THD, lengths)
    attention.attend(
        q_THD,
        k_TGD,
        v_TGD,
        _tiles(lengths, attention.block_of(q_THD.shape[2]), q_THD.device),
        out_THD,
        scale=scale,
        window=window,
        soft_cap=soft_cap,
        sinks_H=sinks_H,
    )
    return out_THD


def _attend_flash(
    q_THD: torch.Tensor,
    k_TGD: torch.Tensor,
    v_TGD: torch.Tensor,
    lengths: tuple[int, ...],
    scale: float,
    window: int | None,
) -> torch.Tensor:
    """FlashAttention-2 over all sequences at once; a row keeps its bits in any packing."""
    from torch.nn.attention import varlen

    offsets, longest = _offsets(lengths, q_THD.device)
    used = sum(lengths)
    # torch 2.11 takes fewer key heads as they are, later versions want to be told.
    takes_flag = "enable_gqa" in inspect.signature(varlen.varlen_attn).parameters
    flags: dict[str, Any] = {"enable_gqa": True} if takes_flag else {}
    out_THD = _make_room(q_THD, lengths)
    attended: Any = varlen.varlen_attn(
        q_THD[:used],
        k_TGD[:used],
        v_TGD[:used],
        offsets,
        offsets,
        longest,
        longest,
        scale=scale,
        window_size=(-1 if window is None else window - 1, 0),
        **flags,
    )
    out_THD[:used] = attended
    return out_THD


@lru_cache(maxsize=4)
def _offsets(lengths: tuple[int, ...], device: torch.device) -> tuple[torch.Tensor, int]:
    """Where each sequence starts, int32 [sequences + 1] on the device, and the longest length.

    Kept for the layers of a batch, which all ask for the same.
    """
    starts = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    return starts.pin_memory().to(device, non_blocking=True), max(lengths)


@lru_cache(maxsize=4)
def _tiles(lengths: tuple[int, ...], block: int, device: torch.device) -> torch.Tensor:
    """The kernel's tiles, kept for the layers of a batch."""
    from .gpu import attention

    tiles = torch.from_numpy(attention.lay_out_tiles(lengths, lengths, block))
    return tiles.pin_memory().to(device, non_blocking=True)


def _takes_blocks(q_THD: torch.Tensor) -> bool:
    return q_THD.device.type == "cpu" and q_THD.dtype == torch.float32


def _attend_blocks(
    q_LHD: torch.Tensor,
    k_LGD: torch.Tensor,
    v_LGD: torch.Tensor,
    scale: float,
    out_LHD: torch.Tensor,
) -> None:
    """Causal attention of one sequence of L tokens, a block of queries at a time, into `out_LHD`.

    The queries of all heads that share a key head are one matrix product against every key up to
    the block's end; the block's own upper triangle is masked.
    """
    length, num_heads, _ = q_LHD.shape
    num_groups = k_LGD.shape[1]
    shared = num_heads // num_groups
    q = (q_LHD * scale).unflatten(1, (num_groups, shared))
    out = out_LHD.unflatten(1, (num_groups, shared))
    ahead = _ahead()
    for group in range(num_groups):
        keys = k_LGD[:, group].contiguous()
        values_t = v_LGD[:, group].t().contiguous()
        for start in range(0, length, _BLOCK):
            stop = min(start + _BLOCK, length)
            size = stop - start
            queries = q[start:stop, group].transpose(0, 1).reshape(shared * size, -1)
            scores = multiply(queries, keys[:stop])
            own = scores.view(shared, size, stop)[:, :, start:]
            own += ahead[:size, :size]
            mixed = multiply(torch.softmax(scores, dim=-1), values_t[:, :stop].contiguous())
            out[start:stop, group] = mixed.view(shared, size, -1).transpose(0, 1)


@lru_cache(maxsize=1)
def _ahead() -> torch.Tensor:
    """What is added to a block's own scores: -inf where a key lies ahead of its query."""
    return torch.full((_BLOCK, _BLOCK), float("-inf")).triu_(1)


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


def _attend_plain(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    window: int | None,
    soft_cap: float | None,
    sinks_H: torch.Tensor | None,
) -> torch.Tensor:
    """Attention of [1, heads, length, D] by its definition, in float32, by blocks of queries."""
    length, num_groups = q.shape[2], k.shape[1]
    shared = q.shape[1] // num_groups
    blocks = []
    for start in range(0, length, _BLOCK):
        stop = min(start + _BLOCK, length)
        first = 0 if window is None else max(0, start - window + 1)
        at = torch.arange(start, stop, device=q.device)[:, None]
        key = torch.arange(first, stop, device=q.device)[None]
        seen = key <= at
        if window is not None:
            seen &= key > at - window
        queries = q[0, :, start:stop].float().unflatten(0, (num_groups, shared)).flatten(1, 2)
        scores = queries @ k[0, :, first:stop].float().transpose(1, 2) * scale
        scores = scores.unflatten(1, (shared, stop - start))
        if soft_cap is not None:
            scores = soft_cap * torch.tanh(scores / soft_cap)
        scores = scores.masked_fill(~seen, float("-inf"))
        if sinks_H is not None:
            sinks = sinks_H.float().view(num_groups, shared, 1, 1)
            scores = torch.cat([scores, sinks.expand(-1, -1, stop - start, 1)], -1)
        weights = torch.softmax(scores, -1)[..., : stop - first].flatten(1, 2)
        mixed = weights @ v[0, :, first:stop].float()
        blocks.append(mixed.unflatten(1, (shared, -1)).flatten(0, 1))
    return torch.cat(blocks, 1)[None].to(q.dtype)
