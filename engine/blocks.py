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
STANDARD = 8192
"""Rows that the other sizes are compared with, if there is room for so many."""
PADDING = 1 / 16
"""Share of a batch that padding may add, about."""


class Blocks:
    """Sizes of blocks of rows, each a power of two times the smallest."""

    def __init__(self, sizes: Iterable[int], agrees: Callable[[int], bool] | None = None) -> None:
        """`agrees` says whether a size may be used; it is asked once, when a size is needed."""
        self.sizes = tuple(sorted(sizes, reverse=True))
        """Rows, the largest first."""
        assert all(size % self.sizes[-1] == 0 for size in self.sizes)
        self._agrees = agrees
        self._asked: dict[int, bool] = {}

    def pad(self, num_rows: int) -> int:
        """Rows with padding: few blocks, and little padding in many rows."""
        unit = next((s for s in self.sizes if s <= num_rows * PADDING), self.sizes[-1])
        for size in reversed(self.sizes):
            padded = max(1, -(-num_rows // size)) * size
            if size >= unit and self._cover(padded) is not None:
                return padded
        raise AssertionError("one size always agrees, with itself")

    def cut(self, num_rows: int) -> list[slice]:
        """Padded rows as blocks, large ones first."""
        blocks = self._cover(num_rows)
        assert blocks is not None, "rows are padded by `pad`"
        return blocks

    def shrink(self) -> Blocks | None:
        """The same without the largest size; None if nothing that may be used is smaller."""
        if len(self.sizes) == 1:
            return None
        smaller = Blocks(self.sizes[1:], self._agrees)
        smaller._asked = self._asked
        return smaller if any(map(smaller._may_use, reversed(smaller.sizes))) else None

    def limit(self, num_rows: int) -> Blocks:
        """The same without sizes above `num_rows`, as far as smaller ones may be used."""
        blocks = self
        while blocks.sizes[0] > num_rows and (smaller := blocks.shrink()) is not None:
            blocks = smaller
        return blocks

    def _cover(self, num_rows: int) -> list[slice] | None:
        """Blocks that cover rows exactly; None if there are none."""
        blocks = []
        start = 0
        for size in self.sizes:
            while num_rows - start >= size and self._may_use(size):
                blocks.append(slice(start, start + size))
                start += size
        return blocks if start == num_rows else None

    def _may_use(self, size: int) -> bool:
        if size not in self._asked:
            self._asked[size] = self._agrees is None or self._agrees(size)
        return self._asked[size]


def powers(largest: int, least: int = LEAST) -> tuple[int, ...]:
    """`least` times the powers of two, up to `largest` rows and at least `least`."""
    sizes = [least]
    while 2 * sizes[-1] <= largest:
        sizes.append(2 * sizes[-1])
    return tuple(reversed(sizes))


def agree(
    products: Sequence[tuple[Product, int]],
    sizes: Sequence[int],
    *,
    dtype: torch.dtype,
    device: torch.device,
    standard: int = STANDARD,
) -> Blocks:
    """Those of `sizes` that give every row of every product the same bits, tried when needed.

    All are compared with one size that goes neither by what is wanted nor, unless there is very
    little, by the memory there is: all settings and devices agree. A size that does not fit is
    left out.

    Args:
        products: functions of rows [M, K], and their K.
        sizes: numbers of rows to choose from, the largest first.
        standard: the size that the others are compared with, or the largest one below it in which
            a row's place does not matter.
    """

    def draw(num_rows: int, num_columns: int) -> torch.Tensor:
        generator = torch.Generator(device).manual_seed(0)
        x_MK = torch.empty(num_rows, num_columns, dtype=dtype, device=device)
        return x_MK.normal_(generator=generator)

    def is_sound(size: int) -> bool:
        try:
            return not any(_depends_on_place(product, draw(size, n)) for product, n in products)
        except torch.OutOfMemoryError:
            return False

    sound = next((n for n in sizes if n <= standard and is_sound(n)), None)
    if sound is None:
        sound = sizes[-1]
        log.warning(
            "a product gives a row other bits in other places: the last bits of a document may "
            "depend on its batch"
        )

    def agrees(size: int) -> bool:
        try:
            # What lies between has been found to depend on place.
            return not sound < size <= standard and all(
                _agrees(product, draw(size, n), sound) for product, n in products
            )
        except torch.OutOfMemoryError:
            return False

    return Blocks(sizes, torch.inference_mode()(agrees))


def _depends_on_place(product: Product, x_MK: torch.Tensor) -> bool:
    shift = len(x_MK) // 3 + 1
    out, moved = product(x_MK), product(x_MK.roll(shift, 0))
    begun, ended = moved[:shift], moved[shift:]
    return not (torch.equal(ended, out[:-shift]) and torch.equal(begun, out[-shift:]))


def _agrees(product: Product, x_MK: torch.Tensor, standard: int) -> bool:
    """Whether all rows come out as they do in products of `standard` rows."""
    if len(x_MK) == standard:
        return True
    found = product(x_MK)
    if len(x_MK) < standard:
        padded = F.pad(x_MK, (0, 0, 0, standard - len(x_MK)))
        return torch.equal(found, product(padded)[: len(x_MK)])
    return all(
        torch.equal(found[i : i + standard], product(x_MK[i : i + standard]))
        for i in range(0, len(x_MK), standard)
    )
