"""Filters by what a model thought of documents, as the field knows them: columns to join by id.

Each gives an Arrow `RecordBatchReader`, which reads a run shard by shard as it is read itself:
`.read_all()` makes a table of it, DuckDB queries it by its name. Logarithms are natural.

    buckets        head, middle, tail by percentiles of a score     Wenzek et al. 2020 (CCNet)
    keep           whether a score lies between two percentiles     the same, middle alone
    min_k          mean of the k % lowest log p; normalized (++)    Shi, Zhang et al. 2024
    ifd            ppl(answer | instruction) / ppl(answer)          Li et al. 2024
    excess_loss    nll(model) - nll(reference)                      Lin et al. 2024 (Rho-1)
    kl_to          mean of KL(reference || model)

What two runs must have in common is said by each filter. `write_kept` applies `keep` to a corpus.
"""

from .cuts import Cuts, find_cuts
from .kept import Kept, write_kept
from .pairs import excess_loss, ifd, kl_to
from .scores import buckets, keep, kept_between, min_k

__all__ = [
    "Cuts",
    "Kept",
    "buckets",
    "excess_loss",
    "find_cuts",
    "ifd",
    "keep",
    "kept_between",
    "kl_to",
    "min_k",
    "write_kept",
]
