"""Documents -> windows -> packed batches -> records, in bounded memory and input order."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from . import metrics
from .head import Head, Model
from .packing import pack, rounds
from .recipes import AUTO, BOS, EOS, JOINER, NONE, TOKENIZER, Recipe, Window
from .records import OK, Document, DocumentRecord, DocumentScore, TokenRecords
from .tokenization import Encoding, Tokenizer

LogitsSink = Callable[[int, str, int, np.ndarray, np.ndarray], None]
"""(document index, doc_id, first row, logprobs [rows, V], logsumexp [rows]), rows in order."""

# Text tokenized at a time. The first group is small, so that the first score comes soon.
_FIRST_CHARS, _GROUP_CHARS = 1 << 15, 1 << 21
# Batches' worth of tokens that are sorted and packed together.
_ROUND_BATCHES = 4
# Logits that may wait in host memory to be handed over in order, bytes.
_LOGITS_ROUND = 64 << 20


@dataclass
class _Work:
    """A document on its way: its sequence, its windows, and the records filled in so far."""

    index: int
    document: Document
    text: str | None
    sequence: np.ndarray
    """int32, the prefix token first if the recipe has one."""
    encoding: Encoding
    truncated: bool
    windows: list[Window]
    tokens: TokenRecords
    num_done: int = 0


@dataclass
class _Piece:
    """One window of a document, and where its targets lie in the document's records."""

    work: _Work
    window: Window
    first: int
    logprobs: np.ndarray | None = None

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
        self._tokenizer = tokenizer
        self._recipe = recipe
        self._budget = max_batch_tokens
        self._prefix = prefix_token(recipe, tokenizer)
        # lm-evaluation-harness: where there is a context, the tokenizer decides what precedes it.
        self._prefixes_context = recipe.prefix != AUTO or bool(tokenizer and tokenizer.adds_bos)
        if self._prefix is not None and not 0 <= self._prefix < model.vocab_size:
            raise ValueError(
                f"prefix: {self._prefix} is not in the model's vocabulary of {model.vocab_size}"
            )

    def score(
        self, documents: Iterable[Document], on_logits: LogitsSink | None = None
    ) -> Iterator[DocumentScore]:
        """Records of every document, in input order, as they are ready.

        A document that cannot be scored comes out with the `status` and `error` that say why.
        """
        indexed = enumerate(documents)
        if self._recipe.concatenate:
            indexed = enumerate(_join(indexed))
        pieces = self._pieces(indexed)
        rows_budget = _ROUND_BATCHES * self._budget
        if on_logits is not None:
            rows_budget = min(rows_budget, _LOGITS_ROUND // (4 * self._model.vocab_size))
        for group in rounds(pieces, rows_budget):
            live = [p for p in group if isinstance(p, _Piece)]
            lengths = [p.window.stop - p.window.start for p in live]
            for batch in pack(lengths, self._budget):
                self._run([live[i] for i in batch], keep_logits=on_logits is not None)
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
        self, documents: Iterable[tuple[int, Document]]
    ) -> Iterator[tuple[_Piece | DocumentScore, int]]:
        """Windows of all documents with their numbers of inputs; unscorable documents weigh 0."""
        for group in _groups(documents):
            for item in self._prepare(group):
                if isinstance(item, DocumentScore):
                    yield item, 0
                    continue
                first = 0
                for window in item.windows:
                    yield _Piece(item, window, first), window.stop - window.start
                    first += window.num_targets

    def _prepare(self, group: Sequence[tuple[int, Document]]) -> Iterator[_Work | DocumentScore]:
        """Tokenize a group of documents and lay out their windows."""
        checked = [(i, self._check(document)) for i, document in group]
        # The joined string is encoded, so that merges across the border are as the model knows
        # them; it is split where the context alone would end (lm-evaluation-harness).
        plain = [
            (d.context or "") + d.text
            for _, d in checked
            if d.text is not None and d.messages is None
        ]
        chats = [d.text for _, d in checked if d.text is not None and d.messages is not None]
        contexts = [d.context for _, d in checked if d.context]
        plain_codes = iter(self._encode(plain))
        chat_codes = iter(self._encode(chats, parse_special=True))
        context_codes = iter(self._encode(contexts))
        for index, document in checked:
            context = next(context_codes).ids if document.context else np.zeros(0, np.int32)
            if document.text is not None:
                encoding = next(plain_codes if document.messages is None else chat_codes)
                if document.context and document.messages is None:
                    encoding = _after(encoding, len(context), len(document.context.encode()))
            elif document.input_ids is not None:
                ids = np.asarray(document.input_ids, np.int32)
                encoding = Encoding(ids, np.zeros(len(ids), np.int64), np.zeros(len(ids), np.int64))
            else:
                yield self._refuse(index, document)
                continue
            yield self._lay_out(index, document, context, encoding)

    def _check(self, document: Document) -> Document:
        """The document ready to tokenize, or without content and with a status that says why."""
        if document.status != OK:
            return replace(document, text=None, messages=None, input_ids=None, context=None)
        try:
            return self._ready(document)
        except _Unscorable as error:
            return replace(
                document,
                text=None,
                messages=None,
                input_ids=None,
                context=None,
                status=error.status,
                error=str(error),
            )

    def _ready(self, document: Document) -> Document:
        if document.messages is not None:
            tokenizer = self._need_tokenizer()
            try:
                document = replace(document, text=tokenizer.render(document.messages))
            except ValueError as error:
                raise _Unscorable("invalid_value", str(error)) from None
        if document.context and self._recipe.name != "conditional":
            raise ValueError(
                f"recipe: {self._recipe.name} reads no context, but document "
                f"{document.doc_id!r} has one; use conditional"
            )
        for field, value in (("text", document.text or ""), ("context", document.context or "")):
            try:
                value.encode()
            except UnicodeEncodeError as error:
                raise _Unscorable(
                    "invalid_utf8",
                    f"{field}: character {error.start} is a lone surrogate, not text",
                ) from None
        if document.text is not None:
            self._need_tokenizer()
            if not document.text:
                raise _Unscorable("empty", "text: the document is empty")
            if document.context:
                # lm-evaluation-harness: trailing whitespace of the context is continuation.
                kept = document.context.rstrip()
                moved = document.context[len(kept) :] + document.text
                document = replace(document, context=kept, text=moved)
            return document
        try:
            ids = np.asarray(document.input_ids if document.input_ids is not None else [])
        except ValueError:  # rows of unlike lengths
            ids = np.zeros((0, 0))
        if ids.ndim != 1 or (len(ids) and ids.dtype.kind not in "iu"):
            raise _Unscorable("invalid_ids", "input_ids: not a flat list of integers")
        if not len(ids):
            raise _Unscorable("empty", "input_ids: the document is empty")
        wrong = np.flatnonzero((ids < 0) | (ids >= self._model.vocab_size))
        if len(wrong):
            raise _Unscorable(
                "invalid_ids",
                f"input_ids: {ids[wrong[0]]} at position {wrong[0]} is not in the model's "
                f"vocabulary of {self._model.vocab_size}",
            )
        return document

    def _need_tokenizer(self) -> Tokenizer:
        if self._tokenizer is None:
            raise ValueError(
                "tokenizer: the model folder has none, so text cannot be scored; add its "
                "tokenizer.json or give input_ids"
            )
        return self._tokenizer

    def _encode(self, texts: Sequence[str], *, parse_special: bool = False) -> list[Encoding]:
        if not texts:
            return []
        return self._need_tokenizer().encode(texts, parse_special=parse_special)

    def _lay_out(
        self, index: int, document: Document, context: np.ndarray, encoding: Encoding
    ) -> _Work | DocumentScore:
        recipe = self._recipe
        ids = encoding.ids
        if len(ids) and int(ids.max()) >= self._model.vocab_size:
            raise ValueError(
                f"tokenizer: it gives token {ids.max()}, beyond the model's vocabulary of "
                f"{self._model.vocab_size}; model and tokenizer do not belong together"
            )
        ids = np.concatenate([context, ids])
        doubled = len(ids) > 0 and ids[0] == self._prefix
        wanted = not len(context) or self._prefixes_context
        num_prefix = int(self._prefix is not None and wanted and not doubled)
        num_context = num_prefix + len(context) if len(context) else 0
        sequence = np.concatenate([np.array([self._prefix] * num_prefix, np.int32), ids])
        windows = recipe.windows(
            len(sequence), has_prefix=self._prefix is not None, num_context=num_context
        )
        if not windows:
            status = "too_short" if len(ids) else "empty"
            error = f"{len(sequence)} tokens are too few for recipe {recipe.name}"
            if recipe.context is not None and recipe.name != "rolling":
                error += f" with a context of {recipe.context}"
            return self._refuse(index, replace(document, status=status, error=error), encoding)
        num_targets = sum(w.num_targets for w in windows)
        tokens = TokenRecords.empty(num_targets)
        at = np.concatenate([np.arange(w.first_target, w.stop + 1) for w in windows])
        of_document = at - num_prefix - len(context)
        tokens.token_id[:] = sequence[at]
        tokens.byte_start[:] = encoding.byte_start[of_document]
        tokens.byte_end[:] = encoding.byte_end[of_document]
        cut_on_left = recipe.name == "conditional" and windows[0].first_target > max(1, num_context)
        return _Work(
            index=index,
            document=document,
            text=document.text,
            sequence=sequence,
            encoding=encoding,
            truncated=cut_on_left or windows[-1].stop < len(sequence) - 1,
            windows=windows,
            tokens=tokens,
        )

    def _run(self, pieces: Sequence[_Piece], *, keep_logits: bool) -> None:
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
        logprobs = None
        if keep_logits:
            logprobs = np.empty((len(rows), self._model.vocab_size), np.float32)
        with torch.inference_mode():
            hidden_TD = self._model.hidden(ids.to(self._model.device), lengths)
            hidden_RD = hidden_TD[torch.from_numpy(rows).to(self._model.device)]
            result = self._head.statistics(hidden_RD, targets, logprobs_RV=logprobs)
        columns = {name: column.numpy() for name, column in result._asdict().items()}
        start = 0
        for piece in pieces:
            stop = start + piece.num_rows
            into = slice(piece.first, piece.first + piece.num_rows)
            for name, column in columns.items():
                getattr(piece.work.tokens, name)[into] = column[start:stop]
            if logprobs is not None:
                piece.logprobs = logprobs[start:stop]
            start = stop

    def _inputs(self, piece: _Piece) -> np.ndarray:
        ids = piece.work.sequence[piece.window.start : piece.window.stop]
        if piece.window.overwrite_first:
            ids = ids.copy()
            ids[0] = self._prefix
        return ids

    def _refuse(
        self, index: int, document: Document, encoding: Encoding | None = None
    ) -> DocumentScore:
        record = self._record(document)
        record.num_tokens = len(encoding.ids) if encoding is not None else 0
        return DocumentScore(index=index, record=record, text=document.text)

    def _record(self, document: Document) -> DocumentRecord:
        return DocumentRecord(
            doc_id=document.doc_id,
            source=document.source,
            language=document.language,
            status=document.status,
            error=document.error,
            recipe=self._recipe.name,
            recipe_hash=self._recipe.hash,
        )

    def _finish(self, work: _Work) -> DocumentScore:
        """The document's record from its complete token records."""
        tokens, record = work.tokens, self._record(work.document)
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


class _Unscorable(Exception):
    """A document that becomes a row with a status instead of scores."""

    def __init__(self, status: str, message: str) -> None:
        super().__init__(message)
        self.status = status


def prefix_token(recipe: Recipe, tokenizer: Tokenizer | None) -> int | None:
    """The id that stands in front of every document, None for none.

    Raises:
        ValueError: if the recipe asks for a BOS or EOS that the tokenizer does not have.
    """
    prefix = recipe.prefix
    if isinstance(prefix, int):
        return prefix
    bos = tokenizer.bos_id if tokenizer is not None else None
    eos = tokenizer.eos_id if tokenizer is not None else None
    if prefix == NONE or (prefix == TOKENIZER and not (tokenizer and tokenizer.adds_bos)):
        return None
    if prefix == AUTO:
        return bos if bos is not None else eos
    chosen = {BOS: bos, TOKENIZER: bos, EOS: eos}[prefix]
    if chosen is None:
        raise ValueError(f"prefix: the tokenizer has no {prefix} token; use none or a token id")
    return chosen


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


def _after(encoding: Encoding, num_tokens: int, num_bytes: int) -> Encoding:
    """The tokens after the first `num_tokens`, spans counted from byte `num_bytes` of the text."""
    return Encoding(
        encoding.ids[num_tokens:],
        np.maximum(encoding.byte_start[num_tokens:] - num_bytes, 0),
        np.maximum(encoding.byte_end[num_tokens:] - num_bytes, 0),
    )


def pad_ids(sequences: Sequence[np.ndarray], multiple: int) -> torch.Tensor:
    """Sequences side by side, int64, padded with zeros to a multiple of rows."""
    total = sum(len(ids) for ids in sequences)
    packed = np.zeros(-(-total // multiple) * multiple, np.int64)
    packed[:total] = np.concatenate(sequences)
    return torch.from_numpy(packed)


def _groups(documents: Iterable[tuple[int, Document]]) -> Iterator[list[tuple[int, Document]]]:
    """Consecutive documents of about `_GROUP_CHARS` of text, a small group first."""
    group: list[tuple[int, Document]] = []
    size, limit = 0, _FIRST_CHARS
    for index, document in documents:
        group.append((index, document))
        size += len(document.text or "") + len(document.context or "")
        size += 1000 if document.text is None else 0
        if size >= limit:
            yield group
            group, size, limit = [], 0, _GROUP_CHARS
    if group:
        yield group


def _join(documents: Iterable[tuple[int, Document]]) -> Iterator[Document]:
    """The corpus as one document, after those that cannot be part of it.

    Raises:
        ValueError: for documents of ids or chat messages, which have no text to join.
    """
    texts = []
    for _, document in documents:
        if document.status != OK:
            yield document
        elif document.text is None:
            raise ValueError(
                f"recipe: document {document.doc_id!r} has no text, which a recipe that reads "
                "its corpus as one stream needs; use rolling"
            )
        else:
            texts.append(document.text)
    if texts:
        yield Document(doc_id="stream", text=JOINER.join(texts))
