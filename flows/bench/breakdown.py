"""Where a GPU's time goes: kernels by the parts of a pass that they belong to."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch

PRODUCT = "linears"
# The first that matches a kernel's name. Names of libraries change; what matches nothing is
# counted as copies, of which torch has many.
_PARTS = [
    ("attention", r"_attend|flash|fmha|sdpa"),
    ("norms", r"_add_norm"),
    ("gate", r"^_gate"),
    ("rotary", r"^_rotate"),
    ("statistics", r"^_row_statistics"),
    ("candidates", r"^_choose_tiles|^_choose_slots|^_sort$"),
    ("narrowing", r"^_narrow"),
    ("quantize", r"^_quantize"),
    ("expansion", r"^_expand"),
    ("routing", r"^_score|^_list_tiles|^_gather$|^_combine|[Ss]ort|[Ss]oft[Mm]ax|searchsorted"),
    (PRODUCT, r"gemm|nvjet|cutlass|cublas|^_int8|^_fp8_blocks|^_multiply"),
    ("copies", r""),
]
# Copies between host and device run beside the arithmetic.
_TRANSFER = re.compile(r"^Memcpy (HtoD|DtoH)")


@dataclass(frozen=True)
class Launch:
    """One kernel or copy on the device."""

    name: str
    start: float
    """Microseconds, of any clock."""
    stop: float


@dataclass(frozen=True)
class Breakdown:
    """A pass on a GPU, taken apart."""

    parts: dict[str, float]
    """Seconds of each part, kernels alone, and of `idle` between the first and the last kernel."""
    seconds: float
    """From the start of the first kernel to the end of the last."""

    @property
    def busy(self) -> float:
        """Share of the time in which a kernel ran."""
        return 1.0 - self.parts["idle"] / self.seconds


def break_down(run: Callable[[], object]) -> Breakdown:
    """Run something on a GPU and say where its time went."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        run()
        torch.cuda.synchronize()
    return sum_up(
        Launch(event.name, event.time_range.start, event.time_range.end)
        for event in profiler.events()
        if event.device_type == DeviceType.CUDA
    )


def sum_up(launches: Iterable[Launch]) -> Breakdown:
    """Kernels by part. A product that statistics follow directly is the head's."""
    kernels = sorted(
        (launch for launch in launches if not _TRANSFER.match(launch.name)),
        key=lambda launch: launch.start,
    )
    if not kernels:
        raise RuntimeError("breakdown: the profiler saw no kernel")
    names = [find_part(kernel.name) for kernel in kernels]
    for i in range(1, len(names)):
        if names[i] == "statistics" and names[i - 1] == PRODUCT:
            names[i - 1] = "head"
    parts: dict[str, float] = defaultdict(float)
    for name, kernel in zip(names, kernels, strict=True):
        parts[name] += (kernel.stop - kernel.start) * 1e-6
    seconds = (max(kernel.stop for kernel in kernels) - kernels[0].start) * 1e-6
    parts["idle"] = seconds - _covered(kernels) * 1e-6
    return Breakdown(dict(sorted(parts.items(), key=lambda item: -item[1])), seconds)


def find_part(name: str) -> str:
    """The part that a kernel belongs to, by its name; a product counts as a linear's."""
    return next(part for part, pattern in _PARTS if re.search(pattern, name))


def _covered(kernels: Sequence[Launch]) -> float:
    """Microseconds in which at least one of the kernels ran; they are in order of their start."""
    covered = 0.0
    until = kernels[0].start
    for kernel in kernels:
        covered += max(0.0, kernel.stop - max(until, kernel.start))
        until = max(until, kernel.stop)
    return covered
