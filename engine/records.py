"""What goes into the engine and what comes out of it: documents and their records.

Everything here is plain data in host memory. Probabilities are natural logarithms (nats) in
float32; sums over a document are float64.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np

from .recipes import Window

OK, NONFINITE = "ok", "nonfinite"


@dataclass(frozen=True)
class Document:
    """One document to score. Exactly one of `text`, `messages`, `input_ids` is set, or `error`.

    A document that could not be read is still a document: it carries a `status` other than
    `"ok"` and an `error`, passes through the engine unscored and becomes a row that says so.
    """

    doc_id: str
    text: str | None = None
    messages: Sequence[Mapping[str, Any]] | None = None
    """Chat messages, rendered by the tokenizer's chat template."""
    input_ids: Sequence[int] | np.ndarray | None = None
    context: str | None = None
    """What precedes `text`, read but not scored (recipe `conditional` only)."""
    num_context: int = 0
    """How many of `input_ids` are such a context (recipe `conditional` only)."""
    source: str = ""
    language: str = ""
    day: str = ""
    """Of the document, as ISO 8601 writes it (`2026-11-23`), or nothing."""
    status: str = OK
    """`ok`, or why the document cannot be scored: `empty`, `too_short`, `invalid_utf8`,
    `invalid_ids`, `invalid_value`, `nonfinite`."""
    error: str | None = None


@dataclass
class TokenRecords:
    """One entry a scored token, in document order; every array has the same length n.

    The record of a token comes from the logits row that precedes it: row t of a sequence
    predicts token t + 1.
    """

    token_id: np.ndarray
    """int32 [n]."""
    byte_start: np.ndarray
    """int64 [n], offset into the UTF-8 document; 0 throughout where the document is ids."""
    byte_end: np.ndarray
    """int64 [n]; spans of neighbours touch, so that they add up to the document."""
    logprob: np.ndarray
    """float32 [n], nats: log p(token | everything before it in its window)."""
    entropy: np.ndarray
    """float32 [n], nats: -sum p log p."""
    varentropy: np.ndarray
    """float32 [n], nats^2: sum p (log p)^2 - entropy^2, never negative."""
    rank: np.ndarray
    """int32 [n]: 1 + number of tokens with a larger logit, so that ties share the better rank."""
    top1_id: np.ndarray
    """int32 [n]: the most likely token, the lowest id among equals."""
    top1_logprob: np.ndarray
    """float32 [n], nats."""
    logsumexp: np.ndarray
    """float32 [n], nats: logits are logprob + logsumexp."""
    top_ids: np.ndarray | None = None
    """int32 [n, k] if candidates are kept: the k most likely tokens, the lowest id first among
    equals."""
    top_logprobs: np.ndarray | None = None
    """float32 [n, k], nats."""
    log_tail_mass: np.ndarray | None = None
    """float32 [n], nats, if candidates are kept: log of the mass of all other tokens; -inf if there
    is none."""
    drawn_ids: np.ndarray | None = None
    """int32 [n, m] if tokens are drawn: m draws from the whole distribution, ascending."""
    lens: np.ndarray | None = None
    """float32 [n, L, 7] if layers are read: what each of L would have of `STATISTICS`, integers as
    their bits; see `split_lens`."""

    def __len__(self) -> int:
        return len(self.token_id)

    @property
    def num_bytes(self) -> int:
        """Of all arrays together."""
        return sum(values.nbytes for values in vars(self).values() if values is not None)

    @classmethod
    def empty(cls, num_tokens: int) -> TokenRecords:
        """Zero-filled records for `num_tokens` tokens."""
        return cls(**{name: np.zeros(num_tokens, dtype) for name, dtype in TOKEN_DTYPES.items()})

    def make_room(self, top_k: int, num_draws: int = 0, num_layers: int = 0) -> None:
        """Room for `top_k` candidates, `num_draws` draws and records of `num_layers` a token."""
        if top_k:
            self.top_ids = np.zeros((len(self), top_k), np.int32)
            self.top_logprobs = np.zeros((len(self), top_k), np.float32)
            self.log_tail_mass = np.zeros(len(self), np.float32)
        if num_draws:
            self.drawn_ids = np.zeros((len(self), num_draws), np.int32)
        if num_layers:
            self.lens = np.zeros((len(self), num_layers, len(STATISTICS)), np.float32)


TOKEN_DTYPES: dict[str, np.dtype] = {
    "token_id": np.dtype(np.int32),
    "byte_start": np.dtype(np.int64),
    "byte_end": np.dtype(np.int64),
    "logprob": np.dtype(np.float32),
    "entropy": np.dtype(np.float32),
    "varentropy": np.dtype(np.float32),
    "rank": np.dtype(np.int32),
    "top1_id": np.dtype(np.int32),
    "top1_logprob": np.dtype(np.float32),
    "logsumexp": np.dtype(np.float32),
}

STATISTICS = tuple(TOKEN_DTYPES)[3:]
"""What a row of logits says of its token, in the order of `kernels.logits.RowStatistics`."""


@dataclass
class DocumentRecord:
    """One row a document: sums and counts first, then the scores derived from them.

    Derived scores are null (None) where they are not defined: a document of ids has no bytes, a
    document that was not scored has no scores. Formulas: `metrics.py`.
    """

    doc_id: str
    source: str = ""
    language: str = ""
    day: str = ""
    status: str = OK
    error: str | None = None
    loglikelihood: float | None = None
    """Sum of the scored tokens' log-probabilities, nats, added in float64."""
    num_tokens: int = 0
    """Tokens of the document, a prefix token not counted."""
    num_tokens_scored: int = 0
    num_bytes: int = 0
    """UTF-8 bytes of the text that was scored (all of it, unless tokens were left out)."""
    num_chars: int = 0
    num_words: int | None = None
    """Pieces of a split at runs of whitespace (lm-evaluation-harness's rule); null unless all of
    the text was scored."""
    num_windows: int = 0
    truncated: bool = False
    """Whether tokens of the document were left out (recipe `truncated`, dropped tails)."""
    sum_entropy: float | None = None
    num_top1: int = 0
    """Scored tokens of rank 1."""
    zlib_bytes: int | None = None
    nll_per_token: float | None = None
    token_perplexity: float | None = None
    bits_per_byte: float | None = None
    byte_perplexity: float | None = None
    bits_per_char: float | None = None
    word_perplexity: float | None = None
    mean_entropy: float | None = None
    top1_accuracy: float | None = None
    min_k_prob_20: float | None = None
    min_k_plus_plus_20: float | None = None
    zlib_ratio: float | None = None
    recipe: str = ""
    recipe_hash: str = ""


DOCUMENT_FIELDS: tuple[str, ...] = tuple(f.name for f in fields(DocumentRecord))


@dataclass
class DocumentScore:
    """What the engine says of one document: its record and, if it was scored, its tokens."""

    index: int
    """Position of the document in the input."""
    record: DocumentRecord
    tokens: TokenRecords = field(default_factory=lambda: TokenRecords.empty(0))
    text: str | None = None
    """The text that was scored: the document's, or its messages as rendered."""
    first_input: int | None = None
    """The token that the first record follows: the prefix, or the document's own first token."""
    windows: Sequence[Window] = ()
    """What scored its tokens, in their order."""
