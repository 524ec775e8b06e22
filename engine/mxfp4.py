"""MXFP4, the four-bit floating point that gpt-oss publishes its experts in.

Legend: E experts, N outputs, K inputs, B blocks of 32 columns.

OCP Microscaling Formats 1.0: e2m1 numbers, 32 of a row with a scale that is a power of two.
"""

from __future__ import annotations

import torch

BLOCK = 32
"""Columns that share a scale."""
# By code; the fourth bit is the sign.
_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
_EXPONENT_BIAS = 127


def dequantize_mxfp4(
    blocks: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """value * 2^(scale - 127), [..., N, K]; exact in bfloat16 and float32 where it is normal.

    Args:
        blocks: uint8 [..., N, B, 16], two codes a byte, the first column in the low four bits.
        scales: uint8 [..., N, B], exponents with a bias of 127 (e8m0).
        dtype: of the result.

    Raises:
        ValueError: if the shapes do not belong together.
    """
    if blocks.shape[:-1] != scales.shape or blocks.shape[-1] != BLOCK // 2:
        raise ValueError(
            f"mxfp4: blocks {list(blocks.shape)} and scales {list(scales.shape)} do not belong "
            f"together; they have to be [..., B, {BLOCK // 2}] and [..., B]"
        )
    table = torch.tensor(_VALUES, dtype=dtype, device=blocks.device)
    out = torch.empty(*scales.shape, BLOCK, dtype=dtype, device=blocks.device)
    # A matrix at a time: indices take four times what they stand for.
    matrix = scales.shape[-2:]
    for whole, codes, exponents in zip(
        out.view(-1, *matrix, BLOCK),
        blocks.reshape(-1, *matrix, BLOCK // 2),
        scales.reshape(-1, *matrix),
        strict=True,
    ):
        ones = torch.ones(matrix, device=blocks.device)
        powers = torch.ldexp(ones, exponents.int() - _EXPONENT_BIAS)[..., None]
        whole[..., 0::2] = table[(codes & 15).int()] * powers
        whole[..., 1::2] = table[(codes >> 4).int()] * powers
    return out.flatten(-2)
