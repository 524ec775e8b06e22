"""Prefect flows: what runs where, in which order, and what it leaves behind."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .compare import Comparison, compare_runs
    from .corpus import CorpusSpec
    from .run import Run, open_run
    from .score import score_corpus
    from .verify import verify_run

__all__ = [
    "Comparison",
    "CorpusSpec",
    "Run",
    "compare_runs",
    "open_run",
    "score_corpus",
    "verify_run",
]


def __getattr__(name: str) -> Any:
    # On first use: reading a run needs no Prefect, and `logitmill --help` needs neither.
    if name == "score_corpus":
        from .score import score_corpus

        return score_corpus
    if name in ("Comparison", "compare_runs"):
        from . import compare

        return getattr(compare, name)
    if name == "CorpusSpec":
        from .corpus import CorpusSpec

        return CorpusSpec
    if name in ("Run", "open_run"):
        from . import run

        return getattr(run, name)
    if name == "verify_run":
        from .verify import verify_run

        return verify_run
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
