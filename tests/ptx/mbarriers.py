"""mbarrier objects and the bulk copies that complete on them (PTX ISA 9.7.13.15 mbarrier, 9.7.9.25.4 cp.async.bulk)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from .clocks import Knowledge
from .memory import GUARD, INIT, PENDING, VALID, Buffer

if TYPE_CHECKING:
    from .machine import Machine

u4, u8, i8 = np.uint32, np.uint64, np.int64


@dataclass
class MBarrier:
    """`pending` arrivals and `tx` bytes are still missing in the current phase; `phase` counts completed phases."""

    expected: int
    pending: int
    cta: int
    tx: int = 0
    phase: int = 0
    current: Knowledge | None = None
    done: Knowledge | None = None
    arrived: bool = False
    creator: int = -1
    fenced: bool = False  # the init has been made visible to the async proxy and the cluster


@dataclass
class _BulkCopy:
    barrier: int
    dst: int
    size: int
    thread: int
    source: Buffer
    source_off: int
    idx: int


class MBarriers:
    """All mbarriers of a launch, by their byte offset in the array of shared windows."""

    def __init__(self, machine: Machine):
        self.m = machine
        self.objects: dict[int, MBarrier] = {}
        self.copies: list[_BulkCopy] = []
        self.changed = False
        self.result = np.zeros(machine.total, bool)

    # ---- addressing
    def _locate(
        self, addr: np.ndarray, ids: np.ndarray, pm: np.ndarray | None, idx: int
    ) -> list[tuple[MBarrier, int, np.ndarray]]:
        """-> (object, its offset, threads), checked for existence and for a missing barrier after init."""
        if pm is not None:
            addr, ids = addr[pm], ids[pm]
        if not len(ids):
            return []
        shared = self.m.memory.shared
        off = self.m.memory.shared_offsets(addr, ids)
        if shared.shadow is not None:
            shared.shadow.read(off, ids, 8, idx, strong=True)
        out = []
        for o in np.unique(off).tolist():
            mine = ids[off == o]
            if o not in self.objects:
                self.m.report("mbarrier used before mbarrier.init", idx, mine, shared.describe(o))
            else:
                out.append((self.objects[o], o, mine))
        return out

    def init(self, addr: np.ndarray, ids: np.ndarray, count: np.ndarray, pm: np.ndarray | None, idx: int) -> None:
        self.m.store("shared", addr, ids, 8, [count.astype(u8)], pm, idx)
        if pm is not None:
            addr, ids, count = addr[pm], ids[pm], count[pm]
        for o, t, c in zip(self.m.memory.shared_offsets(addr, ids).tolist(), ids.tolist(), count.tolist(), strict=True):
            if c == 0:
                self.m.report("mbarrier.init with count 0", idx, np.array([t]))
            self.objects[o] = MBarrier(c, c, int(self.m.cta_of[t]), creator=t)

    def fence_init(self, ids: np.ndarray) -> None:
        """fence.mbarrier_init (or fence.proxy.async) by these threads."""
        for b in self.objects.values():
            b.fenced = b.fenced or bool((ids == b.creator).any())

    def invalidate(self, addr: np.ndarray, ids: np.ndarray, pm: np.ndarray | None, idx: int) -> None:
        for _, o, _ in self._locate(addr, ids, pm, idx):
            del self.objects[o]

    # ---- arriving
    def _release(self, b: MBarrier, ids: np.ndarray) -> None:
        if not self.m.check_races:
            return
        for agent, mine, whole in self.m.warps_of(ids):
            k = self.m.clocks.publish(agent, None if whole else mine.tolist())
            self._join(b, k, agent // self.m.clocks.width)

    def _join(self, b: MBarrier, k: Knowledge, cta: int) -> None:
        if cta != b.cta and not self.m.clocks.full:
            self.m.clocks.promote()
        if b.current is None:
            b.current = k
            return
        a, c = next(iter(b.current.rows.values()), None), next(iter(k.rows.values()), None)
        if a is not None and c is not None and len(a) != len(c):
            widen = self.m.clocks._wide
            b.current.rows = {p: widen(r, b.cta) for p, r in b.current.rows.items()}
            k.rows = {p: widen(r, cta) for p, r in k.rows.items()}
        b.current.join(k)

    def _advance(self, b: MBarrier) -> None:
        while b.pending == 0 and b.tx == 0 and b.arrived:
            b.phase += 1
            b.pending = b.expected
            b.done, b.current, b.arrived = b.current, (b.current.copy() if b.current else None), False
            self.changed = True
            self.m.progress += 1

    def arrive(
        self, addr: np.ndarray, ids: np.ndarray, count: np.ndarray, tx: np.ndarray | None,
        pm: np.ndarray | None, idx: int,
        *, release: bool = True, drop: bool = False,
    ) -> np.ndarray:  # fmt: skip
        """mbarrier.arrive(.expect_tx, .drop): returns the phase tokens."""
        token = np.zeros(self.m.total, u8)
        for b, o, mine in self._locate(addr, ids, pm, idx):
            pick = np.isin(ids, mine)
            n = int(count[pick].sum())
            token[mine] = b.phase
            if tx is not None:
                b.tx += int(tx[pick].sum())
            if release:
                self._release(b, mine)
            if drop:
                b.expected -= n
            self._count(b, n, mine, o, idx)
        return token[ids]

    def _count(self, b: MBarrier, n: int, ids: np.ndarray, off: int, idx: int) -> None:
        b.arrived = True
        if n > b.pending:
            detail = f"{self.m.memory.shared.describe(off)}: {n} arrivals, {b.pending} expected"
            self.m.report("more arrivals at an mbarrier than its phase expects", idx, ids, detail)
            n = b.pending
        b.pending -= n
        self._advance(b)

    def expect_tx(
        self, addr: np.ndarray, ids: np.ndarray, tx: np.ndarray, pm: np.ndarray | None, idx: int, sign: int = 1
    ) -> None:
        for b, _, mine in self._locate(addr, ids, pm, idx):
            b.tx += sign * int(tx[np.isin(ids, mine)].sum())
            b.arrived |= sign < 0
            self._advance(b)

    def copies_arrive(self, addr: np.ndarray, ids: np.ndarray, noinc: bool, pm: np.ndarray | None, idx: int) -> None:
        """cp.async.mbarrier.arrive: the earlier cp.async of these threads land as writes of the CTA's asynchronous
        engine, visible to who waits on the mbarrier."""
        m = self.m
        for b, o, mine in self._locate(addr, ids, pm, idx):
            keep = []
            for c in m.copies.pending:
                hit = np.isin(c.ids, mine)
                if hit.any():
                    done = c.take(hit)
                    if m.check_races:
                        self._start_engines(np.unique(m.cta_of[done.ids]))
                        done.ids = m.total + 2 * m.cta_of[done.ids]
                    m.copies.finish(done)
                if not hit.all():
                    keep.append(c.take(~hit))
            m.copies.pending = keep
            for cta in np.unique(m.cta_of[mine]).tolist():
                self._engine_release(b, cta, 0)
            if noinc:
                self._count(b, len(mine), mine, o, idx)

    def _start_engines(self, ctas: np.ndarray) -> None:
        for c in ctas.tolist():
            self.m.clocks.start_async(c)

    def _engine_learns(self, thread: int) -> None:
        """The engine starts a copy after what its issuer did and knew."""
        clocks, issuer = self.m.clocks, int(self.m.agent_of[thread])
        cta = issuer // clocks.width
        clocks.acquire(cta * clocks.width + self.m.warps, clocks.publish(issuer, [thread]), cta)

    def _engine_release(self, b: MBarrier, cta: int, engine: int) -> None:
        if self.m.check_races:
            agent = cta * self.m.clocks.width + self.m.warps + engine
            self._join(b, self.m.clocks.publish(agent, None, ("known",)), cta)

    # ---- waiting
    def test(
        self, addr: np.ndarray, ids: np.ndarray, phase: np.ndarray, parity: bool, pm: np.ndarray | None, idx: int,
        acquire: bool = True,
    ) -> np.ndarray:  # fmt: skip
        """Has the phase completed? `phase` is a parity or a token. Acquires where it has."""
        out = np.zeros(self.m.total, bool)
        want = np.zeros(self.m.total, u8)
        want[ids] = phase
        for b, o, mine in self._locate(addr, ids, pm, idx):
            if self._complete_copies(o):
                self._advance(b)
            ok = (b.phase & 1) != (want[mine] & u8(1)) if parity else b.phase > want[mine].astype(i8)
            out[mine] = ok
            if acquire and ok.any() and b.done is not None and self.m.check_races:
                for agent in np.unique(self.m.agent_of[mine[ok]]).tolist():
                    self.m.clocks.acquire(agent, b.done, b.cta)
        return out[ids]

    # ---- bulk copies
    def copy_in(
        self,
        dst: np.ndarray,
        src: np.ndarray,
        size: np.ndarray,
        bar: np.ndarray,
        ids: np.ndarray,
        pm: np.ndarray | None,
        idx: int,
    ) -> None:
        """cp.async.bulk.shared.global with an mbarrier: lands when the mbarrier is next tested."""
        m = self.m
        lanes = range(len(ids)) if pm is None else np.nonzero(pm)[0].tolist()
        shared = m.memory.shared
        for i in lanes:
            who, n = ids[i : i + 1], int(size[i])
            if n == 0 or n % 16:
                m.report("bulk copy size is no multiple of 16", idx, who, f"{n} bytes")
                n -= n % 16
            found = self._locate(bar[i : i + 1], who, None, idx)
            if found and not found[0][0].fenced:
                m.report("bulk copy on an mbarrier without fence.mbarrier_init after its init", idx, who)
            steps = np.arange(0, n, 16)
            many = np.repeat(who, len(steps))
            off = m.memory.shared_offsets(np.repeat(dst[i : i + 1], len(steps)) + steps.astype(u4), many)
            (region, soff, _), *rest = m.memory.resolve("global", src[i] + steps.astype(u8), many)
            bad = m.memory.check(shared, off, many, 16, "store", idx)
            bad2 = m.memory.check(region, soff, many, 16, "load", idx)
            if bad is not None or bad2 is not None or rest or not found or not isinstance(region, Buffer):
                continue
            if shared.shadow is not None and region.shadow is not None:
                self._start_engines(m.cta_of[who])
                shared.shadow.check_write(off, many, 16, idx)
                region.shadow.read(soff, many, 16, idx)
            shared.mark(off, 16, PENDING)
            self.copies.append(_BulkCopy(found[0][1], int(off[0]), n, int(who[0]), region, int(soff[0]), idx))

    def prefetch(self, src: np.ndarray, size: np.ndarray, ids: np.ndarray, pm: np.ndarray | None, idx: int) -> None:
        """cp.async.bulk.prefetch.L2: no effect on values; address and size must be multiples of 16."""
        bad = ((src & u8(15)) != 0) | ((size & u4(15)) != 0)
        if pm is not None:
            bad &= pm
        if bad.any():
            self.m.report("bulk prefetch with address or size not a multiple of 16", idx, ids[bad])

    def _complete_copies(self, barrier: int) -> bool:
        """Land what was to complete on this mbarrier."""
        mine = [c for c in self.copies if c.barrier == barrier]
        if not mine:
            return False
        self.copies = [c for c in self.copies if c.barrier != barrier]
        m, shared = self.m, self.m.memory.shared
        b = self.objects[barrier]
        for c in mine:
            steps = np.arange(0, c.size, 16)
            off, cta = c.dst + steps, int(m.cta_of[c.thread])
            data = c.source.get(c.source.d, c.source_off + steps, 16)
            shared.mark(off, 16, 0, PENDING)
            if shared.shadow is not None:
                shared.shadow.record_write(off, np.full(len(steps), m.total + 2 * cta + 1), 16)
                self._engine_release(b, cta, 1)
            shared.put(shared.d, off, 16, data)
            shared.fill(off, 16, VALID | INIT)
            b.tx -= c.size
            b.arrived = True
        return True


assert GUARD % 16 == 0
