"""What the flows' tests call: no fixtures, and nothing happens on import."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from logitmill.flows import Run

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
