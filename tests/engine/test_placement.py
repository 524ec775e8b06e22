"""Where layers live: what is chosen, and what it is called."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from logitmill.engine import placement
from logitmill.engine.placement import (
    Batches,
    Disk,
    Placement,
    Room,
    arrange,
    place,
    spread,
    tokens_to_hide,
)
from logitmill.engine.spec import DecoderSpec, FeedForward, Layer, Norm


@given(num_layers=st.integers(1, 100), share=st.floats(0, 1))
def test_streamed_layers_are_spread_evenly(num_layers: int, share: float) -> None:
    num_resident = int(share * num_layers)
    is_streamed = spread(num_layers, num_resident)
    assert len(is_streamed) == num_layers
    assert is_streamed.count(False) == num_resident
    places = [i for i, moves in enumerate(is_streamed) if moves]
    # From one to the next, around the end as well: as many layers as there are, or one more.
    again = [*places[1:], *(p + num_layers for p in places[:1])]
    steps = {b - a for a, b in zip(places, again, strict=True)}
    if places:
        assert steps <= {num_layers // len(places), -(-num_layers // len(places))}


GB = 10**9
choose = partial(place, fixed_bytes=2 * GB, activation_bytes=GB, host_bytes=100 * GB, wanted=None)


def test_layers_stay_if_all_fit_to_the_byte() -> None:
    placement = choose([GB] * 10, device_bytes=13 * GB)
    assert placement == Placement(
        num_layers=10, num_resident=10, resident_bytes=10 * GB, streamed_bytes=0
    )
    assert not placement.is_streamed
    assert placement.describe(8192) == "all 10 layers resident (10.0 GB)"
    less = choose([GB] * 10, device_bytes=13 * GB - 1)
    # 9.99 GB of room: 7 layers and 2 slots.
    assert less.num_resident == 7
    assert less.is_streamed
    assert (less.resident_bytes, less.streamed_bytes) == (7 * GB, 3 * GB)
    assert (less.num_slots, less.slot_bytes) == (2, GB)
    assert less.describe(8192) == (
        "7 of 10 layers resident, 3 streamed from pinned host memory (3.0 GB), 2 slots of 1.0 GB: "
        "all would take 13.0 GB of 12.9 GB"
    )


def test_as_many_layers_stay_as_fit_beside_the_slots() -> None:
    for room, num_resident in ((4 * GB, 2), (4 * GB - 1, 1), (3 * GB, 1), (2 * GB, 0)):
        placement = choose([GB] * 10, device_bytes=3 * GB + room)
        assert placement.num_resident == num_resident
    three = choose([GB] * 10, device_bytes=7 * GB, num_slots=3)
    assert (three.num_resident, three.num_slots) == (1, 3)


def test_a_large_layer_stays_where_its_slots_would_take_more() -> None:
    # Of [F, F, T, F, F, T] and the like, those that leave the first one where it is.
    layers = [4 * GB, *[GB] * 5]
    placement = choose(layers, device_bytes=3 * GB + 8 * GB)
    assert spread(6, placement.num_resident)[0] is False
    assert placement.slot_bytes == GB
    assert (placement.num_resident, placement.resident_bytes) == (3, 6 * GB)


def test_what_was_asked_for_is_done_or_refused() -> None:
    fits = choose([GB] * 10, device_bytes=50 * GB, wanted="host")
    assert (fits.num_resident, fits.streamed_bytes) == (0, 10 * GB)
    assert fits.describe(8192).endswith("2 slots of 1.0 GB: as asked for")
    assert choose([GB] * 10, device_bytes=13 * GB, wanted="device").num_resident == 10
    with pytest.raises(
        ValueError, match=r"residency: 'device' takes 13.0 GB, .* is 12.9 GB; leave"
    ):
        choose([GB] * 10, device_bytes=13 * GB - 1, wanted="device")
    with pytest.raises(ValueError, match="residency: 'tape' is not one of device, host, disk"):
        choose([GB] * 10, device_bytes=13 * GB, wanted="tape")


def test_too_little_device_memory_is_refused_with_what_would_do() -> None:
    assert choose([GB] * 10, device_bytes=5 * GB).num_resident == 0
    for wanted in (None, "host"):
        with pytest.raises(ValueError) as caught:  # noqa: PT011
            choose([GB] * 10, device_bytes=5 * GB - 1, wanted=wanted)
        assert str(caught.value) == (
            "device_memory: 4.9 GB is less than the 5.0 GB that 2 layers at a time (2.0 GB), what "
            "always stays (2.0 GB) and a batch (1.0 GB) take; give more or use a smaller "
            "max_batch_tokens"
        )
    # Where no batch at all would fit, a smaller one is no help.
    with pytest.raises(ValueError, match="give more or use a quantization of fewer bits"):
        choose([GB] * 10, device_bytes=4 * GB)


def test_too_little_host_memory_is_refused_with_what_would_do() -> None:
    tight = partial(choose, [GB // 2] * 10, device_bytes=5 * GB, sources=["host"])
    # 2 GB of room: 2 layers and 2 slots, so 8 layers are streamed.
    assert tight(host_bytes=4 * GB).streamed_bytes == 4 * GB
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        tight(host_bytes=4 * GB - 1)
    assert str(caught.value) == (
        "host_memory: 3.9 GB is less than the 4.0 GB that 8 streamed layers take; give more, use a "
        "smaller max_batch_tokens or a quantization of fewer bits"
    )
    with pytest.raises(
        ValueError, match=r"5.0 GB that 10 streamed .* leave residency out or use a"
    ):
        tight(host_bytes=4 * GB, wanted="host")
    assert choose([GB] * 10, device_bytes=13 * GB, host_bytes=0).num_resident == 10


def test_what_fits_neither_device_nor_host_memory_comes_from_disk() -> None:
    tight = partial(choose, [GB // 2] * 10, device_bytes=5 * GB)
    assert tight(host_bytes=4 * GB).source == "host"
    placement = tight(host_bytes=4 * GB - 1)
    assert (placement.source, placement.num_resident) == ("disk", 2)
    assert placement.describe(32768) == (
        "2 of 10 layers resident, 8 read from disk for every batch (4.0 GB), 2 at a time of "
        "0.50 GB: all would take 8.0 GB of 5.0 GB"
    )
    # Two of them are in host memory on their way.
    assert tight(host_bytes=GB).source == "disk"
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        tight(host_bytes=GB - 1)
    assert str(caught.value) == (
        "host_memory: 0.99 GB is less than the 1.0 GB that 2 layers take on their way from disk; "
        "give more or use a quantization of fewer bits"
    )


def test_a_disk_that_is_asked_for_says_what_it_costs() -> None:
    placement = choose([17 * GB // 10] * 80, device_bytes=500 * GB, wanted="disk")
    assert (placement.source, placement.num_resident) == ("disk", 0)
    for rate, cost in (
        (2e9, "2.0 GB/s that is 68 s a batch of 32,768 tokens"),
        (24.9e9, "25 GB/s that is 5.5 s a batch of 32,768 tokens"),
        (5e7, "0.05 GB/s that is 2720 s a batch of 32,768 tokens"),
    ):
        known = replace(placement, disk=Disk("/scratch", rate))
        assert known.describe(32768) == (
            "0 of 80 layers resident, 80 read from disk for every batch (136.0 GB in /scratch; at "
            f"{cost}), 2 at a time of 1.7 GB: as asked for"
        )


def test_on_a_cpu_what_does_not_fit_is_mapped_from_disk() -> None:
    on_cpu = partial(choose, [GB] * 10, is_host=True, host_bytes=0, sources=["disk"])
    assert not on_cpu(device_bytes=13 * GB).is_streamed
    placement = on_cpu(device_bytes=13 * GB - 1)
    # 9.99 GB of room: two of those that are mapped are in memory at a time.
    assert (placement.source, placement.num_resident) == ("disk", 7)
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        on_cpu(device_bytes=13 * GB - 1, wanted="device")
    assert str(caught.value) == (
        "residency: 'device' takes 13.0 GB, and host_memory is 12.9 GB; leave it out to stream "
        "what does not fit from disk"
    )
    with pytest.raises(ValueError, match=r"^host_memory: 4.9 GB is less than the 5.0 GB that 2 la"):
        on_cpu(device_bytes=5 * GB - 1)


_NORM = Norm(eps=1e-5)
_LAYER = Layer(window=None, rotary=None, feed_forward=FeedForward(size=4096))
SPEC = DecoderSpec(
    vocab_size=1000,
    hidden_size=1024,
    num_heads=8,
    num_kv_heads=8,
    head_dim=128,
    max_positions=512,
    layers=(_LAYER,) * 10,
    norm=_NORM,
    scale=1.0,
)


def room(device_bytes: int, host_bytes: int, **kwargs: Any) -> Room:
    return Room(
        device_bytes=device_bytes,
        host_bytes=host_bytes,
        logits_bytes=GB,
        batch_tokens=32768,
        block_rows=32768,
        **kwargs,
    )


def arranged(**kwargs: Any) -> tuple[str, int, int]:
    """Where layers of 0.5 GB come from, how many stay, and the tokens of a batch."""
    made = arrange(SPEC, [GB // 2] * 10, GB, room(**kwargs), width=2)
    placement = made.placement
    source = placement.source if placement.is_streamed else "device"
    return source, placement.num_resident, made.batch_tokens


def test_a_disk_comes_after_batches_that_are_as_small_as_may_be() -> None:
    assert arranged(device_bytes=10 * GB, host_bytes=0) == ("device", 10, 32768)
    source, most, tokens = arranged(device_bytes=6 * GB, host_bytes=100 * GB)
    assert (source, tokens) == ("host", 32768)
    need = (10 - most) * GB // 2
    # Host memory for all but one layer: smaller batches leave room for one more on the device.
    source, num_resident, tokens = arranged(device_bytes=6 * GB, host_bytes=need - GB // 2)
    assert source == "host"
    assert num_resident > most
    assert tokens < 32768
    # No batch is small enough: then it may as well be large.
    assert arranged(device_bytes=6 * GB, host_bytes=GB) == ("disk", most, 32768)
    assert arranged(device_bytes=60 * GB, host_bytes=GB, wanted="disk") == ("disk", 0, 32768)
    with pytest.raises(ValueError, match=r"^host_memory: 1.0 GB is less than the 5.0 GB"):
        arranged(device_bytes=6 * GB, host_bytes=GB, wanted="host")


def test_what_was_set_holds_for_windows_longer_than_a_batch() -> None:
    free = arrange(SPEC, [GB] * 10, GB, room(device_bytes=60 * GB, host_bytes=0), width=2)
    assert free.holds(1 << 30, 1 << 30, 32768)
    made = arrange(
        SPEC, [GB] * 10, GB, room(device_bytes=60 * GB, host_bytes=0, is_set=True), width=2
    )
    assert made.batch_bytes == 49 * GB
    batches = made.batches
    most = (49 * GB - batches.count_bytes(0, 512)) // batches.token_bytes
    assert most > 32768
    assert made.holds(most, most, 512)
    assert not made.holds(most, most + 1, 512)
    assert made.holds(made.batch_tokens, most + 1, 512), "padding alone is no reason to refuse"
    assert batches.count_bytes(most, 512) <= 49 * GB < batches.count_bytes(most + 1, 512)
    refused = str(made.refuse(most, most + 1, 512))
    assert refused.startswith(f"device_memory: a window of {most:,} tokens takes 49.")
    advised = int(refused.split()[-2].replace(",", ""))
    # With its padding it fits, and not much more would.
    assert made.holds(advised, advised + advised // 16, 512)
    assert not made.holds(advised, advised + advised // 15, 512)


@pytest.mark.parametrize("expanded", [0, 1, 2])
def test_weights_that_are_expanded_are_counted(expanded: int) -> None:
    batches = Batches(SPEC, 0, 2, expanded)
    feed_forward = SPEC.layers[0].feed_forward
    assert isinstance(feed_forward, FeedForward)
    largest = 2 * feed_forward.size * SPEC.hidden_size
    assert batches.count_bytes(0, 0) == expanded * largest + Batches(SPEC, 0, 2).count_bytes(0, 0)


@pytest.mark.parametrize("wanted", [None, "host", "device", "disk"])
def test_on_a_cpu_host_memory_is_the_device(wanted: str | None) -> None:
    on_cpu = partial(arranged, is_host=True, wanted=wanted)
    expected = ("disk", 0, 32768) if wanted == "disk" else ("device", 10, 32768)
    assert on_cpu(device_bytes=10 * GB, host_bytes=10 * GB) == expected
    if wanted in ("host", "device"):
        with pytest.raises(ValueError, match=r"^residency: 'device' takes .*y is 5"):
            on_cpu(device_bytes=5 * GB, host_bytes=5 * GB)
    else:
        assert on_cpu(device_bytes=5 * GB, host_bytes=5 * GB)[0] == "disk"


def test_a_batch_hides_a_copy_behind_as_long_arithmetic() -> None:
    rates = {"copy_bytes_per_second": 50e9, "flops_per_second": 400e12}
    # A layer of 500 million parameters in bfloat16: 20 ms, in which 8e12 operations are done.
    tokens = tokens_to_hide(layer_bytes=GB, layer_flops_per_token=GB, **rates)
    assert tokens == 8000
    assert tokens_to_hide(layer_bytes=GB, layer_flops_per_token=GB + 1, **rates) == 8000
    assert tokens_to_hide(layer_bytes=GB, layer_flops_per_token=GB - 1, **rates) == 8001
    # Four bits of the same layer.
    assert tokens_to_hide(layer_bytes=GB // 4, layer_flops_per_token=GB, **rates) == 2000


def test_a_containers_limit_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placement, "_CGROUP", tmp_path)
    system = placement.free_host_memory()
    (tmp_path / "memory.max").write_text("max\n")
    assert placement.free_host_memory() == pytest.approx(system, rel=0.2)
    (tmp_path / "memory.max").write_text("10000000\n")
    (tmp_path / "memory.current").write_text("7000000\n")
    (tmp_path / "memory.stat").write_text("anon 2000000\nfile 5000000\nshmem 1000000\n")
    assert placement.free_host_memory() == 7_000_000
