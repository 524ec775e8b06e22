"""Workloads as data: a model's shape with random weights, and documents of random tokens.

Speed does not depend on what the weights are, only on their shapes and that they are random:
zeros would draw less power and run faster. So a workload needs no download.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..engine.records import Document

_STD = 0.02


@dataclass(frozen=True, kw_only=True)
class Questions:
    """Continuations that are scored given a context, several of each."""

    count: int
    options: int
    """Of each question."""
    context: int
    """Tokens that all options of a question share."""
    option: int
    """Tokens of an option."""


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What is run: a shape and documents. How it is run are an engine's settings."""

    name: str
    text: str
    """One line for people."""
    config: Mapping[str, Any]
    """config.json of the shape."""
    lengths: tuple[int, ...] = ()
    """Tokens of each document."""
    questions: Questions | None = None
    """In the place of documents."""

    def documents(self, seed: int = 0) -> list[Document]:
        """Documents of uniformly random tokens."""
        draw = np.random.default_rng(seed)

        def ids(count: int) -> np.ndarray:
            return draw.integers(0, self.config["vocab_size"], count, dtype=np.int32)

        asked = self.questions
        if asked is None:
            return [Document(doc_id=str(i), input_ids=ids(n)) for i, n in enumerate(self.lengths)]
        return [
            Document(
                doc_id=f"{question}.{option}",
                input_ids=np.concatenate([context, ids(asked.option)]),
                num_context=asked.context,
            )
            for question, context in enumerate(ids(asked.context) for _ in range(asked.count))
            for option in range(asked.options)
        ]

    def checkpoint(self, device: torch.device, seed: int = 0) -> RandomCheckpoint:
        """Weights of the shape, made where they are used."""
        return RandomCheckpoint(self.config, device, seed)


class RandomCheckpoint:
    """Stands for a `Checkpoint`: every tensor that a plain one has to hold, random."""

    folder = Path("random")

    def __init__(self, config: Mapping[str, Any], device: torch.device, seed: int) -> None:
        self.config = config
        self._draw = torch.Generator(device).manual_seed(seed)
        self._device = device
        # As checkpoints are stored.
        self._dtype = torch.bfloat16

    def __contains__(self, name: str) -> bool:
        # Asked only of what a checkpoint may or may not hold.
        return False

    def read(
        self, name: str, shape: tuple[int, ...], device: torch.device | None = None
    ) -> torch.Tensor:
        """Normal numbers; a norm's weights lie around 1."""
        centre, spread = (1.0, 0.1) if len(shape) == 1 and "norm" in name else (0.0, _STD)
        tensor = torch.empty(shape, dtype=self._dtype, device=self._device)
        return tensor.normal_(centre, spread, generator=self._draw)

    def skip(self, *names: str) -> None:
        """Nothing is left over."""

    def finish(self) -> None:
        """Nothing is held."""

    def unread(self) -> list[str]:
        """Nothing is left over."""
        return []


def _mixed(count: int, middle: float, longest: int = 8192) -> tuple[int, ...]:
    """Lengths as a web corpus has them: log-normal about exp(middle) tokens, 16 at least."""
    draw = random.Random(0)
    return tuple(min(longest, max(16, int(draw.lognormvariate(middle, 0.9)))) for _ in range(count))


_LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 131072,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
_QWEN_HALF_B = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "vocab_size": 151936,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 32768,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
}
_QWEN_32B = {
    **_QWEN_HALF_B,
    "vocab_size": 152064,
    "hidden_size": 5120,
    "intermediate_size": 27648,
    "num_hidden_layers": 64,
    "num_attention_heads": 40,
    "num_key_value_heads": 8,
    "tie_word_embeddings": False,
}
_LLAMA_70B = {
    **_LLAMA_8B,
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
}
_QWEN3_30B_A3B = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 40960,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
_MIXTRAL_8X7B = {
    **_LLAMA_8B,
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "vocab_size": 32000,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 32768,
    "rope_theta": 1000000.0,
}
_DEMO = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 4096,
    "hidden_size": 256,
    "intermediate_size": 640,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 1024,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
}

_QUESTIONS = Questions(count=150, options=4, context=500, option=10)

WORKLOADS = {
    w.name: w
    for w in (
        Workload(
            name="llama8b-mixed",
            text="Llama-3.1-8B shape, 600 documents of 16 to 8,192 tokens, mean 740",
            config=_LLAMA_8B,
            lengths=_mixed(600, 6.2),
        ),
        Workload(
            name="llama8b-long",
            text="Llama-3.1-8B shape, 48 documents of 8,192 tokens",
            config=_LLAMA_8B,
            lengths=(8192,) * 48,
        ),
        Workload(
            name="qwen0.5b-mixed",
            text="Qwen2.5-0.5B shape, 600 documents of 16 to 8,192 tokens, mean 740",
            config=_QWEN_HALF_B,
            lengths=_mixed(600, 6.2),
        ),
        Workload(
            name="qwen32b-mixed",
            text="Qwen2.5-32B shape, 120 documents of 16 to 8,192 tokens, mean 740",
            config=_QWEN_32B,
            lengths=_mixed(120, 6.2),
        ),
        Workload(
            name="llama70b-mixed",
            text="Llama-3.1-70B shape, 120 documents of 16 to 8,192 tokens, mean 740",
            config=_LLAMA_70B,
            lengths=_mixed(120, 6.2),
        ),
        Workload(
            name="qwen3-30b-a3b-mixed",
            text="Qwen3-30B-A3B shape, 8 of 128 experts a token, 600 documents, mean 740",
            config=_QWEN3_30B_A3B,
            lengths=_mixed(600, 6.2),
        ),
        Workload(
            name="mixtral-mixed",
            text="Mixtral-8x7B shape, 2 of 8 experts a token, 300 documents, mean 740",
            config=_MIXTRAL_8X7B,
            lengths=_mixed(300, 6.2),
        ),
        Workload(
            name="llama8b-256k",
            text="Llama-3.1-8B shape, one document of 262,144 tokens in one window",
            config=_LLAMA_8B | {"max_position_embeddings": 262144},
            lengths=(262144,),
        ),
        Workload(
            name="llama8b-1m-slice",
            text="4 layers of a Llama-3.1-8B shape, one document of 1,048,576 tokens in one window",
            config=_LLAMA_8B | {"num_hidden_layers": 4, "max_position_embeddings": 1048576},
            lengths=(1048576,),
        ),
        Workload(
            name="llama8b-choices",
            text="Llama-3.1-8B shape, 150 questions of 500 tokens, 4 options of 10 each",
            config=_LLAMA_8B,
            questions=_QUESTIONS,
        ),
        Workload(
            name="demo-choices",
            text="shape of the bundled model, 150 questions of 500 tokens, 4 options of 10 each",
            config=_DEMO,
            questions=_QUESTIONS,
        ),
        Workload(
            name="demo-mixed",
            text="shape of the bundled model, 80 documents of 16 to 1,024 tokens, for a CPU",
            config=_DEMO,
            lengths=_mixed(80, 5.2, longest=1024),
        ),
    )
}
"""By name."""
