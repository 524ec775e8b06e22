"""Layers in memory that processes have in common: one copy, right bytes, nothing left behind.

Workers are processes of their own, which load layers as a GPU's process does and then wait to be
killed.
"""

from __future__ import annotations

import fcntl
import gc
import logging
import os
import re
import shutil
import signal
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
from forks import CONTEXT
from logitmill.engine import shared
from logitmill.engine.checkpoint import Checkpoint
from logitmill.engine.decoder import Decoder
from logitmill.engine.families import find_family
from logitmill.engine.formats import resolve_scheme
from logitmill.engine.layouts import read_stored
from logitmill.engine.loading import load_decoder
from logitmill.engine.placement import Room, place
from logitmill.engine.residency import Streamed, count_bytes
from logitmill.engine.shared import Shared, identify, share
from oracles import share_of_pages

CPU = torch.device("cpu")
MB = 1 << 20
NUM_LAYERS = 3
ROOT_ONLY = pytest.mark.skipif(os.geteuid() != 0, reason="needs another user's files")


def draw_layer(index: int, num_bytes: int = MB, *, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 * seed + index)
    return torch.randint(256, (num_bytes,), dtype=torch.uint8, generator=generator)


def load(
    key: str, *, num_resident: int = 0, num_bytes: int = MB, seed: int = 0
) -> Streamed[torch.Tensor]:
    layers = Streamed[torch.Tensor](
        NUM_LAYERS, device=CPU, num_resident=num_resident, shared=Shared(key, NUM_LAYERS)
    )
    for index in range(NUM_LAYERS):
        layers.add(draw_layer(index, num_bytes, seed=seed))
    return layers


def is_right(layers: Streamed[torch.Tensor], *, num_bytes: int = MB, seed: int = 0) -> bool:
    given = [draw_layer(i, num_bytes, seed=seed) for i in range(NUM_LAYERS)]
    return all(torch.equal(a, b) for a, b in zip(layers, given, strict=True))


def inodes(key: str, process: int | str = "self") -> dict[int, set[int]]:
    """Of each layer, the files in memory that a process has mapped."""
    found: dict[int, set[int]] = {}
    for line in Path(f"/proc/{process}/maps").read_text().splitlines():
        if match := re.search(rf" (\d+)\s+/memfd:logitmill-{key}-(\d+) \(deleted\)$", line):
            found.setdefault(int(match[2]), set()).add(int(match[1]))
    return found


def list_open(key: str) -> list[str]:
    """Files in memory of a key that any process has open."""
    found = []
    for path in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            link = os.readlink(path)
        except OSError:
            continue
        if f"logitmill-{key}-" in link:
            found.append(str(path))
    return found


class Worker:
    """A process that does a task, which may say things, and is killed in the end."""

    def __init__(self, task: Callable[..., None], *args: object) -> None:
        self.pipe, theirs = CONTEXT.Pipe()
        self._process = CONTEXT.Process(target=task, args=(theirs, *args), daemon=True)
        self._process.start()
        theirs.close()
        assert self._process.pid is not None
        self.pid = self._process.pid

    def hear(self, seconds: float = 60) -> Any:
        assert self.pipe.poll(seconds), "nothing is said"
        return self.pipe.recv()

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        self._process.join()


Start = Callable[..., Worker]


@pytest.fixture
def start() -> Iterator[Start]:
    workers: list[Worker] = []

    def start_one(task: Callable[..., None], *args: object) -> Worker:
        workers.append(Worker(task, *args))
        return workers[-1]

    yield start_one
    for worker in workers:
        if worker._process.is_alive():
            worker.kill()


@pytest.fixture
def key() -> str:
    return uuid.uuid4().hex


def load_and_wait(pipe: Connection, key: str, num_resident: int, num_bytes: int, seed: int) -> None:
    layers = load(key, num_resident=num_resident, num_bytes=num_bytes, seed=seed)
    pipe.send(is_right(layers, num_bytes=num_bytes, seed=seed))
    signal.pause()


def fill_half_and_wait(pipe: Connection, key: str, index: int) -> None:
    memory = Shared(key, NUM_LAYERS)
    with memory.take(index, MB) as (room, is_whole):
        assert not is_whole
        room[: MB // 2] = 7
        pipe.send("half")
        signal.pause()


def wait_for_locks(workers: Sequence[Worker]) -> None:
    """Return once each of them waits for a lock."""
    deadline = time.monotonic() + 60
    left = {worker.pid for worker in workers}
    while left:
        assert time.monotonic() < deadline, "somebody does not wait"
        time.sleep(0.01)
        waiting = re.findall(
            r"-> FLOCK\s+ADVISORY\s+WRITE\s+(\d+)", Path("/proc/locks").read_text()
        )
        left = {worker.pid for worker in workers} - {*map(int, waiting)}


# ---- one copy --------------------------------------------------------------------------------


def test_processes_that_start_at_once_have_one_copy(start: Start, key: str) -> None:
    # None of them sees what is made by another one after it has looked.
    with shared._lock():
        workers = [start(load_and_wait, key, 0, MB, 0) for _ in range(4)]
        wait_for_locks(workers)
        assert not list_open(key)
    assert all(worker.hear() for worker in workers)
    found = [inodes(key, worker.pid) for worker in workers]
    assert all(files == found[0] for files in found)
    assert [len(found[0][i]) for i in range(NUM_LAYERS)] == [1] * NUM_LAYERS
    total = sum(share_of_pages(key, worker.pid) for worker in workers)
    assert total == pytest.approx(NUM_LAYERS * MB, rel=0.02)


def test_processes_share_the_layers_that_both_stream(start: Start, key: str) -> None:
    # Of three layers the last one is streamed, the last two, all.
    workers = [start(load_and_wait, key, num_resident, MB, 0) for num_resident in (2, 1, 0)]
    assert all(worker.hear() for worker in workers)
    found = [inodes(key, worker.pid) for worker in workers]
    assert [sorted(files) for files in found] == [[2], [1, 2], [0, 1, 2]]
    assert found[0][2] == found[1][2] == found[2][2]
    assert found[1][1] == found[2][1]


def test_pipelines_of_one_process_have_one_copy(key: str) -> None:
    first, second = load(key), load(key)
    assert all(len(files) == 1 for files in inodes(key).values())
    assert is_right(first) and is_right(second)
    del first
    assert is_right(second)


def test_a_copy_outlives_the_process_that_made_it(start: Start, key: str) -> None:
    first = start(load_and_wait, key, 0, MB, 0)
    assert first.hear()
    files = inodes(key, first.pid)
    second = start(load_and_wait, key, 0, MB, 0)
    assert second.hear()
    first.kill()
    third = start(load_and_wait, key, 0, MB, 0)
    assert third.hear()
    assert inodes(key, second.pid) == inodes(key, third.pid) == files


def test_what_is_there_is_only_read(start: Start, key: str) -> None:
    assert start(load_and_wait, key, 0, MB, 0).hear()
    memory = Shared(key, NUM_LAYERS)
    assert memory.whole == {0, 1, 2}
    times = [os.fstat(fd).st_mtime_ns for fd in memory._fds]
    assert is_right(load(key))
    assert [os.fstat(fd).st_mtime_ns for fd in memory._fds] == times
    for fd in memory._fds:
        with pytest.raises(PermissionError):
            os.ftruncate(fd, 0)


def test_another_key_is_other_memory(start: Start, key: str) -> None:
    assert start(load_and_wait, key, 0, MB, 0).hear()
    other = key[::-1]
    assert Shared(other, NUM_LAYERS).whole == set()
    assert is_right(load(other, seed=1), seed=1)


@pytest.mark.parametrize(("num_bytes", "seed"), [(MB, 1), (MB // 2, 0), (2 * MB, 0)])
def test_a_layer_of_other_bytes_is_kept_apart(
    start: Start, key: str, caplog: pytest.LogCaptureFixture, num_bytes: int, seed: int
) -> None:
    assert start(load_and_wait, key, 0, MB, 0).hear()
    layers = load(key, num_bytes=num_bytes, seed=seed)
    assert is_right(layers, num_bytes=num_bytes, seed=seed)
    assert not inodes(key)
    assert caplog.messages == [
        f"host memory: layer {i} has other bytes in another process of this model; this one keeps "
        "a copy of its own"
        for i in range(NUM_LAYERS)
    ]
    assert is_right(load(key))


# ---- processes that end ----------------------------------------------------------------------


@pytest.mark.parametrize("index", [0, NUM_LAYERS - 1])
def test_others_go_on_where_a_writer_was_killed(start: Start, key: str, index: int) -> None:
    writer = start(fill_half_and_wait, key, index)
    writer.hear()
    waiting = [start(load_and_wait, key, 0, MB, 0) for _ in range(2)]
    wait_for_locks(waiting)
    assert Shared(key, NUM_LAYERS).whole == {*range(index)}
    writer.kill()
    assert all(worker.hear() for worker in waiting)
    assert inodes(key, waiting[0].pid) == inodes(key, waiting[1].pid)


def test_what_a_writer_that_was_alone_left_is_not_there(start: Start, key: str) -> None:
    writer = start(fill_half_and_wait, key, 0)
    writer.hear()
    writer.kill()
    assert Shared(key, NUM_LAYERS).whole == set()
    assert is_right(load(key))


def test_a_writer_that_fails_gives_the_memory_back(key: str) -> None:
    memory = Shared(key, NUM_LAYERS)

    def fail() -> None:
        with memory.take(1, MB) as (room, _):
            room.fill_(7)
            raise MemoryError("cannot be pinned")

    with pytest.raises(MemoryError):
        fail()
    assert os.fstat(memory._fds[1]).st_blocks == 0
    assert memory.whole == set()
    assert is_right(load(key))


def shmem() -> int:
    found = re.search(r"^Shmem:\s*(\d+) kB", Path("/proc/meminfo").read_text(), re.M)
    assert found is not None
    return int(found[1]) << 10


def test_nothing_is_left_of_processes_that_were_killed(start: Start, key: str) -> None:
    size = 64 * MB
    folder = Path(tempfile.gettempdir()) / f"logitmill-{os.geteuid()}"
    before = shmem()
    workers = [start(load_and_wait, key, 0, size, 0) for _ in range(2)]
    workers.append(start(fill_half_and_wait, key[::-1], 0))
    assert all(worker.hear() for worker in workers)
    assert len(list_open(key)) >= 2 * NUM_LAYERS
    assert shmem() - before > 0.5 * NUM_LAYERS * size
    for worker in workers:
        worker.kill()
    assert not list_open(key)
    assert not list_open(key[::-1])
    assert [*folder.iterdir()] == []
    assert [*Path("/dev/shm").glob("*logitmill*")] == []
    assert shmem() - before < 0.5 * NUM_LAYERS * size
    assert Shared(key, NUM_LAYERS).whole == set()


def test_layers_that_are_let_go_are_gone_at_once(key: str) -> None:
    gc.collect()
    gc.disable()
    try:
        layers = load(key)
        assert len(list_open(key)) >= NUM_LAYERS
        del layers
        assert not list_open(key)
        assert not inodes(key)
    finally:
        gc.enable()


# ---- what is not trusted ---------------------------------------------------------------------


def test_a_place_that_has_become_another_files_is_passed_over(key: str) -> None:
    """As where a process has closed its file, or is another one with the same number."""
    other = os.memfd_create("logitmill-other-0", os.MFD_CLOEXEC)
    num_open = len(os.listdir("/proc/self/fd"))
    for path in (f"/proc/self/fd/{other}", "/proc/self/fd/99999", "/proc/99999999/fd/3", "/"):
        assert shared._open(path, f"logitmill-{key}-0") is None
    assert len(os.listdir("/proc/self/fd")) == num_open
    os.close(other)


def test_a_place_that_changes_while_it_is_looked_at_is_passed_over(
    key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = os.memfd_create("logitmill-other-0", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.write(other, b"wrong")
    found = shared._find

    def be_late(names: Sequence[str]) -> Any:
        places = found(names)
        for name in names:
            places[name].insert(0, f"/proc/self/fd/{other}")
        return places

    monkeypatch.setattr(shared, "_find", be_late)
    first = load(key)
    assert is_right(load(key))
    assert is_right(first)
    assert all(len(files) == 1 for files in inodes(key).values())
    os.close(other)


def pose(pipe: Connection, key: str) -> None:
    """As another user, or as one whose files another user has made."""
    os.setegid(65534)
    os.seteuid(65534)
    for index in range(NUM_LAYERS):
        fd = os.memfd_create(f"logitmill-{key}-{index}", os.MFD_ALLOW_SEALING)
        os.write(fd, draw_layer(index).numpy().tobytes())
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, shared._seals())
    pipe.send("made")
    pipe.recv()
    os.seteuid(0)
    pipe.send("back")
    signal.pause()


@ROOT_ONLY
def test_memory_of_another_user_is_not_trusted(start: Start, key: str) -> None:
    other = start(pose, key)
    other.hear()
    assert list_open(key)
    assert Shared(key, NUM_LAYERS).whole == set()
    other.pipe.send("be root")
    other.hear()
    assert list_open(key)
    assert Shared(key, NUM_LAYERS).whole == set()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where processes lock each other out."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path / f"logitmill-{os.geteuid()}"


def assert_refused(key: str, caplog: pytest.LogCaptureFixture, why: str) -> None:
    num_open = len(os.listdir("/proc/self/fd"))
    assert share(key, NUM_LAYERS) is None
    assert len(os.listdir("/proc/self/fd")) == num_open
    assert len(caplog.messages) == 1
    assert re.fullmatch(
        rf"host memory: layers cannot be shared with other processes \({why}\); this one keeps a "
        "copy of its own",
        caplog.messages[0],
    )


def test_a_folder_that_others_can_open_is_not_used(
    folder: Path, key: str, caplog: pytest.LogCaptureFixture
) -> None:
    folder.mkdir()
    folder.chmod(0o755)
    assert_refused(key, caplog, f"{folder} is open to other users; remove it, or set TMPDIR to .*")
    folder.chmod(0o700)
    assert share(key, NUM_LAYERS) is not None
    assert [*folder.iterdir()] == []


@ROOT_ONLY
def test_a_folder_of_another_user_is_not_used(
    folder: Path, key: str, caplog: pytest.LogCaptureFixture
) -> None:
    folder.mkdir(mode=0o700)
    os.chown(folder, 65534, 65534)
    assert_refused(key, caplog, f"{folder} is open to other users; .*")


def test_a_link_in_the_folders_place_is_not_followed(
    folder: Path, tmp_path: Path, key: str, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    folder.symlink_to(tmp_path / "elsewhere")
    assert_refused(key, caplog, r".*Not a directory.*")


def test_a_folder_that_is_new_is_ours_alone(folder: Path, key: str) -> None:
    before = os.umask(0)
    try:
        assert share(key, NUM_LAYERS) is not None
    finally:
        os.umask(before)
    assert folder.stat().st_mode & 0o777 == 0o700


def test_memory_is_not_shared_where_the_system_has_none_to_share(
    key: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delattr(os, "memfd_create")
    assert_refused(key, caplog, "this system, or this build of Python, has no memfd_create")


def test_files_that_cannot_be_opened_are_no_mistake_of_the_user(
    key: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(name: str, flags: int) -> int:
        if name.endswith("-2"):
            raise OSError(24, "Too many open files")
        return real(name, flags)

    real = os.memfd_create
    monkeypatch.setattr(os, "memfd_create", fail)
    assert_refused(key, caplog, ".*Too many open files")


# ---- models ----------------------------------------------------------------------------------


def identity(folder: Path, **changes: Any) -> str:
    checkpoint = Checkpoint.open(folder)
    scheme = resolve_scheme(
        read_stored(checkpoint.config), changes.get("quantization"), changes.get("capability")
    )
    key = identify(checkpoint, scheme, device=CPU, dtype=changes.get("dtype", torch.float32))
    assert key is not None
    return key


def test_a_key_is_of_all_that_decides_the_bytes(demo_folder: Path, tmp_path: Path) -> None:
    folder, link = tmp_path / "model", tmp_path / "link"
    shutil.copytree(demo_folder, folder)
    link.symlink_to(folder)
    file, config = folder / "model.safetensors", folder / "config.json"
    first = identity(folder)
    assert identity(folder) == identity(link) == first
    keys = [first, identity(demo_folder), identity(folder, dtype=torch.bfloat16)]
    keys += [identity(folder, quantization=name) for name in ("fp8", "int8", "int4")]
    keys.append(identity(folder, quantization="fp8", capability=(9, 0)))
    os.utime(file, ns=(time.time_ns(), time.time_ns()))
    keys.append(identity(folder))
    file.rename(folder / "old")
    shutil.copy2(folder / "old", file)
    keys.append(identity(folder))
    config.write_text(config.read_text().replace("{", '{"a_setting": 1,', 1))
    keys.append(identity(folder))
    assert len({*keys}) == len(keys)


def test_weights_that_are_made_at_random_are_nobodys() -> None:
    # Prefect comes with it, which no worker needs.
    from logitmill.flows.workloads import WORKLOADS

    weights: Any = WORKLOADS["demo-mixed"].checkpoint(CPU)
    scheme = resolve_scheme(read_stored(weights.config), None, None)
    assert identify(weights, scheme, device=CPU, dtype=torch.float32) is None
    assert share(None, NUM_LAYERS) is None


def load_model(folder: Path, host_bytes: int, wanted: str | None = "host") -> Decoder:
    """As on a device that has its own memory, too small for all layers."""
    checkpoint = Checkpoint.open(folder)
    room = Room(
        device_bytes=1 << 40,
        host_bytes=host_bytes,
        logits_bytes=MB,
        batch_tokens=512,
        block_rows=512,
        wanted=wanted,
        keeps_batch=True,
    )
    return load_decoder(
        checkpoint,
        find_family(checkpoint.config["architectures"][0]),
        device=CPU,
        dtype=torch.float32,
        room=room,
        scheme=resolve_scheme(read_stored(checkpoint.config), None, None),
    )


def load_model_and_wait(pipe: Connection, folder: Path, host_bytes: int) -> None:
    model = load_model(folder, host_bytes)
    pipe.send(sum(count_bytes(layer) for layer in model._layers.held))
    signal.pause()


def test_a_model_fits_beside_one_that_has_its_layers(
    start: Start, demo_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    # Files of its own, so that no other test's model is the same.
    folder = tmp_path / "model"
    shutil.copytree(demo_folder, folder)
    caplog.set_level(logging.INFO)
    needed = load_model(folder, 1 << 40).arrangement.placement.streamed_bytes
    with pytest.raises(ValueError, match=r"^host_memory: .* GB that 5 streamed layers take"):
        load_model(folder, needed - 1)
    first = start(load_model_and_wait, folder, needed)
    assert first.hear() == needed
    caplog.clear()
    second = load_model(folder, 0)
    assert caplog.messages == [
        "host memory: 5 of 5 layers are there already, and shared with other processes"
    ]
    assert inodes(identity(folder)) == inodes(identity(folder), first.pid)
    resident = load_model(folder, 0, wanted="device")
    assert len(second._layers) == 5
    for a, b in zip(second._layers.held, resident._layers.held, strict=True):
        assert torch.equal(a.qkv.weight_NK, b.qkv.weight_NK)
    # What stays on the device needs no files in memory.
    del second, a
    assert all(path.startswith(f"/proc/{first.pid}/") for path in list_open(identity(folder)))


def test_layers_that_are_there_need_no_room() -> None:
    room = {"fixed_bytes": 0, "activation_bytes": 0, "device_bytes": 4 * MB}
    layers = [MB] * 6
    # Two slots and two layers that stay; of six the second, third, fifth and last are streamed.
    assert place(layers, **room, host_bytes=4 * MB).source == "host"
    assert place(layers, **room, host_bytes=4 * MB - 1).source == "disk"
    assert place(layers, **room, host_bytes=2 * MB, shared={1, 2}).source == "host"
    assert place(layers, **room, host_bytes=2 * MB, shared={0, 1, 3}).source == "disk"
    assert place(layers, **room, host_bytes=0, shared={*range(6)}).source == "host"
    with pytest.raises(ValueError, match=r"than the 0.01 GB that 4 streamed layers take"):
        place(layers, **room, host_bytes=MB, shared={1, 2}, wanted="host")
