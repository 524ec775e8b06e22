"""Scores of models that are known in closed form; each bug class of other tools has its test."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from logitmill.engine import Document, DocumentScore, Pipeline, pipeline
from logitmill.engine.runner import Runner
from oracles import (
    byte_tokenizer,
    circulant,
    constant_model,
    entropy,
    markov_model,
    successor,
    table_model,
    varentropy,
    zipf,
)

ODDS = 60.0


def score_one(pipe: Pipeline, document: Any, **settings: Any) -> DocumentScore:
    (score,) = pipe.score([document], **settings)
    return score


def same_records(a: DocumentScore, b: DocumentScore) -> bool:
    """Every field of the record and every bit of every token."""
    return a.record == b.record and all(
        np.array_equal(column, getattr(b.tokens, name)) for name, column in vars(a.tokens).items()
    )


def walk(transitions: np.ndarray, length: int, seed: int) -> list[int]:
    """A path of a Markov chain."""
    draw = np.random.default_rng(seed)
    path = [0]
    while len(path) < length:
        path.append(int(draw.choice(len(transitions), p=transitions[path[-1]])))
    return path


# ---- closed forms ----------------------------------------------------------------------------


@pytest.mark.parametrize("vocab_size", [256, 32_000, 50_257, 128_256, 151_936])
def test_uniform_model(vocab_size: int, tmp_path: Path) -> None:
    pipe = pipeline(constant_model(tmp_path, np.zeros(vocab_size)), device="cpu")
    ids = [0, vocab_size - 1, 17, 17, 255]
    score = score_one(pipe, ids, prefix="none")
    expected = math.log(vocab_size)
    np.testing.assert_allclose(score.tokens.logprob, -expected, rtol=1e-6)
    np.testing.assert_allclose(score.tokens.entropy, expected, rtol=1e-6)
    assert not score.tokens.varentropy.any()
    assert score.tokens.rank.tolist() == [1] * 4
    assert score.tokens.top1_id.tolist() == [0] * 4
    assert score.record.token_perplexity == pytest.approx(vocab_size, rel=1e-5)
    assert score.record.min_k_plus_plus_20 == 0.0


def test_two_state_markov_chain(tmp_path: Path) -> None:
    table = np.array([[0.9, 0.1], [0.5, 0.5]])
    pipe = pipeline(table_model(tmp_path, np.log(table)), device="cpu")
    # The chain's own long-run frequencies of states and of transitions: 5/6 and 1/6.
    counts = {(0, 0): 45, (0, 1): 5, (1, 0): 5, (1, 1): 5}
    logprobs = []
    for (state, following), count in counts.items():
        score = score_one(pipe, [state, following], prefix="none")
        assert score.tokens.logprob[0] == pytest.approx(math.log(table[state, following]), rel=1e-6)
        assert score.tokens.entropy[0] == pytest.approx([0.325082973, 0.693147181][state], rel=1e-6)
        spread = [0.434501626, 0.0][state]
        assert score.tokens.varentropy[0] == pytest.approx(spread, rel=1e-5, abs=1e-6)
        logprobs += [float(score.tokens.logprob[0])] * count
    assert -np.mean(logprobs) == pytest.approx(0.386427008, rel=1e-6)
    assert math.exp(-np.mean(logprobs)) == pytest.approx(1.471712970, rel=1e-6)


def test_circulant_chain(tmp_path: Path) -> None:
    p = circulant(64, 0.5, 0.3, 0.2)
    other = circulant(64, 0.3, 0.3, 0.4)
    assert entropy(p[0]) == pytest.approx(1.825030159, abs=1e-9)
    pipe = pipeline(table_model(tmp_path / "p", np.log(p), max_positions=128), device="cpu")
    by_other = pipeline(table_model(tmp_path / "q", np.log(other)), device="cpu")
    path = walk(p, 60, seed=1)
    score = score_one(pipe, path, prefix="none")
    expected = np.log(p)[path[:-1], path[1:]]
    np.testing.assert_allclose(score.tokens.logprob, expected, rtol=1e-5)
    np.testing.assert_allclose(score.tokens.entropy, 1.825030159, rtol=1e-6)
    np.testing.assert_allclose(score.tokens.varentropy, 3.785276234, rtol=1e-5)
    assert score.record.nll_per_token == pytest.approx(-expected.mean(), rel=1e-6)
    assert np.exp(score.tokens.entropy).mean() == pytest.approx(6.202982094, rel=1e-5)
    # Every transition out of one state, weighted by its probability: the cross-entropy.
    pairs = [[5, following] for following in range(64)]
    for scorer, total in ((pipe, 1.825030159), (by_other, 1.937393700)):
        logprobs = [s.tokens.logprob[0] for s in scorer.score(pairs, prefix="none")]
        assert -(p[5] * logprobs).sum() == pytest.approx(total, rel=1e-6)
    assert math.exp(1.937393700) == pytest.approx(6.940637991, rel=1e-8)


def test_zipf_model(tmp_path: Path) -> None:
    p = zipf(1000)
    pipe = pipeline(constant_model(tmp_path, np.log(p)), device="cpu")
    score = score_one(pipe, [3, 0, 1, 19, 999], prefix="none")
    assert score.tokens.rank.tolist() == [1, 2, 20, 1000]
    np.testing.assert_allclose(score.tokens.logprob, np.log(p[[0, 1, 19, 999]]), rtol=1e-6)
    np.testing.assert_allclose(score.tokens.entropy, 5.191011033, rtol=1e-6)
    np.testing.assert_allclose(score.tokens.varentropy, 4.580029538, rtol=1e-5)
    np.testing.assert_allclose(score.tokens.top1_logprob, np.log(p[0]), rtol=1e-6)
    np.testing.assert_allclose(score.tokens.logsumexp, 0.0, atol=1e-6)
    assert score.record.num_top1 == 1
    assert score.record.top1_accuracy == 0.25
    assert varentropy(p) == pytest.approx(4.580029538, abs=1e-9)


def test_logits_come_back_from_logprobs_and_logsumexp(tmp_path: Path) -> None:
    """Row i of the sink scored record i; its entry for that token has the record's bits."""
    pipe = pipeline(markov_model(tmp_path, 3), device="cpu")
    ids = list(range(20)) * 3
    parts: list[tuple[int, np.ndarray, np.ndarray]] = []
    score = score_one(
        pipe,
        ids,
        context=16,
        prefix="none",
        on_logits=lambda i, d, first, rows, lse: parts.append((first, rows.copy(), lse.copy())),
    )
    rows = np.concatenate([rows for _, rows, _ in parts])
    lse = np.concatenate([lse for _, _, lse in parts])
    assert [first for first, _, _ in parts] == np.cumsum([0, *map(len, (p[1] for p in parts))])[
        :-1
    ].tolist()
    assert rows.shape == (59, 23)
    np.testing.assert_array_equal(rows[np.arange(59), ids[1:]], score.tokens.logprob)
    np.testing.assert_array_equal(lse, score.tokens.logsumexp)
    whole = pipe.get_logits(ids)
    assert isinstance(whole, torch.Tensor)
    np.testing.assert_allclose(rows[:16] + lse[:16, None], whole[:16].numpy(), atol=1e-5)


# ---- bug class: shift and boundary -----------------------------------------------------------


def test_shift_a_model_sure_of_the_true_next_token_has_perplexity_one(tmp_path: Path) -> None:
    """Unshifted logits would give e^60 here (lighteval#1252)."""
    pipe = pipeline(table_model(tmp_path, successor(40, ODDS)), device="cpu")
    score = score_one(pipe, list(range(40)), prefix=39)
    assert score.record.token_perplexity == 1.0
    assert score.record.num_top1 == 40
    assert pipe.get_ppl(list(range(40))) == 1.0


def test_shift_a_model_sure_of_the_current_token_is_far_off(tmp_path: Path) -> None:
    pipe = pipeline(table_model(tmp_path, ODDS * np.eye(40)), device="cpu")
    score = score_one(pipe, list(range(40)), prefix=39)
    assert score.record.nll_per_token == pytest.approx(ODDS, rel=1e-6)


@given(
    st.integers(1, 150),
    st.integers(2, 40),
    st.sampled_from(["rolling", "truncated"]),
    st.booleans(),
)
@settings(max_examples=40)
def test_boundary_each_token_is_scored_once_by_the_row_before_it(
    tmp_path_factory: pytest.TempPathFactory, n: int, context: int, name: str, prefixed: bool
) -> None:
    pipe = chain(tmp_path_factory)
    ids = [(7 + i) % 40 for i in range(n)]
    score = score_one(pipe, ids, recipe=name, context=context, prefix=6 if prefixed else "none")
    reach = n if name == "rolling" else min(n, context - prefixed)
    scored = ids[:reach] if prefixed else ids[1:reach]
    assert score.tokens.token_id.tolist() == scored
    assert score.record.num_tokens == n
    if scored:
        assert score.record.num_tokens_scored == len(scored)
        assert not score.tokens.logprob.any(), "a row that is off by one would be sure of another"
        assert score.record.truncated == (reach < n)
    else:
        assert score.record.status == "too_short"


_CHAIN: list[Pipeline] = []


def chain(factory: pytest.TempPathFactory) -> Pipeline:
    if not _CHAIN:
        folder = table_model(factory.mktemp("chain"), successor(40, ODDS), max_positions=200)
        _CHAIN.append(pipeline(folder, device="cpu"))
    return _CHAIN[0]


# ---- bug class: prefix / BOS -----------------------------------------------------------------


@pytest.fixture(scope="module")
def bos_sensitive(tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    """A byte model with BOS 256: after BOS only `a` is likely, after BOS twice only `b`."""
    table = np.zeros((258, 258))
    table[256, ord("a")] = ODDS
    tokenizer = byte_tokenizer(specials=["<bos>", "<eos>"], bos="<bos>")
    folder = table_model(tmp_path_factory.mktemp("bos"), table, tokenizer=tokenizer)
    return pipeline(folder, device="cpu")


def test_prefix_stands_in_front_once(bos_sensitive: Pipeline) -> None:
    """An EOS prefix where BOS is meant: word perplexity 17,832,760 for 39 (lm-eval#1586)."""
    score = score_one(bos_sensitive, "abc")
    assert score.tokens.token_id.tolist() == list(b"abc")
    assert score.tokens.logprob[0] == 0.0
    np.testing.assert_allclose(score.tokens.logprob[1:], -math.log(258), rtol=1e-6)


def test_prefix_is_not_doubled_where_it_is_there_already(bos_sensitive: Pipeline) -> None:
    """lm-eval#3333: a document that begins with BOS is scored behind that one."""
    score = score_one(bos_sensitive, [256, *b"abc"])
    assert score.tokens.token_id.tolist() == list(b"abc")
    assert score.tokens.logprob[0] == 0.0
    assert score.record.num_tokens == 4


def test_prefix_spelled_in_a_text_is_text(bos_sensitive: Pipeline) -> None:
    score = score_one(bos_sensitive, "<bos>abc")
    assert score.tokens.token_id.tolist() == list(b"<bos>abc")
    assert score.record.num_bytes == 8


def test_prefix_can_be_chosen_or_left_out(bos_sensitive: Pipeline) -> None:
    assert score_one(bos_sensitive, "abc", prefix="none").tokens.token_id.tolist() == list(b"bc")
    assert score_one(bos_sensitive, "abc", prefix=257).tokens.logprob[0] < -5.0
    assert score_one(bos_sensitive, "abc", prefix="bos").tokens.logprob[0] == 0.0
    tokenizer = score_one(bos_sensitive, "abc", prefix="tokenizer")
    assert tokenizer.tokens.token_id.tolist() == list(b"bc"), "this tokenizer adds no BOS itself"


@pytest.mark.parametrize(
    ("prefix", "said"),
    [("eos", "prefix: the tokenizer has no eos"), (258, "prefix: 258"), (-1, "prefix: -1")],
)
def test_prefix_that_is_not_there_is_refused(
    bos_sensitive: Pipeline, prefix: str | int, said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        score_one(bos_sensitive, "abc", prefix=prefix)


# ---- bug class: padding; batch and numerics; feature collision --------------------------------


def documents(seed: int, vocab_size: int = 23) -> list[list[int]]:
    """Lengths around every limit, with id 0, which pads a packed batch, among real tokens."""
    draw = np.random.default_rng(seed)
    lengths = [1, 2, 3, 16, 17, 31, 64, 64, 64, 120, 255, 256, 257, 300]
    return [draw.integers(vocab_size, size=n).tolist() for n in lengths] + [[0] * 40, [0]]


@pytest.fixture(scope="module")
def markov(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return markov_model(tmp_path_factory.mktemp("markov"), 3)


@pytest.mark.parametrize("budget", [1, 64, 256, 700, 100_000])
@pytest.mark.parametrize("context", [16, 512])
def test_batch_a_document_has_the_same_bits_in_any_batch_and_order(
    markov: Path, budget: int, context: int
) -> None:
    alone = pipeline(markov, device="cpu", max_batch_tokens=1)
    batched = pipeline(markov, device="cpu", max_batch_tokens=budget)
    corpus = documents(seed=1)
    expected = [score_one(alone, ids, context=context, prefix=0) for ids in corpus]
    order = np.random.default_rng(budget).permutation(len(corpus))
    found = list(batched.score([corpus[i] for i in order], context=context, prefix=0))
    for i, score in zip(order, found, strict=True):
        score.record.doc_id = expected[i].record.doc_id
        assert same_records(score, expected[i])


def test_batch_logits_have_the_same_bits_in_any_batch_and_order(markov: Path) -> None:
    alone = pipeline(markov, device="cpu", max_batch_tokens=1)
    corpus = documents(seed=2)
    expected = [alone.get_logits(ids) for ids in corpus]
    for budget in (64, 600, 100_000):
        pipe = pipeline(markov, device="cpu", max_batch_tokens=budget)
        order = np.random.default_rng(budget).permutation(len(corpus))
        found = pipe.get_logits([corpus[i] for i in order])
        assert all(torch.equal(found[j], expected[i]) for j, i in enumerate(order))


def test_batch_memory_for_logits_does_not_decide_the_numbers(markov: Path) -> None:
    corpus = documents(seed=3)
    wide = list(pipeline(markov, device="cpu").score(corpus, prefix="none"))
    narrow = pipeline(markov, device="cpu", logits_memory=64 * 23 * 12)
    assert all(map(same_records, wide, narrow.score(corpus, prefix="none")))


def test_batch_the_trained_model_has_the_same_bits_in_any_batch(
    demo_folder: Path, demo: Pipeline
) -> None:
    draw = np.random.default_rng(0)
    corpus = [draw.integers(3, 4096, size=n).tolist() for n in (1, 3, 100, 257, 1500, 64, 64, 9)]
    whole = list(demo.score(corpus))
    small = pipeline(demo_folder, device="cpu", max_batch_tokens=300)
    reversed_ = list(small.score(corpus[::-1]))[::-1]
    for ids, a, b in zip(corpus, whole, reversed_, strict=True):
        c = score_one(demo, ids)
        a.record.doc_id = b.record.doc_id = c.record.doc_id
        assert same_records(a, b)
        assert same_records(a, c)


@pytest.mark.parametrize("order", [1, 3, 6])
def test_markov_windows_with_context_enough_do_not_change_a_score(
    order: int, tmp_path: Path
) -> None:
    """A model that sees m tokens scores a document alike in windows with overlap >= m."""
    pipe = pipeline(markov_model(tmp_path, order), device="cpu")
    corpus = [ids for ids in documents(seed=order) if len(ids) > 1]
    expected = [s.tokens.logprob for s in pipe.score(corpus, context=400, prefix="none")]
    for overlap, context in [(order, 13), (order, 40), (order + 4, 40)]:
        found = pipe.score(corpus, context=context, overlap=overlap, prefix="none")
        for reference, score in zip(expected, found, strict=True):
            np.testing.assert_allclose(score.tokens.logprob, reference, atol=2e-5)


@pytest.mark.parametrize(("order", "overlap"), [(6, 1), (6, 4), (3, 2)])
def test_markov_targets_that_lack_context_are_counted(
    order: int, overlap: int, tmp_path: Path
) -> None:
    """In each full later window exactly m - c targets see less than m tokens."""
    pipe = pipeline(markov_model(tmp_path, order), device="cpu")
    context, num_later = 20, 5
    n = 1 + context + num_later * (context - overlap + 1)
    ids = np.random.default_rng(4).integers(23, size=n).tolist()
    whole = score_one(pipe, ids, context=400, prefix="none").tokens.logprob
    cut = score_one(pipe, ids, context=context, overlap=overlap, prefix="none")
    assert cut.record.num_windows == 1 + num_later
    changed = np.flatnonzero(np.abs(cut.tokens.logprob - whole) > 1e-4)
    firsts = [context + i * (context - overlap + 1) for i in range(num_later)]
    assert changed.tolist() == [f + j for f in firsts for j in range(order - overlap)]


@pytest.mark.parametrize("stride", [5, 12, 16])
def test_markov_strides_do_not_change_what_has_context(stride: int, tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    pipe = pipeline(markov_with(tmp_path, tokenizer, order=4), device="cpu", max_batch_tokens=100)
    text = "".join(map(chr, np.random.default_rng(5).integers(97, 120, size=200)))
    whole = score_one(pipe, text, context=400, prefix="none").tokens
    (found,) = pipe.score([text], recipe="strided", context=20, stride=stride, prefix="none")
    np.testing.assert_allclose(found.tokens.logprob, whole.logprob, atol=2e-5)


def markov_with(folder: Path, tokenizer: Any, *, order: int) -> Path:
    markov_model(folder, order, vocab_size=256)
    tokenizer.save_pretrained(folder)
    return folder


# ---- bug class: numerator and denominator; aggregation ---------------------------------------


@pytest.fixture(scope="module")
def uniform_bytes(tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    folder = constant_model(
        tmp_path_factory.mktemp("bytes"), np.zeros(256), tokenizer=byte_tokenizer()
    )
    return pipeline(folder, device="cpu")


@pytest.mark.parametrize("text", ["a", "plain ascii text " * 30, "naïve 漢字 😀 and more\n" * 9])
@pytest.mark.parametrize("context", [7, 64])
@pytest.mark.parametrize("prefix", [0, "none"])
def test_denominator_a_uniform_byte_model_has_eight_bits_a_byte(
    uniform_bytes: Pipeline, text: str, context: int, prefix: int | str
) -> None:
    """lingua#46: a sum over a cut document divided by its whole length. Here the bytes of what
    is not scored leave both sides."""
    score = score_one(uniform_bytes, text, context=context, prefix=prefix)
    if text == "a" and prefix == "none":
        assert score.record.status == "too_short"
        return
    record = score.record
    assert record.bits_per_byte == pytest.approx(8.0, rel=1e-7)
    assert record.byte_perplexity == pytest.approx(256.0, rel=1e-6)
    assert record.num_bytes == len(text.encode()) - (prefix == "none")
    assert record.bits_per_char == pytest.approx(8.0 * record.num_bytes / record.num_chars)


def test_denominator_truncated_documents_count_the_bytes_they_scored(
    uniform_bytes: Pipeline,
) -> None:
    score = score_one(uniform_bytes, "0123456789" * 20, recipe="truncated", prefix=0)
    assert score.record.truncated
    assert score.record.num_bytes == score.record.num_tokens_scored == 63
    assert score.record.bits_per_byte == pytest.approx(8.0, rel=1e-7)
    assert score.record.num_words is None
    assert score.record.word_perplexity is None


def test_denominator_words_and_bytes_agree(uniform_bytes: Pipeline) -> None:
    """ln(word perplexity) / ln(byte perplexity) = bytes / words for any model."""
    text = " a b  long-word\n and ünïcode "
    record = score_one(uniform_bytes, text, prefix=0).record
    assert record.num_words == 7
    assert record.num_bytes == len(text.encode())
    assert record.num_chars == len(text)
    assert record.word_perplexity is not None
    assert record.byte_perplexity is not None
    ratio = math.log(record.word_perplexity) / math.log(record.byte_perplexity)
    assert ratio == pytest.approx(record.num_bytes / 7)


@given(st.text(min_size=1, max_size=120), st.integers(2, 64))
@settings(max_examples=40)
def test_denominator_rechunking_does_not_change_bits_per_byte(
    uniform_bytes: Pipeline, text: str, context: int
) -> None:
    record = score_one(uniform_bytes, text, context=context, prefix=0).record
    if record.status == "ok":
        assert record.bits_per_byte == pytest.approx(8.0, rel=1e-7)
        assert record.num_chars == len(text)


def test_sums_are_taken_in_float64(tmp_path: Path) -> None:
    pipe = pipeline(constant_model(tmp_path, np.zeros(300), max_positions=256), device="cpu")
    record = score_one(pipe, [0] * 50_001, prefix="none").record
    assert record.loglikelihood == 50_000 * float(-np.float32(math.log(300)))


# ---- documents that are not as they should be ------------------------------------------------


@pytest.mark.parametrize(
    ("document", "status", "said"),
    [
        ("", "empty", "text: the document is empty"),
        ([], "empty", "input_ids: the document is empty"),
        ("a\ud800b", "invalid_utf8", "text: character 1 is a lone surrogate"),
        ([3, 999, 4], "invalid_ids", "999 at position 1 is not in the model's vocabulary of 256"),
        ([3, -1], "invalid_ids", "-1 at position 1"),
        ([0.5, 1.5], "invalid_ids", "not a flat list of integers"),
        ([[1, 2], [3, 4]], "invalid_ids", "not a flat list of integers"),
        ([[1, 2], [3]], "invalid_ids", "not a flat list of integers"),
        ([2**70], "invalid_ids", "not a flat list of integers"),
        ([{"role": "user", "content": "hi"}], "invalid_value", "no chat template"),
        (Document("d", status="unreadable", error="disk"), "unreadable", "disk"),
    ],
)
def test_a_bad_document_is_a_row_that_says_so(
    uniform_bytes: Pipeline, document: Any, status: str, said: str
) -> None:
    """Superfiltering `f0764af`: any exception scores 0. Here neighbours are scored, and this one
    carries no number."""
    found = list(uniform_bytes.score(["before", document, "after"], prefix=0))
    assert [s.index for s in found] == [0, 1, 2]
    assert [s.record.status for s in found] == ["ok", status, "ok"]
    bad = found[1].record
    assert bad.error is not None
    assert said in bad.error
    assert bad.loglikelihood is None
    assert bad.token_perplexity is None
    assert bad.num_tokens_scored == 0
    assert len(found[1].tokens) == 0
    assert found[2].record.num_bytes == 5


def test_whitespace_is_text_like_any_other(uniform_bytes: Pipeline) -> None:
    record = score_one(uniform_bytes, " \n\t ", prefix=0).record
    assert record.status == "ok"
    assert record.num_bytes == 4
    assert record.num_words == 2


def test_nonfinite_results_are_a_status(tmp_path: Path) -> None:
    """Finite weights whose product overflows float32."""
    table = np.zeros((9, 9))
    table[4, 2] = 1e38
    folder = table_model(tmp_path, table)
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] *= 1e6
    save_file(tensors, folder / "model.safetensors")
    good, bad = pipeline(folder, device="cpu").score([[1, 2, 3], [1, 4, 3, 2]], prefix="none")
    assert good.record.status == "ok"
    assert bad.record.status == "nonfinite"
    assert bad.record.error is not None
    assert bad.record.error.startswith("token 1 ")
    assert bad.record.loglikelihood is None


def test_an_impossible_token_elsewhere_is_no_nan_in_an_ok_row(tmp_path: Path) -> None:
    table = np.zeros((9, 9))
    table[4, 2] = -3e38
    folder = table_model(tmp_path, table)
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] *= 1e6
    save_file(tensors, folder / "model.safetensors")
    (score,) = pipeline(folder, device="cpu").score([[4, 3, 3]], prefix="none")
    if score.record.status == "ok":
        assert np.isfinite(score.tokens.entropy).all()
        assert np.isfinite(score.tokens.varentropy).all()


def test_a_stream_of_ids_cannot_be_joined(uniform_bytes: Pipeline) -> None:
    with pytest.raises(ValueError, match="document '0' has no text"):
        list(uniform_bytes.score([[1, 2, 3]], recipe="disjoint-8", prefix="none"))


def test_a_stream_joins_documents_by_a_blank_line(uniform_bytes: Pipeline) -> None:
    texts = ["one", "two", Document("x", status="unreadable", error="disk"), "three"]
    bad, stream = uniform_bytes.score(texts, recipe="disjoint-4", prefix="none")
    assert bad.record.status == "unreadable"
    assert stream.text == "one\n\ntwo\n\nthree"
    kept = [t for t in range(12) if t % 4]
    assert stream.tokens.byte_start.tolist() == kept


# ---- recipes through the model ---------------------------------------------------------------


def test_llamacpp_overwrites_the_first_token_of_each_chunk(tmp_path: Path) -> None:
    """A model whose every row depends on the first token of its window."""
    pipe = pipeline(markov_model(tmp_path, 400), device="cpu")
    ids = np.random.default_rng(6).integers(1, 23, size=70).tolist()
    score = score_one(pipe, ids, recipe="llamacpp-16", prefix=0)
    sequence = [0, *ids]
    expected = []
    for start in range(0, 64, 16):
        chunk = [0, *sequence[start + 1 : start + 16]]
        logits = pipe.get_logits(chunk)
        assert isinstance(logits, torch.Tensor)
        rows = logits.log_softmax(1)[8:15, :]
        expected += [rows[j, chunk[9 + j]].item() for j in range(7)]
    np.testing.assert_allclose(score.tokens.logprob, expected, atol=1e-5)
    assert score.record.num_tokens_scored == 4 * 7


def conditional(pipe: Pipeline, given: str, text: str, **settings: Any) -> DocumentScore:
    return score_one(pipe, (given, text), recipe="conditional", **settings)


@pytest.fixture(scope="module")
def byte_markov(tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    tokenizer = byte_tokenizer()
    return pipeline(markov_with(tmp_path_factory.mktemp("bm"), tokenizer, order=400), device="cpu")


def logprobs_of(pipe: Pipeline, ids: Sequence[int], first: int) -> list[float]:
    logits = pipe.get_logits(list(ids))
    assert isinstance(logits, torch.Tensor)
    table = logits.log_softmax(1)
    return [table[t - 1, ids[t]].item() for t in range(first, len(ids))]


def test_conditional_scores_the_continuation_given_its_context(byte_markov: Pipeline) -> None:
    score = conditional(byte_markov, "the context", " and more")
    assert bytes(score.tokens.token_id.tolist()) == b" and more"
    expected = logprobs_of(byte_markov, b"the context and more", 11)
    np.testing.assert_allclose(score.tokens.logprob, expected, atol=1e-5)
    assert score.tokens.byte_start.tolist() == list(range(9))
    assert score.record.num_bytes == 9


def test_conditional_whitespace_before_the_border_is_continuation(byte_markov: Pipeline) -> None:
    moved = conditional(byte_markov, "context \n", "more")
    assert moved.text == " \nmore"
    assert bytes(moved.tokens.token_id.tolist()) == b" \nmore"
    plain = conditional(byte_markov, "context", " \nmore")
    np.testing.assert_array_equal(moved.tokens.logprob, plain.tokens.logprob)


@pytest.mark.parametrize("context", ["", "  "])
def test_conditional_without_context_has_the_prefix(byte_markov: Pipeline, context: str) -> None:
    score = conditional(byte_markov, context, "more", prefix=65)
    expected = logprobs_of(byte_markov, b"A" + context.encode() + b"more", 1)
    np.testing.assert_allclose(score.tokens.logprob, expected, atol=1e-5)


def test_conditional_cuts_on_the_left(byte_markov: Pipeline) -> None:
    score = conditional(byte_markov, "a very long context", " tail", context=8)
    joined = b"a very long context tail"
    expected = logprobs_of(byte_markov, joined[-9:], 4)
    np.testing.assert_allclose(score.tokens.logprob, expected, atol=1e-5)
    long = conditional(byte_markov, "a", "0123456789abcdef", context=8)
    assert bytes(long.tokens.token_id.tolist()) == b"89abcdef"
    assert long.record.truncated


def test_conditional_text_is_split_where_the_context_alone_would_end(tmp_path: Path) -> None:
    """lm-evaluation-harness encodes the joined string. A token across the border counts to the
    side its index falls on, and bytes that are not scored leave the denominator."""
    tokenizer = merging_tokenizer("ab", "cd")
    folder = constant_model(tmp_path, np.zeros(258), tokenizer=tokenizer)
    pipe = pipeline(folder, device="cpu")
    whole = conditional(pipe, "x", "abcd", prefix="none")
    assert whole.tokens.token_id.tolist() == [256, 257]
    assert whole.tokens.byte_start.tolist() == [0, 2]
    assert whole.record.num_words == 1
    crossing = conditional(pipe, "xa", "bcd", prefix="none")
    assert crossing.tokens.token_id.tolist() == [257], "x, ab | cd"
    assert crossing.tokens.byte_start.tolist() == [1]
    assert crossing.tokens.byte_end.tolist() == [3]
    assert crossing.record.num_bytes == 2
    assert crossing.record.num_words is None
    swallowed = conditional(pipe, "xa", "b", prefix="none")
    assert swallowed.record.status == "too_short"


def merging_tokenizer(*pairs: str) -> Any:
    """A byte tokenizer that merges some pairs, with ids from 256."""
    import json

    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    state = json.loads(byte_tokenizer().backend_tokenizer.to_str())
    for i, pair in enumerate(pairs):
        state["model"]["vocab"][pair] = 256 + i
        state["model"]["merges"].append(list(pair))
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(state)))


def test_context_is_refused_by_a_recipe_that_reads_none(byte_markov: Pipeline) -> None:
    with pytest.raises(ValueError, match="rolling reads no context, but document '0' has one"):
        score_one(byte_markov, ("context", "text"), prefix="none")


# ---- calls that overlap ----------------------------------------------------------------------


@pytest.mark.parametrize("with_logits", [False, True])
def test_another_call_may_launch_once_the_last_batch_is_under_way(
    demo: Pipeline, with_logits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a call has nothing to launch."""
    texts = [["One text.", "", "Another one, " * 90, "and more"], ["Of the second call."] * 3, [""]]
    apart = [list(demo.score(some)) for some in texts]
    together: dict[int, list[DocumentScore]] = {}

    batches: list[int] = []
    name = "_marked" if with_logits else "_launch"
    compute = getattr(Runner, name)

    def run(call: int) -> None:
        calls: list[int] = []

        def count(runner: Runner, requests: Any, **options: Any) -> Any:
            batches.append(call)
            assert not calls, "its last batch was said to be under way"
            return compute(runner, requests, **options)

        def go_on() -> None:
            calls.append(call)
            if call + 1 < len(texts):
                run(call + 1)

        options = {"on_logits": lambda *rows: None} if with_logits else {}
        with monkeypatch.context() as patch:
            patch.setattr(Runner, name, count)
            together[call] = list(demo.score(texts[call], on_launched=go_on, **options))
        assert calls == [call]

    run(0)
    # The third has nothing to launch.
    assert set(batches) == {0, 1}
    for call, scores in enumerate(apart):
        assert len(scores) == len(together[call])
        assert all(map(same_records, scores, together[call]))
