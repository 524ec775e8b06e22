"""Which writers a shard's tiers take, and what the engine is asked for them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..engine.pipeline import Pipeline
from .distributions import SampledWriter, TopKWriter
from .parts import DocumentsWriter, ScoresWriter, TokensWriter
from .rows import HiddenWriter, LogitsWriter, RowsWriter

if TYPE_CHECKING:
    from .request import Job

Writer = ScoresWriter | DocumentsWriter | RowsWriter


class Writers:
    """The writers of a shard's parts in a folder, `scores` last."""

    def __init__(self, job: Job, pipe: Pipeline, folder: Path, metadata: Mapping[str, str]) -> None:
        self.rows: RowsWriter | None = None
        """Of those that take rows while they are scored."""
        self.all: list[Writer] = []
        self.wanted: dict[str, Any] = {}
        """What `Pipeline.score` is asked for besides records."""
        vocab_size = pipe.vocab_size
        if "tokens" in job.tiers:
            self.all.append(TokensWriter(folder / "tokens", metadata))
        if "topk" in job.tiers:
            top = TopKWriter(folder / "topk", metadata, top_k=job.top_k, vocab_size=vocab_size)
            self.all.append(top)
            self.wanted["top_k"] = job.top_k
        if "sampled" in job.tiers:
            draws = {"num_draws": job.num_draws, "draw_seed": job.draw_seed}
            sampled = SampledWriter(folder / "sampled", metadata, **draws, vocab_size=vocab_size)
            self.all.append(sampled)
            self.wanted |= draws
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
        self.all.append(ScoresWriter(folder / "scores", metadata))
