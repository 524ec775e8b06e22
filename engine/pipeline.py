"""The face of the engine: `pipeline(model)` -> `get_logits`, `get_ppl`, `score`."""

from __future__ import annotations

import logging
import platform
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..kernels.logits import MAX_K
from . import metrics
from .blocks import LEAST
from .checkpoint import Checkpoint, find_model, read_config
from .decoder import Decoder
from .fallback import Fallback, check_model, check_tensors, read_sizes
from .families import FAMILIES, NotNative, find_family
from .formats import Capability, Scheme, resolve_scheme
from .frequencies import Frequencies
from .generation import Generated, Generator, Limits, TokenSink
from .head import Columns, Extras, Head, Model
from .hooks import Hook
from .intake import Intake
from .layouts import read_stored
from .lens import Layered, Lens, check_layers
from .loading import load_decoder, measure
from .packing import pack, rounds
from .placement import RESIDENCIES, Room, free_device_memory, free_host_memory, show_gb
from .recipes import Recipe, find_recipe
from .records import Document, DocumentScore, TokenRecords
from .runner import Request, Runner, StreamedRows
from .samplers import Sampler, greedy
from .scorer import BatchSink, LogitsSink, Scorer, StatesSink
from .tokenization import Tokenizer
from .transfer import Arrival, on

log = logging.getLogger(__name__)

MAX_DRAWS = 255
"""The most tokens that are drawn of a row."""
NO_STATES = (
    "transformers runs this model, and what it makes of hidden states is not known apart from it; "
    "keep logits or topk instead"
)
BLOCK_ROWS = 32768
"""Most rows of a matrix product on a GPU."""
# Tokens of a packed batch, and bytes that logits may take.
_BATCH_TOKENS = {"cpu": 8192, "cuda": 32768}
_LOGITS_MEMORY = {"cpu": 256 << 20, "cuda": 2 << 30}
# Of `get_logits`: tokens of a batch, where more make a product no faster, and chunks that wait to
# be copied while the next batch is launched.
_LOGITS_BATCH = 8192
_HELD = 3
_HOPPER = (9, 0)
# What of the free memory is counted on, and the part of it that logits may have where it is short.
_FREE_SHARE, _LOGITS_SHARE = 0.95, 1 / 12

RESIDENT = "all layers resident"
"""Where layers of a model live that transformers runs."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """How the engine computes. What decides the numbers is in a run's key; the rest is not."""

    device: str | None = None
    """`cpu`, `cuda`, `cuda:1`; None takes the first GPU there is."""
    dtype: str | None = None
    """`float32`, `bfloat16` or `float16`; None is float32 on a CPU, else the checkpoint's own."""
    quantization: str | None = None
    """What linears are multiplied as: `none`, `fp8`, `fp8_block`, `int8`, `int4`, `int4_fp8`,
    `int4_fp8_exact`; None is what the checkpoint is stored as."""
    fp8_head: bool = False
    """Whether the head is multiplied in fp8 too: faster, and less exact."""
    max_batch_tokens: int | None = None
    """Tokens of one packed batch; None is 8,192 on a CPU and 32,768 on a GPU."""
    logits_memory: int | None = None
    """Bytes that logits and their scratch may take, whatever the length of a document; None is
    256 MB on a CPU and 2 GB on a GPU."""
    device_memory: int | None = None
    """Bytes of a GPU's memory that weights and batches may take; None is what is free. On a CPU
    that cannot be set."""
    residency: str | None = None
    """Where layers live: `device`, or `host` or `disk` to stream them from there; None is `device`
    for as many as fit, and for the others `host` if they fit there, else `disk`."""
    trust_remote_code: bool = False
    """Whether a model folder's own Python code may be run."""

    def __post_init__(self) -> None:
        if self.dtype is not None and self.dtype not in DTYPES:
            raise ValueError(f"dtype: {self.dtype!r} is not one of {', '.join(DTYPES)}")
        for name in ("max_batch_tokens", "logits_memory", "device_memory"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}: {value} is not at least 1")
        if self.residency not in (None, *RESIDENCIES):
            raise ValueError(
                f"residency: {self.residency!r} is not one of {', '.join(RESIDENCIES)}"
            )

    def resolve_room(self, vocab_size: int) -> Room:
        """What there is for weights and batches."""
        device = self.resolve_device()
        is_cpu = device.type == "cpu"
        host_bytes = int(_FREE_SHARE * free_host_memory())
        if is_cpu:
            device_bytes = host_bytes
        else:
            free = self._free_memory(device)
            device_bytes = self.device_memory or int(_FREE_SHARE * free)
            if device_bytes > free:
                raise ValueError(
                    f"device_memory: {show_gb(device_bytes, up=True)} is more than the "
                    f"{show_gb(free)} that are free on {device}; give less or leave it out"
                )
        logits_bytes = self.logits_memory
        if logits_bytes is None:
            logits_bytes = _LOGITS_MEMORY[device.type]
            if not is_cpu:
                least = vocab_size * LEAST * 4
                logits_bytes = max(least, min(logits_bytes, int(_LOGITS_SHARE * device_bytes)))
        return Room(
            device_bytes=device_bytes,
            host_bytes=host_bytes,
            logits_bytes=logits_bytes,
            batch_tokens=self.max_batch_tokens or _BATCH_TOKENS[device.type],
            block_rows=LEAST if is_cpu else BLOCK_ROWS,
            wanted=self.residency,
            keeps_batch=self.max_batch_tokens is not None,
            is_set=self.device_memory is not None,
            is_host=is_cpu,
        )

    def resolve_scheme(self, config: Mapping[str, Any]) -> Scheme:
        """What the checkpoint's linears run as on the device; ValueError if they cannot."""
        capability = self._capability(self.resolve_device())
        return resolve_scheme(
            read_stored(config), self.quantization, capability, fp8_head=self.fp8_head
        )

    def resolve_device(self) -> torch.device:
        """The device to run on; ValueError if it is not there, or a setting is for another kind."""
        name = self.device or ("cuda" if torch.cuda.is_available() else "cpu")
        try:
            device = torch.device(name)
        except RuntimeError:
            raise ValueError(f"device: {name!r} is not a device; try cpu or cuda") from None
        if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
            raise ValueError(f"device: {name!r} is not there; {torch.cuda.device_count()} GPUs are")
        if device.type == "cpu" and self.device_memory is not None:
            raise ValueError(
                f"device_memory: {show_gb(self.device_memory)} is of a GPU's memory, and device is "
                "'cpu'; leave it out"
            )
        return device

    def resolve_dtype(self, config: Mapping[str, Any]) -> str:
        """The name of the dtype to compute in."""
        if self.dtype is not None:
            return self.dtype
        if self.resolve_device().type == "cpu":
            return "float32"
        stored = config.get("dtype") or config.get("torch_dtype") or "bfloat16"
        return stored if stored in DTYPES else "bfloat16"

    def _free_memory(self, device: torch.device) -> int:
        return free_device_memory(device)

    def _capability(self, device: torch.device) -> Capability:
        return torch.cuda.get_device_capability(device) if device.type == "cuda" else None


@dataclass(frozen=True, kw_only=True)
class AbsentGpu(EngineSettings):
    """Settings for a GPU that is not here, to inspect a model for and not to run it on.

    It has `device_memory` free, and is of Hopper's generation, which runs every format. All else
    is this machine's.
    """

    def resolve_device(self) -> torch.device:
        """What stands for the GPU; ValueError without its memory."""
        if self.device_memory is None:
            raise ValueError("device_memory: missing, and a GPU that is not here has some")
        return torch.device("cuda")

    def _free_memory(self, device: torch.device) -> int:
        assert self.device_memory is not None
        return self.device_memory

    def _capability(self, device: torch.device) -> Capability:
        return _HOPPER


def pipeline(
    model: str | Path,
    *,
    revision: str | None = None,
    device: str | None = None,
    dtype: str | None = None,
    quantization: str | None = None,
    fp8_head: bool = False,
    max_batch_tokens: int | None = None,
    logits_memory: int | None = None,
    device_memory: int | None = None,
    residency: str | None = None,
    trust_remote_code: bool = False,
) -> Pipeline:
    """Load a causal language model for scoring.

    Args:
        model: a folder in Hugging Face layout (safetensors), its URI on any file system
            (`s3://bucket/model/`), or a Hub id.
        revision: branch, tag or commit of a Hub id.
        device: `cpu`, `cuda`, `cuda:1`; the first GPU there is by default.
        dtype: `float32`, `bfloat16` or `float16`; by default float32 on a CPU, on a GPU what the
            checkpoint is stored in. Log-probabilities are float32 whatever it is.
        quantization: what linears are multiplied as: `none`, `fp8` (scales of rows), `fp8_block`
            (of 128 x 128), `int8`, `int4` (expanded to `dtype`), `int4_fp8` (expanded to fp8),
            `int4_fp8_exact` (the same without a second rounding: on Hopper GPUs, for groups of
            128 columns in order; others are multiplied as `int4`).
            By default what the checkpoint says; a plain checkpoint is rounded while it loads.
        fp8_head: whether the head is multiplied in fp8 as well.
        max_batch_tokens: tokens of one packed batch. It decides speed and memory, not numbers.
        logits_memory: bytes that logits may take at a time, whatever a document's length.
        device_memory: bytes of a GPU's memory that weights and batches may take; what is free by
            default. Layers that do not fit are streamed from host memory, or from disk where that
            is too small as well, and batches get smaller where even that takes too much. No number
            depends on it. Logits that are kept take `logits_memory` and a batch's hidden states
            beside it.
        residency: where layers live: `device`, or `host` or `disk` to stream all of them from
            there; by default `device` for as many as fit. On a CPU layers that do not fit in host
            memory are mapped from disk. The disk is that of the folder LOGITMILL_SCRATCH.
        trust_remote_code: whether the model folder's own Python code may be run.

    Raises:
        ValueError: naming the field, its value and what would work.
    """
    settings = EngineSettings(
        device=device,
        dtype=dtype,
        quantization=quantization,
        fp8_head=fp8_head,
        max_batch_tokens=max_batch_tokens,
        logits_memory=logits_memory,
        device_memory=device_memory,
        residency=residency,
        trust_remote_code=trust_remote_code,
    )
    return load_pipeline(find_model(str(model), revision=revision), settings)


@dataclass(frozen=True)
class ModelFacts:
    """What a model folder says of itself, read without its weights."""

    architecture: str
    reason: str | None
    """Why transformers runs it (`fallback.py`); None where the decoder does."""
    vocab_size: int
    max_positions: int
    hidden_size: int | None
    """Of what the head takes; None where transformers runs it."""
    num_layers: int | None
    """None where transformers runs it."""
    dtype: str
    """What it would be computed in."""
    device: str
    """`cpu` or `cuda`."""
    weights: str
    """How many tensors there are, and what they take as stored."""
    quantization: str
    """How linears are stored and what they run as."""


def inspect_model(folder: Path, settings: EngineSettings) -> ModelFacts:
    """Check a model folder and say what would run, before anything heavy is loaded.

    Raises:
        ValueError: naming the field, its value and what would work.
    """
    config = read_config(folder)
    scheme = settings.resolve_scheme(config)
    architecture = config["architectures"][0]
    reason = None
    try:
        spec = find_family(architecture).spec(config)
        vocab_size, max_positions = spec.vocab_size, spec.max_positions
        hidden_size: int | None = spec.hidden_size
        num_layers: int | None = spec.num_layers
    except NotNative as error:
        reason = str(error)
        for field, value in (
            ("quantization", scheme.stored.groups and scheme.stored.method),
            ("quantization", settings.quantization not in (None, "none") and settings.quantization),
            ("fp8_head", settings.fp8_head),
            ("residency", settings.residency not in (None, "device") and settings.residency),
            ("device_memory", settings.device_memory and show_gb(settings.device_memory)),
        ):
            if value:
                raise ValueError(
                    f"{field}: {value!r} needs a model that the decoder knows; {reason}"
                ) from None
        trusting = settings.trust_remote_code
        if architecture in FAMILIES:
            try:
                check_model(folder, trust_remote_code=trusting)
            except ValueError as refused:
                # The setting is the mistake; transformers' words for it are seldom of any help.
                said = str(refused).removeprefix("model: ")
                raise ValueError(f"model: {reason}, and {said}") from None
        vocab_size, max_positions = read_sizes(folder, trust_remote_code=trusting)
        hidden_size = num_layers = None
        if architecture not in FAMILIES:
            check_model(folder, trust_remote_code=trusting)
    dtype = settings.resolve_dtype(config)
    return ModelFacts(
        architecture=architecture,
        reason=reason,
        vocab_size=vocab_size,
        max_positions=max_positions,
        hidden_size=hidden_size,
        num_layers=num_layers,
        dtype=dtype,
        device=settings.resolve_device().type,
        weights=str(Checkpoint.open(folder).check_files()),
        quantization=scheme.describe(dtype),
    )


def inspect_placement(folder: Path, settings: EngineSettings) -> str:
    """Where a model's layers would live, for people; every tensor's header is checked on the way.

    Of a model that transformers runs they are if `fallback.can_check_tensors`.

    Raises:
        ValueError: naming what `load_pipeline` would, but for weights that are not finite.
    """
    if inspect_model(folder, settings).reason is not None:
        check_tensors(folder, trust_remote_code=settings.trust_remote_code)
        return RESIDENT
    checkpoint = Checkpoint.open(folder)
    family = FAMILIES[checkpoint.config["architectures"][0]]
    arrangement = measure(
        checkpoint,
        family,
        dtype=DTYPES[settings.resolve_dtype(checkpoint.config)],
        scheme=settings.resolve_scheme(checkpoint.config),
        room=settings.resolve_room(family.spec(checkpoint.config).vocab_size),
    )
    return arrangement.describe()


def load_pipeline(folder: Path, settings: EngineSettings) -> Pipeline:
    """A pipeline from a local model folder; errors as in `pipeline`."""
    facts = inspect_model(folder, settings)
    trusting = settings.trust_remote_code
    if facts.reason is None:
        tokenizer = Tokenizer.load(folder, trust_remote_code=trusting)
        return build_pipeline(Checkpoint.open(folder), settings, tokenizer)
    model = Fallback.load(
        folder,
        device=settings.resolve_device(),
        dtype=DTYPES[facts.dtype],
        trust_remote_code=trusting,
    )
    tokenizer = Tokenizer.load(folder, trust_remote_code=trusting)
    return _wrap(model, settings, tokenizer, facts.dtype)


def build_pipeline(
    checkpoint: Checkpoint, settings: EngineSettings, tokenizer: Tokenizer | None = None
) -> Pipeline:
    """A pipeline of a checkpoint whose architecture is one of `FAMILIES`.

    Without a tokenizer it scores token ids alone.
    """
    dtype, device = settings.resolve_dtype(checkpoint.config), settings.resolve_device()
    family = FAMILIES[checkpoint.config["architectures"][0]]
    with on(device):
        room = settings.resolve_room(family.spec(checkpoint.config).vocab_size)
        model = load_decoder(
            checkpoint,
            family,
            device=device,
            dtype=DTYPES[dtype],
            room=room,
            scheme=settings.resolve_scheme(checkpoint.config),
        )
        assert model.arrangement is not None
        placement = model.arrangement.describe()
        if model.is_streamed:
            log.warning("%s", placement)
        settings = replace(
            settings,
            max_batch_tokens=model.arrangement.batch_tokens,
            logits_memory=room.logits_bytes,
        )
        return _wrap(model, settings, tokenizer, dtype, placement)


def _wrap(
    model: Model,
    settings: EngineSettings,
    tokenizer: Tokenizer | None,
    dtype: str,
    placement: str = RESIDENT,
) -> Pipeline:
    kind = settings.resolve_device().type
    return Pipeline(
        model,
        tokenizer,
        dtype=dtype,
        max_batch_tokens=settings.max_batch_tokens or _BATCH_TOKENS[kind],
        logits_memory=settings.logits_memory or _LOGITS_MEMORY[kind],
        placement=placement,
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
        placement: str,
    ) -> None:
        self.placement = placement
        """Where layers live, for people."""
        self.dtype = dtype
        """What the layers compute in; log-probabilities are float32 whatever it is."""
        self.vocab_size = model.vocab_size
        """Columns of the logits."""
        self.hidden_size = model.hidden_size
        """Columns of hidden states; None of a model that transformers runs."""
        self.max_positions = model.max_positions
        """Longest sequence the model was made for, and the default context of recipes."""
        self.max_batch_tokens = max_batch_tokens
        """Tokens of a packed batch, at most where documents are shorter."""
        self.device_name = name_device(model.device)
        """What computes, as people call it: "NVIDIA H200", "AMD EPYC, 2 threads"."""
        self._model = model
        self._tokenizer = tokenizer
        self._head = Head(model, logits_memory)
        self._runner = Runner(model, self._head)

    def get_logits(
        self, input_ids: Any, *, dtype: str | torch.dtype = "float32"
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
        dtype = str(dtype).removeprefix("torch.")
        if dtype not in DTYPES:
            raise ValueError(f"dtype: {dtype!r} is not one of {', '.join(DTYPES)}")
        sequences, single = _as_sequences(input_ids, self.vocab_size)
        results = [_empty(len(s), self.vocab_size, DTYPES[dtype]) for s in sequences]
        # Rows leave while the next batch is computed, those of the last one alone.
        most = self.max_batch_tokens
        if not self._model.is_streamed:
            most = min(most, _LOGITS_BATCH)
        batches = pack([len(s) for s in sequences], most)
        in_batches = [results[i] for batch in batches for i in batch]
        # The statistics that come along are of no use here, so any target will do.
        requests = [
            [Request(sequences[i], np.zeros_like(sequences[i])) for i in b] for b in batches
        ]
        chunks = self._runner.stream(requests, DTYPES[dtype], normalised=False, held=_HELD)
        # To write memory for the first time takes about as long as to compute what is written.
        with ThreadPoolExecutor(1, "logitmill-logits") as pool:
            jobs: deque[Future[None]] = deque()
            for chunk in chunks:
                jobs.append(pool.submit(_copy, chunk, in_batches))
                if len(jobs) > _HELD:
                    jobs.popleft().result()
            for job in jobs:
                job.result()
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
        requests = [Request(ids[:-1], ids[1:]) for ids in sequences]
        launched: deque[Arrival[Columns]] = deque()
        logprobs = []
        for batch in rounds(((r, len(r.ids)) for r in requests), self.max_batch_tokens):
            launched += self._runner.launch(batch)
            while len(launched) > self._runner.depth:
                logprobs.append(launched.popleft().wait()["logprob"])
        logprobs += [arrival.wait()["logprob"] for arrival in launched]
        stops = np.cumsum([len(r.targets) for r in requests])[:-1]
        results = [
            metrics.perplexity(own.sum(dtype=np.float64).item(), len(own))
            for own in np.split(np.concatenate(logprobs), stops)
        ]
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
        top_k: int = 0,
        num_draws: int = 0,
        draw_seed: int = 0,
        layers: Sequence[int] | np.ndarray | None = (),
        on_logits: LogitsSink | None = None,
        on_states: StatesSink | None = None,
        logits_dtype: str = "float32",
        on_batch: BatchSink | None = None,
        on_launched: Callable[[], None] | None = None,
        share_contexts: bool = True,
        frequencies: Frequencies | None = None,
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
            top_k: keep the so many likeliest tokens of every row, up to 256, in the records'
                `top_ids` and `top_logprobs`, and the mass of all others in `log_tail_mass`.
            num_draws: draw so many tokens from every row's distribution, up to 255, into the
                records' `drawn_ids`. They are decided by the seed, the document's tokens and the
                row's place among them: the same in any batch and order.
            draw_seed: another one gives other draws.
            layers: also read these by the logit lens, all for None, as `lens` does, on the way:
                the records' `lens`, which `split_lens` makes records of. Contexts are not shared
                then.
            on_logits: called with (index, doc_id, first row, log-probabilities [rows, V],
                logsumexp [rows]) for consecutive rows of every document, before the document is
                yielded; row i scored the document's record i, and logits are their sum. The
                arrays are overwritten after the call.
            on_states: called with (index, doc_id, first row, hidden states [rows, D]) in the same
                way: what `replay` makes the rows' logits of, a tensor in host memory.
            logits_dtype: `float32` or `float16`, of these log-probabilities.
            on_batch: called with (scored tokens, their bytes) after every batch, for progress.
            on_launched: called once, when the last batch is under way on the device: from then on
                another thread's call may launch its own, and the device need not wait for these
                records. One call at a time may be before this point.
            share_contexts: compute what contexts begin with alike once (`conditional`), which
                leaves a document the bits that it has alone. Without, it is read by the attention
                of the other recipes, for comparison: slower, and with other last bits.
            frequencies: add up by source how often every token of the vocabulary was expected and
                how often it was there; it can be read once all documents were taken.

        Raises:
            ValueError: for a recipe that does not fit the model. A bad document is no error: its
                record says so in `status` and `error`.
        """
        chosen = self.find_recipe(
            recipe, context=context, overlap=overlap, stride=stride, prefix=prefix
        )
        if type(top_k) is not int or not 0 <= top_k <= min(MAX_K, self.vocab_size):
            raise ValueError(
                f"top_k: {top_k!r} is not an integer within 0 ... {min(MAX_K, self.vocab_size)}"
            )
        if type(num_draws) is not int or not 0 <= num_draws <= MAX_DRAWS:
            raise ValueError(f"num_draws: {num_draws!r} is not an integer within 0 ... {MAX_DRAWS}")
        for name, value in (("top_k", top_k), ("num_draws", num_draws)):
            if value and on_logits is not None:
                raise ValueError(
                    f"{name}: logits that are handed over hold the whole distribution; use one"
                )
        read: Sequence[int] = ()
        if not (isinstance(layers, Sequence) and len(layers) == 0):
            read = check_layers(layers, self._need_decoder("layers").spec.num_layers)
        if on_states is not None:
            if on_logits is not None:
                raise ValueError("on_states: logits can be made of them; hand over one of both")
            self._check_states()
        if logits_dtype not in ("float32", "float16"):
            raise ValueError(f"logits_dtype: {logits_dtype!r} is not one of float32, float16")
        scorer = Scorer(
            self._model,
            self._runner,
            self._tokenizer,
            chosen,
            max_batch_tokens=self.max_batch_tokens,
            extras=Extras(top_k, num_draws, draw_seed, frequencies, tuple(read)),
            shares=share_contexts,
        )
        return scorer.score(
            _as_documents(inputs),
            on_logits,
            on_batch,
            on_launched,
            logits_dtype=DTYPES[logits_dtype],
            on_states=on_states,
        )

    @cached_property
    def spelled(self) -> list[str]:
        """The text of every token, bytes that are none as `\\xe2`; empty without a tokenizer."""
        if self._tokenizer is None:
            return []
        spelled = self._tokenizer.spell(range(self.vocab_size))
        return [utf8.decode(errors="backslashreplace") for utf8 in spelled]

    @property
    def head_digest(self) -> str | None:
        """sha256 of what makes logits of hidden states; None of a model that transformers runs."""
        return self._model.head_digest

    def replay(self, states_RD: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
        """(rows, their logits [rows, V] float32 on the host) of hidden states, chunk by chunk.

        Of the states that `score` hands to `on_states` these are, on the same device and software,
        the bits that it scored with.

        Args:
            states_RD: [R, D] in the model's dtype.

        Raises:
            ValueError: for states of another dtype or size, or a model that cannot do this.
        """
        self._check_states()
        wanted = (self._model.dtype, self.hidden_size)
        if states_RD.ndim != 2 or (states_RD.dtype, states_RD.shape[1]) != wanted:
            raise ValueError(
                f"states_RD: {states_RD.dtype} of shape {tuple(states_RD.shape)} are not the "
                f"model's, {wanted[0]} [rows, {wanted[1]}]"
            )
        yield from self._runner.replay(states_RD)

    @contextmanager
    def hooked(self, hook: Hook) -> Iterator[None]:
        """A block in which `hook` sees every layer's states, and may replace them.

        It is called as hook(layer, states [T, D], tokens) after each layer of every batch, in the
        thread that asks for results, and returns what takes the states' place, or None. What the
        block asks for must be taken within it: `score` computes as its documents are taken. Blocks
        within blocks hook in order. Contexts are not shared meanwhile. A batch for which memory
        runs out is halved and seen again. Off the fast path: each layer is copied.

        Raises:
            ValueError: for a model that transformers runs, whose layers are not known, or states of
                another shape, dtype or device than the layer's.
        """
        with self._need_decoder("hook").hooked(hook):
            yield

    def lens(
        self,
        inputs: Any,
        *,
        layers: Sequence[int] | None = None,
        recipe: str | Recipe = "rolling",
        context: int | None = None,
    ) -> Iterator[Layered[TokenRecords]]:
        """What the head would make of layers on the way: a record per token and layer.

        The residual stream after each layer goes through the model's final norm and head (logit
        lens). The last layer's records are those of `score`, to the bit, but for texts that share
        a context.

        Args:
            inputs, recipe, context: as for `score`.
            layers: from 0, or from the end if negative; all by default.

        Raises:
            ValueError: for a layer that is not there, or as `score` and `hooked` do.
        """
        return self._look_into(layers, recipe, context).score(_as_documents(inputs))

    def states(
        self,
        inputs: Any,
        *,
        layers: Sequence[int] | None = None,
        recipe: str | Recipe = "rolling",
        context: int | None = None,
    ) -> Iterator[Layered[torch.Tensor]]:
        """The residual stream after layers, [tokens, D] in host memory and the model's dtype.

        Row i is of the token that record i of `score` was scored from. The final norm is not
        applied, to the last layer's neither. Arguments and errors as for `lens`.
        """
        return self._look_into(layers, recipe, context).states(_as_documents(inputs))

    def sample(
        self,
        prompts: Any,
        sampler: Sampler = greedy,
        *,
        max_tokens: int = 256,
        stop: Sequence[int | str] | None = None,
        context: int | None = None,
        batch_size: int = 16,
        kept_as: str | None = None,
        on_token: TokenSink | None = None,
    ) -> Iterator[Generated]:
        """Go on from prompts; yields what comes of each, in their order, as it is ready.

        Of one sequence alone the tokens are those of `get_logits` on all of it, whatever its length
        does to the model's rotaries. Keys and values of `batch_size` sequences are kept beside the
        weights, room for the longest of them each; `device_memory` knows nothing of them.

        Args:
            prompts: texts, chat messages or token ids, as for `score`. BOS is put in front of a
                text where the tokenizer does it.
            sampler: a function of logits, float32 [B, V], and the sequences that they follow
                (`samplers.Growing`: ids so far, index of the prompt) to B ids.
            max_tokens: most tokens for a prompt.
            stop: ids or texts that end a sequence; the tokenizer's EOS by default.
            context: most tokens of a prompt and what follows it; the model's own limit by default.
            batch_size: most sequences at a time.
            kept_as: `int8` or `int4` to round kept keys and values to, each head of a token with
                its own range; None keeps them as they are.
            on_token: called with (prompt's index, id) for every token at once.

        Raises:
            ValueError: for a prompt that is empty or longer than the context, or a model that
                transformers runs.
        """
        model = self._need_decoder("sample")
        if stop is None:
            eos = self._tokenizer.eos_id if self._tokenizer is not None else None
            stop = [] if eos is None else [eos]
        limits = Limits(
            max_tokens=max_tokens,
            context=self.max_positions if context is None else context,
            stop_ids=frozenset(i for i in stop if not isinstance(i, str)),
            stop_texts=tuple(i for i in stop if isinstance(i, str)),
        )
        generator = Generator(
            model,
            self._tokenizer,
            sampler,
            limits,
            batch_size=batch_size,
            kept_as=kept_as,
            max_batch_tokens=self.max_batch_tokens,
        )
        ids = map(self._read_prompt, _as_documents(prompts))
        is_whole = isinstance(prompts, (str, list, tuple))
        return generator.generate(list(ids) if is_whole else ids, on_token)

    def _read_prompt(self, document: Document) -> np.ndarray:
        """int64 ids of a prompt."""
        if document.input_ids is not None:
            (ids,), _ = _as_sequences([document.input_ids], self.vocab_size)
            return ids
        if self._tokenizer is None:
            raise ValueError(
                "tokenizer: the model folder has none, so text cannot be read; give input_ids"
            )
        is_chat = document.messages is not None
        if document.messages is not None:
            text = self._tokenizer.render(document.messages, asks=True)
        else:
            text = (document.context or "") + (document.text or "")
        ids = self._tokenizer.encode([text], parse_special=is_chat)[0].ids.astype(np.int64)
        bos = self._tokenizer.bos_id
        if self._tokenizer.adds_bos and ids[:1].tolist() != [bos]:
            ids = np.concatenate([[bos], ids]).astype(np.int64)
        return ids

    def _look_into(
        self, layers: Sequence[int] | None, recipe: str | Recipe, context: int | None
    ) -> Lens:
        model = self._need_decoder("layers")
        chosen = self.find_recipe(recipe, context=context)
        intake = Intake(chosen, self._tokenizer, self.vocab_size)
        return Lens(
            model,
            self._runner,
            self._head,
            intake,
            check_layers(layers, model.spec.num_layers),
            max_batch_tokens=self.max_batch_tokens,
        )

    def _need_decoder(self, field: str) -> Decoder:
        if not isinstance(self._model, Decoder):
            raise ValueError(
                f"{field}: transformers runs this model, and its layers are its own; use its "
                "forward hooks and its generate"
            )
        return self._model

    def _check_states(self) -> None:
        if self.hidden_size is None:
            raise ValueError(f"on_states: {NO_STATES}")

    def take_device_seconds(self) -> float:
        """Seconds that the device was at work on batches that were done since this was asked last.

        Batches overlap from call to call: whoever asks gets what others have launched as well.
        """
        return self._runner.take_device_seconds()

    def find_recipe(self, recipe: str | Recipe, **settings: Any) -> Recipe:
        """The recipe as it would run on this model, context and stride resolved."""
        return find_recipe(recipe, **settings).resolve(self.max_positions)


def name_device(device: torch.device) -> str:
    """What people call a device: "NVIDIA H200", "AMD EPYC, 2 threads"."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        named = re.search(r"^model name\s*: (.+)$", cpuinfo.read_text(), re.MULTILINE)
        name = named[1] if named else name
    return f"{name}, {torch.get_num_threads()} threads"


def _empty(num_rows: int, num_columns: int, dtype: torch.dtype) -> torch.Tensor:
    """Host memory that is not written yet, [rows, columns], in large pages where they can be had.

    numpy asks the system for them and torch does not; in small ones, the first writing takes
    longer than the copy.
    """
    num_bytes = num_rows * num_columns * dtype.itemsize
    return torch.from_numpy(np.empty(num_bytes, np.uint8)).view(dtype).view(num_rows, num_columns)


def _copy(chunk: Sequence[StreamedRows], results: Sequence[torch.Tensor]) -> None:
    for rows in chunk:
        stop = rows.first_row + len(rows.values)
        results[rows.request][rows.first_row : stop] = rows.values


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
