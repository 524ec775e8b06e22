"""Sequences by what they begin with, to have those that begin alike side by side."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from .prefixes import Growing, count_shared


@dataclass(eq=False)
class Node:
    """Tokens that all sequences below it have at one place."""

    start: int
    """Their first one's position."""
    ids: np.ndarray
    below: dict[int, Node] = field(default_factory=dict)
    """What follows, by its first token."""
    ends: list[int] = field(default_factory=list)
    """The sequences that end with them."""

    @property
    def stop(self) -> int:
        return self.start + len(self.ids)

    def cut(self, length: int) -> None:
        """Keep the first tokens, and hand the others to a node below."""
        rest = Node(self.start + length, self.ids[length:], self.below, self.ends)
        self.ids, self.below, self.ends = self.ids[:length], {int(rest.ids[0]): rest}, []


class Path(list[Node]):
    """Nodes that hold a sequence, one below the other."""

    @property
    def length(self) -> int:
        """Tokens of the sequence."""
        return self[-1].stop

    def ids(self, start: int) -> np.ndarray:
        """Its tokens from a position on."""
        parts = []
        for node in reversed(self):
            if node.stop <= start:
                break
            parts.append(node.ids[max(0, start - node.start) :])
        return np.concatenate(parts[::-1]) if parts else np.zeros(0, np.int32)


class Trie:
    """Sequences by their beginnings. Takes the memory and time of the tokens that they add."""

    def __init__(self, branches: Sequence[Growing]) -> None:
        self._root = Node(0, np.zeros(0, np.int32))
        path = Path([self._root])
        for i, one in enumerate(branches):
            while len(path) > 1 and path[-1].start >= one.num_shared:
                path.pop()
            if path[-1].stop > one.num_shared:
                path[-1].cut(one.num_shared - path[-1].start)
            self._grow(path, one.ids)
            path[-1].ends.append(i)

    def _grow(self, path: Path, ids: np.ndarray) -> None:
        """Add what follows on a path, and prolong the path to where it ends."""
        while len(ids):
            node = path[-1]
            child = node.below.get(int(ids[0]))
            if child is None:
                child = node.below[int(ids[0])] = Node(node.stop, ids)
            count = count_shared(child.ids, ids)
            if count < len(child.ids):
                child.cut(count)
            path.append(child)
            ids = ids[count:]

    def walk(self) -> Iterator[tuple[int, int, Path]]:
        """(index, tokens shared with the one before, its path) of every sequence, sorted.

        A path is valid until the next one is asked for.
        """
        path = Path()
        shared = 0
        waiting = [self._root]
        while waiting:
            node = waiting.pop()
            while path and path[-1].stop > node.start:
                path.pop()
            shared = min(shared, node.start)
            path.append(node)
            for i in node.ends:
                yield i, shared, path
                shared = node.stop
            waiting.extend(node.below[first] for first in sorted(node.below, reverse=True))
