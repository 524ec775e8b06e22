"""Blocks of rows: padding, cutting, and which sizes agree."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from logitmill.engine.blocks import LEAST, Blocks, agree, powers
from logitmill.engine.decoder import _unlike

SIZES = powers(32768)


def find(product, sizes=SIZES, columns: int = 3) -> tuple[int, ...]:
    found = agree([(product, columns)], sizes, dtype=torch.float32, device=torch.device("cpu"))
    return tuple(n for n in sizes if found._may_use(n))


@given(st.integers(0, 300_000), st.sampled_from([SIZES, SIZES[:4], (512,), (4096, 512)]))
def test_padded_rows_are_cut_into_whole_blocks(num_rows: int, sizes: tuple[int, ...]) -> None:
    blocks = Blocks(sizes)
    padded = blocks.pad(num_rows)
    cut = blocks.cut(padded)
    assert padded >= num_rows
    assert {s.stop - s.start for s in cut} <= set(sizes)
    assert [s.start for s in cut] == [0, *(s.stop for s in cut[:-1])]
    assert cut[-1].stop == padded
    assert padded - num_rows <= max(sizes[-1], num_rows / 16)


def test_a_nearly_full_batch_is_one_block() -> None:
    blocks = Blocks(SIZES)
    assert blocks.cut(blocks.pad(32_161)) == [slice(0, 32768)]


def test_sizes_double() -> None:
    assert powers(5000) == (4096, 2048, 1024, 512)
    assert powers(1) == (LEAST,)


def test_shrinking_ends_with_the_smallest() -> None:
    smaller = Blocks([1024, 512]).shrink()
    assert smaller is not None
    assert smaller.sizes == (512,)
    assert smaller.shrink() is None


def test_products_that_know_only_their_row_agree_in_all_sizes() -> None:
    assert find(lambda x: x.sum(1, keepdim=True)) == SIZES


@pytest.mark.parametrize("other", [512, 2048, 16384, 32768])
def test_a_size_with_another_kernel_is_left_out(other: int) -> None:
    def product(x: torch.Tensor) -> torch.Tensor:
        return x * (1.0 + 1e-6 * (len(x) == other))

    assert find(product) == tuple(n for n in SIZES if n != other)


def test_another_standard_is_found_where_place_matters_in_it() -> None:
    def product(x: torch.Tensor) -> torch.Tensor:
        place = torch.arange(len(x))[:, None] >= len(x) // 2
        return x * (1.0 + 1e-6 * place * (len(x) >= 8192))

    assert find(product) == (4096, 2048, 1024, 512)


def test_products_that_differ_in_where_place_matters_share_a_standard() -> None:
    def moved(x: torch.Tensor) -> torch.Tensor:
        return x + torch.arange(len(x))[:, None] * (len(x) == 8192)

    def other_kernel(x: torch.Tensor) -> torch.Tensor:
        return x * (1.0 + 1e-6 * (len(x) >= 8192))

    products = [(other_kernel, 3), (moved, 3)]
    found = agree(products, SIZES, dtype=torch.float32, device=torch.device("cpu"))
    assert tuple(n for n in SIZES if found._may_use(n)) == (4096, 2048, 1024, 512)


def test_one_row_of_a_large_block_is_enough_to_leave_it_out() -> None:
    def product(x: torch.Tensor) -> torch.Tensor:
        out = x.clone()
        if len(x) == 16384:
            out[12_345] += 1e-3
        return out

    assert 16384 not in find(product)
    assert 32768 in find(product)


def test_a_smaller_size_that_may_not_be_used_is_no_way_to_shrink() -> None:
    blocks = Blocks([2048, 1024, 512], lambda size: size == 2048)
    assert blocks.shrink() is None


@pytest.mark.parametrize("most", [8192, 2048])
def test_a_size_that_does_not_fit_is_left_out(most: int) -> None:
    def product(x: torch.Tensor) -> torch.Tensor:
        if len(x) > most:
            raise torch.OutOfMemoryError("too large")
        return x

    assert find(product) == tuple(n for n in SIZES if n <= most)


def test_a_limit_leaves_something_that_may_be_used() -> None:
    blocks = Blocks(SIZES, lambda size: size in (2048, 8192))
    assert blocks.limit(32768).sizes == SIZES
    assert blocks.limit(5000).sizes == (4096, 2048, 1024, 512)
    for few in (2048, 512, 1):
        limited = blocks.limit(few)
        assert limited.sizes == (2048, 1024, 512)
        assert limited.cut(limited.pad(3000)) == [slice(0, 2048), slice(2048, 4096)]


def test_place_that_always_matters_is_said(caplog: pytest.LogCaptureFixture) -> None:
    def product(x: torch.Tensor) -> torch.Tensor:
        return x + torch.arange(len(x))[:, None]

    assert find(product, sizes=(1024, 512)) == (512,)
    assert "may depend on its batch" in caplog.text


def test_only_sizes_that_are_needed_are_tried() -> None:
    tried = []

    def agrees(size: int) -> bool:
        tried.append(size)
        return True

    blocks = Blocks(SIZES, agrees)
    assert blocks.cut(blocks.pad(32_161)) == [slice(0, 32768)]
    assert blocks.cut(blocks.pad(32_700)) == [slice(0, 32768)]
    assert tried == [32768]


def test_rows_are_padded_to_what_may_be_used() -> None:
    blocks = Blocks(SIZES, lambda size: size in (2048, 8192))
    assert blocks.pad(1) == 2048
    assert blocks.cut(blocks.pad(9000)) == [slice(0, 8192), slice(8192, 10240)]
    assert [s.stop for s in blocks.cut(blocks.pad(32_700))] == [8192, 16384, 24576, 32768]


def test_a_decoder_runs_in_blocks_that_agree(demo) -> None:  # type: ignore[no-untyped-def]
    """As a GPU's decoder does, tried on a CPU: other blocks, the same bits."""
    model = demo._model
    ids = [list(range(5, 5 + n)) for n in (700, 40, 513, 1)]
    expected = demo.get_logits(ids)
    before = model.blocks
    model.blocks = model._agree(_unlike(model._layers.held), powers(4096), 4096)
    try:
        for found, logits in zip(demo.get_logits(ids), expected, strict=True):
            assert torch.equal(found, logits)
        assert model.blocks._asked
    finally:
        model.blocks = before
