"""What is generated, against transformers and against logits of whole sequences."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from logitmill.engine import Pipeline, pipeline
from logitmill.engine.kept import KeptRows, Places
from logitmill.engine.samplers import drawing, greedy, min_p, top_k, top_p
from oracles import markov_model, reference_logits, save, table_model, zipf
from scipy.stats import chisquare
from test_families import CASES, from_folder, make_model, sequences

# Windows, caps, sinks, rotaries that go by length, tables, latents, experts.
NAMES = [
    "llama dynamic",
    "phi3 longrope, window",
    "gemma2 caps that bend",
    "gemma3 two rotaries",
    "gpt2",
    "smollm3",
    "gpt oss",
    "deepseek v3",
]


def go_on(model: Any, ids: Sequence[int], num_new: int) -> list[int]:
    """transformers' greedy tokens, without a cache: its keys go stale where rates change."""
    with torch.inference_mode():
        found = copy.deepcopy(model).generate(
            torch.tensor([list(ids)]),
            max_new_tokens=num_new,
            do_sample=False,
            use_cache=False,
            attention_mask=torch.ones(1, len(ids), dtype=torch.long),
        )
    return found[0, len(ids) :].tolist()


def assert_greedy(model: Any, ids: Sequence[int], found: Sequence[int]) -> None:
    """By induction: each token is transformers' likeliest after those before it."""
    parameters = getattr(model.config, "rope_parameters", None) or {}
    if parameters.get("rope_type") in ("dynamic", "longrope"):
        assert list(found) == go_on(model, ids, len(found))
        return
    logits = reference_logits(model, [*ids, *found])[len(ids) - 1 : -1]
    assert logits.argmax(-1).tolist() == list(found)


@pytest.mark.parametrize("name", NAMES)
def test_greedy_is_that_of_transformers(name: str, tmp_path: Path) -> None:
    family, settings = CASES[name]
    folder = save(make_model(family, settings, seed=7), tmp_path)
    pipe, model = pipeline(folder, device="cpu", dtype="float32"), from_folder(folder)
    # Some cross the 24 positions at which rotaries change, and some begin while others go on.
    prompts = [ids[:80] for ids in sequences(pipe.vocab_size, seed=8)]
    found = list(pipe.sample(prompts, max_tokens=6, stop=[], batch_size=3, context=96))
    assert [one.index for one in found] == list(range(len(prompts)))
    for ids, one in zip(prompts, found, strict=True):
        assert one.prompt_ids.tolist() == ids
        assert one.reason == "length"
        assert_greedy(model, ids, one.ids.tolist())


def test_the_bundled_model_goes_on_as_with_transformers(demo: Pipeline, demo_folder: Path) -> None:
    from transformers import AutoTokenizer

    model, tokenizer = from_folder(demo_folder), AutoTokenizer.from_pretrained(demo_folder)
    prompts = ["def f(self, x):\n    return", "import os\nimport", "class A:", "for i in range("]
    seen: dict[int, list[int]] = {i: [] for i in range(len(prompts))}
    found = list(
        demo.sample(
            prompts, max_tokens=16, batch_size=2, on_token=lambda i, token: seen[i].append(token)
        )
    )
    for i, (prompt, one) in enumerate(zip(prompts, found, strict=True)):
        ids = tokenizer(prompt)["input_ids"]
        assert one.prompt_ids.tolist() == ids
        assert one.ids.tolist() == go_on(model, ids, 16)
        assert seen[i] == one.ids.tolist()
        assert one.text == tokenizer.decode(one.ids, skip_special_tokens=True)


def test_what_is_kept_rounded_is_near(demo: Pipeline) -> None:
    """Logits step by step, of the tokens that unrounded keys and values give."""
    prompt = list(range(40, 70))
    wanted = next(iter(demo.sample([prompt], max_tokens=12, stop=[]))).ids

    def record(kept_as: str | None) -> torch.Tensor:
        rows: list[torch.Tensor] = []

        def follow(logits: torch.Tensor, growing: Any) -> list[int]:
            rows.append(logits[0].log_softmax(-1))
            return [int(wanted[len(growing[0].generated)])]

        list(demo.sample([prompt], follow, max_tokens=12, stop=[], kept_as=kept_as))
        return torch.stack(rows)

    exact = record(None)
    whole = demo.get_logits([*prompt, *wanted.tolist()])[len(prompt) - 1 : -1].log_softmax(-1)
    assert (exact - whole).abs().max() < 1e-4
    off = {
        kept_as: (exact.exp() * (exact - record(kept_as))).sum(-1).mean().item()
        for kept_as in ("int8", "int4")
    }
    assert 0 < 20 * off["int8"] < off["int4"] < 0.2, off


@pytest.mark.parametrize("kept_as", [None, "int8", "int4"])
def test_rows_come_back_from_where_they_were_put(kept_as: str | None) -> None:
    rows = KeptRows(3, kept_as)
    given = torch.randn(150, 2, 7)
    slots, at = torch.arange(150) % 3, torch.arange(150) // 3
    for part in (slice(0, 60), slice(60, 150)):
        rows.write(Places(slots[part], at[part], int(at[part][-1]) + 1), given[part])
    found = rows.read(torch.tensor([2, 0]), 50)
    for i, slot in enumerate((2, 0)):
        expected = given[slots == slot]
        spread = expected.amax(-1) - expected.amin(-1)
        most = 0.0 if kept_as is None else 0.51 / (2 ** int(kept_as[3:]) - 1)
        assert ((found[i] - expected).abs().amax(-1) <= most * spread + 1e-6).all()


def test_draws_follow_the_distribution_and_the_seed(tmp_path: Path) -> None:
    p = zipf(12)
    pipe = pipeline(table_model(tmp_path, np.tile(np.log(p), (12, 1))), device="cpu")

    def ask(seed: int, **settings: Any) -> list[list[int]]:
        sampler = drawing(top_k(5), temperature=0.5, seed=seed)
        found = pipe.sample([[i % 12] for i in range(40)], sampler, max_tokens=25, **settings)
        return [one.ids.tolist() for one in found]

    first = ask(0)
    assert first == ask(0, batch_size=7)
    assert first != ask(1)
    assert first[0] != first[12], "equal prompts are drawn for apart"
    expected = p[:5] ** 2 / (p[:5] ** 2).sum()
    counts = np.bincount(np.concatenate(first), minlength=12)
    assert not counts[5:].any()
    assert chisquare(counts[:5], expected * counts.sum()).pvalue > 1e-3


def test_filters_are_those_of_transformers() -> None:
    from transformers import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    logits = 2 * torch.randn(20, 60, generator=torch.Generator().manual_seed(0))
    for ours, theirs in (
        (top_k(7), TopKLogitsWarper(7)),
        (top_p(0.8), TopPLogitsWarper(0.8)),
        (min_p(0.1), MinPLogitsWarper(0.1)),
    ):
        kept, expected = ours(logits), theirs(None, logits)
        assert torch.equal(kept, expected)
        assert expected.isinf().any()
    assert greedy(torch.tensor([[1.0, 3.0, 3.0]]), []).tolist() == [1]


def test_ends_are_named(demo: Pipeline) -> None:
    prompt = "import os\nimport"
    whole = next(iter(demo.sample([prompt], max_tokens=12, stop=[])))
    assert whole.reason == "length"
    third = int(whole.ids[2])
    cut = next(iter(demo.sample([prompt], max_tokens=12, stop=[third])))
    assert (cut.reason, cut.ids.tolist()) == ("stop", whole.ids[: len(cut.ids)].tolist())
    assert cut.ids[-1] == third
    text = whole.text[2:5]
    said = next(iter(demo.sample([prompt], max_tokens=12, stop=[text])))
    assert said.reason == "stop"
    assert text in said.text
    short = next(iter(demo.sample([[5, 6, 7]], context=6, stop=[])))
    assert (short.reason, len(short.ids)) == ("context", 3)


def test_a_window_is_kept_to(tmp_path: Path) -> None:
    """What the last 3 tokens decide goes on alike after unlike beginnings."""
    pipe = pipeline(markov_model(tmp_path, 3), device="cpu", dtype="float32")
    beginnings = [[1] * 30, [2, 3] * 5, []]
    found = list(pipe.sample([[*b, 4, 5, 6] for b in beginnings], max_tokens=12, stop=[]))
    assert len({tuple(one.ids.tolist()) for one in found}) == 1


@pytest.mark.parametrize(
    ("prompts", "settings", "said"),
    [
        ([[1] * 1024], {}, "prompts: prompt 0 has 1024 tokens.*1024 to generate"),
        ([[1], [2] * 9], {"context": 9}, "prompts: prompt 1 has 9 tokens"),
        ([[]], {}, "empty"),
        ([[4096]], {}, "not in the model's vocabulary"),
        ([[1]], {"max_tokens": 0}, "max_tokens: 0"),
        ([[1]], {"batch_size": 0}, "batch_size: 0"),
        ([[1]], {"kept_as": "fp4"}, "kept_as: 'fp4' is not one of int8, int4"),
        ([[1]], {"stop": [""]}, "stop: an empty text"),
        ([[1]], {"sampler": lambda logits, sequences: [-1]}, "sampler: it gave"),
        ([[1]], {"sampler": lambda logits, sequences: logits}, "sampler: it gave"),
    ],
)
def test_mistakes_are_named(
    demo: Pipeline, prompts: Any, settings: dict[str, Any], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        list(demo.sample(prompts, **settings))


@pytest.mark.parametrize("make", [lambda: drawing(temperature=0), lambda: top_k(0)])
def test_samplers_say_what_is_wrong(make: Any) -> None:
    with pytest.raises(ValueError, match="is not"):
        make()
    for make_filter in (top_p, min_p):
        with pytest.raises(ValueError, match=r"p: 1\.5 is not"):
            make_filter(1.5)


def test_a_list_is_checked_before_anything_is_generated(demo: Pipeline) -> None:
    seen: list[int] = []
    with pytest.raises(ValueError, match="prompt 2 has 1024 tokens"):
        list(
            demo.sample([[5], [6], [7] * 1024], batch_size=1, on_token=lambda i, _: seen.append(i))
        )
    assert not seen
    endless = ([i] for i in range(5, 4000))
    first = next(demo.sample(endless, max_tokens=1, stop=[], batch_size=1))
    assert (first.index, next(endless)) == (0, [7])


def test_a_hook_is_there_while_tokens_are_generated(demo: Pipeline) -> None:
    def swap(layer: int, states: torch.Tensor, tokens: Any) -> torch.Tensor | None:
        return states * 0.3 if layer == 1 else None

    prompt = list(range(40, 60))
    with demo.hooked(swap):
        found = next(demo.sample([prompt], max_tokens=6, stop=[])).ids.tolist()
        logits = demo.get_logits([*prompt, *found])[len(prompt) - 1 : -1]
    assert logits.argmax(-1).tolist() == found
    assert found != next(demo.sample([prompt], max_tokens=6, stop=[])).ids.tolist()


@pytest.mark.parametrize("kept_as", [None, "int8", "int4"])
def test_a_slot_keeps_nothing_of_the_sequence_before(demo: Pipeline, kept_as: str | None) -> None:
    """A shorter one follows where another was no number."""
    spoilt, prompt = [7] * 90, list(range(40, 60))

    def spoil(layer: int, states: torch.Tensor, tokens: Any) -> torch.Tensor | None:
        return states * float("nan") if layer == 0 and tokens.ids_T[0] == 7 else None

    settings: dict[str, Any] = {"max_tokens": 6, "stop": [], "batch_size": 1, "kept_as": kept_as}
    alone = next(demo.sample([prompt], **settings)).ids.tolist()
    with demo.hooked(spoil):
        _, after = demo.sample([spoilt, prompt], **settings)
    assert after.ids.tolist() == alone
