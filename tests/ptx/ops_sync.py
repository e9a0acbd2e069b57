"""Code generators for warp collectives, barriers, fences and mbarriers (PTX ISA 9.7.13 and 9.7.9.6 shfl)."""

from __future__ import annotations

from .barriers import BarrierOp
from .blocks import Block
from .codegen import Emitter, Mods, operation
from .collectives import check_mma
from .ops_memory import SCOPES, state_space
from .parser import Instruction
from .scalars import Unsupported


def _two(e: Emitter, dest: str, value: str, first: str, second: str = "pred") -> None:
    """Write the destination d|p from a pair."""
    e.arrays = True
    parts = dest.split("|")
    e.write(parts[0], f"{value}[0]", first)
    if len(parts) > 1:
        e.write(parts[1], f"{value}[1]", second)


@operation("shfl")
def shfl(e: Emitter, x: Instruction, m: Mods) -> None:
    m.type("b32")
    if not m.flag("sync"):
        raise Unsupported("shfl without .sync")
    mode = m.need("up", "down", "bfly", "idx")
    v, (a, b, c) = e.var(), (e.full(q, "b32") for q in x.args[1:4])
    e.read(x.args[4], "b32")
    e.line(f"{v} = S.shuffle({mode!r}, {a}, {b}, {c}, ids)")
    _two(e, x.args[0], v, "b32")


@operation("vote")
def vote(e: Emitter, x: Instruction, m: Mods) -> None:
    ty = m.type("pred", "b32")
    if not m.flag("sync"):
        raise Unsupported("vote without .sync")
    mode = m.need("all", "any", "uni", "ballot")
    e.read(x.args[2], "b32")
    v, p = e.var(), e.full(x.args[1], "pred")
    e.line(f"{v} = S.vote({mode!r}, {p}, ids)")
    e.arrays = True
    e.write(x.args[0], v, ty)


@operation("match")
def match(e: Emitter, x: Instruction, m: Mods) -> None:
    ty = m.type("b32", "b64")
    if not m.flag("sync"):
        raise Unsupported("match without .sync")
    mode = m.need("any", "all")
    e.read(x.args[2], "b32")
    v = e.var()
    e.line(f"{v} = S.match({mode!r}, {e.full(x.args[1], ty)}, ids)")
    _two(e, x.args[0], v, "b32")


@operation("redux")
def redux(e: Emitter, x: Instruction, m: Mods) -> None:
    ty = m.type("u32", "s32", "b32")
    if not m.flag("sync"):
        raise Unsupported("redux without .sync")
    mode = m.need("add", "min", "max", "and", "or", "xor")
    e.read(x.args[2], "b32")
    v = e.var()
    e.line(f"{v} = S.reduce({mode!r}, {e.full(x.args[1], ty)}, ids)")
    e.arrays = True
    e.write(x.args[0], v, ty)


@operation("elect")
def elect(e: Emitter, x: Instruction, m: Mods) -> None:
    if not m.flag("sync"):
        raise Unsupported("elect without .sync")
    e.read(x.args[1], "b32")
    v = e.var()
    e.line(f"{v} = S.elect(ids)")
    _two(e, x.args[0], v, "b32")


@operation("activemask")
def activemask(e: Emitter, x: Instruction, m: Mods) -> None:
    """9.7.13.12. The lanes that happen to run together here; the hardware may give fewer or more."""
    m.type("b32")
    v = e.var()
    e.line(f"{v} = S.vote('ballot', np.ones(n, bool), ids)")
    e.arrays = True
    e.write(x.args[0], v, "b32")


@operation("mma")
def mma(e: Emitter, x: Instruction, m: Mods) -> None:
    if not (m.flag("sync") and m.flag("aligned")):
        raise Unsupported("mma without .sync.aligned")
    form, m.left = ".".join(m.left), []
    d, a, b, c = (e.vector(q) for q in x.args)
    check_mma(form, len(a), len(b), len(c))
    v = e.var()
    regs = ", ".join("[" + ", ".join(e.full(q, "b32") for q in group) + "]" for group in (a, b, c))
    e.line(f"{v} = S.mma({form!r}, {regs}, n)")
    e.arrays = True
    for i, q in enumerate(d):
        e.write(q, f"{v}[{i}]", {"f32": "f32", "s32": "s32", "f16": "b32"}[form.split(".")[3]])


# ------------------------------------------------------------------ barriers
def barrier(e: Emitter, b: Block, x: Instruction, cond: str) -> None:
    """bar and barrier end a block; the scheduler performs them. Sets b.barrier and b.result."""
    m = Mods(x)
    if m.flag("cluster"):
        mode = m.need("arrive", "wait")
        m.flag("aligned")
        order = m.pick("release", "acquire", "relaxed")
        m.done()
        b.barrier = BarrierOp(f"cluster_{mode}", e.here, ordered=order != "relaxed")
        b.result = f"({cond}, FULL(n, i4(0)), FULL(n, i4(0)), None)"
        return
    m.flag("cta"), m.flag("aligned")
    mode = m.need("sync", "arrive", "red")
    args, value, reduce, dest = list(x.args), "None", None, None
    if mode == "red":
        reduce = m.need("popc", "and", "or")
        m.type("u32" if reduce == "popc" else "pred")
        dest = e.slot(args.pop(0))
        value = e.full(args.pop(), "pred")
    m.done()
    number = e.full(args[0], "s32")
    count = e.full(args[1], "s32") if len(args) > 1 else "FULL(n, i4(0))"
    b.barrier = BarrierOp(mode, e.here, reduce, dest)
    b.result = f"({cond}, {number}, {count}, {value})"


@operation("bar")
def warp_barrier(e: Emitter, x: Instruction, m: Mods) -> None:
    """bar.warp.sync; the other forms of bar end their block."""
    if not (m.flag("warp") and m.flag("sync")):
        raise Unsupported("barrier in the middle of a block")
    if x.args:
        e.read(x.args[0], "b32")
    e.line("S.warp_sync(ids)")


@operation("membar", "fence")
def fence(e: Emitter, x: Instruction, m: Mods) -> None:
    """9.7.13.4. A fence of at least gpu scope makes what the warp knows visible; fence.proxy.async does so for the
    async proxy. Scope cta adds nothing to what barriers do."""
    if m.flag("proxy"):
        kind = m.need("alias", "async", "async.global", "async::generic", "tensormap::generic")
        where = m.pick("global", "shared", "shared::cta", "shared::cluster")
        m.pick("acquire", "release"), m.pick(*SCOPES)
        if kind not in ("async",):
            raise Unsupported(f"proxy .{kind}")
        who = "ids" if e.mask == "None" else f"ids[{e.mask}]"
        if where != "global":
            e.line(f"S.fence({who}, 'proxied')")
            e.line(f"S.mbarriers.fence_init({who})")
        return
    if m.flag("mbarrier_init"):
        m.need("release"), m.need("cluster")
        e.line("S.mbarriers.fence_init(ids)" if e.mask == "None" else f"S.mbarriers.fence_init(ids[{e.mask}])")
        return
    m.pick("acq_rel", "sc", "acquire", "release")
    m.pick("sync_restrict::shared::cta", "sync_restrict::shared::cluster")
    scope = m.pick(*SCOPES, "gl", "sys")
    if scope in ("gpu", "sys", "gl", "cluster"):
        e.line("S.fence(ids, 'released')" if e.mask == "None" else f"S.fence(ids[{e.mask}], 'released')")
    elif scope != "cta":
        raise Unsupported("scope")


# ------------------------------------------------------------------ mbarriers
def _shared(e: Emitter, m: Mods, a: str) -> str:
    """Address of an mbarrier as u32."""
    return e.address(a, "u32") if state_space(m) == "shared" else f"S.from_generic({e.address(a)}, 'shared').astype(u4)"


@operation("mbarrier")
def mbarrier(e: Emitter, x: Instruction, m: Mods) -> None:
    """9.7.13.15. Arrivals release and waits acquire at CTA scope unless .relaxed."""
    what = m.need("init", "inval", "arrive", "arrive_drop", "expect_tx", "complete_tx", "test_wait", "try_wait")
    m.flag("b64")
    order, _ = m.pick("release", "acquire", "relaxed"), m.pick(*SCOPES)
    tail = f"{e.mask}, {e.here}"
    if what == "init":
        e.line(f"S.mbarriers.init({_shared(e, m, x.args[0])}, ids, {e.full(x.args[1], 'u32')}, {tail})")
    elif what == "inval":
        e.line(f"S.mbarriers.invalidate({_shared(e, m, x.args[0])}, ids, {tail})")
    elif what in ("expect_tx", "complete_tx"):
        sign = 1 if what == "expect_tx" else -1
        e.line(f"S.mbarriers.expect_tx({_shared(e, m, x.args[0])}, ids, {e.full(x.args[1], 'u32')}, {tail}, {sign})")
    elif what in ("arrive", "arrive_drop"):
        expect, nocomplete = m.flag("expect_tx"), m.flag("noComplete")
        if nocomplete:
            raise Unsupported(".noComplete")
        has_state = not x.args[0].startswith("[")
        dest, args = (x.args[0], x.args[1:]) if has_state else ("_", x.args)
        one = "FULL(n, u4(1))"
        tx = e.full(args[1], "u32") if expect else "None"
        count = e.full(args[1], "u32") if len(args) > 1 and not expect else one
        v = e.var()
        flags = f"release={order != 'relaxed'}, drop={what == 'arrive_drop'}"
        e.line(f"{v} = S.mbarriers.arrive({_shared(e, m, args[0])}, ids, {count}, {tx}, {tail}, {flags})")
        if dest != "_":
            e.arrays = True
            e.write(dest, v, "b64")
    else:
        parity = m.flag("parity")
        addr, phase = _shared(e, m, x.args[1]), f"{e.full(x.args[2], 'u32' if parity else 'u64')}.astype(u8)"
        if what == "try_wait":
            e.arrays = True
            if e.mask != "None":
                raise Unsupported("predicated try_wait")
            e.line("if S.polling is not None:")
            e.line(f"  S.polling = S.mbarriers.test({addr}, ids, {phase}, {parity}, {tail}, {order != 'relaxed'})")
            e.line("  return None")
            e.write(x.args[0], "S.mbarriers.result[ids]", "pred")
        else:
            v = e.var()
            e.line(f"{v} = S.mbarriers.test({addr}, ids, {phase}, {parity}, {tail}, {order != 'relaxed'})")
            e.arrays = True
            e.write(x.args[0], v, "pred")


@operation("mapa")
def mapa(e: Emitter, x: Instruction, m: Mods) -> None:
    """9.7.9.22: an address of this CTA's shared memory, in another CTA of the cluster."""
    ty = m.type("u32", "u64")
    if state_space(m) != "shared":
        raise Unsupported("generic mapa")
    e.write(x.args[0], f"S.map_to_rank({e.full(x.args[1], ty)}, {e.full(x.args[2], 'u32')})", ty)


@operation("griddepcontrol")
def griddepcontrol(e: Emitter, x: Instruction, m: Mods) -> None:
    """9.7.13.14: dependent launches. Before .wait, data of the preceding launch may not be touched."""
    if m.need("wait", "launch_dependents") == "wait":
        e.line("S.grid_wait(ids)" if e.mask == "None" else f"S.grid_wait(ids[{e.mask}])")


@operation("nanosleep")
def nanosleep(e: Emitter, x: Instruction, m: Mods) -> None:
    m.type("u32")
    e.read(x.args[0], "u32")


@operation("setmaxnreg")
def setmaxnreg(e: Emitter, x: Instruction, m: Mods) -> None:
    """9.7.19.5: only a resource hint here; the count must be a multiple of 8 from 24 to 256."""
    m.need("inc", "dec"), m.flag("sync"), m.flag("aligned")
    m.type("u32")
    count = int(x.args[0], 0)
    if count % 8 or not 24 <= count <= 256:
        raise Unsupported(f"register count {count}")


@operation("wgmma")
def wgmma(e: Emitter, x: Instruction, m: Mods) -> None:
    """9.7.15: bf16, f16 and fp8 inputs with f32 accumulators."""
    what = m.need("fence", "mma_async", "commit_group", "wait_group")
    if not (m.flag("sync") and m.flag("aligned")) or x.pred:
        raise Unsupported("form")
    if what == "fence":
        return e.line("S.wgmma.fence(ids)")
    if what == "commit_group":
        return e.line("S.wgmma.commit(ids)")
    if what == "wait_group":
        return e.line(f"S.wgmma.wait(ids, {int(x.args[0], 0)})")
    form, m.left = ".".join(m.left), []
    d, a = e.vector(x.args[0]), e.vector(x.args[1])
    in_registers = x.args[1].startswith("{")
    values = ", ".join(e.full(q, "f32") for q in d)
    av = ", ".join(e.full(q, "b32" if in_registers else "u64") for q in a)
    scale_d = e.full(x.args[3], "pred")
    numbers = [int(q, 0) for q in x.args[4:]]
    scale, trans = numbers[:2], numbers[2:] or [0, 0]
    if in_registers:
        trans = [0, *trans[-1:]]
    slots = {e.slot(q) for q in d}, {e.slot(q) for q in a} if in_registers else set()
    v = e.var()
    e.line(
        f"{v} = S.wgmma.issue({form!r}, [{values}], [{av}], {e.full(x.args[2], 'u64')}, {scale_d}, "
        f"({scale[0]}, {scale[1]}), ({trans[0]}, {trans[1]}), ids, {e.here}, ({slots[0]!r}, {slots[1]!r}))"
    )
    e.arrays = True
    for i, q in enumerate(d):
        e.write(q, f"{v}[{i}]", "f32")
    return None
