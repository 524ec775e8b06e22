"""Each format's experts at the shapes of Qwen3-30B-A3B, against what the format means.

The reference multiplies dequantized operands in float64; its weights are what a CPU makes of the
same numbers. Skipped where there is no GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from itertools import pairwise

import pytest
import torch
from logitmill.engine.experts import (
    GroupedDense,
    GroupedEmulated,
    GroupedInt4,
    GroupedLinear,
    SparseExperts,
    make_grouped,
)
from logitmill.engine.formats import make_linear, resolve_scheme
from logitmill.engine.layouts import Stored
from logitmill.engine.spec import Experts, FeedForward, Router
from logitmill.engine.weights import Plain, Weight
from logitmill.kernels.linear import expand_int4
from logitmill.kernels.quantize import dequantize, quantize

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

DEVICE = "cuda"
HIDDEN, SIZE, NUM_EXPERTS, TOP_K = 2048, 768, 16, 4
FORMATS = ["none", "fp8", "fp8_block", "int8", "int4", "int4_fp8", "int4_fp8_exact"]
# (outputs, inputs) of an expert: gate with up, down.
SHAPES = {"gate_up": (2 * SIZE, HIDDEN), "down": (HIDDEN, SIZE)}
# Rows of each expert: none, one, a tile, one more, many, and whatever is left.
COUNTS = [0, 1, 128, 129, 1000, 0, 77, 300]
# What rounding to bfloat16 changes of a number at most, and what the fp8 tensor cores of Hopper
# cut off a sum of as many products as they add up at a time.
BF16, FP8_SUM, FP8_STEP = 2.0**-8, 2.0**-13, 32


def make(
    name: str, weights: list[Weight], bias_EN: torch.Tensor | None, *, on_gpu: bool
) -> GroupedLinear:
    """A format's experts; skips the test where the GPU has no unit for them."""
    capability = torch.cuda.get_device_capability() if on_gpu else None
    try:
        scheme = resolve_scheme(Stored(), name, capability)
    except ValueError as error:
        pytest.skip(str(error))
    return make_grouped(weights, bias_EN, scheme, torch.bfloat16)


def draw_weights(shape: tuple[int, int], num_experts: int, seed: int = 0) -> list[Weight]:
    generator = torch.Generator(DEVICE).manual_seed(seed)
    return [
        Plain(0.02 * torch.randn(shape, generator=generator, device=DEVICE).bfloat16())
        for _ in range(num_experts)
    ]


def draw_rows(num_rows: int, num_columns: int) -> torch.Tensor:
    """Rows of unlike size, some columns far larger than others."""
    generator = torch.Generator(DEVICE).manual_seed(num_rows)
    x = torch.randn(num_rows, num_columns, generator=generator, device=DEVICE)
    x *= torch.logspace(-2, 2, num_rows, device=DEVICE)[:, None]
    x[:, :: num_columns // 8] *= 20
    return x.bfloat16()


def offsets_of(counts: list[int]) -> torch.Tensor:
    return torch.tensor([0, *counts], device=DEVICE).cumsum(0).to(torch.int32)


def meant(linear: GroupedLinear) -> torch.Tensor:
    """The weights that experts made on a CPU mean, float64 on the device."""
    if isinstance(linear, GroupedInt4):
        parts = [expand_int4(part, torch.bfloat16) for part in linear.parts]
        return torch.cat(parts).view(linear.shape).to(DEVICE).double()
    assert isinstance(linear, GroupedDense | GroupedEmulated)
    return linear.weight_ENK.to(DEVICE).double()


def allowed(name: str, num_columns: int) -> tuple[float, float]:
    """(of a result, of the results' size): what the arithmetic of a format may be off by."""
    steps = num_columns / FP8_STEP
    if name in ("fp8", "int4_fp8"):
        return BF16 + steps * FP8_SUM, 2 * steps * FP8_SUM
    if name in ("fp8_block", "int4_fp8_exact"):
        steps, num_groups = 128 / FP8_STEP, num_columns / 128
        # A few columns are far larger than others, and so are the sums of their groups.
        return BF16 + steps * FP8_SUM, 2 * num_groups**0.5 * steps * FP8_SUM
    return 1.01 * BF16, 1e-4


@pytest.mark.parametrize("part", SHAPES)
@pytest.mark.parametrize("name", FORMATS)
@torch.inference_mode()
def test_experts_are_their_formats_own_arithmetic(name: str, part: str) -> None:
    num_rows, num_columns = SHAPES[part]
    weights = draw_weights(SHAPES[part], len(COUNTS))
    bias = torch.randn(len(COUNTS), num_rows, device=DEVICE).bfloat16()
    linear = make(name, weights, bias, on_gpu=True)
    assert name == "none" or not isinstance(linear, GroupedDense)
    on_cpu = make(name, [Plain(w.dense(torch.bfloat16).cpu()) for w in weights], None, on_gpu=False)
    weight_ENK = meant(on_cpu)
    offsets = offsets_of(COUNTS)
    taken = quantize(draw_rows(sum(COUNTS), num_columns), linear.layout)
    found = linear(taken, offsets)
    assert found.dtype == torch.bfloat16 and not found.isnan().any()
    wide = dequantize(taken).double()
    of_result, of_size = allowed(name, num_columns)
    for expert, (start, end) in enumerate(pairwise(offsets.tolist())):
        if start == end:
            continue
        product = wide[start:end] @ weight_ENK[expert].T
        expected = product + bias[expert].double()
        size = product.square().mean(1, keepdim=True).sqrt()
        error = (found[start:end].double() - expected).abs()
        # The bias may cancel a product, but not what was cut off it.
        largest = torch.maximum(expected.abs(), product.abs())
        excess = error - of_result * largest - of_size * size
        assert excess.max() <= 0, f"expert {expert}: {(error / size).max():.3g} of the size"


@pytest.mark.parametrize("part", SHAPES)
@pytest.mark.parametrize("name", FORMATS)
@torch.inference_mode()
def test_a_row_has_the_same_bits_alone(name: str, part: str) -> None:
    linear = make(name, draw_weights(SHAPES[part], len(COUNTS)), None, on_gpu=True)
    offsets = offsets_of(COUNTS)
    x = draw_rows(sum(COUNTS), SHAPES[part][1])
    whole = linear(quantize(x, linear.layout), offsets)
    starts = offsets.tolist()
    for expert in (1, 3, 4, 7):
        for row in (starts[expert], starts[expert + 1] - 1):
            counts = [int(e == expert) for e in range(len(COUNTS))]
            alone = linear(quantize(x[row : row + 1], linear.layout), offsets_of(counts))
            assert torch.equal(alone[0], whole[row])


@lru_cache
def block(name: str, scores: str = "softmax", dtype: torch.dtype = torch.bfloat16) -> SparseExperts:
    """A whole layer's experts, with a shared one that has a gate."""
    sigmoid = scores == "sigmoid"
    groups = {"num_groups": 4, "top_groups": 2, "correction": True} if sigmoid else {}
    router = Router(num_experts=NUM_EXPERTS, top_k=TOP_K, scores=scores, normalised=True, **groups)
    scheme = resolve_scheme(Stored(), name, torch.cuda.get_device_capability())
    gate_up = draw_weights(SHAPES["gate_up"], NUM_EXPERTS, 1)
    down = draw_weights(SHAPES["down"], NUM_EXPERTS, 2)
    shared = [draw_weights(shape, 1, 3) for shape in SHAPES.values()]
    generator = torch.Generator(DEVICE).manual_seed(4)
    router_ED = 0.02 * torch.randn(NUM_EXPERTS, HIDDEN, generator=generator, device=DEVICE)
    return SparseExperts(
        spec=Experts(
            router=router,
            expert=FeedForward(size=SIZE),
            shared=FeedForward(size=SIZE),
            shared_gate=True,
        ),
        router_ED=router_ED.to(dtype),
        correction_E=0.01 * torch.arange(NUM_EXPERTS, device=DEVICE) if sigmoid else None,
        gate_up=make_grouped(gate_up, None, scheme, torch.bfloat16),
        down=make_grouped(down, None, scheme, torch.bfloat16),
        shared=(
            make_linear(shared[0], None, scheme, torch.bfloat16),
            make_linear(shared[1], None, scheme, torch.bfloat16),
        ),
        shared_gate_1D=router_ED[:1].to(dtype),
    )


@contextmanager
def no_waiting() -> Iterator[None]:
    """Raise where something waits for the GPU."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("scores", ["softmax", "sigmoid"])
@pytest.mark.parametrize("name", FORMATS)
@torch.inference_mode()
def test_a_token_has_the_same_bits_in_any_batch_and_nothing_waits(name: str, scores: str) -> None:
    try:
        sparse = block(name, scores)
    except ValueError as error:
        pytest.skip(str(error))
    x = draw_rows(4096, HIDDEN)
    x = x / x.float().square().mean(1, keepdim=True).sqrt().to(x.dtype)
    # The first call compiles.
    sparse(x)
    with no_waiting():
        whole = sparse(x)
    assert whole.shape == x.shape and whole.dtype == torch.bfloat16 and not whole.isnan().any()
    turned = sparse(x.roll(1234, 0))
    assert torch.equal(turned.roll(-1234, 0), whole)
    # A decoder's blocks have at least 512 rows.
    for token in (0, 777, 4095):
        beside = torch.zeros(512, HIDDEN, dtype=x.dtype, device=DEVICE)
        beside[5] = x[token]
        assert torch.equal(sparse(beside)[5], whole[token])
        assert torch.equal(sparse(beside.repeat(3, 1))[1029], whole[token])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@torch.inference_mode()
def test_a_block_is_what_a_cpu_makes_of_it(dtype: torch.dtype) -> None:
    """The router's weights in either dtype."""
    sparse = block("none", "softmax", dtype)
    assert isinstance(sparse.gate_up, GroupedDense) and isinstance(sparse.down, GroupedDense)
    x = torch.randn(512, HIDDEN, generator=torch.Generator().manual_seed(0)).bfloat16()
    there = sparse(x.to(DEVICE)).cpu().float()
    assert sparse.shared is not None and sparse.shared_gate_1D is not None
    here = SparseExperts(
        spec=sparse.spec,
        router_ED=sparse.router_ED.cpu(),
        gate_up=GroupedDense(sparse.gate_up.weight_ENK.cpu()),
        down=GroupedDense(sparse.down.weight_ENK.cpu()),
        shared=tuple(type(part)(part.weight_NK.cpu()) for part in sparse.shared),  # type: ignore
        shared_gate_1D=sparse.shared_gate_1D.cpu(),
    )(x).float()
    error = (there - here).norm(dim=1) / here.norm(dim=1)
    # A token whose last two experts are as good as one another may take the other.
    assert (error < 0.01).float().mean() > 0.99
