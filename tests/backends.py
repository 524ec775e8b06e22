"""lm-evaluation-harness as an oracle: its own backend over transformers, and requests for it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any


def load_hf(folder: Path, *, dtype: str = "float32", **arguments: Any) -> Any:
    """The backend `hf` on the CPU, a request at a time."""
    from lm_eval.models.huggingface import HFLM

    return HFLM(
        pretrained=str(folder),
        device="cpu",
        dtype=dtype,
        batch_size=1,
        # Its cache mixes up "import" -> " os" and "" -> "import os", which share inputs.
        logits_cache=False,
        **arguments,
    )


def make_requests(kind: str, arguments: Sequence[tuple[str, ...]]) -> list[Any]:
    """Requests of the harness; kind is `loglikelihood` or `loglikelihood_rolling`."""
    from lm_eval.api.instance import Instance

    return [
        Instance(request_type=kind, doc={}, arguments=a, idx=i, metadata=("drawn", i, 1))
        for i, a in enumerate(arguments)
    ]
