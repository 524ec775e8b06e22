"""Expected and observed counts of the vocabulary, against the logits of the same rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from logitmill.engine import Document, Frequencies, Pipeline, head, pipeline
from oracles import table_model

TEXTS = ["import os\n" * 30, "def f(x):\n    return x\n", "é", "class A:\n    pass\n" * 5, ""]
SOURCES = ["a", "b", "a", "", "b"]


def documents() -> list[Document]:
    return [
        Document(str(i), text=text, source=source)
        for i, (text, source) in enumerate(zip(TEXTS, SOURCES, strict=True))
    ]


def count(pipe: Pipeline, **settings: Any) -> dict[str, Any]:
    frequencies = Frequencies()
    list(pipe.score(documents(), frequencies=frequencies, **settings))
    return frequencies.read()


def sink(*args: Any) -> None: ...


@pytest.mark.parametrize("settings", [{}, {"context": 16, "overlap": 4}])
def test_counts_are_those_of_the_logits(demo: Pipeline, settings: dict[str, int]) -> None:
    rows: dict[int, list[np.ndarray]] = {}

    def keep(index: int, doc_id: str, first: int, lp: np.ndarray, lse: np.ndarray) -> None:
        rows.setdefault(index, []).append(lp.astype(np.float64))

    scores = list(demo.score(documents(), on_logits=keep, **settings))
    found = count(demo, **settings)
    assert list(found) == ["a", "b", ""]
    for source, frequency in found.items():
        own = [i for i, s in enumerate(SOURCES) if s == source and i in rows]
        p = np.exp(np.concatenate([row for i in own for row in rows[i]]))
        np.testing.assert_allclose(frequency.expected, p.sum(0), rtol=1e-5, atol=1e-8)
        np.testing.assert_allclose(frequency.variance, (p * (1 - p)).sum(0), rtol=1e-4, atol=1e-8)
        targets = np.concatenate([scores[i].tokens.token_id for i in own])
        assert np.array_equal(frequency.observed, np.bincount(targets, minlength=demo.vocab_size))


@pytest.mark.parametrize(
    "settings",
    [
        {"top_k": 5, "num_draws": 3},
        {"on_logits": sink},
        {"on_states": sink, "top_k": 2},
    ],
)
def test_the_same_sums_in_any_batches_and_beside_any_extras(
    demo_folder: Path, demo: Pipeline, settings: dict[str, Any]
) -> None:
    other = pipeline(demo_folder, device="cpu", max_batch_tokens=40, logits_memory=64 * 4096 * 12)
    expected = count(demo)
    for pipe in (demo, other):
        found = count(pipe, **settings)
        assert list(found) == list(expected)
        for source, frequency in found.items():
            for name, values in vars(frequency).items():
                assert np.array_equal(values, getattr(expected[source], name)), (source, name)


def test_contexts_that_are_shared_are_not_counted(demo: Pipeline) -> None:
    texts = [Document(str(i), context="import os\nimport ", text=t) for i, t in enumerate("abc")]
    shared, apart = Frequencies(), Frequencies()
    scores = list(demo.score(texts, recipe="conditional", frequencies=shared))
    list(demo.score(texts, recipe="conditional", frequencies=apart, share_contexts=False))
    (found,), (expected,) = shared.read().values(), apart.read().values()
    assert found.observed.sum() == sum(len(s.tokens) for s in scores)
    assert np.array_equal(found.observed, expected.observed)
    np.testing.assert_allclose(found.expected, expected.expected, rtol=1e-4, atol=1e-7)


def test_a_model_that_knows_the_process_expects_what_is_there(tmp_path: Path) -> None:
    """Ids drawn from the model's own table: observed counts lie about the expected ones."""
    table = np.random.default_rng(0).normal(scale=1.5, size=(8, 8))
    p = np.exp(table) / np.exp(table).sum(1, keepdims=True)
    drawn = np.random.default_rng(1)
    ids = [0]
    for _ in range(4000):
        ids.append(drawn.choice(8, p=p[ids[-1]]))
    pipe = pipeline(table_model(tmp_path, table, max_positions=512), device="cpu")
    frequencies = Frequencies()
    list(pipe.score([np.array(ids)], prefix="none", frequencies=frequencies))
    (found,) = frequencies.read().values()
    z = (found.observed - found.expected) / np.sqrt(found.variance)
    assert found.observed.sum() == 4000 and (z**2).sum() < 30
    wrong = Frequencies()
    list(pipe.score([drawn.integers(8, size=4001)], prefix="none", frequencies=wrong))
    (found,) = wrong.read().values()
    assert (((found.observed - found.expected) ** 2) / found.variance).sum() > 300


def test_sources_beyond_the_room_are_told_together(demo: Pipeline) -> None:
    frequencies = Frequencies(max_sources=2)
    list(demo.score(documents(), frequencies=frequencies))
    found, apart = frequencies.read(), count(demo)
    assert list(found) == ["a", "b", "(other)"]
    assert np.array_equal(found["(other)"].expected, apart[""].expected)
    for wrong in (0, 1.5, "2"):
        with pytest.raises(ValueError, match=r"max_sources: .* is not an integer from 1"):
            Frequencies(max_sources=wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize(("where", "call"), [("logits", 2), ("results", 1)])
def test_memory_that_runs_out_counts_nothing_twice(
    demo_folder: Path, demo: Pipeline, monkeypatch: pytest.MonkeyPatch, where: str, call: int
) -> None:
    """In a chunk of a batch, or when all are done and their results are put together."""
    expected = count(demo)
    pipe = pipeline(demo_folder, device="cpu", logits_memory=64 * 4096 * 12)
    holder, name = (pipe._model, "logits") if where == "logits" else (head, "_send")
    run, calls = getattr(holder, name), [0]

    def fail_once(*given: Any) -> Any:
        calls[0] += 1
        if calls[0] == call:
            raise torch.OutOfMemoryError
        return run(*given)

    monkeypatch.setattr(holder, name, fail_once)
    found = count(pipe)
    assert calls[0] > call
    for source, frequency in found.items():
        assert np.array_equal(frequency.observed, expected[source].observed)
        assert np.array_equal(frequency.expected, expected[source].expected)
