"""Vector clocks: who is known to have done what, so that races are found whatever the interleaving was.

An agent is a warp, or one of the two asynchronous engines of a CTA (cp.async that arrive on mbarriers; bulk
copies). Accesses carry the time of their agent; a
synchronisation publishes what an agent knows and another acquires it. All times come from one counter that grows with
every synchronisation, so a barrier can say "everything up to now". Three planes of knowledge are kept:

known     what an agent may rely on having happened
released  what an agent has made visible by a fence (PTX ISA 8.9 release patterns: fence, then a relaxed atomic)
proxied   generic-proxy writes an agent knows to be visible to the async proxy (fence.proxy.async)

Knowledge is per warp. Where only some lanes of a warp publish (an elected thread arrives on an mbarrier), what they did
since the warp's last synchronisation is kept as exceptions per thread.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

FOREVER = np.int32(2**31 - 1)


@dataclass
class Knowledge:
    """What a release published: per plane a row of times, and exceptions {thread: time}."""

    rows: dict[str, np.ndarray]
    extra: dict[str, dict[int, int]]

    def join(self, other: Knowledge) -> None:
        for plane, row in other.rows.items():
            mine = self.rows.get(plane)
            self.rows[plane] = row if mine is None else np.maximum(mine, row)
        for plane, extra in other.extra.items():
            merged = dict(self.extra.get(plane, {}))
            for t, time in extra.items():
                merged[t] = max(time, merged.get(t, 0))
            self.extra[plane] = merged

    def copy(self) -> Knowledge:
        return Knowledge(dict(self.rows), {p: dict(e) for p, e in self.extra.items()})


class Clocks:
    """Clocks of one launch. Until CTAs synchronise with each other only knowledge inside a CTA is stored."""

    def __init__(self, ctas: int, warps: int):
        self.warps, self.width, self.ctas = warps, warps + 2, ctas
        self.agents = ctas * self.width
        self.now = 1
        self.time = np.ones(self.agents, np.int32)
        self.full = False
        known = np.zeros((self.agents, self.width), np.int32)
        known[:, warps:] = FOREVER  # nothing asynchronous yet
        self.planes: dict[str, np.ndarray] = {"known": known}
        self.extra: dict[tuple[str, int], dict[int, int]] = {}
        self.unsettled: dict[tuple[str, int], dict[int, int]] = {}  # fences of single lanes since the last warp sync
        self.min_known = np.zeros(self.agents, np.int32)

    # ---- lookups
    def known(self, plane: str, who: np.ndarray, whom: np.ndarray) -> np.ndarray:
        """Up to which time `who` knows what `whom` did; agents, broadcast against each other."""
        rows = self.planes.get(plane)
        if rows is None:
            return np.zeros(np.broadcast(who, whom).shape, np.int32)
        if self.full:
            return rows[who, whom]
        same = who // self.width == whom // self.width
        return np.where(same, rows[who, whom % self.width], 0)

    def excused(self, plane: str, agent: int, thread: int, time: int) -> bool:
        return self.extra.get((plane, agent), {}).get(thread, 0) >= time

    def column(self, agent: int) -> int:
        return agent if self.full else agent % self.width

    def _own(self, cta: int) -> slice:
        return slice(cta * self.width, (cta + 1) * self.width) if self.full else slice(0, self.width)

    def _refresh(self, agent: int) -> None:
        self.min_known[agent] = self.planes["known"][agent, self._own(agent // self.width)].min()

    def plane(self, name: str) -> np.ndarray:
        if name not in self.planes:
            self.planes[name] = np.zeros((self.agents, self.agents if self.full else self.width), np.int32)
        return self.planes[name]

    def promote(self) -> None:
        """Make room for knowledge across CTAs."""
        if self.full:
            return
        self.full = True
        for name, rows in self.planes.items():
            wide = np.zeros((self.agents, self.agents), np.int32)
            for c in range(self.ctas):
                s = slice(c * self.width, (c + 1) * self.width)
                wide[s, s] = rows[s]
            self.planes[name] = wide

    def _wide(self, row: np.ndarray, cta: int) -> np.ndarray:
        if len(row) == (self.agents if self.full else self.width):
            return row
        wide = np.zeros(self.agents, np.int32)
        wide[self._own(cta)] = row
        return wide

    # ---- events
    def tick(self, agents: np.ndarray | int) -> None:
        self.now += 1
        self.time[agents] = self.now

    def start_async(self, cta: int) -> None:
        """First asynchronous access of a CTA: from now on its engines' accesses must be waited for."""
        rows = self.planes["known"][cta * self.width : (cta + 1) * self.width]
        first = self.column(cta * self.width + self.warps)
        cols = rows[:, first : first + 2]
        cols[cols == FOREVER] = 0
        self.min_known[cta * self.width : (cta + 1) * self.width] = rows[:, self._own(cta)].min(1)

    def settle(self, agent: int) -> None:
        """The lanes of a warp have synchronised: what each of them fenced now counts for all of them."""
        for name in ("released", "proxied"):
            mine = self.unsettled.pop((name, agent), None)
            if mine is None:
                continue
            if len(mine) == 32:
                col = self.column(agent)
                self.planes[name][agent, col] = max(self.planes[name][agent, col], min(mine.values()))
            else:
                self.extra.setdefault((name, agent), {}).update(mine)

    def fenced(self, plane: str, agent: int, threads: list[int]) -> dict[int, int]:
        """The exceptions in `plane` that hold for these lanes of `agent`."""
        own = dict(self.extra.get((plane, agent), {}))
        single = self.unsettled.get((plane, agent), {})
        own.update({t: single[t] for t in threads if t in single})
        return own

    def publish(self, agent: int, threads: list[int] | None, planes: tuple[str, ...] | None = None) -> Knowledge:
        """What `agent` knows, with its own actions: of the whole warp (threads None) or of some lanes. Ticks."""
        if threads is None and self.unsettled:
            self.settle(agent)
        col = self.column(agent)
        rows, extra = {}, {}
        for name, table in self.planes.items():
            if planes and name not in planes:
                continue
            row = np.where(table[agent] == FOREVER, 0, table[agent]).astype(np.int32)
            own = self.fenced(name, agent, threads or [])
            if name == "known":
                if threads is None:
                    row[col] = self.time[agent]
                else:
                    own.update(dict.fromkeys(threads, int(self.time[agent])))
            rows[name] = row
            if own:
                extra[name] = own
        self.tick(agent)
        return Knowledge(rows, extra)

    def acquire(self, agent: int, k: Knowledge, source_cta: int) -> None:
        if source_cta != agent // self.width:
            self.promote()
        for name, row in k.rows.items():
            table = self.plane(name)
            np.maximum(table[agent], self._wide(row, source_cta), out=table[agent])
        for name, extra in k.extra.items():
            mine = self.extra.setdefault((name, agent), {})
            for t, time in extra.items():
                mine[t] = max(time, mine.get(t, 0))
        self._refresh(agent)

    def warp_sync(self, agents: np.ndarray) -> None:
        """bar.warp.sync of whole warps."""
        if self.unsettled:
            for a in agents:
                self.settle(int(a))
        known = self.planes["known"]
        known[agents, agents if self.full else agents % self.width] = self.time[agents]
        self.tick(agents)
        for a in agents:
            self._refresh(int(a))

    def fence(self, plane: str, agent: int, threads: list[int]) -> None:
        """What these lanes know enters `plane` (released: fence at gpu scope; proxied: fence.proxy.async)."""
        table, known = self.plane(plane), self.planes["known"]
        np.maximum(table[agent], np.where(known[agent] == FOREVER, 0, known[agent]), out=table[agent])
        if ("known", agent) in self.extra:
            self.extra.setdefault((plane, agent), {}).update(self.extra[("known", agent)])
        self.unsettled.setdefault((plane, agent), {}).update(dict.fromkeys(threads, int(self.time[agent])))
        self.tick(agent)

    def join_ctas(self, ctas: np.ndarray) -> None:
        """A barrier of all threads of the given CTAs."""
        if self.unsettled:
            for c in ctas:
                for a in range(c * self.width, c * self.width + self.warps):
                    self.settle(a)
        before = self.now
        self.now += 1
        for name, table in self.planes.items():
            cube = table.reshape(self.ctas, self.width, -1)
            top = cube[ctas, : self.warps].max(1)
            if name == "known":
                if self.full:
                    cols = ctas[:, None] * self.width + np.arange(self.warps)
                    np.put_along_axis(top, cols, np.int32(before), 1)
                else:
                    top[:, : self.warps] = before
            cube[ctas, : self.warps] = top[:, None]
        agents = (ctas[:, None] * self.width + np.arange(self.warps)).ravel()
        self.time[agents] = self.now
        if self.extra:
            self._share_extra(ctas)
        if self.full:
            for a in agents:
                self._refresh(int(a))
        else:
            self.min_known[agents] = self.planes["known"][agents].min(1)

    def _share_extra(self, ctas: np.ndarray) -> None:
        for c in ctas:
            for name in self.planes:
                merged: dict[int, int] = {}
                for a in range(c * self.width, c * self.width + self.warps):
                    for t, time in self.extra.get((name, a), {}).items():
                        merged[t] = max(time, merged.get(t, 0))
                if merged:
                    for a in range(c * self.width, c * self.width + self.warps):
                        self.extra[(name, a)] = dict(merged)
