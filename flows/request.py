"""What a caller asks for, checked, and made into a plan and a job that tasks can do."""

from __future__ import annotations

import json
import os
import re
import socket
import uuid
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from ..engine.checkpoint import digest, find_model, read_config
from ..engine.head import most_rows
from ..engine.intake import Intake, check_vocabulary, doubt_vocabulary
from ..engine.pipeline import EngineSettings, ModelFacts, inspect_model, name_device
from ..engine.recipes import Recipe, find_recipe
from ..engine.tokenization import Tokenizer
from .cluster import ask, check_workers, is_address
from .corpus import CorpusError, CorpusSpec, NothingLeft, plan_corpus, read_shard
from .corpus.plan import Input, Plan
from .folder import Folder, Part, endpoint_options
from .kept import OF_TIERS, WHOLE, check_kept, check_ranges, check_tiers, row_bytes
from .parts import LOGITS_DTYPES
from .store import MANIFEST, PLAN, find_receipts, hash_json
from .versions import versions

_URI = re.compile(r"(?<![^ ])uri=(?=['\"])")
_SAMPLE_DOCUMENTS, _SAMPLE_CHARS = 50, 1 << 18
_READERS = 8


@dataclass(frozen=True, kw_only=True)
class Request:
    """The arguments of `score_corpus`. Raises ValueError for what settings cannot be made of."""

    model: str
    corpus: str | CorpusSpec
    out: str
    recipe: str | Recipe = "rolling"
    tiers: Sequence[str] = ("scores",)
    engine: EngineSettings | None = None
    limit: int | None = None
    top_k: int | None = None
    num_draws: int | None = None
    draw_seed: int | None = None
    layers: Sequence[int] | None = None
    vocabulary: bool = False
    logits_dtype: str = "float32"
    max_logits_bytes: int = 10 * 10**9
    endpoint_url: str | None = None
    workers: str | None = None
    deadline: float = 900.0
    only_new: bool = False
    catalog: str | None = None

    def __post_init__(self) -> None:
        """Make settings of mappings of their fields, which is how a deployment gives them."""
        for name, kind, other, works in (
            ("corpus", CorpusSpec, str, "text or CorpusSpec"),
            ("recipe", Recipe, str, "text or Recipe"),
            ("engine", EngineSettings, type(None), "EngineSettings"),
        ):
            value = getattr(self, name)
            if not isinstance(value, (kind, other)):
                object.__setattr__(self, name, _make_settings(name, kind, value, works))

    def public(self) -> dict[str, Any]:
        """The arguments as a server may know them: without what opens the corpus."""
        corpus = self.corpus
        if isinstance(corpus, CorpusSpec):
            corpus = replace(corpus, storage_options={})
        return {**vars(self), "corpus": corpus}


@dataclass(frozen=True)
class Job:
    """All that a task needs to score any shard of a run."""

    folder: Folder
    corpus: CorpusSpec
    model: str
    """Local model folder; the model's name where `is_elsewhere`."""
    model_options: Mapping[str, Any]
    """What opens it where the name is a URI."""
    digest: str
    """Of the model's files: another one is another model, under whatever name."""
    engine: EngineSettings
    recipe: Recipe
    tiers: Sequence[str]
    top_k: int
    """Of the tier `topk`; 0 where that is not kept."""
    num_draws: int
    """Of the tier `sampled`; 0 where that is not kept."""
    draw_seed: int
    layers: Sequence[int]
    """Of the tier `lens`; none where that is not kept."""
    vocabulary: bool
    """Whether the table `vocabulary` is made."""
    logits_dtype: str
    max_logits_bytes: int
    num_shards: int
    run_key: str
    made: str
    """`Description.made` of what the run was planned for."""
    is_elsewhere: bool
    """Whether tasks may run on other machines, which find the model for themselves."""
    attempt: str
    """Of one attempt of the flow alone, which sets it."""


@dataclass(frozen=True)
class Description:
    """What a model is, and what would compute it, in the process that was asked."""

    facts: ModelFacts
    linears: Mapping[str, str]
    """How linears are stored, and what they run as."""
    device: str
    versions: Mapping[str, str]

    @property
    def made(self) -> str:
        """What decides last bits: "NVIDIA H200, torch 2.13.0, triton 3.9.0"."""
        return ", ".join([self.device, *(f"{k} {v}" for k, v in self.versions.items())])


def describe(model_folder: Path, engine: EngineSettings) -> Description:
    """Check a model and what would compute it here.

    Raises:
        ValueError: naming what is wrong with the model or the settings.
    """
    facts = inspect_model(model_folder, engine)
    scheme = engine.resolve_scheme(read_config(model_folder))
    linears = {str(stored): str(run) for stored, run in scheme.runs.items()}
    return Description(facts, linears, name_device(engine.resolve_device()), versions())


@contextmanager
def _sign(root: Folder) -> Iterator[str | None]:
    """A file below a local `root`, by which workers tell that they write to the same place."""
    if not root.is_local:
        yield None
        return
    root.check_writable()
    path = Path(root.path(f".workers-{uuid.uuid4().hex}"))
    path.touch()
    try:
        yield str(path)
    finally:
        path.unlink(missing_ok=True)


def _find_and_describe(
    model: str, options: Mapping[str, Any], engine: EngineSettings, sign: str | None
) -> tuple[Description, str]:
    """Of a model where this runs: its description and the digest of its files."""
    if sign is not None and not Path(sign).exists():
        raise ValueError(
            f"out: {str(Path(sign).parent)!r} is another folder on {socket.gethostname()}; "
            "give one that all workers share, or object storage"
        )
    folder = find_model(model, storage_options=options)
    return describe(folder, engine), digest(folder)


def _agree(answers: Mapping[str, tuple[Description, str]]) -> tuple[Description, str]:
    """What all workers say of themselves and of the model; ValueError if they differ."""
    (first, (description, model_digest)), *others = answers.items()
    for worker, (other, other_digest) in others:
        if other.made != description.made:
            raise ValueError(
                f"workers: {first} has {description.made}, and {worker} has {other.made}; give the "
                "run workers of one kind"
            )
        if other_digest != model_digest:
            raise ValueError(
                f"model: {first} and {worker} find other files under its name; give all workers "
                "the same model"
            )
    return description, model_digest


class NothingNew(Exception):
    """Complete runs have scored every input of the corpus."""

    def __init__(self, out: str) -> None:
        super().__init__(f"{out}: its runs hold all of the corpus, there is nothing new to score")
        self.uri = out


@dataclass(frozen=True)
class Prepared:
    """A request that can be carried out."""

    request: Request
    job: Job
    plan: Plan
    facts: ModelFacts
    described: Mapping[str, Any]
    """What `plan.json` holds."""
    logits_bytes: int | None
    """About what logits or hidden states will take; None if neither are kept."""
    other: str | None
    """A line on a run that other software or another device made of the same, if there is one."""
    doubt: str | None
    """A line on a tokenizer that may be another model's, if it may."""

    def write_plan(self) -> None:
        """Put the plan in place, if it is not there."""
        if self.job.folder.read_json(PLAN) is None:
            self.job.folder.write_json(PLAN, self.described)

    def is_complete(self) -> bool:
        """Whether the run stands: its manifest, and every part that manifest and receipts name."""
        folder, num_shards = self.job.folder, len(self.plan.shards)
        manifest = folder.read_json(MANIFEST)
        if manifest is None:
            return False
        summaries = [Part(**part) for part in manifest["summaries"]]
        return folder.holds(summaries) and len(find_receipts(folder, num_shards)) == num_shards


def check_settings(request: Request) -> list[str]:
    """Check what needs neither the model nor the corpus; returns the tiers, in their order.

    Raises:
        ValueError: naming the field, its value and what would work.
    """
    tiers = check_tiers(request.tiers)
    if request.logits_dtype not in LOGITS_DTYPES:
        raise ValueError(
            f"logits_dtype: {request.logits_dtype!r} is not one of {', '.join(LOGITS_DTYPES)}"
        )
    if request.deadline <= 0:
        raise ValueError(f"deadline: {request.deadline} s is not more than 0")
    check_workers(request.workers)
    check_ranges(request, tiers)
    return tiers


def prepare(request: Request) -> Prepared:
    """Check everything that can be checked before the model is loaded. Leaves nothing behind.

    Raises:
        ValueError: naming the field, its value and what would work.
    """
    engine = request.engine or EngineSettings()
    tiers = check_settings(request)
    is_elsewhere = is_address(request.workers)
    spec = _make_spec(request)
    root = Folder(request.out, endpoint_options(request.out, request.endpoint_url))
    if request.catalog is not None:
        from .catalog import check_catalog

        check_catalog(request.catalog, root)
    model_options = endpoint_options(request.model, request.endpoint_url)
    # Where others compute, the weights are their business.
    model_folder = find_model(
        request.model, storage_options=model_options, headers_only=is_elsewhere
    )
    if is_elsewhere:
        model = os.path.abspath(model_folder) if Path(request.model).is_dir() else request.model
        assert request.workers is not None
        with _sign(root) as sign:
            answers = ask(request.workers, _find_and_describe, model, model_options, engine, sign)
        description, model_digest = _agree(answers)
        spec = replace(spec, uri=_absolute(spec.uri))
    else:
        model, description = str(model_folder), describe(model_folder, engine)
        model_digest = digest(model_folder)
    facts = description.facts
    if engine.logits_memory is not None:
        most_rows(facts.vocab_size, facts.device, engine.logits_memory)
    recipe = find_recipe(request.recipe).resolve(facts.max_positions)
    tokenizer = Tokenizer.load(model_folder, trust_remote_code=engine.trust_remote_code)
    prefix = _check_fit(recipe, spec, tokenizer, facts.vocab_size, model_folder)
    kept = check_kept(request, tiers, facts)
    if recipe.concatenate:
        # One stream is one document, so it is one shard.
        spec = replace(spec, shard_bytes=1 << 60)
    asked: dict[str, Any] = {
        "format": 1,
        "model": {
            "digest": model_digest,
            "architecture": facts.architecture,
            "vocab_size": facts.vocab_size,
        },
        "engine": {
            "dtype": facts.dtype,
            "linears": dict(description.linears),
            "fp8_head": engine.fp8_head,
        },
        "recipe": asdict(recipe),
        "tiers": tiers,
        "logits_dtype": request.logits_dtype if "logits" in tiers else None,
        "top_k": kept.top_k,
        "num_draws": kept.num_draws,
        "draw_seed": kept.draw_seed,
        "layers": kept.layers,
        "vocabulary": request.vocabulary or None,
    }
    try:
        plan = _plan_new(root, asked, spec) if request.only_new else plan_corpus(spec)
    except NothingLeft:
        raise NothingNew(request.out) from None
    except CorpusError as error:
        if not isinstance(request.corpus, str):
            raise
        # Who gave a name alone has never heard of the field that it became.
        raise CorpusError(_URI.sub("corpus=", str(error))) from None
    logits_bytes = None
    if WHOLE & set(tiers):
        logits_bytes = _check_size(request, tiers, spec, plan, tokenizer, facts)
    root.check_writable()

    described: dict[str, Any] = {
        **asked,
        "uri": _make_spec(request).uri,
        "model": {"name": request.model, **asked["model"]},
        "quantization": facts.quantization,
        "device": description.device,
        "versions": dict(description.versions),
        "recipe_hash": recipe.hash,
        "prefix_token": prefix,
        "tokenizer": None if tokenizer is None else tokenizer.digest,
        "reading": spec.reading(),
        "shard_bytes": spec.shard_bytes,
        "corpus": plan.to_dict(),
    }
    described["run_key"] = run_key = _make_key(described)
    folder = root.below(run_key)
    found = folder.read_json(PLAN)
    if found is not None and Plan.from_dict(found["corpus"]).shards != plan.shards:
        raise ValueError(
            f"out: {folder.uri!r} holds a run of these settings whose shards were cut otherwise; "
            "remove it, or give another folder"
        )
    job = Job(
        folder=folder,
        corpus=spec,
        model=model,
        model_options=model_options,
        digest=model_digest,
        engine=engine,
        recipe=recipe,
        tiers=tiers,
        top_k=kept.top_k or 0,
        num_draws=kept.num_draws or 0,
        draw_seed=kept.draw_seed or 0,
        layers=kept.layers or (),
        vocabulary=request.vocabulary,
        logits_dtype=request.logits_dtype,
        max_logits_bytes=request.max_logits_bytes,
        num_shards=len(plan.shards),
        run_key=run_key,
        made=description.made,
        is_elsewhere=is_elsewhere,
        attempt="",
    )
    other = _find_other(root, described) if found is None else None
    doubt = None
    if tokenizer is not None and spec.ids_column is None:
        doubt = doubt_vocabulary(tokenizer, facts.vocab_size, read_config(model_folder))
    return Prepared(request, job, plan, facts, described, logits_bytes, other, doubt)


def _absolute(uri: str) -> str:
    """A corpus as other processes of this machine find it, whatever folder they are in."""
    is_path = "://" not in uri and not uri.startswith("datasets:")
    return os.path.abspath(os.path.expanduser(uri)) if is_path else uri


def _plan_new(root: Folder, asked: Mapping[str, Any], spec: CorpusSpec) -> Plan:
    """A plan of the inputs that no complete run below `root` of the same settings has scored.

    What an unfinished run has begun comes first, and alone: it is resumed so.
    """
    if spec.limit is not None:
        raise ValueError(
            f"limit: {spec.limit} cannot go with only_new, which tells inputs that were scored "
            "whole; leave one of them out"
        )
    scored, begun = _inputs_of_runs(root, asked, spec)
    plan = plan_corpus(spec, leave_out=lambda input_: _content(input_) in scored)
    new = {_content(input_) for input_ in plan.inputs}
    for inputs in begun:
        if inputs and inputs < new:
            return plan_corpus(spec, leave_out=lambda i, kept=inputs: _content(i) not in kept)  # type: ignore[misc]
    return plan


_Contents = set[tuple[str, int, str]]


def _inputs_of_runs(
    root: Folder, asked: Mapping[str, Any], spec: CorpusSpec
) -> tuple[_Contents, list[_Contents]]:
    """Inputs of all complete runs below `root` that were asked the same, and of each other one."""
    # As a plan that was written and read.
    same = json.loads(json.dumps({**asked, "reading": spec.reading()}))
    scored: _Contents = set()
    begun: list[_Contents] = []
    names = [name for name in root.folders() if not name.startswith(".")]
    with ThreadPoolExecutor(_READERS) as pool:
        # A plan is large, what is kept of it is not.
        for inputs, is_complete in pool.map(lambda n: _inputs_of_run(root.below(n), same), names):
            if is_complete:
                scored |= inputs
            else:
                begun.append(inputs)
    return scored, begun


def _inputs_of_run(folder: Folder, same: Mapping[str, Any]) -> tuple[_Contents, bool]:
    """A run's inputs, none if it was asked something else, and whether it is complete."""
    plan = folder.read_json(PLAN)
    if (
        plan is None
        or {key: plan.get(key) for key in same}
        | {"model": {key: plan["model"].get(key) for key in same["model"]}}
        != same
    ):
        return set(), True
    inputs = {_content(Input(**input_)) for input_ in plan["corpus"]["inputs"]}
    return inputs, folder.size(MANIFEST) is not None


def _content(input_: Input) -> tuple[str, int, str]:
    return input_.format, input_.size, input_.etag


# Hex digits of a run key: of what is asked for, and of what answers it.
_ASKED_DIGITS, _MADE_DIGITS = 11, 5


def _make_key(plan: Mapping[str, Any]) -> str:
    """A hash of what decides the numbers; runs that differ in their last bits alone begin alike.

    The same model under another name gives the same numbers, and so does the same corpus in
    another place.
    """
    names = ("format", "engine", "recipe", "tiers", "logits_dtype", "shard_bytes")
    asked = {name: plan[name] for name in names}
    # Where these are not kept, keys are what they are without them.
    kept = (*OF_TIERS, "vocabulary")
    asked |= {name: plan[name] for name in kept if plan[name] is not None}
    asked["model"] = {key: value for key, value in plan["model"].items() if key != "name"}
    asked["corpus"] = plan["corpus"]["fingerprint"]
    made = {name: plan[name] for name in ("device", "versions")}
    return hash_json(asked)[:_ASKED_DIGITS] + hash_json(made)[:_MADE_DIGITS]


def _find_other(root: Folder, described: Mapping[str, Any]) -> str | None:
    """A line on a run below `root` that other makers made of the same, None if there is none."""
    key = described["run_key"]
    for name in root.folders():
        if name == key or not name.startswith(key[:_ASKED_DIGITS]):
            continue
        plan = root.below(name).read_json(PLAN)
        if plan is not None:
            return (
                f"{root.below(name).uri} holds the same with {_contrast(plan, described)}; "
                "last bits can differ, so this is a run of its own"
            )
    return None


def _contrast(plan: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """Which makers two plans do not share: "torch 2.12.0, not 2.13.0"."""
    ours, theirs = other["versions"], plan["versions"]
    found = [
        f"{name} {theirs.get(name, 'absent')}, not {ours.get(name, 'absent')}"
        for name in sorted({*ours, *theirs})
        if ours.get(name) != theirs.get(name)
    ]
    if plan["device"] != other["device"]:
        found.append(f"device {plan['device']}, not {other['device']}")
    return "; ".join(found)


def _make_settings(name: str, kind: Any, value: Any, works: str) -> Any:
    """Settings of a mapping of their fields; ValueError, naming the argument, for anything else."""
    if not isinstance(value, Mapping):
        raise ValueError(
            f"{name}: {value!r} is no {works}, nor a mapping of {kind.__name__}'s fields"
        )
    known = [field.name for field in fields(kind)]
    for field in value:
        if field not in known:
            raise ValueError(f"{name}: {field!r} is not one of {', '.join(known)}")
    return kind(**value)


def _make_spec(request: Request) -> CorpusSpec:
    """The corpus to read, with what the other arguments say of it."""
    corpus = request.corpus
    spec = CorpusSpec(uri=corpus) if isinstance(corpus, str) else corpus
    options = {**endpoint_options(spec.uri, request.endpoint_url), **spec.storage_options}
    limit = spec.limit if request.limit is None else request.limit
    return replace(spec, storage_options=options, limit=limit)


def _check_fit(
    recipe: Recipe, spec: CorpusSpec, tokenizer: Tokenizer | None, vocab_size: int, folder: Path
) -> int | None:
    """The token in front of documents.

    Raises:
        ValueError: for a recipe, a corpus, a tokenizer and a model that do not go together.
    """
    if tokenizer is None and spec.ids_column is None:
        raise ValueError(
            f"tokenizer: the model folder {str(folder)!r} has none, so text cannot be scored; add "
            "its tokenizer.json or score a column of token ids (ids_column)"
        )
    if tokenizer is not None and spec.ids_column is None:
        check_vocabulary(tokenizer, vocab_size)
    # It refuses a prefix that the tokenizer or the model does not have.
    prefix = Intake(recipe, tokenizer, vocab_size).prefix
    if spec.messages_column is not None and tokenizer and not tokenizer.has_template:
        raise ValueError(
            f"messages_column: {spec.messages_column!r} needs a chat template, which the model's "
            "tokenizer does not have; score a column of text (text_column)"
        )
    if recipe.name == "conditional" and spec.context_column is None:
        raise ValueError(
            "context_column: None, but the recipe conditional needs the column that is read and "
            "not scored"
        )
    if recipe.name != "conditional" and spec.context_column is not None:
        raise ValueError(
            f"context_column: {spec.context_column!r} is not read by the recipe {recipe.name}; "
            "use conditional, or leave it out"
        )
    if recipe.concatenate and spec.columns.text is None:
        raise ValueError(
            f"recipe: {recipe.name!r} reads the corpus as one stream of text, which chat messages "
            "and token ids are not; use rolling"
        )
    return prefix


def _check_size(
    request: Request,
    tiers: Sequence[str],
    spec: CorpusSpec,
    plan: Plan,
    tokenizer: Tokenizer | None,
    facts: ModelFacts,
) -> int:
    """About how many bytes logits or states of the corpus take, from a sample of its documents.

    Raises:
        ValueError: if that is more than the request allows.
    """
    tokens, sampled = 0, 0
    for i, document in enumerate(read_shard(spec, plan.shards[0])):
        if i >= _SAMPLE_DOCUMENTS or sampled >= _SAMPLE_CHARS:
            break
        if document.input_ids is not None:
            tokens += len(document.input_ids)
            sampled += 8 * len(document.input_ids)
        elif document.text is not None and tokenizer is not None:
            text = document.text[:_SAMPLE_CHARS]
            tokens += len(tokenizer.encode([text])[0].ids)
            sampled += len(text.encode("utf-8", "replace"))
    per_byte = tokens / sampled if sampled else 0.25
    num_tokens = int(plan.num_bytes * per_byte)
    expected = num_tokens * row_bytes(tiers, facts, request.logits_dtype)
    limit = request.max_logits_bytes
    if expected > limit:
        what = "hidden states" if "hidden" in tiers else "logits"
        raise ValueError(
            f"max_logits_bytes: {limit:,} bytes is less than the {expected:,} bytes that {what} of "
            f"about {num_tokens:,} tokens take; raise it to confirm, score fewer documents "
            "(limit), or keep tokens instead"
        )
    return expected
