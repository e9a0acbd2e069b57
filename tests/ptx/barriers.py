"""Barriers of CTAs and clusters: bar / barrier with sync, arrive and red, named or not (PTX ISA 9.7.13.1), and
barrier.cluster (9.7.13.4)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from .clocks import Knowledge

if TYPE_CHECKING:
    from .machine import Machine


@dataclass(frozen=True)
class BarrierOp:
    """What a barrier instruction does. mode: sync, arrive, red, cluster_arrive, cluster_wait; `reduce` and `dest`
    for red,
    `ordered` unless .relaxed."""

    mode: str
    idx: int
    reduce: str | None = None
    dest: int | None = None
    ordered: bool = True


@dataclass
class _Waiting:
    """One barrier in use: who came, whether they wait, and what they know."""

    need: int
    idx: int
    arrived: list[np.ndarray] = field(default_factory=list)
    blocked: list[np.ndarray] = field(default_factory=list)
    values: list[np.ndarray] = field(default_factory=list)
    knowledge: Knowledge | None = None
    op: BarrierOp | None = None
    plain: bool = True  # only whole CTAs that wait so far


@dataclass
class _Cluster:
    """The barrier of one cluster: arrivals of the current phase, completed phases, who waits, what was published."""

    arrived: int = 0
    phase: int = 0
    blocked: list[np.ndarray] = field(default_factory=list)
    knowledge: Knowledge | None = None
    done: Knowledge | None = None


class Barriers:
    """`arrive` returns the threads that may go on; the others stay blocked until `released` hands them out."""

    def __init__(self, machine: Machine):
        self.m = machine
        self.open: dict[tuple[int, int], _Waiting] = {}
        self.clusters: dict[int, _Cluster] = {}
        self.cluster_phase = np.full(machine.total, -1, np.int64)  # phase in which a thread arrived and has yet to wait

    def arrive(
        self, op: BarrierOp, ids: np.ndarray, number: np.ndarray, count: np.ndarray, value: np.ndarray | None
    ) -> list[np.ndarray]:
        """Threads `ids` reach barrier `number` that expects `count` threads (0: all of the CTA). Returns groups of
        threads whose wait is over."""
        m = self.m
        ctas = m.cta_of[ids]
        if (number > 15).any():
            m.report("barrier number above 15", op.idx, ids[number > 15])
            number = np.minimum(number, 15)
        if ((count % 32) != 0).any():
            m.report("barrier thread count is no multiple of the warp size", op.idx, ids)
        key = ctas.astype(np.int64) * 16 + number
        whole = len(ids) == m.total or (np.unique(key, return_counts=True)[1] == m.threads).all()
        if whole and op.mode == "sync" and ((count == 0) | (count == m.threads)).all():
            unique = np.unique(key)
            if not any((int(k) // 16, int(k) % 16) in self.open for k in unique):
                if m.check_races:
                    m.clocks.join_ctas((unique // 16).astype(np.int64))
                    if len(ids) == m.total and m.memory.shared.shadow is not None:
                        m.memory.shared.shadow.synchronised()
                m.share_wait(ids)
                m.progress += 1
                return [ids]
        out = []
        for k in np.unique(key):
            mine = key == k
            v = None if value is None else value[mine]
            out += self._arrive_one((int(k) // 16, int(k) % 16), op, ids[mine], int(count[mine][0]), v)
        return out

    def _arrive_one(
        self, key: tuple[int, int], op: BarrierOp, ids: np.ndarray, count: int, value: np.ndarray | None
    ) -> list[np.ndarray]:
        m = self.m
        need = count or m.threads
        if key not in self.open:
            self.open[key] = _Waiting(need, op.idx)
        w = self.open[key]
        w.idx = op.idx
        if w.need != need:
            m.report(f"barrier {key[1]} is used with {need} threads while others wait for {w.need}", op.idx, ids)
        w.arrived.append(ids)
        w.op = op
        if m.check_races:
            for agent, mine, whole in m.warps_of(ids):
                k = m.clocks.publish(agent, None if whole else mine.tolist())
                if w.knowledge is None:
                    w.knowledge = k
                else:
                    w.knowledge.join(k)
        if op.mode != "arrive":
            w.blocked.append(ids)
            if value is not None:
                w.values.append(value)
        return self._complete(key)

    def _complete(self, key: tuple[int, int]) -> list[np.ndarray]:
        m, w = self.m, self.open[key]
        got = sum(len(a) for a in w.arrived)
        if got < w.need:
            return []
        if got > w.need:
            m.report(f"{got} threads arrive at barrier {key[1]} for {w.need}", w.idx, w.arrived[-1])
        del self.open[key]
        m.progress += 1
        if not w.blocked:
            return []
        ids = np.concatenate(w.blocked)
        if m.check_races and w.knowledge is not None:
            for agent in np.unique(m.agent_of[ids]).tolist():
                m.clocks.acquire(agent, w.knowledge, key[0])
            agents = np.unique(m.agent_of[ids])
            m.clocks.warp_sync(agents)
        m.share_wait(ids)
        if w.op is not None and w.op.mode == "red":
            self._reduce(w, ids)
        return [ids]

    def _reduce(self, w: _Waiting, ids: np.ndarray) -> None:
        assert w.op is not None
        assert w.op.dest is not None
        v = np.concatenate(w.values)
        register = self.m.registers[w.op.dest]
        if register is not None:
            register[ids] = {"popc": v.sum(), "and": v.all(), "or": v.any()}[w.op.reduce or "popc"]

    def cluster(self, op: BarrierOp, ids: np.ndarray) -> list[np.ndarray]:
        """barrier.cluster.arrive or .wait by `ids`; returns the threads whose wait is over."""
        m, out = self.m, []
        of = m.cluster_of[m.cta_of[ids]]
        for c in np.unique(of).tolist():
            mine, state = ids[of == c], self.clusters.setdefault(c, _Cluster())
            if op.mode == "cluster_arrive":
                if (self.cluster_phase[mine] >= 0).any():
                    m.report("barrier.cluster.arrive twice without a wait between", op.idx, mine)
                self.cluster_phase[mine] = state.phase
                out += self._cluster_arrive(op, state, mine)
                continue
            if (self.cluster_phase[mine] < 0).any():
                m.report("barrier.cluster.wait without an arrive before it", op.idx, mine)
            free = self.cluster_phase[mine] < state.phase
            out += self._cluster_leave(state, mine[free])
            if not free.all():
                state.blocked.append(mine[~free])
        return out

    def _cluster_arrive(self, op: BarrierOp, state: _Cluster, ids: np.ndarray) -> list[np.ndarray]:
        m = self.m
        if m.check_races and op.ordered:
            if m.cluster_size > 1:
                m.clocks.promote()
            for agent, part, whole in m.warps_of(ids):
                k = m.clocks.publish(agent, None if whole else part.tolist())
                if state.knowledge is None:
                    state.knowledge = k
                else:
                    state.knowledge.join(k)
        state.arrived += len(ids)
        if state.arrived < m.threads * m.cluster_size:
            return []
        state.arrived, state.phase = 0, state.phase + 1
        state.done, state.knowledge = state.knowledge, None
        m.progress += 1
        waiting, state.blocked = state.blocked, []
        return [part for group in waiting for part in self._cluster_leave(state, group)]

    def _cluster_leave(self, state: _Cluster, ids: np.ndarray) -> list[np.ndarray]:
        if not len(ids):
            return []
        m = self.m
        self.cluster_phase[ids] = -1
        if m.check_races and state.done is not None:
            agents = np.unique(m.agent_of[ids])
            for a in agents.tolist():
                m.clocks.acquire(a, state.done, a // m.clocks.width)
            m.clocks.warp_sync(agents)
        return [ids]

    def describe(self) -> str:
        return "; ".join(
            f"CTA {c}, barrier {b}: {sum(len(a) for a in w.arrived)} of {w.need} threads, at "
            f"PTX line {self.m.instruction(w.idx).line}"
            for (c, b), w in list(self.open.items())[:8]
        )
