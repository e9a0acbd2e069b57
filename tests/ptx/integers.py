"""Integer operations of PTX on NumPy arrays (PTX ISA 9.7.1 integer, 9.7.2 extended precision, 9.7.8 logic and shift).

Arguments are equally long arrays or scalars of the dtype the instruction names; results have that dtype.
"""

from __future__ import annotations

import numpy as np

u1, u4, u8, i8 = np.uint8, np.uint32, np.uint64, np.int64


def _bits(x: np.ndarray) -> int:
    return x.dtype.itemsize * 8


def shl(x: np.ndarray, s: np.ndarray) -> np.ndarray:
    """shl: amounts of the width or more give 0."""
    bits = u4(_bits(x))
    return np.where(s < bits, x << (s % bits).astype(x.dtype), x.dtype.type(0))


def shr(x: np.ndarray, s: np.ndarray) -> np.ndarray:
    """shr: amounts are clamped to the width, so they give 0, or the sign for signed types."""
    bits = u4(_bits(x))
    r = x >> np.minimum(s, bits - u4(1)).astype(x.dtype)
    return r if x.dtype.kind == "i" else np.where(s < bits, r, x.dtype.type(0))


def funnel_left(lo: np.ndarray, hi: np.ndarray, s: np.ndarray, wrap: bool) -> np.ndarray:
    """shf.l: the upper word of {hi, lo} << s."""
    s = (s & u4(31)) if wrap else np.minimum(s, u4(32))
    both = (hi.astype(u8) << u8(32)) | lo.astype(u8)
    return ((both << s.astype(u8)) >> u8(32)).astype(u4)


def funnel_right(lo: np.ndarray, hi: np.ndarray, s: np.ndarray, wrap: bool) -> np.ndarray:
    """shf.r: the lower word of {hi, lo} >> s."""
    s = (s & u4(31)) if wrap else np.minimum(s, u4(32))
    both = (hi.astype(u8) << u8(32)) | lo.astype(u8)
    return (both >> s.astype(u8)).astype(u4)


def popc(x: np.ndarray) -> np.ndarray:
    return np.bitwise_count(x).astype(u4)


def find_msb(x: np.ndarray, shift_amount: bool) -> np.ndarray:
    """bfind: position of the top bit that differs from the sign, 0xffffffff if there is none."""
    if x.dtype.kind == "i":
        x = np.where(x < 0, ~x, x).view(u4 if x.dtype.itemsize == 4 else u8)
    bits = _bits(x)
    smeared = x.copy()
    for k in (1, 2, 4, 8, 16, 32):
        if k < bits:
            smeared |= smeared >> x.dtype.type(k)
    pos = np.bitwise_count(smeared).astype(u4) - u4(1)
    return np.where(x == 0, u4(0xFFFFFFFF), u4(bits - 1) - pos if shift_amount else pos)


def clz(x: np.ndarray) -> np.ndarray:
    return u4(_bits(x) - 1) - find_msb(x, False)


def brev(x: np.ndarray) -> np.ndarray:
    bits = np.unpackbits(x.astype(x.dtype.newbyteorder(">")).view(u1).reshape(len(x), -1), axis=1)[:, ::-1]
    return np.packbits(bits, axis=1).view(x.dtype.newbyteorder(">")).ravel().astype(x.dtype)


def bfe(x: np.ndarray, pos: np.ndarray, length: np.ndarray) -> np.ndarray:
    """bfe: `length` bits from `pos`; signed types extend bit min(pos + length - 1, msb)."""
    bits = _bits(x)
    unsigned = x.view(u4 if bits == 32 else u8).astype(u8)
    pos, length = (pos & u4(255)).astype(u8), (length & u4(255)).astype(u8)
    mask = np.where(length >= u8(64), u8(0xFFFFFFFFFFFFFFFF), (u8(1) << np.minimum(length, u8(63))) - u8(1))
    field = np.where(pos < u8(64), unsigned >> np.minimum(pos, u8(63)), u8(0)) & mask
    if x.dtype.kind == "i":
        top = np.minimum(pos + length - u8(1), u8(bits - 1))
        sign = (unsigned >> np.where(length == 0, u8(0), top)) & u8(1)
        field = np.where(length == 0, u8(0), np.where(sign == 1, field | ~mask, field))
        avail = np.maximum(u8(bits) - np.minimum(pos, u8(bits)), u8(0))
        fill = np.where(avail >= u8(64), u8(0), ~((u8(1) << np.minimum(avail, u8(63))) - u8(1)))
        field = np.where((length != 0) & (sign == 1), field | fill, field)
    return field.astype(u4 if bits == 32 else u8).view(x.dtype)


def bfi(field: np.ndarray, base: np.ndarray, pos: np.ndarray, length: np.ndarray) -> np.ndarray:
    """bfi: the low `length` bits of `field` put into `base` at `pos`."""
    bits = _bits(base)
    pos, length = (pos & u4(255)).astype(u8), (length & u4(255)).astype(u8)
    mask = np.where(length >= u8(64), u8(0xFFFFFFFFFFFFFFFF), (u8(1) << np.minimum(length, u8(63))) - u8(1))
    inside = pos < u8(bits)
    shift = np.minimum(pos, u8(63))
    mask, put = np.where(inside, mask << shift, u8(0)), field.astype(u8) << shift
    return ((base.astype(u8) & ~mask) | (put & mask)).astype(base.dtype)


def prmt(a: np.ndarray, b: np.ndarray, s: np.ndarray) -> np.ndarray:
    """prmt, default mode: each selector nibble picks one byte of {b, a}; its bit 3 replicates the byte's sign."""
    both = a.astype(u8) | (b.astype(u8) << u8(32))
    out = np.zeros(np.broadcast(a, b, s).shape, u4)
    for i in range(4):
        n = (s >> u4(4 * i)) & u4(15)
        v = ((both >> ((n & u4(7)).astype(u8) << u8(3))) & u8(255)).astype(u4)
        v = np.where(n & u4(8), np.where(v & u4(128), u4(255), u4(0)), v)
        out |= v << u4(8 * i)
    return out


def lop3(a: np.ndarray, b: np.ndarray, c: np.ndarray, lut: int) -> np.ndarray:
    """lop3: bit k of `lut` is the result for the input bits k = a*4 + b*2 + c."""
    r = np.zeros(np.broadcast(a, b, c).shape, u4)
    for i in range(8):
        if lut >> i & 1:
            r |= (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
    return r


def divide(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """div: truncates towards zero. Division by zero gives all ones (unspecified in PTX)."""
    zero = b == 0
    b = np.where(zero, b.dtype.type(1), b)
    if a.dtype.kind == "u":
        return np.where(zero, ~a.dtype.type(0), a // b)
    q = a // b
    q = q + ((a - q * b != 0) & ((a < 0) != (b < 0)))
    return np.where(zero, a.dtype.type(-1), q.astype(a.dtype))


def remainder(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """rem: takes the sign of the dividend."""
    b = np.where(b == 0, b.dtype.type(1), b)
    return (a - divide(a, b) * b).astype(a.dtype)


def mulhi(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """mul.hi: upper half of the product of full width."""
    dt = a.dtype
    if dt.itemsize < 8:
        wide = np.int64 if dt.kind == "i" else np.uint64
        return ((a.astype(wide) * b.astype(wide)) >> wide(_bits(a))).astype(dt)
    a_, b_ = a.view(u8), b.view(u8)
    m = u8(0xFFFFFFFF)
    al, ah, bl, bh = a_ & m, a_ >> u8(32), b_ & m, b_ >> u8(32)
    mid = ah * bl + ((al * bl) >> u8(32))
    mid2 = al * bh + (mid & m)
    hi = ah * bh + (mid >> u8(32)) + (mid2 >> u8(32))
    if dt.kind == "i":
        hi = hi - np.where(a < 0, b_, u8(0)) - np.where(b < 0, a_, u8(0))
    return hi.view(dt)


def add_sat(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.clip(a.astype(i8) + b.astype(i8), -(2**31), 2**31 - 1).astype(np.int32)


def sub_sat(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.clip(a.astype(i8) - b.astype(i8), -(2**31), 2**31 - 1).astype(np.int32)


def absolute_difference(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The |a - b| of sad, wrapped to the type."""
    return np.where(a < b, b - a, a - b).astype(a.dtype)


def dp4a(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """dp4a: c plus the dot product of four bytes; signedness of a and b from their dtypes."""
    byte = {"i": np.int8, "u": np.uint8}
    av = np.ascontiguousarray(a).view(byte[a.dtype.kind]).reshape(-1, 4).astype(i8)
    bv = np.ascontiguousarray(b).view(byte[b.dtype.kind]).reshape(-1, 4).astype(i8)
    return ((av * bv).sum(1) + c.astype(i8)).astype(c.dtype)


def add_carry(a: np.ndarray, b: np.ndarray, carry: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """a + b + carry on unsigned arrays -> (sum, carry out)."""
    s = a + b
    t = s + np.asarray(carry).astype(a.dtype)
    return t, (s < a) | (t < s)


def subtract_borrow(a: np.ndarray, b: np.ndarray, borrow: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """a - b - borrow on unsigned arrays -> (difference, borrow out)."""
    d, one = a - b, np.asarray(borrow).astype(a.dtype)
    return d - one, (a < b) | (d < one)
