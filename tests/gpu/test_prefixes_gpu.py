"""Contexts that many texts share on a GPU: computed once, and the bits of each scored alone."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from logitmill.engine import Pipeline, pipeline
from logitmill.engine.records import Document
from logitmill.kernels import tree_attention
from oracles import save

sys.path.append(str(Path(__file__).parent.parent / "engine"))

from test_families import CASES, make_model
from test_gpu import folder

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
__all__ = ["folder"]


def ask(vocab_size: int, longest: int, seed: int = 0) -> list[Document]:
    """Options of questions below one header; some options begin alike, some are one token."""
    draw = np.random.default_rng(seed)
    header = draw.integers(0, vocab_size, longest // 4)
    asked = []
    for question in range(8):
        own = draw.integers(0, vocab_size, int(draw.integers(1, longest // 2)))
        context = np.concatenate([header, own])
        begun = draw.integers(0, vocab_size, 3)
        for option in range(4):
            ids = draw.integers(0, vocab_size, int(draw.choice([1, 2, 9, 40])))
            if option > 1:
                ids = np.concatenate([begun, ids])
            asked.append(
                Document(
                    f"{question}.{option}",
                    input_ids=np.concatenate([context, ids])[:longest],
                    num_context=min(len(context), longest - 1),
                )
            )
    draw.shuffle(asked)  # type: ignore[arg-type]
    return asked


def assert_shared_is_alone(pipe: Pipeline, longest: int) -> None:
    asked = ask(pipe.vocab_size, longest)
    recipe = {"recipe": "conditional", "prefix": "none"}
    together = list(pipe.score(asked, **recipe))
    plain = pipe.score(asked, share_contexts=False, **recipe)
    for document, score, unshared in zip(asked, together, plain, strict=True):
        assert score.record.status == "ok"
        (alone,) = pipe.score([document], **recipe)
        for name, values in vars(alone.tokens).items():
            assert np.array_equal(values, getattr(score.tokens, name)), (document.doc_id, name)
        # By another attention, which rounds otherwise.
        np.testing.assert_allclose(
            score.tokens.logprob, unshared.tokens.logprob, atol=0.6, rtol=0.05
        )
        assert abs(float((score.tokens.logprob - unshared.tokens.logprob).mean())) < 0.2


@pytest.mark.parametrize("quantization", ["none", "fp8", "int8", "int4"])
def test_every_format_shares(folder: Path, quantization: str) -> None:
    pipe = pipeline(folder, device="cuda", dtype="bfloat16", quantization=quantization)
    assert pipe._model.hidden_of_tree is not None
    assert_shared_is_alone(pipe, 2000)


@pytest.mark.parametrize(
    "name", ["llama head 80 tied", "gemma2", "gpt oss", "qwen3 moe", "deepseek v3", "gpt2"]
)
def test_every_kind_of_decoder_shares(name: str, tmp_path: Path) -> None:
    family, settings = CASES[name]
    path = save(make_model(family, settings, seed=3), tmp_path)
    pipe = pipeline(path, device="cuda", dtype="bfloat16")
    assert_shared_is_alone(pipe, 90)


def test_small_batches_share_less_and_change_no_bit(folder: Path) -> None:
    large = pipeline(folder, device="cuda", dtype="bfloat16", max_batch_tokens=1 << 16)
    small = pipeline(folder, device="cuda", dtype="bfloat16", max_batch_tokens=1024)
    asked = ask(large.vocab_size, 1500, seed=1)
    recipe = {"recipe": "conditional", "prefix": "none"}
    for one, other in zip(large.score(asked, **recipe), small.score(asked, **recipe), strict=True):
        assert np.array_equal(one.tokens.logprob, other.tokens.logprob)


def test_long_headers_are_laid_out_once_and_change_no_bit(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A header, questions of a kind below it, and options below these, in several chunks."""
    monkeypatch.setattr(tree_attention, "_MAX_KEYS", 8192)
    pipe = pipeline(folder, device="cuda", dtype="bfloat16")
    draw = np.random.default_rng(2)
    header = draw.integers(0, pipe.vocab_size, 4000)
    asked = []
    for question in range(6):
        own = draw.integers(0, pipe.vocab_size, int(draw.choice([1, 63, 700, 2500])))
        context = np.concatenate([header, own])
        for option in range(12):
            ids = draw.integers(0, pipe.vocab_size, int(draw.choice([1, 9, 80])))
            document = np.concatenate([context, ids])
            name = f"{question}.{option}"
            asked.append(Document(name, input_ids=document, num_context=len(context)))
    recipe = {"recipe": "conditional", "prefix": "none"}
    for document, score in zip(asked, pipe.score(asked, **recipe), strict=True):
        (alone,) = pipe.score([document], **recipe)
        assert np.array_equal(alone.tokens.logprob, score.tokens.logprob), document.doc_id


def test_numbers_that_overflow_stay_with_their_text(folder: Path) -> None:
    pipe = pipeline(folder, device="cuda", dtype="bfloat16")
    # No file may hold it. What begins with token 0 comes first, and so computes what is shared.
    embedding_VD = pipe._model._embedding_VD.clone()
    embedding_VD[0] = torch.inf
    pipe._model._embedding_VD = embedding_VD
    draw = np.random.default_rng(5)
    context = draw.integers(1, pipe.vocab_size, 300)
    asked = []
    for i, own in enumerate(([1, 0, 2, 3], [1, 4, 2, 3], [1, 0, 2, 3, 4], [5, 6, 0])):
        ids = np.concatenate([context, own])
        asked.append(Document(str(i), input_ids=ids, num_context=len(context)))
    recipe = {"recipe": "conditional", "prefix": "none"}
    statuses = []
    for document, score in zip(asked, pipe.score(asked, **recipe), strict=True):
        (alone,) = pipe.score([document], **recipe)
        statuses.append(score.record.status)
        assert score.record == alone.record
    assert statuses == ["nonfinite", "ok", "nonfinite", "ok"]
