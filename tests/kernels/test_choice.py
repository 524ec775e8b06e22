"""The table of implementations."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from logitmill.kernels import choice
from logitmill.kernels.choice import choose, has_triton


@pytest.fixture
def _forgotten() -> Iterator[None]:
    """No line is remembered from before, nor afterwards."""
    choice._choose_cuda.cache_clear()
    yield
    choice._choose_cuda.cache_clear()


def test_a_cpu_runs_torch() -> None:
    cpu = choose(torch.device("cpu"))
    assert not cpu.triton and cpu.attention == "sdpa" and not cpu.takes_cudnn(128, None)
    assert not has_triton(torch.zeros(1))


@pytest.mark.usefixtures("_forgotten")
@pytest.mark.parametrize(
    ("capability", "line"),
    [((8, 0), (8, 0)), ((8, 7), (8, 6)), ((8, 9), (8, 9)), ((10, 0), (9, 0)), ((12, 1), (12, 0))],
)
def test_a_gpu_takes_its_line_or_the_last_before_it(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], line: tuple[int, int]
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    assert choose(torch.device("cuda", 1)) is choice._TABLE[line]
    assert choose(torch.device("cuda")).triton


@pytest.mark.usefixtures("_forgotten")
def test_gpus_older_than_the_table_run_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5))
    line = choose(torch.device("cuda", 0))
    assert not line.triton and line.attention == "sdpa"


def test_cudnn_is_taken_for_large_heads_and_for_windows() -> None:
    line = choice.Choice(triton=True, attention="triton", cudnn_above=64)
    assert line.takes_cudnn(80, None) and line.takes_cudnn(80, 5) and line.takes_cudnn(64, 5)
    assert not line.takes_cudnn(64, None) and not line.takes_cudnn(56, 5)
