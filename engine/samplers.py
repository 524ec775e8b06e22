"""Samplers: from logits to the next token of each sequence.

A sampler is any function of logits, float32 [B, V] on the device, and the B sequences that they
follow; it returns ids, integers [B]. It may overwrite the logits.

Legend: B sequences, V vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from ..kernels.sampling import draw


@dataclass
class Growing:
    """A sequence so far."""

    index: int
    """Of its prompt among all."""
    ids: list[int]
    """The prompt's, then the generated ones."""
    num_prompt: int

    @property
    def generated(self) -> list[int]:
        """Ids after the prompt."""
        return self.ids[self.num_prompt :]


Sampler = Callable[[torch.Tensor, Sequence[Growing]], torch.Tensor]
Filter = Callable[[torch.Tensor], torch.Tensor]
"""From logits [B, V] to logits, -inf where a token is not to be drawn."""


def greedy(logits_BV: torch.Tensor, sequences: Sequence[Growing]) -> torch.Tensor:
    """The likeliest token; of equals the first."""
    return logits_BV.argmax(-1)


def drawing(*filters: Filter, temperature: float = 1.0, seed: int = 0) -> Sampler:
    """Draws from softmax(logits / temperature) of what the filters leave, applied in order.

    A draw is decided by the seed, the prompt's index and the token's place: the same whatever else
    is generated beside it.

    Raises:
        ValueError: for a temperature that is not above 0; `greedy` is what 0 would mean.
    """
    if not temperature > 0:
        raise ValueError(f"temperature: {temperature} is not above 0; use greedy for 0")

    def sample(logits_BV: torch.Tensor, sequences: Sequence[Growing]) -> torch.Tensor:
        logits_BV = logits_BV / temperature
        for keep in filters:
            logits_BV = keep(logits_BV)
        keys = torch.tensor([_key(seed, s.index, len(s.ids)) for s in sequences])
        return draw(logits_BV.contiguous(), keys.to(logits_BV.device), 1)[:, 0]

    return sample


def top_k(k: int) -> Filter:
    """The k likeliest tokens, and those as likely as the last of them."""
    if type(k) is not int or k < 1:
        raise ValueError(f"k: {k!r} is not a whole number of at least 1")

    def keep(logits_BV: torch.Tensor) -> torch.Tensor:
        least = logits_BV.topk(min(k, logits_BV.shape[1])).values[:, -1:]
        return logits_BV.masked_fill(logits_BV < least, -torch.inf)

    return keep


def top_p(p: float) -> Filter:
    """The fewest likeliest tokens whose probabilities reach p (Holtzman et al. 2020)."""
    _check_share("p", p)

    def keep(logits_BV: torch.Tensor) -> torch.Tensor:
        ordered, ids = logits_BV.sort(descending=True, stable=True)
        probs = ordered.softmax(-1)
        # What stands before a token, which must not have reached p.
        before = probs.cumsum(-1) - probs
        before[:, 0] = 0.0
        ordered = ordered.masked_fill(before >= p, -torch.inf)
        return torch.empty_like(logits_BV).scatter_(1, ids, ordered)

    return keep


def min_p(p: float) -> Filter:
    """Tokens at least p times as likely as the likeliest (Nguyen et al. 2024)."""
    _check_share("p", p)

    def keep(logits_BV: torch.Tensor) -> torch.Tensor:
        probs = logits_BV.softmax(-1)
        return logits_BV.masked_fill(probs < p * probs.amax(-1, keepdim=True), -torch.inf)

    return keep


def _check_share(name: str, value: float) -> None:
    if not 0 < value <= 1:
        raise ValueError(f"{name}: {value} is not above 0 and at most 1")


def _key(seed: int, index: int, place: int) -> int:
    """int64, apart for each draw."""
    found = hashlib.blake2b(f"{seed} {index} {place}".encode(), digest_size=8).digest()
    return int.from_bytes(found, "little", signed=True)
