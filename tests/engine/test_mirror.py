"""Models by URI: fetched once, whole or not at all, and their errors without credentials."""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem
from logitmill.engine import pipeline
from logitmill.engine.checkpoint import digest, find_model
from logitmill.engine.pipeline import EngineSettings, inspect_model, inspect_placement
from oracles import byte_tokenizer, shard, table_model

URI = "memory://models/small"
SECRET = "s3cr3t-of-the-tests"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model in three shards with a tokenizer, beside files and folders that are none of it."""
    draw = np.random.default_rng(0)
    folder = table_model(tmp_path / "small", draw.normal(size=(20, 20)), tokenizer=None)
    byte_tokenizer().save_pretrained(folder)
    shard(folder, 3)
    (folder / "README.md").write_text("words")
    (folder / "pytorch_model.bin").write_bytes(b"a pickle")
    (folder / "original").mkdir()
    (folder / "original/model.safetensors").write_bytes(b"another model")
    return folder


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LOGITMILL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def memory(folder: Path, cache: Path) -> Iterator[MemoryFileSystem]:
    """The model at `URI`."""
    fs = fsspec.filesystem("memory")
    fs.put(str(folder), "/models/small", recursive=True)
    yield fs
    fs.rm("/models", recursive=True)


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that were asked for."""
    names: list[str] = []
    whole = MemoryFileSystem.get_file

    def get_file(self: Any, source: str, *args: Any, **options: Any) -> None:
        names.append(source.rpartition("/")[2])
        whole(self, source, *args, **options)

    monkeypatch.setattr(MemoryFileSystem, "get_file", get_file)
    return names


def refusal(uri: str, **options: Any) -> str:
    with pytest.raises(ValueError) as raised:  # noqa: PT011 - the callers look at the message
        find_model(uri, **options)
    said = str(raised.value)
    assert "\n" not in said
    assert raised.value.__cause__ is None
    return said


@pytest.mark.usefixtures("memory")
@pytest.mark.parametrize("uri", [URI, URI + "/"])
def test_a_model_by_uri_is_the_model(uri: str, folder: Path, cache: Path) -> None:
    found = find_model(uri)
    assert found.is_relative_to(cache)
    assert digest(found) == digest(folder)
    assert not (found / "README.md").exists()
    assert not (found / "pytorch_model.bin").exists()
    ids = [[1, 2, 3, 4]]
    ours, expected = (pipeline(m, device="cpu").get_logits(ids)[0] for m in (uri, folder))
    assert torch.equal(ours, expected)


@pytest.mark.usefixtures("cache")
def test_files_of_this_machine_are_not_copied(folder: Path) -> None:
    assert find_model(f"file://{folder}") == folder
    assert "name the folder" in refusal(f"file://{folder}/config.json")
    assert "there is no folder" in refusal(f"file://{folder}/nowhere")


def test_what_is_there_is_not_fetched_again(memory: MemoryFileSystem, fetched: list[str]) -> None:
    first = find_model(URI)
    assert len([name for name in fetched if name.endswith(".safetensors")]) == 3
    fetched.clear()
    assert find_model(URI + "/") == first
    assert fetched == []
    memory.pipe("/models/small/config.json", memory.cat("/models/small/config.json") + b" ")
    second = find_model(URI)
    assert second != first
    assert digest(second) != digest(first)


def test_what_a_kill_left_is_completed(memory: MemoryFileSystem, fetched: list[str]) -> None:
    whole = find_model(URI)
    expected = digest(whole)
    (whole / "config.json").unlink()
    lost = whole / "model-00002-of-00003.safetensors"
    lost.with_name(lost.name + ".part").write_bytes(lost.read_bytes()[:100])
    lost.unlink()
    fetched.clear()
    assert find_model(URI) == whole
    assert sorted(fetched) == ["config.json", lost.name]
    assert digest(whole) == expected
    assert list(whole.glob("*.part")) == []


@pytest.mark.usefixtures("memory")
def test_processes_that_ask_at_once_fetch_once(fetched: list[str]) -> None:
    with ThreadPoolExecutor(4) as pool:
        folders = set(pool.map(find_model, [URI] * 4))
    assert len(folders) == 1
    assert len(fetched) == len(set(fetched))


def test_files_without_a_time_are_fetched_each_time(
    memory: MemoryFileSystem, fetched: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing says that they are the same."""
    ls = MemoryFileSystem.ls
    monkeypatch.setattr(
        MemoryFileSystem,
        "ls",
        lambda self, path, detail=True, **o: [
            entry | {"created": None} for entry in ls(self, path, detail=True, **o)
        ],
    )
    first = find_model(URI)
    text = memory.cat("/models/small/config.json").decode()
    other = text.replace("1", "2", 1)
    fetched.clear()
    memory.pipe("/models/small/config.json", other.encode())
    assert find_model(URI) == first
    assert len(fetched) == len(list(first.iterdir()))
    assert (first / "config.json").read_text() == other


@pytest.mark.parametrize("kept", [0, 0.5, 0.99])
def test_a_file_that_comes_short_is_never_kept(
    kept: float, memory: MemoryFileSystem, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "model-00002-of-00003.safetensors"

    def get_file(self: Any, source: str, target: str, **options: Any) -> None:
        data = memory.cat(source)
        Path(target).write_bytes(data[: int(kept * len(data))] if name in source else data)

    with monkeypatch.context() as patched:
        patched.setattr(MemoryFileSystem, "get_file", get_file)
        said = refusal(URI)
    assert f"model: {URI!r}, file {name!r}, cannot be fetched: OSError: " in said
    assert "bytes came" in said
    assert list(cache.rglob(f"{name}*")) == []
    assert (find_model(URI) / name).is_file()


def test_a_file_that_is_written_meanwhile_is_never_kept(
    memory: MemoryFileSystem, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = MemoryFileSystem.get_file

    def get_file(self: Any, source: str, target: str, **options: Any) -> None:
        whole(self, source, target, **options)
        if source.endswith("/config.json"):
            time.sleep(0.01)
            memory.pipe(source, memory.cat(source))

    monkeypatch.setattr(MemoryFileSystem, "get_file", get_file)
    said = refusal(URI)
    assert "'config.json', cannot be fetched: OSError: it was written anew" in said
    assert list(cache.rglob("config.json")) == []


@pytest.mark.usefixtures("memory")
def test_what_is_fetched_is_said_and_how_far_it_is(
    folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = MemoryFileSystem.get_file

    def get_file(self: Any, source: str, target: str, **options: Any) -> None:
        whole(self, source, target, **options)
        time.sleep(0.2)

    monkeypatch.setattr(MemoryFileSystem, "get_file", get_file)
    monkeypatch.setattr("logitmill.engine.mirror._SECONDS", 0.05)
    found = find_model(URI)
    first, *others = caplog.messages
    size = sum(file.stat().st_size for file in found.iterdir()) / 1e9
    num_files = len(list(found.iterdir()))
    assert first == f"model: fetching {num_files} files, {size:.2f} GB, of {URI} into {found}"
    assert others
    assert all(line.endswith(f" of {size:.2f} GB are here") for line in others)
    caplog.clear()
    find_model(URI)
    assert caplog.messages == []


def find_headers(uri: str = URI) -> Path:
    return find_model(uri, headers_only=True)


@pytest.mark.usefixtures("memory")
def test_a_model_is_inspected_by_its_headers(
    folder: Path, fetched: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    found = find_headers()
    assert not [name for name in fetched if name.endswith(".safetensors")]
    assert " and headers of weights, of " in caplog.text
    settings = EngineSettings(device="cpu")
    for look in (inspect_model, inspect_placement):
        assert look(found, settings) == look(folder, settings)
    for file in folder.glob("*.safetensors"):
        data, theirs = file.read_bytes(), (found / file.name).read_bytes()
        start = 8 + int.from_bytes(data[:8], "little")
        assert theirs == data[:start] + bytes(len(data) - start)
    # A model to run is another folder, and has the headers as well.
    whole = find_model(URI)
    assert whole != found
    assert digest(whole) == digest(folder)
    assert find_headers() == whole


@pytest.mark.parametrize("kept", [0, 5, 8, 60, 0.5, 0.99])
def test_a_remote_file_that_is_cut_is_found_by_its_header(
    memory: MemoryFileSystem, folder: Path, kept: float
) -> None:
    name = "model-00002-of-00003.safetensors"
    data = (folder / name).read_bytes()
    memory.pipe(f"/models/small/{name}", data[: int(kept if kept > 1 else kept * len(data))])
    with pytest.raises(ValueError, match=f"{name} is not a whole safetensors file"):
        inspect_model(find_headers(), EngineSettings(device="cpu"))


@pytest.mark.usefixtures("cache")
def test_uris_that_hold_no_model(folder: Path, memory: MemoryFileSystem) -> None:
    assert refusal(URI + "x").startswith(f"model: there is nothing at '{URI}x'; give the URI")
    assert "is a file; name the folder" in refusal(URI + "/config.json")
    assert "no file system is known for memry://. Did you mean 'memory'?" in refusal("memry://m")
    assert "revision: 'main' is for Hub ids" in refusal(URI, revision="main")
    for file in folder.glob("*.safetensors*"):
        memory.rm(f"/models/small/{file.name}")
    said = refusal(URI)
    assert f"no model.safetensors or model.safetensors.index.json in {URI}; " in said
    assert "pytorch_model.bin is not read, since a pickle runs whatever code is in it" in said
    memory.rm("/models/small/config.json")
    assert f"no config.json in {URI}" in refusal(URI)


def test_a_cache_that_cannot_be_written_is_named(
    memory: MemoryFileSystem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("LOGITMILL_CACHE", str(tmp_path / "file"))
    said = refusal(URI)
    assert f"cannot be kept in {tmp_path}/file/models (set LOGITMILL_CACHE)" in said


def test_the_cache_lies_where_the_system_keeps_caches(
    memory: MemoryFileSystem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LOGITMILL_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert find_model(URI).parent == tmp_path / "xdg/logitmill/models"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert find_model(URI).parent == tmp_path / "home/.cache/logitmill/models"


# ---- S3 --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def s3() -> Iterator[dict[str, Any]]:
    """Options of a server with the bucket `models`."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    options = {
        "key": "key-of-the-tests",
        "secret": SECRET,
        "endpoint_url": f"http://{host}:{port}",
    }
    fsspec.filesystem("s3", **options).mkdir("models")
    yield options
    server.stop()


def test_a_model_on_s3(s3: dict[str, Any], folder: Path, cache: Path) -> None:
    fs = fsspec.filesystem("s3", **s3)
    fs.put(str(folder) + "/", "models/small/", recursive=True)
    uri = "s3://models/small/"
    found = find_model(uri, storage_options=s3)
    assert digest(found) == digest(folder)
    times = {file.name: file.stat().st_mtime_ns for file in found.iterdir()}
    assert find_model(uri, storage_options=s3) == found
    assert {file.name: file.stat().st_mtime_ns for file in found.iterdir()} == times
    shutil.rmtree(found)
    headers = find_model(uri, storage_options=s3, headers_only=True)
    assert inspect_model(headers, EngineSettings(device="cpu")).weights.endswith("in 3 files")
    found = find_model(uri, storage_options=s3)
    # Another process writes; this one's listing is of before.
    other = fsspec.filesystem("s3", **s3, skip_instance_cache=True)
    text = (folder / "config.json").read_text()
    other.pipe("models/small/config.json", text.replace("}", " }", 1).encode())
    changed = find_model(uri, storage_options=s3)
    assert changed != found
    assert (changed / "config.json").read_text() == text.replace("}", " }", 1)
    assert SECRET not in "".join(map(str, cache.rglob("*")))


def test_s3_mistakes_are_said_without_credentials(s3: dict[str, Any], cache: Path) -> None:
    wrong = s3 | {
        "endpoint_url": "http://127.0.0.1:9",
        "config_kwargs": {"retries": {"max_attempts": 0}},
    }
    said = [
        refusal("s3://models/nosuch", storage_options=s3),
        refusal("s3://nosuch/model", storage_options=s3),
        refusal("s3://models/nosuch", storage_options=wrong),
        refusal(f"s3://user:{SECRET}@models/small", storage_options=s3),
    ]
    for line in said:
        assert SECRET not in line
        assert "key-of-the-tests" not in line
        assert "s3://" in line
    assert "holds a credential; give it in the environment instead" in said[-1]
    assert not os.path.exists(cache)
