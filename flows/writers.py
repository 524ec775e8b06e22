"""Which writers a shard's tiers take, and what the engine is asked for them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..engine.checkpoint import find_model
from ..engine.intake import Intake, join_stream
from ..engine.pipeline import Pipeline
from ..engine.records import Document
from ..engine.tokenization import Tokenizer
from .distributions import ArraysWriter, SampledWriter, TopKWriter
from .parts import DocumentsWriter, LensWriter, ScoresWriter, TokensWriter
from .rows import HiddenWriter, LogitsWriter, RowsWriter

if TYPE_CHECKING:
    from .request import Job

Writer = ScoresWriter | DocumentsWriter | RowsWriter

BY_TOKEN = ("tokens", "topk", "sampled", "lens")
"""Tiers whose size goes by the scored tokens, whatever the model."""


def open_writer(
    tier: str, path: Path, metadata: Mapping[str, str], job: Job, vocab_size: int
) -> ScoresWriter | DocumentsWriter:
    """The writer of `scores`, or of one of `BY_TOKEN`."""
    match tier:
        case "tokens":
            return TokensWriter(path, metadata)
        case "topk":
            return TopKWriter(path, metadata, top_k=job.top_k, vocab_size=vocab_size)
        case "sampled":
            draws = {"num_draws": job.num_draws, "draw_seed": job.draw_seed}
            return SampledWriter(path, metadata, **draws, vocab_size=vocab_size)
        case "lens":
            return LensWriter(path, metadata, layers=job.layers)
        case _:
            return ScoresWriter(path, metadata)


def asked_of_tokens(job: Job) -> dict[str, Any]:
    """What `Pipeline.score` is asked to tell of every token besides its record."""
    return {
        "top_k": job.top_k,
        "num_draws": job.num_draws,
        "draw_seed": job.draw_seed,
        "layers": job.layers,
    }


class Writers:
    """The writers of a shard's parts in a folder, `scores` last."""

    def __init__(self, job: Job, pipe: Pipeline, folder: Path, metadata: Mapping[str, str]) -> None:
        self.rows: RowsWriter | None = None
        """Of those that take rows while they are scored."""
        self.all: list[Writer] = []
        self.wanted = asked_of_tokens(job)
        """What `Pipeline.score` is asked for besides records."""
        self._job = job
        self._vocab_size = vocab_size = pipe.vocab_size
        for tier in BY_TOKEN:
            if tier in job.tiers:
                self.all.append(open_writer(tier, folder / tier, metadata, job, vocab_size))
        if "hidden" in job.tiers:
            assert pipe.hidden_size is not None and pipe.head_digest is not None
            hidden = HiddenWriter(
                folder / "hidden",
                metadata,
                dtype=pipe.dtype,
                hidden_size=pipe.hidden_size,
                head_digest=pipe.head_digest,
            )
            self.rows, self.wanted["on_states"] = hidden, hidden.add_rows
        if "logits" in job.tiers:
            logits = LogitsWriter(folder / "logits", metadata, dtype=job.logits_dtype)
            self.rows, self.wanted["on_logits"] = logits, logits.add_rows
            self.wanted["logits_dtype"] = job.logits_dtype
        if self.rows is not None:
            self.all.append(self.rows)
        self.all.append(open_writer("scores", folder / "scores", metadata, job, vocab_size))

    def check(self, documents: Iterable[Document]) -> Iterator[Document]:
        """The documents to score, each once it is certain that the parts can hold it.

        Where the recipe reads them as one stream, that is the document.

        Raises:
            ValueError: for one that is too long, while there is nothing of it to lose.
        """
        writers = [writer for writer in self.all if isinstance(writer, ArraysWriter)]
        most = min((writer.most_tokens for writer in writers), default=None)
        if most is not None and self._job.recipe.concatenate:
            documents = join_stream(documents)
        for document in documents:
            if most is not None and _may_exceed(document, most):
                num_tokens = self._count_scored(document)
                for writer in writers:
                    writer.check(document.doc_id, num_tokens)
            yield document

    def _count_scored(self, document: Document) -> int:
        """Tokens that are scored of a document, 0 of one that cannot be."""
        return sum(len(item.tokens) for item in self._intake.take([document]))

    @cached_property
    def _intake(self) -> Intake:
        job = self._job
        folder = find_model(
            job.model, storage_options=dict(job.model_options), headers_only=job.is_elsewhere
        )
        tokenizer = Tokenizer.load(folder, trust_remote_code=job.engine.trust_remote_code)
        return Intake(job.recipe, tokenizer, self._vocab_size)


def _may_exceed(document: Document, most: int) -> bool:
    """Whether a document may have more tokens than `most`, as it has more bytes.

    A chat's template and a tokenizer that rewrites text may make a few more of it: what slips
    through is refused when it is written.
    """
    if document.input_ids is not None:
        return len(document.input_ids) > most
    texts = (document.text or "", document.context or "", str(document.messages or ""))
    # Most are short enough whatever their characters take.
    if 4 * sum(map(len, texts)) <= most:
        return False
    return sum(len(text.encode("utf-8", "surrogatepass")) for text in texts) > most
