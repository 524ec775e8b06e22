"""Compile every kernel as it ships for the GPUs it ships to, without a GPU; print what it takes.

    python tests/kernels/compile_kernels.py [NAME ...]

NAME picks kernels by the beginning of their name. Exit status 1 if any does not compile, takes
more shared memory than a block may have, or spills registers. It needs a process of its own, in
which Triton does not interpret.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

os.environ.pop("TRITON_INTERPRET", None)

import triton
import triton.language as tl
from logitmill.kernels.gpu import (
    activations,
    attention,
    experts,
    frequencies,
    linear,
    logits,
    norms,
    quantize,
    rotary,
    sampling,
    tree_attention,
)
from logitmill.kernels.quantize import Layout
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

SHARED = {80: 166_912, 89: 101_376, 90: 232_448}
"""Bytes of shared memory that a block may have, by compute capability."""
FP8 = (89, 90)
"""e4m3 does not exist before."""


class Case(NamedTuple):
    """One kernel as one launch compiles it."""

    kernel: Any
    signature: dict[str, str]
    """Types of the arguments that are not constants, in Triton's notation; `i32:16` is an
    integer divisible by 16. Pointers and descriptors are aligned, as torch allocates them."""
    constants: dict[str, Any]
    options: dict[str, Any]
    targets: tuple[int, ...] = tuple(SHARED)


def _int8(tiles: linear.Tiles) -> tuple[dict[str, Any], dict[str, Any]]:
    constants = {
        "HAS_BIAS": True,
        "BM": tiles.rows,
        "BN": tiles.columns,
        "BK": tiles.depth,
        "BAND": tiles.band,
    }
    options = {"num_warps": tiles.warps, "num_stages": tiles.stages, "enable_fp_fusion": False}
    return constants, options


def _int8_tma(tiles: linear.Tiles, dtype: Any = tl.bfloat16) -> Case:
    constants, options = _int8(tiles)
    width = tiles.columns // tiles.parts
    signature = {
        "x": f"tensordesc<i8[{tiles.rows}, {tiles.depth}]>",
        "w": f"tensordesc<i8[{tiles.columns}, {tiles.depth}]>",
        "out": f"tensordesc<{dtype.name}[{tiles.rows}, {width}]>",
        **SCALES,
        **SIZES,
    }
    more = {"PARTS": tiles.parts, "PERSISTENT": tiles.persistent, "DTYPE": dtype}
    return Case(linear._int8_tma, signature, constants | more, options, (90,))


SCALES = {"x_scale": "*fp32", "w_scale": "*fp32", "bias": "*bf16"}
SIZES = {"M": "i32", "N": "i32:16", "K": "i32:16"}
INT8 = {"x": "*i8", "w": "*i8", "out": "*bf16", **SCALES, **SIZES}
BLOCKS = {"x": "*fp8e4nv", "w": "*fp8e4nv", "out": "*bf16", **SCALES, **SIZES}
BLOCKS |= {"x_stride": "i32", "w_stride": "i32"}
EXPAND = {
    "codes": "*i32",
    "scales": "*fp16",
    "zeros": "*u8",
    "row_scale": "*fp32",
    "groups": "*i32",
    "out": "*bf16",
    "num_lines": "i32",
    "in_row": "i32",
    "in_group": "i32",
}
EXPAND_FLAGS = {
    "HAS_SCALES": True,
    "HAS_ZEROS": True,
    "HAS_ROW_SCALE": False,
    "HAS_GROUPS": False,
    "LINES": linear._PROGRAM // linear._LINE,
    "WORDS": linear._LINE // 8,
}
SCATTERED = {"HAS_GROUPS": True, "LINES": linear._PROGRAM_SCATTERED // linear._LINE}
EXPAND_OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}


def _by_rows(
    kernel: Any,
    inputs: dict[str, str],
    layout: Layout,
    num_columns: int,
    **more: Any,
) -> Case:
    """A kernel that ends in `quantize.store_rows`."""
    fp8 = layout in (Layout.FP8_ROWS, Layout.FP8_GROUPS)
    values = "*fp8e4nv" if fp8 else "*i8" if layout == Layout.INT8_ROWS else "*bf16"
    block, rows, warps = quantize.shape_program(num_columns)
    constants = {
        "num_columns": num_columns,
        "LAYOUT": quantize.LAYOUTS[layout],
        "ROWS": rows,
        "BLOCK": block,
    }
    signature = {**inputs, "values": values, "scales": "*fp32", "num_rows": "i32"}
    options = {"num_warps": warps, "enable_fp_fusion": False}
    return Case(kernel, signature, constants | more, options, FP8 if fp8 else tuple(SHARED))


NORM = {"x": "*bf16", "delta": "*bf16", "weight": "*bf16", "bias": "*bf16"}
NORM |= {"eps": "fp32", "scale": "fp32"}
RMS = {"HAS_DELTA": True, "SCALED": False, "NORM": True, "CENTRED": False, "HAS_BIAS": False}
LAYER = {"HAS_DELTA": True, "SCALED": True, "NORM": True, "CENTRED": True, "HAS_BIAS": True}
ROTATE = {
    "heads": "*bf16",
    "out": "*bf16",
    "cos": "*fp32",
    "sin": "*fp32",
    "q_norm": "*bf16",
    "k_norm": "*bf16",
    "num_tokens": "i32",
    "stride": "i32:16",
    "out_stride": "i32:16",
    "eps": "fp32",
}


def _rotate(size: int, half: int, norm: bool, moves: bool = True) -> Case:
    constants = {
        "num_heads": 40,
        "num_queries": 32,
        "D": size,
        "R": half,
        "NORM": norm,
        "MOVES": moves,
        "TOKENS": rotary._TOKENS,
        "HEADS": rotary._HEADS,
        "HALF": triton.next_power_of_2(max(half, size - 2 * half) if norm or moves else half),
    }
    return Case(rotary._rotate, ROTATE, constants, {"num_warps": 4, "enable_fp_fusion": False})


def _attend(
    size: int,
    *,
    window: bool = False,
    cap: bool = False,
    sinks: bool = False,
    forked: bool = False,
) -> Case:
    """The launch of `attention.attend` for a head size, with the tiles that it ships."""
    padded = max(64, triton.next_power_of_2(size))
    queries, keys, warps, stages = attention.CONFIGS[padded]
    signature = {
        "queries": f"tensordesc<bf16[{queries}, {padded}]>",
        "keys": f"tensordesc<bf16[{keys}, {padded}]>",
        "values": f"tensordesc<bf16[{keys}, {padded}]>",
        "out": "*bf16",
        "tiles": "*i32",
        "sinks": "*fp32",
        "scale": "fp32",
        "soft_cap": "fp32",
        "window": "i32",
    }
    constants = {
        "num_heads": 32,
        "heads_per_group": 4,
        "D": size,
        "BLOCK_D": padded,
        "BM": queries,
        "BN": keys,
        "WINDOW": window,
        "CAP": cap,
        "SINKS": sinks,
        "FORKED": forked,
    }
    options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}
    return Case(attention._attend, signature, constants, options, (90,))


ROWS = {"logits": "*fp32", "num_columns": "i32:16", "row_stride": "i32:16"}
TOP_K = {"logits": "*i32", "maxima": "*i32", "tiles": "*i32", "slots": "*i32"}
TOP_K |= {"num_tiles": "i32", "row_stride": "i32:16", "k": "i32"}


def _row_statistics(tiles: bool, *, aligned: bool = True) -> Case:
    signature = {
        **(ROWS if aligned else {"logits": "*fp32", "num_columns": "i32", "row_stride": "i32"}),
        "targets": "*i64",
        "out": "*fp32",
        "maxima": "*fp32",
        "totals": "*fp32",
        "num_rows": "i32",
        "out_stride": "i32",
    }
    constants = {"TILES": tiles, "DEPTH": logits._DEPTH, "LANES": logits._LANES}
    return Case(logits._row_statistics, signature, constants, {"num_warps": logits._WARPS})


def _choose_slots(k: int, *, enough: bool = True) -> Case:
    room = triton.next_power_of_2(k)
    constants = {
        "KEPT": k,
        "ENOUGH": enough,
        "TILES": room,
        "PART": min(room * logits.TILE, logits._PART),
    }
    signature = {**TOP_K, "num_columns": "i32"}
    return Case(logits._choose_slots, signature, constants, {"num_warps": logits.slot_warps(room)})


def _sort(k: int) -> Case:
    constants = {"KEPT": k, "BLOCK": triton.next_power_of_2(k)}
    signature = {**TOP_K, "ids": "*i32", "values": "*fp32"}
    return Case(logits._sort, signature, constants, {"num_warps": 1 if k <= 64 else 4})


def _log_tail_mass(k: int) -> Case:
    signature = {
        **ROWS,
        "ids": "*i32",
        "top_id": "*i32",
        "top_logprob": "*fp32",
        "maxima": "*fp32",
        "totals": "*fp32",
        "out": "*fp32",
        "num_tiles": "i32",
        "k": "i32",
    }
    constants = {"ENTRIES": triton.next_power_of_2(k), "AGAIN": logits._AGAIN, "BLOCK": 2048}
    return Case(logits._log_tail_mass, signature, constants, {"num_warps": logits._WARPS})


def _narrow(dtype: str) -> Case:
    signature = {**ROWS, "top_id": "*i32", "top_logprob": "*fp32", "out": f"*{dtype}"}
    signature |= {"num_rows": "i32", "out_stride": "i32:16"}
    constants = {"LOGPROBS": True, "BLOCK": logits._BLOCK}
    return Case(logits._narrow, signature, constants, {"num_warps": 4})


def _multiply_experts(
    tiles: linear.Tiles,
    scales: Any,
    operand: str,
    *,
    weight: str | None = None,
    out: str = "bf16",
    targets: tuple[int, ...] = tuple(SHARED),
    **fixed: int,
) -> Case:
    """A launch of `experts.multiply`; `scales` is one of the kernel's own names of them."""
    weight = weight or operand
    signature = {"x": f"*{operand}", "w": f"*{weight}", "out": f"*{out}", **SCALES}
    signature |= {"tiles": "*i32", "offsets": "*i32", "N": "i32:16", "K": "i32:16"}
    signature |= {"x_group": "i32", "w_rows": "i32"}
    constants = {
        "SCALES": scales.value,
        "HAS_BIAS": True,
        "SUM": tl.int32 if operand == "i8" else tl.float32,
        "BM": tiles.rows,
        "BN": tiles.columns,
        "BK": tiles.depth,
        "BAND": tiles.band,
        # The stride between rows of scales that lie column by column.
        "x_row": 1,
        **fixed,
    }
    for name in fixed:
        del signature[name]
    options = {
        "num_warps": tiles.warps,
        "num_stages": tiles.stages,
        "enable_fp_fusion": scales.value >= experts._BLOCKS.value,
    }
    if not tiles.tma:
        return Case(experts._multiply, signature, constants, options, targets)
    signature["x"] = f"tensordesc<{operand}[{tiles.rows}, {tiles.depth}]>"
    signature["w"] = f"tensordesc<{weight}[{tiles.columns}, {tiles.depth}]>"
    constants["PERSISTENT"] = tiles.persistent
    return Case(experts._multiply_tma, signature, constants, options, (90,))


def _move_rows(scales: bool) -> Case:
    """The launch of `experts.gather`."""
    signature = {"x": "*i32", "out": "*i32", "x_scale": "*fp32", "out_scale": "*fp32"}
    signature |= {"rows": "*i64", "num_words": "i32:16", "num_groups": "i32"}
    signature |= {"x_row": "i32", "x_group": "i32", "num_rows": "i32"}
    constants = {"HAS_SCALES": scales, "GROUPS": 64, "BLOCK": experts._MOVED}
    return Case(experts._gather, signature, constants, {"num_warps": 4})


def _combine(shared: bool) -> Case:
    signature = {"y": "*bf16", "rows": "*i64", "weights": "*fp32", "shared": "*bf16"}
    signature |= {"gate": "*fp32", "out": "*bf16", "D": "i32:16"}
    constants = {"NUM_CHOICES": 8, "HAS_SHARED": shared, "HAS_GATE": shared}
    constants["BLOCK"] = experts._MOVED
    return Case(experts._combine, signature, constants, EXPAND_OPTIONS)


CASES = [
    _multiply_experts(experts.PLAIN_TMA, experts._PLAIN, "bf16"),
    _multiply_experts(experts.PLAIN_TMA._replace(persistent=True), experts._PLAIN, "bf16"),
    _multiply_experts(experts.PLAIN_TMA._replace(columns=128), experts._PLAIN, "bf16", out="fp32"),
    _multiply_experts(experts.BYTES_TMA, experts._ROWS, "fp8e4nv"),
    _multiply_experts(experts.BYTES_TMA._replace(persistent=True), experts._ROWS, "fp8e4nv"),
    _multiply_experts(experts.BYTES_TMA, experts._ROWS, "i8"),
    _multiply_experts(experts.BYTES_TMA._replace(columns=128), experts._ROWS, "i8", out="fp32"),
    _multiply_experts(experts.BLOCKS_TMA, experts._BLOCKS, "fp8e4nv"),
    _multiply_experts(experts.BLOCKS_TMA, experts._BLOCKS, "fp8e4nv", out="fp32"),
    _multiply_experts(experts.GROUPS_TMA, experts._GROUPS, "fp8e4nv"),
    _multiply_experts(experts.PLAIN, experts._PLAIN, "bf16"),
    _multiply_experts(experts.WIDE, experts._PLAIN, "fp32", out="fp32"),
    # The gate of a shared expert: Triton takes a size of 1 as a constant.
    _multiply_experts(
        experts.PLAIN_TMA._replace(columns=128), experts._PLAIN, "bf16", out="fp32", N=1
    ),
    _multiply_experts(
        experts.PLAIN, experts._PLAIN, "bf16", out="fp32", targets=(80, 89), N=1, w_rows=1
    ),
    # A router that is held in float32.
    _multiply_experts(experts.WIDE, experts._PLAIN, "bf16", weight="fp32", out="fp32"),
    _multiply_experts(experts.BYTES, experts._ROWS, "i8"),
    _multiply_experts(experts.BYTES, experts._ROWS, "fp8e4nv", targets=FP8),
    _multiply_experts(experts.BYTES, experts._BLOCKS, "fp8e4nv", targets=FP8),
    _multiply_experts(experts.GROUPS, experts._GROUPS, "fp8e4nv", targets=FP8),
    Case(
        experts._list_tiles,
        {"offsets": "*i32", "tiles": "*i32", "E": "i32"},
        {"BM": 128, "BLOCK": 512, "LANES": experts._LISTED},
        {"num_warps": 4},
    ),
    Case(
        experts._list_tiles,
        {"offsets": "*i32", "tiles": "*i32"},
        {"E": 1, "BM": 128, "BLOCK": 1, "LANES": experts._LISTED},
        {"num_warps": 4},
    ),
    _move_rows(scales=False),
    _move_rows(scales=True),
    _combine(shared=False),
    _combine(shared=True),
    *(
        _by_rows(activations._gate, {"gate_up": "*bf16"}, layout, 2944, GATED=True, ACTIVATION=5)
        for layout in Layout
    ),
    *(_by_rows(norms._add_norm, NORM, layout, 4096, **RMS) for layout in Layout),
    _by_rows(norms._add_norm, NORM, Layout.FP8_ROWS, 8192, **RMS),
    _by_rows(norms._add_norm, NORM, Layout.PLAIN, 8192, **LAYER),
    *(
        _by_rows(activations._gate, {"gate_up": "*bf16"}, layout, 14336, GATED=True, ACTIVATION=0)
        for layout in Layout
    ),
    _by_rows(
        activations._gate, {"gate_up": "*bf16"}, Layout.FP8_ROWS, 28672, GATED=True, ACTIVATION=2
    ),
    _by_rows(
        activations._gate, {"gate_up": "*bf16"}, Layout.PLAIN, 16384, GATED=False, ACTIVATION=1
    ),
    *(
        _by_rows(quantize._quantize, {"x": "*bf16"}, layout, 4096)
        for layout in Layout
        if layout != Layout.PLAIN
    ),
    _rotate(128, 64, norm=False),
    _rotate(128, 64, norm=False, moves=False),
    _rotate(128, 32, norm=True),
    *(_attend(size, forked=forked) for size in attention.CONFIGS for forked in (False, True)),
    _attend(128, window=True),
    _attend(128, cap=True),
    _attend(256, window=True, cap=True),
    _attend(64, window=True, sinks=True),
    _attend(64, window=True, sinks=True, forked=True),
    # Padded to the next config.
    _attend(80),
    _int8_tma(linear.INT8_TMA),
    Case(linear._int8, INT8, *_int8(linear.INT8_POINTERS)),
    Case(
        linear._fp8_blocks,
        BLOCKS,
        {"HAS_BIAS": True, "BM": 128, "BN": 128, "BAND": 8},
        {"num_warps": 8, "num_stages": linear.FP8_BLOCKS.stages, "enable_fp_fusion": True},
        FP8,
    ),
    Case(linear._expand, EXPAND, EXPAND_FLAGS, EXPAND_OPTIONS),
    Case(linear._expand, EXPAND, EXPAND_FLAGS | SCATTERED, EXPAND_OPTIONS),
    Case(
        linear._expand,
        EXPAND | {"out": "*fp8e4nv"},
        EXPAND_FLAGS | {"HAS_ROW_SCALE": True},
        EXPAND_OPTIONS,
        FP8,
    ),
    Case(
        linear._expand,
        EXPAND | {"out": "*fp8e4nv"},
        EXPAND_FLAGS | {"HAS_SCALES": False},
        EXPAND_OPTIONS,
        FP8,
    ),
    Case(
        frequencies._add_expected,
        {
            **ROWS,
            "tops": "*fp32",
            "top_logprobs": "*fp32",
            "groups": "*i64",
            "sums": "*i64",
            "num_rows": "i32",
        },
        {"BLOCK": frequencies._BLOCK, "ROWS": frequencies._ROWS},
        {"num_warps": frequencies._WARPS},
    ),
    *(
        Case(
            tree_attention._take,
            {
                **dict.fromkeys(("keys", "values", "keys_out", "values_out"), "*bf16"),
                "rows": "*i64",
                **dict.fromkeys(("num_rows", "num_groups"), "i32"),
                **dict.fromkeys(("key_stride", "value_stride"), "i32:16"),
                **dict.fromkeys(("key_group", "value_group"), "i32:16"),
            },
            {
                "D": size,
                "BLOCK_D": triton.next_power_of_2(size),
                "ROWS": tree_attention._ROWS,
            },
            {"num_warps": tree_attention._WARPS},
        )
        for size in (80, 128, 256)
    ),
    Case(
        sampling._sum_tiles,
        {**ROWS, "tops": "*fp32", "sums": "*i64", "num_tiles": "i32"},
        {"TILE": sampling._TILE},
        {"num_warps": sampling._WARPS},
    ),
    Case(
        sampling._find,
        {
            **ROWS,
            "tops": "*fp32",
            "tiles": "*i32",
            "rest": "*i64",
            "ids": "*i32",
            "num_draws": "i32",
        },
        {"TILE": sampling._TILE},
        {"num_warps": sampling._WARPS},
    ),
    *(_row_statistics(tiles) for tiles in (False, True)),
    _row_statistics(True, aligned=False),
    Case(
        logits._choose_tiles,
        {"maxima": "*i32", "tiles": "*i32", "num_tiles": "i32"},
        {"KEPT": 20, "BLOCK": 2048},
        {"num_warps": 4},
    ),
    *(_choose_slots(k) for k in (1, 20, 128, 256)),
    _choose_slots(200, enough=False),
    *(_sort(k) for k in (20, 128, 256)),
    *(_log_tail_mass(k) for k in (1, 20, 256)),
    *(_narrow(dtype) for dtype in ("fp16", "bf16", "fp32")),
]


class Taken(NamedTuple):
    """What one compiled kernel takes of a multiprocessor."""

    registers: int
    """Of a thread."""
    spilled: int
    """Bytes of a thread's stack."""
    shared: int
    """Bytes of a block."""


def build(case: Case, target: int) -> Taken:
    """Compile a case for one compute capability."""
    names = case.kernel.arg_names
    missing = set(names) ^ (set(case.signature) | set(case.constants))
    assert not missing, f"{case.kernel.__name__}: {sorted(missing)}"
    signature = {n: case.signature.get(n, "constexpr").partition(":")[0] for n in names}
    aligned = [
        (i,)
        for i, name in enumerate(names)
        if case.signature.get(name, "").startswith("*")
        or case.signature.get(name, "").endswith(":16")
    ]
    source = ASTSource(
        fn=case.kernel,
        signature=signature,
        constexprs=case.constants,
        attrs={at: [["tt.divisibility", 16]] for at in aligned},
    )
    built = triton.compile(source, target=GPUTarget("cuda", target, 32), options=case.options)
    registers, spilled = _read_usage(built.asm["cubin"])
    return Taken(registers, spilled, built.metadata.shared)


def _read_usage(cubin: bytes) -> tuple[int, int]:
    """Registers and stack bytes of a thread."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [tool, "-res-usage", file.name], check=True, capture_output=True, text=True
        ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    assert found, text
    return int(found[1]), int(found[2])


def check(index: int, target: int) -> tuple[str, bool]:
    """A line about case `index`, and whether it holds."""
    case = CASES[index]
    label = f"{case.kernel.__name__:<24} sm_{target}"
    try:
        taken = build(case, target)
    except Exception as error:  # A compiler's errors have no common type.
        return f"{label}  {type(error).__name__}: {error}", False
    holds = taken.spilled == 0 and taken.shared <= SHARED[target]
    line = f"{label}  {taken.registers:>3} registers {taken.shared:>7} B shared"
    return f"{line} {taken.spilled:>4} B spilled{'' if holds else '  TOO MUCH'}", holds


def main(names: list[str]) -> int:
    """The exit status."""
    work = [
        (index, target)
        for index, case in enumerate(CASES)
        for target in case.targets
        if not names or case.kernel.__name__.startswith(tuple(names))
    ]
    # Compilers are started afresh: a fork of a process with threads may hang.
    with ProcessPoolExecutor(min(4, os.cpu_count() or 1), get_context("spawn")) as pool:
        results = list(pool.map(check, *zip(*work, strict=True)))
    for line, _ in results:
        print(line)
    return 0 if all(holds for _, holds in results) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
