"""What a device can do, measured: each figure is a run long enough for power limits to bite.

A process measures each once: what several formats share is not measured again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import torch

from ...engine.formats import Scheme
from ...engine.spec import DecoderSpec
from ...engine.weights import Quantization
from ...kernels import linear
from ...kernels.attention import attend
from ...kernels.quantize import Activations, Layout, quantize
from .costs import Cost, attention_flops, linear_shapes

_SECONDS = 0.5
# Sequences that attention is at its best on, as far as the model takes them.
_NUM_SEQUENCES, _LONG = 4, 8192
_HEAD_ROWS = {"cpu": 512, "cuda": 4096}
_COPY_BYTES = {"cpu": 256 << 20, "cuda": 2 << 30}
_TO_HOST_BYTES = 1 << 30


@dataclass(frozen=True)
class Ceiling:
    """The most that a device was seen to do of something."""

    rate: float
    """Operations or bytes a second."""
    text: str
    """Of what, for people."""


@dataclass(frozen=True)
class Ceilings:
    """Of one device, for one model in one format."""

    linears: Ceiling
    head: Ceiling
    attention: Ceiling
    copy: Ceiling
    """Within the device's memory, bytes read and written."""
    to_host: Ceiling | None = None
    """To pinned host memory, if that was asked for."""

    def seconds(self, costs: Mapping[str, Cost]) -> dict[str, float]:
        """The least time of each part, seconds."""
        by_flops = {"linears": self.linears, "head": self.head, "attention": self.attention}
        return {
            part: cost.flops / by_flops[part].rate
            if part in by_flops
            else cost.bytes / self.copy.rate
            for part, cost in costs.items()
        }

    def named(self) -> dict[str, tuple[float, str]]:
        """(rate, of what) by name."""
        everything = vars(self).items()
        return {name: (c.rate, c.text) for name, c in everything if c is not None}


def name_unit(scheme: Scheme, dtype: str) -> str:
    """What multiplies the linears: `fp8`, `int8`, or the name of a dtype."""
    kind = scheme.stored.groups[0].kind if scheme.stored.groups else Quantization.NONE
    run = scheme.runs[kind]
    if run in (Quantization.NONE, Quantization.INT4):
        return dtype
    if scheme.emulated:
        return "float32"
    return "int8" if run == Quantization.INT8 else "fp8"


def measure_ceilings(
    spec: DecoderSpec,
    *,
    unit: str,
    head_unit: str,
    dtype: torch.dtype,
    rows: int,
    device: torch.device,
    to_host: bool,
) -> Ceilings:
    """Measure a device at the shapes of a model.

    Args:
        spec: of the model.
        unit: what multiplies the linears, from `name_unit`.
        head_unit: what multiplies the head, likewise.
        dtype: of the numbers between the products.
        rows: of a product.
        device: to measure.
        to_host: whether to measure copies to the host, too.
    """
    kinds = {layer.feed_forward: layer for layer in spec.layers}.values()
    shapes = [shape for layer in kinds for shape in linear_shapes(spec, layer)]
    windows = [layer.window for layer in spec.layers if layer.window is not None]
    return Ceilings(
        linears=_measure_linears(tuple(shapes), rows, unit, dtype, device),
        head=_measure_head((spec.vocab_size, spec.hidden_size), head_unit, dtype, device),
        attention=_measure_attention(
            spec.num_heads,
            spec.num_kv_heads,
            spec.head_dim,
            max(windows) if len(windows) == spec.num_layers else None,
            min(_LONG, spec.max_positions),
            dtype,
            device,
        ),
        copy=_measure_copy(device),
        to_host=_measure_to_host(device) if to_host else None,
    )


Shape = tuple[int, int]
"""(outputs, inputs) of a product."""


@cache
def _measure_linears(
    shapes: tuple[Shape, ...], rows: int, unit: str, dtype: torch.dtype, device: torch.device
) -> Ceiling:
    work = 2.0 * rows * sum(n * k for n, k in shapes)
    rate = max(
        _sustain(run, device)
        for run in _products(shapes, rows, unit=unit, dtype=dtype, device=device)
    )
    return Ceiling(work * rate, f"{unit} products of {rows:,} rows")


@cache
def _measure_head(shape: Shape, unit: str, dtype: torch.dtype, device: torch.device) -> Ceiling:
    rows = _HEAD_ROWS[device.type]
    rate = _sustain(_head(shape, rows, unit=unit, dtype=dtype, device=device), device)
    return Ceiling(2.0 * rows * shape[0] * shape[1] * rate, f"{unit} to float32, {rows:,} rows")


@cache
def _measure_attention(
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    window: int | None,
    length: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Ceiling:
    lengths = [length] * _NUM_SEQUENCES
    turned = num_heads + num_kv_heads
    heads = _random(sum(lengths), turned + num_kv_heads, dtype, device, head_dim)
    q, k, v = heads[:, :num_heads], heads[:, num_heads:turned], heads[:, turned:]
    rate = _sustain(lambda: attend(q, k, v, lengths, scale=head_dim**-0.5, window=window), device)
    work = _NUM_SEQUENCES * attention_flops(num_heads * head_dim, length, window)
    return Ceiling(work * rate, f"{_NUM_SEQUENCES} sequences of {length:,}")


def _products(
    shapes: Sequence[Shape], rows: int, *, unit: str, dtype: torch.dtype, device: torch.device
) -> list[Callable[[], object]]:
    """Ways of one layer's products, the fastest of which is the ceiling."""
    inputs = {k: _random(rows, k, dtype, device) for k in {k for _, k in shapes}}
    weights = [_random(n, k, dtype, device) for n, k in shapes]
    if unit not in ("fp8", "int8"):
        wide = getattr(torch, unit)
        plain = {k: x.to(wide) for k, x in inputs.items()}
        dense = [w.to(wide) for w in weights]
        return [lambda: [linear.multiply(plain[w.shape[1]], w) for w in dense]]
    layout = Layout.FP8_ROWS if unit == "fp8" else Layout.INT8_ROWS
    taken = {k: quantize(x, layout) for k, x in inputs.items()}
    rounded = [_round(w, layout) for w in weights]
    if unit == "fp8":
        return [
            lambda: [linear.multiply_fp8(taken[w.shape[1]], w, s, None, dtype) for w, s in rounded]
        ]
    return [
        lambda: [linear.multiply_int8(taken[w.shape[1]], w, s, None, dtype) for w, s in rounded],
        # The library's product leaves the scaling to be done.
        lambda: [torch._int_mm(taken[w.shape[1]].values_TK, w.t()) for w, _ in rounded],
    ]


def _head(
    shape: Shape, rows: int, *, unit: str, dtype: torch.dtype, device: torch.device
) -> Callable[[], object]:
    x = _random(rows, shape[1], dtype, device)
    weight = _random(*shape, dtype, device)
    if unit != "fp8":
        wide = getattr(torch, unit)
        narrow, dense = x.to(wide), weight.to(wide)
        return lambda: linear.multiply_wide(narrow, dense)
    taken = quantize(x, Layout.FP8_ROWS)
    rounded, scale = _round(weight, Layout.FP8_ROWS)
    return lambda: linear.multiply_fp8(taken, rounded, scale, None, torch.float32)


@cache
def _measure_copy(device: torch.device) -> Ceiling:
    size = _COPY_BYTES[device.type]
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    rate = 2.0 * size * _sustain(lambda: target.copy_(source), device)
    return Ceiling(rate, "copies, read and written")


@cache
def _measure_to_host(device: torch.device) -> Ceiling | None:
    if device.type != "cuda":
        return None
    source = torch.ones(_TO_HOST_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty(_TO_HOST_BYTES, dtype=torch.uint8, pin_memory=True)
    rate = _TO_HOST_BYTES * _sustain(lambda: target.copy_(source, non_blocking=True), device)
    return Ceiling(rate, "to pinned host memory")


def _random(
    rows: int, columns: int, dtype: torch.dtype, device: torch.device, *more: int
) -> torch.Tensor:
    """Normal numbers: products of zeros would draw less power and run faster."""
    return torch.randn(rows, columns, *more, device=device, dtype=dtype)


def _round(weight: torch.Tensor, layout: Layout) -> tuple[torch.Tensor, torch.Tensor]:
    rounded: Activations = quantize(weight, layout)
    assert rounded.scales is not None
    return rounded.values_TK, rounded.scales[:, 0].contiguous()


@torch.inference_mode()
def _sustain(run: Callable[[], object], device: torch.device) -> float:
    """Runs a second over about `_SECONDS`, after half as long to warm up."""
    run()
    for _ in range(2):
        once = _time(run, 1, device)
    _time(run, max(1, int(0.5 * _SECONDS / once)), device)
    count = max(1, int(_SECONDS / once))
    return count / _time(run, count, device)


def _time(run: Callable[[], object], count: int, device: torch.device) -> float:
    """Seconds of `count` runs, launched one after another."""
    wait(device)
    started = time.perf_counter()
    for _ in range(count):
        run()
    wait(device)
    return time.perf_counter() - started


def wait(device: torch.device) -> None:
    """Until everything launched on the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
