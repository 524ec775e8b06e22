"""Products of rows sorted by expert, each with its own expert's weights; nothing waits on the host.

Legend: T packed tokens, k choices of a token, R = T * k rows sorted by expert, E experts, N
outputs, K inputs, D hidden size.

Rows of expert e are offsets[e] ... offsets[e + 1]; the offsets lie where the rows do. A row's bits
depend on that row alone: neither on how many rows its expert has nor on its place among them.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import torch

from . import linear
from .choice import has_triton
from .quantize import GROUP, Activations, dequantize

# Rows of a product without a kernel of our own, padded with zeros: a library sums a row in another
# order beside fewer rows than beside many.
_BLOCK = 32


class Order(NamedTuple):
    """Where the choices of tokens lie once they are sorted by expert."""

    tokens_R: torch.Tensor
    """int64: the token of each row; rows of an expert keep the order of their tokens."""
    offsets: torch.Tensor
    """int32 [E + 1]: the first row of each expert, and R."""
    rows_TK: torch.Tensor
    """int64 [T, k]: the row of each choice."""


def sort(ids_TK: torch.Tensor, num_experts: int) -> Order:
    """Sort the choices of all tokens by expert."""
    num_choices = ids_TK.shape[1]
    # A GPU sorts by digits: narrow numbers have few.
    sorted_R, order_R = torch.sort(ids_TK.flatten().to(torch.int16), stable=True)
    bounds = torch.arange(num_experts + 1, dtype=torch.int16, device=ids_TK.device)
    offsets = torch.searchsorted(sorted_R, bounds, out_int32=True)
    rows = torch.empty_like(order_R)
    rows[order_R] = torch.arange(len(order_R), device=ids_TK.device)
    return Order(order_R // num_choices, offsets, rows.view(ids_TK.shape))


def gather(x: Activations, rows_R: torch.Tensor) -> Activations:
    """The given rows of activations, in this order; no number changes."""
    if has_triton(x.values_TK):
        from .gpu import experts as gpu

        return gpu.gather(x, rows_R)
    values = x.values_TK
    # Bytes, since not every device chooses rows of e4m3.
    narrow = values.dtype.itemsize == 1
    chosen = (values.view(torch.uint8) if narrow else values)[rows_R].view(values.dtype)
    if x.scales is None:
        return Activations(chosen)
    # Column by column in memory, as the kernels leave them.
    return Activations(chosen, x.scales.t().contiguous()[:, rows_R].t())


def combine(
    y_RD: torch.Tensor,
    rows_TK: torch.Tensor,
    weights_TK: torch.Tensor,
    shared_TD: torch.Tensor | None = None,
    gate_T: torch.Tensor | None = None,
) -> torch.Tensor:
    """What the experts of a token gave it, weighted and added; [T, D] in the dtype of `y`.

    sum over j of weights[t, j] * y[rows[t, j]], then + shared[t] * gate[t]: products and sums are
    float32, one after another in the order of a token's choices, and rounded once.

    Args:
        weights_TK: float32.
        shared_TD: what every token passes through, in the dtype of `y`.
        gate_T: float32, of the shared part; without it, 1.
    """
    if has_triton(y_RD):
        from .gpu import experts as gpu

        return gpu.combine(y_RD, rows_TK, weights_TK, shared_TD, gate_T)
    total_TD = torch.zeros(len(rows_TK), y_RD.shape[1], device=y_RD.device)
    for rows_T, weight_T in zip(rows_TK.unbind(1), weights_TK.unbind(1), strict=True):
        total_TD += y_RD[rows_T].float() * weight_T[:, None]
    if shared_TD is not None:
        wide_TD = shared_TD.float()
        total_TD += wide_TD if gate_T is None else wide_TD * gate_T[:, None]
    return total_TD.to(y_RD.dtype)


# ---- products --------------------------------------------------------------------------------
# `out` takes the rows of the experts that are given and keeps its others: experts can be
# multiplied a few at a time, each few with their own slice of the offsets.


def score(
    x_TK: torch.Tensor, weight_NK: torch.Tensor, bias_N: torch.Tensor | None = None
) -> torch.Tensor:
    """x @ weight^T + bias, float32 from the operands to the result; [T, N].

    What a router and the gate of a shared expert are: narrow, and nothing to round. On a GPU, where
    a library would split the sums of so few outputs by the number of rows, a row keeps its bits.
    """

    def product(rows: Activations, _: int) -> torch.Tensor:
        bias = None if bias_N is None else bias_N.float()
        return linear.multiply(rows.values_TK.float(), weight_NK.float(), bias)

    x = Activations(x_TK)
    offsets = torch.zeros(2, dtype=torch.int32, device=x_TK.device)
    offsets[1:] = len(x_TK)
    bias_EN = None if bias_N is None else bias_N[None]
    room = _room(x, weight_NK[None], torch.float32, None)
    return _dispatch(product, x, weight_NK[None], None, offsets, bias_EN, room)


def multiply(
    x_RK: torch.Tensor,
    weight_ENK: torch.Tensor,
    offsets: torch.Tensor,
    bias_EN: torch.Tensor | None = None,
    *,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """x[r] @ weight[e]^T + bias[e] in the dtype of `x` with float32 accumulation; [R, N]."""

    def product(rows: Activations, e: int) -> torch.Tensor:
        return linear.multiply(rows.values_TK, weight_ENK[e], _of(bias_EN, e))

    room = _room(Activations(x_RK), weight_ENK, x_RK.dtype, out)
    return _dispatch(product, Activations(x_RK), weight_ENK, None, offsets, bias_EN, room)


def multiply_fp8(
    x: Activations,
    weight_ENK: torch.Tensor,
    scale_EN: torch.Tensor,
    offsets: torch.Tensor,
    bias_EN: torch.Tensor | None,
    dtype: torch.dtype,
    *,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """`linear.multiply_fp8` of each row with its expert's weight and scales a row; [R, N]."""

    def product(rows: Activations, e: int) -> torch.Tensor:
        return linear.multiply_fp8(rows, weight_ENK[e], scale_EN[e], _of(bias_EN, e), dtype)

    room = _room(x, weight_ENK, dtype, out)
    return _dispatch(product, x, weight_ENK, scale_EN, offsets, bias_EN, room)


def multiply_fp8_groups(
    x: Activations,
    weight_ENK: torch.Tensor,
    scales_EBG: torch.Tensor,
    offsets: torch.Tensor,
    bias_EN: torch.Tensor | None,
    dtype: torch.dtype,
    *,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """The product of e4m3 operands that have scales per 128 columns; [R, N] in `dtype`.

    `x` is `FP8_GROUPS`. The float32 `scales` of a weight are [ceil(N / 128), K / 128], one a block
    of 128 x 128, or [N, K / 128], one for each row. Sums are float32 from one group of columns to
    the next, and the result plus bias is rounded once.
    """
    num_columns = weight_ENK.shape[1]
    shared = 1 if scales_EBG.shape[1] == num_columns else GROUP

    def product(rows: Activations, e: int) -> torch.Tensor:
        scales_NG = scales_EBG[e].repeat_interleave(shared, 0)[:num_columns]
        weight_NK = dequantize(Activations(weight_ENK[e], scales_NG))
        bias = None if bias_EN is None else bias_EN[e].float()
        return linear.multiply(dequantize(rows), weight_NK, bias).to(dtype)

    room = _room(x, weight_ENK, dtype, out)
    return _dispatch(product, x, weight_ENK, scales_EBG, offsets, bias_EN, room)


def multiply_int8(
    x: Activations,
    weight_ENK: torch.Tensor,
    scale_EN: torch.Tensor,
    offsets: torch.Tensor,
    bias_EN: torch.Tensor | None,
    dtype: torch.dtype,
    *,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """`linear.multiply_int8` of each row with its expert's weight and scales a row; [R, N]."""

    def product(rows: Activations, e: int) -> torch.Tensor:
        return linear.multiply_int8(rows, weight_ENK[e], scale_EN[e], _of(bias_EN, e), dtype)

    room = _room(x, weight_ENK, dtype, out)
    return _dispatch(product, x, weight_ENK, scale_EN, offsets, bias_EN, room)


def _dispatch(
    product: Callable[[Activations, int], torch.Tensor],
    x: Activations,
    weight_ENK: torch.Tensor,
    scales: torch.Tensor | None,
    offsets: torch.Tensor,
    bias_EN: torch.Tensor | None,
    out: torch.Tensor,
) -> torch.Tensor:
    """By the kernel where there is one, else `product` of one expert's rows after another."""
    if has_triton(weight_ENK):
        from .gpu import experts as gpu

        return gpu.multiply(x, weight_ENK, scales, offsets, bias_EN, out)
    return _by_expert(product, x, offsets, out)


def _room(
    x: Activations, weight_ENK: torch.Tensor, dtype: torch.dtype, out: torch.Tensor | None
) -> torch.Tensor:
    if out is None:
        shape = (len(x.values_TK), weight_ENK.shape[1])
        return torch.empty(shape, dtype=dtype, device=weight_ENK.device)
    assert out.dtype == dtype and out.shape == (len(x.values_TK), weight_ENK.shape[1])
    return out


def _of(bias_EN: torch.Tensor | None, expert: int) -> torch.Tensor | None:
    return None if bias_EN is None else bias_EN[expert]


def _by_expert(
    product: Callable[[Activations, int], torch.Tensor],
    x: Activations,
    offsets: torch.Tensor,
    out: torch.Tensor,
) -> torch.Tensor:
    """product(rows, expert) of every expert that has rows, a block at a time, into `out`."""
    for expert, (first, end) in enumerate(pairwise(offsets.tolist())):
        for start in range(first, end, _BLOCK):
            stop = min(start + _BLOCK, end)
            block = [_pad(part[start:stop]) for part in x if part is not None]
            out[start:stop] = product(Activations(*block), expert)[: stop - start]
    return out


def _pad(rows: torch.Tensor) -> torch.Tensor:
    """Contiguous rows, `_BLOCK` of them."""
    if len(rows) == _BLOCK:
        return rows.contiguous()
    padded = rows.new_zeros(_BLOCK, *rows.shape[1:])
    padded[: len(rows)] = rows
    return padded
