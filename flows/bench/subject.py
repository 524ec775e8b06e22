"""What is measured: a workload of random weights and tokens, or a model on texts."""

from __future__ import annotations

import hashlib
import json
import shutil
import sysconfig
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import cycle
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

# Of the texts that are made, and of the tokenizer that is trained on the first of them.
_SOURCE_CHARS, _PIECE_CHARS, _VOCABULARY = 8 << 20, 1 << 20, 4096


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

    def __init__(
        self, workload: Workload, *, limit: int | None, from_disk: bool, times: int | None
    ) -> None:
        self._workload = workload
        self.name = workload.name
        self.text = workload.text
        self.config = workload.config
        name = "rolling" if workload.questions is None else "conditional"
        self.recipe = find_recipe(name, prefix=NONE)
        self._from_disk = from_disk or times is not None
        self._has_texts = times is not None
        if times is None:
            self.documents = workload.documents()[:limit]
        elif workload.questions is not None:
            raise ValueError(f"store: {workload.name} has no texts to store; take another workload")
        else:
            self.text += f", as texts, {times} times"
            self.documents = make_texts(self.folder(), times * workload.lengths[:limit])

    def load(self, settings: EngineSettings) -> Pipeline:
        if self._from_disk:
            return load_pipeline(self.folder(), settings)
        weights = self._workload.checkpoint(settings.resolve_device())
        return build_pipeline(cast(Checkpoint, weights), settings)

    def folder(self) -> Path:
        return keep_checkpoint(self.name, self.config)

    def tokenizer(self) -> Tokenizer | None:
        return Tokenizer.load(self.folder()) if self._has_texts else None


class TextSubject:
    """A model and a corpus of texts."""

    random = False

    def __init__(
        self,
        model: str,
        corpus: str,
        *,
        text_column: str,
        recipe: str,
        limit: int | None,
        times: int | None,
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
        if times is not None:
            self.documents = [
                replace(document, doc_id=f"{i}-{document.doc_id}")
                for i in range(times)
                for document in self.documents
            ]
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
    times: int | None = None,
) -> Subject:
    """The workload of a name, or a model and its texts.

    `from_disk` loads a workload's weights from a checkpoint; `shared` does, too, since peers are
    to compute with the same weights. With `times` there are all documents so many times, and those
    of a workload are texts as long as its own.

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
        return TextSubject(
            target, corpus, text_column=text_column, recipe=recipe, limit=limit, times=times
        )
    if corpus is not None:
        raise ValueError(
            f"corpus: {corpus!r} is one too many, {target} brings its own; leave it out"
        )
    return RandomSubject(workload, limit=limit, from_disk=from_disk or shared, times=times)


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
    made_from = json.dumps([dict(config), _VOCABULARY], sort_keys=True)
    digest = hashlib.sha256(made_from.encode()).hexdigest()[:8]
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


def make_texts(model_folder: Path, lengths: Sequence[int]) -> list[Document]:
    """Documents of so many tokens each, about: passages of the standard library's source."""
    backend = _backend(model_folder)
    passages: list[str] = []
    wanted = iter(lengths)
    for source in cycle(_sources()):
        # Cut where tokens begin.
        begins = [begin for begin, _ in backend.encode(source).offsets]
        first = 0
        while first < len(begins):
            length = next(wanted, None)
            if length is None:
                return [Document(doc_id=str(i), text=text) for i, text in enumerate(passages)]
            ends = [*begins[first + length : first + length + 1], len(source)]
            passages.append(source[begins[first] : ends[0]])
            first += length
    raise AssertionError("there is always a source more")


def _sources() -> list[str]:
    """Modules of the standard library, a few MB in pieces of about as many bytes."""
    paths = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    whole = "".join(path.read_text(errors="ignore") for path in paths)[:_SOURCE_CHARS]
    return [whole[i : i + _PIECE_CHARS] for i in range(0, len(whole), _PIECE_CHARS)]


def _backend(model_folder: Path) -> Any:
    from tokenizers import Tokenizer as Backend

    return Backend.from_file(str(model_folder / "tokenizer.json"))


def _train_tokenizer() -> Any:
    """A byte-level BPE of the standard library's source, as small as fits any workload."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers, trainers

    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_VOCABULARY,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(_sources()[:2], trainer)
    return backend


def _write_checkpoint(config: Mapping[str, Any], folder: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    device = "cuda" if torch.cuda.is_available() else "cpu"
    fields = {k: v for k, v in config.items() if k != "model_type"}
    shape = AutoConfig.for_model(config["model_type"], **fields)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(shape, dtype=torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="4GB")
    # For texts; and some peers do not start without one, though they are given ids.
    PreTrainedTokenizerFast(tokenizer_object=_train_tokenizer()).save_pretrained(folder)
