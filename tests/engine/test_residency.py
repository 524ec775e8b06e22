"""Where layers live: the walk over their tensors, the order of copies, memory and disk.

What a GPU's streams do is played by `Simulated`, which runs what is launched as late and in such
an order as a GPU might; `tests/gpu/test_residency_gpu.py` asks a GPU.
"""

from __future__ import annotations

import gc
import hashlib
import random
import re
import threading
import uuid
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, is_dataclass
from functools import cached_property, partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple, TypeVar

import pytest
import torch
from forks import CONTEXT
from hypothesis import given, settings
from hypothesis import strategies as st
from logitmill.engine import formats, pipeline, residency
from logitmill.engine.formats import Linear, make_head, make_linear, resolve_scheme
from logitmill.engine.layouts import Stored, StoredGroup
from logitmill.engine.residency import (
    MakeLink,
    Resident,
    Streamed,
    _Ring,
    bring,
    count_bytes,
    map_tensors,
)
from logitmill.engine.scratch import Scratch
from logitmill.engine.shared import Shared
from logitmill.engine.weights import Groups, Plain, Quantization, Weight, round_to
from logitmill.kernels.linear import lay_out_group_scales
from logitmill.kernels.quantize import quantize
from oracles import byte_tokenizer, write_model

_T = TypeVar("_T")

CPU = torch.device("cpu")
HOPPER = (9, 0)

# ---- trees -----------------------------------------------------------------------------------


def test_a_tree_that_is_let_go_is_gone_at_once() -> None:
    """Not only when garbage is collected: layers are gigabytes."""
    tree = [torch.zeros(3), (torch.ones(2),)]
    gc.disable()
    try:
        made = map_tensors(tree, lambda x: x + 1)
        watched = [weakref.ref(made[0]), weakref.ref(tree[0])]
        count_bytes(tree)
        del made, tree
        assert all(ref() is None for ref in watched)
    finally:
        gc.enable()


class Pair(NamedTuple):
    first: torch.Tensor
    second: torch.Tensor | None = None


@dataclass(frozen=True)
class Checked:
    """Counts how often it is checked, and computes what has no parameter."""

    weight: torch.Tensor
    seen: list[str]
    total: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.seen.append("checked")
        object.__setattr__(self, "total", self.weight.sum(0))

    @cached_property
    def twice(self) -> torch.Tensor:
        return self.weight * 2


@dataclass(frozen=True, slots=True)
class Slotted:
    weight: torch.Tensor
    name: str


@dataclass(frozen=True)
class Tree:
    pair: Pair
    items: tuple[object, ...]
    more: list[object]
    named: dict[str, torch.Tensor]
    nothing: None
    dtype: torch.dtype
    size: torch.Size


def tensors_of(tree: object) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []

    def see(tensor: torch.Tensor) -> torch.Tensor:
        found.append(tensor)
        return tensor

    map_tensors(tree, see)
    return found


def test_a_walk_reaches_every_tensor_once_and_nothing_else() -> None:
    a, b, c, d, e = (torch.full((2,), float(i)) for i in range(5))
    tree = Tree(
        Pair(a), (b, 7, "x"), [Slotted(c, "c"), (a,)], {"d": d, "e": e}, None, torch.half, a.shape
    )
    calls: list[int] = []

    def change(tensor: torch.Tensor) -> torch.Tensor:
        calls.append(int(tensor[0]))
        return tensor + 10

    made = map_tensors(tree, change)
    # In the order of fields, as in every other process.
    assert calls == [0, 1, 2, 3, 4]
    assert type(made.pair) is Pair
    assert made.pair.second is None
    assert made.pair.first.tolist() == [10, 10]
    assert made.more[1][0] is made.pair.first  # type: ignore[index]
    assert made.items[0].tolist() == [11, 11]  # type: ignore[attr-defined]
    assert made.items[1:] == (7, "x")
    assert type(made.more[0]) is Slotted
    assert made.more[0].weight.tolist() == [12, 12]
    assert made.more[0].name == "c"
    assert {k: v.tolist() for k, v in made.named.items()} == {"d": [13, 13], "e": [14, 14]}
    assert (made.nothing, made.dtype, made.size) == (None, torch.half, torch.Size([2]))
    assert [t.tolist() for t in (a, b, c, d, e)] == [[i, i] for i in range(5)]


def test_what_a_dataclass_checked_and_computed_stays() -> None:
    checked = Checked(torch.ones(3, 2), [])
    assert checked.twice.sum() == 12
    made = map_tensors(checked, lambda x: x.double())
    assert made.seen == checked.seen == ["checked"]
    assert made.total.tolist() == [3, 3]
    assert {t.dtype for t in (made.weight, made.total, made.twice)} == {torch.float64}
    assert checked.total.dtype == checked.twice.dtype == torch.float32


def test_bytes_are_counted_with_gaps_up_to_256() -> None:
    shared = torch.zeros(3, 5, dtype=torch.bfloat16)  # 30 bytes
    tree = (shared, [shared, torch.zeros(65)], torch.zeros(0), torch.zeros(1, dtype=torch.int8))
    assert count_bytes(tree) == 256 + 512 + 256
    assert count_bytes((None, 3)) == 0


AWKWARD = {
    "single group": lay_out_group_scales(torch.randn(37, 1)),
    "by group": lay_out_group_scales(torch.randn(37, 3)),
    "transposed": torch.randn(5, 7).t(),
    "every other": torch.randn(5, 14)[1:, 1::2],
    "expanded": torch.randn(3, 1).expand(3, 9),
    "scalar": torch.tensor(3.5),
    "empty": torch.zeros(0, 4, dtype=torch.bfloat16),
    "e4m3": torch.randn(3, 11).to(torch.float8_e4m3fn),
    "bool": torch.tensor([True, False, True]),
    "long": torch.arange(7)[2:],
}


@pytest.mark.parametrize("name", AWKWARD)
def test_a_tensor_keeps_its_bits_and_strides(name: str) -> None:
    tensor = AWKWARD[name]
    layer = (torch.ones(1), tensor, tensor)
    [held] = stream([layer], make_link=None)
    [copied] = stream([layer], make_link=Simulated)
    for made in (held, copied, bring(layer, CPU)):
        assert made[1].stride() == tensor.stride()
        assert made[1].dtype == tensor.dtype
        assert made[1].shape == tensor.shape
        assert made[1].tolist() == tensor.tolist()
        assert made[2] is made[1]


# ---- linears ---------------------------------------------------------------------------------


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def linears() -> Iterator[tuple[str, Linear]]:
    """Every format, with and without a bias, of rows and groups in awkward numbers."""
    plain = resolve_scheme(Stored(), None, None)
    yield "head", make_head(draw(37, 20), plain, on_gpu=False)
    yield "odd", make_linear([Plain(draw(37, 19))], draw(37), plain, torch.float32)
    for kind in Quantization:
        for capability in (HOPPER, None):
            scheme = resolve_scheme(Stored(), kind, capability)
            for columns, bias in ((128, None), (384, draw(48))):
                made = make_linear([Plain(draw(48, columns))], bias, scheme, torch.float32)
                yield f"{kind} {capability} {columns}", made
    rounded = round_to(Quantization.INT4, draw(32, 256))
    assert isinstance(rounded, Groups)
    order = torch.arange(256).flip(0).to(torch.int32) // 128
    ordered = Groups(rounded.numbers._replace(groups=order))
    wide = Groups(rounded.numbers._replace(scales=rounded.numbers.scales.float()))
    stored = Stored("test", (StoredGroup(Quantization.INT4, "int4"),))
    scheme = resolve_scheme(stored, "int4_fp8_exact", HOPPER)
    for name, weights in (("columns in order", [ordered]), ("parts", [rounded, wide])):
        given_weights: list[Weight] = list(weights)
        bias = draw(32 * len(weights))
        yield name, make_linear(given_weights, bias, scheme, torch.float32)


LINEARS = dict(linears())


def test_every_format_is_among_those_that_are_moved() -> None:
    known = {
        value
        for value in vars(formats).values()
        if is_dataclass(value)
        and value.__module__ == formats.__name__
        and "__call__" in vars(value)
    }
    assert {type(linear) for linear in LINEARS.values()} == known


@pytest.mark.parametrize("name", LINEARS)
def test_a_linear_multiplies_the_same_wherever_it_lives(name: str) -> None:
    linear = LINEARS[name]
    x = quantize(draw(23, linear.shape[1], seed=1), linear.layout)
    expected = linear(x)
    [held] = stream([linear], make_link=None)
    [copied] = stream([linear], make_link=Simulated)
    for made in (held, copied, bring(linear, CPU), map_tensors(linear, torch.clone)):
        assert type(made) is type(linear)
        assert (made.layout, made.shape) == (linear.layout, linear.shape)
        for before, after in zip(tensors_of(linear), tensors_of(made), strict=True):
            assert after.dtype == before.dtype
            assert after.stride() == before.stride()
        assert torch.equal(made(x), expected)
    # None of it is where it was: what a GPU held is free to go.
    places = {t.data_ptr() for t in tensors_of(linear)}
    assert not places & {t.data_ptr() for t in tensors_of(held)}


# ---- copies ----------------------------------------------------------------------------------


@dataclass
class Event:
    is_past: bool = True


class Simulated:
    """A GPU's streams of computing and copying, which run as late as chance has it.

    Events are as CUDA's: a wait is for what had last been recorded when it was asked for. Without
    a seed everything runs at once.
    """

    def __init__(self, num_slots: int, slot_bytes: int, *, seed: int | None = None) -> None:
        self.buffers = [torch.zeros(slot_bytes, dtype=torch.uint8) for _ in range(num_slots)]
        self.log: list[str] = []
        self._chance = None if seed is None else random.Random(seed)
        self._compute: deque[Event | Callable[[], object]] = deque()
        self._copies: deque[Event | Callable[[], object]] = deque()
        self._copied = [Event() for _ in range(num_slots)]
        self._released = [Event() for _ in range(num_slots)]

    def copy(self, source: torch.Tensor, slot: int) -> None:
        self.log.append(f"copy {int(source[0])} to {slot}")
        self._copies.append(self._released[slot])
        self._copies.append(partial(self.buffers[slot][: len(source)].copy_, source))
        self._copied[slot] = self._record(self._copies)

    def wait(self, slot: int) -> None:
        self.log.append(f"wait for {slot}")
        self.launch(self._copied[slot])

    def release(self, slot: int) -> None:
        self.log.append(f"release {slot}")
        self._released[slot] = self._record(self._compute)

    def finish(self, slot: int) -> None:
        event = self._copied[slot]
        while not event.is_past:
            steps = [self._step(self._copies), self._step(self._compute)]
            assert any(steps), "a copy that is waited for never comes"

    def launch(self, work: Event | Callable[[], object]) -> None:
        self._compute.append(work)
        self._run()

    def finish_all(self) -> None:
        while any([self._step(self._compute), self._step(self._copies)]):
            pass
        assert not self._compute, "what is computed waits for a copy that never comes"
        assert not self._copies, "a copy waits for a slot that is never released"

    def _record(self, queue: deque[Event | Callable[[], object]]) -> Event:
        event = Event(False)
        queue.append(lambda: setattr(event, "is_past", True))
        self._run()
        return event

    def _run(self) -> None:
        if self._chance is None:
            self.finish_all()
            return
        for _ in range(self._chance.choice([0, 0, 1, 3, 9])):
            self._step(self._chance.choice([self._compute, self._copies]))

    def _step(self, queue: deque[Event | Callable[[], object]]) -> bool:
        """Run what is first in a queue; False if there is nothing or it has to wait."""
        if not queue or (isinstance(queue[0], Event) and not queue[0].is_past):
            return False
        work = queue.popleft()
        if not isinstance(work, Event):
            work()
        return True


class Locked(Simulated):
    """The same for several threads, one at a time."""

    def __init__(self, num_slots: int, slot_bytes: int, *, seed: int | None = None) -> None:
        super().__init__(num_slots, slot_bytes, seed=seed)
        self._lock = threading.RLock()

    def copy(self, source: torch.Tensor, slot: int) -> None:
        with self._lock:
            super().copy(source, slot)

    def wait(self, slot: int) -> None:
        with self._lock:
            super().wait(slot)

    def release(self, slot: int) -> None:
        with self._lock:
            super().release(slot)

    def finish(self, slot: int) -> None:
        with self._lock:
            super().finish(slot)

    def launch(self, work: Event | Callable[[], object]) -> None:
        with self._lock:
            super().launch(work)


def stream(
    layers: Sequence[_T],
    *,
    num_resident: int = 0,
    num_slots: int = 2,
    make_link: MakeLink | None,
    scratch: Scratch | None = None,
    shared: Shared | None = None,
) -> Streamed[_T]:
    streamed = Streamed[_T](
        len(layers),
        device=CPU,
        num_resident=num_resident,
        num_slots=num_slots,
        make_link=make_link,
        scratch=scratch,
        shared=shared,
    )
    for layer in layers:
        streamed.add(layer)
    return streamed


def numbered(num_layers: int) -> list[torch.Tensor]:
    """Layers of unlike sizes that say which one they are."""
    return [torch.full((i * 97 % 7 * 100 + 1,), i, dtype=torch.uint8) for i in range(num_layers)]


class Watched:
    """A link that can be asked afterwards."""

    def __init__(self, seed: int | None = None) -> None:
        self.seed = seed

    def make(self, num_slots: int, slot_bytes: int) -> Simulated:
        self.link = Locked(num_slots, slot_bytes, seed=self.seed)
        return self.link

    def take_log(self) -> list[str]:
        log, self.link.log = self.link.log, []
        return log


def test_copies_run_ahead_and_on_into_the_next_pass() -> None:
    watched = Watched()
    layers = stream(numbered(3), make_link=watched.make)
    assert watched.take_log() == []
    assert [int(layer[0]) for layer in layers] == [0, 1, 2]
    assert watched.take_log() == [
        *("copy 0 to 0", "copy 1 to 1"),
        *("wait for 0", "release 0", "copy 2 to 0"),
        *("wait for 1", "release 1", "copy 0 to 1"),
        *("wait for 0", "release 0", "copy 1 to 0"),
    ]
    assert [int(layer[0]) for layer in layers] == [0, 1, 2]
    assert watched.take_log() == [
        *("wait for 1", "release 1", "copy 2 to 1"),
        *("wait for 0", "release 0", "copy 0 to 0"),
        *("wait for 1", "release 1", "copy 1 to 1"),
    ]


def test_a_pass_given_up_starts_over_once_all_slots_are_released() -> None:
    watched = Watched()
    layers = stream(numbered(4), make_link=watched.make)
    given_up = iter(layers)
    next(given_up)
    assert int(next(given_up)[0]) == 1
    watched.take_log()
    assert int(next(iter(layers))[0]) == 0
    assert watched.take_log() == [
        *("release 0", "release 1"),
        *("copy 0 to 0", "copy 1 to 1", "wait for 0"),
    ]


def test_layers_that_stay_are_neither_copied_nor_waited_for() -> None:
    watched = Watched()
    layers = stream(numbered(5), num_resident=3, make_link=watched.make)
    assert layers.is_streamed == [False, False, True, False, True]
    assert [int(layer[0]) for layer in layers] == [0, 1, 2, 3, 4]
    assert watched.take_log() == [
        *("copy 2 to 0", "copy 4 to 1"),
        *("wait for 0", "release 0", "copy 2 to 0"),
        *("wait for 1", "release 1", "copy 4 to 1"),
    ]
    # Only what is streamed needs room: of 101, 501, 201, 601 and 301 bytes the third and fifth.
    assert [len(buffer) for buffer in watched.link.buffers] == [512, 512]


LATE = {
    "num_layers": st.integers(1, 9),
    "share": st.floats(0, 1),
    "num_slots": st.integers(1, 4),
    "ends": st.lists(st.integers(0, 12), max_size=5),
    "seed": st.integers(0, 2**16),
}


@given(**LATE)
def test_every_layer_is_read_whole_however_late_things_run(
    num_layers: int, share: float, num_slots: int, ends: list[int], seed: int
) -> None:
    assert_read_whole(num_layers, share, num_slots, ends, seed, None)


@settings(max_examples=40)
@given(**LATE)
def test_every_layer_is_read_from_disk_whole_however_late_things_run(
    num_layers: int, share: float, num_slots: int, ends: list[int], seed: int
) -> None:
    assert_read_whole(num_layers, share, num_slots, ends, seed, Scratch(100_000))


def assert_read_whole(
    num_layers: int,
    share: float,
    num_slots: int,
    ends: list[int],
    seed: int,
    scratch: Scratch | None,
) -> None:
    watched = Watched(seed)
    num_resident = int(share * (num_layers - 1))
    layers = stream(
        numbered(num_layers),
        num_resident=num_resident,
        num_slots=num_slots,
        make_link=watched.make,
        scratch=scratch,
    )
    read: list[list[int]] = []
    expected: list[list[int]] = []
    unfinished = []
    # Passes that are given up after so many layers, two whole ones, one more.
    for end in [*ends, num_layers, num_layers, *ends[:1]]:
        going = iter(layers)
        unfinished.append(going)
        for i, layer in enumerate(going):
            if i == end:
                break
            watched.link.launch(partial(lambda x: read.append(x.tolist()), layer))
            expected.append(numbered(num_layers)[i].tolist())
    # What is still read from disk is copied behind our back.
    if isinstance(layers._ring, _Ring):
        for slot in range(num_slots):
            layers._ring._link.finish(slot)
    watched.link.finish_all()
    assert read == expected


def test_a_pass_that_another_one_has_overtaken_says_so() -> None:
    layers = stream(numbered(3), make_link=Simulated)
    first, second = iter(layers), iter(layers)
    next(first)
    assert int(next(second)[0]) == 0
    with pytest.raises(RuntimeError, match="another pass over the layers has begun"):
        next(first)
    first.close()  # type: ignore[attr-defined]
    assert [int(layer[0]) for layer in second] == [1, 2]


def fail(layers: Iterator[torch.Tensor], at: int, *, close: bool) -> None:
    for layer in layers:
        if int(layer[0]) == at:
            if close:
                layers.close()  # type: ignore[attr-defined]
            raise torch.OutOfMemoryError


@pytest.mark.parametrize("close", [True, False])
def test_a_pass_that_fails_anywhere_is_followed_by_a_whole_one(close: bool) -> None:
    layers = stream(numbered(5), num_resident=1, make_link=Simulated)
    kept = []
    for at in range(5):
        kept.append(iter(layers))
        with pytest.raises(torch.OutOfMemoryError):
            fail(kept[-1], at, close=close)
        assert [layer.tolist() for layer in layers] == [x.tolist() for x in numbered(5)]


@pytest.mark.parametrize("adding", [True, False])
def test_layers_are_added_and_used_in_and_out_of_inference_mode(adding: bool) -> None:
    with torch.inference_mode(adding):
        layers = stream(numbered(3), num_resident=1, make_link=Simulated)
        assert len(list(layers)) == 3
    with torch.inference_mode(not adding):
        assert [int(layer[0]) for layer in layers] == [0, 1, 2]


def test_on_a_cpu_layers_are_used_where_they_lie() -> None:
    given_layers = numbered(4)
    layers = stream(given_layers, num_resident=2, make_link=None)
    assert len(layers) == 4
    for _ in range(2):
        passed = list(layers)
        assert all(a is b for a, b in zip(passed, layers.held, strict=True))
        assert [x.tolist() for x in passed] == [x.tolist() for x in given_layers]
    resident = Resident[torch.Tensor](CPU)
    for layer in given_layers:
        resident.add(layer)
    assert len(resident) == 4
    assert [x.data_ptr() for x in resident] == [x.data_ptr() for x in given_layers]
    assert [x.tolist() for x in resident.held] == [x.tolist() for x in given_layers]


# ---- shared memory ---------------------------------------------------------------------------


def share(layers: Sequence[_T], *, make_link: MakeLink | None) -> list[Streamed[_T]]:
    """Two of the same layers: one that fills their memory, and one that finds it filled."""
    key = uuid.uuid4().hex
    both = [stream(layers, make_link=make_link, shared=Shared(key, len(layers))) for _ in range(2)]
    for a, b in zip(*(streamed._sources for streamed in both), strict=True):
        assert a.data_ptr() != b.data_ptr()
        b[0] ^= 1
        assert a[0] == b[0]
        b[0] ^= 1
    return both


@pytest.mark.parametrize("make_link", [Simulated, None])
def test_layers_in_shared_memory_keep_their_bits_and_strides(make_link: MakeLink | None) -> None:
    tensors = [*AWKWARD.values(), torch.tensor([torch.nan, -0.0, torch.inf])]
    layer = (torch.ones(1), tensors)
    for streamed in share([layer, layer], make_link=make_link):
        for _, made in [*streamed.held, *streamed]:
            for before, after in zip(tensors, made, strict=True):
                assert after.dtype == before.dtype
                assert after.shape == before.shape
                assert after.stride() == before.stride()
                assert str(after.tolist()) == str(before.tolist())


@pytest.mark.parametrize("name", LINEARS)
def test_a_linear_multiplies_the_same_from_shared_memory(name: str) -> None:
    linear = LINEARS[name]
    x = quantize(draw(23, linear.shape[1], seed=1), linear.layout)
    expected = linear(x)
    for streamed in share([linear, linear], make_link=Simulated):
        for made in [*streamed.held, bring(streamed.held[0], CPU)]:
            assert torch.equal(made(x), expected)
        for made in streamed:
            assert torch.equal(made(x), expected)


def test_bits_that_differ_anywhere_are_not_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(residency, "_BLOCK_BYTES", 256)
    layer = (torch.zeros(300), torch.zeros(7, dtype=torch.int8))
    key = uuid.uuid4().hex
    kept = stream([layer], make_link=None, shared=Shared(key, 1))
    for part, at in ((0, 0), (0, 63), (0, 64), (0, 299), (1, 0), (1, 6)):
        other = (layer[0].clone(), layer[1].clone())
        other[part][at] = -0.0 if part == 0 else 1
        apart = stream([other], make_link=None, shared=Shared(key, 1))
        [held] = apart
        assert [x.tolist() for x in held] == [x.tolist() for x in other]
        assert str(held[part][at].item()) == str(other[part][at].item())
        held[0].fill_(5)
        assert not kept.held[0][0].any()


# ---- disk ------------------------------------------------------------------------------------


@pytest.fixture(autouse=True, scope="module")
def _scratch(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOGITMILL_SCRATCH", str(tmp_path_factory.mktemp("scratch")))
        yield


def test_layers_on_disk_are_copied_in_the_order_of_layers() -> None:
    watched = Watched()
    layers = stream(numbered(3), make_link=watched.make, scratch=Scratch(10_000))
    for _ in range(2):
        assert [layer.tolist() for layer in layers] == [x.tolist() for x in numbered(3)]
    for slot in range(2):
        layers._ring._link.finish(slot)  # type: ignore[union-attr]
    log = watched.take_log()
    assert [line for line in log if line.startswith("copy")] == [
        *("copy 0 to 0", "copy 1 to 1", "copy 2 to 0"),
        *("copy 0 to 1", "copy 1 to 0", "copy 2 to 1"),
        *("copy 0 to 0", "copy 1 to 1"),
    ]
    for slot in range(2):
        # Each copy is waited for once it has been started, and its slot released after that.
        turns = [line.split()[0] for line in log if line.endswith(str(slot))]
        assert turns == ["copy", "wait", "release"] * 3 + ["copy"]


def test_on_a_cpu_layers_on_disk_are_used_where_they_are_mapped() -> None:
    given_layers = [draw(300, 700, seed=i) for i in range(5)]
    layers = stream(given_layers, num_resident=2, make_link=None, scratch=Scratch(10**7))
    places = [layer.data_ptr() for layer in layers.held]
    given_up = []
    for end in (0, 3, 5, 1, 5, 5):
        given_up.append(iter(layers))
        for i, layer in zip(range(end), given_up[-1], strict=False):
            assert layer.data_ptr() == places[i]
            assert torch.equal(layer, given_layers[i])


def test_a_layer_that_the_disk_does_not_give_ends_the_pass(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    layers = stream(numbered(4), make_link=Locked, scratch=Scratch(10_000))
    whole = [x.tolist() for x in numbered(4)]
    read = Scratch.read
    fails: list[int] = []

    def fail_once(self: Scratch, part: torch.Tensor, out: torch.Tensor) -> None:
        read(self, part, out)
        if int(out[0]) in fails:
            fails.clear()
            raise OSError("Input/output error")

    def two_passes() -> None:
        # The first layers have been read before.
        assert len([*layers, *layers]) == 8

    monkeypatch.setattr(Scratch, "read", fail_once)
    for at in (1, 0, 3, 2):
        fails.append(at)
        with pytest.raises(
            OSError, match=r"scratch: layers cannot be read back from .*scratch0: Input/output"
        ):
            two_passes()
        assert [layer.tolist() for layer in layers] == whole


@pytest.mark.parametrize("close", [True, False])
@pytest.mark.parametrize("make_link", [Locked, None])
def test_a_pass_from_disk_that_fails_anywhere_is_followed_by_a_whole_one(
    make_link: MakeLink | None, close: bool
) -> None:
    layers = stream(numbered(5), num_resident=1, make_link=make_link, scratch=Scratch(10_000))
    kept = []
    for at in range(5):
        kept.append(iter(layers))
        with pytest.raises(torch.OutOfMemoryError):
            fail(kept[-1], at, close=close)
        assert [layer.tolist() for layer in layers] == [x.tolist() for x in numbered(5)]


@pytest.mark.parametrize("make_link", [Locked, None])
def test_layers_on_disk_that_are_let_go_are_gone_at_once(make_link: MakeLink | None) -> None:
    before = {*threading.enumerate()}
    gc.collect()
    gc.disable()
    try:
        scratch = Scratch(10_000)
        file = weakref.ref(scratch)
        layers = stream(numbered(3), make_link=make_link, scratch=scratch)
        ring = weakref.ref(layers._ring)
        assert len(list(layers)) == 3
        next(iter(layers))
        del scratch, layers
        for thread in {*threading.enumerate()} - before:
            thread.join(10)
            assert not thread.is_alive()
        assert ring() is None
        assert file() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("name", LINEARS)
def test_a_linear_multiplies_the_same_from_disk(name: str) -> None:
    linear = LINEARS[name]
    x = quantize(draw(23, linear.shape[1], seed=1), linear.layout)
    expected = linear(x)
    for make_link in (None, Locked):
        layers = stream([linear, linear], make_link=make_link, scratch=Scratch(10**6))
        for made in [*layers.held, bring(layers.held[0], CPU)]:
            assert torch.equal(made(x), expected)
        for made in layers:
            assert torch.equal(made(x), expected)


def anonymous() -> int:
    """Bytes of this process that lie in no file."""
    found = re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) << 10


def run_from_disk(pipe: Connection, small: Path, large: Path) -> None:
    """Says by how much anonymous memory grows while a model is loaded and run twice."""
    torch.set_num_threads(2)
    ids = list(range(256)) * 2
    # What one layer takes besides, and what libraries take once.
    pipeline(small, device="cpu", residency="disk").get_logits(ids)
    before, most, done = anonymous(), 0, threading.Event()

    def watch() -> None:
        nonlocal most
        while not done.wait(0.002):
            most = max(most, anonymous())

    thread = threading.Thread(target=watch)
    thread.start()
    model = pipeline(large, device="cpu", residency="disk")
    runs = [model.get_logits(ids) for _ in range(2)]
    done.set()
    thread.join()
    pipe.send((most - before, [digest(logits) for logits in runs]))


def digest(logits: torch.Tensor | list[torch.Tensor]) -> str:
    assert isinstance(logits, torch.Tensor)
    return hashlib.sha256(logits.numpy().tobytes()).hexdigest()


def test_a_model_on_disk_takes_little_memory_while_it_loads_and_runs(tmp_path: Path) -> None:
    """200 MB of weights in float32, none of which lies in a file as it is multiplied."""
    small, large = (write_llama(tmp_path / str(n), n) for n in (1, 12))
    ours, theirs = CONTEXT.Pipe()
    process = CONTEXT.Process(target=run_from_disk, args=(theirs, small, large), daemon=True)
    process.start()
    theirs.close()
    assert ours.poll(120), "nothing is said"
    grown, found = ours.recv()
    process.join()
    assert {*found} == {digest(pipeline(large, device="cpu").get_logits(list(range(256)) * 2))}
    assert grown < 75e6


def write_llama(folder: Path, num_layers: int) -> Path:
    """A model with 17 MB a layer in float32, stored in bfloat16."""
    d, f, v = 512, 2048, 256
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": d,
        "intermediate_size": f,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "vocab_size": v,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
    }
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens": (v, d), "model.norm": (d,)}
    for i in range(num_layers):
        layer = f"model.layers.{i}"
        shapes |= {f"{layer}.self_attn.{x}_proj": (d, d) for x in "qkvo"}
        shapes |= {f"{layer}.mlp.{x}_proj": (f, d) for x in ("gate", "up")}
        shapes[f"{layer}.mlp.down_proj"] = (d, f)
        shapes |= {f"{layer}.{x}_layernorm": (d,) for x in ("input", "post_attention")}
    tensors = {
        f"{name}.weight": (draw(*shape, seed=i) * 0.05 + (len(shape) == 1)).bfloat16()
        for i, (name, shape) in enumerate(shapes.items())
    }
    return write_model(folder, config, tensors, byte_tokenizer())


def test_all_layers_may_stay() -> None:
    layers = stream(numbered(3), num_resident=3, make_link=Simulated)
    assert [int(layer[0]) for layer in layers] == [0, 1, 2]
