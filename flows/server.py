"""The embedded Prefect server: one for a run and everything it starts, gone when the run is.

Used where no `PREFECT_API_URL` says otherwise. It starts before anything heavy is imported, so
that its start overlaps with loading the model, and it ends with the process that started it,
however that one ends.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager

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
        self._lifeline, theirs = os.pipe()[::-1]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "logitmill.flows.server", str(port)],
            env={**os.environ, **_SETTINGS},
            stdin=theirs,
            stdout=subprocess.DEVNULL,
            stderr=self._said,
        )
        os.close(theirs)

    def wait(self) -> None:
        """Return once the server answers.

        Raises:
            RuntimeError: if it ends or does not answer within three minutes.
        """
        deadline = time.monotonic() + _TIMEOUT_SECONDS
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                self._said.seek(0)
                said = self._said.read().decode(errors="replace").strip()
                raise RuntimeError(f"the embedded Prefect server ended: {said[-2000:]}")
            try:
                with urllib.request.urlopen(f"{self.api_url}/health", timeout=5):
                    return
            except (urllib.error.URLError, OSError):
                time.sleep(0.05)
        self.stop()
        raise RuntimeError(
            f"the embedded Prefect server did not answer within {_TIMEOUT_SECONDS:.0f} s"
        )

    @contextmanager
    def settings(self) -> Iterator[None]:
        """Everything Prefect does in this block, in any thread it starts, goes to this server."""
        from prefect.settings import PREFECT_API_URL, temporary_settings

        with temporary_settings({PREFECT_API_URL: self.api_url}):
            yield

    def stop(self) -> None:
        """End the server."""
        self._process.terminate()
        try:
            self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._lifeline)


def serve(port: int) -> None:
    """Run a Prefect server until standard input closes."""

    def watch() -> None:
        sys.stdin.buffer.read()
        os._exit(0)

    threading.Thread(target=watch, daemon=True).start()
    import uvicorn

    uvicorn.run(
        "prefect.server.api.server:create_app",
        factory=True,
        host="127.0.0.1",
        port=port,
        log_level="error",
        lifespan="on",
    )


if __name__ == "__main__":
    serve(int(sys.argv[1]))
