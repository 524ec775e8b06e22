"""Makes items in a thread of its own while the last ones are used."""

from __future__ import annotations

import contextvars
import queue
import threading
import weakref
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

_T = TypeVar("_T")
_END = object()
# How often a full queue looks whether anybody still wants what it holds, seconds.
_PATIENCE = 0.2


def run_ahead(items: Iterable[_T], depth: int) -> Iterator[_T]:
    """The same items in the same order, up to `depth` of them made before they are asked for.

    The first are made at once. An exception of the items is raised at its place among them. The
    thread ends soon after the iterator is closed or dropped.
    """
    ready: queue.Queue[tuple[Any, BaseException | None]] = queue.Queue(depth)
    unwanted = threading.Event()

    def put(item: Any, error: BaseException | None = None) -> None:
        while not unwanted.is_set():
            try:
                return ready.put((item, error), timeout=_PATIENCE)
            except queue.Full:
                continue

    def make() -> None:
        try:
            for item in items:
                put(item)
                if unwanted.is_set():
                    return
            put(_END)
        except BaseException as error:
            put(_END, error)

    thread = threading.Thread(
        target=contextvars.copy_context().run, args=(make,), name="logitmill-ahead", daemon=True
    )
    thread.start()
    given = _give(ready, unwanted)
    # One that is never asked for an item has nothing to clean up after.
    weakref.finalize(given, unwanted.set)
    return given


def _give(
    ready: queue.Queue[tuple[Any, BaseException | None]], unwanted: threading.Event
) -> Iterator[Any]:
    try:
        while True:
            item, error = ready.get()
            if error is not None:
                raise error
            if item is _END:
                return
            yield item
    finally:
        unwanted.set()
