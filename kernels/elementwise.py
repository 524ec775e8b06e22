"""Functions of single numbers on a CPU, whose bits must not go by where a number lies."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

# Numbers that torch hands to one thread at least, and a multiple of every vector it computes with.
_GRAIN, _VECTOR = 32768, 16


def apply(function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """function(x) of rows [T, F]; a row keeps its bits whatever is beside it.

    torch computes vectors of numbers, and with other roundings those that are left over at the end
    of a thread's share. So shares here are whole vectors: of all of `x` where it divides so, else
    of a few rows at a time, which one thread takes.
    """
    num_rows, num_columns = x.shape
    if x.is_cuda or x.numel() == 0:
        return function(x)
    num_threads = min(torch.get_num_threads(), -(-x.numel() // _GRAIN))
    if x.numel() % (num_threads * _VECTOR) == 0:
        return function(x.contiguous())
    rows = _VECTOR // math.gcd(num_columns, _VECTOR)
    while 2 * rows * num_columns <= _GRAIN:
        rows *= 2
    out = torch.empty(num_rows, num_columns, dtype=x.dtype)
    for start in range(0, num_rows, rows):
        part = x[start : start + rows].contiguous()
        out[start : start + rows] = _padded(function, part, rows)
    return out


def _padded(
    function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, rows: int
) -> torch.Tensor:
    """Of the last few rows, too, whole vectors."""
    missing = rows - len(x)
    if missing == 0:
        return function(x)
    return function(torch.cat([x, x.new_zeros(missing, x.shape[1])]))[: len(x)]
