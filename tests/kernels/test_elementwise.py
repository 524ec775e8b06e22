"""Numbers keep their bits wherever they lie, whatever the number of threads."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from logitmill.kernels.elementwise import apply


@pytest.fixture(params=[1, 2, 3, 5])
def _threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("_threads")
@pytest.mark.parametrize("function", [torch.sigmoid, F.silu, F.gelu])
@pytest.mark.parametrize(
    "shape", [(512, 256), (512, 160), (512, 100), (512, 7), (64, 40000), (3, 5)]
)
def test_a_row_keeps_its_bits_in_any_place(
    shape: tuple[int, int], function: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    out = apply(function, x)
    torch.testing.assert_close(out, function(x), atol=1e-6, rtol=1e-6)
    for shift in (1, shape[0] // 3 + 1):
        assert torch.equal(apply(function, x.roll(shift, 0)), out.roll(shift, 0))
    assert torch.equal(apply(function, torch.cat([x, x])[:, :]), torch.cat([out, out]))


def test_a_view_is_taken_as_its_rows() -> None:
    x = torch.randn(40, 64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(apply(torch.sigmoid, x[:, :32]), apply(torch.sigmoid, x[:, :32].clone()))
