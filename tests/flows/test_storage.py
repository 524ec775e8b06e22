"""Object storage that is real: Ceph's gateway, through the same calls that people make.

LOGITMILL_LONG=1 lists tens of thousands of keys instead of thousands, and kills the server.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict
from itertools import count
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import s3fs
from ceph import Ceph
from flow_helpers import Score, digests
from logitmill.engine.checkpoint import find_model
from logitmill.flows import Run, open_run, score_corpus
from logitmill.flows.corpus import CorpusSpec
from logitmill.flows.folder import Folder, Part, StoreError
from logitmill.flows.store import Receipt, find_receipts
from s3 import S3Server

LONG = bool(os.environ.get("LOGITMILL_LONG"))
NUM_RECEIPTS = 10_000 if LONG else 1_100


@pytest.fixture(autouse=True)
def keys(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The gateway's keys are in the environment, and no client remembers others."""
    use_keys(monkeypatch)
    yield
    s3fs.S3FileSystem.clear_instance_cache()


def use_keys(monkeypatch: pytest.MonkeyPatch, **variables: str) -> None:
    """Of all that decides credentials, `variables` alone are in the environment."""
    s3fs.S3FileSystem.clear_instance_cache()
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    given = variables or {"AWS_ACCESS_KEY_ID": Ceph.key, "AWS_SECRET_ACCESS_KEY": Ceph.secret}
    for name, value in {"AWS_EC2_METADATA_DISABLED": "true", **given}.items():
        monkeypatch.setenv(name, value)


def spec(uri: Any) -> CorpusSpec:
    return CorpusSpec(uri=str(uri), shard_bytes=3_000)


def there(server: S3Server) -> dict[str, str]:
    return {"endpoint_url": server.endpoint}


# ---- the same bytes


def test_a_run_there_has_the_bytes_of_one_here(
    score: Score, finished: Run, corpus: Path, s3_server: S3Server
) -> None:
    options: dict[str, Any] = {"tiers": ["tokens", "logits"], "endpoint_url": s3_server.endpoint}
    run = score(spec(corpus), out="s3://bucket/same", **options)
    assert digests(run) == digests(finished)
    assert score(spec(corpus), out="s3://bucket/same", **options).uri == run.uri
    rows = run.table().column("doc_id").to_pylist()
    assert len(rows) == len(set(rows)) == 8
    np.testing.assert_array_equal(run.logits(rows[3]), finished.logits(rows[3]))


def test_corpora_and_models_are_read_from_there(
    score: Score,
    corpus: Path,
    demo_folder: Path,
    finished: Run,
    s3_server: S3Server,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("LOGITMILL_CACHE", str(tmp_path / "cache"))
    fs = s3fs.S3FileSystem(**s3_server.options)
    fs.put(f"{corpus}/", "bucket/corpus/", recursive=True)
    fs.put(f"{demo_folder}/", "bucket/model/", recursive=True)
    run = score(
        spec("s3://bucket/corpus"), model="s3://bucket/model/", endpoint_url=s3_server.endpoint
    )
    local = finished.table()
    assert run.table().replace_schema_metadata(None).equals(local.replace_schema_metadata(None))
    fetched = find_model("s3://bucket/model/", storage_options=there(s3_server))
    for file in fetched.iterdir():
        assert file.read_bytes() == (demo_folder / file.name).read_bytes()


def test_two_runs_of_one_key_at_once(
    score: Score, finished: Run, corpus: Path, s3_server: S3Server
) -> None:
    options = {"tiers": ["tokens", "logits"], "endpoint_url": s3_server.endpoint}
    runs: list[Run] = []
    threads = [
        threading.Thread(
            target=lambda: runs.append(score(spec(corpus), out="s3://bucket/at-once", **options))
        )
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    first, second = runs
    assert first.uri == second.uri
    assert digests(first) == digests(finished)


# ---- large and many


def test_a_part_in_parts_is_whole(s3_server: S3Server, tmp_path: Path) -> None:
    """Above 100 MB s3fs sends 50 MB at a time."""
    folder = Folder("s3://bucket/large", there(s3_server))
    block = np.random.default_rng(0).bytes(1 << 20)
    file = tmp_path / "part"
    with file.open("wb") as out:
        for i in range(105):
            out.write(i.to_bytes(4, "little") + block[4:])
    part = folder.publish(file, "logits/part-00000.parquet")
    info = folder.filesystem.info(folder.path(part.name))
    assert part.bytes == info["size"] == 105 << 20
    assert info["ETag"].strip('"').endswith("-3"), "it went in three"
    back = tmp_path / "back"
    folder.filesystem.get_file(folder.path(part.name), str(back))
    assert back.read_bytes() == file.read_bytes()


def test_unfinished_uploads_of_a_run_are_ended(s3_server: S3Server) -> None:
    folder = Folder("s3://bucket/unfinished", there(s3_server))
    fs = folder.filesystem

    def begin(run: str) -> Callable[[], Any]:
        which = {"Bucket": "bucket", "Key": f"{run}/logits/part-00000.parquet"}
        which["UploadId"] = fs.call_s3("create_multipart_upload", **which)["UploadId"]
        sent = fs.call_s3("upload_part", PartNumber=1, Body=b"x" * (5 << 20), **which)
        parts = {"Parts": [{"PartNumber": 1, "ETag": sent["ETag"]}]}
        return lambda: fs.call_s3("complete_multipart_upload", MultipartUpload=parts, **which)

    begin("unfinished")
    finish_other = begin("unfinished-too")
    folder.write("logits/part-00000.parquet", b"whole")
    folder.sweep()
    left = [upload["Key"] for upload in fs.list_multipart_uploads("bucket")]
    assert left == ["unfinished-too/logits/part-00000.parquet"]
    finish_other()
    assert folder.read("logits/part-00000.parquet") == b"whole"


def test_thousands_of_receipts_are_found(
    s3_server: S3Server, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Folder("s3://bucket/many", there(s3_server))
    lost, short = 7, NUM_RECEIPTS - 5
    files: dict[str, bytes] = {}
    for i in range(NUM_RECEIPTS):
        tables = "scores/part-{}.parquet", "shards/{}.counts.parquet"
        names = [table.format(f"{i:05d}") for table in tables]
        receipt = Receipt(
            *(i, tuple(Part(name, 4, "0" * 64) for name in names), 1, 0, 1, 1, -1.0, 1.0),
            device="none",
            versions={},
        )
        files |= dict.fromkeys(names, b"part")
        files[Receipt.name(i)] = json.dumps(asdict(receipt)).encode()
    del files[f"scores/part-{lost:05d}.parquet"]
    files[f"shards/{short:05d}.counts.parquet"] = b"par"
    assert len(files) > 3_000

    started = time.monotonic()
    fs = s3fs.S3FileSystem(**s3_server.options, asynchronous=True, skip_instance_cache=True)

    async def put_all() -> None:
        session = await fs.set_session()
        gate = asyncio.Semaphore(32)

        async def put(name: str, data: bytes) -> None:
            async with gate:
                await fs._pipe_file(f"bucket/many/{name}", data)

        await asyncio.gather(*(put(name, data) for name, data in files.items()))
        await session.close()

    asyncio.run(put_all())
    written = time.monotonic()
    assert folder.sizes("shards") == {n: len(d) for n, d in files.items() if n.startswith("shards")}
    listed = time.monotonic()
    found = find_receipts(folder, NUM_RECEIPTS)
    done = time.monotonic()
    assert list(found) == [i for i in range(NUM_RECEIPTS) if i not in (lost, short)]
    with capsys.disabled():
        print(
            f"\n{len(files)} keys put in {written - started:.1f} s, {2 * NUM_RECEIPTS} listed in "
            f"{listed - written:.2f} s, {NUM_RECEIPTS} receipts found in {done - listed:.1f} s"
        )


# ---- writers that race


@pytest.mark.parametrize("place", ["gateway", "moto", "disk"])
def test_readers_never_see_half_a_file(
    place: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """Four writers of one name: a reader finds what one of them wrote, whole, and never nothing."""
    if place == "disk":
        folder = Folder(str(tmp_path))
    else:
        found = request.getfixturevalue("s3_server" if place == "gateway" else "s3")
        endpoint = found.endpoint if isinstance(found, S3Server) else found
        folder = Folder("s3://bucket/raced", {"endpoint_url": endpoint})
    done, seen = threading.Event(), 0

    def write(who: int) -> None:
        for i in range(15):
            folder.write_json("plan.json", {"who": who, "text": str((who + i) % 10) * 20_000})

    folder.write_json("plan.json", {"who": 0, "text": "0" * 20_000})
    writers = [threading.Thread(target=write, args=(who,)) for who in range(4)]
    for writer in writers:
        writer.start()
    while not done.is_set():
        if not any(writer.is_alive() for writer in writers):
            done.set()
        found = folder.read_json("plan.json")
        assert found is not None and found["text"] == found["text"][0] * 20_000
        seen += 1
    assert seen > 3
    assert folder.read_json("plan.json") is not None


# ---- credentials


def write_profile(folder: Path) -> Path:
    file = folder / "credentials"
    file.write_text(
        f"[mill]\naws_access_key_id = {Ceph.key}\naws_secret_access_key = {Ceph.secret}\n"
    )
    return file


@pytest.mark.parametrize("source", ["environment", "profile", "fsspec", "fsspec folder", "none"])
def test_credentials_come_from(
    source: str, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from fsspec.config import set_conf_env, set_conf_files

    file = write_profile(tmp_path)
    keys = {"AWS_ACCESS_KEY_ID": s3_server.key, "AWS_SECRET_ACCESS_KEY": s3_server.secret}
    use_keys(
        monkeypatch,
        **{
            "environment": keys,
            "profile": {"AWS_SHARED_CREDENTIALS_FILE": str(file), "AWS_PROFILE": "mill"},
        }.get(source, {"AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "none")}),
    )
    conf: dict[str, Any] = {}
    monkeypatch.setitem(fsspec.config.conf, "s3", {})
    if source == "fsspec":
        set_conf_env(conf, {"FSSPEC_S3_KEY": s3_server.key, "FSSPEC_S3_SECRET": s3_server.secret})
    if source == "fsspec folder":
        given = {"s3": {"key": s3_server.key, "secret": s3_server.secret}}
        (tmp_path / "conf.json").write_text(json.dumps(given))
        set_conf_files(str(tmp_path), conf)
    monkeypatch.setattr(
        "fsspec.spec.apply_config", lambda cls, kw: fsspec.config.apply_config(cls, kw, conf)
    )
    folder = Folder(f"s3://bucket/by-{source[:6]}", there(s3_server))
    if source == "none":
        helps = (
            "Unable to locate credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_"
        )
        with pytest.raises(StoreError, match=f"out: .* cannot be written: {helps}"):
            folder.check_writable()
        with pytest.raises(OSError, match=f"^run: .*plan.json cannot be read: {helps}"):
            open_run(folder.uri, storage_options=there(s3_server))
    else:
        folder.check_writable()
        assert folder.folders() == []


def test_a_worker_takes_credentials_from_a_prefect_block(
    s3_server: S3Server, server_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`job_variables: {env: {NAME: "{{ prefect.blocks.secret.BLOCK }}"}}` of a deployment.

    The worker asks the server for the block when it starts the flow's process: the deployment, the
    work pool and the flow run hold its name alone.
    """
    from logitmill.flows.server import use_server
    from prefect.blocks.system import Secret
    from prefect.client.orchestration import get_client
    from prefect.utilities.templating import resolve_block_document_references

    env = {
        "AWS_ACCESS_KEY_ID": s3_server.key,
        "AWS_SECRET_ACCESS_KEY": "{{ prefect.blocks.secret.storage-secret }}",
    }

    async def resolve() -> dict[str, str]:
        async with get_client() as client:
            await Secret(value=s3_server.secret).save("storage-secret", overwrite=True)
            return await resolve_block_document_references(env, client=client)

    with use_server():
        found = asyncio.run(resolve())
    assert found["AWS_SECRET_ACCESS_KEY"] == s3_server.secret
    use_keys(monkeypatch, **found)
    Folder("s3://bucket/by-block", there(s3_server)).check_writable()


# ---- secrets


def test_a_run_tells_no_secret(
    score: Score,
    corpus: Path,
    s3_server: S3Server,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    from test_score import stored_on_server

    for name in ("logitmill", "prefect"):
        caplog.set_level(logging.DEBUG, logger=name)
    fs = s3fs.S3FileSystem(**s3_server.options)
    fs.put(f"{corpus}/", "bucket/open/", recursive=True)
    run = score(spec("s3://bucket/open"), out="s3://bucket/told", endpoint_url=s3_server.endpoint)
    secrets = [s3_server.key, s3_server.secret]
    names = {path.rsplit("/", 1)[-1] for path in fs.find("bucket/told")}
    assert {"plan.json", "manifest.json", "report.html", "00000.json"} <= names
    for path in fs.find("bucket/told"):
        data = fs.cat_file(path)
        assert not any(secret.encode() in data for secret in secrets), path
    out, err = capfd.readouterr()
    said = caplog.text + out + err + json.dumps(stored_on_server(), default=str)
    assert run.uri in said
    assert not any(secret in said for secret in secrets)


@pytest.mark.parametrize("uri", ["gs://bucket/x", "az://box/x"])
def test_other_stores_name_their_package(
    uri: str, corpus: Path, demo_folder: Path, tmp_path: Path
) -> None:
    package = {"gs": "gcsfs", "az": "adlfs"}[uri[:2]]
    good = {"model": str(demo_folder), "corpus": str(corpus), "out": str(tmp_path)}
    for field in good:
        with pytest.raises(ValueError, match=rf"{uri}'.*: pip install {package}$"):
            score_corpus(**{**good, field: uri})
    with pytest.raises(StoreError, match=rf"^run: '{uri}' .*pip install {package}$"):
        open_run(uri)


# ---- a server that dies


@pytest.mark.skipif(not LONG, reason="LOGITMILL_LONG=1 kills the S3 server")
def test_what_the_server_took_outlives_it(tmp_path: Path) -> None:
    """Killed twice while four write: what was answered for is there, and the clients go on."""
    with Ceph(tmp_path / "ceph", lasting=True) as server:
        S3Server(server.endpoint, server.key, server.secret).make_bucket("bucket")
        folder = Folder("s3://bucket/outlived", {"endpoint_url": server.endpoint})
        taken: list[str] = []
        done = threading.Event()

        def write(who: int) -> None:
            names = (f"{who}/{i}" for i in count())
            name = next(names)
            while not done.is_set():
                # A client tries for less time than a restart takes; what failed is written again.
                with suppress(OSError):
                    folder.write(name, name.encode())
                    taken.append(name)
                    name = next(names)

        writers = [threading.Thread(target=write, args=(who,)) for who in range(4)]
        for writer in writers:
            writer.start()
        try:
            for _ in range(2):
                wanted, deadline = len(taken) + 100, time.monotonic() + 120
                while len(taken) < wanted:
                    assert time.monotonic() < deadline
                    time.sleep(0.05)
                server.kill()
                server.start()
        finally:
            done.set()
            for writer in writers:
                writer.join()
        for name in taken:
            assert folder.read(name) == name.encode()
