"""Which implementation computes what, on which device: one table, by measurement.

The figures behind it are in `infra/benchmarks/kernels.md`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch


@dataclass(frozen=True)
class Choice:
    """The fastest exact way of every operation on one kind of device."""

    triton: bool
    """Fused Triton kernels for everything between products, or torch's operations."""
    attention: str
    """For 16-bit heads: `triton`, `flash` (torch's FlashAttention-2), or `sdpa`."""
    cudnn_above: int | None = None
    """Size of heads above which cuDNN is taken where its front end is installed; heads of just
    that size go there with windows alone."""

    def takes_cudnn(self, size: int, window: int | None) -> bool:
        """Whether cuDNN's attention is the faster one."""
        if self.cudnn_above is None:
            return False
        return size > self.cudnn_above or (size == self.cudnn_above and window is not None)


_CPU = Choice(triton=False, attention="sdpa")
_TABLE = {
    (8, 0): Choice(triton=True, attention="flash"),
    (8, 6): Choice(triton=True, attention="flash"),
    (8, 9): Choice(triton=True, attention="flash"),
    (9, 0): Choice(triton=True, attention="triton", cudnn_above=64),
    # Not measured: it has the shared memory of (8, 9), which the attention kernel's tiles exceed.
    (12, 0): Choice(triton=True, attention="flash"),
}


def choose(device: torch.device) -> Choice:
    """The table's line for a device; newer ones than it knows take the last line."""
    return _CPU if device.type != "cuda" else _choose_cuda(device.index or 0)


@lru_cache
def _choose_cuda(index: int) -> Choice:
    capability = torch.cuda.get_device_capability(index)
    known = [c for c in _TABLE if c <= capability]
    return _TABLE[max(known)] if known else Choice(triton=False, attention="sdpa")


def has_triton(x: torch.Tensor) -> bool:
    """Whether `x` lies where the Triton kernels run."""
    return x.is_cuda and choose(x.device).triton
