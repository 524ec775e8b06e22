"""What a student is trained with from stored distributions: pure functions of logits and targets.

Each is a divergence from the teacher's distribution p to the student's q, KL(p || q), averaged over
rows, in nats; never negative, in floats too, and 0 where both agree. Rows may have any shape in
front; those whose `mask` is False count for nothing.

Legend: V vocabulary, k kept candidates, m draws.
"""

from __future__ import annotations

import torch

# Beyond it exp(r) - 1 - r is written out, lest exp(r) overflow where p is next to nothing.
_STEEP = 1.0


def full_kl(
    student_logits: torch.Tensor,
    teacher_logprobs: torch.Tensor,
    *,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """sum_v p_v (log p_v - log q_v) over the whole vocabulary.

    Args:
        student_logits: [..., V].
        teacher_logprobs: [..., V], as the tier `logits` holds them, or log_softmax of what `hidden`
            replays to. They are normalised again: rounded ones do not add up to 1.
        mask: [...], which rows count; all by default.
    """
    _check(student_logits, teacher_logprobs)
    teacher = teacher_logprobs.float().log_softmax(-1)
    return _mean(_divergence(teacher, student_logits.float().log_softmax(-1)), mask)


def top_k_kl(
    student_logits: torch.Tensor,
    top_ids: torch.Tensor,
    top_logprobs: torch.Tensor,
    log_tail_mass: torch.Tensor,
    *,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """sum_{i <= k} p_i (log p_i - log q_i) + p_tail (log p_tail - log q_tail).

    Over k + 1 outcomes, the last of which is every other token: at most the full divergence, and
    never negative, which the sum over the k alone can be. The student's tail is the sum over its
    other tokens, not 1 less the k.

    Args:
        student_logits: [..., V], of a vocabulary that holds all `top_ids`.
        top_ids: [..., k], integers.
        top_logprobs: [..., k].
        log_tail_mass: [...]; -inf where k tokens are all there are.
        mask: [...], which rows count; all by default.

    Raises:
        ValueError: for ids that the student does not have.
    """
    _check(student_logits[..., 0], top_ids[..., 0])
    ids = top_ids.long()
    if ids.numel() and int(ids.max()) >= student_logits.shape[-1]:
        raise ValueError(
            f"top_ids: {int(ids.max())} is not in the student's vocabulary of "
            f"{student_logits.shape[-1]}"
        )
    student_logits = student_logits.float()
    # Rounded to float16 the k + 1 do not add up to 1.
    teacher = torch.cat([top_logprobs.float(), log_tail_mass.float()[..., None]], -1)
    teacher = teacher.log_softmax(-1)
    total = student_logits.logsumexp(-1, keepdim=True)
    if ids.shape[-1] == student_logits.shape[-1]:
        rest = torch.full_like(total, -torch.inf)
    else:
        rest = student_logits.scatter(-1, ids, -torch.inf).logsumexp(-1, keepdim=True)
    student = torch.cat([student_logits.gather(-1, ids), rest], -1) - total
    return _mean(_divergence(teacher, student), mask)


def sampled_cross_entropy(
    student_logits: torch.Tensor, sample_ids: torch.Tensor, *, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """-1/m sum_j log q(draw j): an unbiased estimate of -sum_v p_v log q_v.

    That is the full divergence and the teacher's entropy, which no gradient sees: unlike a teacher
    cut to its k likeliest tokens, draws do not tell the student that the tail is smaller than it is
    (arXiv 2503.16870).

    Args:
        student_logits: [..., V].
        sample_ids: [..., m], integers, drawn from the teacher's distributions with replacement.
        mask: [...], which rows count; all by default.
    """
    _check(student_logits[..., 0], sample_ids[..., 0])
    logprobs = student_logits.float().log_softmax(-1)
    return _mean(-logprobs.gather(-1, sample_ids.long()).mean(-1), mask)


def _divergence(teacher: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
    """sum p (e^r - 1 - r) with r = log q - log p: sum p (log p - log q), since both add up to 1.

    Every term is at least 0 in floats too, where the plain sum of terms of either sign is not.
    """
    p = teacher.exp()
    # Where the teacher has no mass what the student puts there is the whole term.
    is_there = p > 0
    r = torch.where(is_there, student - teacher.masked_fill(~is_there, 0.0), 0.0)
    gentle = r < _STEEP
    near = torch.where(gentle, r, 0.0)
    q = student.exp()
    steep = torch.where(gentle, 0.0, q - p - p * torch.where(gentle, 0.0, r))
    return torch.where(is_there, p * (near.expm1() - near) + steep, q).sum(-1)


def _check(one: torch.Tensor, other: torch.Tensor) -> None:
    if one.shape != other.shape:
        raise ValueError(
            f"student_logits: of shape {tuple(one.shape)}, beside {tuple(other.shape)} of the "
            "teacher's"
        )


def _mean(values: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    if mask is None:
        return values.mean()
    return torch.where(mask, values, 0.0).sum() / mask.sum().clamp(min=1)
