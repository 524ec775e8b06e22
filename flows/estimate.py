"""What a run will be: its tokens, its size in storage and its time, told from a sample of it.

Nothing is written but a few files in a temporary folder, which is removed again, and what the cache
of a model lacks.
"""

from __future__ import annotations

import random
import time
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow as pa

from ..engine.checkpoint import Checkpoint, find_model
from ..engine.frequencies import Frequencies
from ..engine.intake import Intake, Work
from ..engine.pipeline import load_pipeline
from ..engine.records import STATISTICS, TOKEN_DTYPES, Document, DocumentScore
from ..engine.tokenization import Tokenizer
from .corpus import read_shard
from .corpus.plan import Shard
from .folder import Folder
from .kept import OF_TIERS, row_bytes
from .parts import write_table
from .request import Job, Prepared
from .store import PLAN, Receipt, find_receipts
from .summary import Summary
from .vocabulary import tabulate
from .writers import BY_TOKEN, asked_of_tokens, open_writer

TABLES = "tables"
"""What summaries, receipts and the report are called among the sizes."""
# Of how many shards a sample is taken, how much of each is read, and how much of it tokenized.
_SHARDS, _READ_BYTES, _TAKEN_BYTES = 4, 64 << 20, 1 << 20
# The weights that are loaded to score a sample, and about what of it is scored: some seconds'
# worth, if a token is as many operations as the weights have bytes.
_LOADED_BYTES = {"cpu": 10**9, "cuda": 40 * 10**9}
_SAMPLE_FLOPS = {"cpu": 5e11, "cuda": 2e15}
_BYTES_A_TOKEN = 4
_RECEIPTS_READ = 32
# Of a receipt, and of the report.
_RECEIPT_BYTES, _REPORT_BYTES = 1500, 300_000
# Where nothing can be measured: what parts of the bundled model take. Zstandard makes about two
# thirds of token records, whose floats hardly compress.
_STATED_DOCUMENT, _STATED_SHARD = 280.0, 15_000.0
_STATED_ENTRY = 27.0
_STATED_TOKEN = 0.65 * sum(dtype.itemsize for dtype in TOKEN_DTYPES.values())
_STATED_LAYER = 0.8 * sum(TOKEN_DTYPES[name].itemsize for name in STATISTICS)
# Of a candidate (k of a token) and of a draw, and what each token takes besides.
_STATED_CANDIDATE, _STATED_DRAW, _STATED_BESIDE = 2.8, 0.8, 12.6


@dataclass(frozen=True)
class Sizes:
    """What parts take in storage, bytes."""

    shard: Mapping[str, float]
    """By tier, whatever a shard holds."""
    document: float
    """Of the scores, for every document."""
    token: Mapping[str, float]
    """Of other tiers, for every scored token."""
    source: str
    """How this is known."""


@dataclass(frozen=True)
class Rate:
    """How fast one process scores."""

    tokens_per_second: float
    source: str
    """How this is known."""


@dataclass(frozen=True)
class Estimate:
    """About what a run will be."""

    documents: int
    tokens: int
    """Scored."""
    num_sampled: int
    """Documents that tokens were counted in."""
    shards_left: int
    tokens_left: int
    """In the shards that are not done yet."""
    sizes: Mapping[str, int]
    """Bytes by tier, and of the `TABLES` beside them; logits and states before compression."""
    sized_by: str
    rate: Rate | None
    """None where it is not known."""

    @property
    def num_bytes(self) -> int:
        """All that the run keeps."""
        return sum(self.sizes.values())

    @property
    def seconds_left(self) -> float | None:
        """What one process needs for the shards that are not done yet."""
        return self.tokens_left / self.rate.tokens_per_second if self.rate else None


def estimate_run(prepared: Prepared) -> Estimate:
    """Tell what a prepared run will be.

    Documents of a few shards are read and tokenized. Speed and sizes are those of a run below the
    same root, if one was made of the same model, settings and tiers on such a device; else of a
    sample that is scored for some seconds, if the model is soon loaded here; else sizes are stated
    figures and the speed is unknown.
    """
    job, plan = prepared.job, prepared.plan
    done = find_receipts(job.folder, len(plan.shards))
    pending = [shard for shard in plan.shards if shard.index not in done]
    sample = _take_sample(prepared, pending or plan.shards)
    documents = plan.num_documents
    if job.recipe.concatenate:
        documents = 1
    elif documents is None:
        documents = round(plan.num_bytes * sample.documents_per_byte)
    tokens = round(plan.num_bytes * sample.tokens_per_byte)
    tokens_left = round(sum(shard.num_bytes for shard in pending) * sample.tokens_per_byte)
    measured = _find_earlier(prepared) or _score_sample(prepared, sample.documents)
    sizes, rate = measured or (_state_sizes(job, prepared.facts.vocab_size), None)
    rows = row_bytes(job.tiers, prepared.facts, job.logits_dtype) * tokens
    kept = {
        "scores": sizes.document * documents,
        **{tier: num_bytes * tokens for tier, num_bytes in sizes.token.items()},
        "hidden": rows,
        "logits": rows,
        TABLES: _RECEIPT_BYTES * len(plan.shards) + _REPORT_BYTES,
    }
    return Estimate(
        documents=documents,
        tokens=tokens,
        num_sampled=len(sample.documents),
        shards_left=len(pending),
        tokens_left=tokens_left,
        sizes={
            tier: round(kept[tier] + sizes.shard.get(tier, 0.0) * len(plan.shards))
            for tier in (*job.tiers, TABLES)
        },
        sized_by=sizes.source,
        rate=rate,
    )


@contextmanager
def without_traces(uri: str) -> Iterator[None]:
    """Remove the local folders that were made in the block to see whether they can be."""
    folder = Folder(uri)
    path = Path(folder.path("")).absolute()
    made = [p for p in (path, *path.parents) if folder.is_local and not p.exists()]
    try:
        yield
    finally:
        for one in made:
            # What somebody else has begun to use stays.
            with suppress(OSError):
                one.rmdir()


# ---- a sample of the corpus


@dataclass
class _Sample:
    """Documents of a few shards, and what their shards weigh."""

    documents: list[Document] = field(default_factory=list)
    num_read: int = 0
    read_bytes: int = 0
    """Of content, in the documents that were read."""
    weight: float = 0.0
    """Of these documents, in the plan's bytes."""
    taken_bytes: int = 0
    """Of content, in the documents that were taken."""
    tokens: int = 0
    """Scored, of these."""

    @property
    def documents_per_byte(self) -> float:
        return self.num_read / self.weight if self.weight else 0.0

    @property
    def tokens_per_byte(self) -> float:
        """Scored tokens by the plan's bytes."""
        if not self.taken_bytes or not self.weight:
            return 0.0
        return self.tokens / self.taken_bytes * self.read_bytes / self.weight


def _take_sample(prepared: Prepared, shards: Sequence[Shard]) -> _Sample:
    sample, count = _Sample(), min(_SHARDS, len(shards))
    for i in range(count):
        _take(sample, prepared.job, shards[i * len(shards) // count])
    job = prepared.job
    # Where others score, the tokenizer alone has come here.
    folder = find_model(job.model, storage_options=job.model_options, headers_only=job.is_elsewhere)
    tokenizer = Tokenizer.load(folder, trust_remote_code=job.engine.trust_remote_code)
    intake = Intake(job.recipe, tokenizer, prepared.facts.vocab_size)
    sample.tokens = sum(
        len(work.tokens) for work in intake.take(sample.documents) if isinstance(work, Work)
    )
    return sample


def _take(sample: _Sample, job: Job, shard: Shard) -> None:
    """Read a shard, or the beginning of a large one, and take some of its documents."""
    rng = random.Random(shard.index)
    share = _TAKEN_BYTES / max(shard.num_bytes, 1)
    num_read, read_bytes, is_cut, compressor = 0, 0, False, zlib.compressobj()
    compressed = 0
    is_compressed = any(piece.stop is None for piece in shard.pieces)
    for document in read_shard(job.corpus, shard):
        content = _content(document)
        num_read += 1
        read_bytes += len(content)
        if is_compressed:
            compressed += len(compressor.compress(content))
        if rng.random() < share or num_read == 1:
            taken = _shortened(document)
            sample.documents.append(taken)
            sample.taken_bytes += len(_content(taken))
        if read_bytes >= _READ_BYTES:
            is_cut = True
            break
    weight: float = shard.num_bytes
    if is_cut and shard.num_documents:
        weight *= num_read / shard.num_documents
    elif is_cut:
        # As if there were nothing else in the file.
        packed = compressed + len(compressor.flush())
        weight = min(weight, packed if is_compressed else read_bytes)
    sample.num_read += num_read
    sample.read_bytes += read_bytes
    sample.weight += weight


def _content(document: Document) -> bytes:
    """What there is to score of a document, as bytes."""
    if document.input_ids is not None:
        return np.asarray(document.input_ids, np.int64).tobytes()
    texts = [document.context or "", document.text or ""]
    texts += [str(message.get("content", "")) for message in document.messages or ()]
    return "".join(texts).encode("utf-8", "replace")


def _shortened(document: Document) -> Document:
    """The document, or the beginning of one that would take long to tokenize."""
    if document.text is None or len(document.text) <= _TAKEN_BYTES:
        return document
    return replace(document, text=document.text[:_TAKEN_BYTES])


# ---- sizes and speed


def _find_earlier(prepared: Prepared) -> tuple[Sizes, Rate] | None:
    """Sizes and speed of the largest run of the same below the same root, if there is one."""
    root = Folder(prepared.job.folder.uri.rpartition("/")[0] or ".", prepared.job.folder.options)
    best: tuple[str, list[Receipt]] | None = None
    for name in root.folders():
        plan = None if name.startswith(".") else root.below(name).read_json(PLAN)
        if plan is None or not _is_alike(plan, prepared.described):
            continue
        receipts = _read_some(root.below(name), len(plan["corpus"]["shards"]))
        if best is None or _count(receipts) > _count(best[1]):
            best = root.below(name).uri, receipts
    if best is None or not _count(best[1]):
        return None
    uri, receipts = best
    seconds = sum(receipt.seconds for receipt in receipts)
    sums: dict[str, float] = {}
    for receipt in receipts:
        for part in receipt.parts:
            tier = part.name.split("/")[0].replace("shards", TABLES)
            sums[tier] = sums.get(tier, 0.0) + part.bytes
    source = f"as in {uri}"
    sizes = Sizes(
        shard={TABLES: sums.get(TABLES, 0.0) / len(receipts)},
        document=sums["scores"] / sum(receipt.documents for receipt in receipts),
        token={tier: sums.get(tier, 0.0) / _count(receipts) for tier in BY_TOKEN},
        source=source,
    )
    return sizes, Rate(_count(receipts) / seconds, source)


def _is_alike(plan: Mapping[str, Any], described: Mapping[str, Any]) -> bool:
    """Whether two plans are of the same work for a token on the same kind of device."""
    names = ("engine", "device", "recipe_hash", "tiers", "logits_dtype", "vocabulary", *OF_TIERS)
    return plan["model"]["digest"] == described["model"]["digest"] and all(
        plan.get(name) == described[name] for name in names
    )


def _read_some(folder: Folder, num_shards: int) -> list[Receipt]:
    there = folder.sizes("shards")
    done = [shard for shard in range(num_shards) if Receipt.name(shard) in there]
    step = max(1, len(done) // _RECEIPTS_READ)
    read = (Receipt.read(folder, shard) for shard in done[::step][:_RECEIPTS_READ])
    return [receipt for receipt in read if receipt is not None]


def _count(receipts: Sequence[Receipt]) -> int:
    return sum(receipt.tokens for receipt in receipts)


def _score_sample(
    prepared: Prepared, documents: Sequence[Document]
) -> tuple[Sizes, Rate | None] | None:
    """Sizes and speed of a sample that is scored here; None where the model takes long to load."""
    job, device = prepared.job, prepared.facts.device
    if job.is_elsewhere or not documents:
        return None
    folder = Path(job.model)
    num_bytes = Checkpoint.open(folder).check_files().num_bytes
    if num_bytes > _LOADED_BYTES[device]:
        return None
    pipe = load_pipeline(folder, job.engine)
    batches: list[tuple[float, int]] = []
    frequencies = Frequencies() if job.vocabulary else None
    scores = pipe.score(
        _shuffled(documents, int(_BYTES_A_TOKEN * _SAMPLE_FLOPS[device] / num_bytes)),
        recipe=job.recipe,
        **asked_of_tokens(job),
        on_batch=lambda tokens, num_bytes: batches.append((time.monotonic(), tokens)),
        frequencies=frequencies,
    )
    started = time.monotonic()
    scored = list(scores)
    tables = [tabulate(frequencies.read(), pipe.spelled)] if frequencies is not None else []
    sizes = _measure(job, prepared.facts.vocab_size, scored, tables)
    # The first batch pays for what is done once.
    timed = batches if len(batches) > 2 else [(started, 0), *batches]
    seconds, tokens = timed[-1][0] - timed[0][0], sum(n for _, n in timed[1:])
    return sizes, Rate(tokens / seconds, sizes.source) if tokens and seconds > 0 else None


def _shuffled(documents: Sequence[Document], most_bytes: int) -> list[Document]:
    """Documents in no order, of so many bytes of content together, and one at least."""
    taken: list[Document] = []
    left = most_bytes
    for document in random.Random(0).sample(documents, len(documents)):
        left -= len(_content(document))
        if left >= 0 or not taken:
            taken.append(document)
    return taken


def _measure(
    job: Job, vocab_size: int, scores: Sequence[DocumentScore], more: Sequence[pa.Table]
) -> Sizes:
    """What parts of these documents take, and `more` tables of a shard."""
    summary = Summary()
    for score in scores:
        summary.add(score)
    tokens = [score.record.num_tokens_scored for score in scores]
    # What a part takes but for its rows is in one of a single document too.
    first = max(range(len(scores)), key=lambda i: tokens[i])
    others = sum(tokens) - tokens[first]
    shard: dict[str, float] = {}
    token: dict[str, float] = {}
    with TemporaryDirectory(prefix="logitmill-") as scratch:
        file = Path(scratch, "part")

        def write(tier: str, kept: Iterable[DocumentScore]) -> int:
            writer = open_writer(tier, file, {}, job, vocab_size)
            for score in kept:
                writer.add(score)
            writer.close()
            return file.stat().st_size

        one = write("scores", [scores[first]])
        document = float(one)
        if len(scores) > 1:
            document = (write("scores", scores) - one) / (len(scores) - 1)
        shard["scores"] = max(0.0, one - document)
        for tier in BY_TOKEN:
            if tier in job.tiers:
                one = write(tier, [scores[first]])
                token[tier] = one / max(1, tokens[first])
                if others:
                    token[tier] = (write(tier, scores) - one) / others
                shard[tier] = max(0.0, one - token[tier] * tokens[first])
        tables = 0.0
        for table in (summary.counts(), summary.outliers(), *more):
            write_table(table, file)
            tables += file.stat().st_size
    return Sizes(
        shard={**shard, TABLES: tables},
        document=document,
        token=token,
        source=f"from a sample of {len(scores):,} documents, {sum(tokens):,} tokens, scored here",
    )


def _state_sizes(job: Job, vocab_size: int) -> Sizes:
    tables = _STATED_SHARD + (_STATED_ENTRY * vocab_size if job.vocabulary else 0.0)
    token = {
        "tokens": _STATED_TOKEN,
        "topk": _STATED_BESIDE + _STATED_CANDIDATE * job.top_k,
        "sampled": _STATED_BESIDE + _STATED_DRAW * job.num_draws,
        "lens": _STATED_LAYER * len(job.layers),
    }
    return Sizes({TABLES: tables}, _STATED_DOCUMENT, token, "from stated figures")
