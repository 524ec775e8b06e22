"""Windows of documents -> packed batches -> records, in bounded memory and input order."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from . import metrics
from .head import Head, LogprobsSink, Model
from .intake import Intake, Work
from .packing import pack, rounds
from .recipes import Recipe, Window
from .records import Document, DocumentRecord, DocumentScore, TokenRecords
from .tokenization import Tokenizer

LogitsSink = Callable[[int, str, int, np.ndarray, np.ndarray], None]
"""(document index, doc_id, first row, logprobs [rows, V], logsumexp [rows]), rows in order."""

BatchSink = Callable[[int, int], None]
"""(scored tokens, their bytes) of a batch that is done, long before its documents may be."""

# Batches' worth of tokens that are sorted and packed together.
_ROUND_BATCHES = 4
# Logits that may wait in host memory to be handed over in order, bytes.
_LOGITS_ROUND = 64 << 20


@dataclass
class _Piece:
    """One window of a document, and where its targets lie in the document's records."""

    work: Work
    window: Window
    first: int
    logprobs: np.ndarray | None = None
    """Kept until the rows of the windows before it have been handed over."""

    @property
    def num_rows(self) -> int:
        return self.window.num_targets


class Scorer:
    """Scores documents by one resolved recipe with one model."""

    def __init__(
        self,
        model: Model,
        head: Head,
        tokenizer: Tokenizer | None,
        recipe: Recipe,
        *,
        max_batch_tokens: int,
    ) -> None:
        self._model = model
        self._head = head
        self._budget = max_batch_tokens
        self._intake = Intake(recipe, tokenizer, model.vocab_size)

    def score(
        self,
        documents: Iterable[Document],
        on_logits: LogitsSink | None = None,
        on_batch: BatchSink | None = None,
    ) -> Iterator[DocumentScore]:
        """Records of every document, in input order, as they are ready.

        A document that cannot be scored comes out with the `status` and `error` that say why.
        """
        budget = _ROUND_BATCHES * self._budget
        if on_logits is not None:
            budget = min(budget, _LOGITS_ROUND // (4 * self._model.vocab_size))
        for group in rounds(self._pieces(documents), budget):
            pieces = [item for item in group if isinstance(item, _Piece)]
            if on_logits is not None and len(pieces) == 1:
                # It may be longer than any round: nothing comes before it, so nothing waits.
                self._run(pieces, _hand_over(pieces[0], on_logits))
                _count(pieces, on_batch)
            else:
                lengths = [p.window.stop - p.window.start for p in pieces]
                for batch in pack(lengths, self._budget):
                    packed = [pieces[i] for i in batch]
                    self._run_batch(packed, keep=on_logits is not None)
                    _count(packed, on_batch)
            for item in group:
                if isinstance(item, DocumentScore):
                    yield item
                    continue
                work = item.work
                if on_logits is not None and item.logprobs is not None:
                    lse = work.tokens.logsumexp[item.first : item.first + item.num_rows]
                    on_logits(work.index, work.document.doc_id, item.first, item.logprobs, lse)
                    item.logprobs = None
                work.num_done += 1
                if work.num_done == len(work.windows):
                    yield self._finish(work)

    def _pieces(
        self, documents: Iterable[Document]
    ) -> Iterator[tuple[_Piece | DocumentScore, int]]:
        """Windows of all documents with their numbers of inputs; unscorable documents weigh 1."""
        for item in self._intake.take(documents):
            if isinstance(item, DocumentScore):
                yield item, 1
                continue
            first = 0
            for window in item.windows:
                yield _Piece(item, window, first), window.stop - window.start
                first += window.num_targets

    def _run_batch(self, pieces: Sequence[_Piece], *, keep: bool) -> None:
        """One packed batch; with `keep`, each window also gets its log-probabilities."""
        if not keep:
            self._run(pieces, None)
            return
        num_rows = sum(p.num_rows for p in pieces)
        kept_RV = np.empty((num_rows, self._model.vocab_size), np.float32)

        def keep_rows(rows: slice, logprobs_RV: np.ndarray, logsumexp_R: np.ndarray) -> None:
            kept_RV[rows] = logprobs_RV

        self._run(pieces, keep_rows)
        start = 0
        for piece in pieces:
            piece.logprobs = kept_RV[start : start + piece.num_rows]
            start += piece.num_rows

    def _run(self, pieces: Sequence[_Piece], on_logprobs: LogprobsSink | None) -> None:
        """One packed batch through the model; fills in the records of its windows."""
        lengths = [p.window.stop - p.window.start for p in pieces]
        ids = pad_ids([self._inputs(p) for p in pieces], self._model.block_rows)
        starts = np.cumsum([0, *lengths])
        rows = np.concatenate(
            [
                np.arange(p.window.first_target - p.window.start - 1, n) + start
                for p, n, start in zip(pieces, lengths, starts, strict=False)
            ]
        )
        targets = np.concatenate(
            [p.work.tokens.token_id[p.first : p.first + p.num_rows] for p in pieces]
        )
        with torch.inference_mode():
            hidden_TD = self._model.hidden(ids.to(self._model.device), lengths)
            hidden_RD = hidden_TD[torch.from_numpy(rows).to(self._model.device)]
            result = self._head.statistics(hidden_RD, targets, on_logprobs)
        columns = {name: column.numpy() for name, column in result._asdict().items()}
        start = 0
        for piece in pieces:
            stop = start + piece.num_rows
            into = slice(piece.first, piece.first + piece.num_rows)
            for name, column in columns.items():
                getattr(piece.work.tokens, name)[into] = column[start:stop]
            start = stop

    def _inputs(self, piece: _Piece) -> np.ndarray:
        ids = piece.work.sequence[piece.window.start : piece.window.stop]
        if piece.window.overwrite_first:
            ids = ids.copy()
            ids[0] = self._intake.prefix
        return ids

    def _finish(self, work: Work) -> DocumentScore:
        """The document's record from its complete token records."""
        tokens, record = work.tokens, self._intake.record(work.document)
        record.num_tokens = len(work.encoding.ids)
        record.num_windows = len(work.windows)
        bad = np.flatnonzero(~np.isfinite(tokens.logprob + tokens.entropy + tokens.varentropy))
        if len(bad):
            record.status = "nonfinite"
            record.error = (
                f"token {bad[0]} has a log-probability of {tokens.logprob[bad[0]]} in a "
                f"distribution of entropy {tokens.entropy[bad[0]]}"
            )
            return DocumentScore(index=work.index, record=record, text=work.text)
        record.truncated = work.truncated
        fill_scores(record, tokens, work.text, all_scored=len(tokens) == len(work.encoding.ids))
        return DocumentScore(index=work.index, record=record, tokens=tokens, text=work.text)


def _count(pieces: Sequence[_Piece], on_batch: BatchSink | None) -> None:
    if on_batch is None:
        return
    num_bytes = 0
    for piece in pieces:
        rows = slice(piece.first, piece.first + piece.num_rows)
        tokens = piece.work.tokens
        num_bytes += int((tokens.byte_end[rows] - tokens.byte_start[rows]).sum())
    on_batch(sum(piece.num_rows for piece in pieces), num_bytes)


def _hand_over(piece: _Piece, on_logits: LogitsSink) -> LogprobsSink:
    def hand_over(rows: slice, logprobs_RV: np.ndarray, logsumexp_R: np.ndarray) -> None:
        work = piece.work
        first = piece.first + rows.start
        on_logits(work.index, work.document.doc_id, first, logprobs_RV, logsumexp_R)

    return hand_over


def fill_scores(
    record: DocumentRecord, tokens: TokenRecords, text: str | None, *, all_scored: bool
) -> None:
    """Sums, counts and derived scores of a document from its token records.

    Bytes and characters are those of the scored tokens alone. Words are counted only where all
    of the text was scored, since a token may be part of a word.
    """
    n = len(tokens)
    s = float(tokens.logprob.sum(dtype=np.float64))
    record.loglikelihood = s
    record.num_tokens_scored = n
    record.sum_entropy = float(tokens.entropy.sum(dtype=np.float64))
    record.num_top1 = int((tokens.rank == 1).sum())
    record.nll_per_token = metrics.nll_per_token(s, n)
    record.token_perplexity = metrics.perplexity(s, n)
    record.mean_entropy = record.sum_entropy / n
    record.top1_accuracy = record.num_top1 / n
    record.min_k_prob_20 = metrics.min_k_prob(tokens.logprob, 0.2)
    record.min_k_plus_plus_20 = metrics.min_k_plus_plus(
        tokens.logprob, tokens.entropy, tokens.varentropy, 0.2
    )
    if text is None:
        return
    utf8 = text.encode()
    record.num_bytes = int((tokens.byte_end - tokens.byte_start).sum())
    # Continuation bytes begin with 10: every other byte begins a character.
    begun = np.cumsum(np.frombuffer(utf8, np.uint8) & 0xC0 != 0x80)
    begun = np.concatenate([[0], begun])
    record.num_chars = int((begun[tokens.byte_end] - begun[tokens.byte_start]).sum())
    record.zlib_bytes = metrics.zlib_bytes(utf8)
    record.zlib_ratio = metrics.zlib_ratio(s, n, record.zlib_bytes)
    if record.num_bytes:
        record.bits_per_byte = metrics.bits(s, record.num_bytes)
        record.byte_perplexity = metrics.perplexity(s, record.num_bytes)
    if record.num_chars:
        record.bits_per_char = metrics.bits(s, record.num_chars)
    if all_scored and record.num_bytes == len(utf8):
        record.num_words = metrics.count_words(text)
        record.word_perplexity = metrics.perplexity(s, record.num_words)


def pad_ids(sequences: Sequence[np.ndarray], multiple: int) -> torch.Tensor:
    """Sequences side by side, int64, padded with zeros to a multiple of rows."""
    total = sum(len(ids) for ids in sequences)
    packed = np.zeros(-(-total // multiple) * multiple, np.int64)
    packed[:total] = np.concatenate(sequences)
    return torch.from_numpy(packed)
