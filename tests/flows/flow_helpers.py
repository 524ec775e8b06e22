"""What the flows' tests call: no fixtures, and nothing happens on import."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from logitmill.flows import Run
from logitmill.flows.corpus import CorpusSpec
from logitmill.flows.folder import Folder
from logitmill.flows.store import Receipt

SECRET = "s3cr3t-of-the-tests"
Score = Callable[..., Run]


def digests(run: Run) -> dict[str, str]:
    """sha256 of all files of a run that must be the same bytes wherever and however it was made."""
    fs, root = run.folder.filesystem, run.folder.path("")
    files = {str(path)[len(root) :]: path for path in fs.find(root)}
    timed = {
        "report.html",
        *(name for name in files if name.startswith("shards/") and ".json" in name),
    }
    return {
        name: hashlib.sha256(fs.cat_file(path)).hexdigest()
        for name, path in files.items()
        if name not in timed
    }


def write_lines(path: Path, rows: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def note_reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The shards whose receipts are read from now on, as they are read."""
    read: list[int] = []
    real = Receipt.read

    def note(folder: Folder, shard: int) -> Receipt | None:
        read.append(shard)
        return real(folder, shard)

    monkeypatch.setattr(Receipt, "read", note)
    return read


_FLOW = """
import sys
from logitmill.flows import score_corpus
from logitmill.flows.corpus import CorpusSpec
model, corpus, out, workers, shard_bytes = sys.argv[1:]
spec = CorpusSpec(uri=corpus, shard_bytes=int(shard_bytes))
# Batches of a second or so, as those of a GPU are.
engine = {"max_batch_tokens": 1024}
score_corpus(model, spec, out, tiers=["tokens"], workers=workers, engine=engine)
"""


def start_flow(
    model: Path, spec: CorpusSpec, out: Path, workers: str, url: str
) -> subprocess.Popen[bytes]:
    """A process that scores, with the Prefect server at `url`."""
    arguments = [str(model), spec.uri, str(out), workers, str(spec.shard_bytes)]
    return subprocess.Popen(
        [sys.executable, "-c", _FLOW, *arguments],
        env={**os.environ, "PREFECT_API_URL": url},
        stderr=subprocess.DEVNULL,
    )


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
