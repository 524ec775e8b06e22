"""What is measured: a workload of random weights and tokens, or a model on texts."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import torch

from ...engine.checkpoint import Checkpoint, find_model, read_config
from ...engine.intake import Intake, Work
from ...engine.pipeline import EngineSettings, Pipeline, build_pipeline, load_pipeline
from ...engine.recipes import NONE, Recipe, find_recipe
from ...engine.records import Document
from ...engine.tokenization import Tokenizer
from ..workloads import WORKLOADS, Workload


@dataclass(frozen=True)
class Window:
    """Token ids as peers are given them."""

    ids: np.ndarray
    """Integers [n], the last target included."""
    num_context: int
    """The first so many are read and not scored; at least 1."""


class Subject(Protocol):
    """A model and the documents that it is measured on."""

    name: str
    text: str
    """One line for people."""
    documents: list[Document]
    recipe: Recipe
    random: bool
    """Whether weights are random, so that they may be any."""

    @property
    def config(self) -> Mapping[str, Any]:
        """config.json of the model."""

    def load(self, settings: EngineSettings) -> Pipeline:
        """The engine, ready to score."""

    def folder(self) -> Path:
        """The model in Hugging Face layout, for peers."""

    def tokenizer(self) -> Tokenizer | None:
        """Of the model, if it has one."""


class RandomSubject:
    """A workload. Its weights are made where they are used, unless a peer wants a checkpoint."""

    random = True

    def __init__(self, workload: Workload, *, limit: int | None, from_disk: bool) -> None:
        self._workload = workload
        self.name = workload.name
        self.text = workload.text
        self.config = workload.config
        self.documents = workload.documents()[:limit]
        self.recipe = find_recipe("rolling", prefix=NONE)
        self._from_disk = from_disk

    def load(self, settings: EngineSettings) -> Pipeline:
        if self._from_disk:
            return load_pipeline(self.folder(), settings)
        weights = self._workload.checkpoint(settings.resolve_device())
        return build_pipeline(cast(Checkpoint, weights), settings)

    def folder(self) -> Path:
        return keep_checkpoint(self.name, self.config)

    def tokenizer(self) -> Tokenizer | None:
        return None


class TextSubject:
    """A model and a corpus of texts."""

    random = False

    def __init__(
        self, model: str, corpus: str, *, text_column: str, recipe: str, limit: int | None
    ) -> None:
        from ..corpus import CorpusSpec, plan_corpus, read_shard

        self.name = model
        self.recipe = find_recipe(recipe)
        self._folder = find_model(model)
        spec = CorpusSpec(uri=corpus, text_column=text_column, limit=limit)
        self.documents = [
            document
            for shard in plan_corpus(spec).shards
            for document in read_shard(spec, shard)
            if document.text
        ]
        if not self.documents:
            raise ValueError(f"corpus: {corpus!r} holds no text; name texts to score")
        self.text = f"{self.config['architectures'][0]}, {len(self.documents):,} texts"

    @cached_property
    def config(self) -> Mapping[str, Any]:
        return read_config(self._folder)

    def load(self, settings: EngineSettings) -> Pipeline:
        return load_pipeline(self._folder, settings)

    def folder(self) -> Path:
        return self._folder

    def tokenizer(self) -> Tokenizer | None:
        return Tokenizer.load(self._folder)


def find_subject(
    target: str,
    corpus: str | None,
    *,
    text_column: str,
    recipe: str,
    limit: int | None,
    from_disk: bool,
    shared: bool,
) -> Subject:
    """The workload of a name, or a model and its texts.

    `from_disk` loads a workload's weights from a checkpoint; `shared` does, too, since peers are
    to compute with the same weights.

    Raises:
        ValueError: naming what is missing or does not go together.
    """
    workload = WORKLOADS.get(target)
    if workload is None and corpus is None:
        raise ValueError(
            f"corpus: missing; give texts to measure {target!r} on, or one of the workloads "
            f"{', '.join(WORKLOADS)}, which bring their own"
        )
    if workload is None:
        assert corpus is not None
        if from_disk:
            raise ValueError(f"from_disk: {target!r} is read from disk anyway; leave it out")
        return TextSubject(target, corpus, text_column=text_column, recipe=recipe, limit=limit)
    if corpus is not None:
        raise ValueError(
            f"corpus: {corpus!r} is one too many, {target} brings its own; leave it out"
        )
    return RandomSubject(workload, limit=limit, from_disk=from_disk or shared)


def windows(subject: Subject, pipe: Pipeline, documents: Sequence[Document]) -> Iterator[Window]:
    """The windows of documents that the engine scores, in order."""
    recipe = pipe.find_recipe(subject.recipe)
    intake = Intake(recipe, subject.tokenizer(), pipe.vocab_size)
    for work in intake.take(documents):
        if not isinstance(work, Work):
            continue
        for window in work.windows:
            ids = work.sequence[window.start : window.stop + 1]
            if window.overwrite_first:
                ids = np.concatenate([[intake.prefix], ids[1:]])
            yield Window(ids, window.first_target - window.start)


def keep_checkpoint(name: str, config: Mapping[str, Any]) -> Path:
    """A checkpoint of random weights of a shape, written once to the temporary folder."""
    digest = hashlib.sha256(json.dumps(dict(config), sort_keys=True).encode()).hexdigest()[:8]
    folder = Path(tempfile.gettempdir(), "logitmill-workloads", f"{name}-{digest}")
    if folder.is_dir():
        return folder
    folder.parent.mkdir(exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(dir=folder.parent))
    try:
        _write_checkpoint(config, unfinished)
        # In one step, so that what is there is whole.
        unfinished.rename(folder)
    except BaseException:
        shutil.rmtree(unfinished)
        raise
    return folder


def _write_checkpoint(config: Mapping[str, Any], folder: Path) -> None:
    from tokenizers import Tokenizer as Backend
    from tokenizers.models import WordLevel
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    device = "cuda" if torch.cuda.is_available() else "cpu"
    fields = {k: v for k, v in config.items() if k != "model_type"}
    shape = AutoConfig.for_model(config["model_type"], **fields)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(shape, dtype=torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="4GB")
    # Some peers do not start without a tokenizer, though they are given ids.
    backend = Backend(WordLevel({"<unk>": 0}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>").save_pretrained(folder)
