"""Weights of four bits: what a code means, and what it is rounded to."""

from __future__ import annotations

import pytest
import torch
from logitmill.kernels.linear import (
    Int4,
    expand_int4,
    expand_int4_codes,
    expand_int4_fp8,
    pack_int4,
)

gpu = pytest.importorskip("logitmill.kernels.gpu.linear")


def draw(
    num_rows: int,
    num_columns: int,
    group: int,
    *,
    zeros: bool = True,
    scattered: bool = False,
    dtype: torch.dtype = torch.float16,
) -> tuple[Int4, torch.Tensor]:
    """A weight and its codes [N, K]."""
    generator = torch.Generator().manual_seed(num_columns)
    codes = torch.randint(0, 16, (num_rows, num_columns), generator=generator)
    num_groups = num_columns // group
    scales = (torch.rand(num_rows, num_groups, generator=generator) - 0.3).to(dtype)
    points = torch.randint(0, 17, (num_rows, num_groups), generator=generator).to(torch.uint8)
    groups = torch.randint(0, num_groups, (num_columns,), generator=generator).int()
    return Int4(
        pack_int4(codes),
        scales,
        points if zeros else None,
        groups if scattered else None,
    ), codes


def to(weight: Int4, device: torch.device) -> Int4:
    return Int4(*(None if part is None else part.to(device) for part in weight))  # type: ignore[arg-type]


def test_two_codes_to_a_byte_the_even_column_low() -> None:
    assert pack_int4(torch.tensor([[1, 2, 15, 0]])).tolist() == [[0x21, 0x0F]]


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("scattered", [False, True])
def test_one_weight_at_a_time(zeros: bool, scattered: bool) -> None:
    weight, codes = draw(3, 32, 8, zeros=zeros, scattered=scattered)
    out = expand_int4(weight, torch.bfloat16)
    steps = expand_int4_codes(weight)
    for n in range(3):
        for k in range(32):
            group = int(weight.groups[k]) if weight.groups is not None else k // 8
            zero = int(weight.zeros[n, group]) if weight.zeros is not None else 8
            step = int(codes[n, k]) - zero
            assert steps[n, k].item() == step
            expected = torch.tensor(step * weight.scales[n, group].item()).bfloat16()
            assert out[n, k] == expected


def test_e4m3_holds_every_code_less_every_zero_point() -> None:
    codes, points = torch.arange(16).repeat(17, 8), torch.arange(17)[:, None]
    weight = Int4(pack_int4(codes), torch.ones(17, 1), points.to(torch.uint8))
    assert torch.equal(expand_int4_codes(weight).float(), (codes - points).float())


def test_fp8_over_the_scale_of_a_row_saturates() -> None:
    weight, _ = draw(4, 64, 32)
    row_scale = torch.tensor([1e-3, 0.01, 0.1, 1.0])
    out = expand_int4_fp8(weight, row_scale).double()
    exact = expand_int4(weight, torch.float32).double() / row_scale[:, None].double()
    exact = exact.clamp(-448, 448)
    assert (out[0].abs() == 448).any()
    torch.testing.assert_close(out, exact, atol=2**-10, rtol=2**-4)


SHAPES = [(5, 128, 128), (3, 896, 128), (7, 96, 32), (2, 192, 192), (33, 512, 64), (1, 8, 8)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("scattered", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_kernels_expand_to_the_bit(
    device: torch.device,
    shape: tuple[int, int, int],
    zeros: bool,
    scattered: bool,
    dtype: torch.dtype,
) -> None:
    weight, _ = draw(*shape, zeros=zeros, scattered=scattered, dtype=dtype)
    there = to(weight, device)
    row_scale = 0.001 + torch.rand(shape[0], generator=torch.Generator().manual_seed(1))
    pairs = [
        (gpu.expand_int4(there, dtype), expand_int4(weight, dtype)),
        (gpu.expand_int4_fp8(there, row_scale.to(device)), expand_int4_fp8(weight, row_scale)),
        (gpu.expand_int4_codes(there), expand_int4_codes(weight)),
    ]
    for out, expected in pairs:
        assert out.dtype == expected.dtype and out.shape == expected.shape
        assert torch.equal(out.cpu().view(torch.uint8), expected.view(torch.uint8))
