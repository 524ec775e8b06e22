"""Device memory that runs out: smaller batches, then smaller blocks, and the same bits."""

from __future__ import annotations

import time
import weakref
from dataclasses import replace
from itertools import chain

import numpy as np
import pytest
import torch
from logitmill.engine.blocks import Blocks
from logitmill.engine.head import Head
from logitmill.engine.runner import Request, Runner


class Small:
    """The bundled model with room for few tokens, or for few rows of logits."""

    def __init__(self, model, *, tokens: int = 1 << 30, rows: int = 1 << 30) -> None:
        self._model, self._tokens, self._rows = model, tokens, rows
        self.blocks = Blocks([1024, 512])

    def __getattr__(self, name: str):
        return getattr(self._model, name)

    def hidden(self, ids_T: torch.Tensor, lengths) -> torch.Tensor:
        if len(ids_T) > self._tokens:
            raise torch.OutOfMemoryError("too many tokens")
        return self._model.hidden(ids_T, lengths)

    def logits(self, hidden_RD: torch.Tensor) -> torch.Tensor:
        if len(hidden_RD) > self._rows:
            raise torch.OutOfMemoryError("too many rows")
        return self._model.logits(hidden_RD)


class Ahead(Runner):
    """Launches ahead, as on a GPU; counts earlier batches' hidden states as each is computed."""

    def __init__(self, model, head: Head) -> None:
        super().__init__(model, head)
        self.num_held: list[int] = []
        self._made: list[weakref.ref[torch.Tensor]] = []

    @property
    def depth(self) -> int:
        return 2

    def _hidden(self, requests, layers=()):
        self.num_held.append(sum(made() is not None for made in self._made))
        hidden = super()._hidden(requests, layers)
        self._made.append(weakref.ref(hidden.hidden_RD))
        return hidden


def requests() -> list[Request]:
    draw = np.random.default_rng(0)
    ids = [draw.integers(0, 500, n) for n in (700, 300, 5, 900, 1, 260)]
    return [Request(i, i) for i in ids]


def launch(runner: Runner, batch: list[Request]) -> np.ndarray:
    return np.concatenate([a.wait()["logprob"] for a in runner.launch(batch)])


def test_batches_are_halved_until_they_fit(demo, caplog):
    expected = launch(demo._runner, requests())
    model = Small(demo._model, tokens=1024)
    runner = Runner(model, Head(model, 256 << 20))
    assert np.array_equal(launch(runner, requests()), expected)
    assert runner._limit is not None
    assert "out of device memory" in caplog.text
    assert model.blocks.sizes == (1024, 512)


@pytest.mark.parametrize("ahead", [False, True])
def test_rows_of_streams_come_in_order_from_halved_batches(demo, ahead):
    expected = demo.get_logits([r.ids for r in requests()])
    model = Small(demo._model, tokens=1024)
    runner = (Ahead if ahead else Runner)(model, Head(model, 256 << 20))
    found = [[] for _ in expected]
    batches = [requests()[:1], [], requests()[1:]]
    chunks = runner.stream(batches, torch.float32, normalised=False)
    for rows in chain.from_iterable(chunks):
        assert rows.first_row == sum(map(len, found[rows.request]))
        found[rows.request].append(rows.values.clone())
    for own, logits in zip(found, expected, strict=True):
        assert torch.equal(torch.cat(own), logits)


def test_hidden_states_are_let_go_before_the_batch_after_the_next(demo):
    runner = Ahead(demo._model, Head(demo._model, 256 << 20))
    batches = [[request] for request in requests()]
    for _ in runner.stream(batches, torch.float32, normalised=False):
        pass
    # Beside each batch that is computed, the one before it, whose rows are yet to leave.
    assert runner.num_held == [0, *[1] * (len(batches) - 1)]


def test_one_window_is_run_in_smaller_blocks(demo):
    window = requests()[3:4]
    expected = launch(demo._runner, window)
    model = Small(demo._model, rows=512)
    head = Head(model, 256 << 20)
    head.blocks = Blocks([1024, 512])
    runner = Runner(model, head)
    assert np.array_equal(launch(runner, window), expected)
    assert model.blocks.sizes == head.blocks.sizes == (512,)


def test_a_window_that_cannot_fit_is_an_error(demo):
    model = Small(demo._model, tokens=512)
    runner = Runner(model, Head(model, 256 << 20))
    with pytest.raises(RuntimeError, match="a window of 900 tokens does not fit"):
        runner.launch(requests()[3:4])


def test_what_was_set_refuses_long_windows_and_no_batch_for_its_padding(demo, monkeypatch):
    """600 tokens are padded to 1,024 rows, and there is room for 600."""
    arrangement = replace(demo._model.arrangement, batch_tokens=600)
    room = arrangement.batches.count_bytes(600, demo._model.blocks.sizes[-1])
    monkeypatch.setattr(demo._model, "arrangement", replace(arrangement, batch_bytes=room))
    ids = np.zeros(601, np.int64)
    assert len(launch(demo._runner, [Request(ids[:600], ids[:600])])) == 600
    with pytest.raises(RuntimeError, match="device_memory: a window of 601 tokens takes"):
        launch(demo._runner, [Request(ids, ids)])


def test_the_time_that_a_device_is_at_work_is_given_once(demo):
    runner = Runner(demo._model, Head(demo._model, 256 << 20))
    assert runner.take_device_seconds() == 0.0
    started = time.perf_counter()
    launch(runner, requests())
    for _ in runner.stream([requests()], torch.float32, normalised=False):
        pass
    assert 0.0 < runner.take_device_seconds() <= time.perf_counter() - started
    assert runner.take_device_seconds() == 0.0
