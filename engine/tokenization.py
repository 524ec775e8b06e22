"""Text or chat messages -> token ids, each with the bytes of the text that it stands for."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt")

# Classes that a folder brings as Python code, though all they do is what its files say.
_NEEDLESS_CODE = ("InternLM2Tokenizer", "InternLM2TokenizerFast")


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
    """A model's tokenizer as scoring needs it: nothing added, special tokens in text as text."""

    def __init__(self, tokenizer: Any) -> None:
        self._hf = tokenizer
        self._backend: Any = getattr(tokenizer, "backend_tokenizer", None)
        if self._backend is None:
            raise ValueError(
                f"tokenizer: {type(tokenizer).__name__} gives no offsets; "
                "a tokenizer.json is needed"
            )
        # A stored tokenizer may carry the cut or the padding of whoever saved it.
        self._backend.no_truncation()
        self._backend.no_padding()
        self.bos_id: int | None = tokenizer.bos_token_id
        self.eos_id: int | None = tokenizer.eos_token_id
        first = self._backend.encode("").ids[:1]
        self.adds_bos = self.bos_id is not None and first == [self.bos_id]
        """Whether the tokenizer itself puts BOS in front."""
        self.has_template = bool(tokenizer.chat_template)
        """Whether chat messages can be rendered."""
        self._normalizer = self._backend.normalizer
        self._token_bytes = self._byte_lengths()

    @classmethod
    def load(cls, folder: Path, *, trust_remote_code: bool = False) -> Tokenizer | None:
        """The tokenizer of a model folder, None where there is none.

        Raises:
            ValueError: if there are tokenizer files that transformers cannot load.
        """
        if not any((folder / name).is_file() for name in _FILES):
            return None
        has_json = (folder / "tokenizer.json").is_file()
        has_model = (folder / "tokenizer.model").is_file()
        if has_model and not has_json and not (find_spec("sentencepiece") and find_spec("google")):
            raise ValueError(
                f"tokenizer: {folder / 'tokenizer.model'} needs the sentencepiece library; "
                "pip install 'logitmill[sentencepiece]'"
            )
        from transformers import AutoTokenizer, PreTrainedTokenizerFast

        try:
            config = _read_config(folder)
            if config.get("tokenizer_class") in _NEEDLESS_CODE and not trust_remote_code:
                if has_json:
                    return cls(PreTrainedTokenizerFast.from_pretrained(folder))
                if has_model:
                    return cls(_from_sentencepiece(folder / "tokenizer.model", config))
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

        if not self.has_template:
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
            # A normalizer may have changed the text on its way, even to as many bytes.
            kept = self._normalizer is None or self._normalizer.normalize_str(text) == text
            if len(ids) and ends[-1] == num_bytes and kept:
                return Encoding(ids, ends - self._token_bytes[ids], ends)
        return Encoding(ids, *_tile(text, num_bytes, encoded.offsets))


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "tokenizer_config.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _from_sentencepiece(path: Path, config: Mapping[str, Any]) -> Any:
    """A sentencepiece BPE model as a transformers tokenizer with offsets.

    `config` is tokenizer_config.json: its `added_tokens_decoder` names reserved pieces, and BOS
    stands in front unless its `add_bos_token` is false.
    """
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2 as model_pb2
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, processors
    from transformers import PreTrainedTokenizerFast

    try:
        proto: Any = model_pb2.ModelProto.FromString(path.read_bytes())  # type: ignore[attr-defined]
    except DecodeError as error:
        raise ValueError(f"{path.name} is not a sentencepiece model: {error}") from None
    if proto.trainer_spec.model_type != proto.trainer_spec.BPE:
        raise ValueError(f"{path.name} is not a BPE model")
    added = {
        int(i): AddedToken(t["content"], special=t.get("special", False), normalized=False)
        for i, t in config.get("added_tokens_decoder", {}).items()
    }
    piece = proto.SentencePiece
    for i, p in enumerate(proto.pieces):
        if p.type in (piece.CONTROL, piece.UNKNOWN):
            added.setdefault(i, AddedToken(p.piece, special=True, normalized=False))
    names = [added[i].content if i in added else p.piece for i, p in enumerate(proto.pieces)]
    vocabulary = {name: i for i, name in enumerate(names)}
    mergeable = {
        p.piece: p.score
        for i, p in enumerate(proto.pieces)
        if i not in added and p.type in (piece.NORMAL, piece.USER_DEFINED)
    }
    # The best score merges first; which two pieces make it up decides nothing but the order.
    merges = [
        (-score, (name[:cut], name[cut:]))
        for name, score in mergeable.items()
        for cut in range(1, len(name))
        if name[:cut] in mergeable and name[cut:] in mergeable
    ]
    backend = Tokenizer(
        models.BPE(
            vocabulary,
            [pair for _, pair in sorted(merges, key=lambda merge: merge[0])],
            unk_token=names[proto.trainer_spec.unk_id],
            fuse_unk=True,
            byte_fallback=proto.trainer_spec.byte_fallback,
        )
    )
    rules = proto.normalizer_spec
    steps: list[Any] = []
    if rules.precompiled_charsmap:
        steps.append(normalizers.Precompiled(rules.precompiled_charsmap))
    if rules.remove_extra_whitespaces:
        steps += [
            normalizers.Replace(Regex(r"\A +| +\z"), ""),
            normalizers.Replace(Regex(" {2,}"), " "),
        ]
    if rules.add_dummy_prefix:
        steps.append(normalizers.Prepend("▁"))
    steps.append(normalizers.Replace(" ", "▁"))
    backend.normalizer = normalizers.Sequence(steps)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    backend.add_tokens([added[i] for i in sorted(added)])
    named = {
        name: config[name]["content"] if isinstance(config[name], Mapping) else config[name]
        for name in ("bos_token", "eos_token", "unk_token", "pad_token")
        if config.get(name)
    }
    bos = named.get("bos_token")
    if bos is not None and config.get("add_bos_token", True):
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, vocabulary[bos])]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, chat_template=config.get("chat_template"), **named
    )


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
