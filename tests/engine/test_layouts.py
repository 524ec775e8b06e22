"""Published layouts of quantized checkpoints: what they mean, and what they compute."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import quantizers
import torch
from logitmill.engine import pipeline
from logitmill.engine.blocks import LEAST
from logitmill.engine.checkpoint import Checkpoint
from logitmill.engine.decoder import Decoder
from logitmill.engine.families import FAMILIES
from logitmill.engine.formats import (
    Capability,
    Dense,
    Emulated,
    Int4Codes,
    Int4Groups,
    Parts,
    resolve_scheme,
)
from logitmill.engine.layouts import read_stored
from logitmill.engine.loading import load_decoder, measure
from logitmill.engine.pipeline import EngineSettings
from logitmill.engine.residency import count_bytes
from logitmill.engine.weights import Quantization, round_to
from oracles import save
from quantizers import Quantizer, compressed, fake_quantize, quantize_folder
from safetensors.torch import load_file, save_file
from test_families import from_folder, make_model, shape, write_internlm2

CPU = torch.device("cpu")
HOPPER = (9, 0)

FP8_ARGS = {"num_bits": 8, "type": "float", "symmetric": True}
INT8_ARGS = {"num_bits": 8, "type": "int", "symmetric": True}
INT4_ARGS = {"num_bits": 4, "type": "int"}
BY_TOKEN = {"strategy": "token", "dynamic": True}
BLOCK = {"strategy": "block", "block_structure": [128, 128]}
BY_GROUP = {"strategy": "group", "group_size": 128, "dynamic": True}


def int4(size: int, symmetric: bool, scale_dtype: torch.dtype = torch.bfloat16) -> Quantizer:
    strategy: dict[str, Any] = {"strategy": "group", "group_size": size}
    if size == -1:
        strategy = {"strategy": "channel"}
    weights = INT4_ARGS | strategy | {"symmetric": symmetric}
    return compressed(weights, None, "pack-quantized", scale_dtype=scale_dtype)


def eight(
    weights: dict[str, Any], inputs: dict[str, Any] | None, form: str, activations: str
) -> Quantizer:
    return compressed(weights, inputs, form, activations=activations)


LAYOUTS: dict[str, Callable[[], Quantizer]] = {
    "awq 32": lambda: quantizers.awq(32),
    "awq 128": lambda: quantizers.awq(128),
    "awq 64 symmetric": lambda: quantizers.awq(64, zero_point=False),
    "gptq": lambda: quantizers.gptq(32),
    "gptq asymmetric, biases": lambda: quantizers.gptq(64, sym=False, bias=True),
    "gptq v2 asymmetric": lambda: quantizers.gptq(32, sym=False, form="gptq_v2"),
    "gptq desc_act": lambda: quantizers.gptq(32, desc_act=True, sym=False),
    "gptq channel": lambda: quantizers.gptq(-1),
    "packed 32": lambda: int4(32, False),
    "packed 128 symmetric": lambda: int4(128, True, torch.float16),
    "packed channel": lambda: int4(-1, False),
    "packed 8 bits": lambda: eight(
        INT8_ARGS | {"strategy": "group", "group_size": 64}, None, "pack-quantized", "plain"
    ),
    "packed 8 bits channel": lambda: eight(
        INT8_ARGS | {"strategy": "channel"}, None, "pack-quantized", "plain"
    ),
    "int4 unpacked": lambda: eight(
        INT4_ARGS | {"strategy": "group", "group_size": 32, "symmetric": True},
        None,
        "int-quantized",
        "plain",
    ),
    "fp8 blocks": quantizers.fp8_blocks,
    "fp8 tensors": quantizers.fp8_tensors,
    "fp8 tensors static": lambda: quantizers.fp8_tensors(static=True),
    "compressed fp8 channel": lambda: eight(
        FP8_ARGS | {"strategy": "channel"}, FP8_ARGS | BY_TOKEN, "float-quantized", "fp8"
    ),
    "compressed fp8 tensor static": lambda: eight(
        FP8_ARGS | {"strategy": "tensor"},
        FP8_ARGS | {"strategy": "tensor"},
        "float-quantized",
        "fp8",
    ),
    "compressed fp8 block": lambda: eight(
        FP8_ARGS | BLOCK, FP8_ARGS | BY_GROUP, "float-quantized", "fp8_groups"
    ),
    "compressed int8": lambda: eight(
        INT8_ARGS | {"strategy": "channel"}, INT8_ARGS | BY_TOKEN, "int-quantized", "int8"
    ),
    "compressed fp8 weights only": lambda: eight(
        FP8_ARGS | {"strategy": "channel"}, None, "naive-quantized", "plain"
    ),
    "smooth_quant": quantizers.smooth_quant,
    "smooth_quant fp8": lambda: quantizers.smooth_quant("float8_e4m3fn"),
}


def small(**more: Any) -> dict[str, Any]:
    """Every K a multiple of 128, so that every layout holds every linear."""
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 1}
    return shape(heads=4, kv_heads=2, head_dim=64) | sizes | more


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain checkpoint to quantize."""
    return save(make_model("Llama", small(), seed=2), tmp_path_factory.mktemp("llama"))


def load(
    folder: Path,
    wanted: str | None = None,
    dtype: torch.dtype = torch.float32,
    capability: Capability = None,
) -> Decoder:
    """As the pipeline does; a capability decides the formats, the arithmetic stays the CPU's."""
    checkpoint = Checkpoint.open(folder)
    return load_decoder(
        checkpoint,
        FAMILIES[checkpoint.config["architectures"][0]],
        device=CPU,
        dtype=dtype,
        room=None,
        scheme=resolve_scheme(read_stored(checkpoint.config), wanted, capability),
    )


def logits(decoder: Decoder) -> torch.Tensor:
    """[rows, V] of all of `SEQUENCES`, packed."""
    ids = torch.zeros(LEAST, dtype=torch.int64)
    ids[: SEQUENCES.numel()] = SEQUENCES.flatten()
    with torch.inference_mode():
        hidden = decoder.hidden(ids, [len(sequence) for sequence in SEQUENCES])
        return decoder.logits(hidden[: SEQUENCES.numel()])


# Short ones, since a rounding that falls the other way reaches all later tokens of its sequence.
SEQUENCES = torch.tensor([(7 * i * i + 3 * i) % 131 for i in range(60)]).view(12, 5)


def reference(meant: Path, activations: str) -> torch.Tensor:
    """transformers in float32 over the weights that are meant, activations rounded on the way."""
    model = from_folder(meant).eval()
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            module.register_forward_pre_hook(
                lambda _, inputs: (fake_quantize(inputs[0], activations),)
            )
    with torch.inference_mode():
        return model(SEQUENCES, use_cache=False).logits.flatten(0, 1)


def dense_weights(decoder: Decoder) -> list[torch.Tensor]:
    linears = [
        linear
        for layer in decoder._layers
        for linear in (layer.qkv, layer.output, layer.feed_forward.up, layer.feed_forward.down)
    ]
    assert all(isinstance(linear, Dense) for linear in linears)
    return [linear.weight_NK for linear in linears]


def assert_rows_agree(ours: torch.Tensor, expected: torch.Tensor, activations: str) -> None:
    """Within 1e-4, but for rows in which a rounding fell the other way.

    Two computations whose activations differ by a float32's last bits round a few of some hundred
    thousand to neighbouring 8-bit numbers, which moves a row of logits by a fraction of what the
    quantization itself does.
    """
    worst = (ours - expected).abs().amax(1)
    if activations == "plain":
        assert worst.max() < 1e-4
    else:
        assert (worst < 1e-4).float().mean() >= 0.75
        assert worst.max() < 0.25 * expected.std()


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_means_what_its_writer_says(name: str, llama: Path, tmp_path: Path) -> None:
    """Weights exactly, rounded once to the dtype; logits those of transformers."""
    quantizer = LAYOUTS[name]()
    folder, meant = quantize_folder(llama, tmp_path / "quantized", quantizer)
    for dtype in (torch.float32, torch.bfloat16):
        ours = dense_weights(load(folder, "none", dtype))
        for weight, expected in zip(ours, dense_weights(load(meant, None, dtype)), strict=True):
            assert weight.dtype == dtype
            assert torch.equal(weight, expected)
    expected = reference(meant, quantizer.activations)
    assert (expected - reference(llama, "plain")).abs().max() > 0.02
    assert_rows_agree(logits(load(folder)), expected, quantizer.activations)


@pytest.mark.parametrize("capability", [None, HOPPER])
@pytest.mark.parametrize("name", LAYOUTS)
def test_headers_tell_what_layers_take(
    name: str, capability: Capability, llama: Path, tmp_path: Path
) -> None:
    folder, _ = quantize_folder(llama, tmp_path / "quantized", LAYOUTS[name]())
    checkpoint = Checkpoint.open(folder)
    scheme = resolve_scheme(read_stored(checkpoint.config), None, capability)
    told = measure(
        checkpoint,
        FAMILIES["LlamaForCausalLM"],
        dtype=torch.bfloat16,
        scheme=scheme,
        room=EngineSettings(device="cpu").resolve_room(131),
    )
    layers = load(folder, None, torch.bfloat16, capability)._layers
    assert told.placement.resident_bytes == sum(map(count_bytes, layers))


@pytest.mark.parametrize(
    ("family", "settings", "layout"),
    [
        ("Qwen2", {"num_attention_heads": 2, "num_key_value_heads": 1}, "awq 32"),
        ("Qwen2", {"num_attention_heads": 2, "num_key_value_heads": 1}, "gptq desc_act"),
        ("Qwen2", {"num_attention_heads": 2, "num_key_value_heads": 1}, "fp8 tensors"),
        ("Qwen3", {}, "fp8 blocks"),
        ("Qwen3", {"attention_bias": True, "tie_word_embeddings": True}, "compressed int8"),
        ("Mistral", {"sliding_window": 9}, "packed 32"),
        ("Llama", {"attention_bias": True, "mlp_bias": True}, "fp8 blocks"),
        # Multiples of 16 alone: blocks of rows end short, and of columns cannot be had.
        (
            "Llama",
            {"hidden_size": 144, "intermediate_size": 208, "head_dim": 80},
            "compressed fp8 channel",
        ),
        (
            "Llama",
            {"hidden_size": 160, "intermediate_size": 96, "head_dim": 80},
            "gptq asymmetric, biases",
        ),
    ],
)
def test_families_run_quantized(
    family: str, settings: dict[str, Any], layout: str, tmp_path: Path
) -> None:
    quantizer = LAYOUTS[layout]()
    model = make_model(family, small(**settings), seed=3)
    plain = save(model, tmp_path / "plain")
    folder, meant = quantize_folder(plain, tmp_path / "quantized", quantizer)
    expected = reference(meant, quantizer.activations)
    assert_rows_agree(logits(load(folder)), expected, quantizer.activations)


@pytest.mark.parametrize("layout", ["awq 32", "fp8 blocks", "smooth_quant", "gptq desc_act"])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_internlm2_is_cut_whatever_packs_it(layout: str, head_dim: int, tmp_path: Path) -> None:
    """Rows of wqkv go to queries, keys and values with their scales, zero points and blocks."""
    quantizer = LAYOUTS[layout]()
    settings = small(head_dim=head_dim, num_attention_heads=2, hidden_size=2 * head_dim)
    settings |= {"num_key_value_heads": 1 if head_dim == 128 else 2}
    source = save(make_model("Llama", settings, seed=4), tmp_path / "llama")
    plain = write_internlm2(tmp_path / "plain", source)
    folder, meant = quantize_folder(plain, tmp_path / "quantized", quantizer)
    ours = dense_weights(load(folder, "none"))
    for weight, expected in zip(ours, dense_weights(load(meant)), strict=True):
        assert torch.equal(weight, expected)
    decoder = load(folder)
    if quantizer.activations == "plain":
        assert torch.equal(logits(decoder), logits(load(meant)))
    elif layout == "fp8 blocks" and head_dim == 64:
        # Two heads share 128 rows of the packed tensor, so that rows of a part share no blocks.
        assert isinstance(decoder._layers.held[0].qkv, Dense)
    else:
        qkv = decoder._layers.held[0].qkv
        assert isinstance(qkv, Emulated)
        assert torch.equal(qkv.weight_NK, ours[0])


def test_blocks_of_parts_that_are_not_whole_stay_apart(tmp_path: Path) -> None:
    """Keys of 64 rows end in the middle of a block, so queries, keys and values are three."""
    model = make_model("Llama", small(num_attention_heads=4, num_key_value_heads=1), seed=5)
    plain = save(model, tmp_path / "plain")
    folder, _ = quantize_folder(plain, tmp_path / "quantized", quantizers.fp8_blocks())
    layer = load(folder)._layers.held[0]
    assert isinstance(layer.qkv, Parts)
    assert len(layer.qkv.linears) == 3
    assert isinstance(layer.feed_forward.up, Emulated)


def test_what_a_checkpoint_left_plain_stays_plain(tmp_path: Path) -> None:
    quantizer = quantizers.awq(32)
    plain = save(make_model("Llama", small(num_hidden_layers=2), seed=6), tmp_path / "plain")

    def keep(name: str) -> bool:
        return "k_proj" in name or "layers.1." in name

    folder, meant = quantize_folder(plain, tmp_path / "quantized", quantizer, keep=keep)
    decoder = load(folder)
    first, second = decoder._layers
    # Keys were left out, and are multiplied together with queries and values.
    assert isinstance(first.qkv, Dense)
    assert not isinstance(first.output, Dense)
    assert isinstance(second.output, Dense)
    assert (logits(decoder) - reference(meant, "plain")).abs().max() < 1e-4


def test_a_quantized_head_is_dequantized(tmp_path: Path) -> None:
    plain = save(make_model("Llama", small(vocab_size=136), seed=7), tmp_path / "plain")
    folder, meant = quantize_folder(plain, tmp_path / "quantized", quantizers.gptq(32), head=True)
    assert (logits(load(folder)) - reference(meant, "plain")).abs().max() < 1e-4


@pytest.mark.parametrize("form", [None, "gptq_v2"])
def test_gptq_keeps_zero_points_of_zero(form: str | None, llama: Path, tmp_path: Path) -> None:
    """Rows without a negative weight have them, and the first format's borrow from the next row."""
    plain = Path(shutil.copytree(llama, tmp_path / "plain"))
    change(plain, lambda t: t[f"{DOWN}.weight"][::3].abs_())
    quantizer = quantizers.gptq(32, sym=False, form=form)
    folder, meant = quantize_folder(plain, tmp_path / "quantized", quantizer)
    for ours, expected in zip(
        dense_weights(load(folder, "none")), dense_weights(load(meant)), strict=True
    ):
        assert torch.equal(ours, expected)


def test_a_quantized_cache_leaves_weights_plain() -> None:
    attention = {"weights": None, "input_activations": FP8_ARGS, "targets": ["LlamaAttention"]}
    settings = config_group() | {"config_groups": {"group_0": attention}}
    assert read_stored({"quantization_config": settings}).groups == ()


def test_scales_of_a_cache_are_no_stray_tensors(llama: Path, tmp_path: Path) -> None:
    folder, _ = quantize_folder(llama, tmp_path / "quantized", quantizers.fp8_tensors())
    change(folder, lambda t: t.update({"model.layers.0.self_attn.k_scale": torch.tensor(1.0)}))
    load(folder)


# ---- bad input -------------------------------------------------------------------------------


def change(folder: Path, edit: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")


DOWN = "model.layers.0.mlp.down_proj"


@pytest.mark.parametrize(
    ("layout", "edit", "said"),
    [
        ("fp8 blocks", lambda t: t.pop(f"{DOWN}.weight_scale_inv"), "weight_scale_inv is not in"),
        ("fp8 tensors", lambda t: t.pop(f"{DOWN}.weight_scale"), f"{DOWN}.weight_scale"),
        ("smooth_quant", lambda t: t.pop(f"{DOWN}.scale"), f"{DOWN}.scale is not in"),
        ("awq 32", lambda t: t.pop(f"{DOWN}.scales"), f"{DOWN}.scales is not in"),
        ("awq 32", lambda t: t.pop(f"{DOWN}.qzeros"), f"{DOWN}.qzeros is not in"),
        ("awq 32", lambda t: t.pop(f"{DOWN}.qweight"), f"{DOWN}.weight is not in"),
        ("packed 32", lambda t: t.pop(f"{DOWN}.weight_scale"), f"{DOWN}.weight_scale is not in"),
        (
            "gptq",
            lambda t: t.update({f"{DOWN}.scales": torch.ones(3, 128)}),
            r"scales .* has shape \[3, 128\], but the config calls for \[8, 128\]",
        ),
        (
            "fp8 blocks",
            lambda t: t.update({f"{DOWN}.weight_scale_inv": torch.ones(2, 2)}),
            r"has shape \[2, 2\], but the config calls for \[1, 2\]",
        ),
        (
            "packed 32",
            lambda t: t.update({f"{DOWN}.weight_shape": torch.tensor([128, 128])}),
            r"weight_shape .* says \[128, 128\], but the config calls for \[128, 256\]",
        ),
        (
            "gptq desc_act",
            lambda t: t[f"{DOWN}.g_idx"].fill_(8),
            r"g_idx .* names groups 8 to 8, but there are 0 to 7",
        ),
        (
            "awq 32",
            lambda t: t[f"{DOWN}.scales"][0, 0].fill_(float("nan")),
            f"{DOWN}.scales .* holds NaN or infinite",
        ),
        (
            "compressed int8",
            lambda t: t[f"{DOWN}.weight_scale"][3].fill_(float("inf")),
            f"{DOWN}.weight_scale .* holds NaN or infinite",
        ),
        (
            "fp8 tensors",
            lambda t: t[f"{DOWN}.weight"].view(torch.uint8)[3, 3].fill_(0x7F),
            f"{DOWN}.weight .* holds NaN or infinite",
        ),
        (
            "fp8 tensors",
            lambda t: t.update({f"{DOWN}.weight": torch.ones(128, 256, dtype=torch.int8)}),
            "is stored as torch.int8, but quantization_config calls for torch.float8_e4m3fn",
        ),
        (
            "awq 32",
            lambda t: t.update({f"{DOWN}.weight": torch.ones(128, 256)}),
            "have no place in LlamaForCausalLM",
        ),
    ],
)
def test_broken_tensors_are_named(
    layout: str,
    edit: Callable[[dict[str, torch.Tensor]], Any],
    said: str,
    llama: Path,
    tmp_path: Path,
) -> None:
    folder, _ = quantize_folder(llama, tmp_path / "quantized", LAYOUTS[layout]())
    change(folder, edit)
    with pytest.raises(ValueError, match=said):
        load(folder)


def test_8_bit_weights_that_no_config_explains_are_refused(llama: Path, tmp_path: Path) -> None:
    folder, _ = quantize_folder(llama, tmp_path / "quantized", quantizers.smooth_quant())
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"is stored as torch\.int8, and config\.json does not"):
        load(folder)


def config_group(**changes: Any) -> dict[str, Any]:
    group = {
        "weights": INT8_ARGS | {"strategy": "channel"},
        "input_activations": INT8_ARGS | BY_TOKEN,
        "targets": ["Linear"],
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "config_groups": {"group_0": group | changes},
    }


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            {"quant_method": "bitsandbytes"},
            "quant_method 'bitsandbytes' cannot be run, only one of awq, gptq, compressed-tensors",
        ),
        ({"bits": 4}, "quant_method None"),
        ({"quant_method": "gptq", "bits": 3}, "bits 3 cannot be run, only 4"),
        ({"quant_method": "gptq", "bits": 8}, "bits 8 cannot be run, only 4"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 24}, "group_size 24"),
        (
            {"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"},
            "checkpoint_format 'marlin' cannot be run, only 'gptq' and 'gptq_v2'",
        ),
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "version 'gemv'"),
        ({"quant_method": "fp8", "weight_block_size": [64, 64]}, r"weight_block_size \[64, 64\]"),
        ({"quant_method": "fp8", "activation_scheme": "some"}, "activation_scheme 'some'"),
        (
            {"quant_method": "smooth_quant", "quant_dtype": "float8_e5m2"},
            "quant_dtype 'float8_e5m2' cannot be run, only one of int8, float8_e4m3fn, fp8",
        ),
        (config_group() | {"format": "nvfp4-pack-quantized"}, "format 'nvfp4-pack-quantized'"),
        (config_group() | {"sparsity_config": {"format": "sparse-24"}}, "sparsity_config"),
        (
            config_group(weights=INT8_ARGS | {"strategy": "channel", "symmetric": False}),
            "weights.symmetric False cannot be run, only true",
        ),
        (
            config_group(input_activations=INT8_ARGS | BY_TOKEN | {"symmetric": False}),
            "input_activations.symmetric False cannot be run, only true",
        ),
        (config_group(weights=INT8_ARGS | {"strategy": "group"}), "weights.strategy 'group'"),
        (
            config_group(weights=FP8_ARGS | BLOCK | {"block_structure": [64, 128]}),
            r"weights.block_structure \[64, 128\]",
        ),
        (
            config_group(weights=INT4_ARGS | {"num_bits": 2}, format="pack-quantized"),
            "weights 'int of 2 bits, pack-quantized'",
        ),
    ],
)
def test_settings_that_cannot_run_are_named(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        read_stored({"quantization_config": settings})


# ---- rounding while loading ------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("wanted", "activations"),
    [("fp8", "fp8"), ("fp8_block", "fp8_groups"), ("int8", "int8"), ("int4", "plain")],
)
def test_plain_checkpoints_are_rounded_while_they_load(
    wanted: str, activations: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    """Whatever they are stored in, against transformers over the same rounded weights."""
    model = make_model("Qwen3", small(), seed=10)
    plain = save(model, tmp_path / "plain", dtype)
    decoder = load(plain, wanted)

    def round_weight(weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        rounded = round_to(Quantization(wanted), weight)
        assert rounded is not None
        return {"weight": weight}, rounded.dense(torch.float32)

    _, meant = quantize_folder(plain, tmp_path / "rounded", Quantizer({}, round_weight))
    assert_rows_agree(logits(decoder), reference(meant, activations), activations)


@pytest.mark.parametrize(
    ("layout", "wanted"),
    [
        ("awq 32", "fp8"),
        ("awq 32", "fp8_block"),
        ("awq 32", "int8"),
        ("fp8 blocks", "fp8"),
        ("fp8 blocks", "int8"),
        ("fp8 blocks", "int4_fp8"),
        ("fp8 blocks", "int4_fp8_exact"),
        ("smooth_quant", "int4"),
    ],
)
def test_one_quantization_is_turned_into_another(
    layout: str, wanted: str, llama: Path, tmp_path: Path
) -> None:
    """From what is meant: the same as rounding the dequantized checkpoint."""
    folder, meant = quantize_folder(llama, tmp_path / "quantized", LAYOUTS[layout]())
    assert torch.equal(logits(load(folder, wanted)), logits(load(meant, wanted)))


@pytest.mark.parametrize(
    ("quantizer", "exact"),
    [
        (quantizers.awq(128), True),
        (quantizers.gptq(128), True),
        (quantizers.gptq(128, sym=False, form="gptq_v2"), True),
        (quantizers.awq(32), False),
        (quantizers.gptq(128, desc_act=True), False),
    ],
    ids=["awq", "gptq", "gptq v2", "awq 32", "gptq desc_act"],
)
def test_codes_of_four_bits_are_multiplied_exactly(
    quantizer: Quantizer, exact: bool, tmp_path: Path
) -> None:
    """Activations are all that is rounded, and nothing is where groups do not suit."""
    # K of 256 throughout: with a single group, an order of columns is none.
    model = make_model("Llama", small(hidden_size=256), seed=2)
    folder, meant = quantize_folder(save(model, tmp_path / "plain"), tmp_path / "q", quantizer)
    activations = "fp8_groups" if exact else "plain"
    expected = reference(meant, activations)
    for capability, made in ((None, Emulated), (HOPPER, Int4Codes)):
        decoder = load(folder, "int4_fp8_exact", capability=capability)
        layer = decoder._layers.held[0]
        for linear in (layer.qkv, layer.output, layer.feed_forward.up, layer.feed_forward.down):
            assert isinstance(linear, made if exact else Int4Groups)
        assert_rows_agree(logits(decoder), expected, activations)


def test_gpu_formats_compute_what_the_cpu_emulates(llama: Path, tmp_path: Path) -> None:
    """The formats that a GPU would run, through the kernels' plain definitions."""
    for layout in ("fp8 tensors", "fp8 blocks", "smooth_quant"):
        quantizer = LAYOUTS[layout]()
        folder, _ = quantize_folder(llama, tmp_path / layout, quantizer)
        on_gpu = logits(load(folder, capability=HOPPER))
        assert_rows_agree(on_gpu, logits(load(folder)), quantizer.activations)


def test_a_plain_checkpoint_is_not_called_quantized(tmp_path: Path, demo_folder: Path) -> None:
    shutil.copytree(demo_folder, tmp_path / "model")
    config = json.loads((tmp_path / "model/config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4, "group_size": 128}
    (tmp_path / "model/config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="says gptq, but no tensor is stored so"):
        pipeline(tmp_path / "model", device="cpu")
