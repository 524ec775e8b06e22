"""Streamed layers on a GPU: the bits of resident ones, in the memory of a few.

Layers of random weights multiply one after another, some small and some large, so that copies
overtake arithmetic and arithmetic copies wherever nothing keeps them apart. Skipped where there
is no GPU.
"""

from __future__ import annotations

import gc
import hashlib
import multiprocessing
import os
import signal
import uuid
from collections.abc import Iterable
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch
from logitmill.engine.formats import Dense, Linear, make_linear, resolve_scheme
from logitmill.engine.layouts import Stored
from logitmill.engine.residency import CudaLink, Layers, Resident, Streamed, bring, count_bytes
from logitmill.engine.scratch import Scratch
from logitmill.engine.shared import Shared
from logitmill.engine.weights import Plain
from logitmill.kernels.quantize import quantize
from oracles import share_of_pages

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

DEVICE = torch.device("cuda")
WIDTH = 2048
NUM_LAYERS = 9
# What the allocator rounds up by.
SLACK = 4 << 20

Layer = tuple[Linear, Linear]


def draw_layer(index: int, *, quantization: str = "none", device: torch.device = DEVICE) -> Layer:
    """Up to 1, 3 or 5 times the width and down again; weights that keep the size of numbers."""
    generator = torch.Generator().manual_seed(index)
    wide = (1, 3, 5)[index % 3] * WIDTH
    scheme = resolve_scheme(Stored(), quantization, torch.cuda.get_device_capability())

    def draw(num_rows: int, num_columns: int) -> Linear:
        weight = torch.randn(num_rows, num_columns, generator=generator) * num_columns**-0.5
        bias = torch.randn(num_rows, generator=generator)
        weights = [Plain(weight.to(device, torch.bfloat16))]
        return make_linear(weights, bias.to(device, torch.bfloat16), scheme, torch.bfloat16)

    return draw(wide, WIDTH), draw(WIDTH, wide)


def fill(
    layers: Layers[Layer], *, quantization: str = "none", device: torch.device = DEVICE
) -> None:
    for index in range(NUM_LAYERS):
        layers.add(draw_layer(index, quantization=quantization, device=device))


@torch.inference_mode()
def run(layers: Iterable[Layer], num_tokens: int, *, end: int = NUM_LAYERS) -> torch.Tensor:
    """What the first layers make of the same tokens, [tokens, width]."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    x = torch.randn(num_tokens, WIDTH, device=DEVICE, generator=generator).bfloat16()
    for index, (up, down) in enumerate(layers):
        if index == end:
            raise torch.OutOfMemoryError
        wide = up(quantize(x, up.layout)).relu()
        x = x * 0.5 + down(quantize(wide, down.layout))
    return x


def free_memory() -> int:
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


FORMATS = ["none", "fp8", "fp8_block", "int8", "int4", "int4_fp8", "int4_fp8_exact"]


@pytest.mark.parametrize("quantization", FORMATS)
def test_streamed_layers_give_the_bits_of_resident_ones(quantization: str) -> None:
    try:
        resolve_scheme(Stored(), quantization, torch.cuda.get_device_capability())
    except ValueError as error:
        pytest.skip(str(error))
    resident = Resident[Layer](DEVICE)
    fill(resident, quantization=quantization)
    # Of few tokens the copies are what takes long, of many the arithmetic.
    sizes = (64, 16384, 64)
    expected = [run(resident, n) for n in sizes]
    assert all(x.isfinite().all() for x in expected)
    for num_resident, num_slots in ((0, 2), (0, 1), (0, 3), (4, 2), (NUM_LAYERS, 2)):
        streamed = Streamed[Layer](
            NUM_LAYERS, device=DEVICE, num_resident=num_resident, num_slots=num_slots
        )
        fill(streamed, quantization=quantization)
        # Launched one after another: no pass waits for the one before.
        got = [run(streamed, n) for n in sizes]
        for a, b in zip(got, expected, strict=True):
            assert torch.equal(a, b), (num_resident, num_slots, len(b))


def test_a_pass_that_fails_anywhere_is_followed_by_a_whole_one() -> None:
    resident = Resident[Layer](DEVICE)
    fill(resident)
    streamed = Streamed[Layer](NUM_LAYERS, device=DEVICE, num_resident=2)
    fill(streamed)
    expected = run(resident, 8192)
    got = []
    for end in range(NUM_LAYERS):
        with pytest.raises(torch.OutOfMemoryError):
            run(streamed, 8192, end=end)
        got.append(run(streamed, 8192))
    assert all(torch.equal(x, expected) for x in got)


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Scratch:
    """On a disk: temporary folders may be memory."""
    reasons = []
    for folder in (tmp_path, Path(__file__).parent):
        monkeypatch.setenv("LOGITMILL_SCRATCH", str(folder))
        try:
            return Scratch(1 << 30)
        except ValueError as error:
            reasons.append(str(error))
    pytest.skip("; ".join(reasons))


@pytest.mark.parametrize(("num_resident", "num_slots"), [(0, 2), (0, 1), (0, 3), (4, 2)])
def test_layers_on_disk_give_the_bits_of_resident_ones(
    scratch: Scratch, num_resident: int, num_slots: int
) -> None:
    resident = Resident[Layer](DEVICE)
    fill(resident)
    sizes = (64, 16384, 64)
    expected = [run(resident, n) for n in sizes]
    on_disk = Streamed[Layer](
        NUM_LAYERS,
        device=DEVICE,
        num_resident=num_resident,
        num_slots=num_slots,
        scratch=scratch,
    )
    fill(on_disk)
    got = [run(on_disk, n) for n in sizes]
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    for end in range(NUM_LAYERS):
        with pytest.raises(torch.OutOfMemoryError):
            run(on_disk, 8192, end=end)
        assert torch.equal(run(on_disk, 64), expected[0])


def test_layers_on_disk_that_are_let_go_leave_no_memory_behind(scratch: Scratch) -> None:
    free_memory()
    run([bring(draw_layer(2), DEVICE)], 16)
    before = free_memory()
    for _ in range(3):
        on_disk = Streamed[Layer](NUM_LAYERS, device=DEVICE, scratch=scratch)
        fill(on_disk)
        # Copies and reads of the next pass are under way.
        run(on_disk, 16)
        del on_disk
        assert free_memory() - before <= SLACK


def share(key: str, *, first: int = 0) -> Streamed[Layer]:
    """Layers from the first on, two of which stay."""
    layers = Streamed[Layer](
        NUM_LAYERS, device=DEVICE, num_resident=2, shared=Shared(key, NUM_LAYERS)
    )
    for index in range(NUM_LAYERS):
        layers.add(draw_layer(first + index))
    return layers


def digest(x: torch.Tensor) -> str:
    return hashlib.sha256(x.float().cpu().numpy().tobytes()).hexdigest()


def share_and_wait(pipe: Connection, key: str) -> None:
    layers = share(key)
    pipe.send([digest(run(layers, n)) for n in (64, 8192)])
    signal.pause()


def test_processes_stream_one_pinned_copy() -> None:
    resident = Resident[Layer](DEVICE)
    fill(resident)
    expected = [digest(run(resident, n)) for n in (64, 8192)]
    key, context = uuid.uuid4().hex, multiprocessing.get_context("spawn")
    workers = []
    for _ in range(2):
        pipe, theirs = context.Pipe()
        process = context.Process(target=share_and_wait, args=(theirs, key), daemon=True)
        process.start()
        workers.append((process, pipe))
    try:
        layers = share(key)
        assert [digest(run(layers, n)) for n in (64, 8192)] == expected
        for _, pipe in workers:
            assert pipe.poll(120)
            assert pipe.recv() == expected
        assert all(x.is_pinned() for x in layers._sources)
        streamed_bytes = sum(len(x) for x in layers._sources)
        processes = [os.getpid(), *(process.pid or 0 for process, _ in workers)]
        total = sum(share_of_pages(key, process) for process in processes)
        assert total == pytest.approx(streamed_bytes, rel=0.02)
    finally:
        for process, _ in workers:
            process.kill()
            process.join()
    assert digest(run(layers, 64)) == expected[0]
    assert share_of_pages(key, os.getpid()) == pytest.approx(streamed_bytes, rel=0.02)
    del layers
    assert Shared(key, NUM_LAYERS).whole == set()


def test_layers_of_other_bits_are_not_shared() -> None:
    key = uuid.uuid4().hex
    # Of one size are every third.
    ours, same, others = share(key), share(key), share(key, first=3)
    resident = Resident[Layer](DEVICE)
    fill(resident)
    expected = run(resident, 64)
    assert torch.equal(run(ours, 64), expected)
    assert torch.equal(run(same, 64), expected)
    moved = Resident[Layer](DEVICE)
    for index in range(NUM_LAYERS):
        moved.add(draw_layer(3 + index))
    assert torch.equal(run(others, 64), run(moved, 64))
    del ours, same
    assert torch.equal(run(others, 64), run(moved, 64))
    assert all(x.is_pinned() for x in others._sources)


def test_weights_of_a_cpu_are_those_of_the_gpu() -> None:
    streamed = Streamed[Layer](NUM_LAYERS, device=DEVICE, num_resident=3)
    fill(streamed, device=torch.device("cpu"))
    resident = Resident[Layer](DEVICE)
    fill(resident, device=torch.device("cpu"))
    assert torch.equal(run(streamed, 100), run(resident, 100))
    for held, is_streamed in zip(streamed.held, streamed.is_streamed, strict=True):
        assert isinstance(held[0], Dense)
        assert held[0].weight_NK.is_cuda is not is_streamed
        assert held[0].weight_NK.is_pinned() is is_streamed
        assert bring(held, DEVICE)[1].weight_NK.is_cuda  # type: ignore[attr-defined]


def test_the_device_holds_slots_and_what_stays_and_little_more() -> None:
    largest = bring(draw_layer(2), DEVICE)
    run([largest], 16)
    start = free_memory()
    run([largest], 16)
    scratch = torch.cuda.max_memory_allocated() - start
    del largest
    before = free_memory()
    for num_resident in (0, 3):
        streamed = Streamed[Layer](NUM_LAYERS, device=DEVICE, num_resident=num_resident)
        fill(streamed)
        sizes = [count_bytes(layer) for layer in streamed.held]
        moving = [n for n, moves in zip(sizes, streamed.is_streamed, strict=True) if moves]
        room = 2 * max(moving) + sum(sizes) - sum(moving)
        assert room < sum(sizes)
        assert free_memory() - before <= room + SLACK
        for _ in range(3):
            run(streamed, 16)
        torch.cuda.synchronize()
        assert torch.cuda.max_memory_allocated() - before <= room + scratch + SLACK
        del streamed
        assert free_memory() - before <= SLACK


SIZE = 256 << 20


def test_memory_of_slots_that_are_gone_is_not_written_to() -> None:
    source = torch.zeros(SIZE, dtype=torch.uint8, pin_memory=True)
    link = CudaLink(DEVICE, 1, SIZE)
    link.copy(source, 0)
    del link
    taken = [torch.full((SIZE,), 7, dtype=torch.uint8, device=DEVICE) for _ in range(2)]
    torch.cuda.synchronize()
    assert all((x == 7).all() for x in taken)


def test_slots_wait_for_what_reads_the_memory_that_they_take() -> None:
    source = torch.zeros(SIZE, dtype=torch.uint8, pin_memory=True)
    ones = torch.ones(SIZE, dtype=torch.uint8, device=DEVICE)
    free_memory()
    torch.cuda._sleep(10**9)
    total = ones.sum()
    place = ones.data_ptr()
    del ones
    link = CudaLink(DEVICE, 1, SIZE)
    assert link.buffers[0].data_ptr() == place
    link.copy(source, 0)
    assert total.item() == SIZE
