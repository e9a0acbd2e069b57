"""Basic blocks: where they start and end, what ends them, and which registers outlive them.

A block ends at a branch, return or barrier. Warp collectives start a block, because the scheduler must gather whole
warps before them (PTX ISA 9.7.9.5 shfl.sync and the like); so do waits that may block, and single wgmma instructions,
whose registers are checked while the hardware still works on them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from .parser import Instruction, Kernel, Label
from .scalars import TYPES, Unsupported

if TYPE_CHECKING:
    from .codegen import Emitter

TERMINATORS = {"bra", "ret", "exit", "bar", "barrier", "trap"}

SPECIAL_REGISTERS = (
    {f"%{base}.{d}" for base in ("tid", "ntid", "ctaid", "nctaid", "cluster_ctaid", "cluster_nctaid") for d in "xyz"}
    | {f"%{base}.{d}" for base in ("clusterid", "nclusterid") for d in "xyz"}
    | {"%laneid", "%warpid", "%nwarpid", "%cluster_ctarank", "%cluster_nctarank", "%smid", "%nsmid"}
    | {f"%lanemask_{c}" for c in ("eq", "lt", "le", "gt", "ge")}
    | {"%dynamic_smem_size", "%total_smem_size", "%is_explicit_cluster"}
)


@dataclass
class Block:
    """`head`: None, "warp" (needs the lanes of the mask together), "warpgroup" (four warps) or "wait"
    (mbarrier.try_wait).
    `kind`: how it ends: fall, bra, cbra, ret, cret, bar, trap."""

    instructions: list[Instruction]
    head: str | None = None
    mask_operand: str | None = None
    mask: int | None = 0xFFFFFFFF
    mask_register: int | None = None
    kind: str = "fall"
    target: int = -1
    barrier: Any = None
    result: str = "None"
    first: int = 0
    lines: list[str] = field(default_factory=list)
    used: dict[str, str] = field(default_factory=dict)
    defined: dict[str, tuple[str, type]] = field(default_factory=dict)
    uses: frozenset[int] = frozenset()
    defs: frozenset[int] = frozenset()
    names: dict[int, str] = field(default_factory=dict)
    live_out: set[int] = field(default_factory=set)
    touches: frozenset[int] = frozenset()
    registers: list[tuple[str, set[int], set[int]]] = field(default_factory=list)  # op, destinations, sources
    wgmma_defs: frozenset[int] = frozenset()
    run: Callable[..., Any] = lambda *a: None


def _collective_mask(x: Instruction) -> str | None:
    """The member mask operand of a warp collective; None when `x` is none."""
    if x.op in ("shfl", "vote", "match", "redux", "elect") and "sync" in x.mods:
        return x.args[-1]
    if x.op == "bar" and x.mods[0] == "warp":
        return x.args[0] if x.args else "-1"
    if x.op in ("mma", "ldmatrix", "stmatrix", "movmatrix", "wgmma", "setmaxnreg"):
        return "0xffffffff"
    if x.op in ("bar", "barrier") and ("aligned" in x.mods or x.op == "bar") and "cluster" not in x.mods:
        return "0xffffffff"
    return None


def ends_block(x: Instruction) -> bool:
    return x.op in TERMINATORS and not (x.op == "bar" and x.mods[0] == "warp")


def split(kernel: Kernel) -> tuple[list[Block], dict[str, int]]:
    """-> blocks, and the block number of every label."""
    groups: list[Block] = [Block([])]
    labels: dict[str, int] = {}
    converged: str | None = None  # member mask for which the lanes of the current block are known to be together

    def start(head: str | None = None, mask: str | None = None) -> None:
        nonlocal converged
        if groups[-1].instructions:
            groups.append(Block([]))
        groups[-1].head, groups[-1].mask_operand = head, mask
        converged = mask

    for c in kernel.code:
        if isinstance(c, Label):
            start()
            labels[c.name] = len(groups) - 1
            continue
        mask = _collective_mask(c)
        if c.op == "wgmma":
            start("warpgroup" if c.mods[0] == "mma_async" else "warp", mask)
        elif c.op == "mbarrier" and c.mods[0] == "try_wait":
            start("wait")
        elif mask is not None and mask != converged:
            start("warp", mask)
        groups[-1].instructions.append(c)
        if ends_block(c) or c.op == "wgmma":
            start()
    if not groups[-1].instructions:
        end = Instruction("ret", [], None, [], "ret (end of kernel)", 0, None)
        groups[-1].instructions.append(end)
    return groups, labels


def terminate(e: Emitter, b: Block, x: Instruction, labels: dict[str, int]) -> None:
    """Generate the end of a block: sets kind, target, barrier and the returned expression."""
    cond = f"{'~' if x.pred[1] else ''}{e.read(x.pred[0], 'pred')}" if x.pred else "None"
    if x.op == "bra":
        if [m for m in x.mods if m != "uni"]:
            raise Unsupported(f"PTX line {x.line}: `{x.text}`")
        if x.args[0] not in labels:
            raise Unsupported(f"PTX line {x.line}: label {x.args[0]} is not in this kernel")
        b.kind, b.target, b.result = ("cbra" if x.pred else "bra"), labels[x.args[0]], cond
    elif x.op in ("ret", "exit"):
        b.kind, b.result = ("cret" if x.pred else "ret"), cond
    elif x.op == "trap":
        b.kind, b.result = "trap", cond
    else:
        from .ops_sync import barrier

        b.kind = "bar"
        barrier(e, b, x, cond)


def liveness(blocks: list[Block]) -> None:
    """Fill live_out by the usual backward iteration, with sets as bit masks."""
    n = len(blocks)
    uses = [sum(1 << r for r in b.uses) for b in blocks]
    defs = [sum(1 << r for r in b.defs) for b in blocks]
    successors = []
    for i, b in enumerate(blocks):
        s = (
            []
            if b.kind == "ret" or (b.kind == "trap" and b.result == "None")
            else [b.target]
            if b.kind == "bra"
            else [i + 1]
        )
        if b.kind == "cbra":
            s.append(b.target)
        successors.append([t for t in s if t < n])
    live_in, live_out = list(uses), [0] * n
    changed = True
    while changed:
        changed = False
        for i in range(n - 1, -1, -1):
            out = 0
            for t in successors[i]:
                out |= live_in[t]
            new = uses[i] | (out & ~defs[i])
            if out != live_out[i] or new != live_in[i]:
                live_out[i], live_in[i], changed = out, new, True
    for b, mask in zip(blocks, live_out, strict=True):
        b.live_out = {r for r in b.defs if mask >> r & 1}


def smallest_access(kernel: Kernel, space: str, default: int) -> int:
    """Bytes of the smallest load, store or atomic to `space` (generic ones count for every space): the unit in which
    races are tracked."""
    sizes = [default]
    for x in kernel.code:
        if isinstance(x, Instruction) and x.op in ("ld", "st", "atom", "red"):
            spaces = [m.split("::")[0] for m in x.mods]
            named = [s for s in ("global", "shared", "local", "param", "const") if s in spaces]
            ty = x.mods[-1]
            if (not named or space in named) and ty in TYPES:
                sizes.append(np.dtype(TYPES[ty]).itemsize)
    return min(sizes)
