"""What measures sizes runs, and a run that it made up is one that holds."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_sizes_of_a_made_up_run_are_told(tmp_path: Path) -> None:
    said = subprocess.run(
        [sys.executable, ROOT / "infra/benchmarks/sizes.py", "3", "--out", tmp_path],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert said.returncode == 0, said.stderr
    table = dict(line.split(" | ") for line in said.stdout.splitlines() if line.startswith("| "))
    (plan,) = tmp_path.glob("3-*/runs/*/plan.json")
    assert table["| plan.json"] == f"{plan.stat().st_size / 1000:.3g} kB |"
    assert "| verify, nothing scored again" in table
