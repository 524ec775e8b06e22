"""Where the kernels' tests run."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(scope="session")
def device() -> torch.device:
    """A GPU, which runs compiled kernels, or else the CPU, where Triton interprets them."""
    pytest.importorskip("triton")
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
