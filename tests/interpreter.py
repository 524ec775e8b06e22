"""Triton's interpreter, made right for bfloat16 and float8, and quicker.

The interpreter holds these types as numpy arrays of bit patterns and computes on the patterns as
if they were integers; its casts to them truncate. Here both go through float32 and torch's own
rounding, which is what a GPU does: to nearest even, float8 saturating, NaN kept.

Left as it is: min and max ignore NaN, as on a GPU; the positions that argmin and argmax return
among equals, or in a row of NaN, are the interpreter's own.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

NARROW = {"bf16": torch.bfloat16, "fp8e4nv": torch.float8_e4m3fn, "fp8e5": torch.float8_e5m2}
"""The types held as bit patterns, by Triton's names."""
_BITS = {1: np.dtype(np.uint8), 2: np.dtype(np.uint16)}


def widen(data: np.ndarray, name: str) -> np.ndarray:
    """The float32 values of an array of type `name`."""
    if name not in NARROW:
        return data.astype(np.float32)
    bits = torch.from_numpy(np.array(data).view(_BITS[NARROW[name].itemsize]))
    return bits.view(NARROW[name]).float().numpy()


def narrow(values: np.ndarray, name: str) -> np.ndarray:
    """Values rounded to the type `name`: bit patterns for the types of `NARROW`."""
    dtype = NARROW[name]
    wide = torch.from_numpy(np.array(values, dtype=np.float32))
    if dtype.itemsize == 1:
        largest = torch.finfo(dtype).max
        wide = wide.clamp(-largest, largest)
    return wide.to(dtype).view(torch.uint8 if dtype.itemsize == 1 else torch.uint16).numpy()


def correct() -> None:
    """Replace what `triton.runtime.interpreter` gets wrong; once, before kernels run."""
    from triton.runtime import interpreter as shipped

    builder: Any = shipped.InterpreterBuilder
    handle: Any = shipped.TensorHandle
    int1 = shipped.tl.int1
    convert, cast, dot = shipped._convert_float, builder.cast_impl, builder.create_dot
    unary, binary, ternary = builder.unary_op, builder.binary_op, builder.ternary_op
    total, extreme = shipped.ReduceOps.sum, shipped.ReduceOps.min_max

    def _convert_float(data: Any, source: Any, target: Any, rounding: Any) -> np.ndarray:
        towards_zero = rounding == shipped._ir.ROUNDING_MODE.RTZ
        if towards_zero or not {source.name, target.name} & NARROW.keys():
            return convert(data, source, target, rounding)
        values = widen(data, source.name)
        if target.name in NARROW:
            return narrow(values, target.name)
        bits = getattr(np, f"uint{target.primitive_bitwidth}")
        return values.astype(shipped._get_np_dtype(target)).view(bits)

    def cast_impl(self: Any, source: Any, target: Any) -> Any:
        before, after = source.dtype.scalar, target.scalar
        if not {before.name, after.name} & NARROW.keys():
            return cast(self, source, target)
        values = widen(source.data, before.name)
        if after.name in NARROW:
            return handle(narrow(values, after.name), after)
        return handle(values.astype(shipped._get_np_dtype(after)), after)

    def create_dot(self: Any, a: Any, b: Any, d: Any, precision: Any, imprecise: Any) -> Any:
        if not {a.dtype.scalar.name, b.dtype.scalar.name} & NARROW.keys():
            return dot(self, a, b, d, precision, imprecise)
        left, right = widen(a.data, a.dtype.scalar.name), widen(b.data, b.dtype.scalar.name)
        return handle(np.matmul(left, right, dtype=d.data.dtype) + d.data, d.dtype.scalar)

    def on_values(original: Callable[..., Any], num_operands: int) -> Callable[..., Any]:
        """An elementwise operation that computes on float32 values where operands are narrow."""

        def run(self: Any, *args: Any) -> Any:
            operands, (op,) = args[:num_operands], args[num_operands:]
            dtype = operands[-1].dtype.scalar
            if dtype.name not in NARROW or op is np.where:
                return original(self, *args)
            out = op(*(widen(operand.data, dtype.name) for operand in operands))
            if out.dtype == np.bool_:
                return handle(out, int1)
            return handle(narrow(out, dtype.name), dtype)

        return run

    def on_rows(original: Callable[..., Any]) -> Callable[..., Any]:
        """A reduction in float32 of narrow rows, rounded once."""

        def run(self: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
            first = value[0] if isinstance(value, tuple) else value
            dtype = first.dtype.scalar
            if dtype.name not in NARROW:
                return original(self, value, *args, **kwargs)
            wide = retype(first, widen(first.handle.data, dtype.name), shipped.tl.float32)
            out = original(self, wide, *args, **kwargs)
            if isinstance(out, tuple):
                return back(out[0], dtype), out[1]
            return back(out, dtype)

        def back(out: Any, dtype: Any) -> Any:
            if not out.dtype.is_floating():
                return out
            return retype(out, narrow(out.handle.data, dtype.name), dtype)

        def retype(value: Any, data: np.ndarray, dtype: Any) -> Any:
            shape = list(value.shape)
            kind = shipped.tl.block_type(dtype, shape) if shape else dtype
            return shipped.tl.tensor(handle(data, dtype), kind)

        return run

    shipped._convert_float = _convert_float
    builder.cast_impl, builder.create_dot = cast_impl, create_dot
    builder.unary_op = on_values(unary, 1)
    builder.binary_op = on_values(binary, 2)
    builder.ternary_op = on_values(ternary, 3)
    shipped.ReduceOps.sum, shipped.ReduceOps.min_max = on_rows(total), on_rows(extreme)


def hasten() -> None:
    """Have it remember what it looks up at every call of a function: half of its time.

    That is which names of the language it replaces, and numpy's dtype for each of Triton's. Once,
    before kernels run.
    """
    from triton.runtime import interpreter as shipped

    shipped_any: Any = shipped
    is_builtin, find_dtype = shipped.tl.core.is_builtin, shipped._get_np_dtype
    names: dict[Any, list[str]] = {}
    dtypes: dict[str, np.dtype[Any]] = {}

    def _patch_builtin(language: Any, *rest: Any) -> None:
        if language not in names:
            members = inspect.getmembers(language)
            names[language] = [name for name, member in members if is_builtin(member)]
        for name in names[language]:
            member = getattr(language, name)
            if is_builtin(member):
                shipped._patch_attr(language, name, member, *rest)

    def _get_np_dtype(dtype: Any) -> np.dtype[Any]:
        scalar = dtype.scalar
        if isinstance(scalar, shipped.tl.pointer_type):
            return np.dtype(np.uint64)
        if scalar.name not in dtypes:
            dtypes[scalar.name] = find_dtype(scalar)
        return dtypes[scalar.name]

    shipped_any._patch_builtin, shipped_any._get_np_dtype = _patch_builtin, _get_np_dtype
