"""What a model thinks on its way: any layer's states, and what the head would make of them.

The logit lens (nostalgebraist: interpreting GPT, 2020): a layer's residual stream through the
model's own final norm and head.

Legend: n scored tokens of a document, R rows of a batch, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

import numpy as np
import torch

from ..kernels.logits import RowStatistics
from .decoder import Decoder
from .head import BARE, Columns, Head, Rows
from .intake import Intake, Work
from .packing import rounds
from .records import Document, DocumentRecord, DocumentScore, TokenRecords
from .runner import Request, Runner
from .transfer import Arrival, to_host

_T = TypeVar("_T")


@dataclass(frozen=True)
class Layered(Generic[_T]):
    """What is told of each of some layers for one document."""

    index: int
    """Position of the document in the input."""
    record: DocumentRecord
    """Its `status` says whether there is anything; scores are not filled in."""
    layers: dict[int, _T]
    """By layer from 0: token records, or states [n, D] of the rows that the tokens were scored by.
    Empty where the document could not be scored."""


class Lens:
    """Reads chosen layers of one model, batch by batch."""

    def __init__(
        self,
        model: Decoder,
        runner: Runner,
        head: Head,
        intake: Intake,
        layers: Sequence[int],
        *,
        max_batch_tokens: int,
    ) -> None:
        self._model, self._runner, self._head, self._intake = model, runner, head, intake
        self._layers = layers
        self._budget = max_batch_tokens

    def score(self, documents: Iterable[Document]) -> Iterator[Layered[TokenRecords]]:
        """The records of every token as each layer would have it.

        The last layer's are the model's own.
        """

        def read(rows: Rows) -> Arrival[Columns]:
            normed = self._model.normalise(rows.hidden_RD)
            return self._head.score(replace(rows, hidden_RD=normed), BARE)

        for item, found in self._read(documents, read, _take_columns):
            yield self._tell(item, {i: _join_records(item, parts) for i, parts in found.items()})

    def states(self, documents: Iterable[Document]) -> Iterator[Layered[torch.Tensor]]:
        """The residual stream after each layer, in host memory."""

        def read(rows: Rows) -> Arrival[torch.Tensor]:
            return to_host(rows.hidden_RD[: rows.count]).then(lambda got: got[0])

        for item, found in self._read(documents, read, lambda states, rows: states[rows]):
            yield self._tell(item, {i: torch.cat(parts) for i, parts in found.items()})

    def _read(
        self,
        documents: Iterable[Document],
        read: Callable[[Rows], Arrival[_T]],
        take: Callable[[_T, slice], _T],
    ) -> Iterator[tuple[Work | DocumentScore, dict[int, list[_T]]]]:
        """Each document with what `read` makes of each layer's rows, window by window."""
        weighed = ((item, _weigh(item)) for item in self._intake.take(documents))
        for group in rounds(weighed, self._budget):
            works = [item for item in group if isinstance(item, Work)]
            found: list[dict[int, list[_T]]] = [{} for _ in works]
            windows = [(i, request) for i, work in enumerate(works) for request in self._cut(work)]
            owners = iter([i for i, _ in windows])
            for batch in rounds(((r, len(r.ids)) for _, r in windows), self._budget):
                for part, layers in self._runner.look(batch, self._layers, read):
                    values = {layer: arrival.wait() for layer, arrival in layers.items()}
                    start = 0
                    for request in part:
                        rows = slice(start, start + len(request.targets))
                        own = found[next(owners)]
                        for layer, value in values.items():
                            own.setdefault(layer, []).append(take(value, rows))
                        start = rows.stop
            done = iter(found)
            for item in group:
                yield item, next(done) if isinstance(item, Work) else {}

    def _tell(self, item: Work | DocumentScore, layers: dict[int, _T]) -> Layered[_T]:
        if isinstance(item, DocumentScore):
            return Layered(item.index, item.record, {})
        record = self._intake.record(item.document)
        record.num_tokens, record.num_tokens_scored = len(item.encoding.ids), len(item.tokens)
        record.num_windows, record.truncated = len(item.windows), item.truncated
        return Layered(item.index, record, layers)

    def _cut(self, work: Work) -> Iterator[Request]:
        """A document's windows and their targets."""
        first = 0
        for window in work.windows:
            targets = work.tokens.token_id[first : first + window.num_targets]
            yield Request(self._intake.inputs(work, window), targets)
            first += window.num_targets


def split_lens(tokens: TokenRecords) -> list[TokenRecords]:
    """The records that each layer would have, in the order of the layers; none if none was read."""
    if tokens.lens is None:
        return []
    bare = replace(
        tokens, top_ids=None, top_logprobs=None, log_tail_mass=None, drawn_ids=None, lens=None
    )
    found = []
    for packed_7N in torch.from_numpy(tokens.lens).permute(1, 2, 0).contiguous():
        fields = RowStatistics.unpack(packed_7N)._asdict()
        found.append(replace(bare, **{name: values.numpy() for name, values in fields.items()}))
    return found


def check_layers(layers: Iterable[int] | None, num_layers: int) -> list[int]:
    """The layers in order, each once; all of them for None, from the end for negative ones.

    Raises:
        ValueError: for one that the model does not have, or none at all.
    """
    if layers is None:
        return list(range(num_layers))
    if isinstance(layers, str) or not isinstance(layers, Iterable):
        raise ValueError(f"layers: {layers!r} is no list of whole numbers, as [0, -1]")
    found = set()
    for layer in layers:
        is_whole = isinstance(layer, (int, np.integer)) and not isinstance(layer, bool)
        if not is_whole or not -num_layers <= layer < num_layers:
            raise ValueError(
                f"layers: {layer!r} is not one of the model's, 0 ... {num_layers - 1}, or "
                f"{-num_layers} ... -1 from the end"
            )
        found.add(int(layer) % num_layers)
    if not found:
        raise ValueError("layers: none are given; leave it out for all of them")
    return sorted(found)


def _weigh(item: Work | DocumentScore) -> int:
    if isinstance(item, DocumentScore):
        return 1
    return sum(window.stop - window.start for window in item.windows)


def _take_columns(columns: Columns, rows: slice) -> Columns:
    return {name: column[rows] for name, column in columns.items()}


def _join_records(item: Work | DocumentScore, parts: Sequence[Columns]) -> TokenRecords:
    assert isinstance(item, Work), "what was not read has no layers"
    joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    return replace(item.tokens, **joined)
