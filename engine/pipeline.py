"""The face of the engine: `pipeline(model)` -> `get_logits`, `get_ppl`, `score`."""

from __future__ import annotations

import platform
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from . import metrics
from .checkpoint import Checkpoint, find_model, read_config
from .decoder import Decoder
from .fallback import Fallback, read_sizes
from .families import FAMILIES
from .head import Head, Model
from .packing import rounds
from .recipes import Recipe, find_recipe
from .records import Document, DocumentScore
from .scorer import BatchSink, LogitsSink, Scorer, pad_ids
from .tokenization import Tokenizer

# Rows of a matrix product. From 512 on a GPU's libraries keep a row's bits whatever their number,
# and a CPU's caches still hold what a block of them makes.
_BLOCK_ROWS = 512

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """How the engine computes. What decides the numbers is in a run's key; the rest is not."""

    device: str | None = None
    """`cpu`, `cuda`, `cuda:1`; None takes the first GPU there is."""
    dtype: str | None = None
    """`float32`, `bfloat16` or `float16`; None is float32 on a CPU, else the checkpoint's own."""
    max_batch_tokens: int | None = None
    """Tokens of one packed batch; None is 8,192 on a CPU and 32,768 on a GPU."""
    logits_memory: int = 256 << 20
    """Bytes that logits and their scratch may take, whatever the length of a document."""
    trust_remote_code: bool = False
    """Whether a model folder's own Python code may be run."""

    def __post_init__(self) -> None:
        if self.dtype is not None and self.dtype not in DTYPES:
            raise ValueError(f"dtype: {self.dtype!r} is not one of {', '.join(DTYPES)}")
        if self.max_batch_tokens is not None and self.max_batch_tokens < 1:
            raise ValueError(f"max_batch_tokens: {self.max_batch_tokens} is not at least 1")

    def resolve_device(self) -> torch.device:
        """The device to run on; ValueError if there is no such device."""
        name = self.device or ("cuda" if torch.cuda.is_available() else "cpu")
        try:
            device = torch.device(name)
        except RuntimeError:
            raise ValueError(f"device: {name!r} is not a device; try cpu or cuda") from None
        if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
            raise ValueError(f"device: {name!r} is not there; {torch.cuda.device_count()} GPUs are")
        return device

    def resolve_dtype(self, config: Mapping[str, Any]) -> str:
        """The name of the dtype to compute in."""
        if self.dtype is not None:
            return self.dtype
        if self.resolve_device().type == "cpu":
            return "float32"
        stored = config.get("dtype") or config.get("torch_dtype") or "bfloat16"
        return stored if stored in DTYPES else "bfloat16"


def pipeline(
    model: str | Path,
    *,
    revision: str | None = None,
    device: str | None = None,
    dtype: str | None = None,
    max_batch_tokens: int | None = None,
    logits_memory: int = EngineSettings.logits_memory,
    trust_remote_code: bool = False,
) -> Pipeline:
    """Load a causal language model for scoring.

    Args:
        model: a folder in Hugging Face layout (safetensors), or a Hub id.
        revision: branch, tag or commit of a Hub id.
        device: `cpu`, `cuda`, `cuda:1`; the first GPU there is by default.
        dtype: `float32`, `bfloat16` or `float16`; by default float32 on a CPU, on a GPU what the
            checkpoint is stored in. Log-probabilities are float32 whatever it is.
        max_batch_tokens: tokens of one packed batch. It decides speed and memory, not numbers.
        logits_memory: bytes that logits may take at a time, whatever a document's length.
        trust_remote_code: whether the model folder's own Python code may be run.

    Raises:
        ValueError: naming the field, its value and what would work.
    """
    settings = EngineSettings(
        device=device,
        dtype=dtype,
        max_batch_tokens=max_batch_tokens,
        logits_memory=logits_memory,
        trust_remote_code=trust_remote_code,
    )
    return load_pipeline(find_model(str(model), revision=revision), settings)


@dataclass(frozen=True)
class ModelFacts:
    """What a model folder says of itself, read without its weights."""

    architecture: str
    native: bool
    """Whether the decoder runs it, or transformers does (`fallback.py`)."""
    vocab_size: int
    max_positions: int
    dtype: str
    """What it would be computed in."""
    device: str
    """`cpu` or `cuda`."""


def inspect_model(folder: Path, settings: EngineSettings) -> ModelFacts:
    """Check a model folder and say what would run, before anything heavy is loaded.

    Raises:
        ValueError: naming the field, its value and what would work.
    """
    config = read_config(folder)
    if config.get("quantization_config"):
        method = config["quantization_config"].get("quant_method", "unknown")
        raise ValueError(
            f"quantization: {folder} holds {method} weights, which cannot be run yet; "
            "use the model's float32, bfloat16 or float16 checkpoint"
        )
    architecture = config["architectures"][0]
    family = FAMILIES.get(architecture)
    if family is not None:
        spec = family.spec(config)
        vocab_size, max_positions = spec.vocab_size, spec.max_positions
    else:
        vocab_size, max_positions = read_sizes(folder, trust_remote_code=settings.trust_remote_code)
    return ModelFacts(
        architecture=architecture,
        native=family is not None,
        vocab_size=vocab_size,
        max_positions=max_positions,
        dtype=settings.resolve_dtype(config),
        device=settings.resolve_device().type,
    )


def load_pipeline(folder: Path, settings: EngineSettings) -> Pipeline:
    """A pipeline from a local model folder; errors as in `pipeline`."""
    facts = inspect_model(folder, settings)
    where = settings.resolve_device()
    dtype = DTYPES[facts.dtype]
    model: Model
    if facts.native:
        model = Decoder.load(
            Checkpoint.open(folder),
            FAMILIES[facts.architecture],
            device=where,
            dtype=dtype,
            block_rows=_BLOCK_ROWS,
        )
    else:
        model = Fallback.load(
            folder,
            device=where,
            dtype=dtype,
            block_rows=_BLOCK_ROWS,
            trust_remote_code=settings.trust_remote_code,
        )
    tokenizer = Tokenizer.load(folder, trust_remote_code=settings.trust_remote_code)
    budget = settings.max_batch_tokens or (8192 if where.type == "cpu" else 32768)
    return Pipeline(
        model,
        tokenizer,
        dtype=facts.dtype,
        max_batch_tokens=budget,
        logits_memory=settings.logits_memory,
    )


class Pipeline:
    """A loaded model that scores token sequences. Make one with `pipeline`."""

    def __init__(
        self,
        model: Model,
        tokenizer: Tokenizer | None,
        *,
        dtype: str,
        max_batch_tokens: int,
        logits_memory: int,
    ) -> None:
        self.dtype = dtype
        """What the layers compute in; log-probabilities are float32 whatever it is."""
        self.vocab_size = model.vocab_size
        """Columns of the logits."""
        self.max_positions = model.max_positions
        """Longest sequence the model was made for, and the default context of recipes."""
        self.device_name = _name_device(model.device)
        """What computes, as people call it: "NVIDIA H200", "AMD EPYC, 2 threads"."""
        self._model = model
        self._tokenizer = tokenizer
        self._budget = max_batch_tokens
        self._head = Head(model, logits_memory)

    def get_logits(
        self, input_ids: Any, *, dtype: str = "float32"
    ) -> torch.Tensor | list[torch.Tensor]:
        """Logits of one sequence [len, vocab_size], or of each of a batch; never padded.

        Row t predicts token t + 1; the row after the last token is included. The whole sequence
        is one window, whatever its length, so the result takes 4 * len * vocab_size bytes of host
        memory in float32.

        Args:
            input_ids: one sequence of token ids or a batch of them, as lists, arrays, tensors, or
                the mapping a tokenizer returns (padding is dropped by its `attention_mask`).
            dtype: `float32`, `bfloat16` or `float16`, of the result.

        Raises:
            ValueError: for an empty sequence or an id outside the vocabulary.
        """
        if dtype not in DTYPES:
            raise ValueError(f"dtype: {dtype!r} is not one of {', '.join(DTYPES)}")
        sequences, single = _as_sequences(input_ids, self.vocab_size)
        results = [torch.empty(len(s), self.vocab_size, dtype=DTYPES[dtype]) for s in sequences]
        for group, hidden_TD in self._forward(sequences):
            start = 0
            for i in group:
                stop = start + len(sequences[i])
                for rows, logits in self._head.chunks(hidden_TD[start:stop]):
                    results[i][rows] = logits[: rows.stop - rows.start].cpu().to(DTYPES[dtype])
                start = stop
        return results[0] if single else results

    def get_ppl(self, input_ids: Any) -> float | list[float]:
        """Token perplexity of one sequence, or of each of a batch.

        exp(-sum log p(token t | tokens before it) / (len - 1)), with the whole sequence as one
        window and its first token unscored. LMDeploy's function of this name returns the mean
        negative log-likelihood, which is the logarithm of this.

        Args:
            input_ids: as for `get_logits`, at least 2 tokens each.
        """
        sequences, single = _as_sequences(input_ids, self.vocab_size)
        short = [i for i, ids in enumerate(sequences) if len(ids) < 2]
        if short:
            raise ValueError(f"input_ids: sequence {short[0]} has 1 token, perplexity needs 2")
        results = [0.0] * len(sequences)
        for group, hidden_TD in self._forward(sequences):
            start = 0
            for i in group:
                ids = sequences[i]
                rows = hidden_TD[start : start + len(ids) - 1]
                with torch.inference_mode():
                    logprob = self._head.statistics(rows, ids[1:]).logprob
                results[i] = metrics.perplexity(logprob.double().sum().item(), len(logprob))
                start += len(ids)
        return results[0] if single else results

    def score(
        self,
        inputs: Any,
        *,
        recipe: str | Recipe = "rolling",
        context: int | None = None,
        overlap: int | None = None,
        stride: int | None = None,
        prefix: str | int | None = None,
        on_logits: LogitsSink | None = None,
        on_batch: BatchSink | None = None,
    ) -> Iterator[DocumentScore]:
        """Score documents; yields each one's records, in input order, as they are ready.

        Args:
            inputs: an iterable of documents: texts, chat messages (lists of mappings), token ids
                (lists or arrays), `Document`s, or (context, continuation) pairs of texts for the
                recipe `conditional`. One text alone is taken as one document.
            recipe: a name of `PRESETS`, such a name with its context (`disjoint-2048`), or a
                `Recipe`.
            context: longest window in tokens; the model's own limit by default.
            overlap: tokens of context before the first target of a later window (`rolling`).
            stride: tokens between windows (`strided`).
            prefix: `bos`, `eos`, `none`, `auto`, `tokenizer` or a token id.
            on_logits: called with (index, doc_id, first row, log-probabilities [rows, V],
                logsumexp [rows]) for consecutive rows of every document, before the document is
                yielded; row i scored the document's record i, and logits are their sum.
            on_batch: called with (scored tokens, their bytes) after every batch, for progress.

        Raises:
            ValueError: for a recipe that does not fit the model. A bad document is no error: its
                record says so in `status` and `error`.
        """
        chosen = self.find_recipe(
            recipe, context=context, overlap=overlap, stride=stride, prefix=prefix
        )
        scorer = Scorer(
            self._model, self._head, self._tokenizer, chosen, max_batch_tokens=self._budget
        )
        return scorer.score(_as_documents(inputs), on_logits, on_batch)

    def find_recipe(self, recipe: str | Recipe, **settings: Any) -> Recipe:
        """The recipe as it would run on this model, context and stride resolved."""
        return find_recipe(recipe, **settings).resolve(self.max_positions)

    def _forward(self, sequences: Sequence[np.ndarray]) -> Iterator[tuple[list[int], torch.Tensor]]:
        """Packed batches of whole sequences: (their indices, hidden states [T, D])."""
        order = ((i, len(ids)) for i, ids in enumerate(sequences))
        for group in rounds(order, self._budget):
            ids = pad_ids([sequences[i] for i in group], self._model.block_rows)
            lengths = [len(sequences[i]) for i in group]
            with torch.inference_mode():
                yield group, self._model.hidden(ids.to(self._model.device), lengths)


def _name_device(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        named = re.search(r"^model name\s*: (.+)$", cpuinfo.read_text(), re.MULTILINE)
        name = named[1] if named else name
    return f"{name}, {torch.get_num_threads()} threads"


def _as_sequences(input_ids: Any, vocab_size: int) -> tuple[list[np.ndarray], bool]:
    """Flat int64 sequences, and whether there was one and not a batch."""
    mask = None
    if isinstance(input_ids, Mapping):
        mask = input_ids.get("attention_mask")
        if "input_ids" not in input_ids:
            raise ValueError(f"input_ids: not among the mapping's {', '.join(input_ids)}")
        input_ids = input_ids["input_ids"]
    if np.isscalar(input_ids) or not hasattr(input_ids, "__len__"):
        raise ValueError(f"input_ids: {input_ids!r} is not a sequence of token ids or a batch")
    single = _depth(input_ids) == 1
    rows = [input_ids] if single else list(input_ids)
    masks = [None] * len(rows) if mask is None else ([mask] if single else list(mask))
    sequences = []
    for i, (row, kept) in enumerate(zip(rows, masks, strict=True)):
        ids = _as_array(row)
        if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
            raise ValueError(f"input_ids: sequence {i} is not a flat list of integers")
        if kept is not None:
            kept = _as_array(kept).astype(bool)
            if kept.shape != ids.shape:
                raise ValueError(
                    f"attention_mask: of sequence {i} has {kept.size} entries for {ids.size} ids"
                )
            ids = ids[kept]
        if not len(ids):
            raise ValueError(f"input_ids: sequence {i} is empty")
        wrong = np.flatnonzero((ids < 0) | (ids >= vocab_size))
        if len(wrong):
            raise ValueError(
                f"input_ids: {ids[wrong[0]]} at position {wrong[0]} of sequence {i} is not in the "
                f"model's vocabulary of {vocab_size}"
            )
        sequences.append(ids.astype(np.int64))
    return sequences, single


def _as_array(values: Any) -> np.ndarray:
    return values.cpu().numpy() if isinstance(values, torch.Tensor) else np.asarray(values)


def _depth(values: Any) -> int:
    """1 for a sequence of ids, 2 for a batch of sequences."""
    if isinstance(values, (torch.Tensor, np.ndarray)):
        return values.ndim
    return 1 if not len(values) or np.isscalar(values[0]) else 1 + _depth(values[0])


def _as_documents(inputs: Any) -> Iterable[Document]:
    if isinstance(inputs, (str, Document)):
        inputs = [inputs]
    for index, value in enumerate(inputs):
        yield _as_document(str(index), value)


def _as_document(doc_id: str, value: Any) -> Document:
    match value:
        case Document():
            return value
        case str():
            return Document(doc_id, text=value)
        case (str() as context, str() as text):
            return Document(doc_id, context=context, text=text)
        case [dict(), *_]:
            return Document(doc_id, messages=value)
        case torch.Tensor():
            return Document(doc_id, input_ids=value.cpu().numpy())
        case np.ndarray() | list() | tuple():
            return Document(doc_id, input_ids=value)
    raise ValueError(
        f"inputs: document {doc_id} is a {type(value).__name__}; give text, chat messages, "
        "token ids, a (context, continuation) pair or a Document"
    )
