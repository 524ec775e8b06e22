"""Numbers of rows for which products give a row the same bits.

A library picks its kernel by the whole shape of a product, so a row's last bits can depend on how
many rows are beside it. Here products only ever have numbers of rows out of a few, and those few
are found by trying: what disagrees with the largest on any row is not used.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence

import torch

log = logging.getLogger(__name__)

LEAST = 512
"""Fewest rows of a block: below, libraries split sums to fill the device."""
# Share of a batch that padding may add, about.
_PADDING = 1 / 16


class Blocks:
    """Sizes of blocks of rows, each a power of two times the smallest."""

    def __init__(self, sizes: Iterable[int]) -> None:
        self.sizes = tuple(sorted(sizes, reverse=True))
        """Rows, the largest first."""
        assert all(size % self.sizes[-1] == 0 for size in self.sizes)

    def pad(self, num_rows: int) -> int:
        """Rows with padding: few blocks, and little padding in many rows."""
        unit = next((s for s in self.sizes if s <= num_rows * _PADDING), self.sizes[-1])
        return max(1, -(-num_rows // unit)) * unit

    def cut(self, num_rows: int) -> list[slice]:
        """Padded rows as blocks, large ones first."""
        blocks = []
        start = 0
        for size in self.sizes:
            while num_rows - start >= size:
                blocks.append(slice(start, start + size))
                start += size
        assert start == num_rows, "rows are padded by `pad`"
        return blocks

    def shrink(self) -> Blocks | None:
        """The same without the largest size; None if there is but one."""
        return Blocks(self.sizes[1:]) if len(self.sizes) > 1 else None


def powers(largest: int) -> tuple[int, ...]:
    """`LEAST` times the powers of two, up to `largest` rows and at least `LEAST`."""
    sizes = [LEAST]
    while 2 * sizes[-1] <= largest:
        sizes.append(2 * sizes[-1])
    return tuple(reversed(sizes))


def agree(
    products: Sequence[tuple[Callable[[torch.Tensor], torch.Tensor], int]],
    sizes: Sequence[int],
    *,
    dtype: torch.dtype,
    device: torch.device,
) -> Blocks:
    """The largest of `sizes` and those that give every row of every product the same bits as it.

    Args:
        products: functions of rows [M, K] and their K.
        sizes: numbers of rows to choose from, the largest first.
    """
    agreed = list(sizes)
    draw = torch.Generator(device).manual_seed(0)
    for product, num_columns in products:
        x_MK = torch.empty(agreed[0], num_columns, dtype=dtype, device=device)
        x_MK.normal_(generator=draw)
        # Where a row lies must not matter either, or the size is of no use.
        while len(agreed) > 1 and _depends_on_place(product, x_MK[: agreed[0]]):
            agreed.pop(0)
        if len(agreed) == 1 and _depends_on_place(product, x_MK[: agreed[0]]):
            log.warning(
                "a product of %d columns gives a row other bits in other places: a document's last "
                "bits may depend on its batch",
                num_columns,
            )
        whole = product(x_MK[: agreed[0]])
        agreed = [n for n in agreed if torch.equal(product(x_MK[:n]), whole[:n])]
    return Blocks(agreed)


def _depends_on_place(product: Callable[[torch.Tensor], torch.Tensor], x_MK: torch.Tensor) -> bool:
    shift = len(x_MK) // 3 + 1
    return not torch.equal(product(x_MK.roll(shift, 0)), product(x_MK).roll(shift, 0))
