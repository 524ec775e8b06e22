"""Flow processes that are killed outright: every rerun completes with the undisturbed bytes.

The processes are forked from a server that has the imports done, so that a kill hits the flow and
not the import of torch.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from faults import Fault, Whole
from forks import CONTEXT
from logitmill.flows import Run, open_run

LONG = bool(os.environ.get("LOGITMILL_LONG"))
TIMES = 50 if LONG else 10
"""Kills at random moments."""
CountFault = Callable[[str, Whole], Fault]


def run_command(arguments: list[str], server_url: str, die_at: int | None) -> None:
    """The `logitmill` command, killed before it puts file number `die_at` in place."""
    import torch
    from logitmill.flows import cli
    from logitmill.flows.folder import Folder
    from prefect.settings import PREFECT_API_URL, temporary_settings

    os.setpgid(0, 0)
    torch.set_num_threads(1)
    move, count = Folder._move, 0

    def count_and_die(self: Folder, local: Path, name: str) -> None:
        nonlocal count
        count += 1
        if count == die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        move(self, local, name)

    Folder._move = count_and_die  # type: ignore[method-assign]
    sys.argv = ["logitmill", *arguments]
    with temporary_settings({PREFECT_API_URL: server_url}):
        cli.main()


class Command:
    """`logitmill score` with fixed arguments, in processes that can be killed."""

    def __init__(self, model: Path, corpus: Path, server_url: str) -> None:
        self._server_url = server_url
        self._arguments = ["score", str(model), str(corpus), "--shard-mb", "0.003", "--keep"]
        self._arguments += ["tokens", "--out"]

    def run(
        self, out: Path, *, kill_after: float | None = None, die_at: int | None = None
    ) -> tuple[int | None, float]:
        """Exit code (-9 for killed) and seconds."""
        process = CONTEXT.Process(
            target=run_command, args=([*self._arguments, str(out)], self._server_url, die_at)
        )
        started = time.monotonic()
        process.start()
        process.join(kill_after)
        if process.is_alive():
            process.kill()
        process.join()
        return process.exitcode, time.monotonic() - started


@pytest.fixture(scope="module")
def command(demo_folder: Path, corpus: Path, server_url: str) -> Command:
    return Command(demo_folder, corpus, server_url)


@pytest.fixture(scope="module")
def whole(command: Command, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run that nobody disturbed."""
    out = tmp_path_factory.mktemp("whole")
    code, _ = command.run(out)
    assert code == 0
    return open_run(str(out))


@pytest.mark.slow
def test_killed_at_random_moments(
    command: Command, whole: Run, count_fault: CountFault, tmp_path: Path
) -> None:
    fault = count_fault("command killed", Whole.of(whole))
    code, seconds = command.run(tmp_path / "undisturbed")
    assert code == 0
    rng = random.Random(2)
    folders = (tmp_path / str(n) for n in count())
    out = next(folders)
    for kill in range(TIMES):
        # Spread over a whole run.
        moment = seconds * (kill % 10 + rng.random()) / 10
        while True:
            code, took = command.run(out, kill_after=moment)
            if code != 0:
                break
            # A rerun is shorter, and so is any run once the machine has less to do.
            check(fault, out)
            out, moment = next(folders), took * rng.random()
        assert code == -signal.SIGKILL
        fault.strike()
        if kill % 3 == 2:
            code, _ = command.run(out)
            assert code == 0
            check(fault, out)
            out = next(folders)
    code, _ = command.run(out)
    assert code == 0
    check(fault, out)


def check(fault: Fault, out: Path) -> None:
    """The run in `out` is whole, and nothing lies beside it."""
    fault.check(open_run(str(out)))
    assert not list(out.glob(".tmp-*"))


@pytest.mark.slow
@pytest.mark.parametrize("die_at", [1, 5, -2, -1])
def test_killed_between_two_writes(
    command: Command, whole: Run, count_fault: CountFault, tmp_path: Path, die_at: int
) -> None:
    """Before the plan, before a receipt, before the report, before the manifest."""
    fault = count_fault("command killed between two writes", Whole.of(whole))
    num_files = sum(1 for p in Path(whole.uri).rglob("*") if p.is_file())
    code, _ = command.run(tmp_path, die_at=die_at if die_at > 0 else num_files + 1 + die_at)
    assert code == -signal.SIGKILL
    fault.strike()
    with pytest.raises(ValueError, match=r"no run|not complete"):
        open_run(str(tmp_path))
    assert [path for path in tmp_path.rglob("*") if ".tmp-" in path.name]
    code, _ = command.run(tmp_path)
    assert code == 0
    check(fault, tmp_path)


@pytest.mark.slow
def test_the_embedded_server_goes_with_a_killed_command(
    demo_folder: Path, corpus: Path, tmp_path: Path
) -> None:
    environment = {**os.environ, "PREFECT_HOME": str(tmp_path / "home")}
    command = [sys.executable, "-m", "logitmill.flows.cli", "score", str(demo_folder), str(corpus)]
    process = subprocess.Popen(
        [*command, "--out", str(tmp_path / "runs")], env=environment, stdout=subprocess.DEVNULL
    )
    try:
        servers = wait_for(lambda: children(process.pid))
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    (server,) = servers
    wait_for(lambda: not Path(f"/proc/{server}").exists())


def children(pid: int) -> list[int]:
    """Processes started by `pid` that are embedded servers."""
    found = []
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            parent = next(x for x in status.read_text().splitlines() if x.startswith("PPid:"))
            line = status.with_name("cmdline").read_bytes()
        except OSError:
            continue
        if int(parent.split()[1]) == pid and b"logitmill.flows.server" in line:
            found.append(int(status.parent.name))
    return found


def wait_for(condition: Any, seconds: float = 30) -> Any:
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.05)
    return value
