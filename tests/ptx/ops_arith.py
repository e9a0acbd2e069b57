"""Code generators for arithmetic, logic, comparison and selection (PTX ISA 9.7.1 - 9.7.8)."""

from __future__ import annotations

from .codegen import Emitter, Mods, operation
from .ops_carry import with_carry
from .parser import Instruction
from .scalars import CODE_NAMES, TYPES, Unsupported, is_float, size_of

HALF = ("f16", "bf16", "f16x2", "bf16x2")
INTS = ("u16", "s16", "u32", "s32", "u64", "s64")
BITS = ("pred", "b16", "b32", "b64")


def _finish(e: Emitter, x: Instruction, m: Mods, expr: str, ty: str, *, ftz: bool, sat: bool) -> None:
    if sat:
        expr = f"F.saturate({expr})"
    if ftz and ty == "f32":
        expr = f"F.flush({expr})"
    e.write(x.args[0], expr, ty)


def _float_args(e: Emitter, x: Instruction, ty: str, ftz: bool, count: int) -> list[str]:
    args = [e.full(a, ty) for a in x.args[1 : 1 + count]]
    return [f"F.flush({a})" for a in args] if ftz and ty == "f32" else args


_HALF_BINARY = {"add": "np.add", "sub": "np.subtract", "mul": "np.multiply"}
_INT_BINARY = {"add": "{0} + {1}", "sub": "{0} - {1}", "mul": "{0} * {1}"}


@operation("add", "sub", "mul")
def add_sub_mul(e: Emitter, x: Instruction, m: Mods) -> None:
    """9.7.1.1-3 integer, 9.7.3.3-5 floating point, 9.7.4.1-3 half precision."""
    ty = m.type(*INTS, "f32", "f64", *HALF)
    ftz, sat = m.flag("ftz"), m.flag("sat")
    if is_float(ty):
        rounding = m.pick("rn", "rz", "rm", "rp", default="rn")
        args = _float_args(e, x, ty, ftz, 2)
        if ty in HALF:
            if ftz or sat or rounding != "rn":
                raise Unsupported("modifier on half precision arithmetic")
            return e.write(x.args[0], f"F.half({_HALF_BINARY[x.op]}, {ty!r}, {args[0]}, {args[1]})", ty)
        expr = _INT_BINARY[x.op].format(*args)
        if rounding != "rn":
            if ty == "f64":
                raise Unsupported(f"rounding .{rounding}")
            expr = f"F.directed({x.op!r}, {rounding!r}, {args[0]}, {args[1]})"
        return _finish(e, x, m, expr, ty, ftz=ftz, sat=sat)
    if x.op == "mul":
        return _multiply(e, x, m, ty, None)
    if m.flag("cc"):
        return with_carry(e, x, m, ty, carry_in=False, carry_out=True)
    a, b = e.read(x.args[1], ty), e.read(x.args[2], ty)
    if sat:
        if ty != "s32":
            raise Unsupported(".sat on this type")
        return e.write(x.args[0], f"I.{x.op}_sat({a}, {b})", ty)
    e.write(x.args[0], _INT_BINARY[x.op].format(a, b), ty)
    return None


def _multiply(e: Emitter, x: Instruction, m: Mods, ty: str, addend: str | None) -> None:
    half = m.need("lo", "hi", "wide")
    if half == "wide":
        wide = ty[0] + str(size_of(ty) * 16)
        w = CODE_NAMES[TYPES[wide]]
        expr = f"{e.full(x.args[1], ty)}.astype({w}) * {e.full(x.args[2], ty)}.astype({w})"
        ty = wide
    elif half == "hi":
        expr = f"I.mulhi({e.full(x.args[1], ty)}, {e.full(x.args[2], ty)})"
    else:
        expr = f"{e.read(x.args[1], ty)} * {e.read(x.args[2], ty)}"
    if addend is not None:
        expr += f" + {e.read(addend, ty)}"
    e.write(x.args[0], expr, ty)


@operation("mad", "fma")
def mad(e: Emitter, x: Instruction, m: Mods) -> None:
    """9.7.1.4 mad, 9.7.3.6-7 fma and mad (floating), 9.7.4.4 fma (half)."""
    ty = m.type(*INTS, "f32", "f64", *HALF)
    if not is_float(ty):
        if x.op == "fma":
            raise Unsupported("integer fma")
        if m.flag("cc"):
            return with_carry(e, x, m, ty, carry_in=False, carry_out=True)
        return _multiply(e, x, m, ty, x.args[3])
    ftz, sat = m.flag("ftz"), m.flag("sat")
    rounding = m.need("rn", "rz", "rm", "rp")
    if rounding != "rn" and ty != "f32":
        raise Unsupported(f"rounding .{rounding}")
    args = _float_args(e, x, ty, ftz, 3)
    if ty in HALF:
        relu = m.flag("relu")
        if ftz or sat:
            raise Unsupported("modifier on half precision fma")
        return e.write(x.args[0], f"F.half_fma({ty!r}, {', '.join(args)}, {relu})", ty)
    call = "F.fma(" if rounding == "rn" else f"F.directed('fma', {rounding!r}, "
    return _finish(e, x, m, f"{call}{', '.join(args)})", ty, ftz=ftz, sat=sat)


@operation("mul24", "mad24")
def mul24(e: Emitter, x: Instruction, m: Mods) -> None:
    raise Unsupported("24-bit multiplication")


@operation("div")
def div(e: Emitter, x: Instruction, m: Mods) -> None:
    """9.7.1.8 integer, 9.7.3.8 floating; .approx and .full give the correctly rounded quotient."""
    ty = m.type(*INTS, "f32", "f64")
    if not is_float(ty):
        return e.write(x.args[0], f"I.divide({e.full(x.args[1], ty)}, {e.full(x.args[2], ty)})", ty)
    m.need("rn", "approx", "full")
    ftz = m.flag("ftz")
    a, b = _float_args(e, x, ty, ftz, 2)
    return _finish(e, x, m, f"{a} / {b}", ty, ftz=ftz, sat=False)


@operation("rem")
def rem(e: Emitter, x: Instruction, m: Mods) -> None:
    ty = m.type(*INTS)
    e.write(x.args[0], f"I.remainder({e.full(x.args[1], ty)}, {e.full(x.args[2], ty)})", ty)


@operation("neg", "abs")
def neg_abs(e: Emitter, x: Instruction, m: Mods) -> None:
    """9.7.1.10-11, 9.7.3.10-11, 9.7.4.5-6. Floating forms only touch the sign bit."""
    ty = m.type("s16", "s32", "s64", "f32", "f64", *HALF)
    ftz = m.flag("ftz")
    if ty in HALF:
        if ftz:
            raise Unsupported(".ftz on half precision")
        sign = e.constant(0x8000 if size_of(ty) == 2 else 0x80008000, TYPES[ty])
        a = e.read(x.args[1], ty)
        return e.write(x.args[0], f"{a} ^ {sign}" if x.op == "neg" else f"{a} & ~{sign}", ty)
    a = _float_args(e, x, ty, ftz, 1)[0] if is_float(ty) else e.read(x.args[1], ty)
    return e.write(x.args[0], f"-{a}" if x.op == "neg" else f"np.abs({a})", ty)


@operation("min", "max")
def min_max(e: Emitter, x: Instruction, m: Mods) -> None:
    """9.7.1.12-13, 9.7.3.12-13, 9.7.4.7-8; also the three-operand f32 forms."""
    ty = m.type(*INTS, "f32", "f64", *HALF)
    ftz, nan, relu = m.flag("ftz"), m.flag("NaN"), m.flag("relu")
    name = {"min": "minimum", "max": "maximum"}[x.op]
    if not is_float(ty):
        expr = f"np.{name}({e.read(x.args[1], ty)}, {e.read(x.args[2], ty)})"
        zero = e.constant(0, TYPES[ty])
        return e.write(x.args[0], f"np.maximum({expr}, {zero})" if relu else expr, ty)
    name += "_nan" if nan else ""
    if ty in HALF:
        if ftz or relu:
            raise Unsupported("modifier on half precision min / max")
        a, b = e.full(x.args[1], ty), e.full(x.args[2], ty)
        return e.write(x.args[0], f"F.half(F.{name}, {ty!r}, {a}, {b})", ty)
    args = _float_args(e, x, ty, ftz, len(x.args) - 1)
    expr = args[0]
    for a in args[1:]:
        expr = f"F.{name}({expr}, {a})"
    return e.write(x.args[0], expr, ty)


@operation("and", "or", "xor", "not")
def logic(e: Emitter, x: Instruction, m: Mods) -> None:
    """9.7.8.1-4."""
    ty = m.type(*BITS)
    if x.op == "not":
        return e.write(x.args[0], f"~{e.read(x.args[1], ty)}", ty)
    sign = {"and": "&", "or": "|", "xor": "^"}[x.op]
    return e.write(x.args[0], f"{e.read(x.args[1], ty)} {sign} {e.read(x.args[2], ty)}", ty)


@operation("shl", "shr")
def shift(e: Emitter, x: Instruction, m: Mods) -> None:
    """9.7.8.8-9."""
    ty = m.type("b16", "b32", "b64", *INTS)
    a, s = x.args[1:]
    value = e.read(a, ty)
    if not e.is_register(s) and 0 <= int(s, 0) < size_of(ty) * 8:
        return e.write(x.args[0], f"{value} {'<<' if x.op == 'shl' else '>>'} {e.constant(int(s, 0), TYPES[ty])}", ty)
    return e.write(x.args[0], f"I.{x.op}({e.full(a, ty)}, {e.full(s, 'u32')})", ty)


@operation("shf")
def funnel(e: Emitter, x: Instruction, m: Mods) -> None:
    """9.7.8.7."""
    m.type("b32")
    name, wrap = m.need("l", "r"), m.need("wrap", "clamp") == "wrap"
    a, b, s = (e.full(q, "u32") for q in x.args[1:])
    e.write(x.args[0], f"I.funnel_{'left' if name == 'l' else 'right'}({a}, {b}, {s}, {wrap})", "b32")


@operation("popc", "clz", "brev", "bfind")
def count_bits(e: Emitter, x: Instruction, m: Mods) -> None:
    """9.7.1.14-17."""
    ty = m.type("b32", "b64", "u32", "s32", "u64", "s64")
    a = e.full(x.args[1], ty)
    if x.op == "bfind":
        return e.write(x.args[0], f"I.find_msb({a}, {m.flag('shiftamt')})", "u32")
    return e.write(x.args[0], f"I.{x.op}({a})", ty if x.op == "brev" else "u32")


@operation("bfe")
def bit_extract(e: Emitter, x: Instruction, m: Mods) -> None:
    ty = m.type("u32", "s32", "u64", "s64")
    e.write(x.args[0], f"I.bfe({e.full(x.args[1], ty)}, {e.full(x.args[2], 'u32')}, {e.full(x.args[3], 'u32')})", ty)


@operation("bfi")
def bit_insert(e: Emitter, x: Instruction, m: Mods) -> None:
    ty = m.type("b32", "b64")
    a, b = e.full(x.args[1], ty), e.full(x.args[2], ty)
    e.write(x.args[0], f"I.bfi({a}, {b}, {e.full(x.args[3], 'u32')}, {e.full(x.args[4], 'u32')})", ty)


@operation("prmt")
def permute(e: Emitter, x: Instruction, m: Mods) -> None:
    """9.7.9.7, default mode."""
    m.type("b32")
    a, b, s = (e.full(q, "u32") for q in x.args[1:])
    e.write(x.args[0], f"I.prmt({a}, {b}, {s})", "b32")


@operation("lop3")
def lop3(e: Emitter, x: Instruction, m: Mods) -> None:
    """9.7.8.6, without the predicate form."""
    m.type("b32")
    if "|" in x.args[0]:
        raise Unsupported("predicate result")
    a, b, c = (e.full(q, "b32") for q in x.args[1:4])
    e.write(x.args[0], f"I.lop3({a}, {b}, {c}, {int(x.args[4], 0)})", "b32")


@operation("sad")
def sad(e: Emitter, x: Instruction, m: Mods) -> None:
    ty = m.type(*INTS)
    a, b = e.full(x.args[1], ty), e.full(x.args[2], ty)
    e.write(x.args[0], f"I.absolute_difference({a}, {b}) + {e.read(x.args[3], ty)}", ty)


@operation("dp4a")
def dp4a(e: Emitter, x: Instruction, m: Mods) -> None:
    """9.7.1.23: types of a and b; the sum is signed when either is."""
    tb, ta = m.type("u32", "s32"), m.type("u32", "s32")
    tc = "s32" if "s32" in (ta, tb) else "u32"
    e.write(x.args[0], f"I.dp4a({e.full(x.args[1], ta)}, {e.full(x.args[2], tb)}, {e.full(x.args[3], tc)})", tc)


@operation("rcp", "sqrt", "rsqrt", "ex2", "lg2", "sin", "cos", "tanh")
def unary(e: Emitter, x: Instruction, m: Mods) -> None:
    """9.7.3.14-22 and the half precision forms of ex2 and tanh. Correctly rounded: the hardware's last bits differ."""
    ty = m.type("f32", "f64", *HALF)
    m.pick("rn", "approx")
    ftz = m.flag("ftz")
    if ty in HALF:
        return e.write(x.args[0], f"F.half(F.UNARY[{x.op!r}], {ty!r}, {e.full(x.args[1], ty)})", ty)
    a = _float_args(e, x, ty, ftz, 1)[0]
    return _finish(e, x, m, f"F.UNARY[{x.op!r}]({a})", ty, ftz=ftz, sat=False)


@operation("copysign")
def copysign(e: Emitter, x: Instruction, m: Mods) -> None:
    """9.7.3.2: the result has the sign of the first source and the magnitude of the second."""
    ty = m.type("f32", "f64")
    e.write(x.args[0], f"np.copysign({e.full(x.args[2], ty)}, {e.full(x.args[1], ty)})", ty)


@operation("testp")
def testp(e: Emitter, x: Instruction, m: Mods) -> None:
    ty = m.type("f32", "f64")
    name = m.need("finite", "infinite", "number", "notanumber", "normal", "subnormal")
    e.write(x.args[0], f"F.test_property({name!r}, {e.full(x.args[1], ty)})", "pred")


_COMPARE = {
    "eq": "==",
    "ne": "!=",
    "lt": "<",
    "le": "<=",
    "gt": ">",
    "ge": ">=",
    "lo": "<",
    "ls": "<=",
    "hi": ">",
    "hs": ">=",
}


def _comparison(e: Emitter, x: Instruction, m: Mods, ty: str) -> str:
    ftz = m.flag("ftz")
    name = m.need(*_COMPARE, *(c + "u" for c in ("eq", "ne", "lt", "le", "gt", "ge")), "num", "nan")
    if ty in HALF:
        if ty.endswith("x2"):
            raise Unsupported("packed comparison")
        a, b = (f"F.DECODE[{ty!r}]({e.full(q, ty)})" for q in x.args[1:3])
    elif is_float(ty):
        a, b = _float_args(e, x, ty, ftz, 2)
    else:
        return f"({e.read(x.args[1], ty)} {_COMPARE[name]} {e.read(x.args[2], ty)})"
    nans = f"(np.isnan({a}) | np.isnan({b}))"
    if name in ("num", "nan"):
        return nans if name == "nan" else f"~{nans}"
    if name.endswith("u") and name not in _COMPARE:
        return f"(({a} {_COMPARE[name[:-1]]} {b}) | {nans})"
    return f"(({a} != {b}) & ~{nans})" if name == "ne" else f"({a} {_COMPARE[name]} {b})"


@operation("setp")
def setp(e: Emitter, x: Instruction, m: Mods) -> None:
    """9.7.6.2: ordered comparisons are false, unordered ones true, when an argument is NaN."""
    ty = m.type("b16", "b32", "b64", *INTS, "f32", "f64", "f16", "bf16")
    combine = m.pick("and", "or", "xor")
    c = _comparison(e, x, m, ty)
    dest = x.args[0].split("|")
    if combine:
        sign = {"and": "&", "or": "|", "xor": "^"}[combine]
        third = e.read(x.args[3], "pred")
        expr, inverse = f"{c} {sign} {third}", f"~{c} {sign} {third}"
    else:
        expr, inverse = c, f"~{c}"
    if len(dest) > 1:
        both = e.var()
        e.line(f"{both} = ({expr}, {inverse})")
        e.write(dest[0], f"{both}[0]", "pred")
        e.write(dest[1], f"{both}[1]", "pred")
    else:
        e.write(dest[0], expr, "pred")


@operation("set")
def set_(e: Emitter, x: Instruction, m: Mods) -> None:
    """9.7.6.1: comparison as 0xffffffff / 0 or 1.0 / 0.0."""
    ty, dt = m.type(*INTS, "b32", "f32", "f64", "f16", "bf16"), m.type("u32", "s32", "f32")
    c = _comparison(e, x, m, ty)
    one = e.constant(1.0 if dt == "f32" else -1 if dt == "s32" else 0xFFFFFFFF, TYPES[dt])
    e.write(x.args[0], f"WHERE({c}, {one}, {e.constant(0, TYPES[dt])})", dt)


@operation("selp")
def selp(e: Emitter, x: Instruction, m: Mods) -> None:
    ty = m.type(*BITS[1:], *INTS, "f32", "f64")
    e.write(x.args[0], f"WHERE({e.read(x.args[3], 'pred')}, {e.read(x.args[1], ty)}, {e.read(x.args[2], ty)})", ty)


@operation("slct")
def slct(e: Emitter, x: Instruction, m: Mods) -> None:
    tc, ty = m.type("s32", "f32"), m.type("b32", "u32", "s32", "f32", "b64", "u64", "s64", "f64")
    m.flag("ftz")
    e.write(x.args[0], f"WHERE({e.read(x.args[3], tc)} >= 0, {e.read(x.args[1], ty)}, {e.read(x.args[2], ty)})", ty)
