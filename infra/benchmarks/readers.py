#!/usr/bin/env python3
"""Tokens that one core reads a second of a run's `topk`, beside what decompression allows.

    taskset -c 0 python infra/benchmarks/readers.py --out /tmp/readers
    taskset -c 0 python infra/benchmarks/readers.py --out /tmp/readers --vocab-size 150000

The bundled model scores modules of the standard library; `Run.distillation` reads what was kept.
Rates are of the CPU time of this process, which other work on the machine changes little, the best
of several passes. `--vocab-size` gives the same run ids of a larger vocabulary, drawn at random.
Runs are left in `--out`, and are not made again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from logitmill.flows import Run, open_run, score_corpus
from logitmill.flows.distributions import join_bytes
from logitmill.flows.parts import PartFile, PartWriter, schema_of

MODEL = Path(__file__).resolve().parents[1] / "demo/model"
PIECE = 128
_PASSES = 7


def main() -> None:
    """Make runs, read them, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for runs")
    parser.add_argument("--top-k", type=int, nargs="+", default=[20, 128, 256])
    parser.add_argument("--files", type=int, default=20, help="modules to score")
    parser.add_argument("--vocab-size", type=int, help="of the ids; default: the model's")
    given = parser.parse_args()
    corpus = str(Path(sysconfig.get_path("stdlib"), "*.py"))
    rows = []
    for top_k in given.top_k:
        uri = score_corpus(
            model=str(MODEL),
            corpus=corpus,
            out=str(given.out / str(top_k)),
            tiers=["topk"],
            top_k=top_k,
            limit=given.files,
        )
        run = open_run(uri)
        if given.vocab_size is not None:
            run = enlarge(run, given.out / f"{top_k}-of-{given.vocab_size}", given.vocab_size)
        rows.append((top_k, measure(run)))
    names = list(rows[0][1])
    print("| " + " | ".join(["k", *names]) + " |")
    print("| ---: |" + " ---: |" * len(names))
    for top_k, cells in rows:
        print("| " + " | ".join([str(top_k), *cells.values()]) + " |")


def measure(run: Run) -> dict[str, str]:
    """Cells of a table by their titles."""
    assert run.manifest is not None
    tokens, vocab_size = run.manifest["tokens"], run.plan["model"]["vocab_size"]
    parts = [Path(path.removeprefix("file://")).read_bytes() for path in run.paths("topk")]
    leave = ("byte_start", "byte_end")

    def decompress() -> None:
        for part in parts:
            file = PartFile(pa.BufferReader(part))
            names = [name for name in file.schema_arrow.names if name not in leave]
            for group in range(file.num_row_groups):
                file.read_row_group(group, names)

    def read(**options: Any) -> Callable[[], None]:
        def passes() -> None:
            examples = run.distillation(vocab_size=vocab_size, **options)
            assert sum(len(example["input_ids"]) for example in examples) == tokens

        return passes

    found = {
        "decompression alone": decompress,
        "documents": read(check=False),
        f"pieces of {PIECE}": read(check=False, context=PIECE),
        "pieces, shuffled": read(check=False, context=PIECE, shuffle_buffer=256),
        "the same, parts held to their sha256": read(context=PIECE, shuffle_buffer=256),
    }
    rates = {name: f"{tokens / best_seconds(work) / 1e6:.2f} M" for name, work in found.items()}
    return {"bytes a token": f"{sum(map(len, parts)) / tokens:.0f}", **rates}


def best_seconds(work: Callable[[], None]) -> float:
    """Of the CPU time that it takes, the least."""
    seconds = []
    for _ in range(_PASSES):
        began = time.process_time()
        work()
        seconds.append(time.process_time() - began)
    return min(seconds)


def enlarge(run: Run, folder: Path, vocab_size: int) -> Run:
    """The run with every id replaced by one of a larger vocabulary, always the same."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(run.uri.removeprefix("file://"), folder)
    plan = json.loads((folder / "plan.json").read_text())
    other = np.random.default_rng(0).permutation(vocab_size).astype("<i4")
    plan["model"]["vocab_size"] = vocab_size
    (folder / "plan.json").write_text(json.dumps(plan))
    manifest = json.loads((folder / "manifest.json").read_text())
    for part in manifest["parts"]:
        path = folder / part["name"]
        if part["name"].startswith("topk/"):
            with run.open_part(part["name"]) as file:
                respell(file, path, other)
            part["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return open_run(str(folder))


def respell(file: PartFile, path: Path, other: np.ndarray) -> None:
    """Write a part again, with `other[id]` for every likely id."""
    about = {k.decode(): v.decode() for k, v in file.schema_arrow.metadata.items()}
    metadata = {name.removeprefix("logitmill."): value for name, value in about.items()}
    writer = PartWriter(path, schema_of("topk", len(other)), metadata)
    for group in range(file.num_row_groups):
        columns = file.read_row_group(group).to_pydict()
        rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        ids = [other[join_bytes(row, "top_id", "<i4")] for row in rows]
        for i in range(3):
            columns[f"top_id_{i}"] = [(one >> 8 * i).astype("u1").tobytes() for one in ids]
        writer.write(columns)
    writer.close()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
