"""Items made in a thread: their order, their errors, and an end to it."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest
from logitmill.engine.ahead import run_ahead


def wait_for(condition) -> None:
    stop = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < stop
        time.sleep(0.01)


def test_items_come_in_order_from_another_thread():
    made_in = set()

    def items() -> Iterator[int]:
        for i in range(50):
            made_in.add(threading.get_ident())
            yield i

    assert list(run_ahead(items(), 3)) == list(range(50))
    assert made_in.isdisjoint({threading.get_ident()})


def test_the_first_are_made_before_anybody_asks():
    made = []
    found = run_ahead((made.append(i) for i in range(50)), 3)
    wait_for(lambda: len(made) == 4)
    found.close()


def test_no_more_is_made_ahead_than_was_asked_for():
    made = []

    def items() -> Iterator[int]:
        for i in range(50):
            made.append(i)
            yield i

    found = run_ahead(items(), 3)
    assert next(found) == 0
    # Three in the queue, and one that waits for a place.
    wait_for(lambda: len(made) == 5)
    time.sleep(0.3)
    assert len(made) == 5
    found.close()


@pytest.mark.parametrize("error", [ValueError("column"), KeyboardInterrupt(), SystemExit(1)])
def test_an_error_comes_at_its_place(error: BaseException):
    def items() -> Iterator[int]:
        yield 1
        yield 2
        raise error

    found = run_ahead(items(), 8)
    assert [next(found), next(found)] == [1, 2]
    with pytest.raises(type(error)) as caught:
        next(found)
    assert caught.value is error


@pytest.mark.parametrize("taken", [0, 1])
def test_what_is_dropped_ends_with_its_items(taken):
    ended = threading.Event()

    def items() -> Iterator[int]:
        try:
            while True:
                yield 0
        finally:
            ended.set()

    found = run_ahead(items(), 2)
    for _ in range(taken):
        next(found)
    del found
    assert ended.wait(10)
