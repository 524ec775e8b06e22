"""Packed batches through a model and its head, launched without waiting for their results.

Legend: R scored rows of a batch, V vocabulary, k kept candidates.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

import numpy as np
import torch

from .blocks import Blocks
from .decoder import Decoder
from .head import BARE, Columns, Extras, Head, Model, Rows
from .hooks import PackedTokens
from .prefixes import fold, join, unfold
from .transfer import Arrival, Aside, Mark, Meter, Outbox, on, to_device

_T = TypeVar("_T")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Request:
    """A sequence of token ids, and the tokens that its last rows are scored against."""

    ids: np.ndarray
    """Integers: its tokens, after those of `num_shared`; n with them."""
    targets: np.ndarray
    """Integers [r], r <= n: row n - r + i of the sequence is scored against target i."""
    keys: np.ndarray | None = None
    """int64 [r], where tokens are drawn: what decides the draws of each row."""
    group: int | None = None
    """Whose sums its rows are added to, where some are made."""
    shares: bool = False
    """Whether what it and the request before it begin with is computed once. Either all requests of
    a batch do so or none."""
    num_shared: int = 0
    """Tokens that it begins with as the request before it in the batch does, if it shares."""


@dataclass(frozen=True)
class StreamedRows:
    """Consecutive rows of one request: logits over the whole vocabulary, or hidden states."""

    request: int
    """Index among all requests of the stream."""
    first_row: int
    """Of the request's scored rows."""
    values: torch.Tensor
    """[rows, V] in host memory, in the dtype that was asked for: log-probabilities, or logits;
    or [rows, D], hidden states in the model's."""
    columns: Columns
    """The statistics of these rows."""


class Runner:
    """Runs batches of requests; memory that runs out halves what is run at a time."""

    def __init__(self, model: Model, head: Head) -> None:
        self._model = model
        self._head = head
        # One for all streams of rows: memory that is used on a stream is kept for that stream.
        self._aside = Aside(model.device)
        self._meter = Meter(model.device)
        self._limit: int | None = None
        """Most tokens of a batch, once memory has run out."""

    @property
    def depth(self) -> int:
        """Batches worth launching before the oldest one's results are taken."""
        return 2 if self._model.device.type == "cuda" else 0

    def take_device_seconds(self) -> float:
        """Seconds that the device was at work on batches that were done since this was asked."""
        return self._meter.take()

    def launch(
        self, requests: Sequence[Request], *, extras: Extras = BARE
    ) -> list[Arrival[Columns]]:
        """Start a batch; its results, or those of its parts, in the order of the requests.

        Of each row also what `extras` says.
        """
        launched: list[Arrival[Columns]] = []
        launch = partial(self._launch, extras=extras)
        for _, arrival in self._parts(requests, launch, launched):
            launched.append(arrival)
        return launched

    def stream(
        self,
        batches: Iterable[Sequence[Request]],
        dtype: torch.dtype,
        *,
        normalised: bool,
        held: int = 1,
        extras: Extras = BARE,
    ) -> Iterator[list[StreamedRows]]:
        """Every scored row of every request over the whole vocabulary, in order, by chunks.

        With `normalised`, log-probabilities; else logits. A few chunks are under way at a time, and
        the last `held` of those that were given are valid when the next one is asked for.
        """
        outbox = Outbox(self._model.device, dtype, self.depth + 1 + held)
        read = partial(self._head.logits, outbox=outbox, normalised=normalised, extras=extras)
        return self._stream(batches, read, extras.layers)

    def stream_states(
        self, batches: Iterable[Sequence[Request]], extras: Extras
    ) -> Iterator[list[StreamedRows]]:
        """The hidden state of every scored row of every request, as `stream` gives its logits."""
        outbox = Outbox(self._model.device, self._model.dtype, self.depth + 2)
        read = partial(self._head.states, outbox=outbox, extras=extras)
        return self._stream(batches, read, extras.layers)

    def replay(self, states_RD: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
        """(rows, their logits on the host) of hidden states, by the chunks that `stream` takes."""
        device, num_rows = self._model.device, len(states_RD)
        for part in self._head.blocks.cut(self._head.blocks.pad(num_rows)):
            count = min(part.stop, num_rows) - part.start
            if count <= 0:
                return
            with torch.inference_mode(), on(device):
                block_RD = states_RD.new_zeros(part.stop - part.start, states_RD.shape[1])
                block_RD[:count] = states_RD[part.start : part.start + count]
                logits_RV = self._model.logits(to_device(block_RD, device))[:count].cpu()
            yield slice(part.start, part.start + count), logits_RV

    def look(
        self,
        requests: Sequence[Request],
        layers: Sequence[int],
        read: Callable[[Rows], Arrival[_T]],
    ) -> Iterator[tuple[list[Request], dict[int, Arrival[_T]]]]:
        """(requests, what `read` makes of the states after each layer), of a batch by parts.

        It is given the residual stream of the scored rows as soon as there is one.
        """
        return self._parts(requests, partial(self._look, layers, read), ())

    def _look(
        self,
        layers: Sequence[int],
        read: Callable[[Rows], Arrival[_T]],
        requests: Sequence[Request],
    ) -> dict[int, Arrival[_T]]:
        assert isinstance(self._model, Decoder), "others' layers are not known"
        found: dict[int, Arrival[_T]] = {}
        device, chunks = self._model.device, self._head.blocks

        def see(layer: int, states_TD: torch.Tensor, tokens: PackedTokens) -> None:
            if layer in layers:
                found[layer] = read(Rows(states_TD[rows_R], targets_R, len(rows)))

        with torch.inference_mode(), on(device), self._meter.span():
            rows = _scored([len(r.ids) for r in requests], [len(r.targets) for r in requests])
            rows_R = to_device(_pad([rows], chunks), device)
            targets_R = to_device(_pad([r.targets for r in requests], chunks), device)
            # Behind a user's own, which may change what there is to see.
            with self._model.hooked(see):
                self._hidden(requests)
        return found

    def _stream(
        self,
        batches: Iterable[Sequence[Request]],
        read: Callable[[Rows], Iterator[tuple[slice, Arrival[tuple[torch.Tensor, Columns]]]]],
        layers: Sequence[int],
    ) -> Iterator[list[StreamedRows]]:
        under_way: deque[Arrival[list[StreamedRows]]] = deque()
        compute = partial(self._marked, layers=layers)
        parts = (p for batch in batches for p in self._parts(batch, compute, under_way))
        first = 0
        # The next batch is launched before the rows of this one leave, which takes about as long.
        for part, (hidden, mark) in _ahead(parts, min(1, self.depth)):
            sizes = [len(r.targets) for r in part]
            self._aside.follow(mark, *hidden.tensors)
            chunks = read(hidden)
            while chunk := self._next(chunks):
                rows, arrival = chunk
                cut = _cut(sizes, rows, first)
                under_way.append(arrival.then(partial(_split, cut)))
                if len(under_way) > self.depth:
                    yield under_way.popleft().wait()
            first += len(part)
            # Or they would still be held while the batch after the next one is computed.
            del hidden, chunks
        while under_way:
            yield under_way.popleft().wait()

    def _parts(
        self,
        requests: Sequence[Request],
        compute: Callable[[list[Request]], _T],
        running: Iterable[Arrival],
    ) -> Iterator[tuple[list[Request], _T]]:
        """A batch with what `compute` makes of it, or its parts in order if memory asks for parts.

        `running` is what has been launched and still holds memory.
        """
        waiting = [list(requests)] if requests else []
        while waiting:
            part = waiting.pop(0)
            if self._is_too_long(part):
                waiting[:0] = _halve(part)
                continue
            made = _unless_full(partial(compute, part))
            if made is not None:
                yield part, made
                continue
            self._shrink(part, running)
            waiting.insert(0, part)

    def _launch(self, requests: Sequence[Request], extras: Extras) -> Arrival[Columns]:
        with torch.inference_mode(), on(self._model.device), self._meter.span():
            return self._head.score(self._hidden(requests, extras.layers), extras)

    def _marked(self, requests: Sequence[Request], layers: Sequence[int]) -> tuple[Rows, Mark]:
        with on(self._model.device), self._meter.span():
            hidden = self._hidden(requests, layers)
        return hidden, self._aside.mark()

    def _next(self, chunks: Iterator[_T]) -> _T | None:
        """The next chunk; between chunks, the caller's code runs outside of inference mode."""
        with (
            torch.inference_mode(),
            on(self._model.device),
            self._aside.current(),
            self._meter.span(),
        ):
            return next(chunks, None)

    def _hidden(self, requests: Sequence[Request], layers: Sequence[int] = ()) -> Rows:
        """Hidden states of the scored rows and their targets, padded, and the rows unpadded.

        With them what `layers` would say of them, for requests that do not share.
        """
        sequences = [r.ids for r in requests]
        sizes = np.array([len(r.targets) for r in requests])
        shares = requests[0].shares
        hidden_of_tree = self._model.hidden_of_tree if shares else None
        tree = fold(requests) if hidden_of_tree is not None else None
        if tree is not None:
            # The last rows of each sequence, which may be those of several.
            starts = (tree.branches.lengths - sizes).tolist()
            rows = np.concatenate([tree.branches.rows(i, n) for i, n in enumerate(starts)])
        else:
            if shares:
                sequences = list(unfold(requests))
            rows = _scored([len(ids) for ids in sequences], sizes)
        device, blocks, chunks = self._model.device, self._model.blocks, self._head.blocks
        with torch.inference_mode(), on(device):
            ids_T = to_device(_pad(sequences if tree is None else [tree.ids], blocks), device)
            rows_R = to_device(_pad([rows], chunks), device)
            targets_R = to_device(_pad([r.targets for r in requests], chunks), device)
            lens_R7: list[torch.Tensor] = []
            if tree is not None and hidden_of_tree is not None:
                hidden_TD = hidden_of_tree(ids_T, tree)
            else:
                with self._reading(layers, rows_R, targets_R, lens_R7):
                    hidden_TD = self._model.hidden(ids_T, [len(ids) for ids in sequences])
            keys_R = None
            if keys := [r.keys for r in requests if r.keys is not None]:
                keys_R = to_device(_pad(keys, chunks), device)
            groups = sorted({r.group for r in requests if r.group is not None})
            groups_R = None
            if groups:
                # Padding is 0, and of no group.
                places: dict[int | None, int] = {None: 0, **{g: i for i, g in enumerate(groups, 1)}}
                own = np.repeat([places[r.group] for r in requests], sizes)
                groups_R = to_device(_pad([own], chunks), device) - 1
            hidden_RD = hidden_TD[rows_R]
            return Rows(hidden_RD, targets_R, len(rows), keys_R, groups_R, groups, lens_R7)

    @contextmanager
    def _reading(
        self,
        layers: Sequence[int],
        rows_R: torch.Tensor,
        targets_R: torch.Tensor,
        found_R7: list[torch.Tensor],
    ) -> Iterator[None]:
        """A block that finds what the head would say of some rows after each of some layers."""
        if not layers:
            yield
            return
        model = self._model
        assert isinstance(model, Decoder), "others' layers are not known"

        def see(layer: int, states_TD: torch.Tensor, tokens: PackedTokens) -> None:
            if layer in layers:
                normed_RD = model.normalise(states_TD[rows_R])
                found_R7.append(self._head.describe(normed_RD, targets_R))

        with model.hooked(see):
            yield

    def _is_too_long(self, requests: Sequence[Request]) -> bool:
        return len(requests) > 1 and self._limit is not None and _weigh(requests) > self._limit

    def _shrink(self, requests: Sequence[Request], running: Iterable[Arrival]) -> None:
        """Make room for a batch that did not fit: fewer tokens, or fewer rows at a time.

        Raises:
            RuntimeError: if one sequence alone does not fit.
        """
        for arrival in running:
            arrival.wait()
        torch.cuda.empty_cache()
        total = _weigh(requests)
        if len(requests) > 1:
            # Both halves may have to compute what their texts share.
            self._limit = min(max(map(_weigh, _halve(requests))), total - 1)
            log.warning("out of device memory: batches of at most %d tokens from now", self._limit)
            return
        blocks, chunks = self._model.blocks.shrink(), self._head.blocks.shrink()
        if blocks is None and chunks is None:
            raise RuntimeError(
                f"device memory: a window of {total} tokens does not fit; use a smaller context"
            )
        self._model.blocks = blocks or self._model.blocks
        self._head.blocks = chunks or self._head.blocks
        log.warning(
            "out of device memory: products of at most %d rows, and logits of at most %d, from now",
            self._model.blocks.sizes[0],
            self._head.blocks.sizes[0],
        )


def _ahead(items: Iterator[_T], count: int) -> Iterator[_T]:
    """The same items, `count` of them taken before the first is given."""
    waiting: deque[_T] = deque()
    for item in items:
        waiting.append(item)
        if len(waiting) > count:
            yield waiting.popleft()
    yield from waiting


def _unless_full(compute: Callable[[], _T]) -> _T | None:
    """What `compute` returns; None if device memory runs out.

    What had been computed is free by then: an exception that is being handled would hold it.
    """
    try:
        return compute()
    except torch.OutOfMemoryError:
        return None


def _halve(requests: Sequence[Request]) -> list[list[Request]]:
    """Two parts, of which the larger is as small as can be; at least one request each."""
    own = np.cumsum([_count(r) for r in requests])
    shared = np.array([r.num_shared for r in requests])
    # What the second part begins with is computed in both.
    larger = np.maximum(own[:-1], own[-1] - own[:-1] + shared[1:])
    middle = int(np.argmin(larger)) + 1
    first = replace(requests[middle], ids=join(requests, middle), num_shared=0)
    return [list(requests[:middle]), [first, *requests[middle + 1 :]]]


def _weigh(requests: Sequence[Request]) -> int:
    """Tokens that a batch computes."""
    return sum(map(_count, requests))


def _count(request: Request) -> int:
    """Tokens that are computed for a request, or rows that are scored, if those are more."""
    return max(len(request.ids), len(request.targets))


def _scored(lengths: Sequence[int], sizes: Sequence[int] | np.ndarray) -> np.ndarray:
    """Where the scored rows lie, side by side: row j of sequence i is stop - size + j."""
    stops = np.cumsum(lengths)
    return np.arange(np.sum(sizes)) + np.repeat(stops - np.cumsum(sizes), sizes)


def _pad(parts: Sequence[np.ndarray], blocks: Blocks) -> torch.Tensor:
    """The parts one after another, int64, padded with zeros to whole blocks."""
    total = sum(len(part) for part in parts)
    packed = np.zeros(blocks.pad(total), np.int64)
    np.concatenate(parts, out=packed[:total], casting="same_kind")
    return torch.from_numpy(packed)


def _cut(sizes: Sequence[int], rows: slice, first: int) -> list[tuple[int, int, slice]]:
    """(request, its first row, rows of the chunk) of every request that a chunk touches."""
    stops = np.cumsum(sizes)
    starts = stops - sizes
    cut = []
    i = int(np.searchsorted(stops, rows.start, side="right"))
    while i < len(sizes) and starts[i] < rows.stop:
        start, stop = max(rows.start, int(starts[i])), min(rows.stop, int(stops[i]))
        cut.append(
            (first + i, start - int(starts[i]), slice(start - rows.start, stop - rows.start))
        )
        i += 1
    return cut


def _split(
    cut: list[tuple[int, int, slice]], got: tuple[torch.Tensor, Columns]
) -> list[StreamedRows]:
    values, columns = got
    return [
        StreamedRows(request, first_row, values[rows], {n: c[rows] for n, c in columns.items()})
        for request, first_row, rows in cut
    ]
