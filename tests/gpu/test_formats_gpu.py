"""Each format's linear at the shapes of an 8B layer, against what the format means.

The reference multiplies dequantized operands in float64. Its weights are what a CPU makes of the
same numbers, without a kernel; activations are rounded on the GPU, since their rounding is tested
with the kernels. Skipped where there is no GPU.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from logitmill.engine.formats import (
    Dense,
    Emulated,
    Linear,
    Scheme,
    make_head,
    make_linear,
    resolve_scheme,
)
from logitmill.engine.layouts import Stored
from logitmill.engine.weights import Plain
from logitmill.kernels.linear import expand_int4
from logitmill.kernels.quantize import dequantize, quantize

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

DEVICE = "cuda"
NUM_TOKENS = 512
# (outputs, inputs) of Llama-3.1-8B: queries with keys and values, gate with up, down.
SHAPES = [(6144, 4096), (28672, 4096), (4096, 14336)]
HEAD = (128256, 4096)
# Outputs that are compared, at either end: rows of weights are rounded alone, or by 128.
ENDS = 1024
# What rounding to bfloat16, which keeps 8 bits, changes of a number at most.
BF16 = 2.0**-8
# Bits that the fp8 tensor cores of Hopper keep of a sum.
FP8_SUM = 2.0**-13
# Products that they sum up at a time.
FP8_STEP = 32


@dataclass(frozen=True)
class Tolerance:
    """An error is at most `of_result` * |result| + `of_size` * root mean square of results."""

    of_result: float
    of_size: float


def tolerance(name: str, num_columns: int) -> Tolerance:
    """What the arithmetic of a format may be off by, its result rounded to bfloat16 once."""
    if name == "int8":
        # Sums are exact; scales and bias are float32.
        return Tolerance(1.01 * BF16, 1e-5)
    if name in ("fp8", "int4_fp8"):
        # Every step cuts a sum off below 14 bits, all of them towards zero; on its way to a small
        # result a sum is about as large as results are.
        steps = num_columns / FP8_STEP
        return Tolerance(BF16 + steps * FP8_SUM, 2 * steps * FP8_SUM)
    if name in ("fp8_block", "int4_fp8_exact"):
        # The same for the steps of a group of 128 columns, whose sums are added in float32: the
        # sums of G groups that add up to a result are a root of G smaller each.
        steps, num_groups = 128 / FP8_STEP, num_columns / 128
        return Tolerance(BF16 + steps * FP8_SUM, num_groups**0.5 * steps * FP8_SUM)
    # Products of bfloat16 are exact in float32; the bias may be added after a first rounding.
    return Tolerance(2.02 * BF16, 2 * BF16)


def scheme(name: str, *, on_gpu: bool, fp8_head: bool = False) -> Scheme:
    capability = torch.cuda.get_device_capability() if on_gpu else None
    return resolve_scheme(Stored(), name, capability, fp8_head=fp8_head)


def ends(tensor: torch.Tensor) -> torch.Tensor:
    """The first and the last rows."""
    return torch.cat([tensor[:ENDS], tensor[-ENDS:]])


def dense(linear: Linear) -> torch.Tensor:
    """The weights that a linear made on a CPU means, float64 on the device."""
    if isinstance(linear, Emulated | Dense):
        weight = linear.weight_NK
    else:
        weight = expand_int4(linear.weight, torch.bfloat16)
    return weight.to(DEVICE).double()


def check(found: torch.Tensor, expected: torch.Tensor, allowed: Tolerance) -> None:
    size = expected.square().mean().sqrt()
    error = (found.double() - expected).abs()
    excess = error - allowed.of_result * expected.abs() - allowed.of_size * size
    assert excess.max() <= 0, f"{error.max() / size:.3g} of the results' size"
    # No scale is off by a little: only sums that are cut off lean to one side, and what is cut off
    # on the way to a result is of sums half as large.
    slope = (found.double() * expected).sum() / expected.square().sum() - 1
    assert abs(slope) <= max(allowed.of_result / 2, 1e-4), f"results are {slope:+.3g} too large"


def activations(num_columns: int) -> torch.Tensor:
    """Rows of unlike size, some columns far larger than others, a row of zeros."""
    x = torch.randn(NUM_TOKENS, num_columns, device=DEVICE)
    x *= torch.logspace(-2, 2, NUM_TOKENS, device=DEVICE)[:, None]
    x[:, :: num_columns // 8] *= 20
    x[NUM_TOKENS // 2] = 0
    return x.bfloat16()


FORMATS = ["none", "fp8", "fp8_block", "int8", "int4", "int4_fp8", "int4_fp8_exact"]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", FORMATS)
@torch.inference_mode()
def test_a_linear_is_its_formats_own_arithmetic(name: str, shape: tuple[int, int]) -> None:
    try:
        on_gpu = scheme(name, on_gpu=True)
    except ValueError as error:
        pytest.skip(str(error))
    torch.manual_seed(shape[0])
    weight = (0.02 * torch.randn(shape, device=DEVICE)).bfloat16()
    bias = torch.randn(shape[0], device=DEVICE).bfloat16()
    linear = make_linear([Plain(weight)], bias, on_gpu, torch.bfloat16)
    assert name == "none" or not isinstance(linear, Dense)
    meant = make_linear(
        [Plain(ends(weight).cpu())], None, scheme(name, on_gpu=False), torch.bfloat16
    )
    assert linear.layout == meant.layout
    x = activations(shape[1])
    taken = quantize(x, linear.layout)
    expected = dequantize(taken).double() @ dense(meant).t() + ends(bias).double()
    found = ends(linear(taken).t()).t()
    assert found.dtype == torch.bfloat16
    allowed = tolerance(name, shape[1])
    # A row alone: rows differ in size by four orders of magnitude.
    for rows in torch.arange(NUM_TOKENS).split(64):
        check(found[rows], expected[rows], allowed)


@pytest.mark.parametrize("fp8_head", [False, True])
@torch.inference_mode()
def test_a_head_returns_float32(fp8_head: bool) -> None:
    try:
        on_gpu = scheme("none", on_gpu=True, fp8_head=fp8_head)
    except ValueError as error:
        pytest.skip(str(error))
    torch.manual_seed(0)
    weight = (0.02 * torch.randn(HEAD, device=DEVICE)).bfloat16()
    head = make_head(weight, on_gpu, on_gpu=True)
    meant = make_head(
        ends(weight).cpu(), scheme("none", on_gpu=False, fp8_head=fp8_head), on_gpu=False
    )
    x = torch.randn(NUM_TOKENS, HEAD[1], device=DEVICE).bfloat16()
    taken = quantize(x, head.layout)
    weights = meant.weight_NK.to(DEVICE).double()  # type: ignore[attr-defined]
    expected = dequantize(taken).double() @ weights.t()
    found = ends(head(taken).t()).t()
    assert found.dtype == torch.float32
    # Float32 sums of exact products; tensor cores cut the last bits off at each of 256 steps.
    allowed = Tolerance(256 * 2.0**-23, 256 * 2.0**-23)
    if fp8_head:
        steps = HEAD[1] / FP8_STEP
        allowed = Tolerance(steps * FP8_SUM, 2 * steps * FP8_SUM)
    check(found, expected, allowed)
