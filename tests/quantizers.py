"""Quantized checkpoints in the layouts that others publish, written without the engine.

`quantize_folder` turns a plain model folder into a quantized one, and into a second plain one whose
linears hold what the quantized numbers mean. Where a format has a library that writes it
(compressed-tensors), the library packs and dequantizes; the others follow their published packing,
bit by bit in numpy.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

Tensors = dict[str, torch.Tensor]
Write = Callable[[torch.Tensor], tuple[Tensors, torch.Tensor]]
"""weight [N, K] -> (tensors by the end of their names, what they mean as float32 [N, K])."""


@dataclass(frozen=True)
class Quantizer:
    """One layout with its settings."""

    config: dict[str, Any]
    """quantization_config."""
    write: Write
    activations: str = "plain"
    """How the layout means its activations: `plain`, `int8`, `fp8`, `fp8_groups`."""
    extra: Tensors = field(default_factory=dict)
    """More tensors that the layout's checkpoints carry beside every linear."""


def is_linear(name: str, tensor: torch.Tensor) -> bool:
    tables = ("embed_tokens", "tok_embeddings", "lm_head", "output.weight")
    return tensor.ndim == 2 and not any(table in name for table in tables)


def quantize_folder(
    plain: Path,
    folder: Path,
    quantizer: Quantizer,
    *,
    keep: Callable[[str], bool] = lambda name: False,
    head: bool = False,
) -> tuple[Path, Path]:
    """(the quantized folder, a plain folder of its meaning); `keep` names what stays plain."""
    tensors = load_file(plain / "model.safetensors")
    written: Tensors = {}
    meant: Tensors = {}
    for name, tensor in tensors.items():
        chosen = is_linear(name, tensor) or (head and name == "lm_head.weight")
        if not chosen or keep(name):
            written[name] = meant[name] = tensor
            continue
        stem = name.removesuffix(".weight")
        parts, meant[name] = quantizer.write(tensor.float())
        assert meant[name].shape == tensor.shape
        for end, part in (parts | quantizer.extra).items():
            written[f"{stem}.{end}"] = part
    config = json.loads((plain / "config.json").read_text())
    for where, content, settings in (
        (folder, written, config | {"quantization_config": quantizer.config}),
        (folder.with_name(folder.name + "-meant"), meant, config),
    ):
        where.mkdir(parents=True)
        (where / "config.json").write_text(json.dumps(settings))
        # Quantizers of old wrote tensors as they came: a copy each, laid out anew.
        save_file(
            {k: v.contiguous().clone() for k, v in content.items()}, where / "model.safetensors"
        )
    return folder, folder.with_name(folder.name + "-meant")


# ---- int4 ------------------------------------------------------------------------------------


def _round_int4(
    weight: np.ndarray, size: int, symmetric: bool, order: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """codes [N, K], zeros [N, S], scales [N, S] float16, and the group of each column [K]."""
    num_rows, num_columns = weight.shape
    size = num_columns if size == -1 else size
    groups = np.arange(num_columns) // size if order is None else order
    num_groups = groups.max() + 1
    codes = np.zeros((num_rows, num_columns), np.int64)
    zeros = np.full((num_rows, num_groups), 8, np.int64)
    scales = np.zeros((num_rows, num_groups), np.float16)
    for g in range(num_groups):
        part = weight[:, groups == g]
        if symmetric:
            scale = (np.abs(part).max(1) / 7).astype(np.float16)
        else:
            low, high = np.minimum(part.min(1), 0), np.maximum(part.max(1), 0)
            scale = ((high - low) / 15).astype(np.float16)
            zeros[:, g] = np.clip(np.round(-low / scale), 0, 15)
        scales[:, g] = scale
        step = scale.astype(np.float64)[:, None]
        codes[:, groups == g] = np.clip(np.round(part / step) + zeros[:, g][:, None], 0, 15)
    return codes, zeros, scales, groups


def _meaning(
    codes: np.ndarray, zeros: np.ndarray, scales: np.ndarray, groups: np.ndarray
) -> torch.Tensor:
    steps = (codes - zeros[:, groups]).astype(np.float32)
    return torch.from_numpy(steps * scales.astype(np.float32)[:, groups])


def _pack(values: np.ndarray, order: tuple[int, ...]) -> torch.Tensor:
    """[R, C] -> int32 [R, C / 8]: bits 4i to 4i + 3 hold column `order[i]` of eight."""
    packed = np.zeros((values.shape[0], values.shape[1] // 8), np.uint32)
    for i, column in enumerate(order):
        packed |= values[:, column::8].astype(np.uint32) << np.uint32(4 * i)
    return torch.from_numpy(packed.view(np.int32))


def awq(size: int = 32, *, zero_point: bool = True) -> Quantizer:
    """AutoAWQ's GEMM layout (`awq/modules/linear/gemm.py`)."""
    order = (0, 2, 4, 6, 1, 3, 5, 7)

    def write(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        codes, zeros, scales, groups = _round_int4(weight.numpy(), size, not zero_point)
        tensors = {
            "qweight": _pack(codes.T, order),
            "scales": torch.from_numpy(scales.T.copy()),
        }
        if zero_point:
            tensors["qzeros"] = _pack(zeros.T, order)
        return tensors, _meaning(codes, zeros, scales, groups)

    config = {
        "quant_method": "awq",
        "bits": 4,
        "group_size": size,
        "version": "gemm",
        "zero_point": zero_point,
        "modules_to_not_convert": None,
    }
    return Quantizer(config, write)


def gptq(
    size: int = 32,
    *,
    sym: bool = True,
    desc_act: bool = False,
    form: str | None = None,
    bias: bool = False,
) -> Quantizer:
    """GPTQModel's layout; `form` is `checkpoint_format`, whose first one stores zeros less one.

    It takes the ones off eight zeros at once (`convert_gptq_v2_to_v1_format_module`).
    """
    in_turn = tuple(range(8))

    def write(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        num_rows, num_columns = weight.shape
        order = None
        if desc_act:
            # Of the same layer input, the same order: what GPTQ's Hessian gives q, k and v.
            draw = np.random.default_rng(num_columns)
            order = draw.permutation(np.arange(num_columns) // size)
        codes, zeros, scales, groups = _round_int4(weight.numpy(), size, sym, order)
        packed_zeros = _pack(zeros.T, in_turn)
        tensors = {
            "qweight": _pack(codes, in_turn).t().contiguous(),
            "qzeros": packed_zeros if form == "gptq_v2" else packed_zeros - 0x11111111,
            "scales": torch.from_numpy(scales.T.copy()),
            "g_idx": torch.from_numpy(groups.astype(np.int32)),
        }
        if bias:
            tensors["bias"] = torch.zeros(num_rows, dtype=torch.float16)
        return tensors, _meaning(codes, zeros, scales, groups)

    config = {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": size,
        "sym": sym,
        "desc_act": desc_act,
        "damp_percent": 0.01,
        "true_sequential": True,
    }
    return Quantizer(config | ({"checkpoint_format": form} if form else {}), write)


# ---- 8 bits ----------------------------------------------------------------------------------


def _to_fp8(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return (weight / scale).clamp(-448, 448).to(torch.float8_e4m3fn)


def fp8_blocks() -> Quantizer:
    """DeepSeek-V3's: `weight_scale_inv` per 128 x 128, the last block of a row or column short."""

    def write(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        num_rows, num_columns = weight.shape
        scales = torch.zeros(-(-num_rows // 128), -(-num_columns // 128))
        values = torch.zeros(weight.shape, dtype=torch.float8_e4m3fn)
        meant = torch.zeros(weight.shape)
        for i in range(scales.shape[0]):
            for j in range(scales.shape[1]):
                at = (slice(128 * i, 128 * i + 128), slice(128 * j, 128 * j + 128))
                scales[i, j] = weight[at].abs().max() / 448
                values[at] = _to_fp8(weight[at], scales[i, j])
                meant[at] = values[at].float() * scales[i, j]
        return {"weight": values, "weight_scale_inv": scales}, meant

    config = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
    }
    return Quantizer(config, write, "fp8_groups")


def fp8_tensors(*, static: bool = False) -> Quantizer:
    """AutoFP8's: a scale per tensor."""

    def write(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        scale = weight.abs().max() / 448
        values = _to_fp8(weight, scale)
        return {"weight": values, "weight_scale": scale}, values.float() * scale

    extra = {"input_scale": torch.tensor(0.02)} if static else {}
    config = {"quant_method": "fp8", "activation_scheme": "static" if static else "dynamic"}
    return Quantizer(config, write, "fp8", extra)


def smooth_quant(dtype: str | None = None) -> Quantizer:
    """LMDeploy's `lite smooth_quant`: `scale` float32 [N, 1]; older ones name no dtype."""

    def write(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        largest = weight.abs().amax(1, keepdim=True)
        if dtype == "float8_e4m3fn":
            scale = largest / 448
            values = _to_fp8(weight, scale)
        else:
            scale = largest / 127
            values = (weight / scale).round().clamp(-127, 127).to(torch.int8)
        return {"weight": values, "scale": scale}, values.float() * scale

    config = {"quant_method": "smooth_quant"} | ({"quant_dtype": dtype} if dtype else {})
    return Quantizer(config, write, "fp8" if dtype == "float8_e4m3fn" else "int8")


# ---- compressed-tensors ----------------------------------------------------------------------


def compressed(
    weights: dict[str, Any],
    inputs: dict[str, Any] | None,
    form: str,
    *,
    scale_dtype: torch.dtype = torch.bfloat16,
    activations: str = "plain",
) -> Quantizer:
    """What the library itself writes, and says it means, for these arguments."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams

    scheme = QuantizationScheme(
        targets=["Linear"], weights=weights, input_activations=inputs, format=form
    )
    args = scheme.weights
    assert args is not None
    library = BaseCompressor.load_from_registry(form)

    def write(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        spans = span_weights(weight, args)
        scale, zero = calculate_qparams(spans.amin(-1), spans.amax(-1), args)
        scale = scale.to(scale_dtype)
        state = {"weight": weight, "weight_scale": scale}
        if not args.symmetric:
            state["weight_zero_point"] = zero
        tensors = library.compress(state, scheme)
        wide = dict(tensors) | {"weight_scale": tensors["weight_scale"].float()}
        return tensors, library.decompress(wide, scheme)["weight"].float()

    config = QuantizationConfig(
        config_groups={"group_0": scheme},
        format=form,
        ignore=["lm_head"],
        quantization_status="compressed",
    )
    extra = {}
    if inputs is not None and not inputs.get("dynamic"):
        extra["input_scale"] = torch.tensor([0.02], dtype=scale_dtype)
    return Quantizer(json.loads(config.model_dump_json()), write, activations, extra)


def span_weights(weight: torch.Tensor, args: Any) -> torch.Tensor:
    """The weights that share a scale, in the last dimension."""
    if args.strategy == "tensor":
        return weight.view(1, -1)
    if args.strategy == "channel":
        return weight[:, None]
    if args.strategy == "group":
        return weight.unflatten(1, (-1, args.group_size))
    rows, columns = (-(-n // 128) * 128 for n in weight.shape)
    padded = torch.zeros(rows, columns)
    padded[: weight.shape[0], : weight.shape[1]] = weight
    return padded.view(rows // 128, 128, columns // 128, 128).transpose(1, 2).flatten(2)


# ---- activations -----------------------------------------------------------------------------


def fake_quantize(x: torch.Tensor, how: str) -> torch.Tensor:
    """Activations rounded as a layout means them, by the textbook: x / scale, scale = max / top."""
    if how == "plain":
        return x
    wide = x.double()
    if how == "fp8_groups":
        wide = wide.unflatten(-1, (-1, 128))
    scale = wide.abs().amax(-1, keepdim=True).clamp_min(1e-12) / (127 if how == "int8" else 448)
    if how == "int8":
        rounded = (wide / scale).round()
    else:
        rounded = (wide / scale).float().to(torch.float8_e4m3fn).double()
    return (rounded * scale).view(x.shape).float()
