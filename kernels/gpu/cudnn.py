"""Causal attention over packed sequences by cuDNN, through NVIDIA's front end for Python.

torch has cuDNN attend to sequences of one length, with a new plan for every shape. Here sequences
are of any length, and plans are made for numbers of sequences and longest lengths that are rounded
up, so that a run needs few. Which plan a sequence runs in decides no bit of it.

Legend: T packed tokens, H query heads, G key/value heads, D head size.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

log = logging.getLogger(__name__)

# The version that was measured; some before it have bugs in attention, or windows, that are known.
_LEAST = 91900
# Least numbers that plans are made for: what is not there costs next to nothing.
_SEQUENCES, _LENGTH = 64, 8192


@lru_cache(maxsize=1)
def find_version() -> int | None:
    """cuDNN's version, 91900 for 9.19, if the front end is installed and the version will do."""
    try:
        import cudnn

        found = int(cudnn.backend_version())
    except ImportError:
        log.info("attention: without cuDNN's front end, which is faster: see README.md, On a GPU")
        return None
    except (OSError, RuntimeError, AssertionError) as error:
        log.warning("attention: cuDNN's front end finds no cuDNN (%s), so it is not used", error)
        return None
    if found < _LEAST:
        log.warning("attention: cuDNN is %d and not at least %d, so it is not used", found, _LEAST)
        return None
    return found


@dataclass(frozen=True)
class _Shape:
    """What a plan is made for."""

    num_sequences: int
    longest: int
    num_heads: int
    num_groups: int
    size: int
    strides: tuple[int, int, int]
    """Numbers from one row to the next of queries, keys and values."""
    dtype: torch.dtype
    scale: float
    window: int | None


@dataclass(frozen=True)
class _Plan:
    """A graph that cuDNN has made a kernel of, and what its inputs and outputs are called."""

    graph: Any
    q: Any
    k: Any
    v: Any
    out: Any
    starts: Sequence[Any]
    """Of queries, keys, values and results."""
    lengths: Any
    workspace_bytes: int


class _Handle:
    """cuDNN's state on one device for one thread."""

    def __init__(self) -> None:
        import cudnn

        self.raw = cudnn.create_handle()
        weakref.finalize(self, cudnn.destroy_handle, self.raw).atexit = False


class _Local(threading.local):
    """What cuDNN wants each thread to have for itself."""

    def __init__(self) -> None:
        self.handles: dict[torch.device, _Handle] = {}
        self.plans: dict[tuple[torch.device, _Shape], _Plan | None] = {}
        """None where there is none."""


_local = _Local()


def suits(
    q_THD: torch.Tensor,
    k_TGD: torch.Tensor,
    v_TGD: torch.Tensor,
    *,
    scale: float,
    window: int | None,
) -> bool:
    """Whether cuDNN is there and has a kernel for heads like these.

    It goes by no number of sequences or length: those must not decide a bit.
    """
    if find_version() is None:
        return False
    import cudnn

    device, shape = q_THD.device, _shape(q_THD, k_TGD, v_TGD, (1,), scale, window)
    if (device, shape) not in _local.plans:
        try:
            _local.plans[device, shape] = _make_plan(shape, _handle(device))
        except (cudnn.cudnnGraphNotSupportedError, RuntimeError, ValueError) as error:
            log.warning(
                "attention: cuDNN has none for heads of %d, so it is not used (%s)",
                shape.size,
                error,
            )
            _local.plans[device, shape] = None
    return _local.plans[device, shape] is not None


def attend(
    q_THD: torch.Tensor,
    k_TGD: torch.Tensor,
    v_TGD: torch.Tensor,
    lengths: tuple[int, ...],
    out_THD: torch.Tensor,
    *,
    scale: float,
    window: int | None = None,
) -> None:
    """Attention of packed sequences of `lengths` into `out` [T, H, D], whose other rows stay.

    bfloat16 or float16 on one GPU. The heads of a token lie side by side in each of q, k, v; rows
    may have strides of their own. What stands on the device for `lengths` is kept for the next
    call and belongs to the stream that is current.

    Raises:
        cudnn.cudnnGraphNotSupportedError: if there is no kernel for them, which `suits` tells.
    """
    device = q_THD.device
    shape = _shape(q_THD, k_TGD, v_TGD, lengths, scale, window)
    handle = _handle(device)
    plan = _local.plans.get((device, shape))
    if plan is None:
        plan = _local.plans[device, shape] = _make_plan(shape, handle)
    given = {plan.q: q_THD, plan.k: k_TGD, plan.v: v_TGD, plan.out: out_THD}
    for name, stride in zip(plan.starts, (*shape.strides, out_THD.stride(0)), strict=True):
        given[name] = _starts(lengths, shape.num_sequences, stride, device)
    given[plan.lengths] = _lengths(lengths, shape.num_sequences, device)
    workspace = torch.empty(plan.workspace_bytes, dtype=torch.uint8, device=device)
    plan.graph.execute(given, workspace, handle=handle)


def _shape(
    q_THD: torch.Tensor,
    k_TGD: torch.Tensor,
    v_TGD: torch.Tensor,
    lengths: tuple[int, ...],
    scale: float,
    window: int | None,
) -> _Shape:
    return _Shape(
        num_sequences=_round_up(len(lengths), _SEQUENCES),
        longest=_round_up(max(lengths), _LENGTH),
        num_heads=q_THD.shape[1],
        num_groups=k_TGD.shape[1],
        size=q_THD.shape[2],
        strides=(q_THD.stride(0), k_TGD.stride(0), v_TGD.stride(0)),
        dtype=q_THD.dtype,
        scale=scale,
        window=window,
    )


def _handle(device: torch.device) -> Any:
    """The thread's handle, set to the current stream."""
    import cudnn

    if device not in _local.handles:
        _local.handles[device] = _Handle()
    handle = _local.handles[device].raw
    cudnn.set_stream(handle=handle, stream=torch.cuda.current_stream(device).cuda_stream)
    return handle


def _make_plan(shape: _Shape, handle: Any) -> _Plan:
    import cudnn

    types = cudnn.data_type
    half = {torch.bfloat16: types.BFLOAT16, torch.float16: types.HALF}[shape.dtype]
    graph = cudnn.pygraph(
        io_data_type=half,
        intermediate_data_type=types.FLOAT,
        compute_data_type=types.FLOAT,
        handle=handle,
    )
    count, longest, size = shape.num_sequences, shape.longest, shape.size

    def make_heads(name: str, num_heads: int, stride: int) -> Any:
        dim, strides = [count, num_heads, longest, size], [longest * stride, size, stride, 1]
        return graph.tensor(name=name, dim=dim, stride=strides, data_type=half)

    def make_numbers(name: str, length: int, kind: Any) -> Any:
        dim = [length, 1, 1, 1]
        return graph.tensor(name=name, dim=dim, stride=[1, 1, 1, 1], data_type=kind)

    starts = [
        make_numbers(f"{name}_starts", count + 1, types.INT64) for name in ("q", "k", "v", "out")
    ]
    heads = (shape.num_heads, shape.num_groups, shape.num_groups)
    q, k, v = map(make_heads, ("q", "k", "v"), heads, shape.strides)
    for tensor, start in zip((q, k, v), starts, strict=False):
        tensor.set_ragged_offset(start)
    lengths = make_numbers("lengths", count, types.INT32)
    options: dict[str, Any] = {"use_causal_mask": True}
    if shape.window is not None:
        options = {
            "diagonal_alignment": cudnn.diagonal_alignment.TOP_LEFT,
            "diagonal_band_left_bound": shape.window,
            "diagonal_band_right_bound": 0,
        }
    out, _ = graph.sdpa(
        name="attention",
        q=q,
        k=k,
        v=v,
        generate_stats=False,
        attn_scale=shape.scale,
        use_padding_mask=True,
        seq_len_q=lengths,
        seq_len_kv=lengths,
        **options,
    )
    row = shape.num_heads * size
    out.set_output(True).set_dim([count, shape.num_heads, longest, size])
    out.set_stride([longest * row, size, row, 1]).set_ragged_offset(starts[3])
    graph.validate()
    graph.build_operation_graph()
    graph.create_execution_plans([cudnn.heur_mode.A])
    graph.check_support()
    graph.build_plans()
    return _Plan(graph, q, k, v, out, starts, lengths, max(1, graph.get_workspace_size()))


def _round_up(number: int, least: int) -> int:
    """The next power of two, at least `least`."""
    return max(least, 1 << (number - 1).bit_length())


@lru_cache(maxsize=16)
def _starts(
    lengths: tuple[int, ...], num_sequences: int, stride: int, device: torch.device
) -> torch.Tensor:
    """Where each sequence starts and the last one ends, in numbers; int64 [sequences + 1].

    Kept for the layers of a batch, which all ask for the same.
    """
    # An int32 would hold 350,000 tokens of an 8B model.
    starts = torch.zeros(num_sequences + 1, dtype=torch.int64)
    starts[1 : len(lengths) + 1] = torch.tensor(lengths).cumsum(0)
    starts[len(lengths) + 1 :] = sum(lengths)
    return (starts * stride).pin_memory().to(device, non_blocking=True)


@lru_cache(maxsize=4)
def _lengths(lengths: tuple[int, ...], num_sequences: int, device: torch.device) -> torch.Tensor:
    """int32 [sequences], with zeros for those that are not there."""
    padded = torch.zeros(num_sequences, dtype=torch.int32)
    padded[: len(lengths)] = torch.tensor(lengths)
    return padded.pin_memory().to(device, non_blocking=True)
