"""Weights as numbers, row by row: what a checkpoint's layout is read into, a linear made from.

Legend: N outputs (rows), K inputs (columns), B blocks or groups of columns.

Whatever a layout packs, transposes or interleaves, these are [N, ...] in every tensor, so that
rows can be chosen (`map_rows`) and put below each other (`join`) without knowing the format.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol, cast

import torch
import torch.nn.functional as F

from ..kernels.linear import Int4, expand_int4, pack_int4
from ..kernels.quantize import FP8_MAX, GROUP, Layout, quantize

Rearrange = Callable[[torch.Tensor], torch.Tensor]

# What an all-zero group of weights is divided by instead of zero; AutoAWQ's own figure.
_LEAST = 1e-5
# Multiplied by, as a GPU does when it divides by a constant: the same bits on every device.
_PER_FP8_MAX, _PER_STEP = 1.0 / FP8_MAX, 1.0 / 15
# Rows that are converted at a time: float32 scratch stays small beside the weights.
_ROWS_AT_ONCE = 4096


class Quantization(StrEnum):
    """What weights are rounded to, and what they are multiplied with."""

    NONE = "none"
    """Nothing: the dtype of the arithmetic."""
    FP8 = "fp8"
    """e4m3 with a scale a row; activations e4m3 with a scale a row."""
    FP8_BLOCK = "fp8_block"
    """e4m3 with a scale per 128 x 128; activations e4m3 with a scale per 128 columns of a row."""
    INT8 = "int8"
    """int8 with a scale a row; activations int8 with a scale a row."""
    INT4 = "int4"
    """Four bits with a scale and a zero point per group of columns; activations plain."""
    INT4_FP8 = "int4_fp8"
    """`INT4`, rounded to e4m3 when multiplied; activations e4m3 with a scale a row."""
    INT4_FP8_EXACT = "int4_fp8_exact"
    """`INT4`, its codes multiplied in e4m3, which holds them exactly; activations e4m3 with a
    scale per 128 columns of a row. What it does not suit (groups of another size, columns in
    an order of their own, N not a multiple of 16) is multiplied as `INT4`."""


class Weight(Protocol):
    """A linear's weight [N, K]."""

    @property
    def kind(self) -> Quantization: ...

    @property
    def shape(self) -> tuple[int, int]: ...

    def map_rows(self, rearrange: Rearrange) -> Weight:
        """The same with its rows chosen by a function of [N, ...]."""

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        """The numbers that are meant, rounded once to `dtype`; [N, K]."""


@dataclass(frozen=True)
class Plain:
    """Weights of a floating dtype."""

    values_NK: torch.Tensor

    @property
    def kind(self) -> Quantization:
        return Quantization.NONE

    @property
    def shape(self) -> tuple[int, int]:
        num_rows, num_columns = self.values_NK.shape
        return num_rows, num_columns

    def map_rows(self, rearrange: Rearrange) -> Plain:
        return Plain(rearrange(self.values_NK))

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        return self.values_NK.to(dtype)


@dataclass(frozen=True)
class Rows:
    """e4m3 or int8 with a scale a row: value * scale."""

    values_NK: torch.Tensor
    scales_N1: torch.Tensor
    """float32."""

    @property
    def kind(self) -> Quantization:
        is_int8 = self.values_NK.dtype == torch.int8
        return Quantization.INT8 if is_int8 else Quantization.FP8

    @property
    def shape(self) -> tuple[int, int]:
        num_rows, num_columns = self.values_NK.shape
        return num_rows, num_columns

    def map_rows(self, rearrange: Rearrange) -> Rows:
        return Rows(rearrange(self.values_NK), rearrange(self.scales_N1))

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        return _by_rows(
            lambda rows: self.values_NK[rows].float() * self.scales_N1[rows], self.shape[0], dtype
        )


@dataclass(frozen=True)
class Blocks:
    """e4m3 with a scale per 128 columns of a row, which 128 rows share where they are whole."""

    values_NK: torch.Tensor
    scales_NB: torch.Tensor
    """float32 [N, ceil(K / 128)]: rows keep their scales when they are chosen or joined."""

    @property
    def kind(self) -> Quantization:
        return Quantization.FP8_BLOCK

    @property
    def shape(self) -> tuple[int, int]:
        num_rows, num_columns = self.values_NK.shape
        return num_rows, num_columns

    def map_rows(self, rearrange: Rearrange) -> Blocks:
        return Blocks(rearrange(self.values_NK), rearrange(self.scales_NB))

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        num_rows, num_columns = self.shape
        return _by_rows(
            lambda rows: (
                self.values_NK[rows].float()
                * self.scales_NB[rows].repeat_interleave(GROUP, 1)[:, :num_columns]
            ),
            num_rows,
            dtype,
        )

    def block_scales(self) -> torch.Tensor | None:
        """The scales [ceil(N / 128), ceil(K / 128)]; None where 128 rows share none."""
        num_rows = self.shape[0]
        first = self.scales_NB[::GROUP]
        shared = first.repeat_interleave(GROUP, 0)[:num_rows]
        return first.contiguous() if _equal(shared, self.scales_NB) else None


@dataclass(frozen=True)
class Groups:
    """Four bits with a scale per group of columns."""

    numbers: Int4

    @property
    def kind(self) -> Quantization:
        return Quantization.INT4

    @property
    def shape(self) -> tuple[int, int]:
        num_rows, num_bytes = self.numbers.codes.shape
        return num_rows, 2 * num_bytes

    def map_rows(self, rearrange: Rearrange) -> Groups:
        codes, scales, zeros, groups = self.numbers
        return Groups(
            Int4(
                rearrange(codes),
                rearrange(scales),
                None if zeros is None else rearrange(zeros),
                groups,
            )
        )

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        return expand_int4(self.numbers, dtype)

    def suits_fp8(self) -> bool:
        """Whether `INT4_FP8_EXACT` takes it: groups of 128 neighbours, N a multiple of 16."""
        num_rows, num_columns = self.shape
        of_neighbours = self.numbers.groups is None
        in_groups = self.numbers.scales.shape[1] * GROUP == num_columns
        return of_neighbours and in_groups and num_rows % 16 == 0


def join(weights: Sequence[Weight]) -> Weight | None:
    """Weights of one kind below each other; None where the format cannot hold them as one."""
    if len(weights) == 1:
        return weights[0]
    first = weights[0]
    assert all(w.kind == first.kind for w in weights)
    if isinstance(first, Plain):
        return Plain(torch.cat([cast(Plain, w).values_NK for w in weights]))
    if isinstance(first, Rows):
        rows = cast("Sequence[Rows]", weights)
        return Rows(torch.cat([w.values_NK for w in rows]), torch.cat([w.scales_N1 for w in rows]))
    if isinstance(first, Blocks):
        blocks = cast("Sequence[Blocks]", weights)
        return Blocks(
            torch.cat([w.values_NK for w in blocks]), torch.cat([w.scales_NB for w in blocks])
        )
    return _join_groups(cast("Sequence[Groups]", weights))


def _equal(ours: torch.Tensor, others: torch.Tensor) -> bool:
    """Whether numbers are the same; on `meta`, where there are none, they are taken to be."""
    return ours.is_meta or torch.equal(ours, others)


def _join_groups(weights: Sequence[Groups]) -> Groups | None:
    all_numbers = [w.numbers for w in weights]
    codes, scales, zeros, groups = zip(*all_numbers, strict=True)
    alike = (
        len({(s.shape[1], s.dtype) for s in scales}) == 1
        and len({z is None for z in zeros}) == 1
        and len({g is None for g in groups}) == 1
        and (groups[0] is None or all(_equal(groups[0], g) for g in groups))
    )
    if not alike:
        return None
    has_zeros = zeros[0] is not None
    return Groups(
        Int4(
            torch.cat(codes),
            torch.cat(scales),
            torch.cat(zeros) if has_zeros else None,
            groups[0],
        )
    )


# ---- rounding --------------------------------------------------------------------------------


def round_to(kind: Quantization, weight_NK: torch.Tensor) -> Weight | None:
    """Round to nearest, without calibration; None where K holds no whole groups.

    `kind` is what the weights are held in: not `NONE`, and `INT4` where `INT4_FP8` or
    `INT4_FP8_EXACT` runs. K has been found to suit it.
    """
    if kind in (Quantization.FP8, Quantization.INT8):
        layout = Layout.INT8_ROWS if kind == Quantization.INT8 else Layout.FP8_ROWS
        values, scales = zip(*(quantize(part, layout) for part in _parts(weight_NK)), strict=True)
        return Rows(torch.cat(values), torch.cat(scales))
    if kind == Quantization.FP8_BLOCK:
        return join([_round_to_blocks(part) for part in _parts(weight_NK)])
    size = next((n for n in (128, 64, 32) if weight_NK.shape[1] % n == 0), None)
    if size is None:
        return None
    return join([_round_to_groups(part, size) for part in _parts(weight_NK)])


def suits(kind: Quantization, num_rows: int, num_columns: int) -> bool:
    """Whether a product of this kind takes a weight [N, K]; what does not is multiplied plain.

    The libraries' 8-bit products take multiples of 16, and activations with a scale per group of
    columns whole groups. A CPU could do without, but a checkpoint means the same everywhere.
    `INT4_FP8_EXACT` takes any, since it is `INT4` where its own product cannot be had.
    """
    if kind in (Quantization.NONE, Quantization.INT4, Quantization.INT4_FP8_EXACT):
        return True
    multiple = GROUP if kind == Quantization.FP8_BLOCK else 16
    return num_rows % 16 == 0 and num_columns % multiple == 0


def _round_to_blocks(weight_NK: torch.Tensor) -> Blocks:
    """scale = max |w| of a block / 448, value = w / scale, as DeepSeek-V3 publishes it."""
    num_rows, num_columns = weight_NK.shape
    wide = F.pad(weight_NK.float(), (0, 0, 0, -num_rows % GROUP))
    blocks = wide.view(-1, GROUP, num_columns // GROUP, GROUP)
    scales = blocks.abs().amax((1, 3)).clamp_min(1e-12) * _PER_FP8_MAX
    values = (blocks / scales[:, None, :, None]).clamp_(-FP8_MAX, FP8_MAX)
    return Blocks(
        values.view(-1, num_columns)[:num_rows].to(torch.float8_e4m3fn),
        scales.repeat_interleave(GROUP, 0)[:num_rows],
    )


def _round_to_groups(weight_NK: torch.Tensor, size: int) -> Groups:
    """AutoAWQ's rule: 15 steps from the least to the largest of a group, 0 among them.

    Scales are float16, rounded before the codes are.
    """
    num_rows, num_columns = weight_NK.shape
    wide = weight_NK.float().view(num_rows, -1, size)
    low, high = wide.amin(-1).clamp_max(0), wide.amax(-1).clamp_min(0)
    scales = ((high - low).clamp_min(_LEAST) * _PER_STEP).to(torch.float16)
    step = scales.float()
    zeros = (-low / step).round().clamp_(0, 15)
    codes = ((wide / step[..., None]).round() + zeros[..., None]).clamp_(0, 15)
    return Groups(
        Int4(
            pack_int4(codes.to(torch.uint8).view(num_rows, num_columns)),
            scales,
            zeros.to(torch.uint8),
        )
    )


def _parts(weight_NK: torch.Tensor) -> Sequence[torch.Tensor]:
    # Whole blocks of rows, so that parts give what the whole would.
    return weight_NK.split(_ROWS_AT_ONCE)


def _by_rows(
    convert: Callable[[slice], torch.Tensor], num_rows: int, dtype: torch.dtype
) -> torch.Tensor:
    """`convert` of a few rows at a time, each rounded to `dtype`."""
    starts = range(0, num_rows, _ROWS_AT_ONCE)
    return torch.cat([convert(slice(a, a + _ROWS_AT_ONCE)).to(dtype) for a in starts])
