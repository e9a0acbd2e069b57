"""Code generators for moves and conversions (PTX ISA 9.7.9.1 mov, 9.7.9.20 cvta, 9.7.9.21 cvt)."""

from __future__ import annotations

from .codegen import Emitter, Mods, operation
from .parser import Instruction
from .scalars import CODE_NAMES, TYPES, Unsupported, is_float, size_of

INTS = ("u8", "s8", "u16", "s16", "u32", "s32", "u64", "s64")
FP8 = ("e4m3x2", "e5m2x2")


@operation("mov")
def mov(e: Emitter, x: Instruction, m: Mods) -> None:
    """mov, packing and unpacking. Copies, because block functions may write register arrays in place."""
    ty = m.type()
    dest, src = x.args
    if src.startswith("{"):
        parts = e.vector(src)
        part = f"b{size_of(ty) * 8 // len(parts)}"
        wide = CODE_NAMES[TYPES[ty]]
        terms = [
            f"({e.full(p, part)}.astype({wide}) << {e.constant(size_of(part) * 8 * i, TYPES[ty])})"
            for i, p in enumerate(parts)
        ]
        return e.write(dest, " | ".join(terms), ty)
    if dest.startswith("{"):
        parts = e.vector(dest)
        part = f"b{size_of(ty) * 8 // len(parts)}"
        value = e.var()
        e.line(f"{value} = {e.full(src, ty)}")
        for i, p in enumerate(parts):
            shift = e.constant(size_of(part) * 8 * i, TYPES[ty])
            e.write(p, f"({value} >> {shift}).astype({CODE_NAMES[TYPES[part]]})", part)
        return None
    if ty == "pred":
        return e.write(dest, f"{e.read(src, 'pred')} & TRUE", ty)
    if src in ("%clock", "%clock_hi", "%globaltimer_lo", "%clock64", "%globaltimer"):
        return e.write(dest, f"FULL(n, {CODE_NAMES[TYPES[ty]]}(S.clock()))", ty)
    params = {p.name: i for i, p in enumerate(e.kernel.params)}
    if src in params:
        raise Unsupported("address of a kernel parameter")
    value = e.full(src, ty)
    return e.write(dest, value if value.startswith("FULL") else f"{value}.copy()", ty)


@operation("cvta")
def cvta(e: Emitter, x: Instruction, m: Mods) -> None:
    """Between generic addresses and those of a state space."""
    ty = m.type("u32", "u64")
    to = m.flag("to")
    spaces = [s for s in list(m.left) if s.split("::")[0] in ("global", "shared", "local", "const", "param")]
    if len(spaces) != 1:
        raise Unsupported("state space")
    m.flag(spaces[0])
    space = spaces[0].split("::")[0]
    if space in ("const", "param"):
        raise Unsupported(f"state space .{space}")
    e.write(x.args[0], f"S.{'from' if to else 'to'}_generic({e.full(x.args[1], ty)}, {space!r})", ty)


@operation("cvt")
def cvt(e: Emitter, x: Instruction, m: Mods) -> None:
    s, d = m.type(), m.type()
    ftz, sat, relu, satfinite = (m.flag(f) for f in ("ftz", "sat", "relu", "satfinite"))
    rounding = m.pick("rn", "rz", "rm", "rp", "rni", "rzi", "rmi", "rpi", "rna")
    dest = x.args[0]
    if d in FP8:
        if s != "f32" or relu or rounding != "rn" or not satfinite:
            raise Unsupported("form of fp8 conversion")
        return e.write(dest, f"F.fp8_pair({e.full(x.args[1], s)}, {e.full(x.args[2], s)}, {d!r})", "b16")
    if satfinite:
        raise Unsupported(".satfinite")
    if s in FP8:
        if d != "f16x2" or relu:
            raise Unsupported("form of fp8 conversion")
        return e.write(dest, f"F.fp8_to_f16x2({e.full(x.args[1], 'b16')}, {s!r})", "b32")
    if d in ("bf16x2", "f16x2"):
        if s != "f32" or rounding not in ("rn", "rz"):
            raise Unsupported("form of packed conversion")
        hi, lo = (f"F.relu({e.full(a, s)})" if relu else e.full(a, s) for a in x.args[1:3])
        enc = f"F.to_{d[:-2]}"
        return e.write(dest, f"F.pack({enc}({lo}, {rounding!r}), {enc}({hi}, {rounding!r}))", "b32")
    a = e.full(x.args[1], s)
    if s in ("bf16", "f16"):
        a, s = f"F.from_{s}({a})", "f32"
        if d in ("bf16", "f16") and rounding is None:
            rounding = "rn"
    if ftz and s == "f32":
        a = f"F.flush({a})"
    if is_float(s) and is_float(d):
        return _float_to_float(e, x, a, s, d, rounding, ftz=ftz, sat=sat, relu=relu)
    if relu:
        raise Unsupported(".relu")
    if is_float(s):
        if rounding not in ("rni", "rzi", "rmi", "rpi"):
            raise Unsupported(f"rounding .{rounding}")
        return e.write(dest, f"F.to_integer({a}, {CODE_NAMES[TYPES[d]]}, {rounding!r})", d)
    if is_float(d):
        rounding = rounding or "rn"
        if d in ("bf16", "f16"):
            if rounding != "rn" or sat or size_of(s) > 4:
                raise Unsupported("form of integer to half precision conversion")
            return e.write(dest, f"F.half_from_integer({d!r}, {a})", "b16")
        expr = f"{a}.astype(f8)" if d == "f64" else f"F.from_integer({a}, {rounding!r})"
        return e.write(dest, f"F.saturate({expr})" if sat else expr, d)
    if d not in INTS or s not in INTS:
        raise Unsupported(f"types .{d}.{s}")
    if sat:
        lo, hi = (
            (-(1 << size_of(d) * 8 - 1), (1 << size_of(d) * 8 - 1) - 1)
            if d[0] == "s"
            else (0, (1 << size_of(d) * 8) - 1)
        )
        slo, shi = (
            (-(1 << size_of(s) * 8 - 1), (1 << size_of(s) * 8 - 1) - 1)
            if s[0] == "s"
            else (0, (1 << size_of(s) * 8) - 1)
        )
        a = f"np.clip({a}, {CODE_NAMES[TYPES[s]]}({max(lo, slo)}), {CODE_NAMES[TYPES[s]]}({min(hi, shi)}))"
    return e.write(dest, f"{a}.astype({CODE_NAMES[TYPES[d]]})", d)


def _float_to_float(
    e: Emitter, x: Instruction, a: str, s: str, d: str, rounding: str | None, *, ftz: bool, sat: bool, relu: bool
) -> None:
    if relu:
        a = f"F.relu({a})"
    if d in ("bf16", "f16"):
        if s == "f64" or rounding not in ("rn", "rz") or sat:
            raise Unsupported("form of half precision conversion")
        return e.write(x.args[0], f"F.to_{d}({a}, {rounding!r})", "b16")
    if rounding in ("rni", "rzi", "rmi", "rpi"):
        if s != d:
            raise Unsupported(f"rounding .{rounding} between different types")
        expr = f"F.round_integral({a}, {rounding!r})"
    elif d == "f32" and s == "f64":
        expr = f"F.narrow({a}, {rounding or 'rn'!r})"
    else:
        expr = f"{a}.astype({CODE_NAMES[TYPES[d]]})"
    if sat:
        expr = f"F.saturate({expr})"
    if ftz and d == "f32":
        expr = f"F.flush({expr})"
    return e.write(x.args[0], expr, d)
