"""Text or chat messages -> token ids, each with the bytes of the text that it stands for."""

from __future__ import annotations

import ast
import hashlib
import json
import re
from base64 import b64decode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tiktoken.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
)

# Classes that a folder brings as Python code, though all they do is what its files say.
_NEEDLESS_CODE = ("InternLM2Tokenizer", "InternLM2TokenizerFast", "InternLM3Tokenizer")


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

    def __init__(
        self, tokenizer: Any, backend: Any = None, *, adds_bos: bool | None = None
    ) -> None:
        """Of transformers' `tokenizer`, which knows names and chat template.

        `backend`, of the tokenizers library, makes the ids; where it is left out, the tokenizer's
        own does. `adds_bos` left out is as the backend does it.
        """
        self._hf = tokenizer
        self._backend: Any = backend or getattr(tokenizer, "backend_tokenizer", None)
        if self._backend is None:
            raise ValueError(
                f"tokenizer: {type(tokenizer).__name__} gives no offsets; "
                "a tokenizer.json is needed"
            )
        # A stored tokenizer may carry the cut or the padding of whoever saved it.
        self._backend.no_truncation()
        self._backend.no_padding()
        self._mark_special()
        opening = self._opening()
        self.bos_id: int | None = self._id_of(tokenizer.bos_token)
        self.eos_id: int | None = self._id_of(tokenizer.eos_token)
        if self.bos_id is None and len(opening) == 1:
            self.bos_id = opening[0]  # named or not, it is what texts begin with
        self.opening: str | None = None
        """What it puts in front of a text where that is more than one token."""
        if len(opening) > 1 and adds_bos is not False:
            self.opening = "".join(map(self._backend.id_to_token, opening))
        if adds_bos is None:
            adds_bos = opening[:1] == [self.bos_id]
        self.adds_bos = adds_bos and self.bos_id is not None
        """Whether the tokenizer itself puts BOS in front."""
        self.has_template = bool(tokenizer.chat_template)
        """Whether chat messages can be rendered."""
        # It adds nothing here, but it would trim spaces off the offsets.
        self._backend.post_processor = None
        self._normalizer = self._backend.normalizer
        vocabulary = self._backend.get_vocab(with_added_tokens=True)
        added = self._backend.get_added_tokens_decoder()
        self.num_ids = 1 + max((i for i in vocabulary.values() if i not in added), default=-1)
        """Ids of its vocabulary, without the tokens that were added to it."""
        self._token_bytes = self._byte_lengths(vocabulary, added)

    @cached_property
    def digest(self) -> str:
        """sha256 over all tokens and their ids: what two tokenizers share that spell ids alike."""
        vocabulary = self._backend.get_vocab(with_added_tokens=True)
        text = json.dumps(sorted(vocabulary.items(), key=lambda item: item[::-1]))
        return hashlib.sha256(text.encode()).hexdigest()

    def __str__(self) -> str:
        """For people: "4,096 ids, BOS 0, EOS 1, a chat template"."""
        named = [
            f"{name} {i if i is not None else 'none'}"
            for name, i in (("BOS", self.bos_id), ("EOS", self.eos_id))
        ]
        template = "a chat template" if self.has_template else "no chat template"
        return ", ".join([f"{self.num_ids:,} ids", *named, template])

    @classmethod
    def load(cls, folder: Path, *, trust_remote_code: bool = False) -> Tokenizer | None:
        """The tokenizer of a model folder, None where there is none.

        A tokenizer.json decides alone, then a sentencepiece tokenizer.model, then a tiktoken.model;
        code that a folder brings is run for other files only.

        Raises:
            ValueError: if there are tokenizer files that cannot be loaded.
        """
        if not any((folder / name).is_file() for name in _FILES):
            return None
        try:
            config = _read_json(folder / "tokenizer_config.json")
            if (folder / "tokenizer.json").is_file():
                return _from_json(folder, config)
            needs_code = (
                "auto_map" in config and config.get("tokenizer_class") not in _NEEDLESS_CODE
            )
            if (folder / "tokenizer.model").is_file() and not needs_code:
                return _from_sentencepiece(folder, config)
            if (folder / "tiktoken.model").is_file():
                return _from_tiktoken(folder, config)
            from transformers import AutoTokenizer

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

    def decode(self, ids: Sequence[int]) -> str:
        """The text that tokens spell, special ones left out."""
        return self._backend.decode(list(ids), skip_special_tokens=True)

    def render(self, messages: Sequence[Mapping[str, Any]], *, asks: bool = False) -> str:
        """Chat messages as text, by the tokenizer's chat template.

        With `asks`, an answer is to follow.

        Raises:
            ValueError: if there is no template, or the template refuses the messages.
        """
        from jinja2 import TemplateError

        if not self.has_template:
            raise ValueError("messages: the tokenizer has no chat template; give text instead")
        try:
            return self._hf.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=asks
            )
        except (TemplateError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"messages: the chat template refuses them: {error}") from None

    def spell(self, ids: Sequence[int]) -> list[bytes]:
        """The bytes that each token stands for in a text, whatever stands beside it.

        A space that sets a word apart is part of the word; an id without a token is no bytes.
        """
        added = self._backend.get_added_tokens_decoder()
        is_bytes = self._token_bytes is not None
        values = {character: byte for byte, character in enumerate(_byte_characters())}

        def spell_one(i: int) -> bytes:
            token = self._backend.id_to_token(i) or ""
            if i in added:
                return token.encode()
            if is_bytes and all(character in values for character in token):
                return bytes(values[character] for character in token)
            if re.fullmatch("<0x[0-9A-F]{2}>", token):
                return bytes([int(token[3:5], 16)])
            return token.replace("▁", " ").encode()

        known = {i: spell_one(i) for i in set(ids)}
        return [known[i] for i in ids]

    def _id_of(self, token: str | None) -> int | None:
        return None if token is None else self._backend.token_to_id(token)

    def _mark_special(self) -> None:
        """Make special what the folder names so, or it would be found in plain text."""
        named = set(self._hf.all_special_tokens)
        for token in self._backend.get_added_tokens_decoder().values():
            if token.content in named and not token.special:
                token.special = True
                self._backend.add_special_tokens([token])

    def _opening(self) -> list[int]:
        """What the tokenizer puts in front of a text by itself."""
        encoded = self._backend.encode("a")
        added = encoded.special_tokens_mask
        return encoded.ids[: added.index(0)] if 0 in added else []

    def _byte_lengths(
        self, vocabulary: Mapping[str, int], added: Mapping[int, Any]
    ) -> np.ndarray | None:
        """Bytes of every token of a byte-level vocabulary, None for any other kind."""
        decoder = self._backend.decoder
        if decoder is None or b"ByteLevel" not in decoder.__getstate__():
            return None
        # A byte-level vocabulary spells each byte as one character; added tokens are plain text.
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


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _from_json(folder: Path, config: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer of a tokenizer.json, with names and chat template from the files beside it.

    The class that `config`, tokenizer_config.json, names is left alone: transformers 5 rebuilds
    many from their vocabulary, with a pre-tokenizer and a normalizer of the class's own
    (huggingface/transformers#45920).
    """
    from tokenizers import Tokenizer as Backend
    from tokenizers import __version__ as version
    from transformers import PreTrainedTokenizerFast

    try:
        backend: Any = Backend.from_file(str(folder / "tokenizer.json"))
    except Exception as error:  # the library raises no class of its own
        raise ValueError(f"tokenizer.json: tokenizers {version} cannot read it: {error}") from None
    tokenizer: Any = PreTrainedTokenizerFast.from_pretrained(folder)
    if tokenizer.bos_token is None and tokenizer.eos_token is None:
        # As in GPT-2's folder, whose config.json alone tells them, as ids.
        model = _read_json(folder / "config.json")
        for name in ("bos_token", "eos_token"):
            if isinstance(model.get(f"{name}_id"), int):
                setattr(tokenizer, name, backend.id_to_token(model[f"{name}_id"]))
    return Tokenizer(tokenizer, backend, adds_bos=config.get("add_bos_token"))


def _from_sentencepiece(folder: Path, config: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer of a sentencepiece tokenizer.model, BPE or unigram, whose ids it gives.

    `config` is tokenizer_config.json: its `added_tokens_decoder` names reserved pieces and those
    after the model's own, and BOS stands in front unless its `add_bos_token` is false.

    Ids are sentencepiece's, but for two things: unigram segmentations of the very same score, and
    marks that combine with a character that a precompiled normalization (NFKC) changes.
    """
    if not (find_spec("sentencepiece") and find_spec("google")):
        raise ValueError(
            "tokenizer.model needs the sentencepiece library; "
            "pip install 'logitmill[sentencepiece]'"
        )
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2 as model_pb2
    from tokenizers import AddedToken, decoders
    from tokenizers import Tokenizer as Backend

    data = (folder / "tokenizer.model").read_bytes()
    try:
        proto: Any = model_pb2.ModelProto.FromString(data)  # type: ignore[attr-defined]
    except DecodeError:
        proto = None
    if proto is None or not proto.pieces:
        raise ValueError(
            "tokenizer.model is not a sentencepiece model; a tiktoken vocabulary of that name "
            "needs a tokenizer.json beside it"
        )
    rules = proto.trainer_spec
    if rules.model_type not in (rules.BPE, rules.UNIGRAM) or rules.treat_whitespace_as_suffix:
        raise ValueError(
            "tokenizer.model is neither BPE nor unigram with spaces in front of words; "
            "a tokenizer.json is needed"
        )
    added = {
        int(i): AddedToken(t["content"], special=t.get("special", False), normalized=False)
        for i, t in config.get("added_tokens_decoder", {}).items()
    }
    piece = proto.SentencePiece
    symbols: list[str] = []
    for i, p in enumerate(proto.pieces):
        if p.type in (piece.CONTROL, piece.UNKNOWN):
            added.setdefault(i, AddedToken(p.piece, special=True, normalized=False))
        elif i in added and added[i].content == p.piece and not added[i].special:
            del added[i]  # as Gemma's runs of spaces, which the model finds better by itself
        if p.type == piece.USER_DEFINED and i not in added and rules.model_type == rules.BPE:
            symbols.append(p.piece)
    names = [added[i].content if i in added else p.piece for i, p in enumerate(proto.pieces)]
    backend: Any = Backend(_model(proto, names, added))
    backend.normalizer = _normalizer(proto, symbols)
    backend.pre_tokenizer = _guard(proto, names, added)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    backend.add_tokens([AddedToken(s, special=False, normalized=True) for s in symbols])
    backend.add_tokens([added[i] for i in sorted(added)])
    for i, token in added.items():
        if backend.token_to_id(token.content) != i:
            raise ValueError(
                f"added_tokens_decoder: {token.content!r} cannot have id {i} after the "
                f"{len(names)} pieces of tokenizer.model; a tokenizer.json is needed"
            )
    named = {
        f"{name}_token": names[i]
        for name in ("bos", "eos", "unk")
        if (i := getattr(rules, f"{name}_id")) >= 0
    }
    tokenizer = _name_tokens(folder, config, backend, named)
    return Tokenizer(tokenizer, backend, adds_bos=config.get("add_bos_token", True))


def _from_tiktoken(folder: Path, config: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer of a tiktoken.model, lines of a token in base64 and its id (Kimi).

    How text is cut before it is merged stands in the code beside it alone, as the string `pat_str`,
    which is read and not run. Ids are those of transformers' own conversion (`TikTokenConverter`).
    `config` is tokenizer_config.json: its `added_tokens_decoder` names the special tokens, which
    follow the vocabulary.
    """
    from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Backend

    try:
        lines = (line.split() for line in (folder / "tiktoken.model").read_bytes().splitlines())
        ids = {b64decode(token, validate=True): int(i) for token, i in filter(None, lines)}
    except ValueError as error:
        raise ValueError(
            f"tiktoken.model does not hold lines of a token in base64 and its id: {error}"
        ) from None
    characters = _byte_characters()
    spelled = {token: "".join(characters[byte] for byte in token) for token in ids}
    # The lowest id merges first, whatever two tokens make it up.
    merges = sorted(
        (i, ids[token[:cut]], ids[token[cut:]], spelled[token[:cut]], spelled[token[cut:]])
        for token, i in ids.items()
        for cut in range(1, len(token))
        if token[:cut] in ids and token[cut:] in ids
    )
    backend: Any = Backend(
        models.BPE(
            {spelled[token]: i for token, i in ids.items()},
            [(left, right) for *_, left, right in merges],
            ignore_merges=True,
        )
    )
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_find_pattern(folder)), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    named = {
        int(i): token["content"] for i, token in config.get("added_tokens_decoder", {}).items()
    }
    # The library numbers what is added one after another.
    specials = [
        named.get(i, f"<|reserved_token_{i}|>") for i in range(len(ids), 1 + max(named, default=-1))
    ]
    backend.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in specials])
    for i, token in named.items():
        if backend.token_to_id(token) != i:
            raise ValueError(
                f"added_tokens_decoder: {token!r} cannot have id {i} after the {len(ids)} tokens "
                "of tiktoken.model; a tokenizer.json is needed"
            )
    return Tokenizer(_name_tokens(folder, config, backend, {}), backend)


def _find_pattern(folder: Path) -> str:
    """The `pat_str` of the Python code in a folder: a string, or strings joined by one."""
    for path in sorted(folder.glob("*.py")):
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, ValueError):
            continue
        for node in ast.walk(tree):
            if not isinstance(node, ast.Assign) or "pat_str" not in map(ast.unparse, node.targets):
                continue
            try:
                match node.value:
                    case ast.Call(func=ast.Attribute(value=joiner, attr="join"), args=[parts]):
                        return ast.literal_eval(joiner).join(ast.literal_eval(parts))
                    case value:
                        return str(ast.literal_eval(value))
            except (ValueError, TypeError):
                continue
    raise ValueError(
        "tiktoken.model does not say how text is cut before it is merged, and no Python code "
        "beside it has a string `pat_str` that does; a tokenizer.json is needed"
    )


def _byte_characters() -> list[str]:
    """How the byte-level vocabularies of the tokenizers library spell each byte (GPT-2)."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = (chr(0x100 + i) for i in range(0x100 - len(printable)))
    return [chr(byte) if byte in printable else next(others) for byte in range(0x100)]


def _name_tokens(
    folder: Path, config: Mapping[str, Any], backend: Any, named: Mapping[str, str]
) -> Any:
    """transformers' tokenizer of a backend, with the chat template of `config` or of its own file.

    Tokens are `named` so where `config` does not name others that the backend has.
    """
    from transformers import PreTrainedTokenizerFast

    found: dict[str, str | None] = dict(named)
    for name in ("bos_token", "eos_token", "unk_token", "pad_token"):
        token = config.get(name)
        token = token["content"] if isinstance(token, Mapping) else token
        if name in config and (token is None or backend.token_to_id(token) is not None):
            found[name] = token
    template = folder / "chat_template.jinja"
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=template.read_text(encoding="utf-8")
        if template.is_file()
        else config.get("chat_template"),
        **found,
    )


def _model(proto: Any, names: Sequence[str], added: Mapping[int, Any]) -> Any:
    """The model of the tokenizers library that segments as a sentencepiece model does."""
    from tokenizers import models

    rules, piece = proto.trainer_spec, proto.SentencePiece
    if rules.model_type == rules.UNIGRAM:
        # A user-defined symbol wins over anything trained, whatever score is stored.
        scores = [-0.1 if p.type == piece.USER_DEFINED else p.score for p in proto.pieces]
        return models.Unigram(
            list(zip(names, scores, strict=True)), rules.unk_id, rules.byte_fallback
        )
    mergeable = {
        p.piece: p.score
        for i, p in enumerate(proto.pieces)
        if i not in added and p.type == piece.NORMAL
    }
    # The best score merges first; which two pieces make it up decides nothing but the order.
    merges = [
        (-score, (name[:cut], name[cut:]))
        for name, score in mergeable.items()
        for cut in range(1, len(name))
        if name[:cut] in mergeable and name[cut:] in mergeable
    ]
    return models.BPE(
        {name: i for i, name in enumerate(names)},
        [pair for _, pair in sorted(merges, key=lambda merge: merge[0])],
        unk_token=names[rules.unk_id],
        fuse_unk=True,
        byte_fallback=rules.byte_fallback,
    )


def _normalizer(proto: Any, symbols: Sequence[str]) -> Any:
    """What a sentencepiece model does to a text before it segments it."""
    from tokenizers import Regex, normalizers

    rules = proto.normalizer_spec
    steps: list[Any] = []
    if rules.precompiled_charsmap:
        steps.append(normalizers.Precompiled(rules.precompiled_charsmap))
    if rules.remove_extra_whitespaces:
        steps += [
            normalizers.Replace(Regex(r"\A +| +\z"), ""),
            normalizers.Replace(Regex(" {2,}"), " "),
        ]
    steps.append(normalizers.Replace(" ", "▁"))
    if rules.add_dummy_prefix and symbols:
        # The library looks for a symbol as the normalizer leaves it, so it must leave symbols as
        # they are; the price is the prefix of a text that is one symbol and nothing else.
        alone = "|".join(re.escape(symbol) for symbol in symbols)
        steps.append(normalizers.Replace(Regex(rf"\A(?!(?:{alone})\z)"), "▁"))
    elif rules.add_dummy_prefix:
        steps.append(normalizers.Prepend("▁"))
    return normalizers.Sequence(steps)


def _guard(proto: Any, names: Sequence[str], added: Mapping[int, Any]) -> Any:
    """A cut inside every reserved name in a text, before its first word; None for BPE.

    The unigram model of the tokenizers library takes any piece that it sees spelled out, `<s>` and
    `<0x0A>` too; sentencepiece's and BPE do not.
    """
    from tokenizers import Regex, pre_tokenizers

    if proto.trainer_spec.model_type != proto.trainer_spec.UNIGRAM:
        return None
    reserved = [
        name
        for i, (name, p) in enumerate(zip(names, proto.pieces, strict=True))
        if i in added or p.type == proto.SentencePiece.BYTE
    ]
    halves = [re.fullmatch(r"(.\W*)(.*)", name, re.DOTALL) for name in reserved]
    spelled = "|".join(f"{re.escape(h[1])}(?={re.escape(h[2])})" for h in halves if h and h[2])
    return pre_tokenizers.Split(Regex(spelled), "merged_with_previous")


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
