"""What the workers of a test's cluster start with: they fail as a file says, while it says so.

The file is named by the environment (`FAULTS`). With `{"text": "..."}` who tokenizes a text that
holds it is gone, as by a crash of native code; with `{"memory": 700}` a device has no memory for
more tokens a batch; `{"hold": true}` has all who read a shard wait. How often memory ran out stands
beside it, a character each time (`faults.full`).
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from logitmill.engine.runner import Runner
from logitmill.engine.tokenization import Tokenizer
from logitmill.flows import request, shards

_FILE = Path(os.environ["FAULTS"])


def _asked() -> dict[str, Any]:
    try:
        asked: dict[str, Any] = json.loads(_FILE.read_text())
    except FileNotFoundError:
        return {}
    return asked


def dask_setup(worker: Any) -> None:
    """Called by Dask as a worker starts."""
    read_whole, encode, compute = shards.read_shard, Tokenizer.encode, Runner._hidden

    def read(spec: Any, shard: Any) -> Iterator[Any]:
        while _asked().get("hold"):
            time.sleep(0.05)
        return read_whole(spec, shard)

    def tokenize(self: Tokenizer, texts: Sequence[str], **options: Any) -> Any:
        poison = _asked().get("text")
        if poison is not None and any(poison in text for text in texts):
            os.kill(os.getpid(), signal.SIGABRT)
        return encode(self, texts, **options)

    def fit(self: Runner, requests: Sequence[Any], *layers: Any) -> Any:
        room = _asked().get("memory")
        if room is not None and sum(len(r.ids) for r in requests) > room:
            with _FILE.with_suffix(".full").open("a") as file:
                file.write(".")
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return compute(self, requests, *layers)

    shards.read_shard = read
    Tokenizer.encode = tokenize  # type: ignore[method-assign]
    Runner._hidden = fit  # type: ignore[method-assign]
    if "OTHER_VERSION" in os.environ:
        versions = request.versions()
        request.versions = lambda: {**versions, "torch": os.environ["OTHER_VERSION"]}
