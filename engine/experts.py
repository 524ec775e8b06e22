"""Sparse experts: a router chooses feed-forwards for each token, which run as grouped products.

Tokens are sorted by expert, so that each expert multiplies its rows as one block, and what a
token's experts gave it is added in the order of its own choices: its bits are the same in any
batch, and nothing waits on the host.

Legend: T packed tokens, k choices of a token, R = T * k rows sorted by expert, E experts, D hidden
size, N outputs, K inputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Protocol, cast

import torch

from ..kernels import experts, linear
from ..kernels.activations import gate
from ..kernels.elementwise import apply
from ..kernels.linear import Int4
from ..kernels.quantize import Activations, Layout, dequantize, quantize
from .formats import Linear, Scheme, fp8_scale, held_as
from .spec import Experts, FeedForward, Router
from .weights import Blocks, Groups, Quantization, Rows, Weight, join, round_to, suits

# What weights that are expanded for a call may take at a time, in bytes.
_SCRATCH_BYTES = 1 << 30
# What DeepSeek-V3 adds to the sum that weights are divided by.
_LEAST_SUM = 1e-20


def route(
    logits_TE: torch.Tensor, router: Router, correction_E: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Which experts take each token, and how much of each.

    The formulas are transformers' own (Mixtral, Qwen2-MoE, gpt-oss, DeepSeek-V3, MiniMax-M2). Of
    equal scores the expert that comes first is chosen first, on every device.

    Args:
        logits_TE: float32 scores as the router's linear gives them.
        correction_E: what is added to the scores for the choice alone.

    Returns:
        weights float32 [T, k] and experts int64 [T, k], the best first.
    """
    scores_TE = logits_TE.float()
    if router.scores == "softmax":
        scores_TE = scores_TE.softmax(-1)
    elif router.scores == "sigmoid":
        scores_TE = apply(torch.sigmoid, scores_TE)
    chosen_by_TE = scores_TE if correction_E is None else scores_TE + correction_E.float()
    if router.top_groups < router.num_groups:
        chosen_by_TE = _of_best_groups(chosen_by_TE, router)
    ids_TK = _best(chosen_by_TE, router.top_k)
    weights_TK = scores_TE.gather(1, ids_TK)
    if router.scores == "softmax_top":
        weights_TK = weights_TK.softmax(-1)
    if router.normalised:
        # One after another: a library's sum may depend on how many rows there are.
        total_T = reduce(torch.add, weights_TK.unbind(1))
        weights_TK = weights_TK / (total_T + _LEAST_SUM)[:, None]
    return weights_TK * router.scale, ids_TK


def _best(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Places of the largest along the last dimension, the first of equal ones first."""
    # `topk` chooses among equals as it likes.
    return torch.sort(scores, dim=-1, descending=True, stable=True).indices[..., :count]


def _of_best_groups(scores_TE: torch.Tensor, router: Router) -> torch.Tensor:
    """Scores with -inf for experts outside the groups whose two best scores sum to the most."""
    grouped = scores_TE.unflatten(1, (router.num_groups, -1))
    two_best = grouped.topk(2, dim=-1).values
    groups = _best(two_best[..., 0] + two_best[..., 1], router.top_groups)
    outside = torch.ones(grouped.shape[:2], dtype=torch.bool, device=scores_TE.device)
    outside.scatter_(1, groups, False)
    return grouped.masked_fill(outside[..., None], -torch.inf).flatten(1)


@dataclass(frozen=True, kw_only=True)
class SparseExperts:
    """A layer's experts with their router: normed activations -> what the layer adds."""

    spec: Experts
    router_ED: torch.Tensor
    """In the dtype that the checkpoint has it in; scores are float32 whatever it is."""
    router_bias_E: torch.Tensor | None = None
    correction_E: torch.Tensor | None = None
    """Float32."""
    gate_up: GroupedLinear
    """Gate above up, or up alone."""
    down: GroupedLinear
    shared: tuple[Linear, Linear] | None = None
    """Gate above up, and down, of what every token passes through."""
    shared_gate_1D: torch.Tensor | None = None

    def __call__(self, x_TD: torch.Tensor) -> torch.Tensor:
        """x [T, D] in the dtype of the arithmetic -> [T, D] in the same."""
        spec = self.spec
        logits_TE = experts.score(x_TD, self.router_ED, self.router_bias_E)
        weights_TK, ids_TK = route(logits_TE, spec.router, self.correction_E)
        order = experts.sort(ids_TK, spec.router.num_experts)
        rows = experts.gather(quantize(x_TD, self.gate_up.layout), order.tokens_R)
        gate_up_RF = self.gate_up(rows, order.offsets)
        del rows
        mixed = _gate(gate_up_RF, spec.expert, self.down.layout)
        del gate_up_RF
        y_RD = self.down(mixed, order.offsets)
        shared_TD = gate_T = None
        if self.shared is not None:
            assert spec.shared is not None
            gate_up, down = self.shared
            mixed = _gate(gate_up(quantize(x_TD, gate_up.layout)), spec.shared, down.layout)
            shared_TD = down(mixed)
        if self.shared_gate_1D is not None:
            gate_T = apply(torch.sigmoid, experts.score(x_TD, self.shared_gate_1D))[:, 0]
        return experts.combine(y_RD, order.rows_TK, weights_TK, shared_TD, gate_T)


def _gate(gate_up_TF: torch.Tensor, shape: FeedForward, layout: Layout) -> Activations:
    return gate(gate_up_TF, shape.activation, layout, gated=shape.gated)


# ---- formats ---------------------------------------------------------------------------------


class GroupedLinear(Protocol):
    """A linear layer for each expert, over rows sorted by expert."""

    @property
    def layout(self) -> Layout:
        """How it takes its input."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """(E, N, K)."""

    def __call__(self, x: Activations, offsets: torch.Tensor) -> torch.Tensor:
        """x [R, K], rows of expert e from offsets[e] on -> [R, N] in the dtype of the arithmetic.

        `offsets` are int32 [E + 1] where the rows lie.
        """


class _Held:
    """Weights that lie as [E, N, K]."""

    weight_ENK: torch.Tensor

    @property
    def shape(self) -> tuple[int, int, int]:
        num_experts, num_rows, num_columns = self.weight_ENK.shape
        return num_experts, num_rows, num_columns


@dataclass(frozen=True)
class GroupedDense(_Held):
    """Weights in the dtype of the arithmetic: fp32, bf16 or fp16."""

    weight_ENK: torch.Tensor
    bias_EN: torch.Tensor | None = None
    layout = Layout.PLAIN

    def __call__(self, x: Activations, offsets: torch.Tensor) -> torch.Tensor:
        return experts.multiply(x.values_TK, self.weight_ENK, offsets, self.bias_EN)


@dataclass(frozen=True)
class GroupedFp8Rows(_Held):
    """e4m3 weights with a scale a row."""

    weight_ENK: torch.Tensor
    scale_EN: torch.Tensor
    bias_EN: torch.Tensor | None
    dtype: torch.dtype
    layout = Layout.FP8_ROWS

    def __call__(self, x: Activations, offsets: torch.Tensor) -> torch.Tensor:
        return experts.multiply_fp8(
            x, self.weight_ENK, self.scale_EN, offsets, self.bias_EN, self.dtype
        )


@dataclass(frozen=True)
class GroupedFp8Blocks(_Held):
    """e4m3 weights with a scale per block of 128 x 128, or per 128 columns of a row."""

    weight_ENK: torch.Tensor
    scales_EBG: torch.Tensor
    """float32 [E, ceil(N / 128), K / 128], or [E, N, K / 128] where rows share none."""
    bias_EN: torch.Tensor | None
    dtype: torch.dtype
    layout = Layout.FP8_GROUPS

    def __call__(self, x: Activations, offsets: torch.Tensor) -> torch.Tensor:
        return experts.multiply_fp8_groups(
            x, self.weight_ENK, self.scales_EBG, offsets, self.bias_EN, self.dtype
        )


@dataclass(frozen=True)
class GroupedInt8Rows(_Held):
    """int8 weights with a scale a row."""

    weight_ENK: torch.Tensor
    scale_EN: torch.Tensor
    bias_EN: torch.Tensor | None
    dtype: torch.dtype
    layout = Layout.INT8_ROWS

    def __call__(self, x: Activations, offsets: torch.Tensor) -> torch.Tensor:
        return experts.multiply_int8(
            x, self.weight_ENK, self.scale_EN, offsets, self.bias_EN, self.dtype
        )


@dataclass(frozen=True)
class GroupedInt4:
    """4-bit weights, a few experts at a time expanded for every call."""

    parts: tuple[Int4, ...]
    """Experts one below another, each part as many as are expanded together."""
    num_rows: int
    """N of an expert."""
    bias_EN: torch.Tensor | None
    dtype: torch.dtype
    run: Quantization
    """`INT4`, `INT4_FP8` or `INT4_FP8_EXACT`: what they are multiplied as."""
    scale_EN: torch.Tensor | None = None
    """For `INT4_FP8`: the largest |(code - zero) * scale| of a row / 448."""

    @property
    def layout(self) -> Layout:
        return _INT4_LAYOUTS[self.run]

    @property
    def shape(self) -> tuple[int, int, int]:
        num_rows = sum(len(part.codes) for part in self.parts)
        return num_rows // self.num_rows, self.num_rows, 2 * self.parts[0].codes.shape[1]

    def __call__(self, x: Activations, offsets: torch.Tensor) -> torch.Tensor:
        shape = (len(x.values_TK), self.num_rows)
        out = torch.empty(shape, dtype=self.dtype, device=x.values_TK.device)
        first = 0
        for part in self.parts:
            last = first + len(part.codes) // self.num_rows
            self._multiply(x, part, slice(first, last), offsets[first : last + 1], out)
            first = last
        return out

    def _multiply(
        self, x: Activations, part: Int4, here: slice, offsets: torch.Tensor, out: torch.Tensor
    ) -> None:
        """The rows of the experts of a part, into `out`."""
        by_expert = (here.stop - here.start, self.num_rows, -1)
        bias_EN = None if self.bias_EN is None else self.bias_EN[here]
        if self.run == Quantization.INT4:
            weight_ENK = linear.expand_int4(part, self.dtype).view(by_expert)
            experts.multiply(x.values_TK, weight_ENK, offsets, bias_EN, out=out)
        elif self.run == Quantization.INT4_FP8:
            assert self.scale_EN is not None
            scale_EN = self.scale_EN[here]
            weight_ENK = linear.expand_int4_fp8(part, scale_EN.flatten()).view(by_expert)
            experts.multiply_fp8(x, weight_ENK, scale_EN, offsets, bias_EN, self.dtype, out=out)
        else:
            weight_ENK = linear.expand_int4_codes(part).view(by_expert)
            scales_ENG = part.scales.view(by_expert)
            experts.multiply_fp8_groups(
                x, weight_ENK, scales_ENG, offsets, bias_EN, self.dtype, out=out
            )


_INT4_LAYOUTS = {
    Quantization.INT4: Layout.PLAIN,
    Quantization.INT4_FP8: Layout.FP8_ROWS,
    Quantization.INT4_FP8_EXACT: Layout.FP8_GROUPS,
}


@dataclass(frozen=True)
class GroupedEmulated(_Held):
    """A format's numbers without its unit, as `formats.Emulated` is for one linear."""

    weight_ENK: torch.Tensor
    """float32, dequantized."""
    bias_EN: torch.Tensor | None
    layout: Layout
    dtype: torch.dtype

    def __call__(self, x: Activations, offsets: torch.Tensor) -> torch.Tensor:
        wide = experts.multiply(dequantize(x), self.weight_ENK, offsets, self.bias_EN)
        return wide.to(self.dtype)


def make_grouped(
    weights: Sequence[Weight], bias_EN: torch.Tensor | None, scheme: Scheme, dtype: torch.dtype
) -> GroupedLinear:
    """The linears of experts that have one shape, a weight each.

    What runs is what `formats.make_linear` says: experts that are stored unlike are multiplied
    plain, and so is what the scheme's kind cannot hold. `INT4_FP8_EXACT` is `INT4` for all experts
    where one does not suit it. Blocks that rows do not share become scales of each row.
    """
    assert len({weight.shape for weight in weights}) == 1
    stored = {weight.kind for weight in weights}
    run = scheme.runs[weights[0].kind] if len(stored) == 1 else Quantization.NONE
    if run == Quantization.NONE or not suits(run, *weights[0].shape):
        return _make_dense(weights, bias_EN, dtype)
    held = held_as(run)
    rounded = []
    for weight in weights:
        whole = weight if stored == {held} else round_to(held, weight.dense(torch.float32))
        if whole is None:
            return _make_dense(weights, bias_EN, dtype)
        rounded.append(whole)
    if held == Quantization.INT4:
        return _make_int4(cast("list[Groups]", rounded), run, bias_EN, dtype, scheme.emulated)
    if scheme.emulated:
        return _emulate(rounded, _LAYOUTS[run], bias_EN, dtype)
    if run == Quantization.FP8_BLOCK:
        blocks = cast("list[Blocks]", rounded)
        shared = [weight.block_scales() for weight in blocks]
        scales = [weight.scales_NB for weight in blocks]
        if all(scale is not None for scale in shared):
            scales = cast("list[torch.Tensor]", shared)
        values_ENK = torch.stack([weight.values_NK for weight in blocks])
        return GroupedFp8Blocks(values_ENK, torch.stack(scales).float(), bias_EN, dtype)
    rows = cast("list[Rows]", rounded)
    make = GroupedFp8Rows if run == Quantization.FP8 else GroupedInt8Rows
    values_ENK = torch.stack([weight.values_NK for weight in rows])
    scale_EN = torch.stack([weight.scales_N1[:, 0] for weight in rows])
    return make(values_ENK, scale_EN, bias_EN, dtype)


_LAYOUTS = {
    Quantization.FP8: Layout.FP8_ROWS,
    Quantization.FP8_BLOCK: Layout.FP8_GROUPS,
    Quantization.INT8: Layout.INT8_ROWS,
}


def _make_dense(
    weights: Sequence[Weight], bias_EN: torch.Tensor | None, dtype: torch.dtype
) -> GroupedDense:
    return GroupedDense(torch.stack([weight.dense(dtype) for weight in weights]), bias_EN)


def _emulate(
    weights: Sequence[Weight], layout: Layout, bias_EN: torch.Tensor | None, dtype: torch.dtype
) -> GroupedEmulated:
    wide = None if bias_EN is None else bias_EN.float()
    weight_ENK = torch.stack([weight.dense(torch.float32) for weight in weights])
    return GroupedEmulated(weight_ENK, wide, layout, dtype)


def _make_int4(
    weights: Sequence[Groups],
    run: Quantization,
    bias_EN: torch.Tensor | None,
    dtype: torch.dtype,
    emulated: bool,
) -> GroupedLinear:
    if run == Quantization.INT4_FP8_EXACT:
        if not all(weight.suits_fp8() for weight in weights):
            run = Quantization.INT4
        elif emulated:
            return _emulate(weights, Layout.FP8_GROUPS, bias_EN, dtype)
    scale_EN = None
    if run == Quantization.INT4_FP8:
        scale_EN = torch.stack([fp8_scale(weight) for weight in weights])
        if emulated:
            rows = [
                Rows(linear.expand_int4_fp8(weight.numbers, scale_N), scale_N[:, None])
                for weight, scale_N in zip(weights, scale_EN, strict=True)
            ]
            return _emulate(rows, Layout.FP8_ROWS, bias_EN, dtype)
    num_rows, num_columns = weights[0].shape
    joined = join(weights)
    # Experts whose groups differ (columns in an order of their own) are expanded alone.
    at_once = max(1, _SCRATCH_BYTES // (num_rows * num_columns * dtype.itemsize))
    wholes = weights if joined is None else [joined]
    step = num_rows * (1 if joined is None else at_once)
    parts = [
        _slice(cast(Groups, whole).numbers, slice(start, start + step), run)
        for whole in wholes
        for start in range(0, whole.shape[0], step)
    ]
    return GroupedInt4(tuple(parts), num_rows, bias_EN, dtype, run, scale_EN)


def _slice(weight: Int4, rows: slice, run: Quantization) -> Int4:
    codes, scales, zeros, groups = weight
    if run == Quantization.INT4_FP8_EXACT:
        # As the product takes them.
        scales = scales.float()
    return Int4(codes[rows], scales[rows], None if zeros is None else zeros[rows], groups)
