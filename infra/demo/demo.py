"""The demo: score this machine's Python standard library with the bundled model.

The bundled model was trained on other people's Python and never saw the standard library, which
lies on every machine that has Python. Its modules at the top of the folder are read, the first
`--limit` by name: about a minute of scoring on two cores.
"""

from __future__ import annotations

import argparse
import os
import sys
import sysconfig
from pathlib import Path

MODEL = Path(__file__).resolve().parent / "model"


def main() -> None:
    """Become `logitmill score`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--limit", type=int, default=80, help="files (default %(default)s)")
    parser.add_argument("--out", default="runs", help="folder for runs (default %(default)s)")
    arguments = parser.parse_args()
    library = Path(sysconfig.get_path("stdlib"))
    modules = sorted(library.glob("*.py"))
    print(
        f"The first {min(arguments.limit, len(modules))} of the {len(modules)} modules in "
        f"{library}, by name:\nreal code that is on every machine with Python and that the bundled "
        "model has not seen. LIMIT=500 scores them all.\n",
        flush=True,
    )
    command = Path(sys.executable).with_name("logitmill")
    corpus = str(library / "*.py")
    limit = ["--limit", str(arguments.limit), "--out", arguments.out, "--shard-mb", "0.5"]
    # In its place, so that Ctrl-C and its exit status are the command's own.
    os.execv(command, [str(command), "score", str(MODEL), corpus, *limit])


if __name__ == "__main__":
    main()
