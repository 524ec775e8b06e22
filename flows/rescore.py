"""Scores documents of a run again, and compares them with what is stored."""

from __future__ import annotations

import random
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any

import numpy as np
import pyarrow as pa

from ..engine.checkpoint import digest, find_model, read_config
from ..engine.pipeline import EngineSettings, Pipeline, load_pipeline, name_device
from ..engine.recipes import Recipe
from ..engine.records import DOCUMENT_FIELDS, TOKEN_DTYPES, Document, DocumentScore
from ..engine.weights import Quantization
from .agreement import Distributions
from .contents import Finding
from .corpus import CorpusSpec, read_shard
from .corpus.plan import Plan, Shard
from .folder import Folder, endpoint_options, one_line
from .origin import find_corpus
from .parts import SCORES, PartFile
from .run import Run
from .store import Receipt
from .versions import versions

TOLERANCES = {"float32": 1e-3, "float16": 0.02, "bfloat16": 0.1}
"""What a document's mean log-probability may differ by where other software or another device
scored it, nats a token, by the dtype computed in. Of 80 texts that the bundled model scored on a
CPU and on an H200, none was more than 2e-6, 0.002 and 0.012 apart."""
_ROUNDED_TOLERANCE = 0.5
"""The same where linears are multiplied in 8 bits or fewer: none was more than 0.18 apart in fp8,
0.14 in int4 through fp8, 0.08 in int8."""
# What does not depend on who computes.
_EXACT = (
    *("doc_id", "source", "language", "day", "status", "recipe", "recipe_hash", "truncated"),
    *("num_tokens", "num_tokens_scored", "num_bytes", "num_chars", "num_words", "num_windows"),
    "zlib_bytes",
)
_EXACT_TOKENS = ("token_id", "byte_start", "byte_end")


def rescore(
    run: Run,
    receipts: Sequence[Receipt],
    *,
    sample: int,
    seed: int,
    engine: EngineSettings | None,
    endpoint_url: str | None,
    on_line: Callable[[str], None],
) -> list[Finding]:
    """Score up to `sample` documents of the shards of `receipts` again.

    They are spread over the shards; of a recipe that reads its corpus as one stream that stream is
    the document. Bits are compared where device and software are those of the shard's receipt,
    else sums within `TOLERANCES`. Logits are not compared: their bytes are their receipt's.

    Args:
        engine: device and memory; what decides the numbers is taken from the plan.
        on_line: is told how many documents were compared, and how.

    Returns:
        Documents that differ, and what keeps others from being scored again.
    """
    plan = run.plan
    chosen = _choose([receipt.documents for receipt in receipts], sample, seed)
    if not chosen:
        on_line("scored no document again: no shard that is whole has any")
        return []
    try:
        pipe, exact_here = _load(plan, engine or EngineSettings(), endpoint_url)
    except ValueError as error:
        return [Finding("not scored again", one_line(error))]
    try:
        spec = find_corpus(plan, endpoint_url)
    except ValueError as error:
        return [Finding("not scored again", one_line(error))]
    shards = Plan.from_dict(plan["corpus"]).shards
    recipe = Recipe(**plan["recipe"])
    findings: list[Finding] = []
    compared = {True: 0, False: 0}
    reasons: set[str] = set()
    for i, rows in chosen.items():
        receipt = receipts[i]
        reason = exact_here(receipt)
        tolerance = None if reason is None else _tolerance(plan)
        reasons |= {reason} if reason is not None else set()
        # Of this shard alone: what it takes is known by the place of a document in it.
        distributions = Distributions(run.folder, plan)
        try:
            scores = _score(pipe, recipe, spec, shards[receipt.shard], rows, distributions.wanted)
        except ValueError as error:
            findings.append(Finding("corpus", one_line(error)))
            continue
        for row, stored in _stored(run.folder, plan["tiers"], receipt.shard, rows):
            if row not in scores:
                findings.append(
                    Finding(stored.name, "the corpus has no such document in its shard any more")
                )
                continue
            compared[tolerance is None] += 1
            findings += stored.compare(scores[row], tolerance)
            findings += [
                Finding(stored.name, problem)
                for problem in distributions.compare(receipt.shard, scores[row], tolerance)
            ]
    total = sum(receipt.documents for receipt in receipts)
    if compared[True]:
        on_line(f"scored {compared[True]:,} of {total:,} documents again: compared bit for bit")
    if compared[False]:
        on_line(
            f"scored {compared[False]:,} of {total:,} documents again: compared within "
            f"{_tolerance(plan):g} nats a token, as bits can differ: {'; '.join(sorted(reasons))}"
        )
    return findings


def _choose(documents: Sequence[int], sample: int, seed: int) -> dict[int, list[int]]:
    """Rows to score again by the place of their shard: one in every equal part of the run."""
    starts = [0, *accumulate(documents)]
    total = starts[-1]
    rng, count = random.Random(seed), min(sample, total)
    chosen: dict[int, list[int]] = {}
    for part in range(count):
        first, last = part * total // count, (part + 1) * total // count
        at = rng.randrange(first, last)
        shard = bisect_right(starts, at) - 1
        chosen.setdefault(shard, []).append(at - starts[shard])
    return chosen


def _load(
    plan: Mapping[str, Any], engine: EngineSettings, endpoint_url: str | None
) -> tuple[Pipeline, Callable[[Receipt], str | None]]:
    """The model of the plan, and what says why a receipt's bits may differ from this machine's.

    Raises:
        ValueError: if the model is not there, is another one, or does not run here as planned.
    """
    name = plan["model"]["name"]
    folder = find_model(name, storage_options=endpoint_options(name, endpoint_url))
    if digest(folder) != plan["model"]["digest"]:
        raise ValueError(f"model: {name!r} is not the model that the plan was made for")
    config = read_config(folder)
    engine = replace(
        engine, dtype=plan["engine"]["dtype"], fp8_head=plan["engine"].get("fp8_head", False)
    )
    if engine.device is None:
        engine = replace(engine, device=_find_device(plan["device"]))
    pipe = load_pipeline(folder, _quantized(engine, config, plan["engine"].get("linears")))
    here = versions()

    def why_not(receipt: Receipt) -> str | None:
        if receipt.device != pipe.device_name:
            return f"scored on {receipt.device}, here is {pipe.device_name}"
        differ = [
            f"{key} {receipt.versions.get(key, 'absent')}, here is {here.get(key, 'absent')}"
            for key in sorted({*receipt.versions, *here})
            if receipt.versions.get(key) != here.get(key)
        ]
        return f"scored with {', '.join(differ)}" if differ else None

    return pipe, why_not


def _find_device(name: str) -> str | None:
    """`cpu` where that is what people call so and not the default device, else None."""
    default, cpu = EngineSettings().resolve_device(), EngineSettings(device="cpu").resolve_device()
    return "cpu" if name_device(cpu) == name != name_device(default) else None


def _quantized(
    engine: EngineSettings, config: Mapping[str, Any], linears: Mapping[str, str] | None
) -> EngineSettings:
    """The settings under which the checkpoint's linears run as in the plan.

    Raises:
        ValueError: if there are none on this device.
    """
    if linears is None:
        return engine
    for quantization in (None, *map(str, Quantization)):
        settings = replace(engine, quantization=quantization)
        try:
            scheme = settings.resolve_scheme(config)
        except ValueError:
            continue
        if {str(stored): str(run) for stored, run in scheme.runs.items()} == linears:
            return settings
    runs = ", ".join(f"{stored} as {run}" for stored, run in linears.items())
    raise ValueError(f"quantization: linears ran {runs}, which this device does not")


def _tolerance(plan: Mapping[str, Any]) -> float:
    runs = set(plan["engine"].get("linears", {}).values())
    is_plain = runs <= {str(Quantization.NONE)}
    return TOLERANCES[plan["engine"]["dtype"]] if is_plain else _ROUNDED_TOLERANCE


def _score(
    pipe: Pipeline,
    recipe: Recipe,
    spec: CorpusSpec,
    shard: Shard,
    rows: Sequence[int],
    wanted: Mapping[str, Any],
) -> dict[int, DocumentScore]:
    """Scores of the shard's documents that stand in these rows, by row."""
    if recipe.concatenate:
        everything = pipe.score(read_shard(spec, shard), recipe=recipe, **wanted)
        return {row: score for row, score in enumerate(everything) if row in rows}
    documents: dict[int, Document] = {}
    for row, document in enumerate(read_shard(spec, shard)):
        if row in rows:
            documents[row] = document
        if row == max(rows):
            break
    scores = pipe.score(documents.values(), recipe=recipe, **wanted)
    return dict(zip(documents, scores, strict=True))


class _Row:
    """What is stored of one document."""

    def __init__(self, name: str, record: dict[str, Any], tokens: dict[str, np.ndarray] | None):
        self.name = name
        self._record = record
        self._tokens = tokens

    def compare(self, score: DocumentScore, tolerance: float | None) -> list[Finding]:
        """What differs: in any bit, or by more than `tolerance` nats a token."""
        values = {name: [getattr(score.record, name)] for name in DOCUMENT_FIELDS}
        record = pa.Table.from_pydict(values, schema=SCORES).to_pylist()[0]
        fields = DOCUMENT_FIELDS if tolerance is None else _EXACT
        differ = [name for name in fields if _differ(self._record[name], record[name])]
        found = [
            Finding(
                self.name, f"{name} is stored as {self._record[name]!r}, and is {record[name]!r}"
            )
            for name in differ[:1]
        ]
        if differ[1:]:
            found = [replace(found[0], problem=f"{found[0].problem}; also {', '.join(differ[1:])}")]
        if tolerance is not None:
            found += self._beyond("nll_per_token", record, tolerance)
        return found + self._compare_tokens(score, tolerance)

    def _beyond(self, name: str, record: Mapping[str, Any], tolerance: float) -> list[Finding]:
        ours, theirs = self._record[name], record[name]
        if (ours is None) == (theirs is None) and (ours is None or abs(ours - theirs) <= tolerance):
            return []
        return [
            Finding(
                self.name,
                f"{name} is stored as {ours!r}, and is {theirs!r}: more than {tolerance:g} apart",
            )
        ]

    def _compare_tokens(self, score: DocumentScore, tolerance: float | None) -> list[Finding]:
        if self._tokens is None:
            return []
        exact = TOKEN_DTYPES if tolerance is None else _EXACT_TOKENS
        for name in exact:
            ours = self._tokens[name]
            theirs = np.ascontiguousarray(getattr(score.tokens, name), TOKEN_DTYPES[name])
            if len(ours) != len(theirs):
                return [
                    Finding(
                        self.name, f"{len(ours):,} tokens are stored, and it has {len(theirs):,}"
                    )
                ]
            bits = f"u{ours.itemsize}"
            if len(at := np.flatnonzero(ours.view(bits) != theirs.view(bits))):
                i = at[0]
                return [
                    Finding(
                        self.name,
                        f"{name} of token {i} is stored as {ours[i]}, and is {theirs[i]}; "
                        f"{len(at):,} of {len(ours):,} differ",
                    )
                ]
        if tolerance is not None and len(score.tokens):
            apart = float(np.abs(self._tokens["logprob"] - score.tokens.logprob).mean())
            if not apart <= tolerance:
                return [
                    Finding(
                        self.name,
                        f"logprob of its tokens is {apart:g} apart on average, more than "
                        f"{tolerance:g}",
                    )
                ]
        return []


def _differ(ours: Any, theirs: Any) -> bool:
    """Whether two values are not the same bits; NaN is itself, and 0.0 is not -0.0."""
    if isinstance(ours, float) and isinstance(theirs, float):
        return ours.hex() != theirs.hex()
    return bool(ours != theirs)


def _stored(
    folder: Folder, tiers: Sequence[str], shard: int, rows: Sequence[int]
) -> Iterator[tuple[int, _Row]]:
    """What is stored of a shard's rows, in order."""
    scores, tokens = (f"{tier}/part-{shard:05d}.parquet" for tier in ("scores", "tokens"))
    # A document without tokens has no row among them.
    with_tokens: dict[int, int] = {}
    if "tokens" in tiers:
        column = _take(folder, scores, None, ["num_tokens_scored"])["num_tokens_scored"]
        counts = column.to_numpy() > 0
        places = np.cumsum(counts) - 1
        with_tokens = {row: int(places[row]) for row in rows if counts[row]}
    records = _take(folder, scores, rows, None).to_pylist()
    lists = _take(folder, tokens, list(with_tokens.values()), None) if with_tokens else None
    places_of = {row: i for i, row in enumerate(with_tokens)}
    for row, record in zip(sorted(rows), records, strict=True):
        kept = None
        if "tokens" in tiers:
            kept = {name: np.zeros(0, dtype) for name, dtype in TOKEN_DTYPES.items()}
            if row in places_of and lists is not None:
                kept = {
                    name: lists[name][places_of[row]].values.to_numpy() for name in TOKEN_DTYPES
                }
        yield row, _Row(f"document {record['doc_id']!r} of shard {shard}", record, kept)


def _take(
    folder: Folder, name: str, rows: Sequence[int] | None, columns: list[str] | None
) -> pa.Table:
    """Rows of a part in order, or all; no more than the row groups that hold them is read."""
    with folder.filesystem.open(folder.path(name), "rb") as file:
        parquet = PartFile(file)
        if rows is None:
            return parquet.read(columns)
        taken, first = [parquet.schema_arrow.empty_table()], 0
        for group in range(parquet.num_row_groups):
            count = parquet.metadata.row_group(group).num_rows
            wanted = sorted(row - first for row in rows if first <= row < first + count)
            if wanted:
                taken.append(parquet.read_row_group(group, columns=columns).take(wanted))
            first += count
        return pa.concat_tables(taken)
