"""Token records -> document scores: pure functions, each with its formula and unit.

Symbols: lp_t the log-probability of token t in nats, S their sum, n their number, B bytes.
"""

from __future__ import annotations

import math
import re
import zlib

import numpy as np

_WHITESPACE = re.compile(r"\s+")


def count_words(text: str) -> int:
    """Pieces of `text` between runs of whitespace, lm-evaluation-harness's rule.

    The empty pieces at both ends count: " a b " has 4 words and "" has 1.
    """
    return len(_WHITESPACE.split(text))


def nll_per_token(loglikelihood: float, num_tokens: int) -> float:
    """-S / n, nats a token."""
    return -loglikelihood / num_tokens


def perplexity(loglikelihood: float, count: int) -> float:
    """exp(-S / count), of tokens, bytes or words; infinite where float64 ends."""
    exponent = -loglikelihood / count
    return math.exp(exponent) if exponent < 709.0 else math.inf


def bits(loglikelihood: float, count: int) -> float:
    """-S / (count ln 2), bits a byte or a character."""
    return -loglikelihood / (count * math.log(2.0))


def min_k_prob(logprob: np.ndarray, share: float) -> float:
    """Min-K% Prob: mean of the lowest max(1, floor(share n)) log-probabilities, nats.

    Shi et al., ICLR 2024, arXiv:2310.16789.
    """
    return _mean_lowest(logprob.astype(np.float64), share)


def min_k_plus_plus(
    logprob: np.ndarray, entropy: np.ndarray, varentropy: np.ndarray, share: float
) -> float:
    """Min-K%++: mean of the lowest (lp + H) / sigma, sigma^2 the varentropy.

    Zhang et al., ICLR 2025, arXiv:2404.02936. -H is the mean of log p under the model itself. Where
    the model is uniform, sigma is 0 and so is the numerator: such a token counts 0.
    """
    centred = logprob.astype(np.float64) + entropy
    sigma = np.sqrt(varentropy.astype(np.float64))
    scaled = np.divide(centred, sigma, out=np.zeros_like(centred), where=sigma > 0.0)
    return _mean_lowest(scaled, share)


def zlib_bytes(text: bytes) -> int:
    """Length of the text after zlib's default compression, bytes."""
    return len(zlib.compress(text))


def zlib_ratio(loglikelihood: float, num_tokens: int, num_zlib_bytes: int) -> float:
    """(S / n) / zlib length: the mean, not the sum, as mink-plus-plus has it.

    Carlini et al., USENIX Security 2021, arXiv:2012.07805.
    """
    return loglikelihood / num_tokens / num_zlib_bytes


def _mean_lowest(values: np.ndarray, share: float) -> float:
    count = max(1, int(share * len(values)))
    return float(np.partition(values, count - 1)[:count].mean())
