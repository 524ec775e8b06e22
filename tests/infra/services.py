"""The services of infra/compose.yaml as processes of this machine: same commands, same settings."""

from __future__ import annotations

import os
import pwd
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import yaml

ROOT = Path(__file__).parents[2]
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "infra/compose.yaml").read_text())["services"]
_PASSWORD = "p4ssword-of-the-tests"


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def command_of(service: str, **replaced: str) -> list[str]:
    """What compose runs for a service, with some words replaced, by this environment's programs."""
    words = [replaced.get(word, word) for word in COMPOSE[service]["command"]]
    return [str(Path(sys.executable).with_name(words[0])), *words[1:]]


class Process:
    """A service that runs, and what it has said."""

    def __init__(
        self, command: Sequence[str], environment: Mapping[str, str], folder: Path, **options: Any
    ) -> None:
        self._log = folder / f"{Path(command[0]).name}-{time.monotonic_ns()}.log"
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                command,
                env={**os.environ, **environment},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                **options,
            )

    def said(self) -> str:
        """All its output."""
        return self._log.read_text(errors="replace")

    def wait_for(self, url: str, seconds: float = 120) -> None:
        """Return once it answers there."""
        deadline = time.monotonic() + seconds
        while True:
            try:
                with urllib.request.urlopen(url, timeout=5):
                    return
            except OSError:
                if self._process.poll() is not None or time.monotonic() > deadline:
                    raise AssertionError(f"{url} does not answer:\n{self.said()}") from None
            time.sleep(0.2)

    def stop(self) -> int:
        """Its exit status once it ends; what is left of it after 30 s is killed."""
        self._process.terminate()
        try:
            return self._process.wait(30)
        except subprocess.TimeoutExpired:
            return -1
        finally:
            self.vanish()

    def vanish(self) -> None:
        """Kill it and all that it started, at one stroke: nobody sees another one die."""
        processes = []
        with suppress(psutil.NoSuchProcess):
            itself = psutil.Process(self._process.pid)
            processes = [itself, *itself.children(recursive=True)]
        for kill in (psutil.Process.suspend, psutil.Process.kill):
            for process in processes:
                with suppress(psutil.NoSuchProcess):
                    kill(process)
        self._process.wait()


@contextmanager
def started(process: Process) -> Iterator[Process]:
    """Stops a process when the block ends."""
    try:
        yield process
    finally:
        process.stop()


@contextmanager
def run_database() -> Iterator[dict[str, str]]:
    """A PostgreSQL of this machine's own package; gives Prefect's settings for it.

    Without one the settings are none: Prefect's server then keeps its SQLite.
    """
    programs = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    if not programs:
        yield {}
        return
    # It refuses to run as root, and needs a folder that it may reach and owns.
    user = "nobody" if os.geteuid() == 0 else pwd.getpwuid(os.geteuid()).pw_name
    options: dict[str, Any] = {"user": user, "extra_groups": []} if os.geteuid() == 0 else {}
    folder = Path(tempfile.mkdtemp(prefix="logitmill-database-", dir="/tmp"))
    try:
        (folder / "password").write_text(_PASSWORD)
        shutil.chown(folder, user)
        shutil.chown(folder / "password", user)
        data = folder / "data"
        make = [programs[-1] / "initdb", "--no-sync", "-A", "scram-sha-256", "-U", "prefect"]
        make += [f"--pwfile={folder / 'password'}", "-D", data]
        subprocess.run(make, check=True, capture_output=True, cwd=folder, **options)
        port = free_port()
        command = [str(programs[-1] / "postgres"), "-D", str(data), "-p", str(port), "-F"]
        command += ["-c", "listen_addresses=127.0.0.1", "-c", "unix_socket_directories="]
        settings = {
            **COMPOSE["server"]["environment"],
            "PREFECT_SERVER_DATABASE_HOST": "127.0.0.1",
            "PREFECT_SERVER_DATABASE_PORT": str(port),
            "PREFECT_SERVER_DATABASE_PASSWORD": _PASSWORD,
        }
        with started(Process(command, {}, folder, cwd=folder, **options)):
            # It answers a moment after it listens; its image makes this database by itself.
            _make_database(port)
            yield settings
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _make_database(port: int) -> None:
    import asyncio

    import asyncpg

    async def make() -> None:
        for _ in range(100):
            try:
                connection = await asyncpg.connect(
                    host="127.0.0.1",
                    port=port,
                    user="prefect",
                    password=_PASSWORD,
                    database="postgres",
                )
            except (OSError, asyncpg.CannotConnectNowError):
                await asyncio.sleep(0.1)
                continue
            await connection.execute("CREATE DATABASE prefect")
            return await connection.close()
        raise AssertionError("PostgreSQL does not answer")

    asyncio.run(make())


@contextmanager
def run_server(folder: Path) -> Iterator[str]:
    """PostgreSQL and Prefect's server; gives the address of its API."""
    port = str(free_port())
    with run_database() as settings:
        command = command_of("server", **{"0.0.0.0": "127.0.0.1", "4200": port})
        environment = {**settings, "PREFECT_HOME": str(folder / "server")}
        with started(Process(command, environment, folder)) as server:
            url = f"http://127.0.0.1:{port}/api"
            server.wait_for(f"{url}/health")
            yield url
