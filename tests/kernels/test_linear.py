"""Matrix products: what is rounded where."""

from __future__ import annotations

import pytest
import torch
from logitmill.kernels.linear import multiply, multiply_wide


def draw(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple(  # type: ignore[return-value]
        torch.randn(*shape, generator=generator).to(dtype) for shape in ((9, 200), (33, 200), (33,))
    )


def test_product_and_bias() -> None:
    x, weight, bias = draw(torch.float32)
    expected = x.double() @ weight.double().T + bias.double()
    torch.testing.assert_close(multiply(x, weight, bias).double(), expected, atol=1e-4, rtol=1e-5)
    plain = multiply(x, weight).double()
    torch.testing.assert_close(plain, expected - bias.double(), atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_wide_product_is_never_rounded_to_the_operands_dtype(dtype: torch.dtype) -> None:
    """A bfloat16 head matmul adds 2.5e-3 to a loss (marin#8217)."""
    x, weight, _ = draw(dtype)
    out = multiply_wide(x, weight.float())
    assert out.dtype == torch.float32
    expected = x.double() @ weight.double().T
    torch.testing.assert_close(out.double(), expected, atol=1e-4, rtol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_gpu_multiplies_narrow_weights_into_float32(dtype: torch.dtype) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")
    x, weight, _ = draw(dtype)
    out = multiply_wide(x.cuda(), weight.cuda())
    assert out.dtype == torch.float32
    expected = x.double() @ weight.double().T
    torch.testing.assert_close(out.cpu().double(), expected, atol=1e-3, rtol=1e-4)
