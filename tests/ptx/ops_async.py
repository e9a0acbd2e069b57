"""Code generators for asynchronous copies (PTX ISA 9.7.9.25)."""

from __future__ import annotations

from .codegen import Emitter, Mods, operation
from .ops_memory import cache_hints, state_space
from .parser import Instruction
from .scalars import Unsupported


@operation("cp")
def cp(e: Emitter, x: Instruction, m: Mods) -> None:
    if not m.flag("async"):
        raise Unsupported("cp")
    if m.flag("bulk"):
        return _bulk(e, x, m)
    if m.flag("commit_group"):
        return e.line(f"S.copies.commit(ids, {e.mask})")
    if m.flag("wait_group"):
        return e.line(f"S.copies.wait(ids, {int(x.args[0], 0)}, {e.mask}, {e.here})")
    if m.flag("wait_all"):
        return e.line(f"S.copies.wait_all(ids, {e.mask})")
    if m.flag("mbarrier"):
        if not m.flag("arrive"):
            raise Unsupported("form")
        noinc = m.flag("noinc")
        m.flag("b64")
        space = state_space(m)
        addr = (
            e.address(x.args[0], "u32")
            if space == "shared"
            else f"S.from_generic({e.address(x.args[0])}, 'shared').astype(u4)"
        )
        return e.line(f"S.mbarriers.copies_arrive({addr}, ids, {noinc}, {e.mask}, {e.here})")
    cg = "cg" in m.left
    policy = cache_hints(m)
    if state_space(m) != "shared" or not m.flag("global"):
        raise Unsupported("state spaces")
    args = x.args[:-1] if policy else x.args
    size = int(args[2], 0)
    if size not in ((16,) if cg else (4, 8, 16)):
        raise Unsupported(f"copy of {size} bytes")
    source = "None"
    if len(args) > 3:
        if e.kernel.register_type(args[3]) == "pred":
            raise Unsupported("ignore-src predicate")
        source = e.full(args[3], "u32")
    where = f"{e.address(args[0], 'u32')}, {e.address(args[1])}"
    return e.line(f"S.copies.issue({where}, ids, {size}, {source}, {e.mask}, {e.here})")


def _bulk(e: Emitter, x: Instruction, m: Mods) -> None:
    if m.flag("prefetch"):
        policy = cache_hints(m)
        if m.flag("tensor"):
            raise Unsupported("TMA tensor prefetch")
        m.flag("L2")
        if state_space(m) != "global" or len(x.args) != 2 + policy:
            raise Unsupported("form of bulk prefetch")
        return e.line(
            f"S.mbarriers.prefetch({e.address(x.args[0])}, {e.full(x.args[1], 'u32')}, ids, {e.mask}, {e.here})"
        )
    if m.flag("tensor"):
        raise Unsupported(
            "TMA tensor copy: the interpreter does not decode tensor maps; use 1-D bulk copies or cp.async"
        )
    policy = cache_hints(m)
    if m.flag("mbarrier::complete_tx::bytes"):
        dst = state_space(m)
        if dst != "shared" or not m.flag("global") or len(x.args) != 4 + policy:
            raise Unsupported("form of bulk copy")
        dst_a, bar = e.address(x.args[0], "u32"), e.address(x.args[3], "u32")
        size = e.full(x.args[2], "u32")
        return e.line(f"S.mbarriers.copy_in({dst_a}, {e.address(x.args[1])}, {size}, {bar}, ids, {e.mask}, {e.here})")
    if m.flag("commit_group"):
        return e.line(f"S.bulk.commit(ids, {e.mask})")
    if m.flag("wait_group"):
        return e.line(f"S.bulk.wait(ids, {int(x.args[0], 0)}, {m.flag('read')}, {e.mask})")
    if m.flag("bulk_group"):
        if not m.flag("global") or state_space(m) != "shared" or len(x.args) != 3 + policy:
            raise Unsupported("form of bulk copy")
        where = f"{e.address(x.args[0])}, {e.address(x.args[1], 'u32')}, {e.full(x.args[2], 'u32')}"
        return e.line(f"S.bulk.copy_out({where}, ids, {e.mask}, {e.here})")
    raise Unsupported("form of bulk copy")
