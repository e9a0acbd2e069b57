"""wgmma on groups of four warps (PTX ISA 9.7.15): operands from swizzled shared memory, and the asynchronous rules.

Results are computed when the instruction is issued, but the hardware may deliver them only at the wait. So until the
group of a wgmma has been waited for, its registers may not be touched (copies by mov are followed) and the shared
memory
it reads may not be written. Shared memory written through the generic proxy needs fence.proxy.async before wgmma reads
it, and registers written by other instructions need wgmma.fence.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from .floats import DECODE, FP8
from .memory import READING
from .scalars import Unsupported

if TYPE_CHECKING:
    from .blocks import Block
    from .machine import Machine

u2, u4, u8, i8, f4 = np.uint16, np.uint32, np.uint64, np.int64, np.float32
_FORM = re.compile(r"m64n(\d+)k(16|32)\.f32\.(bf16|f16|e4m3|e5m2)\.(bf16|f16|e4m3|e5m2)")
_ROW_UNITS = {0: 1, 1: 8, 2: 4, 3: 2}  # swizzle code -> 16-byte units a row of eight spans
_SWIZZLE_MASK = {0: 0, 1: 7, 2: 3, 3: 1}


@dataclass
class _Pending:
    """One issued wgmma: its warps, registers, the shared memory it reads, and its group in each warp."""

    warps: np.ndarray
    group: np.ndarray
    registers: set[int]
    inputs: set[int]
    off: np.ndarray
    who: np.ndarray
    idx: int


def operand_units(desc: np.ndarray, extent: int, mn_major: bool, k_rows: int) -> np.ndarray:
    """Shared byte addresses of the 16-byte units of an operand (PTX ISA 9.7.15.5.1 matrix descriptor).

    desc (g,) u64; `extent` rows (M or N). K-major: (g, extent, 2). MN-major: (g, extent / 8, k_rows).
    """
    start = ((desc & u8(0x3FFF)) << u8(4)).astype(i8)
    lead = ((desc >> u8(16)) & u8(0x3FFF)).astype(i8)
    stride = ((desc >> u8(32)) & u8(0x3FFF)).astype(i8)
    code = int(desc[0] >> u8(62))
    if (desc >> u8(62) != desc[0] >> u8(62)).any() or ((desc >> u8(49)) & u8(7)).any():
        raise Unsupported("matrix descriptors with a base offset or different swizzles")
    width = _ROW_UNITS[code]
    lead, stride = lead[:, None, None], stride[:, None, None]
    if mn_major:
        j, k = np.arange(extent // 8)[:, None], np.arange(k_rows)[None, :]
        if code == 0:
            unit = j * stride + k % 8 + k // 8 * lead
        else:
            unit = j % width + j // width * lead + k % 8 * width + k // 8 * stride
    else:
        r, c = np.arange(extent)[:, None], np.arange(2)[None, :]
        unit = r % 8 * width + r // 8 * stride + c * (lead if code == 0 else 1)
    addr = start[:, None, None] + unit * 16
    return addr ^ (((addr >> 7) & _SWIZZLE_MASK[code]) << 4)


class WarpgroupMma:
    def __init__(self, machine: Machine):
        self.m = machine
        warps = machine.total // 32
        self.pending: list[_Pending] = []
        self.commits = np.zeros(warps, np.int64)
        self.fenced = np.full(warps, -1, np.int64)  # step of the last wgmma.fence
        self.written: dict[int, np.ndarray] = {}  # register -> step of its last ordinary write, per warp
        self.inflight: set[int] = set()
        self.operands = machine.program.wgmma_registers

    # ---- issue
    def issue(
        self, form: str, d: list[np.ndarray], a: list[np.ndarray], b: np.ndarray, scale_d: np.ndarray,
        scale: tuple[int, int], trans: tuple[int, int], ids: np.ndarray, idx: int, slots: tuple[set[int], set[int]],
    ) -> list[np.ndarray]:  # fmt: skip
        """wgmma.mma_async: `a` is one array of descriptors or four of registers. Returns the new accumulators."""
        m = _FORM.fullmatch(form)
        if not m:
            raise Unsupported(f"wgmma form {form}")
        n, k = int(m[1]), int(m[2])
        wide = m[3] in DECODE
        if k != (16 if wide else 32) or len(d) != n // 2 or (not wide and any(trans)):
            raise Unsupported(f"wgmma form {form}")
        groups = len(ids) // 128
        off: list[np.ndarray] = []
        who: list[np.ndarray] = []
        bm = self._shared_operand(b, ids, n, k, bool(trans[1]), m[4], False, off, who, idx)
        if len(a) == 1:
            am = self._shared_operand(a[0], ids, 64, k, bool(trans[0]), m[3], True, off, who, idx)
        else:
            am = _register_operand(a, groups, k, m[3])
        product = np.matmul(am * f4(scale[0]), (bm * f4(scale[1])).transpose(0, 2, 1))  # (g, 64, n)
        regs = product.reshape(groups, 4, 2, 8, n // 8, 4, 2).transpose(4, 2, 6, 0, 1, 3, 5).reshape(n // 2, len(ids))
        self._check_fence(slots[0] | slots[1], ids, idx)
        warps = np.unique(ids // 32)
        p = _Pending(
            warps, self.commits[warps].copy(), slots[0], slots[1], np.concatenate(off), np.concatenate(who), idx
        )
        self.pending.append(p)
        self.inflight |= slots[0] | slots[1]
        shared = self.m.memory.shared
        shared.mark(p.off, 16, READING)
        return [regs[i] + np.where(scale_d, d[i], f4(0)) for i in range(n // 2)]

    def _shared_operand(
        self, desc: np.ndarray, ids: np.ndarray, extent: int, k: int, mn_major: bool, ty: str, by_rows: bool,
        offs: list[np.ndarray], whos: list[np.ndarray], idx: int,
    ) -> np.ndarray:  # fmt: skip
        """Read and check an operand in shared memory -> (groups, extent, k) f32."""
        m, shared = self.m, self.m.memory.shared
        per_group = desc.reshape(-1, 128)
        if (per_group != per_group[:, :1]).any():
            m.report("wgmma descriptor differs between the threads of a warpgroup", idx, ids)
        leaders = ids.reshape(-1, 4, 32)[:, :, 0]  # one thread of each warp
        addr = operand_units(per_group[:, 0], extent, mn_major, k)
        groups, rows, cols = addr.shape
        off = addr + m.window_of[leaders[:, 0]][:, None, None]
        off = np.where((addr >= 0) & (addr < shared.stride), off, 0)
        flat = off.reshape(-1)
        first = np.repeat(leaders[:, 0], rows * cols)
        ok = m.memory.check(shared, flat, first, 16, "load", idx)
        data = shared.get(shared.d, np.where(ok, flat, 0) if ok is not None else flat, 16)
        if by_rows and not mn_major:  # warp w of the group needs rows 16w .. 16w + 15 only
            readers = np.repeat(leaders, rows // 4 * cols, axis=1).reshape(-1)
            reads = flat
        else:
            readers = np.repeat(leaders.reshape(-1), rows * cols)
            reads = np.repeat(off.reshape(groups, 1, -1), 4, axis=1).reshape(-1)
        if ok is None and shared.shadow is not None:
            shared.shadow.read(reads, readers, 16, idx)
            self.check_proxy(reads, readers, idx, "wgmma")
        if ok is None:
            offs.append(reads)
            whos.append(readers)
        else:
            offs.append(reads[:0])
            whos.append(readers[:0])
        if ty in DECODE:
            values = DECODE[ty](np.ascontiguousarray(data).view(u2)).reshape(groups, rows, cols, 8)
        else:
            values = FP8[ty + "x2"][np.ascontiguousarray(data).view(np.uint8)].reshape(groups, rows, cols, 16)
        if mn_major:  # (g, extent / 8, k, 8) -> (g, extent, k)
            return np.ascontiguousarray(values.transpose(0, 1, 3, 2)).reshape(groups, extent, k)
        return values.reshape(groups, extent, k)

    def check_proxy(self, off: np.ndarray, who: np.ndarray, idx: int, what: str) -> None:
        """Generic-proxy writes must be followed by fence.proxy.async before the async proxy reads them."""
        shadow, clocks = self.m.memory.shared.shadow, self.m.clocks
        assert shadow is not None
        g, width = off // shadow.granule, 16 // shadow.granule
        time, writer = shadow.wtime.get(g, width), shadow.writer.get(g, width)
        generic = (time > 0) & ~self.m.is_bulk_engine(writer)
        agents = self.m.agent_of[who][:, None]
        bad = generic & (time > clocks.known("proxied", agents, self.m.agent_of[np.maximum(writer, 0)]))
        if bad.any() and (clocks.extra or clocks.unsettled):
            for i, j in np.argwhere(bad):
                known = clocks.fenced("proxied", int(agents[i, 0]), [int(who[i])])
                bad[i, j] = known.get(int(writer[i, j]), 0) < time[i, j]
        if bad.any():
            i, j = np.argwhere(bad)[0]
            detail = f"{shadow.describe(int(off[i]))}, written by {self.m.thread_name(int(writer[i, j]))}"
            self.m.report(
                f"{what} reads shared memory without fence.proxy.async after the write", idx, who[bad.any(1)], detail
            )

    def _check_fence(self, slots: set[int], ids: np.ndarray, idx: int) -> None:
        warps = np.unique(ids // 32)
        if (self.fenced[warps] < 0).any():
            self.m.report("wgmma without any wgmma.fence before it", idx, ids)
            return
        for s in slots:
            when = self.written.get(s)
            if when is not None and (when[warps] > self.fenced[warps]).any():
                self.m.report("wgmma uses registers written after the last wgmma.fence", idx, ids)
                return

    # ---- fence, commit, wait
    def fence(self, ids: np.ndarray) -> None:
        self.fenced[np.unique(ids // 32)] = self.m.steps

    def commit(self, ids: np.ndarray) -> None:
        self.commits[np.unique(ids // 32)] += 1

    def wait(self, ids: np.ndarray, allowed: int) -> None:
        """wgmma.wait_group: all but the last N groups of these warps are complete."""
        shared = self.m.memory.shared
        waiting = np.zeros(len(self.commits), bool)
        waiting[np.unique(ids // 32)] = True
        keep = []
        for p in self.pending:
            done = waiting[p.warps] & (p.group < self.commits[p.warps] - allowed)
            if not done.any():
                keep.append(p)
                continue
            retired = np.isin(p.who // 32, p.warps[done])
            shared.mark(p.off[retired], 16, 0, READING)
            if shared.shadow is not None and retired.any():
                shared.shadow.read(p.off[retired], p.who[retired], 16, p.idx, late=True)
            if not done.all():
                left = ~done
                rest = ~retired
                keep.append(
                    _Pending(p.warps[left], p.group[left], p.registers, p.inputs, p.off[rest], p.who[rest], p.idx)
                )
        self.pending = keep
        for p in keep:
            shared.mark(p.off, 16, READING)
        self.inflight = set().union(*(p.registers | p.inputs for p in keep)) if keep else set()

    # ---- ordinary instructions between issue and wait
    def before_block(self, b: Block, ids: np.ndarray) -> None:
        """Called for every block while the kernel uses wgmma: reports what touches registers in flight."""
        if b.wgmma_defs:
            warps = np.unique(ids // 32)
            for s in b.wgmma_defs:
                self.written.setdefault(s, np.full(len(self.commits), -1, np.int64))[warps] = self.m.steps
        if not self.inflight or b.instructions[0].op == "wgmma" or not (b.touches & self.inflight):
            return
        warps = np.unique(ids // 32)
        for p in self.pending:
            if not np.isin(p.warps, warps).any():
                continue
            for i, (op, dests, sources) in enumerate(b.registers):
                if op == "mov" and sources & p.registers:
                    p.registers |= dests
                    self.inflight |= dests
                elif sources & p.registers:
                    self._touch("read", b.first + i, ids)
                elif dests & p.registers:
                    self._touch("written", b.first + i, ids)
                elif dests & p.inputs:
                    self._touch("(an input) written", b.first + i, ids)

    def _touch(self, how: str, idx: int, ids: np.ndarray) -> None:
        self.m.report(f"wgmma register {how} before wgmma.wait_group", idx, ids)


def _register_operand(a: list[np.ndarray], groups: int, k: int, ty: str) -> np.ndarray:
    """A from registers: as for mma.m16n8k16, one 16-row block for each warp -> (groups, 64, k)."""
    if len(a) != 4:
        raise Unsupported("number of A registers")
    v = np.stack(a).reshape(2, 2, groups, 4, 8, 4).transpose(2, 3, 1, 4, 0, 5)  # (g, warp, half, row, k-half, quad)
    raw = np.ascontiguousarray(v)
    if ty in DECODE:
        return DECODE[ty](raw.view(u2)).reshape(groups, 64, k)
    return FP8[ty + "x2"][raw.view(np.uint8)].reshape(groups, 64, k)
