"""What stands where a document's tokens are: its text, or what its token ids spell.

A run holds no text. It is read from the corpus again, where that is still what was scored; else ids
are spelled by the model's tokenizer; else they stand for themselves.
"""

from __future__ import annotations

from codecs import getincrementaldecoder
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from itertools import islice
from pathlib import Path

import numpy as np

from ...engine.checkpoint import find_model
from ...engine.intake import split_context
from ...engine.records import Document
from ...engine.tokenization import Tokenizer
from ..folder import endpoint_options, one_line
from ..origin import find_corpus, read_documents
from ..run import Run

PARTIAL, NO_BYTES = "\u00b7", "\u2205"
"""What stands for a token that only begins a character, and for one of no bytes."""
_TOKENIZER_FILES = ("*token*", "*.model", "vocab*", "merges.txt", "config.json", "*.jinja")
# Of tokens, that a tokenizer must spell in as many bytes as they have in the document.
_AGREE = 0.9


class Names:
    """What the tokens of a run's model are called."""

    def __init__(self, run: Run, endpoint_url: str | None) -> None:
        self._model = run.plan["model"]
        self._endpoint_url = endpoint_url
        self._wrong: str | None = None

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The model's tokenizer, None where there is none to be had or it is another's."""
        return self._found[0] if self._wrong is None else None

    @property
    def why_not(self) -> str:
        """Why there is no tokenizer."""
        return self._wrong or self._found[1]

    def spell(self, ids: Sequence[int]) -> list[bytes] | None:
        """The bytes of each token, None without a tokenizer."""
        return self.tokenizer.spell(ids) if self.tokenizer is not None else None

    def name(self, ids: Iterable[int]) -> dict[int, str]:
        """What to call each token: its text, else its number."""
        different = sorted(set(ids))
        spelled = self.spell(different)
        if spelled is None:
            return {i: str(i) for i in different}
        shown = (utf8.decode(errors="backslashreplace") for utf8 in spelled)
        return {i: text or str(i) for i, text in zip(different, shown, strict=True)}

    def hold_to(self, tokens: Mapping[str, np.ndarray]) -> None:
        """Give the tokenizer up if it does not spell a document's tokens in their bytes."""
        lengths = tokens["byte_end"] - tokens["byte_start"]
        spelled = self.spell(tokens["token_id"].tolist())
        if spelled is None or not lengths.any():
            return
        agree = np.fromiter(map(len, spelled), int, len(spelled)) == lengths
        if agree.mean() < _AGREE:
            self._wrong = (
                f"the tokenizer of {self._model['name']!r} is not the one that made these tokens"
            )

    @cached_property
    def _found(self) -> tuple[Tokenizer | None, str]:
        name = self._model["name"]
        try:
            folder = self._find_folder(name)
            tokenizer = Tokenizer.load(folder)
        except (ValueError, OSError) as error:
            return None, one_line(error)
        if tokenizer is None:
            return None, f"{name!r} has no tokenizer"
        return tokenizer, ""

    def _find_folder(self, name: str) -> Path:
        if "://" in name or Path(name).expanduser().exists() or name.count("/") > 1:
            options = endpoint_options(name, self._endpoint_url)
            return find_model(name, storage_options=options, headers_only=True)
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError

        try:
            # No more than it takes: weights may be large.
            return Path(snapshot_download(name, allow_patterns=list(_TOKENIZER_FILES)))
        except (HfHubHTTPError, HFValidationError, OSError) as error:
            raise ValueError(f"model: {name!r} is not to be had: {one_line(error)}") from None


def find_document(run: Run, doc_id: str, endpoint_url: str | None) -> Document:
    """A document of the corpus, as it was scored.

    Raises:
        ValueError: if the corpus is gone or changed, saying so.
    """
    shard, row = run.find(doc_id)
    try:
        spec = find_corpus(run.plan, endpoint_url)
        found = next(islice(read_documents(run, spec, [shard]), row, None), None)
    except (ValueError, OSError) as error:
        raise ValueError(one_line(error)) from None
    if found is None or found.doc_id != doc_id:
        raise ValueError("the corpus has no such document in its shard any more")
    return found


def scored_text(document: Document, names: Names) -> bytes:
    """The UTF-8 text that byte spans count in: messages as rendered, without the context.

    Raises:
        ValueError: if there is none, saying why.
    """
    if document.messages is not None:
        if names.tokenizer is None:
            raise ValueError(f"chat messages cannot be rendered: {names.why_not}")
        return names.tokenizer.render(document.messages).encode()
    if document.text is None:
        raise ValueError("the document is token ids")
    if document.context:
        return split_context(document.context, document.text)[1].encode()
    return document.text.encode()


def cut(utf8: bytes, tokens: Mapping[str, np.ndarray], rows: slice) -> list[str]:
    """The text of each of the tokens `rows`; a character stands where its last byte does.

    Raises:
        ValueError: if the text ends before the tokens do.
    """
    starts, ends = tokens["byte_start"][rows].tolist(), tokens["byte_end"][rows].tolist()
    if len(tokens["byte_end"]) and int(tokens["byte_end"].max()) > len(utf8):
        raise ValueError("its text is shorter than it was when it was scored")
    return join_bytes([utf8[a:b] for a, b in zip(starts, ends, strict=True)])


def join_bytes(parts: Iterable[bytes]) -> list[str]:
    """Bytes of consecutive tokens as text, of which a character may have several."""
    decoder = getincrementaldecoder("utf-8")(errors="replace")
    pieces = []
    for part in parts:
        text = decoder.decode(part)
        pieces.append(text or (PARTIAL if part else NO_BYTES))
    return pieces
