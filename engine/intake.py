"""Documents -> token sequences and the windows over them, or the reason why there are none."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import length_hint
from typing import Any

import numpy as np

from .recipes import AUTO, BOS, EOS, JOINER, NONE, TOKENIZER, Recipe, Window
from .records import OK, Document, DocumentRecord, DocumentScore, TokenRecords
from .tokenization import Encoding, Tokenizer

# Text tokenized at a time. The first group is small, so that the first score comes soon.
_FIRST_CHARS, _GROUP_CHARS = 1 << 15, 1 << 21
# What any document weighs, so that empty ones and those of ids are not read ahead without end,
# characters.
_LEAST_CHARS = 1000
# What a token weighs that comes as an id, about.
_TOKEN_CHARS = 4


@dataclass
class Work:
    """A document on its way: its sequence, its windows, and the records filled in so far."""

    index: int
    document: Document
    text: str | None
    sequence: np.ndarray
    """int32, the prefix token first if the recipe has one; empty once it is released."""
    first_input: int
    """The token that the first target is scored from."""
    encoding: Encoding
    truncated: bool
    windows: list[Window]
    tokens: TokenRecords
    num_done: int = 0
    """Windows that have run."""
    score: DocumentScore | None = None
    """Once all of them have."""

    def release(self) -> None:
        """Let go of the sequence, where others hold what is read: many begin alike."""
        self.sequence = self.sequence[:0].copy()


class Intake:
    """Makes documents ready to score by one resolved recipe."""

    def __init__(self, recipe: Recipe, tokenizer: Tokenizer | None, vocab_size: int) -> None:
        self._recipe = recipe
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self.prefix = prefix_token(recipe, tokenizer)
        """The id in front of every document, None for none."""
        # lm-evaluation-harness: where there is a context, the tokenizer decides what precedes it.
        self._prefixes_context = recipe.prefix != AUTO or bool(tokenizer and tokenizer.adds_bos)
        if self.prefix is not None and not 0 <= self.prefix < vocab_size:
            raise ValueError(
                f"prefix: {self.prefix} is not in the model's vocabulary of {vocab_size}"
            )

    def take(self, documents: Iterable[Document]) -> Iterator[Work | DocumentScore]:
        """Every document, in order: its work, or the record that says why there is none."""
        indexed = enumerate(documents)
        if self._recipe.concatenate:
            indexed = enumerate(join_stream(d for _, d in indexed))
        for group in _groups(indexed):
            yield from self._prepare(group)

    def inputs(self, work: Work, window: Window) -> np.ndarray:
        """What the model reads of a window."""
        ids = work.sequence[window.start : window.stop]
        if window.overwrite_first:
            ids = ids.copy()
            ids[0] = self.prefix
        return ids

    def record(self, document: Document) -> DocumentRecord:
        """A record that holds what is known of a document before it is scored."""
        return DocumentRecord(
            doc_id=document.doc_id,
            source=document.source,
            language=document.language,
            day=document.day,
            status=document.status,
            error=document.error,
            recipe=self._recipe.name,
            recipe_hash=self._recipe.hash,
        )

    def _prepare(self, group: Sequence[tuple[int, Document]]) -> Iterator[Work | DocumentScore]:
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
        # Many texts are scored given one context.
        contexts = list(dict.fromkeys(d.context for _, d in checked if d.context))
        plain_codes = iter(self._encode(plain))
        chat_codes = iter(self._encode(chats, parse_special=True))
        context_codes = dict(zip(contexts, self._encode(contexts), strict=True))
        no_ids = np.zeros(0, np.int32)
        for index, document in checked:
            context = context_codes[document.context].ids if document.context else no_ids
            if document.text is not None:
                encoding = next(plain_codes if document.messages is None else chat_codes)
                if document.context and document.messages is None:
                    encoding = _after(encoding, len(context), len(document.context.encode()))
            elif document.input_ids is not None:
                ids = np.asarray(document.input_ids, np.int32)
                context, ids = np.split(ids, [document.num_context])
                # A copy, so that it does not hold on to the context.
                ids = ids.copy()
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
        if (document.context or document.num_context) and self._recipe.name != "conditional":
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
                context, text = split_context(document.context, document.text)
                document = replace(document, context=context, text=text)
            return document
        try:
            ids = np.asarray(document.input_ids if document.input_ids is not None else [])
        except ValueError:  # rows of unlike lengths
            ids = np.zeros((0, 0))
        if ids.ndim != 1 or (len(ids) and ids.dtype.kind not in "iu"):
            raise _Unscorable("invalid_ids", "input_ids: not a flat list of integers")
        if not len(ids):
            raise _Unscorable("empty", "input_ids: the document is empty")
        wrong = np.flatnonzero((ids < 0) | (ids >= self._vocab_size))
        if len(wrong):
            raise _Unscorable(
                "invalid_ids",
                f"input_ids: {ids[wrong[0]]} at position {wrong[0]} is not in the model's "
                f"vocabulary of {self._vocab_size}",
            )
        if not 0 <= document.num_context < len(ids):
            raise _Unscorable(
                "invalid_ids",
                f"num_context: {document.num_context} of {len(ids)} input_ids leaves none to score",
            )
        return document

    def _need_tokenizer(self) -> Tokenizer:
        if self._tokenizer is None:
            raise ValueError(
                "tokenizer: the model folder has none, so text cannot be scored; add its "
                "tokenizer.json or give input_ids"
            )
        check_vocabulary(self._tokenizer, self._vocab_size)
        return self._tokenizer

    def _encode(self, texts: Sequence[str], *, parse_special: bool = False) -> list[Encoding]:
        if not texts:
            return []
        return self._need_tokenizer().encode(texts, parse_special=parse_special)

    def _lay_out(
        self, index: int, document: Document, context: np.ndarray, encoding: Encoding
    ) -> Work | DocumentScore:
        recipe = self._recipe
        ids = np.concatenate([context, encoding.ids])
        if len(ids) and int(ids.max()) >= self._vocab_size:
            # A token that was added to the tokenizer and not to the model.
            error = (
                f"text: the tokenizer gives token {ids.max()}, which is not in the model's "
                f"vocabulary of {self._vocab_size}"
            )
            return self._refuse(index, replace(document, status="invalid_ids", error=error))
        doubled = len(ids) > 0 and ids[0] == self.prefix
        wanted = not len(context) or self._prefixes_context
        num_prefix = int(self.prefix is not None and wanted and not doubled)
        num_context = num_prefix + len(context) if len(context) else 0
        sequence = np.concatenate([np.array([self.prefix] * num_prefix, np.int32), ids])
        windows = recipe.windows(
            len(sequence), has_prefix=self.prefix is not None, num_context=num_context
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
        return Work(
            index=index,
            # What has been read is in the sequence.
            document=replace(document, context=None, messages=None, input_ids=None),
            text=document.text,
            sequence=sequence,
            first_input=int(sequence[windows[0].first_target - 1]),
            encoding=encoding,
            truncated=cut_on_left or windows[-1].stop < len(sequence) - 1,
            windows=windows,
            tokens=tokens,
        )

    def _refuse(
        self, index: int, document: Document, encoding: Encoding | None = None
    ) -> DocumentScore:
        record = self.record(document)
        record.num_tokens = len(encoding.ids) if encoding is not None else 0
        return DocumentScore(index=index, record=record, text=document.text)


def check_vocabulary(tokenizer: Tokenizer, vocab_size: int) -> None:
    """ValueError if text may give ids that the model does not have.

    Tokens that were added to a tokenizer may well be beyond: no plain text gives them, and a
    document that does is refused by itself.
    """
    if tokenizer.num_ids > vocab_size:
        raise ValueError(
            f"tokenizer: its vocabulary has {tokenizer.num_ids} ids, and the model's {vocab_size}; "
            "model and tokenizer do not belong together, and token ids alone can be scored"
        )


def doubt_vocabulary(
    tokenizer: Tokenizer, vocab_size: int, config: Mapping[str, Any]
) -> str | None:
    """Why tokenizer and model may not belong together, None where nothing speaks against it.

    `config` is the model's config.json. One of BOS and EOS alone often differs, as in a model that
    was tuned for chats; where nothing agrees, ids mean something else.
    """
    works = "if it is another model's, scores mean nothing; give the folder its own"
    if 2 * tokenizer.num_ids < vocab_size:
        return (
            f"tokenizer: its vocabulary has {tokenizer.num_ids:,} ids, less than half of the "
            f"model's {vocab_size:,}; {works}"
        )
    inner = config.get("text_config") or {}
    differ = []
    for name, ours in (("bos", tokenizer.bos_id), ("eos", tokenizer.eos_id)):
        stated = config.get(f"{name}_token_id", inner.get(f"{name}_token_id"))
        if ours is None or stated is None:
            continue
        if ours in (stated if isinstance(stated, list) else [stated]):
            return None
        differ.append(f"{name.upper()} is {ours}, and {stated} in config.json")
    return f"tokenizer: its {', its '.join(differ)}; {works}" if differ else None


def prefix_token(recipe: Recipe, tokenizer: Tokenizer | None) -> int | None:
    """The id that stands in front of every document, None for none.

    Raises:
        ValueError: if the recipe asks for a BOS or EOS that the tokenizer does not have.
    """
    prefix = recipe.prefix
    if isinstance(prefix, int):
        return prefix
    if prefix == TOKENIZER and tokenizer is not None and tokenizer.opening is not None:
        raise ValueError(
            f"prefix: {prefix!r} is {tokenizer.opening!r}, which the tokenizer puts in front of a "
            "text, and a recipe can put one token there; use eos, none or a token id"
        )
    bos = tokenizer.bos_id if tokenizer is not None else None
    eos = tokenizer.eos_id if tokenizer is not None else None
    if prefix == NONE or (prefix == TOKENIZER and not (tokenizer and tokenizer.adds_bos)):
        return None
    if prefix == AUTO:
        return bos if bos is not None else eos
    assert prefix is not None, "a recipe has filled it in"
    chosen = {BOS: bos, TOKENIZER: bos, EOS: eos}[prefix]
    if chosen is None:
        raise ValueError(f"prefix: the tokenizer has no {prefix} token; use none or a token id")
    return chosen


class _Unscorable(Exception):
    """A document that becomes a row with a status instead of scores."""

    def __init__(self, status: str, message: str) -> None:
        super().__init__(message)
        self.status = status


def _after(encoding: Encoding, num_tokens: int, num_bytes: int) -> Encoding:
    """The tokens after the first `num_tokens`, spans counted from byte `num_bytes` of the text."""
    return Encoding(
        encoding.ids[num_tokens:].copy(),
        np.maximum(encoding.byte_start[num_tokens:] - num_bytes, 0),
        np.maximum(encoding.byte_end[num_tokens:] - num_bytes, 0),
    )


def _groups(documents: Iterable[tuple[int, Document]]) -> Iterator[list[tuple[int, Document]]]:
    """Consecutive documents of about `_GROUP_CHARS` of text, a small group first."""
    group: list[tuple[int, Document]] = []
    size, limit = 0, _FIRST_CHARS
    for index, document in documents:
        group.append((index, document))
        text = len(document.text or "") + len(document.context or "")
        ids = _TOKEN_CHARS * length_hint(document.input_ids)
        size += max(text + ids, _LEAST_CHARS)
        if size >= limit:
            yield group
            group, size, limit = [], 0, _GROUP_CHARS
    if group:
        yield group


def split_context(context: str, text: str) -> tuple[str, str]:
    """What is read and what is scored: the context's trailing whitespace belongs to the text
    (lm-evaluation-harness)."""
    kept = context.rstrip()
    return kept, context[len(kept) :] + text


def join_stream(documents: Iterable[Document]) -> Iterator[Document]:
    """The corpus as one document, after those that cannot be part of it.

    Raises:
        ValueError: for documents of ids or chat messages, which have no text to join.
    """
    texts = []
    for document in documents:
        if document.status == "empty":
            # An empty row is two joiners in a row, as in the tools that join a data set's rows.
            texts.append("")
        elif document.status != OK:
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
