"""Code generators for extended-precision arithmetic through the carry flag (PTX ISA 9.7.2): add.cc, addc, sub.cc, subc,
mad.cc, madc. The flag is a predicate register of its own."""

from __future__ import annotations

from .codegen import Emitter, Mods, operation
from .parser import Instruction
from .scalars import CODE_NAMES, TYPES, Unsupported

CARRY = "%carry"


def with_carry(e: Emitter, x: Instruction, m: Mods, ty: str, *, carry_in: bool, carry_out: bool) -> None:
    """d = a op b (+ c) with the flag read and / or written. All types compute as unsigned."""
    if x.pred or ty[0] not in "us" or ty[1:] not in ("32", "64"):
        raise Unsupported("form of carry arithmetic")
    unsigned = "u" + ty[1:]
    a, b = e.full(x.args[1], unsigned), e.full(x.args[2], unsigned)
    flag = e.read(CARRY, "pred") if carry_in else "FALSE"
    v = e.var()
    if x.op.startswith("mad"):
        half = m.need("lo", "hi")
        product = f"{a} * {b}" if half == "lo" else f"I.mulhi({a}, {b})"
        if half == "hi" and ty[0] == "s":
            wide = CODE_NAMES[TYPES[unsigned]]
            product = f"I.mulhi({e.full(x.args[1], ty)}, {e.full(x.args[2], ty)}).view({wide})"
        e.line(f"{v} = I.add_carry({product}, {e.full(x.args[3], unsigned)}, {flag})")
    else:
        e.line(f"{v} = I.{'add_carry' if x.op.startswith('add') else 'subtract_borrow'}({a}, {b}, {flag})")
    e.arrays = True
    e.write(x.args[0], f"{v}[0]", unsigned)
    if carry_out:
        e.write(CARRY, f"{v}[1]", "pred")


@operation("addc", "subc", "madc")
def carry_chain(e: Emitter, x: Instruction, m: Mods) -> None:
    ty = m.type("u32", "s32", "u64", "s64")
    with_carry(e, x, m, ty, carry_in=True, carry_out=m.flag("cc"))
