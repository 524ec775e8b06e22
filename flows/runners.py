"""Where tasks run, and how many shards are in flight."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from prefect.futures import PrefectFuture
from prefect.task_runners import TaskRunner, ThreadPoolTaskRunner

_T = TypeVar("_T")


def make_runner() -> TaskRunner[Any]:
    """Tasks in this process: one engine, one shard at a time, every core at its disposal."""
    return ThreadPoolTaskRunner(max_workers=1)


def run_all(
    submit: Callable[[_T], PrefectFuture[Any]], items: Sequence[_T], *, window: int = 2
) -> Iterator[tuple[_T, Any]]:
    """(item, its result or the exception that ended it), in order, `window` items in flight.

    A small window keeps a shard that kills its worker from taking others with it.
    """
    waiting = iter(items)
    flying: deque[tuple[_T, PrefectFuture[Any]]] = deque()
    while True:
        while len(flying) < window and (item := next(waiting, None)) is not None:
            flying.append((item, submit(item)))
        if not flying:
            return
        item, future = flying.popleft()
        yield item, future.result(raise_on_failure=False)
