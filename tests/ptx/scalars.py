"""The scalar types of PTX as NumPy sees them (PTX ISA 5.2 "Types").

Every register holds the unsigned integer of its width, or bool for predicates. An instruction's type suffix says how
to look at it. bf16 and the packed types have no NumPy dtype: they stay integers and `floats` computes with them.
"""

from __future__ import annotations

import numpy as np

UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}

TYPES: dict[str, type] = {
    "b8": np.uint8, "u8": np.uint8, "s8": np.int8,
    "b16": np.uint16, "u16": np.uint16, "s16": np.int16,
    "b32": np.uint32, "u32": np.uint32, "s32": np.int32,
    "b64": np.uint64, "u64": np.uint64, "s64": np.int64,
    "f16": np.uint16, "bf16": np.uint16, "f16x2": np.uint32, "bf16x2": np.uint32,
    "e4m3x2": np.uint16, "e5m2x2": np.uint16,
    "f32": np.float32, "f64": np.float64,
    "pred": np.bool_,
}  # fmt: skip

#: Short names under which the dtypes are visible in generated code.
CODE_NAMES = {
    np.uint8: "u1", np.uint16: "u2", np.uint32: "u4", np.uint64: "u8",
    np.int8: "i1", np.int16: "i2", np.int32: "i4", np.int64: "i8",
    np.float32: "f4", np.float64: "f8", np.bool_: "b1",
}  # fmt: skip


class PtxError(Exception):
    """A program, launch or argument the interpreter cannot run. The message names the PTX line where there is one."""


class Unsupported(PtxError):
    """A PTX form the interpreter does not implement."""


def size_of(ty: str) -> int:
    """Bytes of one element of PTX type `ty`."""
    return np.dtype(TYPES[ty]).itemsize


def register_dtype(ty: str) -> type:
    """The dtype in which a register declared with type `ty` is stored."""
    return np.bool_ if ty == "pred" else UNSIGNED[size_of(ty)]


def is_signed(ty: str) -> bool:
    return ty[0] == "s"


def is_float(ty: str) -> bool:
    """True for f16, bf16, f32, f64, fp8 and their packed forms."""
    return ty[0] in "fe" or ty.startswith("bf")
