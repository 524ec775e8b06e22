"""Recipes: the published golden windows, and what holds for every length and setting."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from logitmill.engine.recipes import PRESETS, Recipe, Window, find_recipe

P = "P"


def show(recipe: Recipe, num_tokens: int) -> list[tuple[list[object], list[int]]]:
    """(inputs, targets) of every window as token indices, a prefix token in front."""
    sequence: list[object] = [P, *range(num_tokens)]
    return [
        (sequence[w.start : w.stop], sequence[w.first_target : w.stop + 1])  # type: ignore[misc]
        for w in recipe.windows(len(sequence), has_prefix=True)
    ]


def rolling(context: int, overlap: int = 1) -> Recipe:
    return find_recipe("rolling", context=context, overlap=overlap).resolve(context)


def targets(windows: list[Window]) -> list[int]:
    return [t for w in windows for t in range(w.first_target, w.stop + 1)]


def span(first: int, last: int) -> list[object]:
    return list(range(first, last + 1))


# ---- rolling ---------------------------------------------------------------------------------


def test_rolling_golden_windows_of_lm_evaluation_harness() -> None:
    assert show(rolling(10), 34) == [
        ([P, *span(0, 8)], span(0, 9)),
        (span(9, 18), span(10, 19)),
        (span(19, 28), span(20, 29)),
        (span(23, 32), span(30, 33)),
    ]


def test_rolling_golden_windows_with_five_tokens_of_context() -> None:
    assert show(rolling(10, 5), 34) == [
        ([P, *span(0, 8)], span(0, 9)),
        (span(5, 14), span(10, 15)),
        (span(11, 20), span(16, 21)),
        (span(17, 26), span(22, 27)),
        (span(23, 32), span(28, 33)),
    ]


@st.composite
def rolling_cases(draw: st.DrawFn) -> tuple[int, int, int]:
    context = draw(st.integers(1, 40))
    return draw(st.integers(1, 300)), context, draw(st.integers(1, context))


@given(rolling_cases())
def test_rolling_scores_every_token_once_in_order(case: tuple[int, int, int]) -> None:
    n, context, overlap = case
    windows = rolling(context, overlap).windows(n + 1, has_prefix=True)
    assert targets(windows) == list(range(1, n + 1))
    assert targets(rolling(context, overlap).windows(n, has_prefix=False)) == list(range(1, n))


@given(rolling_cases())
def test_rolling_window_count_is_the_published_formula(case: tuple[int, int, int]) -> None:
    n, context, overlap = case
    expected = 1 if n <= context else 1 + math.ceil((n - context) / (context - overlap + 1))
    assert len(rolling(context, overlap).windows(n + 1, has_prefix=True)) == expected


@given(rolling_cases())
def test_rolling_windows_after_the_first_are_full_and_keep_their_context(
    case: tuple[int, int, int],
) -> None:
    n, context, overlap = case
    windows = rolling(context, overlap).windows(n + 1, has_prefix=True)
    assert windows[0].start == 0, "the prefix stands in the first window"
    for window in windows[1:]:
        assert window.stop - window.start == context
        assert window.first_target - window.start >= overlap


def test_a_prefix_id_stands_in_the_first_window_alone() -> None:
    """lm-eval#2382: known and kept, so that numbers compare."""
    held = [P in inputs for inputs, _ in show(rolling(10), 34)]
    assert held == [True, False, False, False]


def test_a_single_token_without_prefix_has_nothing_to_score() -> None:
    assert rolling(10).windows(1, has_prefix=False) == []


# ---- one stream ------------------------------------------------------------------------------


@given(st.integers(1, 500), st.integers(2, 60))
def test_disjoint_drops_the_tail_and_the_first_of_each_window(length: int, context: int) -> None:
    recipe = find_recipe(f"disjoint-{context}").resolve(context)
    windows = recipe.windows(length, has_prefix=False)
    assert len(windows) == length // context
    expected = [t for t in range(length // context * context) if t % context]
    assert targets(windows) == expected


def test_disjoint_2048_scores_2047_of_2048() -> None:
    windows = PRESETS["disjoint"].resolve(4096).windows(83 * 2048 + 2047, has_prefix=True)
    assert len(windows) == 83
    assert {w.num_targets for w in windows} == {2047}


@given(st.integers(2, 400), st.integers(2, 60), st.integers(1, 60))
def test_strided_scores_each_token_after_the_first_once(
    length: int, context: int, stride: int
) -> None:
    assume(stride < context)
    recipe = find_recipe("strided", context=context, stride=stride).resolve(context)
    windows = recipe.windows(length, has_prefix=False)
    assert targets(windows) == list(range(1, length))
    assert all(w.stop + 1 - w.start <= context for w in windows)
    assert all(w.start % stride == 0 for w in windows)


@given(st.integers(2, 400), st.integers(2, 60))
def test_strided_by_the_whole_window_loses_the_first_of_each(length: int, context: int) -> None:
    recipe = find_recipe("strided", context=context, stride=context).resolve(context)
    windows = recipe.windows(length, has_prefix=False)
    assert targets(windows) == [t for t in range(length) if t % context]


def test_strided_windows_are_those_of_the_guide() -> None:
    recipe = find_recipe("strided", context=6, stride=3).resolve(6)
    shown = [
        (list(range(w.start, w.stop + 1)), list(range(w.first_target, w.stop + 1)))
        for w in recipe.windows(13, has_prefix=False)
    ]
    assert shown == [
        (span(0, 5), span(1, 5)),
        (span(3, 8), span(6, 8)),
        (span(6, 11), span(9, 11)),
        (span(9, 12), span(12, 12)),
    ]


# ---- a document at a time --------------------------------------------------------------------


def test_llamacpp_scores_255_of_512_behind_a_bos() -> None:
    windows = PRESETS["llamacpp"].resolve(2048).windows(3 * 512 + 511, has_prefix=True)
    assert [w.start for w in windows] == [0, 512, 1024]
    for w in windows:
        assert w.num_targets == 255
        assert (w.first_target - w.start, w.stop - w.start) == (257, 511)
        assert w.overwrite_first
    without = PRESETS["llamacpp"].resolve(2048).windows(1024, has_prefix=False)
    assert not any(w.overwrite_first for w in without)


def test_llamacpp_refuses_fewer_than_two_contexts() -> None:
    recipe = PRESETS["llamacpp"].resolve(2048)
    assert recipe.windows(1023, has_prefix=True) == []
    assert len(recipe.windows(1024, has_prefix=True)) == 2


@given(st.integers(1, 100), st.integers(2, 60))
def test_truncated_scores_what_fits(length: int, context: int) -> None:
    """HF evaluate cuts to max_length, less one with a BOS: the sequence with it is `context`."""
    recipe = find_recipe("truncated", context=context).resolve(context)
    windows = recipe.windows(length, has_prefix=True)
    assert targets(windows) == list(range(1, min(length, context)))


@given(st.integers(1, 80), st.integers(1, 80), st.integers(2, 60))
def test_conditional_keeps_the_right_end(num_context: int, rest: int, limit: int) -> None:
    recipe = find_recipe("conditional", context=limit).resolve(limit)
    total = num_context + rest
    (window,) = recipe.windows(total, has_prefix=True, num_context=num_context)
    inputs = list(range(total))[-(limit + 1) :][:-1]
    assert list(range(window.start, window.stop)) == inputs
    expected = [t for t in range(num_context, total) if t - 1 in inputs]
    assert targets([window]) == expected


# ---- names, hashes, errors -------------------------------------------------------------------


def test_hashes_are_stable() -> None:
    """They stand in stored outputs: a change here breaks every comparison with an older run."""
    resolved = {name: recipe.resolve(4096) for name, recipe in PRESETS.items()}
    assert {name: recipe.hash for name, recipe in resolved.items()} == {
        "rolling": "3abd512ad388",
        "disjoint": "3d876daef35b",
        "strided": "55014991a3d1",
        "llamacpp": "c78d4fd684d2",
        "truncated": "7b588e98759b",
        "conditional": "30dccdb56e5f",
    }


def test_every_setting_changes_the_hash() -> None:
    base = Recipe(name="rolling", context=64)
    others = [
        Recipe(name="strided", context=64),
        Recipe(name="strided", context=64, stride=3),
        replace(base, name="truncated"),
        replace(base, context=65),
        replace(base, overlap=2),
        replace(base, prefix="none"),
        replace(base, prefix=1),
        replace(base, concatenate=True),
        replace(base, weighting="document"),
    ]
    hashes = Counter(r.hash for r in [base, *others])
    assert set(hashes.values()) == {1}
    assert Recipe(name="rolling", context=64).hash == base.hash


@pytest.mark.parametrize("name", PRESETS)
def test_a_recipe_made_by_hand_is_the_preset_of_its_name(name: str) -> None:
    assert Recipe(name=name) == PRESETS[name] == find_recipe(name)
    changed = Recipe(name=name, context=7)
    assert changed == replace(PRESETS[name], context=7) == find_recipe(name, context=7)
    alone = Recipe(name=name, concatenate=False, prefix="none")
    assert (alone.concatenate, alone.prefix) == (False, "none")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"name": "strided", "overlap": 4}, "overlap: 4 has no meaning for recipe strided"),
        ({"name": "rolling", "stride": 4}, "stride: 4 has no meaning for recipe rolling"),
        ({"name": "truncated", "concatenate": True}, "concatenate: True has no meaning for recipe"),
        ({"name": "conditional", "concatenate": True}, "concatenate: True has no meaning"),
        ({"name": "disjoint", "weighting": "document"}, "weighting: 'document' has no meaning for"),
        ({"name": "rolling", "weighting": "byte"}, "weighting: 'byte' is not one of token, doc"),
        ({"name": "rolling", "prefix": -1}, "prefix: -1 is not a token id or one of auto"),
        ({"name": "rolling-64"}, "recipe: 'rolling-64' is not one of rolling, disjoint"),
    ],
)
def test_what_has_no_meaning_is_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Recipe(**settings)


def test_a_context_can_stand_in_the_name() -> None:
    assert find_recipe("disjoint-512") == find_recipe("disjoint", context=512)
    assert find_recipe("llamacpp").resolve(4096).context == 512
    assert find_recipe("rolling").resolve(4096).context == 4096
    assert find_recipe("strided").resolve(1024).stride == 512
    assert find_recipe("rolling", prefix="17").prefix == 17


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"name": "perplexity"}, "recipe: 'perplexity' is not one of rolling, disjoint"),
        ({"name": "rolling-"}, "recipe: 'rolling-' is not one of"),
        ({"name": "rolling-x"}, "recipe: 'rolling-x' is not one of"),
        ({"name": "rolling-512", "context": 256}, "context: 256 contradicts"),
        ({"name": "rolling", "context": 0}, "context: 0 is not at least 1"),
        ({"name": "rolling", "context": 2048}, "context: 2048 is more than the model's 1024"),
        ({"name": "rolling", "context": 8, "overlap": 9}, "overlap: 9 is more than the context"),
        ({"name": "rolling", "overlap": 0}, "overlap: 0 is not at least 1"),
        ({"name": "rolling", "stride": 4}, "stride: 4 has no meaning for recipe rolling"),
        ({"name": "strided", "overlap": 4}, "overlap: 4 has no meaning for recipe strided"),
        ({"name": "strided", "context": 8, "stride": 9}, "stride: 9 is more than the context"),
        ({"name": "disjoint-1"}, "context: 1 is not at least 2, which disjoint needs"),
        ({"name": "rolling", "prefix": "cls"}, "prefix: 'cls' is not a token id or one of"),
    ],
)
def test_errors_name_the_field_and_its_value(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        find_recipe(**settings).resolve(1024)
