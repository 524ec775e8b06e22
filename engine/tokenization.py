"""Text or chat messages -> token ids, each with the bytes of the text that it stands for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt")


@dataclass(frozen=True)
class Encoding:
    """Tokens of one text. Spans of neighbours touch and together cover the whole text."""

    ids: np.ndarray
    """int32 [n]."""
    byte_start: np.ndarray
    """int64 [n], into the UTF-8 text."""
    byte_end: np.ndarray
    """int64 [n]."""


class Tokenizer:
    """A model's tokenizer as scoring needs it: no specials added, special tokens in text as text."""

    def __init__(self, tokenizer: Any) -> None:
        self._hf = tokenizer
        self._backend: Any = getattr(tokenizer, "backend_tokenizer", None)
        if self._backend is None:
            raise ValueError(
                f"tokenizer: {type(tokenizer).__name__} gives no offsets; a tokenizer.json is needed"
            )
        # A stored tokenizer may carry the cut or the padding of whoever saved it.
        self._backend.no_truncation()
        self._backend.no_padding()
        self.bos_id: int | None = tokenizer.bos_token_id
        self.eos_id: int | None = tokenizer.eos_token_id
        first = self._backend.encode("").ids[:1]
        self.adds_bos = self.bos_id is not None and first == [self.bos_id]
        """Whether the tokenizer itself puts BOS in front."""
        self._token_bytes = self._byte_lengths()

    @classmethod
    def load(cls, folder: Path, *, trust_remote_code: bool = False) -> Tokenizer | None:
        """The tokenizer of a model folder, None where there is none.

        Raises:
            ValueError: if there are tokenizer files that transformers cannot load.
        """
        if not any((folder / name).is_file() for name in _FILES):
            return None
        from transformers import AutoTokenizer

        try:
            return cls(AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code))
        except (ValueError, OSError, ImportError, KeyError, TypeError) as error:
            raise ValueError(f"tokenizer: {folder} cannot be loaded: {error}") from error

    def encode(self, texts: Sequence[str], *, parse_special: bool = False) -> list[Encoding]:
        """Tokens of each text alone, nothing added, nothing cut.

        A special token spelled out in a text is text, unless `parse_special` (a rendered chat).
        """
        self._backend.encode_special_tokens = not parse_special
        try:
            encoded = self._backend.encode_batch(list(texts), add_special_tokens=False)
        finally:
            self._backend.encode_special_tokens = False
        return [self._spans(text, one) for text, one in zip(texts, encoded, strict=True)]

    def render(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """Chat messages as text, by the tokenizer's chat template.

        Raises:
            ValueError: if there is no template, or the template refuses the messages.
        """
        from jinja2 import TemplateError

        if not self._hf.chat_template:
            raise ValueError("messages: the tokenizer has no chat template; give text instead")
        try:
            return self._hf.apply_chat_template(list(messages), tokenize=False)
        except (TemplateError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"messages: the chat template refuses them: {error}") from None

    def _byte_lengths(self) -> np.ndarray | None:
        """Bytes of every token of a byte-level vocabulary, None for any other kind."""
        decoder = self._backend.decoder
        if decoder is None or b"ByteLevel" not in decoder.__getstate__():
            return None
        # A byte-level vocabulary spells each byte as one character; added tokens are plain text.
        vocabulary = self._backend.get_vocab(with_added_tokens=True)
        added = self._backend.get_added_tokens_decoder()
        lengths = np.zeros(max(vocabulary.values()) + 1, np.int64)
        for token, i in vocabulary.items():
            lengths[i] = len(token.encode()) if i in added else len(token)
        return lengths

    def _spans(self, text: str, encoded: Any) -> Encoding:
        ids = np.array(encoded.ids, np.int32)
        num_bytes = len(text) if text.isascii() else len(text.encode())
        if self._token_bytes is not None:
            ends = np.cumsum(self._token_bytes[ids])
            # Equal unless a normalizer changed the text on its way.
            if len(ids) and ends[-1] == num_bytes:
                return Encoding(ids, ends - self._token_bytes[ids], ends)
        return Encoding(ids, *_tile(text, num_bytes, encoded.offsets))


def _tile(
    text: str, num_bytes: int, offsets: Sequence[tuple[int, int]]
) -> tuple[np.ndarray, np.ndarray]:
    """Byte spans from character offsets, made to touch: what a tokenizer skips goes to the token
    before it, and of tokens that share a character the last gets it."""
    if not offsets:
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    starts = np.array([start for start, _ in offsets], np.int64)
    if not text.isascii():
        points = np.frombuffer(text.encode("utf-32-le"), np.uint32)
        widths = 1 + (points > 0x7F) + (points > 0x7FF) + (points > 0xFFFF)
        starts = np.concatenate([[0], np.cumsum(widths)])[starts]
    starts = np.maximum.accumulate(starts)
    starts[0] = 0
    return starts, np.append(starts[1:], num_bytes)
