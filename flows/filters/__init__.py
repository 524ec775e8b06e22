"""Filters by what a model thought of documents, as the field knows them: columns to join by id.

Each gives an Arrow `RecordBatchReader`, which reads a run shard by shard as it is read itself:
`.read_all()` makes a table of it, DuckDB queries it by its name. Logarithms are natural.

    buckets      head < P30 <= middle < P60 <= tail, by language             [1]
    keep         P_low <= score < P_high, as perplexity's middle              [1], [2]
    min_k        mean of the k % lowest lp, Min-K% Prob                      [3]
                 mean of the k % lowest (lp + H) / sigma, Min-K%++           [4]
    zlib_ratio   mean lp / bytes of zlib(text): a column of the scores       [5]
    ifd          ppl(answer | instruction) / ppl(answer)                     [6], [7]
    excess_loss  nll(model) - nll(reference), a document or a token          [8], [9]
    kl_to        mean of KL(reference || model) = sum p (log p - log q)      [10]

P are percentiles of a score; lp is the log-probability of a token, nll the mean of -lp over a
document, ppl = exp(nll); H and sigma are the entropy and the standard deviation of log p under the
model.

    [1]  Wenzek et al., CCNet, LREC 2020, arXiv:1911.00359: percentiles 30 and 60 by language
    [2]  Marion et al., When Less is More, 2023, arXiv:2309.04564: of a transformer's perplexity
    [3]  Shi et al., Detecting Pretraining Data from LLMs, ICLR 2024, arXiv:2310.16789
    [4]  Zhang et al., Min-K%++, ICLR 2025, arXiv:2404.02936
    [5]  Carlini et al., Extracting Training Data, USENIX Security 2021, arXiv:2012.07805
    [6]  Li et al., From Quantity to Quality, NAACL 2024, arXiv:2308.12032: there nll by nll
    [7]  Li et al., Superfiltering, ACL 2024, arXiv:2402.00530: of perplexities, as here
    [8]  Lin et al., Rho-1, NeurIPS 2024, arXiv:2404.07965: of tokens
    [9]  Mindermann et al., RHO-LOSS, ICML 2022, arXiv:2206.07137: of examples
    [10] Kullback and Leibler, On Information and Sufficiency, 1951

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
