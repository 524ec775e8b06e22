"""Where the documents of a run came from: its corpus, found again by the run's plan.

Whether an input is still what was scored is checked by its ETag, or by its content where it has
none, as when it was scored.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ..engine.intake import join_stream
from ..engine.records import Document
from .corpus import CorpusSpec, read_shard
from .corpus.plan import Plan
from .folder import endpoint_options
from .run import Run


def find_corpus(plan: Mapping[str, Any], endpoint_url: str | None) -> CorpusSpec:
    """What the plan's corpus is read with.

    Raises:
        ValueError: if the plan does not say of which columns its documents are made.
    """
    uri, inputs = plan["uri"], plan["corpus"]["inputs"]
    reading = plan.get("reading")
    if reading is None and any(input_["format"] != "text" for input_ in inputs):
        raise ValueError(
            f"corpus: of which columns of {uri!r} documents are made is not in the plan, which an "
            "older version has written"
        )
    return CorpusSpec(uri=uri, storage_options=endpoint_options(uri, endpoint_url), **reading or {})


def read_documents(run: Run, spec: CorpusSpec, shards: Sequence[int]) -> Iterator[Document]:
    """The documents of shards as they were scored, in the order of their rows.

    Of a recipe that reads its corpus as one stream that stream is the document.

    Raises:
        ValueError: if an input is not what it was when the plan was made.
        OSError: if it cannot be reached.
    """
    planned = Plan.from_dict(run.plan["corpus"]).shards
    documents = (document for i in shards for document in read_shard(spec, planned[i]))
    return join_stream(documents) if run.plan["recipe"]["concatenate"] else documents
