"""Numbers of rows for which products give a row the same bits.

A library picks its kernel by the whole shape of a product, so a row's last bits can depend on how
many rows are beside it. Here products only ever have numbers of rows out of a few, and those few
are found by trying: what disagrees with one standard size on any row is not used.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence

import torch
import torch.nn.functional as F

Product = Callable[[torch.Tensor], torch.Tensor]

log = logging.getLogger(__name__)

LEAST = 512
"""Fewest rows of a block: below, libraries split sums to fill the device."""
# Rows that the other sizes are compared with, if there may be so many.
_STANDARD = 8192
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
    products: Sequence[tuple[Product, int]],
    sizes: Sequence[int],
    *,
    dtype: torch.dtype,
    device: torch.device,
) -> Blocks:
    """Those of `sizes` that give every row of every product the same bits.

    All are compared with one size that does not go by the memory there is, so that a device with
    little of it agrees with one that has much. A size that does not fit is left out.

    Args:
        products: functions of rows [M, K], and their K.
        sizes: numbers of rows to choose from, the largest first.
    """
    agreed = list(sizes)
    draw = torch.Generator(device).manual_seed(0)
    for product, num_columns in products:
        x_MK = torch.empty(agreed[0], num_columns, dtype=dtype, device=device)
        x_MK.normal_(generator=draw)
        standard = next((n for n in agreed if n <= _STANDARD), agreed[-1])
        while _depends_on_place(product, x_MK[:standard]):
            smaller = [n for n in agreed if n < standard]
            if not smaller:
                log.warning(
                    "a product of %d columns gives a row other bits in other places: the last "
                    "bits of a document may depend on its batch",
                    num_columns,
                )
                break
            agreed.remove(standard)
            standard = smaller[0]
        agreed = [n for n in agreed if _agrees(product, x_MK[:n], standard)]
    return Blocks(agreed)


def _depends_on_place(product: Product, x_MK: torch.Tensor) -> bool:
    shift = len(x_MK) // 3 + 1
    moved = product(x_MK).roll(shift, 0)
    return not torch.equal(product(x_MK.roll(shift, 0)), moved)


def _agrees(product: Product, x_MK: torch.Tensor, standard: int) -> bool:
    """Whether all rows come out as they do in products of `standard` rows."""
    if len(x_MK) == standard:
        return True
    try:
        found = product(x_MK)
    except torch.OutOfMemoryError:
        return False
    if len(x_MK) < standard:
        padded = F.pad(x_MK, (0, 0, 0, standard - len(x_MK)))
        return torch.equal(found, product(padded)[: len(x_MK)])
    return all(
        torch.equal(found[i : i + standard], product(x_MK[i : i + standard]))
        for i in range(0, len(x_MK), standard)
    )
