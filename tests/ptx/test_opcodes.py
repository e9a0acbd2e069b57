"""One test for each opcode family against NumPy or exact Python arithmetic, with edge values."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest

from .ptx_snippets import run_snippet

pytestmark = pytest.mark.execute

U32 = np.array([0, 1, 2, 3, 31, 32, 33, 0x7FFFFFFF, 0x80000000, 0x80000001, 0xFFFFFFFE, 0xFFFFFFFF, 0x12345678,
                0xDEADBEEF,                 255, 256], np.uint64)  # fmt: skip
U64 = np.array([0, 1, 63, 64, 2**31, 2**32 - 1, 2**32, 2**63 - 1, 2**63, 2**63 + 1, 2**64 - 1, 0x0123456789ABCDEF],
               np.uint64)  # fmt: skip
F32_BITS = np.array([
    0x00000000, 0x80000000, 0x3F800000, 0xBF800000, 0x7F800000, 0xFF800000, 0x7FC00000, 0x00000001, 0x807FFFFF,
    0x00800000, 0x7F7FFFFF, 0x40490FDB, 0x3EAAAAAB, 0x4B000001, 0xC2C80000, 0x34000000,
], np.uint64)  # fmt: skip


def _signed(v: int, bits: int) -> int:
    v &= (1 << bits) - 1
    return v - (1 << bits) if v >> (bits - 1) else v


def _pairs(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    a, b = np.meshgrid(values, values)
    return a.ravel(), b.ravel()


def _f(bits: int) -> float:
    return float(np.array(bits, np.uint32).view(np.float32))


def _trunc_div(a: int, b: int) -> int:
    q = abs(a) // abs(b)
    return -q if (a < 0) != (b < 0) else q


INTEGER: dict[str, Callable[[int, int, int], int]] = {
    "add.s{w}": lambda a, b, w: a + b,
    "sub.u{w}": lambda a, b, w: a - b,
    "mul.lo.u{w}": lambda a, b, w: a * b,
    "mul.hi.u{w}": lambda a, b, w: (a * b) >> w,
    "mul.hi.s{w}": lambda a, b, w: (_signed(a, w) * _signed(b, w)) >> w,
    "min.s{w}": lambda a, b, w: min(_signed(a, w), _signed(b, w)),
    "max.u{w}": lambda a, b, w: max(a, b),
    "div.s{w}": lambda a, b, w: _trunc_div(_signed(a, w), _signed(b, w)) if b else -1,
    "div.u{w}": lambda a, b, w: a // b if b else -1,
    "rem.s{w}": lambda a, b, w: (
        (_signed(a, w) - _signed(b, w) * _trunc_div(_signed(a, w), _signed(b, w))) if b else None
    ),
    "and.b{w}": lambda a, b, w: a & b,
    "or.b{w}": lambda a, b, w: a | b,
    "xor.b{w}": lambda a, b, w: a ^ b,
}


@pytest.mark.parametrize("width", [32, 64])
@pytest.mark.parametrize("op", INTEGER)
def test_integer_binary(op: str, width: int) -> None:
    a, b = _pairs(U32 if width == 32 else U64)
    got = run_snippet(f"{op.format(w=width)} %d, %a, %b;", width, a, b)
    for x, y, z in zip(a.tolist(), b.tolist(), got.tolist(), strict=True):
        want = INTEGER[op](x, y, width)
        assert want is None or z == want & ((1 << width) - 1), (op, x, y)


def test_carry_chains() -> None:
    a, b = _pairs(U64)
    split = ".reg .b32 al, ah, bl, bh, dl, dh; mov.b64 {al, ah}, %wide_a; mov.b64 {bl, bh}, %wide_b; "
    join = " mov.b64 %wide_d, {dl, dh};"
    got = run_snippet(split + "add.cc.u32 dl, al, bl; addc.u32 dh, ah, bh;" + join, 32, a, b, wide=True)
    assert (got == a + b).all()
    got = run_snippet(split + "sub.cc.u32 dl, al, bl; subc.u32 dh, ah, bh;" + join, 32, a, b, wide=True)
    assert (got == a - b).all()
    got = run_snippet(split + "mad.lo.cc.u32 dl, al, bl, ah; madc.hi.u32 dh, al, bl, bh;" + join, 32, a, b, wide=True)
    low = np.uint64(2**32 - 1)
    assert (got == (a & low) * (b & low) + (a >> np.uint64(32)) + (b & ~low)).all()


@pytest.mark.parametrize("width", [32, 64])
@pytest.mark.parametrize("op", ["shl.b", "shr.u", "shr.s"])
def test_shifts_by_the_width_and_more(op: str, width: int) -> None:
    a, s = np.meshgrid(U32 if width == 32 else U64, np.array([0, 1, 31, 32, 33, 63, 64, 65, 2**32 - 1], np.uint64))
    a, s = a.ravel(), s.ravel()
    body = f".reg .b32 s; cvt.u32.u64 s, %wide_b; {op}{width} %d, %a, s;"
    got = run_snippet(body, width, a, s)
    for x, n, z in zip(a.tolist(), s.tolist(), got.tolist(), strict=True):
        value = _signed(x, width) if op == "shr.s" else x
        want = (value << n if n < width else 0) if op == "shl.b" else value >> min(n, width)
        assert z == want & ((1 << width) - 1), (op, x, n)


def test_bit_counting() -> None:
    for width, values in ((32, U32), (64, U64)):
        pop = run_snippet(f".reg .b32 s; popc.b{width} s, %a; cvt.u64.u32 %wide_d, s;", width, values, wide=True)
        clz = run_snippet(f".reg .b32 s; clz.b{width} s, %a; cvt.u64.u32 %wide_d, s;", width, values, wide=True)
        top = run_snippet(f".reg .b32 s; bfind.s{width} s, %a; cvt.u64.u32 %wide_d, s;", width, values, wide=True)
        rev = run_snippet(f"brev.b{width} %d, %a;", width, values)
        for v, p, c, t, r in zip(values.tolist(), pop.tolist(), clz.tolist(), top.tolist(), rev.tolist(), strict=True):
            assert (p, c) == (bin(v).count("1"), width - v.bit_length())
            s = _signed(v, width)
            assert t == ((s if s >= 0 else ~s).bit_length() - 1) & 0xFFFFFFFF
            assert r == int(format(v, f"0{width}b")[::-1], 2)


@pytest.mark.parametrize("sign", ["u", "s"])
@pytest.mark.parametrize("width", [32, 64])
def test_bit_fields(width: int, sign: str) -> None:
    for pos, length in [
        (0, 0),
        (0, 1),
        (0, width),
        (4, 8),
        (width - 1, 1),
        (width - 4, 8),
        (width, 4),
        (3, width),
        (255, 255),
    ]:
        values = U32 if width == 32 else U64
        got = run_snippet(f"bfe.{sign}{width} %d, %a, {pos}, {length};", width, values)
        put = run_snippet(f"bfi.b{width} %d, %b, %a, {pos}, {length};", width, values, values[::-1].copy())
        for v, z, base, p in zip(values.tolist(), got.tolist(), values.tolist(), put.tolist(), strict=True):
            s = _signed(v, width)
            top = s >> min(pos + length - 1, width - 1) & 1 if sign == "s" and length else 0
            bits = [(v >> (pos + i) & 1 if pos + i < width else top) if i < length else top for i in range(width)]
            assert z == sum(b << i for i, b in enumerate(bits)), (sign, v, pos, length)
            field = values[::-1][values.tolist().index(v)]
            want = base
            for i in range(length):
                if pos + i < width:
                    want = want & ~(1 << (pos + i)) | (int(field) >> i & 1) << (pos + i)
            assert p == want


def test_permute_funnel_lop3() -> None:
    a, b = _pairs(U32)
    for selector in (0x3210, 0x7654, 0x5410, 0x7632, 0x0123, 0xFEDC, 0x8080):
        got = run_snippet(f"prmt.b32 %d, %a, %b, {selector};", 32, a, b)
        for x, y, z in zip(a.tolist(), b.tolist(), got.tolist(), strict=True):
            both, want = x | y << 32, 0
            for i in range(4):
                n = selector >> 4 * i & 15
                byte = both >> 8 * (n & 7) & 255
                want |= (255 * (byte >> 7) if n & 8 else byte) << 8 * i
            assert z == want
    for amount in (0, 1, 31, 32, 33, 64):
        for mode in ("wrap", "clamp"):
            n = amount & 31 if mode == "wrap" else min(amount, 32)
            left = run_snippet(f"shf.l.{mode}.b32 %d, %a, %b, {amount};", 32, a, b)
            right = run_snippet(f"shf.r.{mode}.b32 %d, %a, %b, {amount};", 32, a, b)
            for x, y, l_, r in zip(a.tolist(), b.tolist(), left.tolist(), right.tolist(), strict=True):
                both = x | y << 32
                assert l_ == (both << n >> 32) & 0xFFFFFFFF
                assert r == (both >> n) & 0xFFFFFFFF
    for table in (0x00, 0x96, 0xE8, 0xCA, 0xFF, 0x1B):
        got = run_snippet(f"lop3.b32 %d, %a, %b, 0x0F0FA5A5, {table};", 32, a, b)
        for x, y, z in zip(a.tolist(), b.tolist(), got.tolist(), strict=True):
            c = 0x0F0FA5A5
            assert z == sum((table >> (x >> i & 1) * 4 + (y >> i & 1) * 2 + (c >> i & 1) & 1) << i for i in range(32))


# ------------------------------------------------------------------ floating point
def _same(got: np.ndarray, want: list[float], dtype: type = np.float32) -> None:
    g, w = got.astype(np.uint32).view(np.float32), np.array(want, dtype).astype(np.float32)
    nan = np.isnan(w)
    assert (np.isnan(g) == nan).all()
    assert (g[~nan].view(np.uint32) == w[~nan].view(np.uint32)).all()


@pytest.mark.parametrize(("op", "fn"), [("add.f32", np.add), ("sub.rn.f32", np.subtract), ("mul.f32", np.multiply),
                                        ("div.rn.f32", np.divide)])  # fmt: skip
def test_float_arithmetic(op: str, fn: np.ufunc) -> None:
    a, b = _pairs(F32_BITS)
    got = run_snippet(f"{op} %d, %a, %b;", 32, a, b)
    with np.errstate(all="ignore"):
        _same(got, fn(a.astype(np.uint32).view(np.float32), b.astype(np.uint32).view(np.float32)).tolist())


def _round_exact(value: Fraction, mode: str) -> float:
    """The f32 next to an exact value."""
    near = np.float32(float(value))  # within one step of the answer
    candidates = sorted({float(np.nextafter(near, np.float32(d))) for d in (-np.inf, np.inf)} | {float(near)})
    finite = [c for c in candidates if math.isfinite(c)]
    if mode == "rm":
        return max(c for c in finite if Fraction(c) <= value)
    if mode == "rp":
        return min(c for c in finite if Fraction(c) >= value)
    if mode == "rz":
        return _round_exact(value, "rm" if value >= 0 else "rp")
    best = min(abs(Fraction(c) - value) for c in finite)
    ties = [c for c in finite if abs(Fraction(c) - value) == best]
    return ties[0] if len(ties) == 1 else next(c for c in ties if int(np.float32(c).view(np.uint32)) % 2 == 0)


@pytest.mark.parametrize("mode", ["rn", "rz", "rm", "rp"])
def test_fma_rounds_once(mode: str, seed) -> None:
    rng = np.random.default_rng(seed)
    a, b, c = rng.standard_normal((3, 400)).astype(np.float32)
    c = np.where(np.arange(400) % 3 == 0, -(a * b), c * np.float32(2.0) ** rng.integers(-40, 40, 400)).astype(
        np.float32
    )
    words = [v.view(np.uint32).astype(np.uint64) for v in (a, b, c)]
    got = run_snippet(f"fma.{mode}.f32 %d, %a, %b, %c;", 32, *words).astype(np.uint32).view(np.float32)
    for x, y, z, g in zip(a, b, c, got, strict=True):
        exact = Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z))
        assert float(g) == _round_exact(exact, mode), (x, y, z)


def test_min_max_with_nan_and_zeros() -> None:
    a, b = _pairs(F32_BITS)
    for op, pick in (("min", min), ("max", max)):
        plain = run_snippet(f"{op}.f32 %d, %a, %b;", 32, a, b)
        strict = run_snippet(f"{op}.NaN.f32 %d, %a, %b;", 32, a, b)
        for x, y, p, s in zip(a.tolist(), b.tolist(), plain.tolist(), strict.tolist(), strict=True):
            fx, fy = _f(x), _f(y)
            if math.isnan(fx) or math.isnan(fy):
                assert math.isnan(_f(s))
                assert (
                    math.isnan(_f(p)) if math.isnan(fx) and math.isnan(fy) else _f(p) == (fy if math.isnan(fx) else fx)
                )
            elif fx == fy == 0:
                assert p == pick((x, y), key=lambda v: math.copysign(1, _f(v)))
            else:
                assert _f(p) == _f(s) == pick(fx, fy)


def test_comparisons_with_nan() -> None:
    a, b = _pairs(F32_BITS)
    python = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
    for name, sign in python.items():
        for unordered in ("", "u"):
            body = f".reg .pred p; setp.{name}{unordered}.f32 p, %a, %b; selp.b32 %d, 1, 0, p;"
            got = run_snippet(body, 32, a, b)
            for x, y, z in zip(a.tolist(), b.tolist(), got.tolist(), strict=True):
                nan = math.isnan(_f(x)) or math.isnan(_f(y))
                want = bool(unordered) if nan else eval(f"{_f(x)!r} {sign} {_f(y)!r}", {"inf": math.inf})
                assert z == want, (name, unordered, x, y)
    for name in ("num", "nan"):
        got = run_snippet(f".reg .pred p; setp.{name}.f32 p, %a, %b; selp.b32 %d, 1, 0, p;", 32, a, b)
        want = [
            (math.isnan(_f(x)) or math.isnan(_f(y))) == (name == "nan")
            for x, y in zip(a.tolist(), b.tolist(), strict=True)
        ]
        assert got.tolist() == want


@pytest.mark.parametrize(("op", "fn"), [
    ("rcp.approx.ftz.f32", lambda x: 1 / x), ("sqrt.rn.f32", np.sqrt), ("rsqrt.approx.f32", lambda x: 1 / np.sqrt(x)),
    ("ex2.approx.ftz.f32", np.exp2), ("lg2.approx.f32", np.log2), ("tanh.approx.f32", np.tanh),
    ("sin.approx.f32", np.sin),
])  # fmt: skip
def test_approximate_units_are_correctly_rounded(op: str, fn: Callable[[np.ndarray], np.ndarray]) -> None:
    values = F32_BITS.astype(np.uint32).view(np.float32)
    tiny = np.float32(2.0**-126)
    if ".ftz" in op:
        values = np.where(np.abs(values) < tiny, np.copysign(np.float32(0), values), values)
    with np.errstate(all="ignore"):
        want = fn(values.astype(np.float64)).astype(np.float32)
        if ".ftz" in op:
            want = np.where(np.abs(want) < tiny, np.copysign(np.float32(0), want), want)
    _same(run_snippet(f"{op} %d, %a;", 32, F32_BITS), want.tolist())


def test_conversions_to_integers_clamp() -> None:
    for ty, lo, hi in (("s32", -(2**31), 2**31 - 1), ("u32", 0, 2**32 - 1)):
        for mode, fn in (("rzi", math.trunc), ("rni", round), ("rmi", math.floor), ("rpi", math.ceil)):
            got = run_snippet(f"cvt.{mode}.{ty}.f32 %d, %a;", 32, F32_BITS)
            for x, z in zip(F32_BITS.tolist(), got.tolist(), strict=True):
                v = _f(x)
                want = 0 if math.isnan(v) else (hi if v > 0 else lo) if math.isinf(v) else min(max(fn(v), lo), hi)
                assert z == want & 0xFFFFFFFF, (ty, mode, v)


def test_integer_conversions() -> None:
    assert run_snippet(
        "cvt.u32.u16 %d, h; ".replace("cvt", ".reg .b16 h; cvt.u16.u32 h, %a; cvt"), 32, U32
    ).tolist() == [v & 0xFFFF for v in U32.tolist()]
    got = run_snippet("cvt.s32.s8 %d, %a;", 32, U32)
    assert got.tolist() == [_signed(v, 8) & 0xFFFFFFFF for v in U32.tolist()]
    got = run_snippet("cvt.s64.s32 %wide_d, %a;", 32, U32, wide=True)
    assert got.tolist() == [_signed(v, 32) & (2**64 - 1) for v in U32.tolist()]
    got = run_snippet("cvt.sat.u8.s32 %d, %a;", 32, U32)
    assert got.tolist() == [min(max(_signed(v, 32), 0), 255) for v in U32.tolist()]
    got = run_snippet("cvt.rn.f32.s32 %d, %a;", 32, U32)
    _same(got, [float(np.float32(_signed(v, 32))) for v in U32.tolist()])
    got = run_snippet("cvt.rz.f32.u64 %d, %wide_a;", 32, U64)
    _same(got, [_round_exact(Fraction(v), "rz") for v in U64.tolist()])


def test_integers_to_half_precision() -> None:
    import torch

    exact = torch.tensor([_signed(v, 32) for v in U32.tolist()], dtype=torch.float64)
    for ty, dtype in (("bf16", torch.bfloat16), ("f16", torch.float16)):
        got = run_snippet(f".reg .b16 h; cvt.rn.{ty}.s32 h, %a; cvt.u32.u16 %d, h;", 32, U32).astype(np.uint16)
        back = torch.from_numpy(got.view(np.int16).copy()).view(dtype).double()
        near = [torch.nextafter(back.to(dtype), torch.tensor(d, dtype=dtype)).double() for d in (-math.inf, math.inf)]
        finite = back.isfinite()
        assert all(((back - exact).abs() <= (n - exact).abs())[finite].all() for n in near)


def test_bf16_and_f16_rounding(seed) -> None:
    import torch

    rng = np.random.default_rng(seed)
    bits = np.concatenate(
        [
            F32_BITS,
            rng.integers(0, 2**32, 2000, dtype=np.uint64),
            0x3F808000 + np.arange(0, 0x30000, 0x8000, dtype=np.uint64),
        ]
    )
    f = torch.from_numpy(bits.astype(np.uint32).view(np.float32).copy())
    for ty, dtype in (("bf16", torch.bfloat16), ("f16", torch.float16)):
        got = run_snippet(f".reg .b16 h; cvt.rn.{ty}.f32 h, %a; cvt.u32.u16 %d, h;", 32, bits).astype(np.uint16)
        want = f.to(dtype)
        nan = torch.isnan(want).numpy()
        assert (got[nan] == 0x7FFF).all()
        assert (got[~nan] == want.view(torch.int16).numpy().view(np.uint16)[~nan]).all()
        back = run_snippet(f".reg .b16 h; cvt.u16.u32 h, %a; cvt.f32.{ty} %d, h;", 32, got.astype(np.uint64))
        _same(back, torch.from_numpy(got.view(np.int16).copy()).view(dtype).float().tolist())


@pytest.mark.parametrize("ty", ["bf16", "f16"])
def test_packed_half_arithmetic(ty: str, seed) -> None:
    import torch

    rng = np.random.default_rng(seed)
    dtype = {"bf16": torch.bfloat16, "f16": torch.float16}[ty]
    a, b, c = (torch.from_numpy(rng.standard_normal(64).astype(np.float32)).to(dtype) for _ in range(3))
    words = [v.view(torch.int32).numpy().view(np.uint32).astype(np.uint64) for v in (a, b, c)]

    def back(v: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(v.astype(np.uint32).view(np.int32).copy()).view(dtype)

    assert torch.equal(back(run_snippet(f"add.rn.{ty}x2 %d, %a, %b;", 32, *words)), a + b)
    assert torch.equal(back(run_snippet(f"mul.rn.{ty}x2 %d, %a, %b;", 32, *words)), a * b)
    assert torch.equal(back(run_snippet(f"max.{ty}x2 %d, %a, %b;", 32, *words)), torch.maximum(a, b))
    assert torch.equal(back(run_snippet(f"neg.{ty}x2 %d, %a;", 32, *words)), -a)
    exact = [Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z)) for x, y, z in zip(a, b, c, strict=True)]
    got = back(run_snippet(f"fma.rn.{ty}x2 %d, %a, %b, %c;", 32, *words))
    for g, e in zip(got, exact, strict=True):
        step = torch.tensor([float(g)], dtype=dtype)
        near = [float(torch.nextafter(step, torch.tensor([d], dtype=dtype))) for d in (-math.inf, math.inf)]
        assert abs(Fraction(float(g)) - e) <= min(abs(Fraction(n) - e) for n in near)


def test_fp8_conversions(seed) -> None:
    import torch

    rng = np.random.default_rng(seed)
    f = torch.from_numpy(np.concatenate([rng.standard_normal(254) * 30, [1e9, -1e9]]).astype(np.float32))
    words = [v.contiguous().view(torch.int32).numpy().view(np.uint32).astype(np.uint64) for v in (f, f.flip(0))]
    for ty, dtype in (("e4m3", torch.float8_e4m3fn), ("e5m2", torch.float8_e5m2)):
        top = torch.finfo(dtype).max
        body = f".reg .b16 h; cvt.rn.satfinite.{ty}x2.f32 h, %b, %a; cvt.u32.u16 %d, h;"
        got = run_snippet(body, 32, *words).astype(np.uint16)
        want = f.clamp(-top, top).to(dtype).view(torch.uint8).numpy()
        assert ((got & 255) == want).all()
        assert ((got >> 8) == want[::-1]).all()
        back = run_snippet(f".reg .b16 h; cvt.u16.u32 h, %a; cvt.rn.f16x2.{ty}x2 %d, h;", 32, want.astype(np.uint64))
        low = torch.from_numpy((back & 0xFFFF).astype(np.uint16).view(np.int16).copy()).view(torch.float16)
        assert torch.equal(low, torch.from_numpy(want.copy()).view(dtype).to(torch.float16))
