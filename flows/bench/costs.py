"""What a pass over a corpus has to do, part by part: operations, or bytes where they decide.

Useful work only: no padding, and of attention what a token is allowed to look at. Two operations
for every multiplication.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from ...engine.spec import DecoderSpec, Experts, FeedForward, Layer


@dataclass(frozen=True)
class Cost:
    """Of one part of a pass."""

    flops: float = 0.0
    """Floating-point (or integer) operations."""
    bytes: float = 0.0
    """Read and written in the device's memory by what only moves and rounds numbers."""


def count_costs(
    spec: DecoderSpec,
    lengths: Sequence[int],
    *,
    shared: Sequence[int],
    scored: int,
    width: int,
    input_width: int,
    head_width: int,
) -> dict[str, Cost]:
    """Costs of one pass over windows of `lengths` tokens.

    Args:
        spec: of the model.
        lengths: input tokens of each window.
        shared: how many of them, at its beginning, another window has.
        scored: rows that pass the head.
        width: bytes of a number between the products.
        input_width: bytes of a number as the linears take it.
        head_width: bytes of a number as the head takes it.

    Products count operations alone: their operands pass memory far below its speed. Everything
    between them counts what a fused pass over it reads and writes: a norm also adds, and rounds
    what the next product takes.
    """
    tokens = sum(lengths) - sum(shared)
    d, turned = spec.hidden_size, spec.q_size + spec.kv_size
    norm = 3 * d * width + d * input_width
    rounds = input_width != width
    weights, moved = 0, dict.fromkeys(("norms", "rotary", "gate", "quantize"), 0)
    attended = []
    for layer in spec.layers:
        weights += sum(rows * columns for rows, columns in linear_shapes(spec, layer))
        # A norm behind a part is a pass of its own.
        moved["norms"] += 2 * norm + (4 * d * width if spec.post_norm else 0)
        moved["rotary"] += 2 * turned * width
        moved["quantize"] += spec.q_size * (width + input_width) if rounds else 0
        for part, times in _passed(layer.feed_forward):
            read = part.size * (2 if part.gated else 1)
            moved["gate"] += times * (read * width + part.size * input_width)
        flops = partial(attention_flops, spec.q_size, window=layer.window)
        attended += [flops(whole) - flops(n) for whole, n in zip(lengths, shared, strict=True)]
    costs = {
        "linears": Cost(flops=2.0 * tokens * weights),
        "head": Cost(flops=2.0 * scored * d * spec.vocab_size),
        "attention": Cost(flops=math.fsum(attended)),
        **{part: Cost(bytes=float(tokens * per_token)) for part, per_token in moved.items()},
        # Float32 logits are read once; the head's product has written them.
        "statistics": Cost(bytes=4.0 * scored * spec.vocab_size),
    }
    rounded = d * (width + head_width) if head_width != width else 0
    costs["quantize"] = Cost(bytes=costs["quantize"].bytes + scored * rounded)
    return {part: cost for part, cost in costs.items() if cost.flops or cost.bytes}


def linear_shapes(spec: DecoderSpec, layer: Layer) -> list[tuple[int, int]]:
    """(outputs, inputs) of the products that a token takes part in in one layer."""
    d, latent = spec.hidden_size, spec.latent
    shapes = [(d, spec.num_heads * spec.value_dim)]
    if latent is None:
        shapes.append((spec.q_size + 2 * spec.kv_size, d))
    else:
        kv_down = latent.kv_rank + latent.rope_dim
        shapes.append(((latent.q_rank or spec.q_size) + kv_down, d))
        if latent.q_rank is not None:
            shapes.append((spec.q_size, latent.q_rank))
        shapes.append((spec.num_heads * (latent.nope_dim + latent.value_dim), latent.kv_rank))
    for part, times in _passed(layer.feed_forward):
        shapes += times * [((2 if part.gated else 1) * part.size, d), (d, part.size)]
    return shapes


def _passed(shape: FeedForward | Experts) -> list[tuple[FeedForward, int]]:
    """The feed-forwards that a token passes, and how many of each."""
    if isinstance(shape, FeedForward):
        return [(shape, 1)]
    shared = [(shape.shared, 1)] if shape.shared is not None else []
    return [(shape.expert, shape.router.top_k), *shared]


def attention_flops(q_size: int, length: int, window: int | None) -> float:
    """Operations of one layer's attention over one causal sequence of `length` tokens.

    `q_size` is the width of all query heads; a token looks at `window` tokens at most.
    """
    seen = min(length, window or length)
    pairs = seen * (seen + 1) // 2 + (length - seen) * seen
    return 4.0 * q_size * pairs
