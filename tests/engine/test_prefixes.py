"""Sequences that begin alike: computed once, and with the bits of each scored alone."""

from __future__ import annotations

import copy
import random
import tracemalloc
from collections.abc import Iterator, Sequence
from itertools import groupby, pairwise, repeat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from logitmill.engine import Pipeline, pipeline
from logitmill.engine.head import Head
from logitmill.engine.packing import pack_alike, rounds_alike
from logitmill.engine.prefixes import (
    LEAST_SHARED,
    Branch,
    Tree,
    branch,
    count_saved,
    count_shared,
    fold,
    join,
    unfold,
)
from logitmill.engine.recipes import Recipe
from logitmill.engine.records import Document, DocumentScore
from logitmill.engine.runner import Request, Runner
from logitmill.engine.scorer import Scorer
from oracles import reference_logits, save
from test_families import CASES, from_folder, make_model

# Few ids, so that much is shared.
SEQUENCES = st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=60), min_size=1, max_size=12)


def as_arrays(sequences: list[list[int]]) -> list[np.ndarray]:
    return [np.array(ids, np.int32) for ids in sequences]


def grow(arrays: Sequence[np.ndarray]) -> list[Branch]:
    """Each by what it adds to the one before it."""
    return [branch(before, ids) for before, ids in zip([None, *arrays], arrays, strict=False)]


@given(SEQUENCES)
def test_branches_hold_every_sequence(sequences: list[list[int]]) -> None:
    arrays = as_arrays(sequences)
    branches = grow(arrays)
    assert [ids.tolist() for ids in unfold(branches)] == sequences
    assert [join(branches, i).tolist() for i in range(len(branches))] == sequences


@given(SEQUENCES, st.integers(0, 60))
def test_a_tree_holds_every_sequence(sequences: list[list[int]], start: int) -> None:
    arrays = as_arrays(sequences)
    tree = fold(grow(arrays))
    rows = tree.branches
    first = 0
    for i, ids in enumerate(arrays):
        path, shared = rows.rows(i), int(rows.num_shared[i])
        assert (tree.ids[path] == ids).all()
        assert (tree.positions[path] == np.arange(len(ids))).all()
        assert (path[shared:] == np.arange(first, first + len(ids) - shared)).all()
        assert (rows.rows(i, start) == path[start:]).all()
        assert shared == 0 or shared >= LEAST_SHARED
        assert rows.first_rows[i] == first and rows.lengths[i] == len(ids)
        first += len(ids) - shared
    assert len(tree.ids) == len(tree.positions) == rows.num_rows == first


@given(SEQUENCES, st.integers(1, 200))
def test_packs_hold_every_sequence_once_within_the_budget(
    sequences: list[list[int]], budget: int
) -> None:
    arrays = as_arrays(sequences)
    scored = [1 + i % 3 for i in range(len(arrays))]
    packed = pack_alike(grow(arrays), scored, budget)
    assert sorted(i for batch in packed for i, _ in batch) == list(range(len(arrays)))
    for batch in packed:
        whole = unfold([one for _, one in batch])
        assert [ids.tolist() for ids in whole] == [sequences[i] for i, _ in batch]
        assert batch[0][1].num_shared == 0
        rows = sum(max(len(one.ids), scored[i]) for i, one in batch)
        assert rows <= budget or len(batch) == 1
    # Sorted, every beginning is computed once: as many tokens as a trie has nodes.
    ((*order,),) = pack_alike(grow(arrays), scored, 10**6)
    assert [i for i, _ in order] == sorted(range(len(arrays)), key=lambda i: (sequences[i], i))
    nodes = {tuple(ids[:n]) for ids in sequences for n in range(1, len(ids) + 1)}
    own = [len(arrays[order[0][0]])] + [
        len(arrays[b]) - count_shared(arrays[a], arrays[b]) for (a, _), (b, _) in pairwise(order)
    ]
    assert sum(own) == len(nodes)
    for (a, _), (b, one) in pairwise(order):
        assert one.num_shared == count_saved(arrays[a], arrays[b])


@given(SEQUENCES, st.integers(1, 200), st.none() | st.integers(1, 200))
def test_rounds_count_and_hold_once_what_neighbours_share(
    sequences: list[list[int]], budget: int, first: int | None
) -> None:
    """Every fourth is one that cannot share."""
    items = [(i, 3, None if i % 4 == 3 else ids) for i, ids in enumerate(as_arrays(sequences))]
    groups = list(rounds_alike(iter(items), budget, first=first))
    budgets = [budget if first is None else first, *repeat(budget, len(groups))]
    assert [i for group in groups for i, _ in group] == list(range(len(items)))
    for group, room in zip(groups, budgets, strict=False):
        total = sum(3 if one is None else max(3, len(one.ids)) for _, one in group)
        assert total <= room or len(group) == 1
        for (_, before), (_, one) in pairwise([(-1, None), *group]):
            assert one is None or before is not None or one.num_shared == 0
        for is_whole, run in groupby(group, lambda item: item[1] is None):
            if not is_whole:
                held = list(run)
                whole = unfold([one for _, one in held if one is not None])
                assert [ids.tolist() for ids in whole] == [sequences[i] for i, _ in held]
    # No more could have been in any but the last.
    for room, (group, after) in zip(budgets, pairwise(groups), strict=False):
        i, last = after[0][0], group[-1]
        ids = items[i][2]
        more = 3
        if ids is not None:
            before = items[last[0]][2]
            more = max(3, len(ids) - (0 if before is None else count_saved(before, ids)))
        total = sum(3 if one is None else max(3, len(one.ids)) for _, one in group)
        assert total + more > room


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
    sequences.sort(key=lambda ids: ids.tolist())

    def score(batch: Sequence[np.ndarray]) -> np.ndarray:
        requests = [
            Request(one.ids, ids[-2:], shares=True, num_shared=one.num_shared)
            for ids, one in zip(batch, grow([ids[:-1] for ids in batch]), strict=True)
        ]
        return np.concatenate([a.wait()["logprob"] for a in pipe._runner.launch(requests)])

    together = score(sequences)
    assert np.array_equal(together, np.concatenate([score([ids]) for ids in sequences]))
    for i, ids in enumerate(sequences):
        # With dynamic angles it remembers the longest sequence that it has seen.
        fresh = copy.deepcopy(model)
        logits = torch.log_softmax(reference_logits(fresh, ids[:-1].tolist()), -1).numpy()
        expected = logits[[-2, -1], ids[-2:]]
        np.testing.assert_allclose(together[2 * i : 2 * i + 2], expected, atol=2e-4)


@pytest.mark.parametrize("name", ["mistral window 9", "gpt oss", "deepseek v3"])
def test_numbers_that_overflow_stay_with_their_text(name: str, tmp_path: Path) -> None:
    family, settings = CASES[name]
    pipe = pipeline(save(make_model(family, settings, seed=3), tmp_path), device="cpu")
    # No file may hold it. What begins with token 0 comes first, and so computes what is shared.
    embedding_VD = pipe._model._embedding_VD.clone()
    embedding_VD[0] = torch.inf
    pipe._model._embedding_VD = embedding_VD
    draw = np.random.default_rng(5)
    context = draw.integers(1, pipe.vocab_size, 40)
    asked = []
    for i, own in enumerate(([1, 0, 2, 3], [1, 4, 2, 3], [1, 0, 2, 3, 4], [5, 6, 0])):
        ids = np.concatenate([context, own])
        asked.append(Document(str(i), input_ids=ids, num_context=len(context)))
    asked.append(Document("4", input_ids=context, num_context=30))
    statuses = []
    for document, score in zip(asked, pipe.score(asked, recipe="conditional"), strict=True):
        (alone,) = pipe.score([document], recipe="conditional")
        statuses.append(score.record.status)
        assert score.record == alone.record
        if score.record.status == "ok":
            assert_same(alone, score)
    assert statuses == ["nonfinite", "ok", "nonfinite", "ok", "ok"]


# ---- what planning takes, and what batches compute ----------------------------------------------


def ask_below(header: int, num_texts: int, own: int) -> Iterator[Document]:
    """Texts of ids that share a header, read one by one, each with ids of its own."""
    draw = np.random.default_rng(6)
    shared = draw.integers(0, 64, header)
    for i in range(num_texts):
        ids = np.concatenate([shared, draw.integers(0, 64, own)])
        yield Document(str(i), input_ids=ids, num_context=header)


def plan(pipe: Pipeline, budget: int, context: int) -> Scorer:
    """What plans batches; nothing is run, so the context may be more than the model's."""
    recipe = Recipe(name="conditional", prefix="none", context=context)
    return Scorer(pipe._model, pipe._runner, None, recipe, max_batch_tokens=budget)


def test_a_header_is_held_once_however_many_texts_have_it(demo: Pipeline) -> None:
    scorer, num_texts = plan(demo, 32768, 9000), 300
    tracemalloc.start()
    try:
        batches = list(scorer._packed_batches(ask_below(8000, num_texts, 10)))
        trees = [fold(batch.requests) for batch in batches]
        held, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert sum(len(batch.requests) for batch in batches) == num_texts
    assert sum(len(tree.ids) for tree in trees) < 8000 + 10 * num_texts
    # A header's ids take 32 kB in the fewest bytes that hold them, and what is known of a text 4.
    assert held < num_texts * 6000 + 1e6
    # What is read at a time comes whole.
    assert most < held + 12e6


@pytest.mark.parametrize("in_order", [False, True])
def test_batches_compute_no_more_than_their_budget(demo: Pipeline, in_order: bool) -> None:
    budget = 420
    scorer = plan(demo, budget, 1000)
    asked = [*ask_below(300, 40, 9), *ask_below(390, 40, 30), *ask_below(500, 3, 5)]
    asked[30] = Document("bad", input_ids=[])
    found = scorer._batches_in_order(asked) if in_order else scorer._packed_batches(asked)
    computed, num_requests = [], 0
    for batch in found:
        if not batch.requests:
            continue
        num_requests += len(batch.requests)
        tree = fold(batch.requests)
        computed.append(len(tree.ids))
        assert len(tree.ids) <= budget or len(batch.requests) == 1
        for piece, ids in zip(batch.pieces, unfold(batch.requests), strict=True):
            document = asked[piece.work.index]
            assert np.array_equal(ids, np.asarray(document.input_ids)[:-1])
    assert num_requests == len(asked) - 1
    # Twelve options of a header fit, and two of the other: few batches are not full.
    assert np.median(computed) > 0.9 * budget


class Narrow:
    """The bundled model with room for a tree of few tokens."""

    def __init__(self, model: Any, tokens: int) -> None:
        self._model, self._tokens = model, tokens
        self.blocks = model.blocks
        self.computed: list[int] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def hidden_of_tree(self, ids_T: torch.Tensor, tree: Tree) -> torch.Tensor:
        if len(tree.ids) > self._tokens:
            raise torch.OutOfMemoryError("too many tokens")
        self.computed.append(len(tree.ids))
        found: torch.Tensor = self._model.hidden_of_tree(ids_T, tree)
        return found


def test_a_batch_is_halved_by_what_it_computes(demo: Pipeline) -> None:
    texts = [np.asarray(d.input_ids) for d in ask_below(300, 31, 21)]
    requests = [
        Request(one.ids, ids[-20:], shares=True, num_shared=one.num_shared)
        for ids, one in zip(texts, grow([ids[:-1] for ids in texts]), strict=True)
    ]

    def score(runner: Runner) -> np.ndarray:
        return np.concatenate([a.wait()["logprob"] for a in runner.launch(requests)])

    def narrow(model: Narrow) -> Runner:
        return Runner(model, Head(model, 256 << 20))

    expected = score(demo._runner)
    total = len(fold(requests).ids)
    # Each half computes the context and half of the rest.
    model = Narrow(demo._model, total - 250)
    assert np.array_equal(score(narrow(model)), expected)
    assert len(model.computed) == 2
    assert sum(model.computed) == total + 300
    # There is no room for two of them.
    model = Narrow(demo._model, 325)
    assert np.array_equal(score(narrow(model)), expected)
    assert model.computed == [320] * len(requests)
    # Each goes on from the one before it, so that a half may compute as much as the whole.
    chain = [np.arange(n) for n in (100, 120, 140)]
    requests = [
        Request(one.ids, ids[-1:], shares=True, num_shared=one.num_shared)
        for ids, one in zip(chain, grow(chain), strict=True)
    ]
    expected = score(demo._runner)
    model = Narrow(demo._model, 139)
    with pytest.raises(RuntimeError, match="a window of 140 tokens does not fit"):
        score(narrow(model))
    model = Narrow(demo._model, 140)
    assert np.array_equal(score(narrow(model)), expected)
