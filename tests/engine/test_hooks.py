"""Hooks, lenses and states of layers against transformers on random models."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from logitmill.engine import Document, Pipeline, pipeline
from logitmill.engine.hooks import PackedTokens
from logitmill.engine.lens import split_lens
from logitmill.engine.records import TOKEN_DTYPES
from oracles import row_statistics_float64, save
from test_families import CASES, from_folder, make_model, sequences

# Residual norms, scales, parallel layers, shared norms, experts, latents, tables of positions.
NAMES = [
    "gemma2 caps that bend",
    "granite",
    "stablelm parallel",
    "cohere2",
    "gpt2",
    "gpt oss",
    "deepseek v3",
]


@pytest.fixture(scope="module", params=NAMES)
def pair(request: Any, tmp_path_factory: Any) -> tuple[Pipeline, Any]:
    """The engine and transformers with the same random weights."""
    family, settings = CASES[request.param]
    folder = save(make_model(family, settings, seed=5), tmp_path_factory.mktemp("model"))
    return pipeline(folder, device="cpu", dtype="float32"), from_folder(folder)


def find_layers(model: Any) -> Sequence[torch.nn.Module]:
    lists = [m for m in model.modules() if isinstance(m, torch.nn.ModuleList)]
    return next(m for m in lists if len(m) == model.config.num_hidden_layers)


def read_reference(model: Any, ids: Sequence[int]) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Each layer's output [n, D] as transformers has it, and the logits."""
    # A copy: some remember past lengths.
    model = copy.deepcopy(model)
    seen: list[torch.Tensor] = []

    def see(module: Any, args: Any, output: Any) -> None:
        seen.append((output[0] if isinstance(output, tuple) else output)[0])

    for layer in find_layers(model):
        layer.register_forward_hook(see)
    with torch.inference_mode():
        output = model(torch.tensor([list(ids)]), use_cache=False, output_hidden_states=True)
    # The last of transformers' own is normed.
    for ours, theirs in zip(seen[:-1], output.hidden_states[1:-1], strict=True):
        assert torch.equal(ours, theirs[0])
    return seen, output.logits[0]


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    scale = max(1.0, expected.std().item())
    assert found.shape == expected.shape
    assert (found - expected).abs().max() < 1e-4 * scale


def test_a_hook_sees_every_layer_of_every_sequence(pair: tuple[Pipeline, Any]) -> None:
    pipe, model = pair
    batch = sequences(pipe.vocab_size, seed=2)
    plain = pipe.get_logits(batch)
    found: dict[tuple[int, tuple[int, ...]], torch.Tensor] = {}

    def see(layer: int, states_TD: torch.Tensor, tokens: PackedTokens) -> None:
        for i in np.unique(tokens.sequences_T):
            own = np.flatnonzero(tokens.sequences_T == i)
            assert (tokens.positions_T[own] == np.arange(len(own))).all()
            found[layer, tuple(tokens.ids_T[own].tolist())] = states_TD[own]
        states_TD.zero_()

    with pipe.hooked(see):
        hooked = pipe.get_logits(batch)
    assert all(map(torch.equal, plain, hooked)), "to look changes nothing"
    for ids in batch:
        expected, _ = read_reference(model, ids)
        for layer, states in enumerate(expected):
            assert_close(found[layer, tuple(ids)], states)
    found.clear()
    pipe.get_logits(batch[0])
    assert not found, "the hook has gone"


@pytest.mark.parametrize("how", ["zeros", "another run's"])
def test_what_a_hook_returns_goes_on(pair: tuple[Pipeline, Any], how: str) -> None:
    pipe, model = pair
    ids, others = (sequences(pipe.vocab_size, seed)[3] for seed in (3, 4))
    layer = pipe._model.spec.num_layers // 2
    other, _ = read_reference(model, others)
    patch = torch.zeros_like(other[layer]) if how == "zeros" else other[layer]

    def swap(at: int, states_TD: torch.Tensor, tokens: PackedTokens) -> torch.Tensor | None:
        """The second half of the first sequence."""
        if at != layer:
            return None
        states_TD[12 : len(ids)] = patch[12:]
        return states_TD

    def swap_theirs(module: Any, args: Any, output: Any) -> Any:
        states = (output[0] if isinstance(output, tuple) else output).clone()
        states[0, 12:] = patch[12:]
        return (states, *output[1:]) if isinstance(output, tuple) else states

    with pipe.hooked(swap):
        found = pipe.get_logits([ids, others])
    handle = find_layers(model)[layer].register_forward_hook(swap_theirs)
    try:
        _, expected = read_reference(model, ids)
    finally:
        handle.remove()
    plain = pipe.get_logits([ids, others])
    assert_close(found[0], expected)
    assert not torch.allclose(found[0], plain[0], atol=1e-2)
    assert torch.equal(found[1], plain[1]), "another sequence keeps its bits"


def test_the_lens_is_the_norm_and_head_of_each_layer(pair: tuple[Pipeline, Any]) -> None:
    pipe, model = pair
    documents = [ids for ids in sequences(pipe.vocab_size, seed=6) if 1 < len(ids) <= 24]
    scores = list(pipe.score(documents, recipe="rolling", prefix="none"))
    lenses = list(pipe.lens(documents, recipe=no_prefix()))
    states = list(pipe.states(documents, recipe=no_prefix(), layers=[0, -1]))
    norm = find_norm(model)
    for ids, score, lens, own in zip(documents, scores, lenses, states, strict=True):
        seen, _ = read_reference(model, ids)
        assert list(lens.layers) == list(range(len(seen)))
        last = lens.layers[len(seen) - 1]
        for name in ("token_id", "logprob", "entropy", "varentropy", "rank", "top1_id"):
            assert (getattr(last, name) == getattr(score.tokens, name)).all(), name
        assert list(own.layers) == [0, len(seen) - 1]
        for layer, rows in own.layers.items():
            assert_close(rows, seen[layer][:-1])
        for layer, tokens in lens.layers.items():
            logits = read_logits(model, norm, seen[layer])[:-1]
            expected = row_statistics_float64(logits.numpy(), np.array(ids[1:]))
            for name in ("logprob", "entropy", "top1_logprob", "logsumexp"):
                assert getattr(tokens, name) == pytest.approx(expected[name], abs=2e-4, rel=1e-4)
            # Logits that are nearly equal may change places.
            assert (tokens.rank == expected["rank"]).mean() > 0.9


@pytest.mark.parametrize("kept", ["records", "logits", "states"])
def test_scores_come_with_the_lens_of_layers(pair: tuple[Pipeline, Any], kept: str) -> None:
    pipe, _ = pair
    documents = [ids for ids in sequences(pipe.vocab_size, seed=7) if len(ids) <= 24]
    more: dict[str, Any] = {
        "records": {"top_k": 3, "num_draws": 2},
        "logits": {"on_logits": lambda *rows: None},
        "states": {"on_states": lambda *rows: None, "top_k": 3},
    }[kept]
    plain = list(pipe.score(documents, prefix="none", **more))
    scores = list(pipe.score(documents, prefix="none", layers=[-1, 0], **more))
    lenses = list(pipe.lens(documents, recipe=no_prefix(), layers=[0, -1]))
    assert any(lens.layers for lens in lenses)
    for score, without, lens in zip(scores, plain, lenses, strict=True):
        assert score.record == without.record
        assert split_lens(without.tokens) == []
        found = split_lens(score.tokens)
        for tokens, expected in zip(found, lens.layers.values(), strict=bool(lens.layers)):
            for name in TOKEN_DTYPES:
                np.testing.assert_array_equal(getattr(tokens, name), getattr(expected, name))
            assert tokens.top_ids is None and tokens.lens is None


def no_prefix() -> Any:
    from logitmill.engine import find_recipe

    return find_recipe("rolling", prefix="none")


def find_norm(model: Any) -> torch.nn.Module:
    body = model.base_model
    names = ("norm", "ln_f", "final_layer_norm", "final_layernorm")
    return next(getattr(body, name) for name in names if hasattr(body, name))


def read_logits(model: Any, norm: torch.nn.Module, states: torch.Tensor) -> torch.Tensor:
    """transformers' own last norm and head, and what its wrapper does to logits, of states."""
    handle = norm.register_forward_pre_hook(lambda module, args: (states[None],))
    try:
        with torch.inference_mode():
            ids = torch.zeros(1, len(states), dtype=torch.long)
            return model(ids, use_cache=False).logits[0]
    finally:
        handle.remove()


def test_windows_and_bad_documents_have_their_layers(demo: Pipeline) -> None:
    documents = [
        Document("long", text="def f(x):\n    return x + 1\n" * 20),
        Document("empty", text=""),
        Document("short", text="import os"),
    ]
    lenses = list(demo.lens(documents, layers=[4, 1, -1], context=32))
    scores = list(demo.score(documents, context=32))
    assert [lens.record.status for lens in lenses] == ["ok", "empty", "ok"]
    assert [list(lens.layers) for lens in lenses] == [[1, 4], [], [1, 4]]
    for lens, score in zip(lenses, scores, strict=True):
        assert lens.record.num_windows == score.record.num_windows
        if lens.layers:
            assert (lens.layers[4].logprob == score.tokens.logprob).all()
            assert (lens.layers[4].byte_end == score.tokens.byte_end).all()
            assert lens.layers[1].logprob.sum() < lens.layers[4].logprob.sum()


def test_shared_contexts_are_right_under_a_hook(demo: Pipeline) -> None:
    pairs = [("import os\nimport sys\n" * 9, text) for text in ("os.path", "sys.argv", "print")]

    def halve(layer: int, states_TD: torch.Tensor, tokens: PackedTokens) -> torch.Tensor | None:
        """The first tokens of each sequence, which sequences of a tree would share."""
        if layer != 2:
            return None
        states_TD[tokens.positions_T < 5] *= 0.5
        return states_TD

    plain = [s.tokens.logprob for s in demo.score(pairs, recipe="conditional")]
    with demo.hooked(halve):
        found = [s.tokens.logprob for s in demo.score(pairs, recipe="conditional")]
        alone = [s.tokens.logprob for one in pairs for s in demo.score([one], recipe="conditional")]
    for hooked, own, before in zip(found, alone, plain, strict=True):
        assert (hooked == own).all()
        assert not np.allclose(hooked, before, atol=1e-3)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (lambda i, states, tokens: states[:-1], "shape"),
        (lambda i, states, tokens: states.double(), "dtype torch.float64"),
        (lambda i, states, tokens: 0, "a int after layer 0"),
    ],
)
def test_wrong_states_are_named(demo: Pipeline, wrong: Any, said: str) -> None:
    with pytest.raises(ValueError, match=f"hook: .*{said}"), demo.hooked(wrong):
        demo.get_logits([5, 6, 7])
    demo.get_logits([5, 6, 7])


@pytest.mark.parametrize("layers", [[5], [-6], [1.0], [True], [], ["0"], "01", 3, np.array([5])])
def test_wrong_layers_are_named(demo: Pipeline, layers: Any) -> None:
    with pytest.raises(ValueError, match="layers: "):
        demo.lens(["x"], layers=layers)
    if not isinstance(layers, list) or layers:
        with pytest.raises(ValueError, match="layers: "):
            demo.score(["x"], layers=layers)


def test_layers_may_be_numpys_or_all(demo: Pipeline) -> None:
    (few,) = demo.score(["import os"], layers=np.array([4, 0]))
    (every,) = demo.score(["import os"], layers=None)
    assert few.tokens.lens is not None and every.tokens.lens is not None
    np.testing.assert_array_equal(every.tokens.lens[:, [0, 4]], few.tokens.lens)


def test_models_of_transformers_have_no_layers(tmp_path: Path) -> None:
    from transformers import BloomConfig, BloomForCausalLM

    model = BloomForCausalLM(BloomConfig(vocab_size=50, hidden_size=16, n_layer=1, n_head=2))
    pipe = pipeline(save(model, tmp_path), device="cpu")
    with pytest.raises(ValueError, match="hook: transformers runs"):
        pipe.hooked(lambda *_: None).__enter__()
    with pytest.raises(ValueError, match="layers: transformers runs"):
        pipe.states([[1, 2]])
