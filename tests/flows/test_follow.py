"""A run that is being written elsewhere is followed from storage alone."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from flow_helpers import note_reads
from logitmill.flows import Run, cli
from logitmill.flows.folder import Folder
from logitmill.flows.follow import Followed, _Follower, find_followed, follow_run
from logitmill.flows.store import Receipt


def stages(run: Run) -> list[list[str]]:
    """The files of a run in the order in which they come: a shard's parts, its receipt, ..."""
    shards = range(len(run.plan["corpus"]["shards"]))
    receipts = [Receipt.read(run.folder, shard) for shard in shards]
    parts = [[*(part.name for part in r.parts), Receipt.name(r.shard)] for r in receipts if r]
    summaries = [part["name"] for part in run.manifest["summaries"]]  # type: ignore[index]
    return [["plan.json"], *parts, summaries, ["report.html"], ["manifest.json"]]


class Writer(threading.Thread):
    """Writes a finished run into another folder, a stage whenever it is looked at."""

    def __init__(self, run: Run, folder: Folder) -> None:
        super().__init__(daemon=True)
        self._run, self._folder = run, folder
        self._stages = stages(run)
        self.looked, self.written = threading.Semaphore(0), threading.Semaphore(0)

    def write_next(self) -> None:
        for name in self._stages.pop(0):
            data = self._run.folder.read(name)
            assert data is not None
            self._folder.write(name, data)

    def run(self) -> None:
        while self._stages:
            self.looked.acquire()
            self.write_next()
            self.written.release()

    def wait(self, seconds: float) -> None:
        """In place of sleeping."""
        self.looked.release()
        assert self.written.acquire(timeout=30)


@pytest.mark.parametrize("place", ["local", "s3"])
def test_a_run_that_a_thread_writes_is_followed_to_its_manifest(
    finished: Run, tmp_path: Path, request: pytest.FixtureRequest, place: str
) -> None:
    if place == "s3":
        options = {"endpoint_url": request.getfixturevalue("s3")}
        folder = Folder("s3://bucket/followed/run", options)
    else:
        folder = Folder(str(tmp_path / "run"))
    writer = Writer(finished, folder)
    writer.write_next()
    writer.start()
    seen = list(follow_run(folder, wait=writer.wait))
    num_shards = len(finished.plan["corpus"]["shards"])
    # Summaries and report are nothing new to see.
    expected = [*range(num_shards + 1), num_shards, num_shards, num_shards]
    assert [one.shards for one in seen] == expected
    assert {one.num_shards for one in seen} == {num_shards}
    assert [one.complete for one in seen] == [False] * (len(seen) - 1) + [True]
    first, last = seen[0], seen[-1]
    assert (first.documents, first.tokens_per_second, first.seconds_left) == (0, None, None)
    assert (first.fraction, last.fraction) == (0.0, 1.0)
    manifest = finished.manifest
    assert manifest is not None
    assert (last.documents, last.tokens) == (manifest["documents"], manifest["tokens"])
    fractions = [one.fraction for one in seen]
    assert fractions == sorted(fractions)
    assert all((one.seconds_left or 0) > 0 for one in seen[1 : num_shards - 1])


def test_looks_come_seldom_where_nothing_changes(finished: Run, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(finished.uri, tmp_path / "run"))
    (copy / "manifest.json").rename(tmp_path / "manifest.json")
    waits: list[float] = []

    def wait(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 15:
            (tmp_path / "manifest.json").rename(copy / "manifest.json")

    list(follow_run(Folder(str(copy)), wait=wait))
    assert waits[:3] == [1.0, 1.5, 2.25] and waits[-1] == 30.0


def test_a_receipt_is_read_once(
    finished: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = Path(shutil.copytree(finished.uri, tmp_path / "run"))
    read = note_reads(monkeypatch)
    follower = _Follower(Folder(str(copy)))
    assert follower.look()[0] and not follower.look()[0]
    assert sorted(read) == list(range(len(finished.plan["corpus"]["shards"])))


def write_receipts(folder: Path, ends: dict[int, float], **fields: Any) -> Followed:
    """How a run of five shards looks whose receipts were written at these times."""
    (folder / "shards").mkdir(parents=True)
    shards = [{"num_bytes": 1000}] * 5
    (folder / "plan.json").write_text(json.dumps({"corpus": {"shards": shards}}))
    for shard, at in ends.items():
        receipt = {
            **{"shard": shard, "parts": [], "documents": 1, "failed": 0, "tokens": 600},
            **{"bytes": 1000, "loglikelihood": -1.0, "seconds": 60.0, "device": "", "versions": {}},
            **fields,
        }
        file = folder / Receipt.name(shard)
        file.write_text(json.dumps(receipt))
        os.utime(file, (at, at))
    return _Follower(Folder(str(folder))).look()[1]


def test_speed_is_that_of_the_last_receipts(tmp_path: Path) -> None:
    """One after another, side by side, and after a night in which nobody was at work."""
    start = 1_000_000.0
    serial = write_receipts(tmp_path / "serial", {i: start + 60 * i for i in range(3)})
    assert (serial.tokens_per_second, serial.seconds_left) == pytest.approx((10.0, 120.0))
    parallel = write_receipts(tmp_path / "parallel", dict.fromkeys(range(4), start))
    assert (parallel.tokens_per_second, parallel.seconds_left) == pytest.approx((40.0, 15.0))
    times = {0: start, 1: start + 50_000, 2: start + 50_060}
    resumed = write_receipts(tmp_path / "resumed", times)
    assert resumed.tokens_per_second == 10.0
    assert "nothing new for " in str(resumed)
    failed = write_receipts(tmp_path / "failed", {0: start}, failed=1)
    assert "1 of 5 shards  1 document (1 failed)  600 tokens  10 tokens/s" in str(failed)


def test_the_run_at_work_is_found(finished: Run, tmp_path: Path) -> None:
    for name in ("one", "two"):
        shutil.copytree(finished.uri, tmp_path / name)
    with pytest.raises(ValueError, match=r"holds 2 runs, name one: .*/one, .*/two"):
        find_followed(str(tmp_path))
    (tmp_path / "two/manifest.json").unlink()
    assert find_followed(str(tmp_path)).uri == f"{tmp_path}/two"
    with pytest.raises(ValueError, match="there is no run in"):
        find_followed(str(tmp_path / "one/scores"))
    with pytest.raises(ValueError, match="is gone"):
        for _ in follow_run(Folder(f"{tmp_path}/two"), wait=lambda _: shutil.rmtree(tmp_path)):
            pass


# ---- the command


def test_the_command_ends_with_the_run(
    finished: Run, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["logitmill", "follow", finished.uri])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    out, err = capsys.readouterr()
    assert int(ended.value.code or 0) == 0
    assert out.startswith(f"run     {finished.uri}\n8 documents, ") and "bits/byte" in out
    assert re.fullmatch(r"100%  5 of 5 shards  8 documents  [\d,]+ tokens  [\d,]+ tokens/s\n", err)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_following_and_not_the_run(
    number: signal.Signals, status: int, finished: Run, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(finished.uri, tmp_path / "run"))
    (copy / "manifest.json").unlink()
    (copy / "shards/00001.json").unlink()
    process = subprocess.Popen(
        [sys.executable, "-m", "logitmill.flows.cli", "follow", str(copy)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    line = process.stderr.readline()
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert re.search(r"4 of 5 shards", line)
    assert (process.returncode, said) == (status, "no longer followed; the run itself goes on\n")


def test_following_needs_no_orchestrator(finished: Run) -> None:
    code = (
        "import sys; sys.argv = ['logitmill', 'follow', sys.argv[1]]\n"
        "from logitmill.flows import cli\n"
        "try: cli.main()\n"
        "except SystemExit: pass\n"
        "heavy = {'transformers', 'prefect', 'datasets'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, finished.uri], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
