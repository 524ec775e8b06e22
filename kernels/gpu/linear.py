"""Products of int8 and of block-scaled e4m3 operands, and int4 weights expanded.

Legend: T packed tokens, N outputs, K inputs, G columns of a group of int4 weights.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from ..linear import INT4_ZERO, Int4
from ..quantize import GROUP, Activations

_GROUP = tl.constexpr(GROUP)
_INT4_ZERO = tl.constexpr(INT4_ZERO)
# 2^23: the float32 numbers from here on are the integers, whose low bits are the mantissa's.
_ONES = tl.constexpr(0x4B000000)
_ONES_VALUE = tl.constexpr(8388608.0)


class Tiles(NamedTuple):
    """How a product is cut among programs."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    band: int = 8
    """Row tiles that are finished together, so that what they read stays in the L2 cache."""
    tma: bool = False
    """Whether tiles are moved by the tensor memory accelerator (Hopper)."""
    persistent: bool = False
    """Whether a program goes from tile to tile, storing one while it loads the next."""
    parts: int = 1
    """Column parts in which a tile is stored; more take less shared memory."""


@triton.jit
def _place(tile, M, N, BM: tl.constexpr, BN: tl.constexpr, BAND: tl.constexpr):
    """Row and column of a tile: bands of row tiles, column by column inside a band."""
    num_rows = tl.cdiv(M, BM)
    in_band = BAND * tl.cdiv(N, BN)
    first = tile // in_band * BAND
    height = min(num_rows - first, BAND)
    return first + tile % in_band % height, tile % in_band // height


@triton.jit
def _scale_int8(total, row, column, x_scale, w_scale, bias, M, N, HAS_BIAS: tl.constexpr):
    """((total * x_scale) * w_scale) + bias in float32, [rows, columns]."""
    of_row = tl.load(x_scale + row, mask=row < M, other=0.0)
    of_column = tl.load(w_scale + column, mask=column < N, other=0.0)
    y = total.to(tl.float32) * of_row[:, None] * of_column[None, :]
    if HAS_BIAS:
        y += tl.load(bias + column, mask=column < N, other=0.0).to(tl.float32)[None, :]
    return y


@triton.jit(do_not_specialize=["M"])
def _int8_tma(
    x,
    w,
    out,
    x_scale,
    w_scale,
    bias,
    M,
    N,
    K,
    HAS_BIAS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BAND: tl.constexpr,
    PARTS: tl.constexpr,
    PERSISTENT: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Descriptors x int8 [BM, BK], w int8 [BN, BK], out [BM, BN / PARTS]."""
    num_tiles = tl.cdiv(M, BM) * tl.cdiv(N, BN)
    steps = tl.cdiv(K, BK)
    # The tile that is stored is counted apart: stores of one tile need not wait on the loads of
    # the next.
    stored = tl.program_id(0) - tl.num_programs(0)
    for tile in tl.range(tl.program_id(0), num_tiles, tl.num_programs(0), flatten=PERSISTENT):
        row_tile, column_tile = _place(tile, M, N, BM, BN, BAND)
        total = tl.zeros((BM, BN), tl.int32)
        for step in range(steps):
            left = x.load([row_tile * BM, step * BK])
            right = w.load([column_tile * BN, step * BK])
            total = tl.dot(left, right.T, total, out_dtype=tl.int32)
        stored += tl.num_programs(0)
        row_tile, column_tile = _place(stored, M, N, BM, BN, BAND)
        row = row_tile * BM + tl.arange(0, BM)
        column = column_tile * BN
        WIDTH: tl.constexpr = BN // PARTS
        part = tl.arange(0, WIDTH)
        if PARTS == 1:
            y = _scale_int8(total, row, column + part, x_scale, w_scale, bias, M, N, HAS_BIAS)
            out.store([row_tile * BM, column], y.to(DTYPE))
        else:
            halves = tl.permute(tl.reshape(total, (BM, 2, BN // 2)), (0, 2, 1))
            first, second = tl.split(halves)
            y = _scale_int8(first, row, column + part, x_scale, w_scale, bias, M, N, HAS_BIAS)
            out.store([row_tile * BM, column], y.to(DTYPE))
            column += WIDTH
            y = _scale_int8(second, row, column + part, x_scale, w_scale, bias, M, N, HAS_BIAS)
            out.store([row_tile * BM, column], y.to(DTYPE))


@triton.jit(do_not_specialize=["M"])
def _int8(
    x,
    w,
    out,
    x_scale,
    w_scale,
    bias,
    M,
    N,
    K,
    HAS_BIAS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BAND: tl.constexpr,
):
    """Pointers to x int8 [M, K], w int8 [N, K], out [M, N]."""
    row_tile, column_tile = _place(tl.program_id(0), M, N, BM, BN, BAND)
    row = row_tile * BM + tl.arange(0, BM)
    column = column_tile * BN + tl.arange(0, BN)
    depth = tl.arange(0, BK)
    # Rows and columns beyond the last read the first ones again: their results are not stored.
    x_at = x + (row % M).to(tl.int64)[:, None] * K + depth[None, :]
    w_at = w + (column % N).to(tl.int64)[None, :] * K + depth[:, None]
    total = tl.zeros((BM, BN), tl.int32)
    for step in range(tl.cdiv(K, BK)):
        left_depth = K - step * BK
        left = tl.load(x_at, mask=depth[None, :] < left_depth, other=0)
        right = tl.load(w_at, mask=depth[:, None] < left_depth, other=0)
        total = tl.dot(left, right, total, out_dtype=tl.int32)
        x_at += BK
        w_at += BK
    y = _scale_int8(total, row, column, x_scale, w_scale, bias, M, N, HAS_BIAS)
    at = row.to(tl.int64)[:, None] * N + column[None, :]
    inside = (row < M)[:, None] & (column < N)[None, :]
    tl.store(out + at, y.to(out.dtype.element_ty), mask=inside)


INT8_TMA = Tiles(256, 128, 128, warps=8, stages=3, tma=True, persistent=True, parts=2)
INT8_POINTERS = Tiles(128, 128, 128, warps=8, stages=3)


def multiply_int8(
    x: Activations,
    weight_NK: torch.Tensor,
    scale_N: torch.Tensor,
    bias_N: torch.Tensor | None,
    dtype: torch.dtype,
    *,
    tiles: Tiles | None = None,
) -> torch.Tensor:
    """`kernels.linear.multiply_int8`; `tiles` moves no bit, since the sums are exact."""
    values_TK = x.values_TK
    num_rows, depth = values_TK.shape
    num_columns = len(weight_NK)
    out = torch.empty(num_rows, num_columns, dtype=dtype, device=values_TK.device)
    if tiles is None:
        # The accelerator moves lines of multiples of 16 bytes.
        even = depth % 16 == 0 and num_columns * dtype.itemsize % 16 == 0
        tiles = INT8_TMA if even and _capability(values_TK.device)[0] == 9 else INT8_POINTERS
    num_tiles = triton.cdiv(num_rows, tiles.rows) * triton.cdiv(num_columns, tiles.columns)
    operands = (x.scales, scale_N, scale_N if bias_N is None else bias_N)
    sizes = (num_rows, num_columns, depth)
    # Products and sums stay apart, as in torch; a fused multiply-add would round once.
    options = {"num_warps": tiles.warps, "num_stages": tiles.stages, "enable_fp_fusion": False}
    shape = {"BM": tiles.rows, "BN": tiles.columns, "BK": tiles.depth, "BAND": tiles.band}
    if not tiles.tma:
        _int8[(num_tiles,)](
            values_TK,
            weight_NK,
            out,
            *operands,
            *sizes,
            HAS_BIAS=bias_N is not None,
            **shape,
            **options,
        )
        return out
    _int8_tma[(min(num_tiles, _num_programs(out.device)) if tiles.persistent else num_tiles,)](
        TensorDescriptor.from_tensor(values_TK, [tiles.rows, tiles.depth]),
        TensorDescriptor.from_tensor(weight_NK, [tiles.columns, tiles.depth]),
        TensorDescriptor.from_tensor(out, [tiles.rows, tiles.columns // tiles.parts]),
        *operands,
        *sizes,
        HAS_BIAS=bias_N is not None,
        PARTS=tiles.parts,
        PERSISTENT=tiles.persistent,
        DTYPE=_NAMES[dtype],
        **shape,
        **options,
    )
    return out


_NAMES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


@lru_cache
def _capability(device: torch.device) -> tuple[int, int]:
    """Compute capability; the interpreter stands in for a Hopper GPU."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)


@lru_cache
def _num_programs(device: torch.device) -> int:
    """Programs that run at once, one to a multiprocessor."""
    if device.type != "cuda":
        return 2
    return torch.cuda.get_device_properties(device).multi_processor_count


@triton.jit(do_not_specialize=["M", "x_stride"])
def _fp8_blocks(
    x,
    w,
    out,
    x_scale,
    w_scale,
    bias,
    M,
    N,
    K,
    x_stride,
    w_stride,
    HAS_BIAS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BAND: tl.constexpr,
):
    """x_scale [groups, M] with rows `x_stride` apart, w_scale [blocks of N, groups]."""
    row_tile, column_tile = _place(tl.program_id(0), M, N, BM, BN, BAND)
    row = row_tile * BM + tl.arange(0, BM)
    column = column_tile * BN + tl.arange(0, BN)
    depth = tl.arange(0, _GROUP)
    x_at = x + (row % M).to(tl.int64)[:, None] * K + depth[None, :]
    w_at = w + (column % N).to(tl.int64)[None, :] * K + depth[:, None]
    x_scale_at = x_scale + row % M
    # A tile of columns lies inside one block of the weight's scales.
    w_scale_at = w_scale + column_tile * BN // _GROUP * w_stride
    total = tl.zeros((BM, BN), tl.float32)
    for _ in range(K // _GROUP):
        part = tl.dot(tl.load(x_at), tl.load(w_at))
        total += part * (tl.load(x_scale_at) * tl.load(w_scale_at))[:, None]
        x_at += _GROUP
        w_at += _GROUP
        x_scale_at += x_stride
        w_scale_at += 1
    if HAS_BIAS:
        total += tl.load(bias + column, mask=column < N, other=0.0).to(tl.float32)[None, :]
    at = row.to(tl.int64)[:, None] * N + column[None, :]
    inside = (row < M)[:, None] & (column < N)[None, :]
    tl.store(out + at, total.to(out.dtype.element_ty), mask=inside)


FP8_BLOCKS = Tiles(128, 128, GROUP, warps=8, stages=3)


def multiply_fp8_blocks(
    x: Activations,
    weight_NK: torch.Tensor,
    scales: torch.Tensor,
    bias_N: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """`kernels.linear.multiply_fp8_blocks` for devices whose library lacks it."""
    assert x.scales is not None
    num_rows, depth = x.values_TK.shape
    num_columns = len(weight_NK)
    out = torch.empty(num_rows, num_columns, dtype=dtype, device=weight_NK.device)
    x_scales = x.scales.t().contiguous()
    tiles = FP8_BLOCKS
    num_tiles = triton.cdiv(num_rows, tiles.rows) * triton.cdiv(num_columns, tiles.columns)
    _fp8_blocks[(num_tiles,)](
        x.values_TK,
        weight_NK,
        out,
        x_scales,
        scales,
        scales if bias_N is None else bias_N,
        num_rows,
        num_columns,
        depth,
        x_scales.stride(0),
        scales.stride(0),
        HAS_BIAS=bias_N is not None,
        BM=tiles.rows,
        BN=tiles.columns,
        BAND=tiles.band,
        num_warps=tiles.warps,
        num_stages=tiles.stages,
        enable_fp_fusion=True,
    )
    return out


@triton.jit(do_not_specialize=["num_lines", "in_row", "in_group"])
def _expand(
    codes,
    scales,
    zeros,
    row_scale,
    groups,
    out,
    num_lines,
    in_row,
    in_group,
    HAS_SCALES: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    HAS_ROW_SCALE: tl.constexpr,
    HAS_GROUPS: tl.constexpr,
    LINES: tl.constexpr,
    WORDS: tl.constexpr,
):
    """A line is 8 * WORDS neighbouring columns, which share a scale unless HAS_GROUPS.

    `codes` are words of eight codes; a row has `in_row` lines, a group `in_group`.
    """
    COLUMNS: tl.constexpr = 8 * WORDS
    first = tl.program_id(0).to(tl.int64) * LINES
    local = tl.arange(0, LINES)
    line = tl.program_id(0) * LINES + local
    inside = line < num_lines
    words = codes + first * WORDS + local[:, None] * WORDS + tl.arange(0, WORDS)[None, :]
    packed = tl.load(words, mask=inside[:, None], other=0)
    nibble = tl.arange(0, 8)
    code = (packed[:, :, None] >> (nibble * 4)[None, None, :]) & 15
    values = (code | _ONES).to(tl.float32, bitcast=True)
    row = line // in_row
    if HAS_GROUPS:
        column = (line % in_row)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
        values = tl.reshape(values, (LINES, COLUMNS))
        # With groups that are not neighbours, `in_group` counts the groups of a row.
        group = row[:, None] * in_group + tl.load(groups + column, mask=inside[:, None], other=0)
        seen = inside[:, None]
    else:
        group = (line // in_group)[:, None, None]
        seen = inside[:, None, None]
    if HAS_ZEROS:
        zero = tl.load(zeros + group, mask=seen, other=0).to(tl.float32)
        values -= zero + _ONES_VALUE
    else:
        values -= _INT4_ZERO + _ONES_VALUE
    if HAS_SCALES:
        scale = tl.load(scales + group, mask=seen, other=0.0).to(tl.float32)
        if HAS_ROW_SCALE:
            of_row = tl.load(row_scale + row, mask=inside, other=0.0)
            scale *= of_row[:, None] if HAS_GROUPS else of_row[:, None, None]
        values *= scale
    # The cast to e4m3 saturates.
    values = tl.reshape(values.to(out.dtype.element_ty), (LINES, COLUMNS))
    into = out + first * COLUMNS + local[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    tl.store(into, values, mask=inside[:, None])


_LINE = 128
# Values that a program expands: neighbouring groups, or scattered ones, which take registers for
# an address a value.
_PROGRAM = 8192
_PROGRAM_SCATTERED = 2048


def expand_int4(weight: Int4, dtype: torch.dtype) -> torch.Tensor:
    """`kernels.linear.expand_int4`, to the bit."""
    return _expand_int4(weight, dtype, weight.scales, None)


def expand_int4_fp8(weight: Int4, scale_N: torch.Tensor) -> torch.Tensor:
    """`kernels.linear.expand_int4_fp8`, to the bit."""
    return _expand_int4(weight, torch.float8_e4m3fn, weight.scales, scale_N.reciprocal())


def expand_int4_codes(weight: Int4) -> torch.Tensor:
    """`kernels.linear.expand_int4_codes`, to the bit."""
    return _expand_int4(weight, torch.float8_e4m3fn, None, None)


def _expand_int4(
    weight: Int4,
    dtype: torch.dtype,
    scales: torch.Tensor | None,
    row_scale_N: torch.Tensor | None,
    *,
    program: int | None = None,
    warps: int = 4,
) -> torch.Tensor:
    """[N, K] of `dtype`; without scales, the steps alone."""
    codes = weight.codes
    num_rows, num_bytes = codes.shape
    num_columns, num_groups = 2 * num_bytes, weight.scales.shape[1]
    out = torch.empty(num_rows, num_columns, dtype=dtype, device=codes.device)
    shared = num_columns if weight.groups is not None else num_columns // num_groups
    # The widest line that neither leaves a group nor, in a power of two, a row.
    width = min(_LINE, shared & -shared)
    in_row = num_columns // width
    in_group = num_groups if weight.groups is not None else shared // width
    num_lines = num_rows * in_row
    if program is None:
        program = _PROGRAM if weight.groups is None else _PROGRAM_SCATTERED
    lines = max(1, program // width)
    _expand[(triton.cdiv(num_lines, lines),)](
        codes.view(torch.int32),
        codes if scales is None else scales,
        codes if weight.zeros is None else weight.zeros,
        codes if row_scale_N is None else row_scale_N,
        codes if weight.groups is None else weight.groups,
        out,
        num_lines,
        in_row,
        in_group,
        HAS_SCALES=scales is not None,
        HAS_ZEROS=weight.zeros is not None,
        HAS_ROW_SCALE=row_scale_N is not None,
        HAS_GROUPS=weight.groups is not None,
        LINES=lines,
        WORDS=width // 8,
        num_warps=warps,
        enable_fp_fusion=False,
    )
    return out
