"""How far one distribution over the vocabulary is from another, token by token.

KL(base || other) = sum of p_base (log p_base - log p_other), in nats, as llama.cpp has it; and the
Jensen-Shannon divergence, the mean KL of both to their mean, which is at most ln 2. All is computed
in float64, and equal distributions are exactly 0 apart.

Legend: T scored tokens, V vocabulary, K kept candidates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, TypeVar

import numpy as np

if TYPE_CHECKING:
    import torch

# What is compared at a time: rows, and bytes of their float64 values, of which there are a dozen.
_ROWS_AT_ONCE = 512
_BYTES_AT_ONCE = 32 << 20


@dataclass(frozen=True)
class Divergences:
    """Of one way of computing from another, at each scored token; float64."""

    kl_T: np.ndarray
    """KL(base || other), nats."""
    js_T: np.ndarray
    """Jensen-Shannon divergence, nats."""
    same_top_T: np.ndarray
    """Whether both have the same likeliest token; the lowest id of equals."""


@dataclass(frozen=True)
class Differences(Divergences):
    """Divergences, and what both make of the true token."""

    delta_p_T: np.ndarray
    """Probability of the true token, other less base."""
    base_nll_T: np.ndarray
    """-log p of the true token, nats."""
    other_nll_T: np.ndarray


_D = TypeVar("_D", bound=Divergences)


def diverge(
    base_TV: torch.Tensor, other_TV: torch.Tensor, device: torch.device | str
) -> Divergences:
    """Divergences of logits, or of log-probabilities as stored, computed on `device`."""
    parts = []
    for rows in _blocks(base_TV):
        base, other = (_normalize(x[rows], device) for x in (base_TV, other_TV))
        parts.append(_divergences(base, other))
    return join(parts)


def compare_logits(
    base_TV: torch.Tensor,
    other_TV: torch.Tensor,
    targets_T: torch.Tensor,
    device: torch.device | str,
) -> Differences:
    """Differences of two models' logits, computed on `device`."""
    parts = []
    for rows in _blocks(base_TV):
        base, other = (_normalize(x[rows], device) for x in (base_TV, other_TV))
        targets = targets_T[rows, None].to(device)
        base_lp, other_lp = (x.gather(1, targets)[:, 0].cpu().numpy() for x in (base, other))
        apart = _divergences(base, other)
        delta_p = np.exp(other_lp) - np.exp(base_lp)
        parts.append(
            Differences(
                **vars(apart), delta_p_T=delta_p, base_nll_T=-base_lp, other_nll_T=-other_lp
            )
        )
    return join(parts)


def _blocks(rows_TV: torch.Tensor) -> list[slice]:
    step = max(1, min(_ROWS_AT_ONCE, _BYTES_AT_ONCE // (8 * rows_TV.shape[1])))
    # One block at least, so that nothing compared is arrays of length 0.
    return [slice(start, start + step) for start in range(0, max(1, len(rows_TV)), step)]


def _normalize(logits: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    import torch

    return logits.to(device, torch.float64).log_softmax(-1)


def _divergences(base: torch.Tensor, other: torch.Tensor) -> Divergences:
    import torch

    p_base, p_other = base.exp(), other.exp()
    apart = base - other
    # A token that one rules out counts nothing there, whatever the other gives it.
    kl = torch.where(p_base > 0, p_base * apart, 0.0).sum(-1)
    # log(p / mean of p and q) = -log((1 + q / p) / 2), 0 to the bit where both are equal.
    js = -torch.where(p_base > 0, p_base * torch.log1p(torch.expm1(-apart) / 2), 0.0).sum(-1)
    js -= torch.where(p_other > 0, p_other * torch.log1p(torch.expm1(apart) / 2), 0.0).sum(-1)
    js /= 2
    same_top = base.argmax(-1) == other.argmax(-1)
    # Neither is negative but for the rounding of its sum.
    return Divergences(*(x.cpu().numpy() for x in (kl.clamp_min(0), js.clamp_min(0), same_top)))


def join(parts: Sequence[_D]) -> _D:
    """Of several runs of tokens, one after another."""
    kind = type(parts[0])
    columns = (
        np.concatenate([getattr(part, field.name) for part in parts]) for field in fields(kind)
    )
    return kind(*columns)


@dataclass(frozen=True)
class Candidates:
    """The likeliest tokens of each row, and the mass of all others."""

    ids_TK: np.ndarray
    """The likeliest first."""
    logprobs_TK: np.ndarray
    """Nats."""
    log_tail_T: np.ndarray
    """Log of the mass of all but these, -inf if there are no others."""

    def some(self, rows: slice) -> Candidates:
        """Of some of the rows."""
        return Candidates(self.ids_TK[rows], self.logprobs_TK[rows], self.log_tail_T[rows])


def diverge_coarsely(base: Candidates, other: Candidates) -> Divergences:
    """Divergences over the tokens that both kept and, as one outcome, all the rest.

    To see less of two distributions brings them closer: these are at most those over the whole
    vocabulary, and never negative, which a sum over the tokens kept alone can be. Stored values are
    rounded, so that they are normalized first.
    """
    num_rows = len(base.log_tail_T)
    _, in_base, in_other = np.intersect1d(
        _keys(base.ids_TK), _keys(other.ids_TK), assume_unique=True, return_indices=True
    )
    p_base, rest_base = _split(base, in_base)
    p_other, rest_other = _split(other, in_other)
    row = in_base // max(1, base.ids_TK.shape[1])

    def total(shared: np.ndarray, rest: np.ndarray) -> np.ndarray:
        return np.bincount(row, shared, minlength=num_rows) + rest

    middle, rest_middle = 0.5 * (p_base + p_other), 0.5 * (rest_base + rest_other)
    kl = total(_term(p_base, p_other), _term(rest_base, rest_other))
    js = 0.5 * total(
        _term(p_base, middle) + _term(p_other, middle),
        _term(rest_base, rest_middle) + _term(rest_other, rest_middle),
    )
    same_top = base.ids_TK[:, 0] == other.ids_TK[:, 0]
    return Divergences(np.maximum(kl, 0.0), np.maximum(js, 0.0), same_top)


def _keys(ids_TK: np.ndarray) -> np.ndarray:
    """One number for every row and token."""
    rows = np.arange(len(ids_TK), dtype=np.int64)[:, None]
    return ((rows << 32) | ids_TK).ravel()


def _split(kept: Candidates, shared: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities of the shared entries, and by row of all that is not shared."""
    p = np.exp(kept.logprobs_TK.astype(np.float64))
    tail = np.exp(kept.log_tail_T.astype(np.float64))
    total = p.sum(1) + tail
    p = (p / total[:, None]).ravel()
    own = np.ones(len(p), bool)
    own[shared] = False
    row = np.arange(len(p)) // max(1, kept.ids_TK.shape[1])
    rest = np.bincount(row[own], p[own], minlength=len(total)) + tail / total
    return p[shared], rest


def _term(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """p ln(p / q), 0 where p is, infinite where only q is."""
    with np.errstate(divide="ignore"):
        ratio = np.log(np.divide(p, q, out=np.full_like(p, np.inf), where=q > 0))
    return np.multiply(p, ratio, out=np.zeros_like(p), where=p > 0)
