"""Code generators for loads, stores, atomics and matrix loads (PTX ISA 9.7.9.8 ld, .11 st, 9.7.13.5-6 atom / red)."""

from __future__ import annotations

from .codegen import Emitter, Mods, operation
from .parser import Instruction
from .scalars import TYPES, UNSIGNED, Unsupported, is_float, size_of

SPACES = ("global", "shared", "local", "param", "const")
ORDERS = ("relaxed", "acquire", "release", "acq_rel", "volatile", "weak", "sc")
SCOPES = ("cta", "cluster", "gpu", "sys")
LOADABLE = ("b8", "u8", "s8", "b16", "u16", "s16", "b32", "u32", "s32", "f32", "b64", "u64", "s64", "f64")


def state_space(m: Mods) -> str:
    """Take the state space; "generic" when none is named."""
    for mod in m.left:
        name, _, sub = mod.partition("::")
        if name in SPACES and sub in ("", "cta", "cluster", "entry"):
            m.left.remove(mod)
            if name == "const":
                raise Unsupported("state space .const")
            return name
    return "generic"


def cache_hints(m: Mods) -> bool:
    """Take cache operators and eviction priorities, which only concern speed. True: a policy operand follows."""
    for mod in list(m.left):
        if mod in ("ca", "cg", "cs", "lu", "cv", "wb", "wt", "nc", "L2::64B", "L2::128B", "L2::256B") or mod.startswith(
            ("L1::", "L2::evict")
        ):
            m.left.remove(mod)
    return m.flag("L2::cache_hint")


def _width(m: Mods) -> int:
    return int((m.pick("v2", "v4", "v8") or "v1")[1:])


def _address(e: Emitter, space: str, a: str) -> str:
    if space == "generic" and e.symbol_space(a) in ("shared", "local"):
        raise Unsupported("generic access to a variable by name")
    return e.address(a, "u32" if space == "shared" else "u64")


@operation("ld", "ldu")
def load(e: Emitter, x: Instruction, m: Mods) -> None:
    ty = m.type(*LOADABLE)
    order, scope = m.pick(*ORDERS), m.pick(*SCOPES)
    space, policy, count = state_space(m), cache_hints(m), _width(m)
    dest, a = e.vector(x.args[0]), x.args[1]
    if len(dest) != count or len(x.args) != 2 + policy:
        raise Unsupported("operands")
    size, unsigned = size_of(ty), "b" + str(size_of(ty) * 8)
    kind = ty if ty[0] == "s" else unsigned
    if space == "param":
        names = {p.name: i for i, p in enumerate(e.kernel.params)}
        base, _, off = a[1:-1].partition("+")
        if base.strip() not in names or order:
            raise Unsupported("parameter address")
        for i, d in enumerate(dest):
            code = f"FULL(n, S.param({names[base.strip()]}, {int(off or '0', 0) + i * size}, {TYPES[kind].__name__!r}))"
            e.write(d, code, kind)
        return
    if space == "local":
        e.line(f"S.local_access(ids, {e.here})")
    strong = order not in (None, "weak")
    if order in ("release", "acq_rel", "sc"):
        raise Unsupported(f".{order} load")
    addr, v = _address(e, space, a), e.var()
    where = e.var()
    e.line(f"{where} = {addr}")
    if order == "acquire" and scope != "cta":
        e.line(f"S.atomics.before_acquire({space!r}, {where}, ids, {e.mask}, {size * count})")
    dead = [e.is_dead(d) for d in dest]
    if any(dead) and not all(dead):
        # the compiler widened the load over bytes it does not use: only the others are checked, one by one
        e.line(f"S.memory.check_alignment({where}, ids, {size * count}, {e.mask}, {e.here})")
        for i, d in enumerate(dest):
            if not dead[i]:
                at = f"{where} + {e.constant(i * size, TYPES['u32' if space == 'shared' else 'u64'])}"
                e.line(f"{v} = S.load({space!r}, {at}, ids, {size}, 1, {e.mask}, {e.here}, {strong})")
                e.arrays = True
                e.write(d, f"{v}[0].view({_name(kind)})", kind)
        return
    e.line(f"{v} = S.load({space!r}, {where}, ids, {size}, {count}, {e.mask}, {e.here}, {strong})")
    if strong:
        e.line(f"S.atomics.observe({space!r}, {where}, ids, {e.mask}, {order == 'acquire'})")
    e.arrays = True
    for i, d in enumerate(dest):
        e.write(d, f"{v}[{i}].view({_name(kind)})", kind)


def _name(ty: str) -> str:
    from .scalars import CODE_NAMES

    return CODE_NAMES[TYPES[ty]]


@operation("st")
def store(e: Emitter, x: Instruction, m: Mods) -> None:
    ty = m.type(*LOADABLE)
    order, scope = m.pick(*ORDERS), m.pick(*SCOPES)
    space, policy, count = state_space(m), cache_hints(m), _width(m)
    values = e.vector(x.args[1])
    if len(values) != count or len(x.args) != 2 + policy or space == "param" or m.flag("async"):
        raise Unsupported("operands")
    if order in ("acquire", "acq_rel", "sc"):
        raise Unsupported(f".{order} store")
    del scope
    strong = order not in (None, "weak")
    if space == "local":
        e.line(f"S.local_access(ids, {e.here})")
    regs = ", ".join(e.full(v, f"b{size_of(ty) * 8}") for v in values)
    where = e.var()
    e.line(f"{where} = {_address(e, space, x.args[0])}")
    if strong:
        e.line(f"S.atomics.strong_store({space!r}, {where}, ids, {e.mask}, {order!r})")
    e.line(f"S.store({space!r}, {where}, ids, {size_of(ty)}, [{regs}], {e.mask}, {e.here}, {strong})")


@operation("atom", "red")
def atomic(e: Emitter, x: Instruction, m: Mods) -> None:
    ty = m.type(*LOADABLE, "f16", "bf16", "f16x2", "bf16x2")
    order = m.pick("relaxed", "acquire", "release", "acq_rel", default="relaxed")
    scope = m.pick(*SCOPES, default="gpu")
    space, policy = state_space(m), cache_hints(m)
    m.flag("noftz")
    op = m.need("add", "min", "max", "and", "or", "xor", "exch", "cas", "inc", "dec")
    count = _width(m)
    dest, rest = (x.args[0], x.args[1:]) if x.op == "atom" else (None, x.args)
    if is_float(ty) and op in ("and", "or", "xor", "inc", "dec", "cas"):
        raise Unsupported(f".{op}.{ty}")
    if ty in ("b32", "b64", "b16") and op in ("add", "min", "max", "inc", "dec"):
        raise Unsupported(f".{op}.{ty}")
    args = rest[1:]
    if policy:
        args = args[:-1]
    if len(args) != (2 if op == "cas" else 1):
        raise Unsupported("operands")
    compare = e.full(args[0], ty) if op == "cas" else "None"
    values = ", ".join(e.full(v, ty) for v in e.vector(args[-1]))
    if len(e.vector(args[-1])) != count:
        raise Unsupported("number of vector elements")
    if space == "local" or (space == "shared" and count > 1):
        raise Unsupported("state space")
    v = e.var()
    e.line(
        f"{v} = S.atomics.run({space!r}, {_address(e, space, rest[0])}, ids, {op!r}, {ty!r}, [{values}], {compare}, "
        f"{e.mask}, {e.here}, {order!r}, {scope!r}, {dest is not None and dest != '_'})"
    )
    if dest is not None:
        e.arrays = True
        for i, d in enumerate(e.vector(dest)):
            e.write(d, f"{v}[{i}]", ty)


@operation("ldmatrix")
def ldmatrix(e: Emitter, x: Instruction, m: Mods) -> None:
    if not (m.flag("sync") and m.flag("aligned") and m.flag("m8n8")):
        raise Unsupported("shape")
    m.type("b16")
    count, trans = int(m.need("x1", "x2", "x4")[1:]), m.flag("trans")
    if state_space(m) not in ("shared",):
        raise Unsupported("state space")
    dest = e.vector(x.args[0])
    if len(dest) != count:
        raise Unsupported("operands")
    v = e.var()
    e.line(f"{v} = S.ldmatrix({e.address(x.args[1], 'u32')}, ids, {count}, {trans}, {e.mask}, {e.here})")
    e.arrays = True
    for i, d in enumerate(dest):
        e.write(d, f"{v}[{i}]", "b32")


@operation("stmatrix")
def stmatrix(e: Emitter, x: Instruction, m: Mods) -> None:
    if not (m.flag("sync") and m.flag("aligned") and m.flag("m8n8")):
        raise Unsupported("shape")
    m.type("b16")
    count, trans = int(m.need("x1", "x2", "x4")[1:]), m.flag("trans")
    if state_space(m) not in ("shared",):
        raise Unsupported("state space")
    regs = e.vector(x.args[1])
    if len(regs) != count:
        raise Unsupported("operands")
    values = ", ".join(e.full(r, "b32") for r in regs)
    e.line(f"S.stmatrix({e.address(x.args[0], 'u32')}, ids, [{values}], {trans}, {e.mask}, {e.here})")


@operation("prefetch", "prefetchu", "applypriority", "discard")
def prefetch(e: Emitter, x: Instruction, m: Mods) -> None:
    """9.7.9.16-17: no effect on values; addresses are hints."""
    if x.op == "discard":
        raise Unsupported("discard")
    m.left = [q for q in m.left if q not in ("global", "L1", "L2") and not q.startswith("L2::")]
    e.address(x.args[0])


@operation("createpolicy")
def createpolicy(e: Emitter, x: Instruction, m: Mods) -> None:
    """9.7.9.18: a cache policy is an opaque number."""
    m.left = []
    e.write(x.args[0], f"FULL(n, {e.constant(0, UNSIGNED[8])})", "b64")
