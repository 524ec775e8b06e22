"""What stored hidden states are made into logits with, and whether it is still the same."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any

import torch

_BLOCK = 64 << 20


def digest(*parts: Any) -> str:
    """sha256 over tensors, frozen dataclasses of them, and plain values, in order.

    Two heads of one digest make the same logits of the same states on the same device.
    """
    total = hashlib.sha256()
    for part in parts:
        for block in _blocks(part):
            total.update(block)
    return total.hexdigest()


def _blocks(part: Any) -> Iterator[bytes | memoryview]:
    if isinstance(part, torch.Tensor):
        yield f"{part.dtype} {tuple(part.shape)}\n".encode()
        flat = part.detach().reshape(-1)
        step = max(1, _BLOCK // max(1, flat.element_size()))
        for start in range(0, len(flat), step):
            yield flat[start : start + step].cpu().view(torch.uint8).numpy().data
    elif is_dataclass(part):
        yield f"{type(part).__name__}\n".encode()
        for field in fields(part):
            yield f"{field.name}=".encode()
            yield from _blocks(getattr(part, field.name))
    else:
        yield f"{part!r}\n".encode()
