"""Matrix products of packed tokens with weights stored [out, in]."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def multiply(
    x_TK: torch.Tensor, weight_NK: torch.Tensor, bias_N: torch.Tensor | None = None
) -> torch.Tensor:
    """x @ weight^T + bias in the dtype of `x` with float32 accumulation; [T, N]."""
    return F.linear(x_TK, weight_NK, bias_N)


def multiply_wide(x_TK: torch.Tensor, weight_NK: torch.Tensor) -> torch.Tensor:
    """x @ weight^T with a float32 result, never rounded to a narrower dtype; [T, N].

    The products of 16-bit operands are exact in float32, so only the order of summation differs
    from a product of the same operands widened first.
    """
    if x_TK.dtype == torch.float32:
        return F.linear(x_TK, weight_NK)
    if x_TK.is_cuda:
        return torch.mm(x_TK, weight_NK.t(), out_dtype=torch.float32)
    return F.linear(x_TK.float(), weight_NK.float())
