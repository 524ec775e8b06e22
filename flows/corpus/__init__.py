"""What to read: corpora of text, chats or token ids on any fsspec file system, and their plan."""

from .corpus import CorpusSpec, NothingLeft, plan_corpus, read_shard
from .locations import CorpusError
from .plan import Input, Piece, Plan, Shard

__all__ = [
    "CorpusError",
    "CorpusSpec",
    "Input",
    "NothingLeft",
    "Piece",
    "Plan",
    "Shard",
    "plan_corpus",
    "read_shard",
]
