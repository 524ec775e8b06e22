"""Whole checkpoints as other libraries write them, against those libraries' own dequantization.

compressed-tensors and AutoAWQ quantize, pack and dequantize here with their own code. GPTQModel
asks for another torch than ours; what its code was found to write is in `quantizers.gptq`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from logitmill.engine import pipeline
from oracles import save
from quantizers import span_weights
from safetensors.torch import save_file
from test_families import make_model
from test_layouts import (
    BLOCK,
    BY_GROUP,
    BY_TOKEN,
    FP8_ARGS,
    INT4_ARGS,
    INT8_ARGS,
    SEQUENCES,
    assert_rows_agree,
    dense_weights,
    load,
    reference,
    small,
)

Args = dict[str, Any]


def by_group(size: int, symmetric: bool, **more: Any) -> Args:
    return INT4_ARGS | {"strategy": "group", "group_size": size, "symmetric": symmetric} | more


# Weights, activations, and how the latter are rounded.
SCHEMES: dict[str, tuple[Args, Args | None, str]] = {
    f"pack-quantized {size}{'' if symmetric else ' asymmetric'}": (
        by_group(size, symmetric),
        None,
        "plain",
    )
    for size in (32, 64, 128)
    for symmetric in (True, False)
} | {
    "pack-quantized actorder": (by_group(32, False, actorder="weight"), None, "plain"),
    "pack-quantized channel": (
        INT4_ARGS | {"strategy": "channel", "symmetric": False},
        None,
        "plain",
    ),
    "pack-quantized 8 bits channel": (INT8_ARGS | {"strategy": "channel"}, None, "plain"),
    "pack-quantized 8 bits": (INT8_ARGS | {"strategy": "group", "group_size": 128}, None, "plain"),
    "pack-quantized 8 bits actorder": (
        INT8_ARGS | {"strategy": "group", "group_size": 32, "actorder": "weight"},
        None,
        "plain",
    ),
    "int-quantized 4 bits": (by_group(32, True), INT8_ARGS | BY_TOKEN, "plain"),
    "int-quantized 4 bits asymmetric": (by_group(64, False), INT8_ARGS | BY_TOKEN, "plain"),
    "float-quantized tensor": (
        FP8_ARGS | {"strategy": "tensor"},
        FP8_ARGS | {"strategy": "tensor"},
        "fp8",
    ),
    "float-quantized channel": (FP8_ARGS | {"strategy": "channel"}, FP8_ARGS | BY_TOKEN, "fp8"),
    "float-quantized block": (FP8_ARGS | BLOCK, FP8_ARGS | BY_GROUP, "fp8_groups"),
    "naive-quantized channel": (FP8_ARGS | {"strategy": "channel"}, None, "plain"),
    "int-quantized channel": (INT8_ARGS | {"strategy": "channel"}, INT8_ARGS | BY_TOKEN, "int8"),
    "int-quantized tensor": (INT8_ARGS | {"strategy": "tensor"}, INT8_ARGS | BY_TOKEN, "int8"),
}


def make_llama() -> Any:
    return make_model("Llama", small(), seed=2)


def write_compressed(folder: Path, weights: Args, inputs: Args | None) -> str:
    """Quantize to nearest and save as llm-compressor does; returns the format it chose."""
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import (
        QuantizationConfig,
        QuantizationScheme,
        apply_quantization_config,
    )
    from compressed_tensors.quantization.utils import calculate_qparams

    model = make_llama().to(torch.bfloat16)
    scheme = QuantizationScheme(targets=["Linear"], weights=weights, input_activations=inputs)
    config = QuantizationConfig(config_groups={"group_0": scheme}, ignore=["lm_head"])
    apply_quantization_config(model, config)
    for module in model.modules():
        if not hasattr(module, "quantization_scheme"):
            continue
        args = module.quantization_scheme.weights
        spans = span_weights(module.weight.data.float(), args)
        scale, zero = calculate_qparams(spans.amin(-1), spans.amax(-1), args)
        module.weight_scale.data.copy_(scale.view_as(module.weight_scale))
        module.weight_zero_point.data.copy_(zero.view_as(module.weight_zero_point))
        if hasattr(module, "input_scale"):
            module.input_scale.data.fill_(0.02)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(folder)
    compressor.update_config(str(folder))
    return json.loads((folder / "config.json").read_text())["quantization_config"]["format"]


def decompressed(folder: Path) -> dict[str, torch.Tensor]:
    """Every parameter after transformers has loaded and the library has dequantized."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.hf_quantizer.compressor.decompress_model(model)
    return model.state_dict()


def plain_folder(folder: Path, tensors: dict[str, torch.Tensor]) -> Path:
    """A plain checkpoint of these tensors; what else there is beside them is left out."""
    model = make_llama()
    model.load_state_dict({name: tensors[name].float() for name in model.state_dict()})
    return save(model, folder)


def assert_means(folder: Path, meant: Path, activations: str) -> None:
    """Weights to the bit; logits of the pipeline as those of transformers over what is meant."""
    ours, expected = dense_weights(load(folder, "none")), dense_weights(load(meant))
    for weight, other in zip(ours, expected, strict=True):
        assert torch.equal(weight, other)
    scored = pipeline(folder, device="cpu").get_logits(SEQUENCES)
    assert_rows_agree(torch.cat(list(scored)), reference(meant, activations), activations)


@pytest.mark.parametrize("name", SCHEMES)
def test_compressed_tensors(name: str, tmp_path: Path) -> None:
    weights, inputs, activations = SCHEMES[name]
    chosen = write_compressed(tmp_path / "quantized", weights, inputs)
    assert chosen == name.split()[0]
    meant = plain_folder(tmp_path / "meant", decompressed(tmp_path / "quantized"))
    assert_means(tmp_path / "quantized", meant, activations)


@pytest.mark.parametrize("size", [32, 64, 128])
def test_autoawq(size: int, tmp_path: Path) -> None:
    # It asks for triton, which Linux alone has.
    pytest.importorskip("awq")
    from awq.models._config import AwqConfig
    from awq.modules.linear.gemm import WQLinear_GEMM
    from awq.quantize.quantizer import AwqQuantizer
    from awq.utils.packing_utils import dequantize_gemm

    # Its constructor searches scales on a data set; what it does with them needs none.
    quantizer = object.__new__(AwqQuantizer)
    quantizer.w_bit, quantizer.group_size = 4, size
    quantizer.zero_point, quantizer.version = True, "gemm"
    model = make_llama()
    linears = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head"
    }
    quantizer._apply_quant(model, linears)
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    meant = dict(tensors)
    for name in linears:
        module = model.get_submodule(name)
        assert isinstance(module, WQLinear_GEMM)
        # Its scales are float16; in float32 the product is not rounded a second time.
        codes, zeros, scales = module.qweight, module.qzeros, module.scales.float()
        meant[f"{name}.weight"] = dequantize_gemm(codes, zeros, scales, 4, size).t()
    config = model.config.to_dict() | {"architectures": ["LlamaForCausalLM"]}
    written = AwqConfig(quant_method="awq", q_group_size=size).to_transformers_dict()
    (tmp_path / "quantized").mkdir()
    save_file(tensors, tmp_path / "quantized/model.safetensors")
    (tmp_path / "quantized/config.json").write_text(
        json.dumps(config | {"quantization_config": written})
    )
    assert_means(tmp_path / "quantized", plain_folder(tmp_path / "meant", meant), "plain")
