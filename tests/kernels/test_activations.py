"""Gated activations against their formulas, and the kernel against the definition."""

from __future__ import annotations

import math

import pytest
import torch
from by_rows import DTYPES, LAYOUTS, SHAPES, assert_near_activations, poison, takes
from logitmill.kernels.activations import ACTIVATIONS, SWIGLU_CLAMPED, gate
from logitmill.kernels.quantize import Layout, dequantize

gpu = pytest.importorskip("logitmill.kernels.gpu.activations")

# In the tails of the normal distribution, 1 + erf cancels in float32, and where torch computes
# vectors its erf is 1e-6 off: times the operands.
TAIL = 1e-5


def formula(name: str, x: torch.Tensor) -> torch.Tensor:
    """The activation in float64, written so that nothing cancels."""
    x = x.double()
    if name == "silu":
        return x / (1 + (-x).exp())
    if name.startswith("relu"):
        return x.clamp_min(0) ** (2 if name == "relu2" else 1)
    if name == "gelu":
        return 0.5 * x * torch.special.erfc(-x / math.sqrt(2))
    return x / (1 + (-2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)).exp())


def draw(num_rows: int, num_columns: int, dtype: torch.dtype) -> torch.Tensor:
    """Both halves [T, 2F]."""
    generator = torch.Generator().manual_seed(num_rows * num_columns)
    return (2 * torch.randn(num_rows, 2 * num_columns, generator=generator)).to(dtype)


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_first_half_gates_the_second(name: str, dtype: torch.dtype) -> None:
    gated = torch.linspace(-6, 6, 25).to(dtype)
    up = torch.linspace(3, -2, 25).to(dtype)
    out = gate(torch.cat([gated, up])[None], name, Layout.PLAIN).values_TK
    assert out.shape == (1, 25) and out.dtype == dtype
    expected = formula(name, gated) * up.double()
    rtol = max(2e-6, torch.finfo(dtype).eps / 2 * 1.001)
    torch.testing.assert_close(out[0].double(), expected, atol=TAIL, rtol=rtol)


def test_transformers_agree() -> None:
    from transformers.activations import ACT2FN

    x = draw(3, 40, torch.float32)
    theirs = {"gelu_tanh": "gelu_pytorch_tanh"}
    for name in ACTIVATIONS:
        activate = ACT2FN[theirs.get(name, name)]
        gated = gate(x, name, Layout.PLAIN).values_TK
        torch.testing.assert_close(gated, activate(x[:, :40]) * x[:, 40:], atol=TAIL, rtol=1e-6)
        alone = gate(x, name, Layout.PLAIN, gated=False).values_TK
        torch.testing.assert_close(alone, activate(x), atol=TAIL, rtol=1e-6)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_codes_are_rounded_once(name: str) -> None:
    x = draw(7, 256, torch.bfloat16)
    expected = formula(name, x[:, :256]) * x[:, 256:].double()
    out = dequantize(gate(x, name, Layout.INT8_ROWS)).double()
    step = expected.abs().amax(-1, keepdim=True) / 127
    assert ((out - expected).abs() <= 0.501 * step).all()


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_kernel(
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
    shape: tuple[int, int],
    dtype: torch.dtype,
    layout: Layout,
    name: str,
) -> None:
    if not takes(layout, shape[1]):
        pytest.skip("groups are whole")
    x = draw(*shape, dtype)
    x[0, : shape[1]] = 0.0
    expected = gate(x, name, layout)
    poison(monkeypatch)
    out = gpu.gate(x.to(device), name, layout)
    assert_near_activations(out, expected, atol=TAIL)


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_kernel_without_a_gate(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, layout: Layout, name: str
) -> None:
    x = draw(5, 128, torch.bfloat16)
    expected = gate(x, name, layout, gated=False)
    poison(monkeypatch)
    out = gpu.gate(x.to(device), name, layout, False)
    assert_near_activations(out, expected, atol=TAIL)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of the interpreter
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_the_kernel_far_from_zero(device: torch.device, name: str) -> None:
    """Where exponentials overflow the activation is 0 on one side and x on the other."""
    far = torch.tensor([-1e30, -3e4, -200.0, -90.0, 90.0, 200.0, 3e4, 1e30])
    x = torch.cat([far, torch.ones(8)])[None].to(device)
    out = gpu.gate(x, name, Layout.PLAIN).values_TK.cpu()[0]
    expected = far.clamp_min(0.0) ** (2 if name == "relu2" else 1)
    torch.testing.assert_close(out, expected, atol=1e-30, rtol=1e-6)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_kernel_gates_clamped(
    device: torch.device, layout: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(0)
    gate_up = (6 * torch.randn(13, 2 * 384, generator=generator)).bfloat16()
    gate_up[2] = 0
    expected = gate(gate_up, SWIGLU_CLAMPED, layout)
    poison(monkeypatch)
    out = gpu.gate(gate_up.to(device), SWIGLU_CLAMPED, layout)
    monkeypatch.undo()
    assert_near_activations(out, expected, atol=1e-6)


def test_a_clamped_gate_that_is_no_number_stays_none(device: torch.device) -> None:
    gate_up = torch.ones(2, 256)
    gate_up[0, 3] = gate_up[1, 128 + 3] = torch.nan
    for made in (
        gate(gate_up, SWIGLU_CLAMPED, Layout.PLAIN),
        gpu.gate(gate_up.to(device), SWIGLU_CLAMPED, Layout.PLAIN),
    ):
        assert made.values_TK.isnan().cpu().nonzero().tolist() == [[0, 3], [1, 3]]
