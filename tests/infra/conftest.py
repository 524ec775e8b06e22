"""What the tests of `infra/` share: its files, and a Prefect server."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from pathlib import Path

import pytest

# Read when prefect is imported. The flows' tests have set theirs, if they are in this process.
if "PREFECT_HOME" not in os.environ:
    HOME = tempfile.mkdtemp(prefix="logitmill-test-")
    atexit.register(shutil.rmtree, HOME, ignore_errors=True)
    os.environ |= {"PREFECT_HOME": HOME, "DO_NOT_TRACK": "1"}
os.environ.pop("PREFECT_API_URL", None)

INFRA = Path(__file__).parents[2] / "infra"


@pytest.fixture(scope="session")
def infra() -> Path:
    """The folder of what runs logitmill."""
    return INFRA


@pytest.fixture(scope="session")
def server_url() -> str:
    """Of this process's embedded Prefect server."""
    from logitmill.flows.server import start_server

    server = start_server()
    assert server is not None
    server.wait()
    return server.api_url
