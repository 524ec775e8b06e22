"""Weight formats: how a linear layer's weights are held and multiplied.

A format knows nothing of families. Each is a class with the same face, a layout that it wants its
input in and a call on packed tokens; `resolve_scheme` decides which one a checkpoint's weights run
in and `make_linear` makes it.

Legend: T packed tokens, K inputs, N outputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, cast

import torch

from ..kernels import linear
from ..kernels.linear import Int4
from ..kernels.quantize import FP8_MAX, Activations, Layout, dequantize
from .layouts import Stored
from .weights import Blocks, Groups, Quantization, Rows, Weight, join, round_to, suits

Capability = tuple[int, int] | None
"""CUDA compute capability; None is a CPU."""

# Oldest GPUs whose tensor cores multiply these.
_LEAST_FP8 = (8, 9)
_LEAST_INT8 = (8, 0)
# The only ones whose library scales both operands of a product by groups of columns.
_GROUPS_MAJOR = 9
# Kinds that are held as `INT4`.
_IN_INT4 = (Quantization.INT4, Quantization.INT4_FP8, Quantization.INT4_FP8_EXACT)
# What an all-zero row is divided by instead of zero.
_LEAST_SCALE = 1e-12


class Linear(Protocol):
    """A linear layer over packed tokens."""

    @property
    def layout(self) -> Layout:
        """How it takes its input."""

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""

    def __call__(self, x: Activations) -> torch.Tensor:
        """x [T, K] -> [T, N] in the dtype of the arithmetic."""


class _Held:
    """Weights that lie as [N, K]."""

    weight_NK: torch.Tensor

    @property
    def shape(self) -> tuple[int, int]:
        num_rows, num_columns = self.weight_NK.shape
        return num_rows, num_columns


@dataclass(frozen=True)
class Dense(_Held):
    """Weights in the dtype of the arithmetic: fp32, bf16 or fp16."""

    weight_NK: torch.Tensor
    bias_N: torch.Tensor | None = None
    layout = Layout.PLAIN

    def __call__(self, x: Activations) -> torch.Tensor:
        return linear.multiply(x.values_TK, self.weight_NK, self.bias_N)


@dataclass(frozen=True)
class WideDense(_Held):
    """Dense weights whose products stay float32: a head's."""

    weight_NK: torch.Tensor
    layout = Layout.PLAIN

    def __call__(self, x: Activations) -> torch.Tensor:
        return linear.multiply_wide(x.values_TK, self.weight_NK)


@dataclass(frozen=True)
class Fp8Rows(_Held):
    """e4m3 weights with a scale a row."""

    weight_NK: torch.Tensor
    scale_N: torch.Tensor
    bias_N: torch.Tensor | None
    dtype: torch.dtype
    layout = Layout.FP8_ROWS

    def __call__(self, x: Activations) -> torch.Tensor:
        return linear.multiply_fp8(x, self.weight_NK, self.scale_N, self.bias_N, self.dtype)


@dataclass(frozen=True)
class Fp8Blocks(_Held):
    """e4m3 weights with a scale per block of 128 x 128."""

    weight_NK: torch.Tensor
    scales: torch.Tensor
    """As `lay_out_block_scales` makes them."""
    bias_N: torch.Tensor | None
    dtype: torch.dtype
    layout = Layout.FP8_GROUPS

    def __call__(self, x: Activations) -> torch.Tensor:
        return linear.multiply_fp8_blocks(x, self.weight_NK, self.scales, self.bias_N, self.dtype)


@dataclass(frozen=True)
class Int8Rows(_Held):
    """int8 weights with a scale a row."""

    weight_NK: torch.Tensor
    scale_N: torch.Tensor
    bias_N: torch.Tensor | None
    dtype: torch.dtype
    layout = Layout.INT8_ROWS

    def __call__(self, x: Activations) -> torch.Tensor:
        return linear.multiply_int8(x, self.weight_NK, self.scale_N, self.bias_N, self.dtype)


class _HeldInt4:
    """Weights that lie as codes of four bits."""

    weight: Int4

    @property
    def shape(self) -> tuple[int, int]:
        num_rows, num_bytes = self.weight.codes.shape
        return num_rows, 2 * num_bytes


@dataclass(frozen=True)
class Int4Groups(_HeldInt4):
    """4-bit weights, expanded for every call into scratch that lives as long as the call.

    They are for fitting: a batch of thousands of tokens hides the expansion, and no product of
    mixed types comes near the dense one at that size.
    """

    weight: Int4
    bias_N: torch.Tensor | None
    dtype: torch.dtype
    scale_N: torch.Tensor | None = None
    """Where it is multiplied in e4m3: the largest |(code - zero) * scale| of a row / 448."""

    @property
    def layout(self) -> Layout:
        return Layout.PLAIN if self.scale_N is None else Layout.FP8_ROWS

    def __call__(self, x: Activations) -> torch.Tensor:
        if self.scale_N is None:
            weight_NK = linear.expand_int4(self.weight, self.dtype)
            return linear.multiply(x.values_TK, weight_NK, self.bias_N)
        weight_NK = linear.expand_int4_fp8(self.weight, self.scale_N)
        return linear.multiply_fp8(x, weight_NK, self.scale_N, self.bias_N, self.dtype)


@dataclass(frozen=True)
class Int4Codes(_HeldInt4):
    """4-bit weights whose codes less zero points are multiplied in e4m3, none of them rounded.

    They are expanded for every call, as `Int4Groups` are.
    """

    weight: Int4
    """Its scales as `lay_out_group_scales` makes them."""
    bias_N: torch.Tensor | None
    dtype: torch.dtype
    layout = Layout.FP8_GROUPS

    def __call__(self, x: Activations) -> torch.Tensor:
        weight_NK = linear.expand_int4_codes(self.weight)
        return linear.multiply_fp8_groups(x, weight_NK, self.weight.scales, self.bias_N, self.dtype)


@dataclass(frozen=True)
class Emulated(_Held):
    """A format's numbers without its unit: rounded activations and weights, multiplied wide.

    It is what a CPU runs, and what the format means: sums are float32 and nothing but the
    operands is rounded.
    """

    weight_NK: torch.Tensor
    """float32, dequantized."""
    bias_N: torch.Tensor | None
    layout: Layout
    dtype: torch.dtype

    def __call__(self, x: Activations) -> torch.Tensor:
        return linear.multiply(dequantize(x), self.weight_NK, self.bias_N).to(self.dtype)


@dataclass(frozen=True)
class Parts:
    """Linears over one input, their outputs side by side: what one format cannot hold as one."""

    linears: Sequence[Linear]

    @property
    def layout(self) -> Layout:
        return self.linears[0].layout

    @property
    def shape(self) -> tuple[int, int]:
        return sum(part.shape[0] for part in self.linears), self.linears[0].shape[1]

    def __call__(self, x: Activations) -> torch.Tensor:
        return torch.cat([part(x) for part in self.linears], -1)


# ---- what runs -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scheme:
    """What the linears of a checkpoint run as. Made by `resolve_scheme`."""

    stored: Stored
    runs: Mapping[Quantization, Quantization]
    """From the kind that a weight is stored in to the kind that it runs in."""
    emulated: bool
    """Whether 8-bit numbers are multiplied as float32, for want of a unit."""
    reasons: Mapping[Quantization, str]
    """Why a kind runs as something else without having been told to."""
    fp8_head: bool = False
    """Whether the head, too, is rounded to fp8."""

    def expanded(self, dtype: torch.dtype) -> int:
        """Most bytes that a weight's number takes in front of a product; 0 if none is expanded."""
        widths = {
            Quantization.INT4: dtype.itemsize,
            Quantization.INT4_FP8: 1,
            # In groups of other sizes than the one that is exact.
            Quantization.INT4_FP8_EXACT: dtype.itemsize,
        }
        return max(widths.get(run, 0) for run in self.runs.values())

    def describe(self, dtype: str) -> str:
        """One line for people; `dtype` names what is computed in.

        "awq int4, groups of 128, asymmetric -> expanded to bfloat16"
        """
        head = "; head rounded to fp8" if self.fp8_head else ""
        if not self.stored.groups:
            run = self.runs[Quantization.NONE]
            method = self.stored.method
            stored = "unquantized" if method == "none" else f"experts in {method}"
            return f"{stored} -> {self._end(Quantization.NONE, run, dtype)}{head}"
        lines = []
        for group in self.stored.groups:
            line = f"{group.text} -> {self._end(group.kind, self.runs[group.kind], dtype)}"
            if group.kind in self.reasons:
                line += f": {self.reasons[group.kind]}"
            if group.note and self.runs[group.kind] == group.kind:
                line += f", {group.note}"
            lines.append(line)
        said = "; ".join(lines)
        method = self.stored.method
        return said if said.startswith(method) else f"{method} {said}"

    def _end(self, kind: Quantization, run: Quantization, dtype: str) -> str:
        if run == Quantization.NONE:
            return dtype if kind == Quantization.NONE else f"dequantized to {dtype}"
        text = f"expanded to {dtype}" if run == Quantization.INT4 else _RUN_TEXT[run]
        held = held_as(run)
        if kind not in (Quantization.NONE, held):
            text = f"rounded again to {held}, {text}"
        elif kind == Quantization.NONE:
            text = f"rounded to {held}, {text}"
        if self.emulated and run != Quantization.INT4:
            text += ", emulated in float32"
        if run == Quantization.INT4_FP8_EXACT:
            # Which linears have others is known only once they are read.
            text += f", other groups expanded to {dtype}"
        return text


_RUN_TEXT = {
    Quantization.FP8: "multiplied in fp8 with scales of rows",
    Quantization.FP8_BLOCK: "multiplied in fp8 with scales of blocks",
    Quantization.INT8: "multiplied in int8",
    Quantization.INT4_FP8: "multiplied in fp8 with scales of rows",
    Quantization.INT4_FP8_EXACT: "multiplied in fp8 with scales of groups of 128",
}


def held_as(run: Quantization) -> Quantization:
    """What weights are held in to run as this."""
    return Quantization.INT4 if run in _IN_INT4 else run


def resolve_scheme(
    stored: Stored, wanted: str | None, capability: Capability, *, fp8_head: bool = False
) -> Scheme:
    """What runs, from how weights are stored, what was asked for and what the device has.

    Args:
        stored: of the checkpoint, from `layouts.read_stored`.
        wanted: a name of `Quantization`; None runs what is stored as it is stored, and where the
            device has no unit for it, dequantized: a second rounding would cost accuracy that
            nobody asked to pay.
        capability: of the GPU, or None for a CPU, which computes the same numbers in float32.
        fp8_head: whether the head shall be rounded to fp8.

    A quantized checkpoint keeps the linears plain that it left plain, unless those it quantized are
    dequantized as they are read (int8 in groups): then they are alike.

    Raises:
        ValueError: naming `quantization`, its value and what would work.
    """
    if fp8_head and (lacking := _lacks(Quantization.FP8, capability)):
        raise ValueError(f"fp8_head: it cannot run, {lacking}; leave it out")
    target = None
    if wanted is not None:
        names = [str(q) for q in Quantization]
        if wanted not in names:
            raise ValueError(f"quantization: {wanted!r} is not one of {', '.join(names)}")
        target = Quantization(wanted)
        lacking = _lacks(target, capability)
        if lacking:
            works = [q for q in Quantization if not _lacks(q, capability)]
            raise ValueError(
                f"quantization: {wanted!r} cannot run, {lacking}; one of {', '.join(works)} can"
            )
    if not stored.groups:
        runs = {Quantization.NONE: target or Quantization.NONE}
        return Scheme(stored, runs, capability is None, {}, fp8_head)
    runs = {Quantization.NONE: Quantization.NONE}
    reasons: dict[Quantization, str] = {}
    for group in stored.groups:
        runs[group.kind] = target or group.kind
        lacking = _lacks(group.kind, capability)
        if target is None and group.weight_only and group.kind != Quantization.INT4:
            runs[group.kind] = Quantization.NONE
            reasons[group.kind] = "its activations are not quantized"
        elif target is None and lacking:
            runs[group.kind] = Quantization.NONE
            reasons[group.kind] = lacking
    return Scheme(stored, runs, capability is None, reasons, fp8_head)


def _lacks(kind: Quantization, capability: Capability) -> str | None:
    """Why a device cannot run a kind; None if it can."""
    if capability is None:
        return None
    exact = kind == Quantization.INT4_FP8_EXACT
    fp8 = (Quantization.FP8, Quantization.FP8_BLOCK, Quantization.INT4_FP8)
    if (exact or kind in fp8) and capability < _LEAST_FP8:
        return "this GPU has no fp8 units"
    if exact and capability[0] != _GROUPS_MAJOR:
        major, minor = capability
        return (
            f"this GPU has compute capability {major}.{minor}, and fp8 products with scales of "
            f"groups are there on {_GROUPS_MAJOR}.x alone"
        )
    if kind == Quantization.INT8 and capability < _LEAST_INT8:
        return "this GPU has no int8 units that the kernels know"
    return None


# ---- making ----------------------------------------------------------------------------------


def make_linear(
    weights: Sequence[Weight], bias_N: torch.Tensor | None, scheme: Scheme, dtype: torch.dtype
) -> Linear:
    """One linear whose outputs are those of `weights`, one after another.

    Weights that are stored unlike (some left plain by the checkpoint) are multiplied plain, and so
    is what the scheme's kind cannot hold (`suits`). `INT4_FP8_EXACT` is `INT4` for what
    does not suit it (`Groups.suits_fp8`), and for all weights where one does not.
    """
    stored = {weight.kind for weight in weights}
    run = scheme.runs[weights[0].kind] if len(stored) == 1 else Quantization.NONE
    num_rows = sum(weight.shape[0] for weight in weights)
    if run == Quantization.NONE or not suits(run, num_rows, weights[0].shape[1]):
        return _make_dense(weights, bias_N, dtype)
    held = held_as(run)
    if stored == {held}:
        joined = join(weights)
    else:
        joined = round_to(held, torch.cat([weight.dense(torch.float32) for weight in weights]))
    whole = None if joined is None else _make(joined, run, bias_N, dtype, scheme.emulated)
    if whole is not None:
        return whole
    if len(weights) == 1:
        return _make_dense(weights, bias_N, dtype)
    sizes = [weight.shape[0] for weight in weights]
    biases = [None] * len(sizes) if bias_N is None else bias_N.split(sizes)
    parts = [
        make_linear([weight], bias, scheme, dtype)
        for weight, bias in zip(weights, biases, strict=True)
    ]
    if any(isinstance(part, Dense) for part in parts):
        return _make_dense(weights, bias_N, dtype)
    if len({part.layout for part in parts}) > 1:
        # One input has one layout, and plain is the one that all of `INT4` take.
        runs = {**scheme.runs, held: Quantization.INT4}
        return make_linear(weights, bias_N, replace(scheme, runs=runs), dtype)
    return Parts(parts)


def make_head(weight_VD: torch.Tensor, scheme: Scheme, *, on_gpu: bool) -> Linear:
    """The head, whose products are float32 whatever its weights are, to run on a GPU or a CPU.

    Raises:
        ValueError: if it shall be rounded to fp8 and has a shape that fp8 products do not take.
    """
    if scheme.fp8_head:
        if not suits(Quantization.FP8, *weight_VD.shape):
            raise ValueError(
                f"fp8_head: a head of {weight_VD.shape[0]} tokens and {weight_VD.shape[1]} columns "
                "cannot run, both have to be multiples of 16; leave it out"
            )
        rounded = round_to(Quantization.FP8, weight_VD)
        assert rounded is not None
        made = _make(rounded, Quantization.FP8, None, torch.float32, scheme.emulated)
        assert made is not None
        return made
    # Only a GPU multiplies 16-bit operands into a float32 result.
    return WideDense(weight_VD if on_gpu else weight_VD.float())


def _make_dense(
    weights: Sequence[Weight], bias_N: torch.Tensor | None, dtype: torch.dtype
) -> Dense:
    dense = [weight.dense(dtype) for weight in weights]
    return Dense(dense[0] if len(dense) == 1 else torch.cat(dense), bias_N)


def _make(
    weight: Weight,
    run: Quantization,
    bias_N: torch.Tensor | None,
    dtype: torch.dtype,
    emulated: bool,
) -> Linear | None:
    """The linear of a weight that is held in its kind; None if its rows do not share blocks."""
    match run:
        case Quantization.INT4:
            return Int4Groups(cast(Groups, weight).numbers, bias_N, dtype)
        case Quantization.INT4_FP8_EXACT:
            groups = cast(Groups, weight)
            numbers = groups.numbers
            if not groups.suits_fp8():
                return Int4Groups(numbers, bias_N, dtype)
            if emulated:
                return _emulate(weight, Layout.FP8_GROUPS, bias_N, dtype)
            numbers = numbers._replace(scales=linear.lay_out_group_scales(numbers.scales))
            return Int4Codes(numbers, bias_N, dtype)
        case Quantization.INT4_FP8:
            numbers = cast(Groups, weight).numbers
            scale_N = fp8_scale(weight)
            if not emulated:
                return Int4Groups(numbers, bias_N, dtype, scale_N)
            weight = Rows(linear.expand_int4_fp8(numbers, scale_N), scale_N[:, None])
            return _emulate(weight, Layout.FP8_ROWS, bias_N, dtype)
        case Quantization.FP8_BLOCK:
            blocks = cast(Blocks, weight)
            scales = blocks.block_scales()
            if scales is None:
                return None
            if emulated:
                return _emulate(weight, Layout.FP8_GROUPS, bias_N, dtype)
            scales = linear.lay_out_block_scales(scales)
            return Fp8Blocks(blocks.values_NK.contiguous(), scales, bias_N, dtype)
    layout = Layout.FP8_ROWS if run == Quantization.FP8 else Layout.INT8_ROWS
    if emulated:
        return _emulate(weight, layout, bias_N, dtype)
    rows = cast(Rows, weight)
    make = Fp8Rows if run == Quantization.FP8 else Int8Rows
    return make(rows.values_NK.contiguous(), rows.scales_N1[:, 0].contiguous(), bias_N, dtype)


def fp8_scale(weight: Weight) -> torch.Tensor:
    """The scale of each row that fills e4m3: its largest number / 448; float32 [N]."""
    largest = weight.dense(torch.float32).abs().amax(1)
    # As on every device: a GPU multiplies by the reciprocal of a constant.
    return largest.clamp_min(_LEAST_SCALE) * (1.0 / FP8_MAX)


def _emulate(
    weight: Weight, layout: Layout, bias_N: torch.Tensor | None, dtype: torch.dtype
) -> Emulated:
    wide = None if bias_N is None else bias_N.float()
    return Emulated(weight.dense(torch.float32), wide, layout, dtype)
