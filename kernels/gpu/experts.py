"""Products of rows sorted by expert, and what moves the rows there and back.

Legend: T tokens, k choices of a token, R = T * k rows sorted by expert, E experts, N outputs, K
inputs, D hidden size.

Each expert's rows are cut into tiles of their own, listed on the device. A tile's sums run over all
of K in one order, so a row's bits come from that row and its expert's weight alone.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from ..quantize import GROUP, Activations
from .linear import Tiles, _capability, _num_programs, _place

_GROUP = tl.constexpr(GROUP)
# Which scales the operands have: none; one a row; those of `x` per 128 columns, with the weight's
# one a block of 128 x 128 or one for each of its rows.
_PLAIN, _ROWS, _BLOCKS, _GROUPS = (tl.constexpr(i) for i in range(4))
# Tiles that a program lists at a time.
_LISTED = 128


@triton.jit
def _list_tiles(offsets, tiles, E, BM: tl.constexpr, BLOCK: tl.constexpr, LANES: tl.constexpr):
    """tiles[0] = number of tiles, then (expert, first row) of each; a program an expert."""
    expert = tl.program_id(0)
    each = tl.arange(0, BLOCK)
    start = tl.load(offsets + each, mask=each < E, other=0)
    end = tl.load(offsets + each + 1, mask=each < E, other=0)
    counts = (end - start + BM - 1) // BM
    before = tl.sum(tl.where(each < expert, counts, 0), 0)
    own = tl.sum(tl.where(each == expert, counts, 0), 0)
    first = tl.load(offsets + expert)
    if expert == 0:
        tl.store(tiles, tl.sum(counts, 0))
    for done in range(0, own, LANES):
        tile = done + tl.arange(0, LANES)
        at = tiles + 1 + 2 * (before + tile)
        tl.store(at, tl.zeros((LANES,), tl.int32) + expert, mask=tile < own)
        tl.store(at + 1, first + tile * BM, mask=tile < own)


@triton.jit
def _store(
    total,
    expert,
    row,
    inside,
    column,
    out,
    x_scale,
    w_scale,
    bias,
    N,
    x_row,
    SCALES: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    """((total * x_scale) * w_scale) + bias in float32, rounded to the dtype of `out`."""
    of_expert = expert.to(tl.int64) * N + column
    y = total.to(tl.float32)
    if SCALES == _ROWS:
        of_row = tl.load(x_scale + row * x_row, mask=inside, other=0.0)
        of_column = tl.load(w_scale + of_expert, mask=column < N, other=0.0)
        y = y * of_row[:, None] * of_column[None, :]
    if HAS_BIAS:
        y += tl.load(bias + of_expert, mask=column < N, other=0.0).to(tl.float32)[None, :]
    at = out + row.to(tl.int64)[:, None] * N + column[None, :]
    tl.store(at, y.to(out.dtype.element_ty), mask=inside[:, None] & (column < N)[None, :])


@triton.jit(do_not_specialize=["x_group"])
def _multiply(
    x,
    w,
    out,
    x_scale,
    w_scale,
    bias,
    tiles,
    offsets,
    N,
    K,
    x_row,
    x_group,
    w_rows,
    SCALES: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SUM: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BAND: tl.constexpr,
):
    """Pointers to x [R, K], w [E, N, K], out [R, N].

    Scales of `x` lie `x_row` and `x_group` apart; of a weight per 128 columns [w_rows, K / 128].
    """
    num_rows = tl.load(tiles) * BM
    tile = tl.program_id(0)
    if tile >= tl.load(tiles) * tl.cdiv(N, BN):
        return
    row_tile, column_tile = _place(tile, num_rows, N, BM, BN, BAND)
    expert = tl.load(tiles + 1 + 2 * row_tile)
    last = tl.load(offsets + expert + 1)
    row = tl.load(tiles + 2 + 2 * row_tile) + tl.arange(0, BM)
    column = column_tile * BN + tl.arange(0, BN)
    inside = row < last
    depth = tl.arange(0, BK)
    # Rows and columns beyond the last read the last again: their results are not stored.
    x_line = tl.minimum(row, last - 1)
    w_line = expert.to(tl.int64) * N + tl.minimum(column, N - 1)
    x_at = x + x_line.to(tl.int64)[:, None] * K + depth[None, :]
    w_at = w + w_line[None, :] * K + depth[:, None]
    x_scale_at = x_scale + x_line * x_row
    if SCALES == _BLOCKS:
        # A tile of columns lies inside one block.
        w_scale_at = w_scale + (expert * w_rows + column_tile * BN // _GROUP) * (K // _GROUP)
    if SCALES == _GROUPS:
        w_scale_at = w_scale + w_line * (K // _GROUP)
    total = tl.zeros((BM, BN), SUM)
    for step in range(tl.cdiv(K, BK)):
        left_depth = K - step * BK
        left = tl.load(x_at, mask=depth[None, :] < left_depth, other=0.0)
        right = tl.load(w_at, mask=depth[:, None] < left_depth, other=0.0)
        if SCALES == _PLAIN:
            wide = left.to(w.dtype.element_ty)
            total = tl.dot(wide, right, total, input_precision="ieee")
        elif SCALES == _ROWS:
            total = tl.dot(left, right, total, out_dtype=SUM)
        elif SCALES == _BLOCKS:
            scale = tl.load(x_scale_at) * tl.load(w_scale_at)
            total += tl.dot(left, right) * scale[:, None]
        else:
            part = tl.dot(left, right) * tl.load(x_scale_at)[:, None]
            total += part * tl.load(w_scale_at)[None, :]
        x_at += BK
        w_at += BK
        if SCALES >= _BLOCKS:
            x_scale_at += x_group
            w_scale_at += 1
    _store(
        total, expert, row, inside, column, out, x_scale, w_scale, bias, N, x_row, SCALES, HAS_BIAS
    )


@triton.jit(do_not_specialize=["x_group"])
def _multiply_tma(
    x,
    w,
    out,
    x_scale,
    w_scale,
    bias,
    tiles,
    offsets,
    N,
    K,
    x_row,
    x_group,
    w_rows,
    SCALES: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SUM: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BAND: tl.constexpr,
    PERSISTENT: tl.constexpr,
):
    """Descriptors x [BM, BK] of [R, K] and w [BN, BK] of [E * N, K], a pointer to out [R, N].

    What a tile reads of the next expert's rows or columns is not stored.
    """
    num_rows = tl.load(tiles) * BM
    num_tiles = tl.load(tiles) * tl.cdiv(N, BN)
    for tile in tl.range(tl.program_id(0), num_tiles, tl.num_programs(0), flatten=PERSISTENT):
        row_tile, column_tile = _place(tile, num_rows, N, BM, BN, BAND)
        expert = tl.load(tiles + 1 + 2 * row_tile)
        first = tl.load(tiles + 2 + 2 * row_tile)
        last = tl.load(offsets + expert + 1)
        row = first + tl.arange(0, BM)
        column = column_tile * BN + tl.arange(0, BN)
        inside = row < last
        x_scale_at = x_scale + tl.minimum(row, last - 1) * x_row
        if SCALES == _BLOCKS:
            w_scale_at = w_scale + (expert * w_rows + column_tile * BN // _GROUP) * (K // _GROUP)
        if SCALES == _GROUPS:
            line = expert.to(tl.int64) * N + tl.minimum(column, N - 1)
            w_scale_at = w_scale + line * (K // _GROUP)
        total = tl.zeros((BM, BN), SUM)
        for step in range(tl.cdiv(K, BK)):
            left = x.load([first, step * BK])
            right = w.load([expert * N + column_tile * BN, step * BK]).T
            if SCALES <= _ROWS:
                total = tl.dot(left, right, total, out_dtype=SUM)
            elif SCALES == _BLOCKS:
                scale = tl.load(x_scale_at + step * x_group) * tl.load(w_scale_at + step)
                total += tl.dot(left, right) * scale[:, None]
            else:
                part = tl.dot(left, right) * tl.load(x_scale_at + step * x_group)[:, None]
                total += part * tl.load(w_scale_at + step)[None, :]
        _store(
            total,
            expert,
            row,
            inside,
            column,
            out,
            x_scale,
            w_scale,
            bias,
            N,
            x_row,
            SCALES,
            HAS_BIAS,
        )


PLAIN_TMA = Tiles(128, 256, 64, warps=8, stages=4, tma=True)
BYTES_TMA = Tiles(128, 256, 128, warps=8, stages=4, tma=True)
BLOCKS_TMA = Tiles(128, 128, 128, warps=8, stages=4, tma=True)
GROUPS_TMA = Tiles(64, 128, 128, warps=4, stages=4, tma=True)
PLAIN = Tiles(128, 128, 64, warps=8, stages=3)
BYTES = Tiles(128, 128, 128, warps=8, stages=3)
GROUPS = Tiles(128, 64, 128, warps=8, stages=3)
WIDE = Tiles(64, 64, 32, warps=4, stages=3)
# Bytes of a row up to which a program had better begin its next tile while it ends one.
_SHORT = 2048


def choose_tiles(
    x: torch.Tensor, weight_ENK: torch.Tensor, scales: int, dtype: torch.dtype
) -> Tiles:
    """By dtypes, device and K alone: the order of a row's sums must not go by the batch."""
    if weight_ENK.dtype == torch.float32:
        return WIDE
    # The accelerator moves lines of multiples of 16 bytes, of the types that are multiplied.
    even = x.shape[1] * x.itemsize % 16 == 0 and x.dtype == weight_ENK.dtype
    has_tma = even and _capability(x.device)[0] == 9
    if scales == _GROUPS.value:
        return GROUPS_TMA if has_tma else GROUPS
    if scales == _BLOCKS.value:
        return BLOCKS_TMA if has_tma else BYTES
    if scales == _PLAIN.value:
        tiles = PLAIN_TMA if has_tma else PLAIN
    else:
        tiles = BYTES_TMA if has_tma else BYTES
    tiles = tiles._replace(persistent=tiles.tma and x.shape[1] * x.itemsize <= _SHORT)
    # Results of four bytes leave no registers for wide tiles.
    return tiles._replace(columns=128) if dtype == torch.float32 else tiles


def multiply(
    x: Activations,
    weight_ENK: torch.Tensor,
    scales: torch.Tensor | None,
    offsets: torch.Tensor,
    bias_EN: torch.Tensor | None,
    out: torch.Tensor,
    *,
    tiles: Tiles | None = None,
) -> torch.Tensor:
    """Any product of `kernels.experts`, into the rows of `out` that the offsets name.

    `scales` are the weight's: [E, N] for scales of rows, [E, ceil(N / 128), K / 128] for blocks,
    [E, N, K / 128] for groups of rows. All are contiguous but the scales of `x`.
    """
    values_RK = x.values_TK
    num_experts, num_columns, depth = weight_ENK.shape
    assert weight_ENK.is_contiguous() and values_RK.is_contiguous() and out.is_contiguous()
    kind = _kind(scales, num_columns)
    if tiles is None:
        tiles = choose_tiles(values_RK, weight_ENK, kind, out.dtype)
    # Every expert may end in a tile that is not full.
    most_tiles = len(values_RK) // tiles.rows + num_experts
    listed = torch.empty(1 + 2 * most_tiles, dtype=torch.int32, device=out.device)
    _list_tiles[(num_experts,)](
        offsets,
        listed,
        num_experts,
        BM=tiles.rows,
        BLOCK=triton.next_power_of_2(num_experts),
        LANES=_LISTED,
        num_warps=4,
    )
    x_scales = listed if x.scales is None else x.scales
    x_row, x_group = (0, 0) if x.scales is None else x.scales.stride()
    operands = (
        out,
        x_scales,
        listed if scales is None else scales,
        out if bias_EN is None else bias_EN,
        listed,
        offsets,
        num_columns,
        depth,
        x_row,
        x_group,
        1 if scales is None else scales.shape[1],
    )
    constants = {
        "SCALES": kind,
        "HAS_BIAS": bias_EN is not None,
        "SUM": tl.int32 if values_RK.dtype == torch.int8 else tl.float32,
        "BM": tiles.rows,
        "BN": tiles.columns,
        "BK": tiles.depth,
        "BAND": tiles.band,
    }
    # Products and sums of the last step stay apart, as in torch.
    options = {
        "num_warps": tiles.warps,
        "num_stages": tiles.stages,
        "enable_fp_fusion": kind in (_BLOCKS.value, _GROUPS.value),
    }
    num_tiles = most_tiles * triton.cdiv(num_columns, tiles.columns)
    if not tiles.tma:
        _multiply[(num_tiles,)](values_RK, weight_ENK, *operands, **constants, **options)
        return out
    programs = min(num_tiles, _num_programs(out.device)) if tiles.persistent else num_tiles
    _multiply_tma[(programs,)](
        TensorDescriptor.from_tensor(values_RK, [tiles.rows, tiles.depth]),
        TensorDescriptor.from_tensor(weight_ENK.view(-1, depth), [tiles.columns, tiles.depth]),
        *operands,
        PERSISTENT=tiles.persistent,
        **constants,
        **options,
    )
    return out


def _kind(scales: torch.Tensor | None, num_columns: int) -> int:
    if scales is None:
        return _PLAIN.value
    assert scales.is_contiguous()
    if scales.ndim == 2:
        return _ROWS.value
    return _GROUPS.value if scales.shape[1] == num_columns else _BLOCKS.value


# ---- rows there and back ---------------------------------------------------------------------

# Words, or columns, that a program moves at a time.
_MOVED = 1024


@triton.jit(do_not_specialize=["x_row", "x_group", "num_rows"])
def _gather(
    x,
    out,
    x_scale,
    out_scale,
    rows,
    num_words,
    num_groups,
    x_row,
    x_group,
    num_rows,
    HAS_SCALES: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Row rows[r] of x and of its scales -> row r; scales come out column by column."""
    row = tl.program_id(0)
    source = tl.load(rows + row)
    for start in range(0, num_words, BLOCK):
        word = start + tl.arange(0, BLOCK)
        seen = word < num_words
        found = tl.load(x + source * num_words + word, mask=seen)
        tl.store(out + row.to(tl.int64) * num_words + word, found, mask=seen)
    if HAS_SCALES:
        group = tl.arange(0, GROUPS)
        there = group < num_groups
        found = tl.load(x_scale + source * x_row + group.to(tl.int64) * x_group, mask=there)
        tl.store(out_scale + group.to(tl.int64) * num_rows + row, found, mask=there)


def gather(x: Activations, rows_R: torch.Tensor) -> Activations:
    """`kernels.experts.gather`; `x` is contiguous but for its scales."""
    values_TK, scales = x
    num_rows, num_columns = len(rows_R), values_TK.shape[1]
    out = torch.empty(num_rows, num_columns, dtype=values_TK.dtype, device=values_TK.device)
    num_groups = 0 if scales is None else scales.shape[1]
    scales_out = torch.empty(num_groups, num_rows, device=values_TK.device).t()
    # The widest integers that rows are whole numbers of.
    num_bytes = num_columns * values_TK.itemsize
    word = next(w for w in _WORDS if num_bytes % w.itemsize == 0)
    _gather[(num_rows,)](
        values_TK.view(word),
        out.view(word),
        out if scales is None else scales,
        scales_out,
        rows_R,
        num_bytes // word.itemsize,
        num_groups,
        *((0, 0) if scales is None else scales.stride()),
        num_rows,
        HAS_SCALES=scales is not None,
        GROUPS=triton.next_power_of_2(max(1, num_groups)),
        BLOCK=_MOVED,
        num_warps=4,
    )
    return Activations(out, None if scales is None else scales_out)


_WORDS = (torch.int32, torch.int16, torch.uint8)


@triton.jit
def _combine(
    y,
    rows,
    weights,
    shared,
    gate,
    out,
    D,
    NUM_CHOICES: tl.constexpr,
    HAS_SHARED: tl.constexpr,
    HAS_GATE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    seen = column < D
    total = tl.zeros((BLOCK,), tl.float32)
    for choice in tl.static_range(NUM_CHOICES):
        row = tl.load(rows + token * NUM_CHOICES + choice)
        weight = tl.load(weights + token * NUM_CHOICES + choice)
        total += tl.load(y + row * D + column, mask=seen, other=0.0).to(tl.float32) * weight
    at = token.to(tl.int64) * D + column
    if HAS_SHARED:
        part = tl.load(shared + at, mask=seen, other=0.0).to(tl.float32)
        if HAS_GATE:
            part *= tl.load(gate + token)
        total += part
    tl.store(out + at, total.to(out.dtype.element_ty), mask=seen)


def combine(
    y_RD: torch.Tensor,
    rows_TK: torch.Tensor,
    weights_TK: torch.Tensor,
    shared_TD: torch.Tensor | None,
    gate_T: torch.Tensor | None,
) -> torch.Tensor:
    """`kernels.experts.combine`, the same bits."""
    num_tokens, num_choices = rows_TK.shape
    num_columns = y_RD.shape[1]
    out = torch.empty(num_tokens, num_columns, dtype=y_RD.dtype, device=y_RD.device)
    _combine[(num_tokens, triton.cdiv(num_columns, _MOVED))](
        y_RD,
        rows_TK,
        weights_TK.contiguous(),
        y_RD if shared_TD is None else shared_TD,
        weights_TK if gate_T is None else gate_T.contiguous(),
        out,
        num_columns,
        NUM_CHOICES=num_choices,
        HAS_SHARED=shared_TD is not None,
        HAS_GATE=gate_T is not None,
        BLOCK=_MOVED,
        num_warps=4,
        enable_fp_fusion=False,
    )
    return out
