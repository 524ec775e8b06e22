"""A run's stored distributions as a torch data set to train a student on."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch.utils.data import IterableDataset, get_worker_info

from .examples import Example, Reader, Source, check_head
from .folder import Folder, StoreError

if TYPE_CHECKING:
    from ..engine import Pipeline
    from .run import Run

_TIERS = ("topk", "sampled", "hidden", "logits")
# Recipes that score every token after the first input once, in order.
_CONSECUTIVE = ("rolling", "strided", "truncated")
_HASH_BLOCK = 4 << 20


class DistillationDataset(IterableDataset):
    """Examples of a run, for a `torch.utils.data.DataLoader` or a loop; see `Run.distillation`.

    An example is a document, or a piece of one, as tensors with a row for each of its n inputs:
    `input_ids` and `target_ids` int64 [n]; with `spans`, `byte_start` and `byte_end` int64 [n] of
    the targets in the document; and by the tier

        topk       top_ids int32 [n, k], top_logprobs float16 [n, k], log_tail_mass float32 [n],
                   logprob float32 [n] of the targets
        sampled    sample_ids int32 [n, m]
        hidden     states [n, D] in the model's dtype; logprobs float32 [n, V] with `pipe`
        logits     logprobs [n, V] in the dtype they were stored in

    with `doc_id` and `first_row`, the first input's place in the document. `engine.losses` has the
    divergences that go with them. Shards are dealt out to the processes of `world_size` and, within
    one, to the workers of a DataLoader; each is read row group by row group, so that memory goes by
    the longest document and the buffer.
    """

    def __init__(
        self,
        run: Run,
        tier: str,
        *,
        vocab_size: int,
        tokenizer: str | Path | None,
        pipe: Pipeline | None,
        context: int | None,
        spans: bool,
        shuffle_buffer: int,
        seed: int,
        rank: int,
        world_size: int,
        check: bool,
    ) -> None:
        super().__init__()
        self._run, self._buffer, self._seed = run, shuffle_buffer, seed
        self._reader = Reader(
            run,
            tier,
            vocab_size,
            pipe,
            context,
            spans,
            keeps=shuffle_buffer > 0,
        )
        _check_tier(run, tier)
        is_whole = tier == "logits" or (tier == "hidden" and pipe is not None)
        _check_vocabulary(vocab_size, run.plan["model"]["vocab_size"], is_whole=is_whole)
        if tokenizer is not None:
            _check_tokenizer(run, Path(tokenizer))
        if pipe is not None:
            if tier != "hidden":
                raise ValueError(f"pipe: {tier!r} holds probabilities already; leave it out")
            check_head(run, pipe)
        for name, value, least in (("context", context, 1), ("shuffle_buffer", shuffle_buffer, 0)):
            if value is not None and value < least:
                raise ValueError(f"{name}: {value} is not at least {least}")
        self._parts = list(run.parts(tier))
        if not 0 <= rank < world_size:
            raise ValueError(f"rank: {rank} is not one of {world_size} processes, 0 ...")
        if world_size > max(1, len(self._parts)):
            raise ValueError(
                f"world_size: {world_size} processes cannot share {len(self._parts)} shards; score "
                "with smaller ones (shard_bytes), or use fewer"
            )
        self._rank, self._world_size = rank, world_size
        self._unchecked = {part["name"]: part["sha256"] for part in _stated(run) if check}
        self._epoch = self._given = self._skipped = 0

    def set_epoch(self, epoch: int) -> None:
        """Shuffle as in this epoch from the next iteration on; all processes give the same."""
        self._epoch = epoch

    def state_dict(self) -> dict[str, int]:
        """Where this process, or worker, is: after the last example that was given."""
        return {"epoch": self._epoch, "given": self._given}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Begin the next iteration after the examples that were given by then.

        What lies before is read again. The other settings must be the same.
        """
        self._epoch = state["epoch"]
        self._given = self._skipped = state["given"]

    def __iter__(self) -> Iterator[Example]:
        skipped, self._skipped, self._given = self._skipped, 0, 0
        for source in self._shuffled():
            self._given += 1
            if self._given > skipped:
                yield source()

    def _shuffled(self) -> Iterator[Source]:
        """Sources of this worker: shards in a random order, documents out of a buffer."""
        order = random.Random(f"{self._seed} {self._epoch}")
        parts = list(self._parts)
        if self._buffer:
            order.shuffle(parts)
        worker = get_worker_info()
        number, count = (worker.id, worker.num_workers) if worker is not None else (0, 1)
        if worker is not None:
            self._reopen()
        own = parts[self._rank :: self._world_size][number::count]
        sources = (source for part in own for source in self._read(part))
        if not self._buffer:
            yield from sources
            return
        order = random.Random(f"{self._seed} {self._epoch} {self._rank} {number}")
        held: list[Source] = []
        for source in sources:
            if len(held) < self._buffer:
                held.append(source)
                continue
            at = order.randrange(self._buffer)
            held[at], source = source, held[at]
            yield source
        order.shuffle(held)
        yield from held

    def _reopen(self) -> None:
        """Read by a file system of this process: an object store's does not survive a fork."""
        folder = self._run.folder
        self._run = copy(self._run)
        self._run.folder = Folder(folder.uri, folder.options, field="run")
        self._reader = replace(self._reader, run=self._run)

    def _read(self, name: str) -> Iterator[Source]:
        self._check_part(name)
        return self._reader.read(name)

    def _check_part(self, name: str) -> None:
        """StoreError for a part that is not the one that the manifest names."""
        wanted = self._unchecked.get(name)
        if wanted is None:
            return
        folder, digest = self._run.folder, hashlib.sha256()
        with folder.filesystem.open(folder.path(name), "rb") as file:
            while block := file.read(_HASH_BLOCK):
                digest.update(block)
        if digest.hexdigest() != wanted:
            raise StoreError(
                f"run: the sha256 of {folder.address(name)} is {digest.hexdigest()[:16]}..., the "
                f"manifest says {wanted[:16]}...; copy it again, or score the run again"
            )
        del self._unchecked[name]


def _stated(run: Run) -> Sequence[Mapping[str, Any]]:
    return run.manifest["parts"] if run.manifest is not None else ()


def _check_tier(run: Run, tier: str) -> None:
    """ValueError for what a run does not hold, or holds with gaps."""
    if tier not in _TIERS:
        raise ValueError(f"tier: {tier!r} holds no distributions; it is one of {', '.join(_TIERS)}")
    run.parts(tier)
    recipe = run.plan["recipe"]
    has_gaps = recipe["name"] not in _CONSECUTIVE or (
        recipe["name"] == "strided" and recipe["stride"] == recipe["context"]
    )
    if has_gaps:
        raise StoreError(
            f"recipe: {recipe['name']} leaves tokens out, or reads ones that are not stored, so "
            f"its rows do not follow each other; score the corpus again with "
            f"{', '.join(_CONSECUTIVE)}, contexts and what follows them as one text"
        )
    if tier in ("hidden", "logits"):
        if "tokens" not in run.tiers:
            raise StoreError(
                f"tier: {tier!r} does not hold the tokens; score with the tier tokens beside it"
            )
        if run.plan.get("prefix_token") is None:
            raise StoreError(
                f"tier: without a prefix (recipe {recipe['name']}, prefix {recipe['prefix']}) the "
                f"first token is not stored beside {tier!r}; use topk or sampled"
            )


def _check_vocabulary(vocab_size: int, model_size: int, *, is_whole: bool) -> None:
    """ValueError for a student whose columns are not those of whole distributions."""
    if vocab_size < 1:
        raise ValueError(f"vocab_size: {vocab_size} is not at least 1")
    if is_whole and vocab_size != model_size:
        raise ValueError(
            f"vocab_size: {vocab_size} columns of a student do not go with the {model_size} that "
            "logits have; use topk, whose ids are checked one by one"
        )


def _check_tokenizer(run: Run, folder: Path) -> None:
    from ..engine.tokenization import Tokenizer

    stored, found = run.plan.get("tokenizer"), Tokenizer.load(folder)
    if found is None:
        raise ValueError(f"tokenizer: {str(folder)!r} holds none")
    if stored != found.digest:
        raise ValueError(
            f"tokenizer: {str(folder)!r} has other tokens ({found.digest[:16]}...) than the run's "
            f"({str(stored)[:16]}...); ids would mean other texts. Align by `spans` instead"
        )
