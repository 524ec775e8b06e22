"""The file that layers are put into: where it may be, what it gives back, and what it leaves."""

from __future__ import annotations

import errno
import gc
import os
import subprocess
import sys
import tempfile
import threading
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from logitmill.engine import scratch
from logitmill.engine.scratch import Scratch

GB = 10**9
Disk = namedtuple("Disk", "f_bavail f_frsize")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LOGITMILL_SCRATCH", str(tmp_path / "scratch"))
    return tmp_path / "scratch"


@pytest.fixture
def _nothing_is_left_open() -> Iterator[None]:
    """Not even until garbage is collected."""
    gc.collect()
    assert not open_files()
    gc.disable()
    try:
        yield
        assert not open_files()
    finally:
        gc.enable()


def open_files() -> list[str]:
    """Files without a name that this process has open or mapped."""
    opened = []
    for fd in Path("/proc/self/fd").iterdir():
        try:
            opened.append(os.readlink(fd))
        except OSError:
            continue
    opened += Path("/proc/self/maps").read_text().splitlines()
    return [name for name in opened if "/scratch/" in name and name.endswith("(deleted)")]


def draw(num_bytes: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (num_bytes,), dtype=torch.uint8, generator=generator)


def put(file: Scratch, data: torch.Tensor) -> torch.Tensor:
    part = file.allocate(len(data))
    part[: len(data)] = data
    file.settle(part)
    return part


# ---- bytes -----------------------------------------------------------------------------------


@pytest.mark.usefixtures("_nothing_is_left_open")
def test_parts_give_back_what_was_put_into_them(folder: Path) -> None:
    # Less than a page, whole pages, more than a thread reads at a time.
    given = [draw(n, n) for n in (1, 5000, 4096, (20 << 20) + 3, 0)]
    file = Scratch(30 << 20)
    assert file.folder == folder
    parts = [put(file, data) for data in given]
    assert open_files()
    for data, part in [*zip(given, parts, strict=True)] * 2:
        out = torch.zeros(len(part), dtype=torch.uint8)
        file.read(part, out)
        assert torch.equal(out[: len(data)], data)
        file.expect(part)
        assert torch.equal(part[: len(data)], data)
        file.forget(part)
        assert torch.equal(part[: len(data)], data)
    assert file.measure() > 0
    assert all(
        torch.equal(part[: len(data)], data) for data, part in zip(given, parts, strict=True)
    )


@pytest.mark.usefixtures("_nothing_is_left_open")
def test_parts_outlive_the_rest() -> None:
    part = put(Scratch(100), draw(100, 0))
    assert torch.equal(part, draw(100, 0))
    assert open_files()


def test_a_file_that_is_too_short_is_no_layer() -> None:
    file = Scratch(8192)
    part = put(file, draw(8192, 0))
    os.ftruncate(file._fd, 5000)
    with pytest.raises(OSError, match="the file ends at byte 5000"):
        file.read(part, torch.zeros(8192, dtype=torch.uint8))


def test_what_is_settled_or_forgotten_takes_no_memory() -> None:
    def mapped() -> int:
        found = [
            line
            for line in Path("/proc/self/smaps").read_text().split("VmFlags")
            if "/scratch/" in line
        ]
        return sum(
            int(line.split()[1])
            for entry in found
            for line in entry.splitlines()
            if line.startswith("Rss:")
        )

    file = Scratch(16 << 20)
    part = file.allocate(16 << 20)
    part.fill_(7)
    assert mapped() == 16 << 10
    file.settle(part)
    assert mapped() == 0
    assert int(part.sum()) == 7 * len(part)
    assert mapped() == 16 << 10
    file.forget(part)
    assert mapped() == 0


@pytest.mark.usefixtures("_nothing_is_left_open")
def test_threads_end_with_the_file() -> None:
    file = Scratch(1 << 20)
    part = put(file, draw(1 << 20, 0))
    file.expect(part)
    file.read(part, torch.zeros(1 << 20, dtype=torch.uint8))

    threads = [t for t in threading.enumerate() if t.name.startswith("logitmill-scratch")]
    assert threads
    del file, part
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()


_HOLD = """
import os, sys
from logitmill.engine.scratch import Scratch
file = Scratch(1 << 20)
part = file.allocate(1 << 20)
part.fill_(7)
file.settle(part)
print("ready", flush=True)
sys.stdin.read()
"""


def test_a_process_that_is_killed_leaves_nothing(folder: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", _HOLD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            assert [*folder.iterdir()] == []
            assert "/scratch/" in Path(f"/proc/{process.pid}/maps").read_text()
        finally:
            process.kill()
    assert [*folder.iterdir()] == []


# ---- folders ---------------------------------------------------------------------------------


def test_a_disk_that_is_too_small_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scratch.os, "statvfs", lambda _: Disk(31 * GB // 10 // 4096, 4096))
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        Scratch(12 * GB)
    assert str(caught.value) == (
        f"scratch: {folder} has 3.0 GB free, the layers take 12.0 GB; set LOGITMILL_SCRATCH to a "
        "folder on a larger disk"
    )


def test_a_disk_that_is_full_all_the_same_is_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    file = Scratch(100)
    monkeypatch.setattr(scratch.os, "posix_fallocate", refuse)
    with pytest.raises(
        ValueError, match=r"scratch: .*scratch has no room for 2.0 GB more"
    ) as caught:
        file.allocate(2 * GB)
    assert "(No space left on device); set LOGITMILL_SCRATCH to a folder" in str(caught.value)


def test_memory_is_no_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    if scratch._file_system(Path("/dev/shm")) != "tmpfs":
        pytest.skip("/dev/shm is no tmpfs here")
    monkeypatch.setenv("LOGITMILL_SCRATCH", "/dev/shm")
    with pytest.raises(ValueError, match=r"scratch: /dev/shm is memory \(tmpfs\), the layers take"):
        Scratch(1000)


def test_a_folder_that_cannot_be_written_to_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LOGITMILL_SCRATCH", str(tmp_path / "file"))
    with pytest.raises(ValueError, match=r"scratch: .*/file cannot be written to"):
        Scratch(1000)


def test_without_a_word_it_is_the_cache_and_else_the_temporary_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LOGITMILL_SCRATCH")
    monkeypatch.setenv("LOGITMILL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert Scratch(1000).folder == tmp_path / "cache"
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LOGITMILL_CACHE", str(tmp_path / "file"))
    assert Scratch(1000).folder == tmp_path
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "none" / "file"))
    (tmp_path / "none").write_text("")
    with pytest.raises(ValueError, match=r"/file cannot be .*, .*/none/file cannot be .*, the lay"):
        Scratch(1000)
