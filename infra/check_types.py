"""Run mypy over the packages under the names they install as.

The folders engine/, flows/ and kernels/ install as logitmill.*; mypy follows folders, so it is
given a tree of links that has those names.
"""

import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("engine", "flows", "kernels")


def main() -> int:
    """mypy's exit status."""
    with TemporaryDirectory() as tree:
        for name in PACKAGES:
            link = Path(tree, "logitmill", name)
            link.parent.mkdir(exist_ok=True)
            link.symlink_to(ROOT / name)
        packages = [arg for name in PACKAGES for arg in ("-p", f"logitmill.{name}")]
        command = [sys.executable, "-m", "mypy", "--config-file", str(ROOT / "pyproject.toml")]
        cache = ["--cache-dir", str(ROOT / ".mypy_cache")]
        environment = {**os.environ, "MYPYPATH": tree}
        return subprocess.run(command + cache + packages, env=environment, cwd=tree).returncode


if __name__ == "__main__":
    sys.exit(main())
