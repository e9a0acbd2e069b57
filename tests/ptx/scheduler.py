"""Runs a machine: which threads execute which block next.

Threads that stand at the same block run together, the lowest block first, so diverged threads meet again. While threads
spin, the policy changes for a while to the block that has waited longest, so that whoever they wait for gets on. Warp
collectives wait until all lanes of their mask have come; failed mbarrier.try_wait parks threads until some phase
completes (the instruction may suspend, PTX ISA 9.7.13.15.16).
"""

from __future__ import annotations

import time

import numpy as np

from .barriers import BarrierOp
from .blocks import Block
from .machine import Machine
from .scalars import PtxError, Unsupported

BLOCKED, PARKED, EXITED = 1 << 20, 1 << 21, 1 << 22
SPIN_WINDOW, FAIR_STEPS = 256, 48


class Scheduler:
    def __init__(self, machine: Machine, max_steps: int):
        self.m, self.blocks = machine, machine.program.blocks
        self.pc = np.zeros(machine.total, np.int32)
        self.all = np.arange(machine.total)
        self.max_steps, self.idle_steps = max_steps, max(max_steps // 10, 1000)
        self.last_run = np.zeros(len(self.blocks) + 1, np.int64)
        self.seconds = 0.0
        self.waiting = np.zeros(machine.total // 32, np.int32)  # 1 + the block at which a warp waits for its lanes

    # ---- the main loop
    def run(self) -> None:
        start = time.perf_counter()
        with np.errstate(all="ignore"):
            self._run()
        self.seconds = time.perf_counter() - start

    def _run(self) -> None:
        m, pc, blocks = self.m, self.pc, self.blocks
        together, cur = True, 0  # all threads stand at block `cur`
        window, recent, fair = 0, set(), 0
        last_progress, last_step, forced = 0, 0, 0
        while True:
            m.steps += 1
            if m.progress != last_progress:
                last_progress, last_step, forced = m.progress, m.steps, 0
            elif m.steps - last_step > self.idle_steps or m.steps > self.max_steps:
                self._hang("no end in sight: threads spin or loop for ever")
                return
            if together:
                ids = act = None
                b = blocks[cur]
                if b.head is not None:
                    ids = self._ready(b, self.all)
                    if len(ids) < m.total:
                        pc[:], together = cur, False
                        continue
            else:
                window += 1
                if window >= SPIN_WINDOW:
                    fair = FAIR_STEPS if len(recent) <= 24 else 0
                    window, recent = 0, set()
                found = self._choose(fair > 0)
                fair -= fair > 0
                if found is None:
                    if (pc >= EXITED).all():
                        m.bulk.finish()
                        break
                    if forced < 3 and self._force_waits():
                        forced += 1
                        continue
                    if not self._break_up_collective():
                        self._hang("deadlock")
                        return
                    continue
                cur, act = found
                recent.add(cur)
                b = blocks[cur]
            if b.head == "wait":
                act, together = self._poll(b, cur, act, together)
                if act is not None and not len(act):
                    continue
            n = m.total if act is None else len(act)
            ids = self.all if act is None else act
            if m.program.wgmma_registers:
                m.wgmma.before_block(b, ids)
            try:
                result = b.run(m, m.registers, self._index(act), n, ids)
            except Unsupported as e:
                x, y = b.instructions[0], b.instructions[-1]
                raise Unsupported(f"PTX line {x.line} to {y.line} `{x.text[:60]}`: unsupported {e}") from e
            self.last_run[cur] = m.steps
            m.vector_instructions += len(b.instructions)
            m.thread_instructions += len(b.instructions) * n
            together, cur = self._after(b, cur, ids, act, result, together)
            if (not together and b.kind != "fall") or (not together and n == m.total):
                first = int(pc[0])
                if first < BLOCKED and (pc == first).all():
                    together, cur = True, first

    def _index(self, act: np.ndarray | None) -> np.ndarray | slice | None:
        if act is None or len(act) == self.m.total:
            return None
        if int(act[-1]) - int(act[0]) + 1 == len(act):
            return slice(int(act[0]), int(act[-1]) + 1)
        return act

    # ---- choosing threads
    def _choose(self, fair: bool) -> tuple[int, np.ndarray] | None:
        """The next block and the threads that run it; None when nobody can run."""
        pc = self.pc
        low = int(pc.min())
        if low >= BLOCKED:
            return None
        if not fair:
            got = self._at(low)
            if len(got):
                return low, got
        runnable = np.unique(pc[pc < BLOCKED])
        order = sorted(runnable.tolist(), key=lambda k: self.last_run[k]) if fair else runnable.tolist()
        for k in order:
            got = self._at(k)
            if len(got):
                return k, got
        return None

    def _at(self, k: int) -> np.ndarray:
        return self._ready(self.blocks[k], np.nonzero(self.pc == k)[0])

    def _ready(self, b: Block, ids: np.ndarray) -> np.ndarray:
        """Of the threads at a collective, those whose whole member mask has come."""
        if b.head == "warpgroup":
            return self._warpgroups(ids)
        if b.head != "warp" or not len(ids):
            return ids
        m = self.m
        if b.mask == 0xFFFFFFFF and len(ids) == m.total and not m.exited.any():
            return ids
        warp, lane = ids // 32, ids & 31
        here = np.zeros(m.total // 32, np.uint32)
        np.bitwise_or.at(here, warp, np.uint32(1) << lane.astype(np.uint32))
        if b.mask is not None:
            need = np.full(len(here), b.mask, np.uint32)
        else:
            register = m.registers[b.mask_register]
            assert register is not None
            need = np.zeros(len(here), np.uint32)
            np.bitwise_or.at(need, warp, register[ids].astype(np.uint32))
        gone = np.packbits(m.exited.reshape(-1, 32), axis=1, bitorder="little").view(np.uint32).ravel()
        ok = (here & need) == (need & ~gone)
        k = int(self.pc[ids[0]]) + 1 if len(ids) < m.total else 0
        if k:
            missing = ok & (self.waiting == k) & ((need & gone & ~here) != 0) & (here != 0)
            if missing.any():
                self._report_part(b, ids[missing[warp]], "the other lanes went on and left the kernel")
            self.waiting[(here != 0) & ~ok] = k
            self.waiting[(here != 0) & ok] = 0
        inside = (need[warp] >> lane.astype(np.uint32)) & np.uint32(1) != 0
        return ids[ok[warp] & inside]

    def _warpgroups(self, ids: np.ndarray) -> np.ndarray:
        """Of the threads at a wgmma, those whose four warps are complete."""
        m = self.m
        if len(ids) == m.total and m.threads % 128 == 0:
            return ids
        group = ids // m.threads * (m.threads // 128 + 1) + ids % m.threads // 128
        _, inverse, count = np.unique(group, return_inverse=True, return_counts=True)
        return ids[count[inverse] == 128]

    def _poll(self, b: Block, cur: int, act: np.ndarray | None, together: bool) -> tuple[np.ndarray | None, bool]:
        """mbarrier.try_wait: park the threads whose phase is not complete."""
        m = self.m
        ids = self.all if act is None else act
        forced = ids[self.forced[ids]] if self.forced is not None else ids[:0]
        m.polling = np.zeros(0)
        m.mbarriers.changed = False
        b.run(m, m.registers, self._index(act), len(ids), ids)
        ok, m.polling = m.polling, None
        if m.mbarriers.changed:
            self._wake()
        m.mbarriers.result[ids] = ok
        go = ok.copy()
        if len(forced):
            go |= np.isin(ids, forced)
            assert self.forced is not None
            self.forced[forced] = False
        if go.all():
            return act, together
        if together:
            self.pc[:] = cur
        self.pc[ids[~go]] = PARKED + cur
        return ids[go], False

    forced: np.ndarray | None = None

    def _wake(self) -> None:
        parked = (self.pc >= PARKED) & (self.pc < EXITED)
        self.pc[parked] -= PARKED

    def _force_waits(self) -> bool:
        """Nobody runs: let parked try_waits return false once, as the hardware does after its time limit."""
        parked = (self.pc >= PARKED) & (self.pc < EXITED)
        if not parked.any():
            return False
        self.forced = parked.copy()
        self._wake()
        return True

    # ---- after a block
    def _after(
        self, b: Block, cur: int, ids: np.ndarray, act: np.ndarray | None, result: object, together: bool
    ) -> tuple[bool, int]:
        pc, m = self.pc, self.m
        kind = b.kind
        if m.mbarriers.changed:
            m.mbarriers.changed = False
            if not together:
                self._wake()
        if kind in ("fall", "bra"):
            target = cur + 1 if kind == "fall" else b.target
            if together:
                return True, target
            pc[ids] = target
            return False, cur
        if kind == "cbra":
            taken = np.asarray(result)
            if together:
                if taken.all():
                    return True, b.target
                if not taken.any():
                    return True, cur + 1
                pc[:] = np.where(taken, b.target, cur + 1)
                return False, cur
            pc[ids] = np.where(taken, b.target, cur + 1)
            return False, cur
        if together:
            pc[:] = cur
        if kind in ("ret", "cret"):
            gone = ids if kind == "ret" else ids[np.asarray(result)]
            pc[ids] = cur + 1
            pc[gone] = EXITED
            m.exited[gone] = True
            m.progress += 1
        elif kind == "trap":
            hit = ids if result is None else ids[np.asarray(result)]
            pc[ids] = cur + 1
            if len(hit):
                m.report("trap executed", b.first + len(b.instructions) - 1, hit)
                pc[hit] = EXITED
                m.exited[hit] = True
        else:
            self._barrier(b.barrier, cur, ids, result)
        return False, cur

    def _barrier(self, op: BarrierOp, cur: int, ids: np.ndarray, result: object) -> None:
        cond, number, count, value = result  # type: ignore[misc]
        pc = self.pc
        pc[ids] = cur + 1
        if cond is not None:
            sel = np.asarray(cond)
            ids, number, count = ids[sel], number[sel], count[sel]
            value = None if value is None else value[sel]
            if not len(ids):
                return
        if op.mode not in ("arrive", "cluster_arrive"):
            pc[ids] = BLOCKED + cur + 1
        barriers = self.m.barriers
        cluster = op.mode.startswith("cluster")
        for free in barriers.cluster(op, ids) if cluster else barriers.arrive(op, ids, number, count, value):
            back = pc[free]
            pc[free] = np.where((back >= BLOCKED) & (back < PARKED), back - BLOCKED, back)

    # ---- trouble
    def _break_up_collective(self) -> bool:
        """Lanes wait at a collective for others that will never come: report it and let them go on."""
        pc, m = self.pc, self.m
        at = pc[pc < BLOCKED]
        if not len(at):
            return False
        k = int(at.min())
        b = self.blocks[k]
        ids = np.nonzero(pc == k)[0]
        self._report_part(b, ids, "the other lanes of the member mask never arrive")
        if b.kind == "bar" and len(b.instructions) == 1:
            result = b.run(m, m.registers, self._index(ids), len(ids), ids)
            self._barrier(b.barrier, k, ids, result)
        else:
            pc[ids] = EXITED
            m.exited[ids] = True
        m.progress += 1
        return True

    def _report_part(self, b: Block, ids: np.ndarray, detail: str) -> None:
        name = "barrier" if b.kind == "bar" and len(b.instructions) == 1 else b.instructions[0].op
        self.m.report(f"{name} executed by part of a warp", b.first, ids, detail)

    def _hang(self, why: str) -> None:
        m, pc = self.m, self.pc
        stuck = np.nonzero(pc < EXITED)[0]
        at = pc[stuck] & (BLOCKED - 1)
        lines = []
        for k in np.unique(at).tolist()[:6]:
            b = (
                self.blocks[min(max(k - 1, 0), len(self.blocks) - 1)]
                if (pc[stuck[at == k][0]] & BLOCKED)
                else self.blocks[k]
            )
            x = b.instructions[-1] if pc[stuck[at == k][0]] & BLOCKED else b.instructions[0]
            source = f"{x.source[0]}:{x.source[1]}, " if x.source else ""
            lines.append(f"{int((at == k).sum())} threads at {source}PTX line {x.line} `{x.text[:70]}`")
        detail = "; ".join(lines)
        if m.barriers.open:
            detail += "; open barriers: " + m.barriers.describe()
        first = self.blocks[int(at[0]) if at[0] < len(self.blocks) else 0].first
        m.report(why, min(first, len(m.program.instructions) - 1), stuck, detail)


def execute(machine: Machine, max_steps: int = 2_000_000) -> Scheduler:
    """Run `machine` to the end of the launch."""
    if not machine.program.blocks:
        raise PtxError("empty kernel")
    s = Scheduler(machine, max_steps)
    s.run()
    return s
