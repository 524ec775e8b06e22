"""Matrix products of packed tokens with weights stored [out, in]."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def multiply(
    x_TK: torch.Tensor, weight_NK: torch.Tensor, bias_N: torch.Tensor | None = None
) -> torch.Tensor:
    """x @ weight^T + bias in the dtype of `x` with float32 accumulation; [T, N].

    Both operands are contiguous. A float32 product on a CPU goes to oneDNN: torch's own way to
    MKL does not use the AVX-512 units of AMD's processors (430 against 190 GFLOP/s on two cores
    of an EPYC), and either keeps a row's bits whatever the number of rows.
    """
    if x_TK.dtype == torch.float32 and x_TK.device.type == "cpu" and _HAS_ONEDNN:
        return torch.ops.mkldnn._linear_pointwise(x_TK, weight_NK, bias_N, "none", [], "")
    return F.linear(x_TK, weight_NK, bias_N)


def multiply_wide(x_TK: torch.Tensor, weight_NK: torch.Tensor) -> torch.Tensor:
    """x @ weight^T with a float32 result, never rounded to a narrower dtype; [T, N].

    16-bit weights need a GPU, whose library accumulates and returns float32; a CPU is given
    float32 weights. The products of 16-bit operands are exact in float32 either way.
    """
    if weight_NK.dtype == torch.float32:
        return multiply(x_TK.float(), weight_NK)
    return torch.mm(x_TK, weight_NK.t(), out_dtype=torch.float32)


_HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(
    torch.ops.mkldnn, "_linear_pointwise"
)
