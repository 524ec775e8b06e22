"""Models and numbers that are known without the engine: what the tests compare it with.

`table_model` and its kin write real Llama checkpoints whose attention and feed-forward parts
are zero, so that the logits after a token are a table's row and every score has a closed form.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

# ---- closed forms ----------------------------------------------------------------------------


def entropy(p: np.ndarray) -> float:
    """-sum p log p, nats."""
    seen = p[p > 0]
    return float(-(seen * np.log(seen)).sum())


def varentropy(p: np.ndarray) -> float:
    """sum p (log p)^2 - entropy^2, nats^2."""
    seen = p[p > 0]
    return float((seen * np.log(seen) ** 2).sum() - entropy(p) ** 2)


def circulant(size: int, stay: float, step: float, uniform: float) -> np.ndarray:
    """Transitions that stay, go to the next state, or go anywhere."""
    eye = np.eye(size)
    return stay * eye + step * np.roll(eye, 1, axis=1) + uniform / size


def zipf(size: int) -> np.ndarray:
    """Probabilities in proportion to 1 / rank."""
    weight = 1.0 / np.arange(1, size + 1)
    return weight / weight.sum()


def successor(size: int, odds: float = 60.0) -> np.ndarray:
    """Logits of a model that is sure of the id after the current one."""
    return odds * np.roll(np.eye(size), 1, axis=1)


def row_statistics_float64(logits: np.ndarray, targets: np.ndarray) -> dict[str, np.ndarray]:
    """Every statistic of every row, in float64 and by its definition."""
    z = logits.astype(np.float64)
    top = z.max(1, keepdims=True)
    log_total = np.log(np.exp(z - top).sum(1))
    log_p = z - top - log_total[:, None]
    p = np.exp(log_p)
    weighted = np.where(p > 0, p * log_p, 0.0)
    mean = weighted.sum(1)
    rows = np.arange(len(z))
    return {
        "logprob": log_p[rows, targets],
        "entropy": -mean,
        "varentropy": np.where(p > 0, p * (log_p - mean[:, None]) ** 2, 0.0).sum(1),
        "rank": 1 + (z > z[rows, targets][:, None]).sum(1),
        "top1_id": z.argmax(1),
        "top1_logprob": log_p.max(1),
        "logsumexp": top[:, 0] + log_total,
    }


# ---- checkpoints -----------------------------------------------------------------------------


def write_model(
    folder: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, torch.Tensor],
    tokenizer: Any = None,
) -> Path:
    """A model folder in Hugging Face layout."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(dict(config)))
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "model.safetensors")
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return folder


def shard(folder: Path, num_files: int) -> Path:
    """Spread the tensors of a folder over several files with an index, as large models are."""
    from safetensors.torch import load_file

    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map = {}
    names = sorted(tensors)
    for i in range(num_files):
        file = f"model-{i + 1:05d}-of-{num_files:05d}.safetensors"
        part = {name: tensors[name] for name in names[i::num_files]}
        save_file(part, folder / file)
        weight_map.update(dict.fromkeys(part, file))
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def _inert_llama(
    embedding_VD: torch.Tensor,
    norm_D: torch.Tensor,
    head_VD: torch.Tensor,
    max_positions: int,
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """A Llama of one layer that adds nothing: logits = head @ (rms_norm(embedding) * norm)."""
    vocab_size, hidden = embedding_VD.shape
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocab_size,
        "hidden_size": hidden,
        "intermediate_size": 2,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "head_dim": 2,
        "hidden_act": "silu",
        "rms_norm_eps": 0.0,
        "max_position_embeddings": max_positions,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
    }
    layer = "model.layers.0"
    tensors = {
        "model.embed_tokens.weight": embedding_VD,
        "model.norm.weight": norm_D,
        "lm_head.weight": head_VD,
        f"{layer}.input_layernorm.weight": torch.ones(hidden),
        f"{layer}.post_attention_layernorm.weight": torch.ones(hidden),
        f"{layer}.self_attn.q_proj.weight": torch.zeros(2, hidden),
        f"{layer}.self_attn.k_proj.weight": torch.zeros(2, hidden),
        f"{layer}.self_attn.v_proj.weight": torch.zeros(2, hidden),
        f"{layer}.self_attn.o_proj.weight": torch.zeros(hidden, 2),
        f"{layer}.mlp.gate_proj.weight": torch.zeros(2, hidden),
        f"{layer}.mlp.up_proj.weight": torch.zeros(2, hidden),
        f"{layer}.mlp.down_proj.weight": torch.zeros(hidden, 2),
    }
    return config, {name: tensor.float() for name, tensor in tensors.items()}


def table_model(
    folder: Path, logits_VV: np.ndarray, *, max_positions: int = 64, tokenizer: Any = None
) -> Path:
    """Logits after token i are row i of a table: an order-1 Markov chain over the vocabulary.

    Embeddings are one-hot. RMS normalisation multiplies a one-hot row by sqrt(V), which the final
    norm's weight takes back.
    """
    size = len(logits_VV)
    config, tensors = _inert_llama(
        torch.eye(size),
        torch.full((size,), size**-0.5),
        torch.from_numpy(np.ascontiguousarray(logits_VV.T)),
        max_positions,
    )
    return write_model(folder, config, tensors, tokenizer)


def constant_model(
    folder: Path, logits_V: np.ndarray, *, max_positions: int = 64, tokenizer: Any = None
) -> Path:
    """The same logits after every token."""
    hidden = 4
    head_VD = torch.zeros(len(logits_V), hidden)
    head_VD[:, 0] = torch.from_numpy(logits_V)
    embedding_VD = torch.ones(len(logits_V), hidden)
    config, tensors = _inert_llama(embedding_VD, torch.ones(hidden), head_VD, max_positions)
    return write_model(folder, config, tensors, tokenizer)


def randomise(model: torch.nn.Module, seed: int, std: float = 0.25) -> torch.nn.Module:
    """Weights wide enough that logits differ between tokens and positions; norms near 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if weight.ndim == 1 and "norm" in name and name.endswith("weight"):
                weight.copy_(1.0 + 0.2 * noise)
            elif weight.ndim == 1:
                weight.copy_(std * noise)
            else:
                weight.copy_(noise * min(std, 1.5 * weight.shape[-1] ** -0.5))
    return model


def save(model: Any, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """A transformers model as a folder, its weights stored in `dtype`."""
    model.to(dtype).save_pretrained(folder)
    return folder


def markov_model(folder: Path, order: int, *, vocab_size: int = 23, seed: int = 0) -> Path:
    """A model whose logits depend on the last `order` tokens and on nothing before them.

    One layer of random weights that sees a sliding window: position enters only as the distance
    between two tokens.
    """
    from transformers import MistralConfig, MistralForCausalLM

    config = MistralConfig(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        sliding_window=order,
        max_position_embeddings=512,
        bos_token_id=None,
        eos_token_id=None,
    )
    return save(randomise(MistralForCausalLM(config), seed, std=0.5), folder)


# ---- tokenizers ------------------------------------------------------------------------------


def byte_tokenizer(*, specials: Sequence[str] = (), bos: str | None = None) -> Any:
    """One token a byte: id = byte. Special tokens take the ids from 256."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {spelling: byte for byte, spelling in enumerate(byte_spellings())}
    backend = Tokenizer(models.BPE(vocabulary, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in specials])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=bos)


def byte_spellings() -> list[str]:
    """GPT-2's character for each byte: printable ones spell themselves."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    spelling = {b: chr(b) for b in printable}
    spelling.update({b: chr(256 + i) for i, b in enumerate(others)})
    return [spelling[b] for b in range(256)]


def assert_spans_tile(text: str, starts: Sequence[int], ends: Sequence[int]) -> None:
    """Spans touch, go forward and cover the whole text."""
    assert starts[0] == 0
    assert ends[-1] == len(text.encode())
    assert list(starts[1:]) == list(ends[:-1])
    assert all(a <= b for a, b in zip(starts, ends, strict=True))


def reference_logits(model: Any, ids: Sequence[int]) -> torch.Tensor:
    """transformers' logits of one sequence, by a fresh model: some remember past lengths."""
    with torch.inference_mode():
        return model.eval()(torch.tensor([list(ids)]), use_cache=False).logits[0].float()


def share_of_pages(key: str, process: int) -> int:
    """Bytes that a process has mapped, each page divided by the number of those who have it."""
    total, counts = 0, False
    for line in Path(f"/proc/{process}/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-", line):
            counts = f"/memfd:logitmill-{key}-" in line
        elif counts and line.startswith("Pss:"):
            total += int(line.split()[1]) << 10
    return total
