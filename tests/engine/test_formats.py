"""What runs for what is stored, wished for and there; and what each format computes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from logitmill.engine import pipeline
from logitmill.engine.formats import (
    Capability,
    Dense,
    Emulated,
    Fp8Blocks,
    Fp8Rows,
    Int4Codes,
    Int4Groups,
    Int8Rows,
    Linear,
    Parts,
    make_linear,
    resolve_scheme,
)
from logitmill.engine.layouts import Stored, StoredGroup, read_stored
from logitmill.engine.weights import Groups, Plain, Quantization, Weight, round_to
from logitmill.kernels.linear import expand_int4_codes, expand_int4_fp8
from logitmill.kernels.quantize import Layout, quantize
from oracles import markov_model
from quantizers import fake_quantize

PLAIN = Stored()
AWQ = read_stored({"quantization_config": {"quant_method": "awq", "bits": 4, "group_size": 128}})
BLOCKS = read_stored(
    {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
)
STATIC = read_stored(
    {"quantization_config": {"quant_method": "fp8", "activation_scheme": "static"}}
)
SMOOTH = read_stored({"quantization_config": {"quant_method": "smooth_quant"}})
WEIGHTS_ONLY = Stored(
    "compressed-tensors",
    (StoredGroup(Quantization.FP8, "fp8, a scale per row, weights only", weight_only=True),),
)

HOPPER, ADA, AMPERE, BLACKWELL = (9, 0), (8, 9), (8, 0), (10, 0)


@pytest.mark.parametrize(
    ("stored", "wanted", "capability", "said"),
    [
        (PLAIN, None, HOPPER, "unquantized -> bfloat16"),
        (PLAIN, "none", None, "unquantized -> bfloat16"),
        (
            PLAIN,
            "fp8",
            HOPPER,
            "unquantized -> rounded to fp8, multiplied in fp8 with scales of rows",
        ),
        (
            PLAIN,
            "fp8_block",
            ADA,
            "unquantized -> rounded to fp8_block, multiplied in fp8 with scales of blocks",
        ),
        (PLAIN, "int8", AMPERE, "unquantized -> rounded to int8, multiplied in int8"),
        (
            PLAIN,
            "int8",
            None,
            "unquantized -> rounded to int8, multiplied in int8, emulated in float32",
        ),
        (PLAIN, "int4", AMPERE, "unquantized -> rounded to int4, expanded to bfloat16"),
        (
            PLAIN,
            "int4_fp8",
            HOPPER,
            "unquantized -> rounded to int4, multiplied in fp8 with scales of rows",
        ),
        (
            PLAIN,
            "int4_fp8_exact",
            HOPPER,
            "unquantized -> rounded to int4, multiplied in fp8 with scales of groups of 128, "
            "other groups expanded to bfloat16",
        ),
        (
            AWQ,
            "int4_fp8_exact",
            HOPPER,
            "awq int4, groups of 128, asymmetric -> multiplied in fp8 with scales of groups of "
            "128, other groups expanded to bfloat16",
        ),
        (
            BLOCKS,
            "int4_fp8_exact",
            None,
            "fp8, blocks of 128 x 128 -> rounded again to int4, multiplied in fp8 with scales of "
            "groups of 128, emulated in float32, other groups expanded to bfloat16",
        ),
        (AWQ, None, AMPERE, "awq int4, groups of 128, asymmetric -> expanded to bfloat16"),
        (AWQ, None, None, "awq int4, groups of 128, asymmetric -> expanded to bfloat16"),
        (AWQ, "none", HOPPER, "awq int4, groups of 128, asymmetric -> dequantized to bfloat16"),
        (
            AWQ,
            "int4_fp8",
            HOPPER,
            "awq int4, groups of 128, asymmetric -> multiplied in fp8 with scales of rows",
        ),
        (
            AWQ,
            "fp8",
            HOPPER,
            "awq int4, groups of 128, asymmetric -> rounded again to fp8, multiplied in fp8 with "
            "scales of rows",
        ),
        (
            BLOCKS,
            None,
            HOPPER,
            "fp8, blocks of 128 x 128 -> multiplied in fp8 with scales of blocks",
        ),
        (
            BLOCKS,
            None,
            AMPERE,
            "fp8, blocks of 128 x 128 -> dequantized to bfloat16: this GPU has no fp8 units",
        ),
        (
            BLOCKS,
            None,
            None,
            "fp8, blocks of 128 x 128 -> multiplied in fp8 with scales of blocks, emulated in "
            "float32",
        ),
        (
            BLOCKS,
            "int8",
            AMPERE,
            "fp8, blocks of 128 x 128 -> rounded again to int8, multiplied in int8",
        ),
        (
            STATIC,
            None,
            ADA,
            "fp8, a scale per tensor, static activation scales -> multiplied in fp8 with scales of "
            "rows, activations scaled row by row and not by the stored scales",
        ),
        (SMOOTH, None, AMPERE, "smooth_quant int8, a scale per row -> multiplied in int8"),
        (
            SMOOTH,
            None,
            (7, 5),
            "smooth_quant int8, a scale per row -> dequantized to bfloat16: this GPU has no int8 "
            "units that the kernels know",
        ),
        (
            WEIGHTS_ONLY,
            None,
            HOPPER,
            "compressed-tensors fp8, a scale per row, weights only -> dequantized to bfloat16: its "
            "activations are not quantized",
        ),
        (
            WEIGHTS_ONLY,
            "fp8",
            HOPPER,
            "compressed-tensors fp8, a scale per row, weights only -> multiplied in fp8 with "
            "scales of rows",
        ),
    ],
)
def test_the_scheme_says_what_runs(
    stored: Stored, wanted: str | None, capability: Capability, said: str
) -> None:
    assert resolve_scheme(stored, wanted, capability).describe("bfloat16") == said


@pytest.mark.parametrize(
    ("wanted", "capability", "said"),
    [
        ("int3", None, "quantization: 'int3' is not one of none, fp8, fp8_block, int8, int4"),
        (
            "fp8",
            AMPERE,
            "quantization: 'fp8' cannot run, this GPU has no fp8 units; one of none, int8, int4",
        ),
        ("int4_fp8", (8, 6), "'int4_fp8' cannot run, this GPU has no fp8 units"),
        ("int4_fp8_exact", (8, 6), "'int4_fp8_exact' cannot run, this GPU has no fp8 units"),
        (
            "int4_fp8_exact",
            ADA,
            "'int4_fp8_exact' cannot run, this GPU has compute capability 8.9, .* 9.x alone; one "
            "of none, fp8, fp8_block, int8, int4, int4_fp8 can",
        ),
        ("int4_fp8_exact", BLACKWELL, "this GPU has compute capability 10.0"),
        ("int8", (7, 5), "'int8' cannot run, .* one of none, int4 can"),
    ],
)
def test_what_cannot_run_is_refused_with_what_can(
    wanted: str, capability: Capability, said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        resolve_scheme(BLOCKS, wanted, capability)


# ---- products --------------------------------------------------------------------------------


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    """Rows of unlike size, so that a scale in the wrong place is seen."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(*shape, generator=generator)
    return values * torch.logspace(-2, 1, shape[0])[:, None]


def run(made: Linear, x: torch.Tensor) -> torch.Tensor:
    return made(quantize(x, made.layout))


def make(
    weights: list[Weight],
    wanted: str | None,
    capability: Capability,
    bias: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> Linear:
    stored = PLAIN
    kind = weights[0].kind
    if kind != Quantization.NONE:
        stored = Stored("test", (StoredGroup(kind, str(kind)),))
    return make_linear(weights, bias, resolve_scheme(stored, wanted, capability), dtype)


KINDS: dict[str, tuple[type, Layout, str]] = {
    "none": (Dense, Layout.PLAIN, "plain"),
    "fp8": (Fp8Rows, Layout.FP8_ROWS, "fp8"),
    "fp8_block": (Fp8Blocks, Layout.FP8_GROUPS, "fp8_groups"),
    "int8": (Int8Rows, Layout.INT8_ROWS, "int8"),
    "int4": (Int4Groups, Layout.PLAIN, "plain"),
    "int4_fp8": (Int4Groups, Layout.FP8_ROWS, "fp8"),
    "int4_fp8_exact": (Int4Codes, Layout.FP8_GROUPS, "fp8_groups"),
}


@pytest.mark.parametrize("wanted", KINDS)
@pytest.mark.parametrize("with_bias", [False, True])
def test_a_format_multiplies_what_it_holds(wanted: str, with_bias: bool) -> None:
    """A GPU's formats and a CPU's emulation against float64 over the rounded operands."""
    format_class, layout, activations = KINDS[wanted]
    weights: list[Weight] = [Plain(draw(n, 256, seed=n)) for n in (128, 48, 32)]
    bias = draw(208, 1, seed=1)[:, 0] if with_bias else None
    x = draw(40, 256, seed=2)
    on_gpu = make(weights, wanted, HOPPER, bias)
    on_cpu = make(weights, wanted, None, bias)
    assert isinstance(on_gpu, format_class)
    assert on_gpu.layout == on_cpu.layout == layout
    expanded = ("none", "int4")
    assert isinstance(on_cpu, format_class if wanted in expanded else Emulated)
    dense = torch.cat([w.dense(torch.float32) for w in weights])
    held = dense
    if wanted != "none":
        rounded = round_to(Quantization(wanted.split("_fp8")[0]), dense)
        assert rounded is not None
        held = rounded.dense(torch.float32)
    if wanted == "int4_fp8":
        assert isinstance(rounded, Groups)
        scale = held.abs().amax(1) * (1.0 / 448)
        held = expand_int4_fp8(rounded.numbers, scale).float() * scale[:, None]
    expected = fake_quantize(x, activations).double() @ held.double().t()
    if bias is not None:
        expected += bias
    # Sums of 256 products in float32, in whatever order; a rounding of 3 bits that fell the
    # other way would be 1e-3 and more.
    size = x.abs().amax(1, keepdim=True) * held.abs().amax(1)[None] * 16
    if bias is not None:
        size += bias.abs()
    for made in (on_gpu, on_cpu):
        got = run(made, x)
        assert got.dtype == torch.float32
        assert ((got - expected).abs() / size).max() < 1e-5


@pytest.mark.parametrize("wanted", KINDS)
def test_results_are_of_the_dtype_of_the_arithmetic(wanted: str) -> None:
    weights: list[Weight] = [Plain(draw(64, 128))]
    for capability in (None, HOPPER):
        made = make(weights, wanted, capability, dtype=torch.bfloat16)
        assert run(made, draw(16, 128).bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("wanted", "step"), [("fp8", 2**-4), ("fp8_block", 2**-4), ("int8", 0.5 / 127)]
)
def test_rounding_to_8_bits_is_to_the_nearest(wanted: str, step: float) -> None:
    weight = draw(192, 256)
    rounded = round_to(Quantization(wanted), weight)
    assert rounded is not None
    error = (rounded.dense(torch.float32) - weight).abs()
    if wanted == "int8":
        assert (error <= weight.abs().amax(1, keepdim=True) * step * 1.0001).all()
        return
    # e4m3 has three bits of mantissa above 2^-6 and steps of 2^-9 below.
    if wanted == "fp8":
        scale = weight.abs().amax(1, keepdim=True) / 448
    else:
        scale = torch.ones_like(weight)
        for rows in (slice(0, 128), slice(128, 192)):
            for columns in (slice(0, 128), slice(128, 256)):
                scale[rows, columns] = weight[rows, columns].abs().max() / 448
    assert (error <= 1.0001 * torch.maximum(weight.abs() * step, scale * 2**-10)).all()


@pytest.mark.parametrize(("columns", "size"), [(256, 128), (192, 64), (96, 32)])
def test_rounding_to_4_bits_takes_the_largest_group(columns: int, size: int) -> None:
    weight = draw(40, columns)
    # A group of one sign, one of zeros, and one number alone.
    weight[0, :size] = weight[0, :size].abs() + 1
    weight[1, :size] = 0
    weight[2, :size] = 0
    weight[2, 3] = -2
    rounded = round_to(Quantization.INT4, weight)
    assert isinstance(rounded, Groups)
    assert rounded.numbers.scales.shape == (40, columns // size)
    groups = weight.view(40, -1, size)
    low, high = groups.amin(-1).clamp_max(0), groups.amax(-1).clamp_min(0)
    bound = ((high - low).clamp_min(1e-5) / 15).repeat_interleave(size, 1)
    # Half a step for the code, half a step at the ends for the zero point, 2^-11 for the scale.
    error = (rounded.dense(torch.float32) - weight).abs()
    assert (error <= bound * 1.01).all()
    assert (error[1, :size] == 0).all()


@pytest.mark.parametrize("rows", [4096, 4096 + 128])
@pytest.mark.parametrize("kind", ["fp8", "fp8_block", "int8", "int4"])
def test_rounding_in_parts_is_rounding_the_whole(kind: str, rows: int) -> None:
    weight = draw(rows, 128)
    whole = round_to(Quantization(kind), weight)
    alone = round_to(Quantization(kind), weight[-128:])
    assert whole is not None
    assert alone is not None
    last = whole.dense(torch.float32)[-128:]
    assert torch.equal(last, alone.dense(torch.float32))


@pytest.mark.parametrize(
    ("wanted", "rows", "columns"),
    [
        ("fp8", 64, 72),
        ("fp8", 100, 64),
        ("int8", 64, 72),
        ("fp8_block", 64, 192),
        ("int4", 64, 48),
        ("int4_fp8", 100, 64),
    ],
)
def test_what_a_format_cannot_hold_is_multiplied_plain(
    wanted: str, rows: int, columns: int
) -> None:
    weight = Plain(draw(rows, columns))
    for capability in (None, HOPPER):
        made = make([weight], wanted, capability)
        assert isinstance(made, Dense)
        assert torch.equal(made.weight_NK, weight.values_NK)


def round_int4(num_rows: int, num_columns: int, seed: int = 0) -> Groups:
    rounded = round_to(Quantization.INT4, draw(num_rows, num_columns, seed=seed))
    assert isinstance(rounded, Groups)
    return rounded


def ordered(weight: Groups) -> Groups:
    """With columns that say themselves which group they are of, in another order."""
    num_columns = weight.shape[1]
    order = torch.arange(num_columns).flip(0).to(torch.int32) // 128
    return Groups(weight.numbers._replace(groups=order))


@pytest.mark.parametrize(
    "weight",
    [
        round_int4(64, 192),
        round_int4(40, 128),
        ordered(round_int4(64, 256)),
        Plain(draw(64, 192)),
        Plain(draw(40, 128)),
    ],
    ids=["groups of 64", "40 rows", "columns in order", "plain of 192", "plain of 40 rows"],
)
def test_what_exact_codes_do_not_suit_is_int4(weight: Weight) -> None:
    for capability in (None, HOPPER):
        made = make([weight], "int4_fp8_exact", capability)
        usual = make([weight], "int4", capability)
        assert isinstance(made, Int4Groups)
        assert made.layout == Layout.PLAIN
        x = draw(24, weight.shape[1], seed=3)
        assert torch.equal(run(made, x), run(usual, x))


def test_no_groups_of_4_bits_are_multiplied_plain() -> None:
    weight = Plain(draw(64, 48))
    made = make([weight], "int4_fp8_exact", HOPPER)
    assert isinstance(made, Dense)
    assert made.weight_NK is weight.values_NK


@pytest.mark.parametrize("capability", [None, HOPPER])
def test_parts_of_one_input_share_its_layout(capability: Capability) -> None:
    """All in e4m3, or all plain where one of them has to be."""
    first, second = round_int4(32, 256, seed=1), round_int4(48, 256, seed=2)
    wide = Groups(second.numbers._replace(scales=second.numbers.scales.float()))
    bias, x = draw(80, 1)[:, 0], draw(24, 256, seed=3)
    for other, layout in ((wide, Layout.FP8_GROUPS), (ordered(second), Layout.PLAIN)):
        made = make([first, other], "int4_fp8_exact", capability, bias)
        assert isinstance(made, Parts)
        assert {part.layout for part in made.linears} == {layout}
        dense = torch.cat([first.dense(torch.float32), other.dense(torch.float32)])
        rounded = x if layout == Layout.PLAIN else fake_quantize(x, "fp8_groups")
        expected = (rounded.double() @ dense.double().t() + bias).float()
        torch.testing.assert_close(run(made, x), expected, atol=1e-3, rtol=1e-4)


def test_codes_are_held_with_the_scales_of_their_groups() -> None:
    """As they are stored: nothing of the weight is rounded again."""
    weight = round_int4(64, 256)
    made = make([weight], "int4_fp8_exact", HOPPER)
    assert isinstance(made, Int4Codes)
    assert made.weight.codes is weight.numbers.codes
    steps = expand_int4_codes(made.weight).float()
    held = steps * made.weight.scales.repeat_interleave(128, 1)
    assert torch.equal(held, weight.dense(torch.float32))
    on_cpu = make([weight], "int4_fp8_exact", None)
    assert isinstance(on_cpu, Emulated)
    assert torch.equal(on_cpu.weight_NK, held)


def test_weights_of_unlike_groups_are_multiplied_apart() -> None:
    """Columns of another order, groups of another size: one after another, outputs in order."""
    first = round_int4(32, 128, seed=1)
    second = ordered(first)
    bias, x = draw(64, 1)[:, 0], draw(24, 128, seed=3)
    made = make([first, second], None, None, bias)
    assert isinstance(made, Parts)
    dense = torch.cat([first.dense(torch.float32), second.dense(torch.float32)])
    torch.testing.assert_close(run(made, x), x @ dense.t() + bias)


def test_the_same_weights_in_the_same_format_are_not_rounded_again() -> None:
    held = round_to(Quantization.INT8, draw(48, 64))
    assert held is not None
    made = make([held, held], "int8", HOPPER)
    assert isinstance(made, Int8Rows)
    assert torch.equal(made.weight_NK[48:], held.values_NK)  # type: ignore[attr-defined]


def test_a_plain_model_is_not_touched() -> None:
    """Weights as stored, nothing rounded, in the scheme that a plain config resolves to."""
    stored = read_stored({"quantization_config": None})
    assert stored == PLAIN
    weight = draw(8, 8)
    made = make_linear([Plain(weight)], None, resolve_scheme(stored, None, None), torch.float32)
    assert isinstance(made, Dense)
    assert made.weight_NK is weight


def test_a_head_of_an_odd_vocabulary_is_not_rounded(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="fp8_head: a head of 23 tokens"):
        pipeline(markov_model(tmp_path, 2), device="cpu", fp8_head=True)
