"""Where the documents of a run are: shard and row of each, by id, in bounded memory."""

from __future__ import annotations

from pathlib import PurePath
from typing import TYPE_CHECKING

import pyarrow as pa

if TYPE_CHECKING:
    from .run import Run

# Ids that are held once they are read: of some hundreds of thousands of documents.
_HELD_BYTES = 32 << 20


def shard_names(run: Run, tier: str = "scores") -> dict[int, str]:
    """A tier's parts below the run's folder, by the shard that they are of, in order."""
    # "scores/part-00017.parquet"; from shard 100,000 on with more digits.
    return {int(PurePath(name).stem.rpartition("-")[2]): name for name in run.parts(tier)}


class Index:
    """Finds documents of a run; its parts are read one after another, and again beyond the first.

    Ids of the first parts are held, so that many documents of a small run cost one reading.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        self._held: dict[int, pa.ChunkedArray] = {}
        self._num_bytes = 0

    def find(self, doc_id: str) -> tuple[int, int]:
        """The shard that a document is of, and its row there.

        Raises:
            KeyError: if the run has no such document.
            ValueError: for an id that is no text.
        """
        if not isinstance(doc_id, str):
            raise ValueError(f"doc_id: {doc_id!r} is not text; ids are text, as {str(doc_id)!r}")
        some: list[str] = []
        for shard, name in shard_names(self._run).items():
            ids = self._ids(shard, name)
            row = ids.index(doc_id).as_py()
            if row >= 0:
                return shard, row
            some = some or ids[:3].to_pylist()
        raise KeyError(
            f"doc_id: {doc_id!r} is not in the run {self._run.uri}, whose ids are like "
            f"{', '.join(map(repr, some))}"
        )

    def _ids(self, shard: int, name: str) -> pa.ChunkedArray:
        if shard in self._held:
            return self._held[shard]
        with self._run.open_part(name) as parquet:
            ids = parquet.read(["doc_id"])["doc_id"]
        if self._num_bytes + ids.nbytes <= _HELD_BYTES:
            self._held[shard] = ids
            self._num_bytes += ids.nbytes
        return ids
