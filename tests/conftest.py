"""What the engine's and the kernels' tests share."""

from __future__ import annotations

import importlib.util
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from debian import NoPackageError
from fault_table import find_rows, format_rows
from hypothesis import HealthCheck, settings
from s3 import S3Server, share_server

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
if not torch.cuda.is_available() and importlib.util.find_spec("triton"):
    # Kernels then run on CPU tensors. Triton reads this when a kernel is defined.
    os.environ.setdefault("TRITON_INTERPRET", "1")
    import interpreter

    interpreter.correct()
    interpreter.hasten()

settings.register_profile(
    "logitmill",
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("logitmill")

DEMO_MODEL = Path(__file__).parents[1] / "infra" / "demo" / "model"


@pytest.hookimpl(optionalhook=True, tryfirst=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Files go to processes whole, unless `--dist` is given: each makes its fixtures once."""
    if config.getoption("dist") != "load":
        return None
    from xdist.scheduler import LoadFileScheduling

    config.option.loadscopereorder = False
    return LoadFileScheduling(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Where processes share the tests, files with slow ones come first: small ones fill the end."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
        items.sort(key=lambda item: -slow[item.path])


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """What the faults of these tests have done."""
    rows = find_rows(r for reports in terminalreporter.stats.values() for r in reports)
    if rows:
        terminalreporter.section("faults")
        for line in format_rows(rows):
            terminalreporter.write_line(line)


@pytest.fixture(scope="session", autouse=True)
def _few_threads() -> Iterator[None]:
    """Tiny models run faster on few threads, and xdist brings processes of its own."""
    before = torch.get_num_threads()
    torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else min(2, before))
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def demo_folder() -> Path:
    """The bundled trained model."""
    return DEMO_MODEL


@pytest.fixture(scope="session")
def demo(demo_folder: Path):  # type: ignore[no-untyped-def]
    """The bundled model, loaded."""
    from logitmill.engine import pipeline

    return pipeline(demo_folder, device="cpu")


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A real S3 server with the bucket `bucket`, one for all processes of the session."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    with ExitStack() as stack:
        try:
            server = stack.enter_context(share_server(shared))
            server.make_bucket("bucket")
        except (NoPackageError, RuntimeError, OSError) as error:
            # In the long form it is what is tested.
            end = pytest.fail if os.environ.get("LOGITMILL_LONG") else pytest.skip
            end(f"no S3 server: {error}")
        yield server
