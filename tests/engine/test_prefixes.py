"""Sequences that begin alike: computed once, and with the bits of each scored alone."""

from __future__ import annotations

import copy
import random
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from logitmill.engine import Pipeline, pipeline
from logitmill.engine.packing import pack_alike
from logitmill.engine.prefixes import LEAST_SHARED, count_shared, fold
from logitmill.engine.records import Document, DocumentScore
from logitmill.engine.runner import Request
from oracles import reference_logits, save
from test_families import CASES, from_folder, make_model

# Few ids, so that much is shared.
SEQUENCES = st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=60), min_size=1, max_size=12)


def as_arrays(sequences: list[list[int]]) -> list[np.ndarray]:
    return [np.array(ids, np.int32) for ids in sequences]


@given(SEQUENCES)
def test_a_tree_holds_every_sequence(sequences: list[list[int]]) -> None:
    arrays = as_arrays(sequences)
    tree = fold(arrays)
    first = 0
    for ids, path, shared in zip(arrays, tree.paths, tree.num_shared, strict=True):
        assert (tree.ids[path] == ids).all()
        assert (tree.positions[path] == np.arange(len(ids))).all()
        assert (path[shared:] == np.arange(first, first + len(ids) - shared)).all()
        assert shared == 0 or shared >= LEAST_SHARED
        first += len(ids) - shared
    assert len(tree.ids) == len(tree.positions) == first


@given(SEQUENCES, st.integers(1, 200))
def test_packs_hold_every_sequence_once_within_the_budget(
    sequences: list[list[int]], budget: int
) -> None:
    arrays = as_arrays(sequences)
    packed = pack_alike(arrays, budget)
    assert sorted(i for batch in packed for i in batch) == list(range(len(arrays)))
    for batch in packed:
        rows = len(fold([arrays[i] for i in batch]).ids)
        assert rows <= budget or len(batch) == 1
    # Sorted, every beginning is computed once: as many tokens as a trie has nodes.
    order = [i for batch in pack_alike(arrays, 10**6) for i in batch]
    nodes = {tuple(ids[:n]) for ids in sequences for n in range(1, len(ids) + 1)}
    own = [len(arrays[order[0]])] + [
        len(arrays[b]) - count_shared(arrays[a], arrays[b]) for a, b in pairwise(order)
    ]
    assert sum(own) == len(nodes)


def ask(rng: random.Random, num_questions: int, num_options: int) -> list[Document]:
    """Questions that begin with one header, of options, some of them the same."""
    words = ["the", "file", "reads", "a line", "and", "returns", "bytes", "where", "open", "fails"]

    def say(num_words: int) -> str:
        return " ".join(rng.choice(words) for _ in range(num_words))

    header = say(60)
    asked = []
    for q in range(num_questions):
        context = f"{header}\n\n{q}: {say(rng.randint(1, 150))}?"
        asked += [
            Document(f"{q}.{o}", context=context, text=" " + say(rng.choice([1, 1, 2, 9])))
            for o in range(num_options)
        ]
    asked.append(Document("alone", context="", text=say(30)))
    asked.append(Document("long", context=say(1500), text=say(5)))
    rng.shuffle(asked)
    return asked


def assert_same(one: DocumentScore, other: DocumentScore) -> None:
    assert one.record == other.record
    for name, values in vars(one.tokens).items():
        assert np.array_equal(values, getattr(other.tokens, name)), name


def test_what_contexts_share_is_computed_once_with_the_bits_of_each_alone(
    demo: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = ask(random.Random(0), 6, 4)
    computed = []
    run = type(demo._model)._run

    def spy(self: Any, ids_T: torch.Tensor, num_tokens: int, *rest: Any) -> torch.Tensor:
        computed.append(num_tokens)
        return run(self, ids_T, num_tokens, *rest)

    monkeypatch.setattr(type(demo._model), "_run", spy)
    together = list(demo.score(asked, recipe="conditional"))
    rows = sum(computed)
    computed.clear()
    for document, score in zip(asked, together, strict=True):
        (alone,) = demo.score([document], recipe="conditional")
        alone.index = score.index
        assert_same(alone, score)
    # Four options a question, and a header for all questions of a batch.
    assert rows < 0.5 * sum(computed)


def test_without_a_context_a_text_has_the_bits_of_a_text_alone(demo: Pipeline) -> None:
    texts = ["import os\n", "x = 1", "def f():\n    return 3\n" * 40]
    asked = [Document(str(i), context="", text=text) for i, text in enumerate(texts)]
    asked.insert(1, Document("asked", context="What is x?\n" * 30, text=" One."))
    given = [s for s in demo.score(asked, recipe="conditional") if s.record.doc_id != "asked"]
    for plain, score in zip(demo.score(texts), given, strict=True):
        assert np.array_equal(plain.tokens.logprob, score.tokens.logprob)


def test_scores_of_shared_contexts_are_those_of_plain_logits(demo: Pipeline) -> None:
    asked = ask(random.Random(1), 2, 3)
    for score in demo.score(asked, recipe="conditional"):
        text = score.text
        assert text is not None
        document = next(d for d in asked if d.doc_id == score.record.doc_id)
        tokenizer = demo._tokenizer
        assert tokenizer is not None
        ids = tokenizer.encode([(document.context or "").rstrip() + text])[0].ids
        ids = np.concatenate([[tokenizer.bos_id], ids])[-(demo.max_positions + 1) :]
        logprobs = torch.log_softmax(demo.get_logits(ids[:-1].tolist()), -1).numpy()
        n = len(score.tokens)
        expected = logprobs[-n:][np.arange(n), ids[-n:]]
        np.testing.assert_allclose(score.tokens.logprob, expected, atol=2e-5)


def test_logits_come_along(demo: Pipeline) -> None:
    asked = ask(random.Random(2), 2, 3)
    rows: dict[str, list[np.ndarray]] = {}

    def keep(index: int, doc_id: str, first: int, values: np.ndarray, sums: np.ndarray) -> None:
        rows.setdefault(doc_id, []).append(values.copy())

    kept = list(demo.score(asked, recipe="conditional", on_logits=keep))
    for plain, score in zip(demo.score(asked, recipe="conditional"), kept, strict=True):
        assert_same(plain, score)
        values = np.concatenate(rows[score.record.doc_id])
        own = values[np.arange(len(values)), score.tokens.token_id]
        np.testing.assert_allclose(own, score.tokens.logprob, atol=1e-6)


@pytest.mark.parametrize(
    "name",
    [
        "llama head 80 tied",
        "llama dynamic",
        "llama longrope",
        "mistral window 9",
        "gemma2",
        "gpt oss",
        "qwen3 moe",
        "deepseek v3",
        "gpt2",
        "falcon 7b",
    ],
)
def test_every_kind_of_decoder_shares(name: str, tmp_path: Path) -> None:
    family, settings = CASES[name]
    folder = save(make_model(family, settings, seed=3), tmp_path)
    model, pipe = from_folder(folder), pipeline(folder, device="cpu")
    draw = np.random.default_rng(4)
    context = draw.integers(0, pipe.vocab_size, 40)
    sequences = [
        np.concatenate([context[:cut], draw.integers(0, pipe.vocab_size, more)])
        for cut, more in [(40, 1), (40, 7), (25, 9), (40, 7), (12, 3), (0, 30)]
    ]
    requests = [Request(ids[:-1], ids[-2:], shares=True) for ids in sequences]
    requests.sort(key=lambda r: r.ids.tolist())

    def score(batch: list[Request]) -> np.ndarray:
        return np.concatenate([a.wait()["logprob"] for a in pipe._runner.launch(batch)])

    together = score(requests)
    assert np.array_equal(together, np.concatenate([score([r]) for r in requests]))
    for i, request in enumerate(requests):
        # With dynamic angles it remembers the longest sequence that it has seen.
        fresh = copy.deepcopy(model)
        logits = torch.log_softmax(reference_logits(fresh, request.ids.tolist()), -1).numpy()
        expected = logits[[-2, -1], request.targets]
        np.testing.assert_allclose(together[2 * i : 2 * i + 2], expected, atol=2e-4)
