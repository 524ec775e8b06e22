"""Families on a GPU: near their float32 numbers on a CPU, and the same bits in any batch.

Skipped where there is no GPU.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from logitmill.engine import pipeline
from oracles import save

sys.path.append(str(Path(__file__).parent.parent / "engine"))

from test_families import CASES, make_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

# Cases whose sizes are multiples of what the kernels take are drawn from these shapes.
SIZES = {"hidden_size": 384, "intermediate_size": 128, "vocab_size": 512}
LENGTHS = (1, 7, 64, 90, 33, 90, 61)


def sequences() -> list[np.ndarray]:
    draw = np.random.default_rng(0)
    return [draw.integers(0, 130, n) for n in LENGTHS]


@pytest.mark.parametrize("name", CASES)
def test_a_family_is_on_a_gpu_what_it_is_on_a_cpu(name: str, tmp_path: Path) -> None:
    family, settings = CASES[name]
    folder = save(make_model(family, settings, seed=3), tmp_path)
    inputs = sequences()
    cpu = pipeline(folder, device="cpu").get_logits(inputs)
    wide = pipeline(folder, device="cuda", dtype="float32").get_logits(inputs)
    narrow = pipeline(folder, device="cuda", dtype="bfloat16")
    packed = narrow.get_logits(inputs)
    for ids, expected, exact, rounded in zip(inputs, cpu, wide, packed, strict=True):
        spread = expected.std()
        assert (exact - expected).abs().max() < 1e-3 * max(1.0, spread)
        # Routers choose other experts where scores are near each other.
        error = (rounded - expected).square().mean().sqrt()
        assert error < (0.5 if "num_experts_per_tok" in settings else 0.1) * max(1.0, spread)
        assert torch.equal(rounded, narrow.get_logits(ids))


@pytest.mark.parametrize("quantization", ["none", "fp8", "int8", "int4"])
def test_streamed_layers_give_the_bits_of_resident_ones(quantization: str, tmp_path: Path) -> None:
    settings = CASES["qwen3"][1] | SIZES | {"num_hidden_layers": 7}
    folder = save(make_model("Qwen3", settings, seed=5), tmp_path)
    settings = {"device": "cuda", "dtype": "bfloat16", "quantization": quantization}
    resident = pipeline(folder, **settings)
    streamed = pipeline(folder, **settings, residency="host")
    assert "streamed" in streamed.placement and "streamed" not in resident.placement
    for _ in range(2):
        for one, other in zip(
            resident.get_logits(sequences()), streamed.get_logits(sequences()), strict=True
        ):
            assert torch.equal(one, other)
