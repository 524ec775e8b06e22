"""Sparse experts against transformers' own modules, and each format against what it means."""

from __future__ import annotations

import importlib
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from logitmill.engine.experts import (
    GroupedDense,
    GroupedEmulated,
    GroupedFp8Blocks,
    GroupedFp8Rows,
    GroupedInt4,
    GroupedInt8Rows,
    GroupedLinear,
    SparseExperts,
    make_grouped,
    route,
)
from logitmill.engine.formats import Capability, Dense, make_linear, resolve_scheme
from logitmill.engine.layouts import Stored, StoredGroup
from logitmill.engine.mxfp4 import dequantize_mxfp4
from logitmill.engine.spec import Experts, FeedForward, Router
from logitmill.engine.weights import Blocks, Groups, Plain, Quantization, Weight, round_to
from logitmill.kernels.quantize import Layout, quantize

HOPPER = (9, 0)
HIDDEN, SIZE, NUM_EXPERTS, TOP_K = 64, 48, 16, 4


@dataclass(frozen=True)
class Family:
    """transformers' block of one family, and what it is as a spec."""

    module: str
    prefix: str
    block: str
    settings: dict[str, Any]
    router: Router
    activation: str = "silu"
    shared: int | None = None
    shared_gate: bool = False


_BASE = {"num_experts": NUM_EXPERTS, "top_k": TOP_K}
_QWEN = {
    "num_experts": NUM_EXPERTS,
    "num_local_experts": NUM_EXPERTS,
    "moe_intermediate_size": SIZE,
    "norm_topk_prob": True,
}
_DEEPSEEK = {
    "n_routed_experts": NUM_EXPERTS,
    "moe_intermediate_size": SIZE,
    "n_shared_experts": 2,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 2.5,
    "norm_topk_prob": True,
}
_SIGMOID = Router(
    **_BASE,
    scores="sigmoid",
    normalised=True,
    scale=2.5,
    correction=True,
    num_groups=4,
    top_groups=2,
)
FAMILIES = {
    "mixtral": Family(
        "mixtral",
        "Mixtral",
        "SparseMoeBlock",
        {"num_local_experts": NUM_EXPERTS, "intermediate_size": SIZE},
        Router(**_BASE, normalised=True),
    ),
    "qwen2_moe": Family(
        "qwen2_moe",
        "Qwen2Moe",
        "SparseMoeBlock",
        {**_QWEN, "norm_topk_prob": False, "shared_expert_intermediate_size": 80},
        Router(**_BASE),
        shared=80,
        shared_gate=True,
    ),
    "qwen3_moe": Family(
        "qwen3_moe", "Qwen3Moe", "SparseMoeBlock", _QWEN, Router(**_BASE, normalised=True)
    ),
    "olmoe": Family(
        "olmoe",
        "Olmoe",
        "SparseMoeBlock",
        {"num_experts": NUM_EXPERTS, "intermediate_size": SIZE, "norm_topk_prob": False},
        Router(**_BASE),
    ),
    "gpt_oss": Family(
        "gpt_oss",
        "GptOss",
        "MLP",
        {"num_local_experts": NUM_EXPERTS, "intermediate_size": SIZE},
        Router(**_BASE, scores="softmax_top", bias=True),
        activation="swiglu_clamped",
    ),
    "deepseek_v3": Family("deepseek_v3", "DeepseekV3", "MoE", _DEEPSEEK, _SIGMOID, shared=2 * SIZE),
    "deepseek_v3 without groups": Family(
        "deepseek_v3",
        "DeepseekV3",
        "MoE",
        {**_DEEPSEEK, "n_group": 1, "topk_group": 1, "norm_topk_prob": False},
        replace(_SIGMOID, num_groups=1, top_groups=1, normalised=False),
        shared=2 * SIZE,
    ),
    "minimax_m2": Family(
        "minimax_m2",
        "MiniMaxM2",
        "SparseMoeBlock",
        {"num_local_experts": NUM_EXPERTS, "intermediate_size": SIZE},
        Router(**_BASE, scores="sigmoid", normalised=True, correction=True),
    ),
}


def build(family: Family) -> torch.nn.Module:
    """transformers' block with random weights, large enough that choices differ."""
    base = f"transformers.models.{family.module}"
    config_class = getattr(
        importlib.import_module(f"{base}.configuration_{family.module}"), f"{family.prefix}Config"
    )
    settings = {"hidden_size": HIDDEN, "num_experts_per_tok": TOP_K, **family.settings}
    config = config_class(num_hidden_layers=1, **settings)
    config._experts_implementation = "eager"
    modeling = importlib.import_module(f"{base}.modeling_{family.module}")
    block = getattr(modeling, family.prefix + family.block)(config).eval()
    generator = torch.Generator().manual_seed(0)
    for name, tensor in [*block.named_parameters(), *block.named_buffers()]:
        scale = 1.0 if "bias" in name else tensor.shape[-1] ** -0.5
        # Scores after a sigmoid are within 1.
        scale *= 0.2 if "correction" in name else 1.0
        # Scores of unlike size, so that clamps and groups are met.
        scale *= 4.0 if "gate_up_proj" in name or "router" in name else 1.0
        tensor.data = scale * torch.randn(tensor.shape, generator=generator)
    return block


def read(family: Family, block: Any, dtype: torch.dtype = torch.float32) -> SparseExperts:
    """The same weights as the engine holds them."""
    gate = block.router if family.module == "gpt_oss" else block.gate
    held = block.experts
    gate_up, down = held.gate_up_proj.data, held.down_proj.data
    gate_up_bias = down_bias = None
    if family.module == "gpt_oss":
        # Transposed, and gate and up take turns.
        gate_up, down = gate_up.transpose(1, 2), down.transpose(1, 2)
        gate_up = torch.cat([gate_up[:, 0::2], gate_up[:, 1::2]], 1)
        bias = held.gate_up_proj_bias.data
        gate_up_bias = torch.cat([bias[:, 0::2], bias[:, 1::2]], 1).to(dtype)
        down_bias = held.down_proj_bias.data.to(dtype)
    correction = {**dict(block.named_buffers())}
    shared = getattr(block, "shared_expert", None) or getattr(block, "shared_experts", None)
    expert = FeedForward(size=SIZE, activation=family.activation)
    both = None
    if shared is not None:
        joined = torch.cat([shared.gate_proj.weight.data, shared.up_proj.weight.data])
        both = (Dense(joined.to(dtype)), Dense(shared.down_proj.weight.data.to(dtype)))
    shared_gate = getattr(block, "shared_expert_gate", None)
    return SparseExperts(
        spec=Experts(
            router=family.router,
            expert=expert,
            shared=None if family.shared is None else FeedForward(size=family.shared),
            shared_gate=family.shared_gate,
        ),
        router_ED=gate.weight.data,
        router_bias_E=gate.bias.data if family.router.bias else None,
        correction_E=next(iter(correction.values())) if family.router.correction else None,
        gate_up=GroupedDense(gate_up.contiguous().to(dtype), gate_up_bias),
        down=GroupedDense(down.contiguous().to(dtype), down_bias),
        shared=both,
        shared_gate_1D=None if shared_gate is None else shared_gate.weight.data,
    )


def tokens(num_tokens: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(num_tokens, HIDDEN, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", FAMILIES)
@torch.inference_mode()
def test_a_block_is_transformers_own(name: str) -> None:
    family = FAMILIES[name]
    block = build(family)
    x = tokens(150)
    expected = block(x[None])
    expected = (expected[0] if isinstance(expected, tuple) else expected)[0]
    out = read(family, block)(x)
    assert expected.abs().mean() > 0.1
    error = (out - expected).abs().max() / expected.abs().max()
    assert error < 1e-5


@pytest.mark.parametrize("name", FAMILIES)
@torch.inference_mode()
def test_routes_are_transformers_own(name: str) -> None:
    family = FAMILIES[name]
    block: Any = build(family)
    router = block.router if family.module == "gpt_oss" else block.gate
    x = tokens(400)
    correction = dict(block.named_buffers())
    correction_E = next(iter(correction.values())) if family.router.correction else None
    needs = [x, correction_E] if family.module == "minimax_m2" else [x]
    logits, expected, ids = router(*needs)
    weights_TK, ids_TK = route(logits, family.router, correction_E)
    assert weights_TK.dtype == torch.float32 and ids_TK.dtype == torch.int64
    assert len(ids_TK.unique()) > NUM_EXPERTS // 2
    # transformers leaves the chosen in any order.
    order, own = ids.argsort(-1), ids_TK.argsort(-1)
    assert torch.equal(ids.gather(1, order), ids_TK.gather(1, own))
    torch.testing.assert_close(
        weights_TK.gather(1, own), expected.gather(1, order), atol=1e-7, rtol=1e-6
    )


def test_of_equal_scores_the_first_is_chosen() -> None:
    router = Router(num_experts=8, top_k=3)
    logits = torch.zeros(5, 8)
    logits[:, 6] = 1
    _, ids = route(logits, router)
    assert ids.tolist() == [[6, 0, 1]] * 5
    grouped = replace(router, scores="sigmoid", num_groups=4, top_groups=2)
    _, ids = route(torch.zeros(5, 8), grouped, torch.full((8,), -1.0))
    assert ids.tolist() == [[0, 1, 2]] * 5


def test_a_correction_decides_the_choice_alone() -> None:
    router = Router(num_experts=4, top_k=2, scores="sigmoid", correction=True)
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    weights, ids = route(logits, router, torch.tensor([0.0, 0.0, 0.0, 9.0]))
    assert ids.tolist() == [[3, 0]]
    torch.testing.assert_close(weights, torch.tensor([[-1.0, 2.0]]).sigmoid())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", FAMILIES)
@torch.inference_mode()
def test_a_token_has_the_same_bits_in_any_batch(name: str, dtype: torch.dtype) -> None:
    family = FAMILIES[name]
    sparse = read(family, build(family), dtype)
    # A decoder's blocks have at least as many rows.
    x = tokens(1024).to(dtype)
    together = sparse(x)
    assert together.dtype == dtype
    turned = sparse(x.roll(300, 0))
    assert torch.equal(turned.roll(-300, 0), together)
    beside = torch.cat([x[77:78], tokens(511, seed=2).to(dtype)])
    assert torch.equal(sparse(beside)[0], together[77])
    beside = torch.cat([x[77:78], torch.zeros(511, HIDDEN, dtype=dtype)])
    assert torch.equal(sparse(beside)[0], together[77])


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU takes no tensors of the CPU")
@pytest.mark.parametrize("wanted", ["none", "fp8", "fp8_block", "int8", "int4", "int4_fp8_exact"])
@pytest.mark.parametrize("name", ["qwen2_moe", "gpt_oss", "deepseek_v3"])
@torch.inference_mode()
def test_the_kernels_make_the_same_block(
    name: str, wanted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a GPU runs, interpreted, against the definitions."""
    pytest.importorskip("triton")
    family = FAMILIES[name]
    size = "moe_intermediate_size" if name != "gpt_oss" else "intermediate_size"
    settings = {**family.settings, "hidden_size": 128, size: 128}
    shared = 2 * 128 if name == "deepseek_v3" else family.shared
    family = replace(family, settings=settings, shared=shared)
    plain = read(family, build(family), torch.bfloat16)

    def rounded(held: GroupedLinear) -> GroupedLinear:
        assert isinstance(held, GroupedDense)
        weights: list[Weight] = [Plain(weight_NK) for weight_NK in held.weight_ENK]
        return make(weights, wanted, HOPPER, held.bias_EN, torch.bfloat16)

    made = replace(plain, gate_up=rounded(plain.gate_up), down=rounded(plain.down))
    x = torch.randn(24, 128, generator=torch.Generator().manual_seed(3)).bfloat16()
    expected = made(x)
    monkeypatch.setattr("logitmill.kernels.experts.has_triton", lambda x: True)
    out = made(x)
    assert out.dtype == torch.bfloat16
    # Some activations fall to the other side of a tie.
    error = (out.float() - expected.float()).norm() / expected.float().norm()
    assert error < 0.01


# ---- formats ---------------------------------------------------------------------------------


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    """Rows of unlike size, so that a scale in the wrong place is seen."""
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return values * torch.logspace(-1, 1, shape[0])[:, None]


def make(
    weights: list[Weight],
    wanted: str | None,
    capability: Capability,
    bias: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> GroupedLinear:
    kind = weights[0].kind
    stored = Stored()
    if kind != Quantization.NONE:
        stored = Stored("test", (StoredGroup(kind, str(kind)),))
    return make_grouped(weights, bias, resolve_scheme(stored, wanted, capability), dtype)


# Experts have none, one, many rows.
OFFSETS = torch.tensor([0, 5, 5, 6, 36], dtype=torch.int32)
ROWS = {0: slice(0, 5), 2: slice(5, 6), 3: slice(6, 36)}
KINDS: dict[str, tuple[type, Layout]] = {
    "none": (GroupedDense, Layout.PLAIN),
    "fp8": (GroupedFp8Rows, Layout.FP8_ROWS),
    "fp8_block": (GroupedFp8Blocks, Layout.FP8_GROUPS),
    "int8": (GroupedInt8Rows, Layout.INT8_ROWS),
    "int4": (GroupedInt4, Layout.PLAIN),
    "int4_fp8": (GroupedInt4, Layout.FP8_ROWS),
    "int4_fp8_exact": (GroupedInt4, Layout.FP8_GROUPS),
}


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("num_rows", [144, 256])
@pytest.mark.parametrize("wanted", KINDS)
def test_experts_are_the_linears_of_their_format(
    wanted: str, num_rows: int, with_bias: bool
) -> None:
    """Each expert's rows are what `make_linear` of its weight alone makes of them."""
    kind, layout = KINDS[wanted]
    weights: list[Weight] = [Plain(draw(num_rows, 256, seed=e)) for e in range(4)]
    bias = torch.randn(4, num_rows, generator=torch.Generator().manual_seed(9))
    x = draw(36, 256, seed=5)
    for capability in (None, HOPPER):
        made = make(weights, wanted, capability, bias if with_bias else None)
        assert made.layout == layout and made.shape == (4, num_rows, 256)
        plain = wanted in ("none", "int4")
        assert type(made) is (kind if capability or plain else GroupedEmulated)
        out = made(quantize(x, layout), OFFSETS)
        assert out.dtype == torch.float32 and out.shape == (36, num_rows)
        scheme = resolve_scheme(Stored(), wanted, capability)
        for e, rows in ROWS.items():
            alone = make_linear([weights[e]], bias[e] if with_bias else None, scheme, torch.float32)
            expected = alone(quantize(x[rows], layout))
            torch.testing.assert_close(out[rows], expected, atol=2e-3, rtol=1e-5)


@pytest.mark.parametrize("wanted", KINDS)
def test_results_are_of_the_dtype_of_the_arithmetic(wanted: str) -> None:
    weights: list[Weight] = [Plain(draw(64, 128, seed=e)) for e in range(4)]
    for capability in (None, HOPPER):
        made = make(weights, wanted, capability, dtype=torch.bfloat16)
        out = made(quantize(draw(36, 128).bfloat16(), made.layout), OFFSETS)
        assert out.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("wanted", "rows", "columns"),
    [("fp8", 64, 72), ("int8", 100, 64), ("fp8_block", 64, 192), ("int4", 64, 48)],
)
def test_what_a_format_cannot_hold_is_multiplied_plain(
    wanted: str, rows: int, columns: int
) -> None:
    for capability in (None, HOPPER):
        made = make([Plain(draw(rows, columns))] * 2, wanted, capability)
        assert isinstance(made, GroupedDense)


def test_experts_that_are_stored_unlike_are_multiplied_plain() -> None:
    rounded = round_to(Quantization.FP8, draw(48, 64))
    assert rounded is not None
    made = make([rounded, Plain(draw(48, 64))], None, HOPPER)
    assert isinstance(made, GroupedDense)
    assert torch.equal(made.weight_ENK[0], rounded.dense(torch.float32))


def test_what_is_stored_in_a_format_is_not_rounded_again() -> None:
    held = [round_to(Quantization.INT8, draw(48, 64, seed=e)) for e in range(3)]
    made = make([weight for weight in held if weight is not None], "int8", HOPPER)
    assert isinstance(made, GroupedInt8Rows)
    for e, weight in enumerate(held):
        assert torch.equal(made.weight_ENK[e], weight.values_NK)  # type: ignore[union-attr]
        assert torch.equal(made.scale_EN[e], weight.scales_N1[:, 0])  # type: ignore[union-attr]


def test_blocks_that_rows_do_not_share_have_scales_of_rows() -> None:
    """Gate above up, neither a multiple of 128 rows."""
    weights: list[Weight] = []
    for e in range(4):
        halves = [round_to(Quantization.FP8_BLOCK, draw(80, 256, seed=s)) for s in (e, 9 + e)]
        assert isinstance(halves[0], Blocks) and isinstance(halves[1], Blocks)
        weights.append(
            Blocks(
                torch.cat([half.values_NK for half in halves]),  # type: ignore[union-attr]
                torch.cat([half.scales_NB for half in halves]),  # type: ignore[union-attr]
            )
        )
    made = make(weights, "fp8_block", HOPPER)
    assert isinstance(made, GroupedFp8Blocks) and made.scales_EBG.shape == (4, 160, 2)
    x = quantize(draw(36, 256), Layout.FP8_GROUPS)
    out, expected = made(x, OFFSETS), make(weights, "fp8_block", None)(x, OFFSETS)
    torch.testing.assert_close(out, expected, atol=1e-3, rtol=1e-5)


def round_int4(num_columns: int, seed: int) -> Groups:
    rounded = round_to(Quantization.INT4, draw(64, num_columns, seed=seed))
    assert isinstance(rounded, Groups)
    return rounded


def in_order_of_its_own(weight: Groups, seed: int) -> Groups:
    order = torch.randperm(weight.shape[1], generator=torch.Generator().manual_seed(seed)) // 128
    return Groups(weight.numbers._replace(groups=order.to(torch.int32)))


@pytest.mark.parametrize("wanted", ["int4", "int4_fp8", "int4_fp8_exact"])
@pytest.mark.parametrize("scratch", [1, 2 * 64 * 256 * 4, 1 << 30])
@pytest.mark.parametrize("ordered", [False, True])
def test_four_bits_are_expanded_a_few_experts_at_a_time(
    wanted: str, scratch: int, ordered: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever they are cut into, and where columns have an order of their own in each expert."""
    monkeypatch.setattr("logitmill.engine.experts._SCRATCH_BYTES", scratch)
    weights = [round_int4(256, seed=e) for e in range(4)]
    if ordered:
        weights = [in_order_of_its_own(weight, seed=e) for e, weight in enumerate(weights)]
    bias = torch.randn(4, 64)
    made = make(list(weights), wanted, HOPPER, bias)
    assert isinstance(made, GroupedInt4)
    assert made.shape == (4, 64, 256)
    num_parts = 4 if ordered or scratch == 1 else 2 if scratch < 1 << 30 else 1
    assert len(made.parts) == num_parts
    x = quantize(draw(36, 256, seed=3), made.layout)
    out = made(x, OFFSETS)
    for e, rows in ROWS.items():
        stored = Stored("test", (StoredGroup(Quantization.INT4, "int4"),))
        scheme = resolve_scheme(stored, wanted, HOPPER)
        alone = make_linear([weights[e]], bias[e], scheme, torch.float32)
        assert alone.layout == made.layout
        few = x._replace(
            values_TK=x.values_TK[rows], scales=None if x.scales is None else x.scales[rows]
        )
        torch.testing.assert_close(out[rows], alone(few), atol=1e-3, rtol=1e-5)


@pytest.mark.parametrize("wanted", [name for name in KINDS if name != "none"])
@torch.inference_mode()
def test_a_quantized_block_is_near_the_plain_one(wanted: str) -> None:
    """Scales that follow their rows through sorting: every step off would be of order one."""
    family = FAMILIES["mixtral"]
    wide = {"intermediate_size": 128, "hidden_size": 128}
    block = build(replace(family, settings={**family.settings, **wide}))
    plain = read(family, block)
    held = block.experts
    weights = [list(map(Plain, w.data)) for w in (held.gate_up_proj, held.down_proj)]  # type: ignore[union-attr]
    gate_up, down = (make(list(w), wanted, None) for w in weights)
    made = replace(plain, gate_up=gate_up, down=down)
    # Rows of unlike size.
    x = draw(600, 128, seed=4)
    error = (made(x) - plain(x)).norm(dim=1) / plain(x).norm(dim=1)
    assert error.max() < (0.35 if wanted.startswith("int4") else 0.12)


# ---- mxfp4 -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_mxfp4_is_transformers_own(dtype: torch.dtype) -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, 256, (3, 24, 5, 16), dtype=torch.uint8, generator=generator)
    scales = torch.randint(90, 140, (3, 24, 5), dtype=torch.uint8, generator=generator)
    out = dequantize_mxfp4(blocks, scales, dtype)
    assert out.shape == (3, 24, 160) and out.dtype == dtype
    expected = convert_moe_packed_tensors(blocks, scales, dtype=dtype)
    # As x @ weight takes it.
    assert torch.equal(out, expected.transpose(1, 2))
    # One expert alone.
    assert torch.equal(dequantize_mxfp4(blocks[1], scales[1], dtype), out[1])


def test_mxfp4_of_other_shapes_is_refused() -> None:
    blocks = torch.zeros(2, 4, 3, 16, dtype=torch.uint8)
    with pytest.raises(ValueError, match="mxfp4: blocks"):
        dequantize_mxfp4(blocks, torch.zeros(2, 4, 2, dtype=torch.uint8), torch.float32)


def test_the_clamped_gate_is_gpt_oss_own() -> None:
    from logitmill.kernels.activations import SWIGLU_CLAMPED, gate

    family = FAMILIES["gpt_oss"]
    held: Any = build(family).experts
    gate_up = 8 * torch.randn(50, 2 * SIZE, generator=torch.Generator().manual_seed(0))
    assert (gate_up.abs() > 7).any()
    turns = torch.stack(gate_up.chunk(2, -1), -1).flatten(1)
    out = gate(gate_up, SWIGLU_CLAMPED, Layout.PLAIN).values_TK
    torch.testing.assert_close(out, held._apply_gate(turns), atol=1e-5, rtol=1e-6)
    assert F.mse_loss(out, gate_up[:, :SIZE]) > 1
