"""Prompts -> what the model goes on with, token by token.

Continuous batching in its simplest form: a sequence holds a slot from its prompt to its last token.
Whenever slots are free, the next prompts are read, as packed sequences; else every sequence that
holds a slot gains one token. Keys and values of earlier tokens are kept in the slots (`kept.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from .decoder import Decoder
from .kept import KEPT_AS, Kept
from .samplers import Growing, Sampler
from .tokenization import Tokenizer
from .transfer import on, to_device

TokenSink = Callable[[int, int], None]
"""(prompt's index, id) of every token as it is generated."""

# Rows of a step's products are padded to multiples of these, which every kernel takes.
_ROWS = 16


@dataclass(frozen=True)
class Generated:
    """What came of one prompt."""

    index: int
    """Of the prompt among all."""
    prompt_ids: np.ndarray
    """int32."""
    ids: np.ndarray
    """int32: what was generated, the token that ended it included."""
    text: str | None
    """Of `ids`, special tokens left out; None without a tokenizer."""
    reason: str
    """Why it ended: `stop` for a stop token or text, `length` for `max_tokens`, `context` where the
    model's positions were used up."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """When a sequence is at its end."""

    max_tokens: int = 256
    """Most tokens that are generated for a prompt."""
    context: int
    """Most tokens of a prompt and what is generated for it together."""
    stop_ids: frozenset[int] = frozenset()
    stop_texts: tuple[str, ...] = ()
    """A sequence ends once what was generated holds one of them."""

    def __post_init__(self) -> None:
        for name in ("max_tokens", "context"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ValueError(f"{name}: {value!r} is not a whole number of at least 1")
        if not all(self.stop_texts):
            raise ValueError("stop: an empty text would end everything before it begins")


class Generator:
    """Generates with one model."""

    def __init__(
        self,
        model: Decoder,
        tokenizer: Tokenizer | None,
        sampler: Sampler,
        limits: Limits,
        *,
        batch_size: int,
        kept_as: str | None,
        max_batch_tokens: int,
    ) -> None:
        if type(batch_size) is not int or batch_size < 1:
            raise ValueError(f"batch_size: {batch_size!r} is not a whole number of at least 1")
        if kept_as not in (None, *KEPT_AS):
            raise ValueError(f"kept_as: {kept_as!r} is not one of {', '.join(KEPT_AS)}, or None")
        if limits.stop_texts and tokenizer is None:
            raise ValueError("stop: texts need a tokenizer, which the model has not; give ids")
        self._model, self._tokenizer, self._sampler = model, tokenizer, sampler
        self._limits, self._batch_size = limits, batch_size
        self._budget = max_batch_tokens
        self._kept = Kept(model.spec.num_layers, batch_size, kept_as)

    def generate(
        self, prompts: Iterable[np.ndarray], on_token: TokenSink | None = None
    ) -> Iterator[Generated]:
        """What comes of every prompt, in their order, as soon as it and all before it are done.

        Prompts in a list are checked before any is read.

        Raises:
            ValueError: for a prompt that is empty, longer than the context, or has ids that the
                model has not; for a sampler that gives no ids.
        """
        waiting = self._start(prompts)
        if isinstance(prompts, list):
            waiting = iter(list(waiting))
        free = list(range(self._batch_size))
        running: dict[int, Growing] = {}
        done: dict[int, Generated] = {}
        upcoming = next(waiting, None)
        first = 0
        while running or upcoming is not None:
            read: dict[int, Growing] = {}
            room = self._budget
            while upcoming is not None and free and (not read or len(upcoming.ids) <= room):
                room -= len(upcoming.ids)
                read[free.pop(0)] = upcoming
                upcoming = next(waiting, None)
            if read:
                running |= read
                self._advance(read, self._read(read), on_token)
            else:
                self._advance(running, self._step(running), on_token)
            for slot in [s for s, growing in running.items() if self._reason(growing)]:
                ended = running.pop(slot)
                done[ended.index] = self._finish(ended)
                free.append(slot)
            while first in done:
                yield done.pop(first)
                first += 1

    def _start(self, prompts: Iterable[np.ndarray]) -> Iterator[Growing]:
        for index, ids in enumerate(prompts):
            if not len(ids):
                raise ValueError(f"prompts: prompt {index} is empty")
            if len(ids) >= self._limits.context:
                raise ValueError(
                    f"prompts: prompt {index} has {len(ids)} tokens, which leaves none of the "
                    f"context's {self._limits.context} to generate; shorten it"
                )
            wrong = ids[(ids < 0) | (ids >= self._model.vocab_size)]
            if len(wrong):
                raise ValueError(
                    f"prompts: prompt {index} has {wrong[0]}, which is not in the model's "
                    f"vocabulary of {self._model.vocab_size}"
                )
            yield Growing(index, ids.tolist(), len(ids))

    def _read(self, sequences: dict[int, Growing]) -> torch.Tensor:
        """Logits after whole sequences, float32 [B, V]; their keys and values are kept from now."""
        model = self._model
        ids = [growing.ids for growing in sequences.values()]
        lengths = [len(one) for one in ids]
        padded = np.zeros(model.blocks.pad(sum(lengths)), np.int64)
        padded[: sum(lengths)] = np.concatenate(ids)
        with torch.inference_mode(), on(model.device):
            ids_T = to_device(torch.from_numpy(padded), model.device)
            attend = self._kept.read_whole(list(sequences), lengths, model.device)
            hidden_TD = model.hidden(ids_T, lengths, attend)
            last = to_device(torch.tensor(lengths).cumsum(0) - 1, model.device)
            return self._logits(hidden_TD[last])

    def _step(self, sequences: dict[int, Growing]) -> torch.Tensor:
        """Logits after the last tokens of sequences, float32 [B, V]."""
        model = self._model
        # Keys that were turned at a shorter sequence's rates are those of another sequence.
        stale = {
            slot: growing
            for slot, growing in sequences.items()
            if not model.rates_agree(len(growing.ids), len(growing.ids) - 1)
        }
        fresh = {slot: growing for slot, growing in sequences.items() if slot not in stale}
        made: dict[int, torch.Tensor] = {}
        if stale:
            made |= zip(stale, self._read(stale), strict=True)
        if fresh:
            lengths = [len(growing.ids) for growing in fresh.values()]
            padded = np.zeros(-(-len(fresh) // _ROWS) * _ROWS, np.int64)
            padded[: len(fresh)] = [growing.ids[-1] for growing in fresh.values()]
            with torch.inference_mode(), on(model.device):
                ids_S = to_device(torch.from_numpy(padded), model.device)
                attend = self._kept.read_last(list(fresh), lengths, model.device)
                hidden_SD = model.hidden_of_last(ids_S, lengths, attend)
                logits_BV = self._logits(hidden_SD[: len(fresh)])
            if not stale:
                return logits_BV
            made |= zip(fresh, logits_BV, strict=True)
        return torch.stack([made[slot] for slot in sequences])

    def _logits(self, hidden_BD: torch.Tensor) -> torch.Tensor:
        count = len(hidden_BD)
        padded = hidden_BD.new_zeros(-(-count // _ROWS) * _ROWS, hidden_BD.shape[1])
        padded[:count] = hidden_BD
        return self._model.logits(padded)[:count]

    def _advance(
        self, sequences: dict[int, Growing], logits_BV: torch.Tensor, on_token: TokenSink | None
    ) -> None:
        """Give each of the sequences the token that the sampler chooses."""
        growing = list(sequences.values())
        with torch.inference_mode(), on(self._model.device):
            chosen = self._sampler(logits_BV, growing)
        found = chosen.tolist() if isinstance(chosen, torch.Tensor) else list(chosen)
        vocab_size = self._model.vocab_size
        if len(found) != len(growing) or not all(
            isinstance(i, int) and 0 <= i < vocab_size for i in found
        ):
            raise ValueError(
                f"sampler: it gave {found!r:.80} for {len(growing)} sequences; give one id of "
                f"0 ... {vocab_size - 1} for each"
            )
        for sequence, i in zip(growing, found, strict=True):
            sequence.ids.append(i)
            if on_token is not None:
                on_token(sequence.index, i)

    def _reason(self, growing: Growing) -> str | None:
        """Why a sequence is at its end; None if it is not."""
        limits = self._limits
        if growing.ids[-1] in limits.stop_ids:
            return "stop"
        if limits.stop_texts:
            text = self._spell(growing.generated) or ""
            if any(stop in text for stop in limits.stop_texts):
                return "stop"
        if len(growing.generated) >= limits.max_tokens:
            return "length"
        return "context" if len(growing.ids) >= limits.context else None

    def _finish(self, growing: Growing) -> Generated:
        reason = self._reason(growing)
        assert reason is not None, "it is at its end"
        prompt, ids = np.split(np.array(growing.ids, np.int32), [growing.num_prompt])
        return Generated(growing.index, prompt, ids, self._spell(growing.generated), reason)

    def _spell(self, ids: Sequence[int]) -> str | None:
        return None if self._tokenizer is None else self._tokenizer.decode(ids)
