"""What the engine tells of a row's whole distribution, against the row's logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from logitmill.engine import Pipeline, pipeline
from logitmill.engine.records import DocumentScore
from oracles import table_model
from scipy import stats

TEXTS = ["import os\n" * 30, "def f(x):\n    return x\n", "é", "class A:\n    pass\n" * 5]


def rows_of(demo: Pipeline, score: DocumentScore) -> np.ndarray:
    """Logits of the rows that scored a document with a prefix, float64."""
    assert score.first_input is not None
    ids = [score.first_input, *score.tokens.token_id[:-1]]
    return demo.get_logits(ids).double().numpy()


def test_the_tail_is_the_mass_of_all_but_the_candidates(demo: Pipeline) -> None:
    for score in demo.score(TEXTS, top_k=20):
        tokens, z = score.tokens, rows_of(demo, score)
        assert tokens.log_tail_mass.dtype == np.float32 and len(tokens.log_tail_mass) == len(tokens)
        p = np.exp(z - z.max(1, keepdims=True))
        p /= p.sum(1, keepdims=True)
        np.put_along_axis(p, tokens.top_ids.astype(np.int64), 0.0, axis=1)
        np.testing.assert_allclose(tokens.log_tail_mass, np.log(p.sum(1)), atol=2e-5)


def test_extras_have_the_same_bits_in_any_batch(demo_folder: Path, demo: Pipeline) -> None:
    other = pipeline(demo_folder, device="cpu", max_batch_tokens=40, logits_memory=64 * 4096 * 12)
    settings: Any = {"top_k": 7, "num_draws": 12, "draw_seed": 3}
    alone = [next(iter(demo.score([text], **settings))) for text in TEXTS]
    together = other.score(list(reversed(TEXTS)), **settings)
    for expected, found in zip(reversed(alone), together, strict=True):
        for name in ("top_ids", "top_logprobs", "log_tail_mass", "drawn_ids", "logprob"):
            ours, theirs = (getattr(s.tokens, name) for s in (expected, found))
            np.testing.assert_array_equal(ours.view(np.int32), theirs.view(np.int32), name)


def test_draws_are_of_the_rows_distributions(tmp_path: Path) -> None:
    """Every token of a table has its own distribution; a document visits each many times."""
    table = np.random.default_rng(0).normal(scale=1.5, size=(8, 8))
    pipe = pipeline(table_model(tmp_path, table, max_positions=512), device="cpu")
    ids = np.random.default_rng(1).integers(8, size=4001)
    (score,) = pipe.score([ids], prefix="none", num_draws=10, draw_seed=1)
    drawn = score.tokens.drawn_ids
    assert drawn.shape == (4000, 10) and (np.diff(drawn, axis=1) >= 0).all()
    p = np.exp(table) / np.exp(table).sum(1, keepdims=True)
    for token in range(8):
        counts = np.bincount(drawn[ids[:-1] == token].ravel(), minlength=8)
        assert stats.chisquare(counts, counts.sum() * p[token]).pvalue > 1e-4
    # An estimate of any mean is unbiased: here of the expected log-probability, minus the entropy.
    logp = np.log(p)
    estimates = logp[ids[:-1, None], drawn].mean(1)
    error = (estimates + score.tokens.entropy).mean() / (estimates.std() / np.sqrt(4000))
    assert abs(error) < 4


def test_draws_go_by_the_tokens_and_the_seed(demo: Pipeline) -> None:
    def draws(text: str, seed: int) -> np.ndarray:
        (score,) = demo.score([text], num_draws=12, draw_seed=seed)
        return score.tokens.drawn_ids

    first = draws(TEXTS[0], 0)
    assert np.array_equal(first, draws(TEXTS[0], 0))
    assert not np.array_equal(first, draws(TEXTS[0], 1))
    # Rows of one distribution have draws of their own: the text repeats itself.
    assert not np.array_equal(first[-6], first[-3])
    assert not np.array_equal(first[: len(draws("import os\n", 0))], draws("import os\n", 0))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("extras", [{}, {"top_k": 5, "num_draws": 3}])
def test_states_replay_to_the_logits_of_the_run(
    demo_folder: Path, dtype: str, extras: dict[str, int]
) -> None:
    pipe = pipeline(demo_folder, device="cpu", dtype=dtype, max_batch_tokens=64)
    states: dict[int, list[torch.Tensor]] = {}

    def keep(index: int, doc_id: str, first_row: int, rows: torch.Tensor) -> None:
        held = states.setdefault(index, [])
        assert first_row == sum(map(len, held)) and rows.dtype == pipe._model.dtype
        held.append(rows.clone())

    scores = list(pipe.score(TEXTS, on_states=keep, **extras))
    plain = list(pipe.score(TEXTS, **extras))
    logits: dict[int, list[np.ndarray]] = {}

    def keep_logits(index: int, doc_id: str, first: int, rows: np.ndarray, lse: np.ndarray) -> None:
        logits.setdefault(index, []).append(rows.copy())

    list(pipe.score(TEXTS, on_logits=keep_logits))
    for score, expected in zip(scores, plain, strict=True):
        for name, values in vars(expected.tokens).items():
            assert np.array_equal(values, getattr(score.tokens, name)), name
        replayed = torch.cat([z for _, z in pipe.replay(torch.cat(states[score.index]))])
        logprobs = np.concatenate(logits[score.index])
        tokens = score.tokens
        top = replayed.gather(1, torch.from_numpy(tokens.top1_id)[:, None].long())
        again = (replayed - top) + torch.from_numpy(tokens.top1_logprob)[:, None]
        assert np.array_equal(again.numpy().view(np.int32), logprobs.view(np.int32))


def test_one_head_has_one_digest(demo_folder: Path, demo: Pipeline) -> None:
    again = pipeline(demo_folder, device="cpu")
    rounded = pipeline(demo_folder, device="cpu", fp8_head=True)
    assert demo.head_digest == again.head_digest and len(demo.head_digest or "") == 64
    assert rounded.head_digest != demo.head_digest
    again._model._head.weight_NK[5, 5] += 1  # type: ignore[attr-defined]
    del vars(again._model)["head_digest"]
    assert again.head_digest != demo.head_digest


def test_what_cannot_be_kept_is_named(demo: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    def sink(*args: Any) -> None: ...

    for settings, message in (
        ({"num_draws": 256}, "num_draws: 256 is not an integer within 0 ... 255"),
        ({"num_draws": 2.0}, "num_draws: 2.0 is not an integer"),
        ({"num_draws": 3, "on_logits": sink}, "num_draws: logits that are handed over hold"),
        ({"top_k": 3, "on_logits": sink}, "top_k: logits that are handed over hold"),
        ({"on_states": sink, "on_logits": sink}, "on_states: logits can be made of them"),
    ):
        with pytest.raises(ValueError, match=message):
            demo.score(TEXTS, **settings)  # type: ignore[arg-type]
    for states in (torch.zeros(2, 7), torch.zeros(2, 256, dtype=torch.float16), torch.zeros(256)):
        with pytest.raises(
            ValueError, match=r"states_RD: .* not the model's, torch.float32 \[rows"
        ):
            next(iter(demo.replay(states)))


def test_a_model_of_transformers_keeps_no_states(tmp_path: Path) -> None:
    from transformers import OPTConfig, OPTForCausalLM

    config = OPTConfig(
        vocab_size=40, hidden_size=16, ffn_dim=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=64, word_embed_proj_dim=16,
    )  # fmt: skip
    OPTForCausalLM(config).save_pretrained(tmp_path)
    pipe = pipeline(tmp_path, device="cpu")
    with pytest.raises(ValueError, match="on_states: transformers runs this model"):
        pipe.score([[1, 2, 3]], on_states=lambda *args: None)
    (score,) = pipe.score([[1, 2, 3]], prefix="none", top_k=40, num_draws=4)
    assert np.isneginf(score.tokens.log_tail_mass).all() and score.first_input == 1
