"""Mends Triton's interpreter (3.6 to 3.9) for bfloat16, float8_e4m3fn, large integers, and that of 3.6 for numpy 2.4.

Its dot multiplies bfloat16 operands as the raw 16-bit words that numpy holds them in, and its fp32 -> bf16 conversion
truncates where a GPU rounds to nearest even. Its fp32 -> float8_e4m3fn conversion loses carries into the exponent. It
takes integers from 2**31 to 2**32 for 64-bit ones, as a GPU does, but holds them in 32. In 3.6 a loop's bounds are
arrays of one element, which numpy 2.4 no longer takes for numbers. In 3.9 a block of booleans and a single one make a
block of integers, which is refused as a mask.
"""

from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter


def _bfloat16_to_float32(handle: Any) -> Any:
    if handle.dtype.scalar == tl.bfloat16 and handle.data.dtype == np.uint16:
        return interpreter.TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)
    return handle


def _round_to_bfloat16(data: np.ndarray) -> np.ndarray:
    bits = np.ascontiguousarray(data).view(np.uint32).astype(np.uint64)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(data), np.uint16(0x7FC0), rounded)


def _round_to_float8(data: np.ndarray) -> np.ndarray:
    return torch.from_numpy(np.ascontiguousarray(data)).to(torch.float8_e4m3fn).view(torch.uint8).numpy()


def _with_bool_masks(method: Any, place: int) -> Any:
    """`method` of the builder, whose argument at `place` is a mask."""

    def masked(self: Any, *arguments: Any, **options: Any) -> Any:
        mask = arguments[place]
        if isinstance(mask, interpreter.TensorHandle) and mask.data.dtype != np.bool_:
            mask = interpreter.TensorHandle(mask.data.astype(np.bool_), mask.dtype)
        return method(self, *arguments[:place], mask, *arguments[place + 1 :], **options)

    return masked


def apply() -> None:
    """Patch the interpreter; call it once."""
    builder: Any = interpreter.InterpreterBuilder
    create_dot, create_fp_trunc, create_fp_to_fp = builder.create_dot, builder.create_fp_trunc, builder.create_fp_to_fp

    def dot(self: Any, a: Any, b: Any, *arguments: Any) -> Any:
        return create_dot(self, _bfloat16_to_float32(a), _bfloat16_to_float32(b), *arguments)

    def fp_trunc(self: Any, source: Any, dtype: Any) -> Any:
        if source.dtype.scalar == tl.float32 and dtype.scalar == tl.bfloat16:
            return interpreter.TensorHandle(_round_to_bfloat16(source.data), tl.bfloat16)
        return create_fp_trunc(self, source, dtype)

    def fp_to_fp(self: Any, source: Any, dtype: Any, *arguments: Any) -> Any:
        if source.dtype.scalar == tl.float32 and dtype.scalar == tl.float8e4nv:
            return interpreter.TensorHandle(_round_to_float8(source.data), tl.float8e4nv)
        return create_fp_to_fp(self, source, dtype, *arguments)

    for name in ("create_masked_load", "create_masked_store"):
        setattr(builder, name, _with_bool_masks(getattr(builder, name), 1 if name.endswith("load") else 2))
    builder.create_dot = dot
    builder.create_fp_to_fp = fp_to_fp
    builder.create_fp_trunc = fp_trunc

    module: Any = interpreter
    patch_tensor = module._patch_lang_tensor

    def patch_lang_tensor(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    module._patch_lang_tensor = patch_lang_tensor
    implicit_cvt = module._implicit_cvt

    def convert(argument: Any) -> Any:
        if isinstance(argument, int) and 2**31 <= argument < 2**32:
            return tl.tensor(interpreter.TensorHandle(np.array([argument], np.int64), tl.int64), tl.int64)
        return implicit_cvt(argument)

    module._implicit_cvt = convert
