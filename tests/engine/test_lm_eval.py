"""lm-evaluation-harness's own loglikelihoods over the bundled model are the engine's."""

from __future__ import annotations

import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from backends import load_hf, make_requests
from logitmill.engine import Pipeline

# Agreement asked for of a document's log-likelihood, relative.
TOLERANCE = 1e-4

STDLIB = Path(sysconfig.get_paths()["stdlib"])
SHORT = ["x", "import os\n", "naïve = '漢字 😀'\n", "    return None"]
LONGER_THAN_A_WINDOW = ["copy.py", "keyword.py", "bisect.py", "struct.py"]


@pytest.fixture(scope="module")
def documents(demo: Pipeline) -> list[str]:
    texts = [(STDLIB / name).read_text(encoding="utf-8") for name in LONGER_THAN_A_WINDOW]
    return [*SHORT, *texts]


@pytest.fixture(scope="module")
def harness(demo_folder: Path) -> Callable[[bool], Any]:
    """Makes the harness's model; whether it adds BOS is the only choice."""
    pytest.importorskip("lm_eval.models.huggingface")
    return lambda add_bos_token: load_hf(demo_folder, add_bos_token=add_bos_token)


@pytest.mark.slow
def test_rolling_loglikelihoods_agree(demo: Pipeline, harness: Any, documents: list[str]) -> None:
    """`add_bos_token=False`: left to itself the harness scores this tokenizer's BOS as text."""
    expected = harness(False).loglikelihood_rolling(
        make_requests("loglikelihood_rolling", [(text,) for text in documents]), disable_tqdm=True
    )
    scores = list(demo.score(documents))
    assert max(s.record.num_windows for s in scores) > 2
    assert min(s.record.num_windows for s in scores) == 1
    for score, loglikelihood in zip(scores, expected, strict=True):
        assert score.record.loglikelihood == pytest.approx(loglikelihood, rel=TOLERANCE)


PAIRS = [
    ("import ", "os"),
    ("def add(a, b):\n    return ", "a + b"),
    ("for i in", " range(10):\n        "),
    ("", "import os"),
    ("ret", "urn None"),
    ("x" * 50 + "\n\n", "y = 1"),
]


@pytest.mark.slow
@pytest.mark.parametrize("add_bos", [True, False])
def test_conditional_loglikelihoods_agree(
    demo: Pipeline, harness: Any, documents: list[str], add_bos: bool
) -> None:
    pairs = [*PAIRS, (documents[-1], "\n# the end"), (documents[-2], documents[-1][:300])]
    if not add_bos:
        pairs = [pair for pair in pairs if pair[0]]
    expected = harness(add_bos).loglikelihood(
        make_requests("loglikelihood", pairs), disable_tqdm=True
    )
    scores = demo.score(pairs, recipe="conditional", prefix=None if add_bos else "none")
    for score, (loglikelihood, greedy) in zip(scores, expected, strict=True):
        assert score.record.status == "ok", score.record.error
        assert score.record.loglikelihood == pytest.approx(loglikelihood, rel=TOLERANCE, abs=1e-5)
        assert (score.record.num_top1 == score.record.num_tokens_scored) == greedy
