"""Layouts: how the quantizers of others store a linear, and how config.json says so.

`read_stored` reads `quantization_config`; the `Stored` it returns then reads linears, one by one.
Which linears are quantized is seen from their tensors and not from lists of exceptions, so what a
checkpoint left plain is read plain.

Legend: N outputs, K inputs, S groups of columns.

Published by: AutoAWQ and LMDeploy (`awq`), AutoGPTQ and GPTQModel (`gptq`), llm-compressor
(`compressed-tensors`), DeepSeek-V3, Qwen3-FP8 and AutoFP8 (`fp8`), LMDeploy (`smooth_quant`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from ..kernels.linear import Int4, pack_int4
from ..kernels.quantize import GROUP
from .checkpoint import Checkpoint
from .weights import Blocks, Groups, Plain, Quantization, Rows, Weight

# Where AutoAWQ puts column c of eight: the place of its four bits in an int32.
_AWQ_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)
# What the first format of GPTQ stores eight zero points without.
_ONES = 0x11111111
_ROW_BY_ROW = "activations scaled row by row and not by the stored scales"
# Scales of a cache of keys and values, and of outputs; nothing here is cached.
_CACHE_SCALES = (".k_scale", ".v_scale", ".q_scale", ".kv_scale", ".prob_scale", ".output_scale")


@dataclass(frozen=True)
class Source:
    """Tensors of a checkpoint on their way to a device."""

    checkpoint: Checkpoint
    device: torch.device

    def __contains__(self, name: str) -> bool:
        return name in self.checkpoint

    def read(self, name: str, *shapes: tuple[int, ...]) -> torch.Tensor:
        """A tensor of one of these shapes, on the device; ValueError as `Checkpoint.read`."""
        return self.checkpoint.read(name, self._choose(name, shapes), self.device)

    def read_small(self, name: str, *shapes: tuple[int, ...]) -> torch.Tensor:
        """The same in host memory, where looking at its numbers waits for nothing."""
        return self.checkpoint.read(name, self._choose(name, shapes))

    def skip(self, name: str, *suffixes: str) -> None:
        """Count tensors of a linear as read, if they are there."""
        self.checkpoint.skip(*(f"{name}.{suffix}" for suffix in suffixes))

    def _choose(self, name: str, shapes: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
        if name in self.checkpoint and self.checkpoint.shape(name) in shapes:
            return self.checkpoint.shape(name)
        return shapes[0]


Reader = Callable[[Source, str, tuple[int, int]], Weight | None]


@dataclass(frozen=True)
class StoredGroup:
    """Linears of a checkpoint that are stored alike."""

    kind: Quantization
    text: str
    """For people: "int4, groups of 128, asymmetric"."""
    weight_only: bool = False
    """Whether its activations are meant to stay plain."""
    note: str = ""
    """What is computed otherwise than it was stored for."""


def _read_none(source: Source, name: str, shape: tuple[int, int]) -> Weight | None:
    return None


@dataclass(frozen=True)
class Stored:
    """How a checkpoint stores its linears, as its config says."""

    method: str = "none"
    """`awq`, `gptq`, `compressed-tensors`, `fp8`, `smooth_quant`, `mxfp4`, or `none`."""
    groups: tuple[StoredGroup, ...] = ()
    """One of each kind; none of them for a checkpoint that is not quantized."""
    read: Reader = _read_none
    """(source, name, (N, K)) -> the weight of the linear `name`; None if it is stored plain."""


def read_stored(config: Mapping[str, Any]) -> Stored:
    """How the checkpoint of a config.json stores its linears.

    Raises:
        ValueError: naming a setting of `quantization_config` that is not supported, its value and
            what would work.
    """
    settings = config.get("quantization_config") or config.get("compression_config")
    if not settings:
        return Stored()
    method = settings.get("quant_method")
    if method not in _METHODS:
        raise _refusal("quant_method", method, f"one of {', '.join(_METHODS)}")
    return _METHODS[method](settings)


def is_cache_scale(name: str) -> bool:
    """Whether a tensor belongs to a quantized cache of keys and values."""
    return name.endswith(_CACHE_SCALES)


def _refusal(field: str, value: Any, works: str) -> ValueError:
    return ValueError(
        f"quantization_config: {field} {value!r} cannot be run, only {works}; "
        "use another checkpoint of the model"
    )


# ---- int4: AWQ, GPTQ -------------------------------------------------------------------------


def _awq(settings: Mapping[str, Any]) -> Stored:
    _check_bits(settings.get("bits", settings.get("w_bit")))
    version = str(settings.get("version", "gemm")).lower()
    if version != "gemm":
        raise _refusal("version", version, "'gemm'")
    size = _check_group_size(settings.get("group_size", settings.get("q_group_size", 128)))
    has_zeros = bool(settings.get("zero_point", True))
    group = StoredGroup(Quantization.INT4, _int4_text(size, not has_zeros))
    return Stored("awq", (group,), partial(_read_awq, size, has_zeros))


def _read_awq(
    size: int, has_zeros: bool, source: Source, name: str, shape: tuple[int, int]
) -> Weight | None:
    """`qweight` int32 [K, N / 8], `qzeros` int32 [S, N / 8], `scales` [S, N]."""
    if f"{name}.qweight" not in source:
        return None
    num_rows, num_columns = shape
    num_groups = _num_groups(num_columns, size)
    codes_KN = _unpack(source.read(f"{name}.qweight", (num_columns, num_rows // 8)), _AWQ_PLACES)
    zeros_SN = None
    if has_zeros or f"{name}.qzeros" in source:
        zeros = source.read(f"{name}.qzeros", (num_groups, num_rows // 8))
        zeros_SN = _unpack(zeros, _AWQ_PLACES)
    return _grouped(
        pack_int4(_flip(codes_KN)),
        _flip(source.read(f"{name}.scales", (num_groups, num_rows))),
        None if zeros_SN is None else _flip(zeros_SN),
        _spread(num_columns, size, source.device),
    )


def _gptq(settings: Mapping[str, Any]) -> Stored:
    _check_bits(settings.get("bits"))
    form = settings.get("checkpoint_format") or "gptq"
    if form not in ("gptq", "gptq_v2"):
        raise _refusal("checkpoint_format", form, "'gptq' and 'gptq_v2'")
    size = _check_group_size(settings.get("group_size", 128))
    text = _int4_text(size, bool(settings.get("sym", True)))
    if settings.get("desc_act"):
        text += ", columns in the order of their activations"
    group = StoredGroup(Quantization.INT4, text)
    return Stored("gptq", (group,), partial(_read_gptq, size, form == "gptq"))


def _read_gptq(
    size: int, less_one: bool, source: Source, name: str, shape: tuple[int, int]
) -> Weight | None:
    """`qweight` int32 [K / 8, N], `qzeros` int32 [S, N / 8], `scales` [S, N], `g_idx` [K]."""
    if f"{name}.qweight" not in source:
        return None
    num_rows, num_columns = shape
    num_groups = _num_groups(num_columns, size)
    packed_KN = source.read(f"{name}.qweight", (num_columns // 8, num_rows))
    zeros = source.read(f"{name}.qzeros", (num_groups, num_rows // 8))
    if less_one:
        # GPTQModel takes the ones off whole int32s: a zero point of zero borrows from the next.
        zeros = zeros + _ONES
    return _grouped(
        _flip(packed_KN).view(torch.uint8),
        _flip(source.read(f"{name}.scales", (num_groups, num_rows))),
        _flip(_unpack(zeros, range(8))),
        _read_order(source, f"{name}.g_idx", num_columns, size),
    )


def _grouped(
    codes: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    groups: torch.Tensor | None,
) -> Groups:
    return Groups(Int4(codes, scales, zeros, groups))


def _check_bits(bits: Any) -> None:
    if bits != 4:
        raise _refusal("bits", bits, "4")


def _check_group_size(size: Any) -> int:
    """-1 is one group a row."""
    if not isinstance(size, int) or (size != -1 and (size < 32 or size % 32)):
        raise _refusal("group_size", size, "multiples of 32, and -1 for a scale per row")
    return size


def _int4_text(size: int, symmetric: bool) -> str:
    groups = "a scale per row" if size == -1 else f"groups of {size}"
    return f"int4, {groups}, {'symmetric' if symmetric else 'asymmetric'}"


def _num_groups(num_columns: int, size: int) -> int:
    return 1 if size == -1 else math.ceil(num_columns / size)


def _spread(num_columns: int, size: int, device: torch.device) -> torch.Tensor | None:
    """The group of each column, int32 [K]; None where groups are neighbours of one size."""
    if size == -1 or num_columns % size == 0:
        return None
    return torch.arange(num_columns, dtype=torch.int32, device=device) // size


def _read_order(source: Source, name: str, num_columns: int, size: int) -> torch.Tensor | None:
    """The group of each column from the tensor `name`, if it is there and says anything."""
    if name not in source:
        return _spread(num_columns, size, source.device)
    groups = source.read_small(name, (num_columns,)).to(torch.int32)
    width = num_columns if size == -1 else size
    in_turn = torch.arange(num_columns, dtype=torch.int32) // width
    # Quantizers write -1 where columns have no order of their own.
    if torch.equal(groups, in_turn) or bool((groups == -1).all()):
        return _spread(num_columns, size, source.device)
    if groups.min() < 0 or groups.max() >= _num_groups(num_columns, size):
        raise ValueError(
            f"model: tensor {name} in {source.checkpoint.folder} names groups "
            f"{int(groups.min())} to {int(groups.max())}, but there are 0 to "
            f"{_num_groups(num_columns, size) - 1}"
        )
    return groups.to(source.device)


def _unpack(packed: torch.Tensor, places: Sequence[int]) -> torch.Tensor:
    """int32 [R, C] -> uint8 [R, 8 C]: column c of eight is at `places[c]` of the int32."""
    halves = packed.contiguous().view(torch.uint8)
    codes = torch.stack([halves & 15, halves >> 4], -1).view(len(packed), -1, 8)
    return codes[..., list(places)].flatten(1)


def _flip(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.t().contiguous()


# ---- 8 bits: fp8, SmoothQuant ----------------------------------------------------------------


def _fp8(settings: Mapping[str, Any]) -> Stored:
    scheme = settings.get("activation_scheme", "dynamic")
    if scheme not in ("dynamic", "static"):
        raise _refusal("activation_scheme", scheme, "'dynamic' and 'static'")
    block = settings.get("weight_block_size")
    if block is not None and list(block) != [GROUP, GROUP]:
        raise _refusal("weight_block_size", block, f"[{GROUP}, {GROUP}] and null")
    kind, text = Quantization.FP8, "fp8, a scale per tensor"
    if block is not None:
        kind, text = Quantization.FP8_BLOCK, f"fp8, {_BLOCK_TEXT}"
    note = ""
    if scheme == "static":
        text += ", static activation scales"
        note = _ROW_BY_ROW
    read = partial(_read_8_bit, (kind,), ("weight_scale_inv", "weight_scale"))
    return Stored("fp8", (StoredGroup(kind, text, note=note),), read)


_BLOCK_TEXT = f"blocks of {GROUP} x {GROUP}"


def _smooth_quant(settings: Mapping[str, Any]) -> Stored:
    kinds = {
        "int8": Quantization.INT8,
        "float8_e4m3fn": Quantization.FP8,
        "fp8": Quantization.FP8,
    }
    dtype = settings.get("quant_dtype", "int8")
    if dtype not in kinds:
        raise _refusal("quant_dtype", dtype, f"one of {', '.join(kinds)}")
    group = StoredGroup(kinds[dtype], f"{kinds[dtype]}, a scale per row")
    return Stored(
        "smooth_quant", (group,), partial(_read_8_bit, (group.kind,), ("scale", "weight_scale"))
    )


def _read_8_bit(
    kinds: Sequence[Quantization],
    scale_names: Sequence[str],
    source: Source,
    name: str,
    shape: tuple[int, int],
) -> Weight | None:
    """`weight` e4m3 or int8 [N, K] with scales per tensor, row or block under one of the names."""
    if f"{name}.weight" not in source:
        return None
    dtype = source.checkpoint.dtype(f"{name}.weight")
    if dtype.is_floating_point and dtype.itemsize > 1:
        return None
    dtypes = {torch.int8 if kind == Quantization.INT8 else torch.float8_e4m3fn for kind in kinds}
    if dtype not in dtypes:
        raise ValueError(
            f"model: tensor {name}.weight in {source.checkpoint.folder} is stored as {dtype}, but "
            f"quantization_config calls for {' or '.join(sorted(map(str, dtypes)))}"
        )
    # Activations are scaled as they come, and what is symmetric has zero points of zero.
    source.skip(name, "input_scale", "input_zero_point", "weight_zero_point")
    num_rows, num_columns = shape
    values_NK = source.read(f"{name}.weight", shape)
    scale_name = next(
        (f"{name}.{s}" for s in scale_names if f"{name}.{s}" in source), f"{name}.{scale_names[0]}"
    )
    if dtype == torch.float8_e4m3fn and Quantization.FP8_BLOCK in kinds:
        num_blocks = (math.ceil(num_rows / GROUP), math.ceil(num_columns / GROUP))
        # A checkpoint with both has rows beside blocks.
        others = [(num_rows, 1)] if Quantization.FP8 in kinds else []
        scales = source.read(scale_name, num_blocks, *others).float()
        if scales.shape == num_blocks:
            return Blocks(values_NK, scales.repeat_interleave(GROUP, 0)[:num_rows].contiguous())
    else:
        scales = source.read(scale_name, (num_rows, 1), (num_rows,), (1,), (), (1, 1)).float()
    return Rows(values_NK, scales.reshape(-1, 1).expand(num_rows, 1).contiguous())


# ---- compressed-tensors ----------------------------------------------------------------------

_FORMATS = ("float-quantized", "int-quantized", "naive-quantized", "pack-quantized")


def _compressed_tensors(settings: Mapping[str, Any]) -> Stored:
    found: dict[Quantization, StoredGroup] = {}
    # What integers of so many bits have scales of, by whether they are packed into int32.
    sizes: dict[tuple[int, bool], list[int]] = {}
    for field in ("sparsity_config", "transform_config"):
        value = settings.get(field)
        if value and value.get("format", "") != "dense":
            raise _refusal(field, value, "checkpoints without one")
    for group in settings.get("config_groups", {}).values():
        weights = group.get("weights")
        if not weights:
            continue
        form = group.get("format") or settings.get("format")
        if form not in _FORMATS:
            raise _refusal("format", form, f"one of {', '.join(_FORMATS)}")
        read = _read_config_group(group, form)
        of_groups = read.kind in (Quantization.INT4, Quantization.NONE)
        if found.setdefault(read.kind, read) != read and not of_groups:
            raise _refusal("config_groups", dict(group), f"one group of {read.kind} weights")
        if weights.get("type") == "int":
            key = (weights["num_bits"], form == "pack-quantized")
            sizes.setdefault(key, []).append(_weight_group_size(weights))
    if not found:
        # A cache of keys and values may be all that is quantized.
        return Stored()
    if {(4, False), (8, False)} <= set(sizes):
        raise _refusal("config_groups", "int of 4 and of 8 bits", "one of them, or pack-quantized")
    return Stored(
        "compressed-tensors",
        tuple(found.values()),
        partial(_read_compressed, tuple(found), sizes),
    )


def _read_config_group(group: Mapping[str, Any], form: str) -> StoredGroup:
    weights = group["weights"]
    inputs = group.get("input_activations")
    bits, kind = weights.get("num_bits"), weights.get("type")
    strategy = weights.get("strategy")
    packed = form == "pack-quantized"
    if inputs is not None and not inputs.get("symmetric", True):
        raise _refusal("input_activations.symmetric", False, "true")
    note = ""
    if inputs is not None and not inputs.get("dynamic", False):
        note = _ROW_BY_ROW
    if (kind, bits) == ("int", 4) and form != "float-quantized":
        if strategy not in ("group", "channel"):
            raise _refusal("weights.strategy", strategy, "'group' and 'channel'")
        text = _int4_text(_weight_group_size(weights), bool(weights.get("symmetric", True)))
        # Rounding activations is the other half of such a scheme, and the half that costs.
        note = "" if inputs is None else "activations left plain"
        return StoredGroup(Quantization.INT4, text, inputs is None, note)
    if (kind, bits) not in (("float", 8), ("int", 8)) or (packed and kind == "float"):
        raise _refusal(
            "weights", f"{kind} of {bits} bits, {form}", "float of 8 bits, and int of 4 and 8 bits"
        )
    if not weights.get("symmetric", True):
        raise _refusal("weights.symmetric", False, "true for weights of 8 bits")
    name = "fp8" if kind == "float" else "int8"
    if packed and strategy == "group" and inputs is None:
        # No product takes them, so they are expanded as they are read.
        text = f"int8, groups of {_weight_group_size(weights)}, weights only, dequantized"
        return StoredGroup(Quantization.NONE, text)
    texts = {"tensor": "a scale per tensor", "channel": "a scale per row"}
    if kind == "float":
        texts["block"] = _BLOCK_TEXT
    if strategy not in texts:
        raise _refusal("weights.strategy", strategy, f"one of {', '.join(texts)}")
    block = weights.get("block_structure")
    if strategy == "block" and block not in ([GROUP, GROUP], f"{GROUP}x{GROUP}"):
        raise _refusal("weights.block_structure", block, f"[{GROUP}, {GROUP}]")
    text = f"{name}, {texts[strategy]}"
    if inputs is None:
        text += ", weights only"
    elif note:
        text += ", static activation scales"
    found = Quantization.FP8_BLOCK if strategy == "block" else Quantization(name)
    return StoredGroup(found, text, inputs is None, note)


def _weight_group_size(weights: Mapping[str, Any]) -> int:
    """Columns that share a scale; -1 where all of a row do."""
    if weights.get("strategy") != "group":
        return -1
    return _check_group_size(weights.get("group_size"))


def _read_compressed(
    kinds: Sequence[Quantization],
    sizes: Mapping[tuple[int, bool], Sequence[int]],
    source: Source,
    name: str,
    shape: tuple[int, int],
) -> Weight | None:
    """`weight_packed` int32 [N, K / 8] or [N, K / 4] with `weight_scale` [N, S], or `weight`.

    `weight` has 8 bits, or 4 of them in an int8.
    """
    num_rows, num_columns = shape
    packed, bits = f"{name}.weight_packed" in source, 8
    if packed and ((4, True) in sizes or (8, True) in sizes):
        # Columns of an int32; the last of a row may be filled up.
        counts = {math.ceil(num_columns * n / 32): n for n, of_int32 in sizes if of_int32}
        words = source.read(f"{name}.weight_packed", *((num_rows, count) for count in counts))
        bits = counts[words.shape[1]]
        codes = words.contiguous().view(torch.uint8)[:, : num_columns * bits // 8].contiguous()
    elif (4, False) in sizes and _is_int8(source, f"{name}.weight"):
        packed, bits = False, 4
        codes = pack_int4((source.read(f"{name}.weight", shape) + 8).to(torch.uint8))
    else:
        return _read_8_bit(
            [kind for kind in kinds if kind != Quantization.NONE],
            ("weight_scale",),
            source,
            name,
            shape,
        )
    source.skip(name, "input_scale", "input_zero_point")
    if f"{name}.weight_shape" in source:
        stored = source.read_small(f"{name}.weight_shape", (2,)).tolist()
        if stored != list(shape):
            raise ValueError(
                f"model: tensor {name}.weight_shape in {source.checkpoint.folder} says {stored}, "
                f"but the config calls for {list(shape)}"
            )
    by_groups = {_num_groups(num_columns, size): size for size in sizes[bits, packed]}
    scales = source.read(f"{name}.weight_scale", *((num_rows, n) for n in by_groups))
    num_groups = scales.shape[1]
    order = _read_order(source, f"{name}.weight_g_idx", num_columns, by_groups[num_groups])
    if bits == 8:
        # What was packed is unsigned: 128 more than what it stands for.
        values_NK = (codes ^ 0x80).view(torch.int8)
        if Quantization.INT8 in kinds and num_groups == 1:
            return Rows(values_NK, scales.float())
        if order is None:
            order = torch.arange(num_columns, device=codes.device) * num_groups // num_columns
        return Plain(values_NK.float().mul_(scales.float()[:, order.long()]))
    zeros = None
    zeros_name = f"{name}.weight_zero_point"
    if zeros_name in source:
        packed_shape = (math.ceil(num_rows / 8), num_groups)
        stored_zeros = source.read(zeros_name, packed_shape, (num_rows, num_groups))
        if stored_zeros.dtype == torch.int32:
            zeros = _flip(_unpack(_flip(stored_zeros), range(8)))[:num_rows].contiguous()
        else:
            # Before they were packed, zero points were signed as the weights are.
            zeros = (stored_zeros + 8).to(torch.uint8)
    return _grouped(codes, scales, zeros, order)


def _is_int8(source: Source, name: str) -> bool:
    return name in source and source.checkpoint.dtype(name) == torch.int8


_METHODS: dict[str, Callable[[Mapping[str, Any]], Stored]] = {
    "awq": _awq,
    "gptq": _gptq,
    "compressed-tensors": _compressed_tensors,
    "fp8": _fp8,
    "smooth_quant": _smooth_quant,
    # Of experts alone, which are read where experts are.
    "mxfp4": lambda settings: Stored("mxfp4"),
}
