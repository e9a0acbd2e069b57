"""Atomics, reductions and strong accesses: values, and the order they create (PTX ISA 9.7.13.5-6 atom / red, 8 memory
consistency model).

A release (or a fence followed by a relaxed write) leaves a snapshot of the writer's knowledge at the location; an
acquire there takes it over. A read-modify-write keeps what earlier writers left (release sequences). More lenient than
the model in one point: a relaxed `atom` that returns a value acquires like an acquire, because the usual
last-block-done pattern has its only fence before the atomic. An acquire of what the preceding launch of a dependent
pair wrote counts as griddepcontrol.wait; whether that launch has released anything there is not looked at.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from .clocks import Knowledge
from .floats import half
from .memory import INIT, VALID, Region
from .scalars import TYPES, Unsupported, size_of

if TYPE_CHECKING:
    from .machine import Machine

u4, u8 = np.uint32, np.uint64


def _operator(op: str, ty: str) -> Callable[..., Any]:
    """(old, operand) -> new for one round of distinct addresses."""
    if ty in ("bf16", "f16", "bf16x2", "f16x2"):
        fns = {"add": np.add, "min": np.fmin, "max": np.fmax}
        if op == "exch":
            return lambda old, v: v
        if op not in fns:
            raise Unsupported(f"atomic .{op}.{ty}")
        return lambda old, v: half(fns[op], ty, old, v)
    table = {
        "add": lambda old, v: old + v,
        "min": np.minimum,
        "max": np.maximum,
        "and": np.bitwise_and,
        "or": np.bitwise_or,
        "xor": np.bitwise_xor,
        "exch": lambda old, v: v,
        "inc": lambda old, v: np.where(old >= v, old.dtype.type(0), old + old.dtype.type(1)),
        "dec": lambda old, v: np.where((old == 0) | (old > v), v, old - old.dtype.type(1)),
    }
    if op not in table:
        raise Unsupported(f"atomic .{op}")
    return table[op]


class Atomics:
    def __init__(self, machine: Machine):
        self.m = machine
        self.snapshots: list[Knowledge] = []
        self.merged: dict[tuple[int, int], int] = {}
        self.by_version: dict[tuple[int, int], int] = {}
        self.ids: dict[int, np.ndarray] = {}  # id(region) -> snapshot number per 4-byte word, -1 none
        self.pending: dict[int, Knowledge] = {}  # agent -> seen by relaxed loads, taken over by its next fence

    # ---- values
    def run(
        self, space: str, addr: np.ndarray, ids: np.ndarray, op: str, ty: str, operands: list[np.ndarray],
        compare: np.ndarray | None, pm: np.ndarray | None, idx: int, order: str, scope: str, returns: bool,
    ) -> np.ndarray:  # fmt: skip
        """Perform `op` for every thread in thread order; operands: one array for each vector element.
        Returns the old values (elements, n)."""
        n, count = len(ids), len(operands)
        dtype = TYPES[ty]
        out = np.zeros((count, n), dtype)
        sub = np.arange(n) if pm is None else np.nonzero(pm)[0]
        if not len(sub):
            return out
        self.m.progress += 1
        values = np.stack(operands, 1)[sub]
        cmp = None if compare is None else compare[sub]
        size = size_of(ty)
        for region, off, sel in self.m.memory.resolve(space, addr[sub], ids[sub]):
            at = np.arange(len(sub)) if sel is None else sel
            who = ids[sub[at]]
            if returns and order in ("acquire", "acq_rel", "sc") and scope != "cta":
                self._acquire_of_preceding(region, off, who, size * count)
            ok = self.m.memory.check(region, off, who, size * count, "atomic", idx)
            if ok is not None:
                off, at, who = off[ok], at[ok], who[ok]
            if not len(off):
                continue
            if region.shadow is not None:
                region.shadow.atomic(off, who, size * count, idx, returns)
                self._order(region, off, who, order, scope, returns)
            c = None if cmp is None else cmp[at]
            out[:, sub[at]] = self._apply(region, off, values[at], c, op, ty, size, count).T
        return out

    @staticmethod
    def _apply(
        r: Region, off: np.ndarray, values: np.ndarray, cmp: np.ndarray | None, op: str, ty: str, size: int, count: int
    ) -> np.ndarray:
        memory = r.d[size].view(TYPES[ty])
        units = (off // size)[:, None] + np.arange(count)
        old = np.empty_like(values)
        fn = None if op == "cas" else _operator(op, ty)
        order = np.argsort(off, kind="stable")
        start = np.r_[True, off[order][1:] != off[order][:-1]]
        first = np.maximum.accumulate(np.where(start, np.arange(len(off)), 0))
        rank = np.empty(len(off), np.int64)
        rank[order] = np.arange(len(off)) - first
        for k in range(int(rank.max()) + 1):
            now = np.nonzero(rank == k)[0]
            before = memory[units[now]]
            old[now] = before
            if fn is None:
                assert cmp is not None
                memory[units[now]] = np.where(before == cmp[now, None], values[now], before)
            else:
                memory[units[now]] = fn(before, values[now])
        for j in range(count):
            r.fill(off + j * size, size, VALID | INIT)
        return old

    # ---- order
    def _ids(self, r: Region) -> np.ndarray:
        if id(r) not in self.ids:
            self.ids[id(r)] = np.full(r.total // 4, -1, np.int32)
        return self.ids[id(r)]

    def _merge(self, old: int, new: int) -> int:
        if old < 0 or old == new:
            return new
        key = (old, new)
        if key not in self.merged:
            k = self.snapshots[old].copy()
            k.join(self.snapshots[new])
            self.snapshots.append(k)
            self.merged[key] = len(self.snapshots) - 1
        return self.merged[key]

    def _snapshot(self, agent: int, threads: list[int]) -> int:
        """What these lanes of `agent` have released by fences, as a snapshot number; -1 when they never fenced."""
        clocks = self.m.clocks
        table = clocks.planes.get("released")
        if table is None:
            return -1
        extra = clocks.fenced("released", agent, threads)
        key = (agent, hash((table[agent].tobytes(), tuple(sorted(extra.items())))))
        if key not in self.by_version:
            if not table[agent].any() and not extra:
                self.by_version[key] = -1
            else:
                self.snapshots.append(
                    Knowledge({"known": table[agent].copy()}, {"known": dict(extra)} if extra else {})
                )
                self.by_version[key] = len(self.snapshots) - 1
        return self.by_version[key]

    def _publish(self, agent: int, thread: int, order: str) -> int:
        if order in ("release", "acq_rel", "sc"):
            self.snapshots.append(self.m.clocks.publish(agent, [thread], ("known",)))
            return len(self.snapshots) - 1
        return self._snapshot(agent, [thread])

    def _order(self, r: Region, off: np.ndarray, who: np.ndarray, order: str, scope: str, returns: bool) -> None:
        clocks, ctas = self.m.clocks, self.m.ctas
        agents = self.m.agent_of[who]
        if scope == "cta" and r.space == "global" and ctas > 1:
            order = "relaxed"
        if ctas > 1 and r.space == "global" and (order != "relaxed" or "released" in clocks.planes):
            clocks.promote()
        if not returns and order == "relaxed":
            if "released" in clocks.planes:
                self._bulk_release(self._ids(r), off // 4, who, agents)
            return
        if order == "relaxed" and id(r) not in self.ids and "released" not in clocks.planes:
            return
        ids = self._ids(r)
        for w, a, t in zip((off // 4).tolist(), agents.tolist(), who.tolist(), strict=True):
            have = int(ids[w])
            if have >= 0 and returns and order != "release":
                clocks.acquire(a, self.snapshots[have], a // clocks.width)
            elif have >= 0 and returns:
                self._defer(a, have)
            mine = self._publish(a, t, order if order != "acquire" else "relaxed")
            if mine >= 0:
                ids[w] = self._merge(have, mine)

    def _bulk_release(self, ids: np.ndarray, words: np.ndarray, who: np.ndarray, agents: np.ndarray) -> None:
        """Relaxed reductions of many threads: join by pairs of (snapshot there, snapshot of the agent)."""
        by_lane = bool(self.m.clocks.unsettled)  # without, all lanes of a warp have released the same
        unique, inverse = np.unique(who if by_lane else agents, return_inverse=True)
        agent_of = self.m.agent_of
        found = [self._snapshot(int(agent_of[u]), [int(u)]) if by_lane else self._snapshot(int(u), []) for u in unique]
        mine = np.array(found, np.int64)[inverse]
        use = mine >= 0
        words, mine = words[use], mine[use]
        while len(words):
            _, first = np.unique(words, return_index=True)
            w, s = words[first], mine[first]
            pairs, back = np.unique(np.stack([ids[w].astype(np.int64), s], 1), axis=0, return_inverse=True)
            ids[w] = np.array([self._merge(int(o), int(k)) for o, k in pairs], np.int32)[back.ravel()]
            rest = np.ones(len(words), bool)
            rest[first] = False
            words, mine = words[rest], mine[rest]

    def observe(self, space: str, addr: np.ndarray, ids: np.ndarray, pm: np.ndarray | None, acquire: bool) -> None:
        """After a strong load: take over what was released at the address, now or at the next fence."""
        if not self.ids or not self.m.check_races:
            return
        if pm is not None:
            addr, ids = addr[pm], ids[pm]
        if not len(ids):
            return
        clocks = self.m.clocks
        for region, off, sel in self.m.memory.resolve(space, addr, ids):
            table = self.ids.get(id(region))
            if table is None:
                continue
            who = ids if sel is None else ids[sel]
            found = table.take(off // 4, mode="clip")
            for s, a in {(int(s), int(a)) for s, a in zip(found, self.m.agent_of[who], strict=True) if s >= 0}:
                if acquire:
                    clocks.acquire(a, self.snapshots[s], a // clocks.width)
                else:
                    self._defer(a, s)

    def before_acquire(self, space: str, addr: np.ndarray, ids: np.ndarray, pm: np.ndarray | None, size: int) -> None:
        """Before a load that acquires, at more than CTA scope."""
        if pm is not None:
            addr, ids = addr[pm], ids[pm]
        for region, off, sel in self.m.memory.resolve(space, addr, ids) if len(ids) else ():
            self._acquire_of_preceding(region, off, ids if sel is None else ids[sel], size)

    def _acquire_of_preceding(self, region: Region, off: np.ndarray, who: np.ndarray, size: int) -> None:
        """An acquire of what the preceding launch wrote counts as griddepcontrol.wait."""
        self.m.grid_wait(who[self.m.memory.of_preceding_launch(region, off, size)])

    def _defer(self, agent: int, snapshot: int) -> None:
        """Seen without acquiring: the next fence of the agent takes it over."""
        if agent in self.pending:
            self.pending[agent].join(self.snapshots[snapshot])
        else:
            self.pending[agent] = self.snapshots[snapshot].copy()

    def fence_acquires(self, ids: np.ndarray) -> None:
        if self.pending:
            for a in np.unique(self.m.agent_of[ids]).tolist():
                if a in self.pending:
                    self.m.clocks.acquire(a, self.pending.pop(a), a // self.m.clocks.width)

    def strong_store(self, space: str, addr: np.ndarray, ids: np.ndarray, pm: np.ndarray | None, order: str) -> None:
        """st.release, st.relaxed, st.volatile: leave (only) the writer's snapshot at the address."""
        if not self.m.check_races:
            return
        if pm is not None:
            addr, ids = addr[pm], ids[pm]
        if not len(ids):
            return
        clocks = self.m.clocks
        for region, off, sel in self.m.memory.resolve(space, addr, ids):
            who = ids if sel is None else ids[sel]
            if self.m.ctas > 1 and region.space == "global" and (order == "release" or "released" in clocks.planes):
                clocks.promote()
            table = self._ids(region)
            for w, t in zip((off // 4).tolist(), who.tolist(), strict=True):
                if 0 <= w < len(table):
                    table[w] = self._publish(int(self.m.agent_of[t]), t, order)
