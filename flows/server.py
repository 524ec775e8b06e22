"""The embedded Prefect server: one for this process and everything it starts, gone when it is.

Used where Prefect's settings name no server. It is a process of its own, so that it starts while
this one imports and loads the model, and it ends with the process that started it, however that
one ends. Its database is Prefect's own, in PREFECT_HOME: `prefect server start` shows these runs.
"""

from __future__ import annotations

import atexit
import fcntl
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_TIMEOUT_SECONDS = 180.0
_SERVICES = (
    "CANCELLATION_CLEANUP",
    "CLEANUP_RECONCILER",
    "FOREMAN",
    "LATE_RUNS",
    "PAUSE_EXPIRATIONS",
    "REPOSSESSOR",
    "SCHEDULER",
    "TRIGGERS",
)
_SETTINGS = {
    "DO_NOT_TRACK": "1",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_UI_ENABLED": "false",
    # Half a second of start-up: a run uses no blocks, and a lasting server registers its own.
    "PREFECT_API_BLOCKS_REGISTER_ON_START": "false",
    # What serves schedules and deployments has nothing to do in a server of one run.
    **{f"PREFECT_SERVER_SERVICES_{name}_ENABLED": "false" for name in _SERVICES},
}


class EmbeddedServer:
    """A Prefect server in a process of its own, on a free port of this machine."""

    def __init__(self) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.api_url = f"http://127.0.0.1:{port}/api"
        self._said = tempfile.TemporaryFile()  # noqa: SIM115 - it lives as long as the server
        # The pipe's other end closes when this process ends, even by kill -9: the server's sign.
        theirs, self._lifeline = os.pipe()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "logitmill.flows.server", str(port)],
            env={**os.environ, **_SETTINGS},
            stdin=theirs,
            stdout=subprocess.DEVNULL,
            stderr=self._said,
            # Ctrl-C is for this process, which still has to tell the server how the run ended.
            start_new_session=True,
        )
        os.close(theirs)
        # Prefect's own queues are drained before functions registered here are called.
        atexit.register(self.stop)

    @property
    def alive(self) -> bool:
        """Whether its process runs."""
        return self._process.poll() is None

    def wait(self) -> None:
        """Return once the server answers.

        Raises:
            RuntimeError: if it ends or does not answer within three minutes.
        """
        deadline = time.monotonic() + _TIMEOUT_SECONDS
        while time.monotonic() < deadline:
            if not self.alive:
                self._said.seek(0)
                lines = self._said.read().decode(errors="replace").strip().splitlines()
                raise RuntimeError(f"the embedded Prefect server ended: {(lines or ['?'])[-1]}")
            try:
                with urllib.request.urlopen(f"{self.api_url}/health", timeout=5):
                    return
            except OSError:
                time.sleep(0.05)
        self.stop()
        raise RuntimeError(
            f"the embedded Prefect server did not answer within {_TIMEOUT_SECONDS:.0f} s"
        )

    @contextmanager
    def settings(self) -> Iterator[None]:
        """Everything Prefect does in this block, in any thread it starts, goes to this server."""
        from prefect.settings import (
            PREFECT_API_URL,
            PREFECT_FLOWS_HEARTBEAT_FREQUENCY,
            temporary_settings,
        )

        # Nobody acts on them here, and a flow waits at its end for the second that they sleep.
        no_heartbeats = {PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None}
        with temporary_settings({PREFECT_API_URL: self.api_url, **no_heartbeats}):
            yield

    def stop(self) -> None:
        """End the server, if it runs."""
        atexit.unregister(self.stop)
        if self._lifeline < 0:
            return
        os.close(self._lifeline)
        self._lifeline = -1
        try:
            self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


_server: EmbeddedServer | None = None
_starting = threading.Lock()


def start_server() -> EmbeddedServer | None:
    """This process's embedded server, started if there is none; None where another is set up."""
    global _server
    if _names_server():
        return None
    with _starting:
        if _server is None or not _server.alive:
            _server = EmbeddedServer()
        return _server


@contextmanager
def use_server() -> Iterator[None]:
    """Run the block with a Prefect server: the one set up, or else this process's own."""
    server = start_server()
    if server is None:
        yield
        return
    server.wait()
    with server.settings():
        yield


def _names_server() -> bool:
    """Whether Prefect's settings name a server. Imports Prefect only where they may.

    Importing it takes a second, in which an embedded server could be on its way up.
    """
    if "prefect" not in sys.modules and not _has_settings():
        return False
    from prefect.settings import get_current_settings

    return bool(get_current_settings().api.url)


def _has_settings() -> bool:
    if os.environ.get("PREFECT_API_URL"):
        return True
    home = Path(os.environ.get("PREFECT_HOME") or Path.home() / ".prefect").expanduser()
    profiles = os.environ.get("PREFECT_PROFILES_PATH") or home / "profiles.toml"
    places = (
        (profiles, ""),
        ("prefect.toml", ""),
        (".env", "PREFECT_"),
        ("pyproject.toml", "[tool.prefect"),
    )
    for place, sign in places:
        try:
            if sign in Path(place).read_text(errors="replace"):
                return True
        except OSError:
            continue
    return False


def serve(port: int) -> None:
    """Run a Prefect server until standard input closes."""

    def watch() -> None:
        sys.stdin.buffer.read()
        os._exit(0)

    threading.Thread(target=watch, daemon=True).start()
    _migrate()
    import uvicorn

    uvicorn.run(
        "prefect.server.api.server:create_app",
        factory=True,
        host="127.0.0.1",
        port=port,
        log_level="error",
        lifespan="on",
    )


def _migrate() -> None:
    """Make or update the database, one process at a time: two at once break a new one."""
    import asyncio

    from prefect.server.database import provide_database_interface
    from prefect.settings import get_current_settings

    home = get_current_settings().home
    home.mkdir(parents=True, exist_ok=True)
    with (home / "logitmill.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        asyncio.run(provide_database_interface().create_db())


if __name__ == "__main__":
    serve(int(sys.argv[1]))
