"""Log-likelihoods of continuations: each distinct request once, those that begin alike together."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence

import numpy as np

from ..engine import Document, DocumentScore, Pipeline, find_recipe
from ..engine.records import NONFINITE, OK

log = logging.getLogger(__name__)

Answer = tuple[float, bool]
"""A continuation's log-likelihood in nats, and whether greedy decoding would give it."""
TokenRequest = tuple[tuple[str, str] | None, list[int], list[int]]
"""(context, continuation) as the cache of the harness knows them, and the tokens of both."""


def answer_requests(
    pipe: Pipeline, requests: Sequence[TokenRequest], max_length: int
) -> Iterator[tuple[Sequence[int], Answer]]:
    """(which requests, the answer to them) as they are scored.

    Equal ones are scored once, and those that begin alike are neighbours: the bytes of big-endian
    integers sort as the integers do.

    Raises:
        ValueError: for a continuation that is empty, or longer than `max_length`.
    """
    works: dict[tuple[bytes, int], list[int]] = {}
    for i, (_, context, continuation) in enumerate(requests):
        _check_length(i, continuation, max_length)
        ids = np.array(context + continuation, ">i4").tobytes()
        works.setdefault((ids, len(context)), []).append(i)
    num_cut = sum(len(ids) // 4 > max_length + 1 for ids, _ in works)
    if num_cut:
        log.warning(
            "%d of %d requests are longer than max_length, %d tokens: cut from the left",
            *(num_cut, len(works), max_length),
        )
    order = sorted(works)
    documents = (
        Document(
            str(works[ids, num_context][0]),
            input_ids=np.frombuffer(ids, ">i4"),
            num_context=num_context,
        )
        for ids, num_context in order
    )
    recipe = find_recipe("conditional", context=max_length, prefix="none")
    for work, score in zip(order, pipe.score(documents, recipe=recipe), strict=True):
        yield works[work], _read_answer(score)


def _check_length(index: int, continuation: list[int], max_length: int) -> None:
    if not continuation:
        raise ValueError(
            f"continuation: of request {index} no token is left beside its context's, so "
            "nothing is scored"
        )
    if len(continuation) > max_length:
        raise ValueError(
            f"continuation: of request {index} it has {len(continuation)} tokens, more than "
            f"max_length, {max_length}; shorten it, or ask for loglikelihood_rolling"
        )


def _read_answer(score: DocumentScore) -> Answer:
    """The log-likelihood is NaN where the model's numbers are."""
    record, tokens = score.record, score.tokens
    if record.status == NONFINITE:
        log.warning("request %s: %s", record.doc_id, record.error)
        return float("nan"), False
    if record.status != OK or tokens is None or record.loglikelihood is None:
        raise ValueError(f"request {record.doc_id}: {record.error}")
    return record.loglikelihood, bool((tokens.top1_id == tokens.token_id).all())
