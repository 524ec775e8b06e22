"""The arithmetic of kernels under test against torch: it is the GPU's or its stand-in's."""

from __future__ import annotations

import pytest
import torch

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

NARROW = [torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]
SIZE = 64


@triton.jit
def _cast(x_ptr, out_ptr, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.arange(0, SIZE)
    tl.store(out_ptr + at, tl.load(x_ptr + at).to(out_ptr.dtype.element_ty))


@triton.jit
def _dot(x_ptr, y_ptr, out_ptr, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.arange(0, SIZE)
    tile = at[:, None] * SIZE + at[None]
    out = tl.dot(tl.load(x_ptr + tile), tl.load(y_ptr + tile))
    tl.store(out_ptr + tile, out)


@triton.jit
def _arithmetic(x_ptr, y_ptr, out_ptr, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.arange(0, SIZE)
    x, y = tl.load(x_ptr + at), tl.load(y_ptr + at)
    tl.store(out_ptr + at, x + y)
    tl.store(out_ptr + SIZE + at, x * y)
    tl.store(out_ptr + 2 * SIZE + at, -x)
    tl.store(out_ptr + 3 * SIZE + at, tl.where(x < y, x, y))
    tl.store(out_ptr + 4 * SIZE + at, (x < y).to(tl.bfloat16))
    tl.store(out_ptr + 5 * SIZE + at, at.to(tl.bfloat16))
    tl.store(out_ptr + 6 * SIZE + at, tl.zeros_like(x) + tl.max(x))


@triton.jit
def _total(x_ptr, out_ptr, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.arange(0, SIZE)
    tl.store(out_ptr, tl.sum(tl.load(x_ptr + at)))


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(shape[0]))


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.cpu().view(torch.uint8)


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("spread", [1e-3, 1.0, 300.0, 1e5])
def test_casts_round_to_nearest_and_saturate(
    device: torch.device, dtype: torch.dtype, spread: float
) -> None:
    x = spread * draw(2048)
    x[:5] = torch.tensor([0.0, -0.0, torch.nan, 1e30, -1e30])
    out = torch.empty(2048, dtype=dtype, device=device)
    _cast[(1,)](x.to(device), out, SIZE=2048)
    largest = torch.finfo(dtype).max
    expected = (x if dtype == torch.bfloat16 else x.clamp(-largest, largest)).to(dtype)
    known = ~x.isnan()
    assert torch.equal(
        bits(out)[known.repeat_interleave(dtype.itemsize)],
        bits(expected)[known.repeat_interleave(dtype.itemsize)],
    )
    assert out[2].float().isnan()


@pytest.mark.parametrize("dtype", NARROW)
def test_every_number_widens_to_itself(device: torch.device, dtype: torch.dtype) -> None:
    size = 1 << (8 * dtype.itemsize)
    patterns = torch.arange(size).to(torch.uint8 if size == 256 else torch.uint16)
    x = patterns.view(dtype)
    out = torch.empty(size, device=device)
    _cast[(1,)](x.to(device), out, SIZE=size)
    torch.testing.assert_close(out.cpu(), x.float(), atol=0, rtol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", NARROW)
def test_dot(device: torch.device, dtype: torch.dtype) -> None:
    x, y = draw(SIZE, SIZE).to(dtype), draw(SIZE, SIZE).T.contiguous().to(dtype)
    out = torch.empty(SIZE, SIZE, device=device)
    _dot[(1,)](x.to(device), y.to(device), out, SIZE=SIZE)
    expected = x.double() @ y.double()
    # The tensor cores of Hopper keep about 14 bits of a float8 sum.
    atol = 1e-4 if dtype == torch.bfloat16 else 0.05
    torch.testing.assert_close(out.cpu().double(), expected, atol=atol, rtol=1e-3)


def test_bfloat16_arithmetic(device: torch.device) -> None:
    x, y = draw(SIZE).bfloat16(), draw(2, SIZE)[1].bfloat16()
    out = torch.empty(7, SIZE, dtype=torch.bfloat16, device=device)
    _arithmetic[(1,)](x.to(device), y.to(device), out, SIZE=SIZE)
    expected = [x + y, x * y, -x, torch.minimum(x, y), (x < y).bfloat16()]
    expected += [torch.arange(SIZE).bfloat16(), x.max().expand(SIZE)]
    assert torch.equal(out.cpu(), torch.stack(expected))


def test_a_bfloat16_sum(device: torch.device) -> None:
    x = draw(SIZE).bfloat16()
    out = torch.empty(1, dtype=torch.bfloat16, device=device)
    _total[(1,)](x.to(device), out, SIZE=SIZE)
    assert out.item() == pytest.approx(x.double().sum().item(), abs=0.1)
