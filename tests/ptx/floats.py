"""Floating point operations of PTX on NumPy arrays (PTX ISA 9.7.3 floating point, 9.7.4 half precision, 9.7.9.21 cvt).

f32 and f64 use NumPy's IEEE arithmetic. bf16, f16, fp8 live in integers: values are decoded to f32 (exact), computed,
and rounded back once. Approximate units (ex2, rcp, tanh, ...) return the correctly rounded result, so their last bits
may differ from the hardware's.
"""

from __future__ import annotations

import numpy as np

u1, u2, u4, u8 = np.uint8, np.uint16, np.uint32, np.uint64
f4, f8 = np.float32, np.float64
_NAN32 = u4(0x7FFFFFFF)


# ------------------------------------------------------------------ decode and encode
def from_bf16(h: np.ndarray) -> np.ndarray:
    return (h.astype(u4) << u4(16)).view(f4)


def from_f16(h: np.ndarray) -> np.ndarray:
    return h.view(np.float16).astype(f4)


def to_bf16(x: np.ndarray, mode: str = "rn") -> np.ndarray:
    """f32 -> bf16 bits; rn (ties to even), rz. NaN becomes 0x7fff as the hardware's canonical NaN."""
    u = x.astype(f4).view(u4)
    bump = (u4(0x7FFF) + ((u >> u4(16)) & u4(1))) if mode == "rn" else u4(0)
    r = ((u + bump) >> u4(16)).astype(u2)
    return np.where(np.isnan(x), u2(0x7FFF), r)


def to_f16(x: np.ndarray, mode: str = "rn") -> np.ndarray:
    """f32 -> f16 bits; rn, rz."""
    r = x.astype(np.float16)
    if mode == "rz":
        over = np.abs(r.astype(f4)) > np.abs(x)
        r = np.where(over, (r.view(u2) - u2(1)).view(np.float16), r)
    return np.where(np.isnan(x), u2(0x7FFF), r.view(u2))


def _fp8_table(exponent_bits: int, mantissa_bits: int, bias: int, e4m3: bool) -> np.ndarray:
    codes = np.arange(256)
    exponent, mantissa = (codes >> mantissa_bits) & ((1 << exponent_bits) - 1), codes & ((1 << mantissa_bits) - 1)
    value = np.where(
        exponent == 0,
        mantissa * 2.0 ** (1 - bias - mantissa_bits),
        (1 + mantissa / 2.0**mantissa_bits) * 2.0 ** (exponent - float(bias)),
    )
    if e4m3:
        value = np.where((codes & 127) == 127, np.nan, value)
    else:
        value = np.where(exponent == 31, np.where(mantissa == 0, np.inf, np.nan), value)
    return np.where(codes & 128, -value, value).astype(f4)


FP8 = {"e4m3x2": _fp8_table(4, 3, 7, True), "e5m2x2": _fp8_table(5, 2, 15, False)}
_FP8_TOP = {"e4m3x2": 126, "e5m2x2": 123}  # code of the largest finite value


def to_fp8(x: np.ndarray, ty: str) -> np.ndarray:
    """f32 -> fp8 codes, round to nearest even, saturating to the largest finite value; NaN -> 0x7f."""
    top = _FP8_TOP[ty]
    grid = FP8[ty][: top + 1].astype(f8)
    mag = np.minimum(np.abs(x).astype(f8), grid[-1])
    mag = np.where(np.isnan(mag), 0.0, mag)
    hi = np.searchsorted(grid, mag).clip(0, top)
    lo = (hi - 1).clip(0, top)
    below, above = mag - grid[lo], grid[hi] - mag
    code = np.where((below < above) | ((below == above) & (lo % 2 == 0)), lo, hi)
    code = np.where(np.signbit(x), code | 128, code)
    return np.where(np.isnan(x), 127, code).astype(u2)


def fp8_pair(hi: np.ndarray, lo: np.ndarray, ty: str) -> np.ndarray:
    return (to_fp8(hi, ty) << u2(8)) | to_fp8(lo, ty)


def fp8_to_f16x2(x: np.ndarray, ty: str) -> np.ndarray:
    table = FP8[ty]
    lo, hi = to_f16(table[x & u2(255)]), to_f16(table[x >> u2(8)])
    return lo.astype(u4) | (hi.astype(u4) << u4(16))


DECODE = {"bf16": from_bf16, "f16": from_f16}
ENCODE = {"bf16": to_bf16, "f16": to_f16}


def pack(lo: np.ndarray, hi: np.ndarray) -> np.ndarray:
    return lo.astype(u4) | (hi.astype(u4) << u4(16))


def unpack(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return (x & u4(0xFFFF)).astype(u2), (x >> u4(16)).astype(u2)


def half(fn, ty: str, *args: np.ndarray) -> np.ndarray:
    """Apply `fn` on f32 values to bf16 / f16 arguments (or, elementwise, to their packed pairs)."""
    if ty.endswith("x2"):
        halves = [unpack(a) for a in args]
        return pack(*(half(fn, ty[:-2], *(h[i] for h in halves)) for i in (0, 1)))
    return ENCODE[ty](fn(*(DECODE[ty](a) for a in args)))


def half_compare(fn, ty: str, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return fn(DECODE[ty](a), DECODE[ty](b))


# ------------------------------------------------------------------ f32 / f64 arithmetic
def flush(x: np.ndarray) -> np.ndarray:
    """.ftz: subnormal f32 become zero of the same sign."""
    return np.where(np.abs(x) < f4(1.17549435e-38), np.copysign(f4(0), x), x)


def saturate(x: np.ndarray) -> np.ndarray:
    """.sat: clamp to [0, 1], NaN becomes +0."""
    return np.where(x > 0, np.minimum(x, x.dtype.type(1)), x.dtype.type(0))


def relu(x: np.ndarray) -> np.ndarray:
    """.relu: negative values become +0, NaN becomes canonical NaN."""
    return np.where(np.isnan(x), x, np.where(x > 0, x, x.dtype.type(0)))


def _round_odd_sum(p: np.ndarray, c: np.ndarray) -> np.ndarray:
    """p + c in f64 rounded to odd, so that a second rounding to f32 is correct."""
    s = p + c
    t = s - p
    err = (p - (s - t)) + (c - t)
    bits = s.view(np.int64)
    away = np.where((err > 0) == (s > 0), 1, -1)
    fix = (err != 0) & np.isfinite(s) & (bits & 1 == 0)
    return np.where(fix, bits + away, bits).view(f8)


def directed(op: str, mode: str, a: np.ndarray, b: np.ndarray, c: np.ndarray | None = None) -> np.ndarray:
    """add, sub, mul, fma of f32 rounded towards zero (rz), down (rm) or up (rp)."""
    x, y = a.astype(f8), np.asarray(b).astype(f8)
    if op == "mul":
        return narrow(x * y, mode)
    if op == "fma":
        assert c is not None
        x, y = x * y, np.asarray(c).astype(f8)
    return narrow(_round_odd_sum(*np.broadcast_arrays(x, -y if op == "sub" else y)), mode)


def fma(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """fma.rn: one rounding. The f32 product is exact in f64; a double rounding can only hurt half-way cases."""
    if a.dtype == f8:
        return _fma64(a, b, c)
    p, c = a.astype(f8) * b, np.asarray(c).astype(f8)
    s = np.atleast_1d(p + c)
    r = s.astype(f4)
    doubt = ((s.view(u8) & u8(0x1FFFFFFF)) == u8(0x10000000)) | ((np.abs(s) < 1.2e-38) & (s != 0))
    if doubt.any():
        p, c = np.broadcast_to(p, s.shape), np.broadcast_to(c, s.shape)
        r[doubt] = _round_odd_sum(p[doubt], c[doubt]).astype(f4)
    return r


def _fma64(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    from fractions import Fraction

    a, b, c = np.broadcast_arrays(a, b, c)
    out = a * b + c
    for i in np.ndindex(out.shape):
        if np.isfinite(out[i]) and out[i] != 0:
            exact = Fraction(float(a[i])) * Fraction(float(b[i])) + Fraction(float(c[i]))
            out[i] = exact.numerator / exact.denominator if exact else 0.0
    return out


def minimum(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """min: a NaN argument loses, -0 is smaller than +0."""
    r = np.fmin(a, b)
    return np.where((a == 0) & (b == 0), np.where(np.signbit(a), a, b), r)


def maximum(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    r = np.fmax(a, b)
    return np.where((a == 0) & (b == 0), np.where(np.signbit(a), b, a), r)


def minimum_nan(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """min.NaN: a NaN argument wins."""
    return np.where(np.isnan(a) | np.isnan(b), a.dtype.type(np.nan), minimum(a, b))


def maximum_nan(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.where(np.isnan(a) | np.isnan(b), a.dtype.type(np.nan), maximum(a, b))


def _via64(fn):
    return lambda x: fn(x.astype(f8)).astype(x.dtype)


def _reciprocal(x: np.ndarray) -> np.ndarray:
    return 1.0 / x


#: Unary functions by PTX opcode. Through f64, so the f32 result is correctly rounded but for rare ties.
UNARY = {
    "rcp": _via64(_reciprocal),
    "sqrt": np.sqrt,
    "rsqrt": _via64(lambda x: 1.0 / np.sqrt(x)),
    "ex2": _via64(np.exp2),
    "lg2": _via64(np.log2),
    "sin": _via64(np.sin),
    "cos": _via64(np.cos),
    "tanh": _via64(np.tanh),
}


def test_property(name: str, x: np.ndarray) -> np.ndarray:
    """testp: classification of a number."""
    tiny = np.finfo(x.dtype).tiny
    return {
        "finite": np.isfinite, "infinite": np.isinf, "number": lambda v: ~np.isnan(v), "notanumber": np.isnan,
        "normal": lambda v: np.isfinite(v) & (np.abs(v) >= tiny), "subnormal": lambda v: (np.abs(v) < tiny) & (v != 0),
    }[name](x)  # fmt: skip


# ------------------------------------------------------------------ conversions with rounding
_ROUND = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


def to_integer(x: np.ndarray, dtype: type, mode: str) -> np.ndarray:
    """cvt.<mode>.<int>.<float>: clamps to the range of the type; NaN gives 0 (narrow types and 32 bit)."""
    lo, hi = np.iinfo(dtype).min, np.iinfo(dtype).max
    r = _ROUND[mode](x.astype(f8))
    small = np.where(np.isnan(r) | (r <= lo) | (r >= hi), 0, r).astype(dtype)
    return np.where(np.isnan(r), dtype(0), np.where(r >= hi, dtype(hi), np.where(r <= lo, dtype(lo), small)))


def round_integral(x: np.ndarray, mode: str) -> np.ndarray:
    return _ROUND[mode](x)


def from_integer(x: np.ndarray, mode: str) -> np.ndarray:
    """cvt.<mode>.f32.<int>. 64-bit sources do not fit f64, so they are rounded from exact integers."""
    if x.dtype.itemsize < 8:
        return narrow(x.astype(f8), mode)
    r = x.astype(f4)  # one correct rounding by NumPy's C conversion
    if mode != "rn":
        r = np.array([_directed(int(v), mode) for v in x], f4)
    return r


def _directed(v: int, mode: str) -> np.float32:
    r = f4(v)
    exact = int(r)
    if exact == v:
        return r
    towards = {"rz": 0.0, "rm": -np.inf, "rp": np.inf}[mode]
    outside = (abs(exact) > abs(v)) if mode == "rz" else (exact > v if mode == "rm" else exact < v)
    return np.nextafter(r, f4(towards)) if outside else r


def narrow(x: np.ndarray, mode: str) -> np.ndarray:
    """f64 -> f32 with rounding rn, rz, rm or rp."""
    r = x.astype(f4)
    if mode == "rn":
        return r
    wide = r.astype(f8)
    toward = {"rz": f4(0), "rm": f4(-np.inf), "rp": f4(np.inf)}[mode]
    outside = np.abs(wide) > np.abs(x) if mode == "rz" else (wide > x if mode == "rm" else wide < x)
    return np.where(outside, np.nextafter(r, toward), r)


def half_fma(ty: str, a: np.ndarray, b: np.ndarray, c: np.ndarray, relu_result: bool) -> np.ndarray:
    """fma.rn on bf16 / f16 or packed pairs: one rounding, by rounding to odd at every wider step."""
    if ty.endswith("x2"):
        halves = [unpack(v) for v in (a, b, c)]
        return pack(*(half_fma(ty[:-2], *(h[i] for h in halves), relu_result) for i in (0, 1)))
    x, y, z = (DECODE[ty](v).astype(f8) for v in (a, b, c))
    s = _round_odd_sum(x * y, z)
    r = narrow(s, "rz")
    inexact = np.isfinite(s) & (r.astype(f8) != s)
    r = np.where(inexact, (r.view(u4) | u4(1)).view(f4), r)
    return ENCODE[ty](relu(r) if relu_result else r)


def half_from_integer(ty: str, x: np.ndarray) -> np.ndarray:
    """cvt.rn.{bf16,f16}.<int>: one rounding, for integers of at most 32 bits."""
    wide = x.astype(f8)
    r = narrow(wide, "rz")
    return ENCODE[ty](np.where(r.astype(f8) != wide, (r.view(u4) | u4(1)).view(f4), r))
