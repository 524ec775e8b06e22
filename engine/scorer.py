"""Windows of documents -> packed batches -> records, in bounded memory and input order."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, groupby

import numpy as np
import torch

from . import metrics
from .ahead import run_ahead
from .head import BARE, Columns, Extras, Model
from .intake import Intake, Work
from .packing import pack, pack_alike, rounds_alike
from .prefixes import Branch
from .recipes import Recipe, Window
from .records import NONFINITE, Document, DocumentRecord, DocumentScore, TokenRecords
from .runner import Request, Runner, StreamedRows
from .tokenization import Tokenizer
from .transfer import Arrival

LogitsSink = Callable[[int, str, int, np.ndarray, np.ndarray], None]
"""(document index, doc_id, first row, logprobs [rows, V], logsumexp [rows]), rows in order."""

StatesSink = Callable[[int, str, int, torch.Tensor], None]
"""(document index, doc_id, first row, hidden states [rows, D]), rows in order."""

BatchSink = Callable[[int, int], None]
"""(scored tokens, their bytes) of a batch that is done, long before its documents may be."""

# Batches' worth of tokens that are sorted and packed together, but for the first: the model waits
# for it.
_ROUND_BATCHES = 4
# Batches made ready ahead of the model.
_READY = 4


@dataclass
class _Piece:
    """One window of a document, and where its targets lie in the document's records."""

    work: Work
    window: Window
    first: int
    key: np.uint64
    """What decides the document's draws."""
    group: int | None
    """Of the sums that its rows are added to."""
    shares: bool
    """Whether it is read given a context, which others may have, too."""
    branch: Branch | None = None
    """What it adds to the one before it, where it shares."""

    @property
    def num_rows(self) -> int:
        return self.window.num_targets


@dataclass
class _Batch:
    """Windows that run together, and what is complete once they have run, in input order."""

    pieces: list[_Piece]
    requests: list[Request]
    complete: list[_Piece | DocumentScore] = field(default_factory=list)


_Stream = Callable[[Iterable[Sequence[Request]]], Iterator[list[StreamedRows]]]


@dataclass(frozen=True)
class _Handing:
    """Hands rows of a document to whoever wants them: their logits, or their hidden states."""

    on_logits: LogitsSink | None
    on_states: StatesSink | None

    def __call__(self, work: Work, first: int, rows: StreamedRows) -> None:
        doc_id = work.document.doc_id
        if self.on_states is not None:
            self.on_states(work.index, doc_id, first, rows.values)
        elif self.on_logits is not None:
            sums = rows.columns["logsumexp"]
            self.on_logits(work.index, doc_id, first, rows.values.numpy(), sums)


class Scorer:
    """Scores documents by one resolved recipe with one model."""

    def __init__(
        self,
        model: Model,
        runner: Runner,
        tokenizer: Tokenizer | None,
        recipe: Recipe,
        *,
        max_batch_tokens: int,
        extras: Extras = BARE,
        shares: bool = True,
    ) -> None:
        self._runner = runner
        self._budget = max_batch_tokens
        self._extras = extras
        # Texts that are scored given a context come with others of the same context.
        is_conditional = recipe.name == "conditional"
        # Hooks, which read layers, see whole sequences.
        shares = shares and is_conditional and not extras.layers
        self._shares = shares and model.hidden_of_tree is not None
        self._intake = Intake(recipe, tokenizer, model.vocab_size)

    def score(
        self,
        documents: Iterable[Document],
        on_logits: LogitsSink | None = None,
        on_batch: BatchSink | None = None,
        on_launched: Callable[[], None] | None = None,
        *,
        logits_dtype: torch.dtype = torch.float32,
        on_states: StatesSink | None = None,
    ) -> Iterator[DocumentScore]:
        """Records of every document, in input order, as they are ready.

        A document that cannot be scored comes out with the `status` and `error` that say why.
        Documents are read, tokenized and packed in a thread of their own, from now on and while
        the model runs.
        """
        if on_logits is not None or on_states is not None:
            batches = run_ahead(self._batches_in_order(documents), _READY)
            stream: _Stream
            if on_states is not None:
                stream = partial(self._runner.stream_states, extras=self._extras)
            else:
                stream = partial(
                    self._runner.stream, dtype=logits_dtype, normalised=True, extras=self._extras
                )
            hand_over = _Handing(on_logits, on_states)
            return self._score_in_order(batches, stream, hand_over, on_batch, on_launched)
        batches = run_ahead(self._packed_batches(documents), _READY)
        return self._score_packed(batches, on_batch, on_launched)

    def _score_packed(
        self,
        batches: Iterable[_Batch],
        on_batch: BatchSink | None,
        on_launched: Callable[[], None] | None,
    ) -> Iterator[DocumentScore]:
        under_way: deque[tuple[_Batch, list[Arrival[Columns]]]] = deque()
        for batch in batches:
            launched = self._runner.launch(batch.requests, extras=self._extras)
            under_way.append((batch, launched))
            if len(under_way) > self._runner.depth:
                yield from self._complete(*under_way.popleft(), on_batch)
        if on_launched is not None:
            on_launched()
        while under_way:
            yield from self._complete(*under_way.popleft(), on_batch)

    def _packed_batches(self, documents: Iterable[Document]) -> Iterator[_Batch]:
        """Full batches: windows are sorted by length within a few batches' worth of tokens."""
        for group in self._rounds(documents, _ROUND_BATCHES):
            pieces = [item for item in group if isinstance(item, _Piece)]
            others = [p for p in pieces if not p.shares]
            lengths = [p.window.stop - p.window.start for p in others]
            packed = [
                *self._pack_alike([p for p in pieces if p.shares]),
                *([others[i] for i in b] for b in pack(lengths, self._budget)),
            ]
            batches = [self._batch(batch) for batch in packed or [[]]]
            batches[-1].complete = group
            yield from batches

    def _pack_alike(self, pieces: Sequence[_Piece]) -> Iterator[list[_Piece]]:
        """Batches of pieces that begin alike."""
        branches = [p.branch for p in pieces if p.branch is not None]
        num_scored = [p.num_rows for p in pieces]
        for batch in pack_alike(branches, num_scored, self._budget):
            for i, branch in batch:
                pieces[i].branch = branch
            yield [pieces[i] for i, _ in batch]

    def _batches_in_order(self, documents: Iterable[Document]) -> Iterator[_Batch]:
        """Batches of consecutive windows, so that rows come out in the order of the input."""
        for group in self._rounds(documents, 1):
            for _, run in groupby(group, lambda item: isinstance(item, _Piece) and item.shares):
                items = list(run)
                batch = self._batch([item for item in items if isinstance(item, _Piece)])
                batch.complete = items
                yield batch

    def _batch(self, pieces: list[_Piece]) -> _Batch:
        requests = [
            Request(
                self._inputs(p) if p.branch is None else p.branch.ids,
                p.work.tokens.token_id[p.first : p.first + p.num_rows],
                _keys(p) if self._extras.num_draws else None,
                p.group,
                p.shares,
                0 if p.branch is None else p.branch.num_shared,
            )
            for p in pieces
        ]
        return _Batch(pieces, requests)

    def _score_in_order(
        self,
        batches: Iterable[_Batch],
        stream: _Stream,
        hand_over: _Handing,
        on_batch: BatchSink | None,
        on_launched: Callable[[], None] | None,
    ) -> Iterator[DocumentScore]:
        running: deque[_Batch] = deque()

        def requests() -> Iterator[list[Request]]:
            for batch in batches:
                running.append(batch)
                if batch.requests:
                    yield batch.requests

        first = 0
        for rows in chain.from_iterable(stream(requests())):
            # All requests of earlier batches are done.
            while rows.request >= first + len(running[0].pieces):
                batch = running.popleft()
                first += len(batch.pieces)
                yield from self._release(batch, on_batch)
            piece = running[0].pieces[rows.request - first]
            start = piece.first + rows.first_row
            _fill(piece.work.tokens, slice(start, start + len(rows.values)), rows.columns)
            hand_over(piece.work, start, rows)
        if on_launched is not None:
            on_launched()
        for batch in running:
            yield from self._release(batch, on_batch)

    def _complete(
        self, batch: _Batch, launched: Sequence[Arrival[Columns]], on_batch: BatchSink | None
    ) -> Iterator[DocumentScore]:
        """Take a batch's results to its documents' records; yields what is complete."""
        pieces = iter(batch.pieces)
        for arrival in launched:
            columns = arrival.wait()
            start = 0
            while start < len(columns["logprob"]):
                piece = next(pieces)
                rows = slice(start, start + piece.num_rows)
                into = slice(piece.first, piece.first + piece.num_rows)
                _fill(piece.work.tokens, into, {n: c[rows] for n, c in columns.items()})
                start = rows.stop
        yield from self._release(batch, on_batch)

    def _release(self, batch: _Batch, on_batch: BatchSink | None) -> Iterator[DocumentScore]:
        _count(batch.pieces, on_batch)
        for piece in batch.pieces:
            work = piece.work
            work.num_done += 1
            if work.num_done == len(work.windows):
                # Now, while the device has the next batches, and not once the last one is done.
                work.score = self._finish(work)
        for item in batch.complete:
            if isinstance(item, DocumentScore):
                yield item
            elif item.window is item.work.windows[-1]:
                assert item.work.score is not None, "batches of earlier windows are done by now"
                yield item.work.score

    def _rounds(
        self, documents: Iterable[Document], num_batches: int
    ) -> Iterator[list[_Piece | DocumentScore]]:
        """Consecutive windows of so many batches' worth of tokens, the first round of one.

        What windows share is counted and held once.
        """
        budget = num_batches * self._budget
        for group in rounds_alike(self._pieces(documents), budget, first=self._budget):
            for item, branch in group:
                if isinstance(item, _Piece):
                    item.branch = branch
            yield [item for item, _ in group]

    def _pieces(
        self, documents: Iterable[Document]
    ) -> Iterator[tuple[_Piece | DocumentScore, int, np.ndarray | None]]:
        """Windows of all documents with their numbers of inputs; unscorable documents weigh 1.

        Those that share come with their inputs, of which others may count and hold a part.
        """
        for item in self._intake.take(documents):
            if isinstance(item, DocumentScore):
                yield item, 1, None
                continue
            extras = self._extras
            item.tokens.make_room(extras.num_top, extras.num_draws, len(extras.layers))
            key = self._key(item) if self._extras.num_draws else np.uint64(0)
            group = None
            if self._extras.frequencies is not None:
                group = self._extras.frequencies.find_group(item.document.source)
            first = 0
            for window in item.windows:
                shares = self._shares and window.first_target > window.start + 1
                piece = _Piece(item, window, first, key, group, shares)
                if shares:
                    inputs = self._inputs(piece)
                    item.release()
                    yield piece, window.num_targets, inputs
                else:
                    yield piece, window.stop - window.start, None
                first += window.num_targets

    def _key(self, work: Work) -> np.uint64:
        """What decides the draws of a document: the seed and its tokens, not its name or place."""
        tokens = np.ascontiguousarray(work.sequence, "<i4").tobytes()
        seed = str(self._extras.seed).encode()
        found = hashlib.blake2b(tokens, digest_size=8, key=seed).digest()
        return np.frombuffer(found, "<u8")[0]

    def _inputs(self, piece: _Piece) -> np.ndarray:
        return self._intake.inputs(piece.work, piece.window)

    def _finish(self, work: Work) -> DocumentScore:
        """The document's record from its complete token records."""
        tokens, record = work.tokens, self._intake.record(work.document)
        record.num_tokens = len(work.encoding.ids)
        record.num_windows = len(work.windows)
        bad = np.flatnonzero(~np.isfinite(tokens.logprob + tokens.entropy + tokens.varentropy))
        if len(bad):
            record.status = NONFINITE
            record.error = (
                f"token {bad[0]} has a log-probability of {tokens.logprob[bad[0]]} in a "
                f"distribution of entropy {tokens.entropy[bad[0]]}"
            )
            return DocumentScore(index=work.index, record=record, text=work.text)
        record.truncated = work.truncated
        fill_scores(record, tokens, work.text, all_scored=len(tokens) == len(work.encoding.ids))
        return DocumentScore(
            index=work.index,
            record=record,
            tokens=tokens,
            text=work.text,
            first_input=work.first_input,
            windows=work.windows,
        )


def _keys(piece: _Piece) -> np.ndarray:
    """Of every row of a window, int64: one apart from row to row of the document."""
    places = np.arange(piece.first, piece.first + piece.num_rows, dtype=np.uint64)
    return (places + piece.key).view(np.int64)


def _count(pieces: Sequence[_Piece], on_batch: BatchSink | None) -> None:
    if on_batch is None or not pieces:
        return
    num_bytes = 0
    for piece in pieces:
        rows = slice(piece.first, piece.first + piece.num_rows)
        tokens = piece.work.tokens
        num_bytes += int((tokens.byte_end[rows] - tokens.byte_start[rows]).sum())
    on_batch(sum(piece.num_rows for piece in pieces), num_bytes)


def _fill(tokens: TokenRecords, rows: slice, columns: Mapping[str, np.ndarray]) -> None:
    for name, column in columns.items():
        getattr(tokens, name)[rows] = column


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
