"""The engine on a GPU: transformers' logits, and the same bits in any batch.

Skipped where there is no GPU. The bundled model and random models of awkward shapes are enough:
what is tested is the engine's own arithmetic, not a checkpoint.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from logitmill.engine import pipeline

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

MODEL = Path(__file__).resolve().parents[2] / "infra/demo/model"


@pytest.fixture(scope="module", params=["qwen3", "mistral"])
def folder(request, tmp_path_factory) -> Path:
    """A random checkpoint with grouped heads of 80, or a sliding window and heads of 128."""
    from transformers import AutoModelForCausalLM, MistralConfig, Qwen3Config

    shape = {"hidden_size": 768, "intermediate_size": 1536, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 6, "num_key_value_heads": 2, "vocab_size": 5003}
    config = {
        "qwen3": Qwen3Config(**shape, **heads, head_dim=80),
        "mistral": MistralConfig(**shape, **heads, head_dim=128, sliding_window=100),
    }[request.param]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    path = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(path)
    return path


def sequences(seed: int = 0) -> list[np.ndarray]:
    """Token ids of lengths from one token to thousands."""
    draw = np.random.default_rng(seed)
    lengths = [1, 2, 17, 64, 65, 127, 128, 500, 513, 1000, 2048, 3001]
    return [draw.integers(0, 4000, n) for n in lengths]


def test_float32_logits_are_those_of_transformers(folder):
    from transformers import AutoModelForCausalLM

    torch.backends.cuda.matmul.allow_tf32 = False
    pipe = pipeline(folder, dtype="float32", device="cuda")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).cuda().eval()
    for ids in sequences():
        with torch.inference_mode():
            expected = model(torch.from_numpy(ids)[None].cuda()).logits[0].cpu()
        torch.testing.assert_close(pipe.get_logits(ids), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_a_sequence_keeps_its_bits_in_any_batch(folder, dtype):
    inputs = sequences()
    pipe = pipeline(folder, dtype=dtype, device="cuda")
    alone = [pipe.get_logits(ids) for ids in inputs]
    order = np.random.default_rng(1).permutation(len(inputs))
    for budget in (512, 4096, 32768):
        other = pipeline(folder, dtype=dtype, device="cuda", max_batch_tokens=budget)
        for i, logits in zip(order, other.get_logits([inputs[i] for i in order]), strict=True):
            assert torch.equal(logits, alone[i]), (budget, len(inputs[i]))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_records_keep_their_bits_in_any_batch(dtype):
    texts = [p.read_text() for p in sorted(Path(torch.__file__).parent.glob("*.py"))[:12]]
    one = pipeline(MODEL, dtype=dtype, device="cuda", max_batch_tokens=1024)
    many = pipeline(MODEL, dtype=dtype, device="cuda", max_batch_tokens=65536)
    alone = [next(iter(one.score(text))) for text in texts]
    for expected, found in zip(reversed(alone), many.score(list(reversed(texts))), strict=True):
        assert vars(expected.tokens).keys() == vars(found.tokens).keys()
        for name, values in vars(expected.tokens).items():
            assert np.array_equal(values, getattr(found.tokens, name)), name


def test_bfloat16_scores_are_near_those_of_a_cpu():
    text = Path(torch.__file__).read_text()
    cpu = next(iter(pipeline(MODEL, device="cpu").score(text))).record
    gpu = next(iter(pipeline(MODEL, dtype="bfloat16", device="cuda").score(text))).record
    exact = next(iter(pipeline(MODEL, dtype="float32", device="cuda").score(text))).record
    assert gpu.loglikelihood == pytest.approx(cpu.loglikelihood, rel=3e-3)
    assert exact.loglikelihood == pytest.approx(cpu.loglikelihood, rel=1e-5)


def test_logits_memory_bounds_what_the_head_takes():
    text = "x = 1\n" * 40_000
    pipe = pipeline(MODEL, dtype="bfloat16", device="cuda", logits_memory=32 << 20)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    record = next(iter(pipe.score(text))).record
    all_logits = record.num_tokens_scored * pipe.vocab_size * 4
    assert torch.cuda.max_memory_allocated() - before < all_logits / 2
