"""The engine with a subject's model in it, and the ways of running documents that are timed."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, NamedTuple

import torch

from ...engine.families import FAMILIES
from ...engine.frequencies import Frequencies
from ...engine.packing import pack_alike, rounds
from ...engine.pipeline import BLOCK_ROWS, DTYPES, EngineSettings
from ...engine.placement import free_host_memory
from ...engine.prefixes import branch
from ...engine.records import Document
from ..kept import NUM_DRAWS
from .breakdown import Breakdown, break_down
from .ceilings import Ceilings, measure_ceilings, name_unit, wait
from .costs import Cost, count_costs
from .subject import Subject, Window, windows

UNSHARED = "records, nothing shared"
"""A pass that computes contexts as often as they come."""
HANDED_OVER, GET_LOGITS = "log-probs handed over, float16", "get_logits, float16"
"""Passes whose logits reach host memory, two bytes each."""

# Batches of runs that warm up, and of the one that is taken apart.
_FEW_BATCHES = 2
_BATCHES_APART = 3
# Characters of a token, about: enough to choose texts for a few batches.
_CHARS = 4
# Bytes of logits that one call of `get_logits` leaves in host memory, about: at most so many, and
# at most that share of what is free.
_LOGITS_BYTES, _LOGITS_SHARE = 32 << 30, 1 / 3


class Scored(NamedTuple):
    """What a run went through."""

    tokens: int
    """Of the documents."""
    targets: int
    loglikelihood: float | None
    """Nats, of all targets; None where logits alone were asked for."""
    besides: float = 0.0
    """Seconds of the run that went into something else."""


@dataclass(frozen=True)
class Timed:
    """The fastest of several runs over everything."""

    seconds: float
    scored: Scored
    peak_bytes: int | None
    """Device memory at its fullest over what was taken before; None on a CPU."""


class Loaded:
    """A subject's model in the engine."""

    def __init__(self, subject: Subject, settings: EngineSettings) -> None:
        self.subject = subject
        self.device = settings.resolve_device()
        before = memory(self.device)
        self.pipe = subject.load(settings)
        wait(self.device)
        after = memory(self.device)
        self.weights_bytes = None if before is None or after is None else after - before
        """None on a CPU."""
        self.batch_tokens = self.pipe.max_batch_tokens
        scheme = settings.resolve_scheme(subject.config)
        self.format = scheme.describe(self.pipe.dtype)
        """What linears are stored as and run as, for people."""
        self.unit = name_unit(scheme, self.pipe.dtype)
        """What multiplies the linears."""
        self.head_unit = self.pipe.dtype
        if self.device.type == "cpu":
            self.head_unit = "float32"
        elif settings.fp8_head:
            self.head_unit = "fp8"
        family = FAMILIES.get(subject.config["architectures"][0])
        self.spec = family.spec(subject.config) if family else None
        """None for a family that runs through transformers."""

    @cached_property
    def windows(self) -> list[Window]:
        """Everything that is scored, as peers are given it."""
        return list(windows(self.subject, self.pipe, self.subject.documents))

    @cached_property
    def few(self) -> list[Document]:
        """The first documents, enough for a few batches; of a longer one, its beginning."""
        most = _FEW_BATCHES * self.batch_tokens
        return [_begin(document, most) for document in self._first(_FEW_BATCHES)]

    def _first(self, num_batches: int) -> list[Document]:
        sized = ((document, _size(document)) for document in self.subject.documents)
        return next(rounds(sized, num_batches * self.batch_tokens))

    def runs(
        self, top_k: Sequence[int], keep: Collection[str]
    ) -> Iterator[tuple[str, Callable[[Sequence[Document]], Scored]]]:
        """Names and ways of running documents: records, with candidates, with what is kept."""
        yield "records", self.score
        if self.subject.recipe.name == "conditional":
            yield UNSHARED, partial(self.score, share_contexts=False)
        for k in top_k:
            yield f"records, top {k}", partial(self.score, top_k=k)
        if "sampled" in keep:
            yield f"records, {NUM_DRAWS} draws", partial(self.score, num_draws=NUM_DRAWS)
        if "vocabulary" in keep:
            yield "records, vocabulary", self._count
        if "hidden" in keep:
            yield "hidden states handed over", partial(self.score, on_states=_drop)
        if "logits" in keep:
            yield HANDED_OVER, partial(self.score, on_logits=_drop, logits_dtype="float16")
            yield GET_LOGITS, self._get_logits

    def score(self, documents: Sequence[Document], **options: Any) -> Scored:
        """Records of documents; `options` are those of `Pipeline.score`."""
        tokens, targets, loglikelihood = 0, 0, 0.0
        scores = self.pipe.score(documents, recipe=self.subject.recipe, **options)
        for document, score in zip(documents, scores, strict=True):
            tokens += document.num_context + score.record.num_tokens
            targets += score.record.num_tokens_scored
            loglikelihood += score.record.loglikelihood or 0.0
        return Scored(tokens, targets, loglikelihood)

    def _count(self, documents: Sequence[Document]) -> Scored:
        """Records, and the vocabulary's counts to their end."""
        frequencies = Frequencies()
        scored = self.score(documents, frequencies=frequencies)
        frequencies.read()
        return scored

    def _get_logits(self, documents: Sequence[Document]) -> Scored:
        """Logits of everything, some documents at a time: all at once fit no host memory."""
        room = min(_LOGITS_BYTES, int(_LOGITS_SHARE * free_host_memory()))
        fit = max(1, room // (2 * self.pipe.vocab_size))
        wanted = list(windows(self.subject, self.pipe, documents))
        besides = 0.0
        for group in rounds(((w.ids, len(w.ids)) for w in wanted), fit):
            logits = self.pipe.get_logits(group, dtype="float16")
            # To give memory back is work of the system that a caller who keeps it spares.
            started = time.perf_counter()
            del logits
            besides += time.perf_counter() - started
        tokens = sum(len(w.ids) for w in wanted)
        return Scored(tokens, tokens, None, besides)

    def time(self, run: Callable[[Sequence[Document]], Scored], repeat: int) -> Timed:
        """Run everything `repeat` times, after a few batches to warm up (records did that)."""
        if run != self.score:
            run(self.few)
        return time_best(lambda: run(self.subject.documents), repeat, self.device)

    @cached_property
    def costs(self) -> dict[str, Cost]:
        """What the hardware has to do for records of everything; empty if that is not known."""
        if self.spec is None:
            return {}
        width = DTYPES[self.pipe.dtype].itemsize
        inputs = [window.ids[:-1] for window in self.windows]
        shared = [0] * len(inputs)
        if self.subject.recipe.name == "conditional":
            branches = [branch(None, ids) for ids in inputs]
            (order,) = pack_alike(branches, [1] * len(inputs), sum(map(len, inputs)))
            inputs = [inputs[i] for i, _ in order]
            shared = [one.num_shared for _, one in order]
        return count_costs(
            self.spec,
            [len(ids) for ids in inputs],
            shared=shared,
            scored=sum(len(window.ids) - window.num_context for window in self.windows),
            width=width,
            input_width=1 if self.unit in ("fp8", "int8") else width,
            head_width=1 if self.head_unit == "fp8" else width,
        )

    def measure_ceilings(self, *, to_host: bool) -> Ceilings | None:
        """What the device can do at the shapes of the model; None if they are not known."""
        if self.spec is None:
            return None
        return measure_ceilings(
            self.spec,
            unit=self.unit,
            head_unit=self.head_unit,
            dtype=DTYPES[self.pipe.dtype],
            rows=min(self.batch_tokens, BLOCK_ROWS),
            device=self.device,
            to_host=to_host,
        )

    def break_down(self) -> tuple[Breakdown, int] | None:
        """Where the time of a few batches of records goes, and their tokens; None on a CPU."""
        if self.device.type != "cuda":
            return None
        scored: list[Scored] = []
        apart = self._first(_BATCHES_APART)
        breakdown = break_down(lambda: scored.append(self.score(apart)))
        return breakdown, scored[0].tokens


def time_best(run: Callable[[], Scored], repeat: int, device: torch.device) -> Timed:
    """The fastest of `repeat` runs."""
    before = memory(device)
    best: Timed | None = None
    for _ in range(repeat):
        if before is not None:
            torch.cuda.reset_peak_memory_stats(device)
        started = time.perf_counter()
        scored = run()
        wait(device)
        seconds = time.perf_counter() - started - scored.besides
        peak = None if before is None else torch.cuda.max_memory_allocated(device) - before
        if best is None or seconds < best.seconds:
            best = Timed(seconds, scored, peak)
    assert best is not None
    return best


def memory(device: torch.device) -> int | None:
    """Bytes taken on the device; None on a CPU."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else None


def release(device: torch.device) -> None:
    """Give back what nothing refers to any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _size(document: Document) -> int:
    """Tokens of a document, about."""
    if document.input_ids is not None:
        return len(document.input_ids)
    return len(document.text or "") // _CHARS


def _begin(document: Document, num_tokens: int) -> Document:
    if document.input_ids is None or len(document.input_ids) <= num_tokens:
        return document
    return replace(document, input_ids=document.input_ids[:num_tokens])


def _drop(*rows: Any) -> None:
    """Take logits that reached host memory, and leave them."""
