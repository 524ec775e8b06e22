"""The head in chunks: bounded memory, whatever the length of a document."""

from __future__ import annotations

import resource
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from logitmill.engine import pipeline
from logitmill.engine.blocks import Blocks
from logitmill.engine.head import Head, Rows
from logitmill.engine.transfer import Outbox
from oracles import constant_model, row_statistics_float64, table_model
from torch.utils._python_dispatch import TorchDispatchMode


class LargestTensor(TorchDispatchMode):
    """Records the largest tensor that any operation returned, in bytes of storage."""

    def __init__(self) -> None:
        super().__init__()
        self.num_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(value, torch.Tensor) and value.device.type == "cpu":
                self.num_bytes = max(self.num_bytes, value.untyped_storage().nbytes())
        return result


def test_memory_of_a_200k_token_document_is_bounded_by_a_setting(tmp_path: Path) -> None:
    """Others hold [T, V] (vLLM#5907, #1532): here that would be 1.2 GB in float32."""
    vocab_size, num_tokens, logits_memory = 1500, 200_000, 4 << 20
    folder = constant_model(tmp_path, np.zeros(vocab_size), max_positions=1024)
    pipe = pipeline(folder, device="cpu", logits_memory=logits_memory)
    ids = np.arange(num_tokens) % vocab_size
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with LargestTensor() as largest:
        (score,) = pipe.score([ids], prefix="none")
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert score.record.num_tokens_scored == num_tokens - 1
    np.testing.assert_allclose(score.tokens.logprob, -np.log(vocab_size), rtol=1e-6)
    assert 0 < largest.num_bytes <= logits_memory
    # The document's own records and windows are about 100 bytes a token.
    assert grown < 4 * logits_memory + 400 * num_tokens < 4 * num_tokens * vocab_size / 10


def test_memory_of_logits_for_a_sink_is_bounded_too(tmp_path: Path) -> None:
    vocab_size, num_tokens = 3000, 60_000
    folder = constant_model(tmp_path, np.zeros(vocab_size), max_positions=512)
    pipe = pipeline(folder, device="cpu", logits_memory=16 << 20)
    held: list[int] = []
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    (score,) = pipe.score(
        [np.zeros(num_tokens, np.int64)],
        prefix="none",
        on_logits=lambda i, d, first, rows, lse: held.append(len(rows)),
    )
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert sum(held) == score.record.num_tokens_scored == num_tokens - 1
    assert grown < (4 * vocab_size * num_tokens) / 2, "half of what all logits would take"


@pytest.mark.parametrize("num_rows", [1, 63, 64, 65, 255, 256, 257, 700])
@pytest.mark.parametrize("chunk", [64, 128, 256])
def test_statistics_are_those_of_the_rows_whatever_the_chunk(
    num_rows: int, chunk: int, tmp_path: Path
) -> None:
    table = np.random.default_rng(0).normal(scale=3, size=(50, 50))
    folder = table_model(tmp_path, table, max_positions=1024)
    pipe = pipeline(folder, device="cpu", logits_memory=chunk * 50 * 12)
    ids = np.random.default_rng(num_rows).integers(50, size=num_rows + 1)
    (score,) = pipe.score([ids], prefix="none")
    expected = row_statistics_float64(table[ids[:-1]].astype(np.float32), ids[1:])
    for name, values in expected.items():
        np.testing.assert_allclose(getattr(score.tokens, name), values, atol=3e-5, rtol=1e-5)


@pytest.mark.parametrize(("num_slots", "largest"), [(2, 2048), (4, 1024), (16, 512), (1000, 512)])
def test_chunks_make_room_for_rows_that_are_on_their_way(
    demo: Any, num_slots: int, largest: int
) -> None:
    """4,096 logits a row: 4 bytes each, and as many in each slot."""
    head = Head(demo._model, logits_memory=2048 * 4096 * 12)
    head.blocks = Blocks([4096, 2048, 1024, 512])
    hidden_RD = torch.zeros(4096, demo._model.spec.hidden_size)
    targets_R = torch.zeros(4096, dtype=torch.int64)
    outbox = Outbox(torch.device("cpu"), torch.float32, num_slots)
    with torch.inference_mode():
        chunks = head.logits(Rows(hidden_RD, targets_R, 4000), outbox, normalised=False)
        sizes = [rows.stop - rows.start for rows, _ in chunks]
    assert sizes[:-1] == [largest] * (len(sizes) - 1)
    assert sum(sizes) == 4000
