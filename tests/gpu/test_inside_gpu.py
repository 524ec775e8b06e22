"""What people look at and build with on a GPU: counts, hooks, lenses, samplers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from logitmill.engine import Document, Frequencies, Frequency, pipeline
from logitmill.engine.lens import split_lens
from logitmill.engine.records import TOKEN_DTYPES
from logitmill.engine.samplers import drawing, top_p
from test_gpu import MODEL, texts

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
FORMATS: list[dict[str, Any]] = [{}, {"quantization": "fp8", "fp8_head": True}]


def documents() -> list[Document]:
    return [Document(str(i), text=text, source=str(i % 3)) for i, text in enumerate(texts())]


def count(pipe: Any, **settings: Any) -> dict[str, Frequency]:
    frequencies = Frequencies()
    list(pipe.score(documents(), frequencies=frequencies, **settings))
    return frequencies.read()


def sink(*args: Any) -> None: ...


@pytest.mark.parametrize("settings", FORMATS)
def test_the_vocabulary_is_counted_alike_in_any_batches(settings) -> None:
    one = pipeline(MODEL, device="cuda", max_batch_tokens=1024, **settings)
    many = pipeline(MODEL, device="cuda", max_batch_tokens=65536, **settings)
    expected = count(one)
    for found in (
        count(many, top_k=20, num_draws=3),
        count(many, on_logits=sink),
        count(one, on_states=sink),
    ):
        assert list(found) == list(expected)
        for source, frequency in found.items():
            for name, values in vars(frequency).items():
                assert np.array_equal(values, getattr(expected[source], name)), (source, name)


def test_counts_are_those_of_the_logits() -> None:
    pipe = pipeline(MODEL, device="cuda")
    rows: dict[int, list[np.ndarray]] = {}

    def keep(index: int, doc_id: str, first: int, lp: np.ndarray, lse: np.ndarray) -> None:
        rows.setdefault(index, []).append(lp.astype(np.float64))

    scores = list(pipe.score(documents(), on_logits=keep))
    for source, found in count(pipe).items():
        own = [i for i in rows if str(i % 3) == source]
        p = np.exp(np.concatenate([row for i in own for row in rows[i]]))
        np.testing.assert_allclose(found.expected, p.sum(0), rtol=1e-5, atol=1e-7)
        np.testing.assert_allclose(found.variance, (p * (1 - p)).sum(0), rtol=1e-4, atol=1e-7)
        targets = np.concatenate([scores[i].tokens.token_id for i in own])
        assert np.array_equal(found.observed, np.bincount(targets, minlength=pipe.vocab_size))


@pytest.mark.parametrize("settings", FORMATS)
def test_a_hook_that_looks_moves_no_bit(settings) -> None:
    pipe = pipeline(MODEL, device="cuda", **settings)
    plain = [score.tokens.logprob for score in pipe.score(texts())]
    seen: set[int] = set()

    def look(layer: int, states_TD: torch.Tensor, tokens: Any) -> None:
        assert states_TD.is_cuda and len(states_TD) == len(tokens.ids_T)
        seen.add(layer)

    with pipe.hooked(look):
        found = [score.tokens.logprob for score in pipe.score(texts())]
    assert seen == set(range(pipe._model.spec.num_layers))  # type: ignore[attr-defined]
    for ours, expected in zip(found, plain, strict=True):
        assert np.array_equal(ours.view(np.int32), expected.view(np.int32))
    with pipe.hooked(lambda layer, states_TD, tokens: states_TD * 0 if layer == 0 else None):
        changed = [score.tokens.logprob for score in pipe.score(texts())]
    assert all(not np.array_equal(a, b) for a, b in zip(changed, plain, strict=True))


def test_the_last_layers_lens_is_the_score() -> None:
    pipe = pipeline(MODEL, device="cuda")
    scores = list(pipe.score(texts()))
    for layered, score in zip(pipe.lens(texts()), scores, strict=True):
        last = layered.layers[max(layered.layers)]
        for name, values in vars(score.tokens).items():
            assert np.array_equal(values, getattr(last, name)), name
    states = list(pipe.states(texts(), layers=[0, -1]))
    here = list(pipeline(MODEL, device="cpu").states(texts(), layers=[0, -1]))
    for ours, theirs in zip(states, here, strict=True):
        for layer, rows in ours.layers.items():
            other = theirs.layers[layer]
            assert rows.shape == other.shape
            off = (rows.float() - other).norm() / other.norm()
            assert off < 0.03, (layer, off)


@pytest.mark.parametrize("settings", FORMATS)
@pytest.mark.parametrize("kept", [{}, {"top_k": 5, "num_draws": 3}, {"on_logits": sink}])
def test_the_lens_goes_with_scores(settings: Any, kept: Any) -> None:
    pipe = pipeline(MODEL, device="cuda", max_batch_tokens=2048, **settings)
    plain = pipe.score(texts(), **kept)
    lenses = pipe.lens(texts(), layers=[0, 2, -1])
    scores = pipe.score(texts(), layers=[0, 2, -1], **kept)
    for score, without, layered in zip(scores, plain, lenses, strict=True):
        assert score.record == without.record
        for found, expected in zip(
            split_lens(score.tokens), layered.layers.values(), strict=bool(layered.layers)
        ):
            for name in TOKEN_DTYPES:
                assert np.array_equal(getattr(found, name), getattr(expected, name)), name


def test_greedy_is_the_likeliest_of_whole_sequences() -> None:
    pipe = pipeline(MODEL, device="cuda", dtype="float32")
    here = pipeline(MODEL, device="cpu")
    prompts = [[3, 5, 8], list(range(40, 300)), [7] * 70]
    settings: Any = {"max_tokens": 20, "stop": [], "batch_size": 2}
    expected = [one.ids.tolist() for one in here.sample(prompts, **settings)]
    found = [one.ids.tolist() for one in pipe.sample(prompts, **settings)]
    assert found == expected
    for prompt, ids in zip(prompts, found, strict=True):
        logits = pipe.get_logits([*prompt, *ids])[len(prompt) - 1 : -1]
        assert logits.argmax(-1).tolist() == ids


@pytest.mark.parametrize("kept_as", [None, "int8", "int4"])
def test_draws_go_by_the_seed(kept_as: str | None) -> None:
    pipe = pipeline(MODEL, device="cuda")

    def ask(seed: int) -> list[list[int]]:
        sampler = drawing(top_p(0.9), seed=seed)
        found = pipe.sample(["import os\n", "def f(x"] * 4, sampler, max_tokens=12, kept_as=kept_as)
        return [one.ids.tolist() for one in found]

    first = ask(0)
    assert first == ask(0) != ask(1)


def test_memory_that_runs_out_in_the_head_counts_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch that memory runs out for in the head is counted once it is done, and then once."""
    expected = count(pipeline(MODEL, device="cuda"))
    pipe = pipeline(MODEL, device="cuda", logits_memory=64 << 20)
    run, calls = pipe._model.logits, [0]

    def fail_once(hidden: torch.Tensor) -> torch.Tensor:
        calls[0] += 1
        if calls[0] == 2:
            raise torch.OutOfMemoryError
        return run(hidden)

    monkeypatch.setattr(pipe._model, "logits", fail_once)
    for source, frequency in count(pipe).items():
        assert np.array_equal(frequency.observed, expected[source].observed)
        assert np.array_equal(frequency.expected, expected[source].expected)
