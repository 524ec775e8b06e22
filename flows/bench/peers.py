"""Measures the engine on a corpus, beside the loop that people write with transformers."""

from __future__ import annotations

import math
import platform
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch

from ..engine.checkpoint import find_model
from ..engine.intake import prefix_token
from ..engine.pipeline import DTYPES, EngineSettings, load_pipeline
from ..engine.recipes import Recipe
from ..engine.tokenization import Tokenizer
from .corpus import CorpusSpec, plan_corpus, read_shard
from .shards import versions

_PEER_BATCH = 8


@dataclass(frozen=True)
class Measurement:
    """One way of scoring the corpus, timed."""

    name: str
    dtype: str
    tokens: int
    seconds: float
    loglikelihood: float

    @property
    def rate(self) -> float:
        """Scored tokens a second."""
        return self.tokens / self.seconds


@dataclass(frozen=True)
class Report:
    """Measurements side by side, the engine's first, and what they were made on."""

    measurements: Sequence[Measurement]
    conditions: str


def measure(
    model: str, spec: CorpusSpec, *, settings: EngineSettings, recipe: str, peer: bool, repeat: int
) -> Report:
    """Time the engine and, with `peer`, transformers over the same windows of the same texts.

    Loading is left out. Each is run `repeat` times in turn, and its fastest run counts, so that
    what else the machine does weighs on both alike.
    """
    folder = find_model(model)
    pipe = load_pipeline(folder, settings)
    tokenizer = Tokenizer.load(folder)
    if tokenizer is None:
        raise ValueError(f"tokenizer: the model folder {folder} has none, so text cannot be scored")
    chosen = pipe.find_recipe(recipe)
    texts = [
        document.text
        for shard in plan_corpus(spec).shards
        for document in read_shard(spec, shard)
        if document.text
    ]
    runs = {"logitmill": lambda: _score(pipe, texts, chosen)}
    if peer:
        loop = TransformersLoop(folder, tokenizer, chosen, pipe.dtype, settings.resolve_device())
        runs[f"transformers, batches of {_PEER_BATCH}"] = lambda: loop.score(texts)
    best: dict[str, Measurement] = {}
    for _ in range(repeat):
        for name, run in runs.items():
            started = time.perf_counter()
            tokens, loglikelihood = run()
            seconds = time.perf_counter() - started
            if name not in best or seconds < best[name].seconds:
                best[name] = Measurement(name, pipe.dtype, tokens, seconds, loglikelihood)
    return Report(list(best.values()), _conditions(pipe.device_name))


def print_measurements(report: Report) -> None:
    """A table of the measurements, the first one's rate against each."""
    from rich.console import Console
    from rich.table import Table

    ours = report.measurements[0]
    table = Table(box=None, header_style="bold")
    for name in ("", "dtype", "tokens/s", "seconds", "logitmill is", "bits/token"):
        table.add_column(name, justify="left" if name in ("", "dtype") else "right")
    for m in report.measurements:
        bits = -m.loglikelihood / m.tokens / math.log(2)
        ratio = f"{ours.rate / m.rate:.2f}x" if m is not ours else ""
        table.add_row(m.name, m.dtype, f"{m.rate:,.0f}", f"{m.seconds:.1f}", ratio, f"{bits:.5f}")
    console = Console()
    console.print(table)
    console.print(f"{ours.tokens:,} tokens; {report.conditions}", soft_wrap=True)


def _conditions(device: str) -> str:
    """Device, versions and date: what a figure is worth nothing without."""
    named = ", ".join(f"{name} {version}" for name, version in versions().items())
    return f"{device}; {named}, Python {platform.python_version()}; {date.today().isoformat()}"


class TransformersLoop:
    """What people write: padded batches in corpus order, log_softmax over all logits, a gather."""

    def __init__(
        self, folder: Path, tokenizer: Tokenizer, recipe: Recipe, dtype: str, device: torch.device
    ) -> None:
        from transformers import AutoModelForCausalLM

        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPES[dtype])
        self._model = model.to(device).eval()
        self._tokenizer = tokenizer
        self._recipe = recipe
        self._prefix = prefix_token(recipe, tokenizer)
        self._device = device

    @torch.inference_mode()
    def score(self, texts: Sequence[str]) -> tuple[int, float]:
        """(scored tokens, sum of their log-probabilities in nats)."""
        windows = list(self._windows(texts))
        tokens, total = 0, 0.0
        for start in range(0, len(windows), _PEER_BATCH):
            batch = windows[start : start + _PEER_BATCH]
            longest = max(len(inputs) for inputs, _ in batch)
            ids = torch.zeros(len(batch), longest, dtype=torch.long)
            mask = torch.zeros_like(ids)
            for row, (inputs, _) in enumerate(batch):
                ids[row, : len(inputs)] = torch.tensor(inputs)
                mask[row, : len(inputs)] = 1
            logits = self._model(
                input_ids=ids.to(self._device),
                attention_mask=mask.to(self._device),
                use_cache=False,
            ).logits
            logprobs = torch.log_softmax(logits.float(), dim=-1)
            for row, (inputs, targets) in enumerate(batch):
                scored = logprobs[row, len(inputs) - len(targets) : len(inputs)]
                wanted = torch.tensor(targets, device=self._device)[:, None]
                total += scored.gather(1, wanted).double().sum().item()
                tokens += len(targets)
        return tokens, total

    def _windows(self, texts: Sequence[str]) -> Iterator[tuple[list[int], list[int]]]:
        has_prefix = self._prefix is not None
        for encoding in self._tokenizer.encode(texts):
            ids = [self._prefix, *encoding.ids] if has_prefix else list(encoding.ids)
            for w in self._recipe.windows(len(ids), has_prefix=has_prefix):
                yield ids[w.start : w.stop], ids[w.first_target : w.stop + 1]


def _score(pipe: Any, texts: Sequence[str], recipe: Recipe) -> tuple[int, float]:
    tokens, total = 0, 0.0
    for score in pipe.score(texts, recipe=recipe):
        tokens += score.record.num_tokens_scored
        total += score.record.loglikelihood or 0.0
    return tokens, total
