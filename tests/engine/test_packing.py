"""Packing: nothing lost, nothing twice, no batch over its budget."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from logitmill.engine.packing import pack, rounds

LENGTHS = st.lists(st.integers(1, 60), max_size=60)


@given(LENGTHS, st.integers(1, 100))
def test_every_sequence_is_in_one_batch_that_fits(lengths: list[int], budget: int) -> None:
    batches = pack(lengths, budget)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    for batch in batches:
        total = sum(lengths[i] for i in batch)
        assert total <= budget or len(batch) == 1


@given(LENGTHS, st.integers(60, 200))
def test_batches_come_out_nearly_full(lengths: list[int], budget: int) -> None:
    """First-fit decreasing never takes more than 11/9 of the least number of batches, plus one."""
    least = -(-sum(lengths) // budget)
    num_large = sum(2 * n > budget for n in lengths)
    # Two batches that together would fit in one cannot exist, so all but one are over half full.
    assert len(pack(lengths, budget)) <= max(num_large, 2 * least) + 1


@given(LENGTHS, st.integers(1, 100))
def test_rounds_keep_the_order_and_the_budget(weights: list[int], budget: int) -> None:
    groups = list(rounds(((i, w) for i, w in enumerate(weights)), budget))
    assert [i for group in groups for i in group] == list(range(len(weights)))
    for group in groups:
        assert sum(weights[i] for i in group) <= budget or len(group) == 1


def test_rounds_are_lazy() -> None:
    """A corpus that never ends is scored as it comes."""
    endless = ((i, 10) for i in iter(int, 1))
    assert len(next(rounds(endless, 35))) == 3
