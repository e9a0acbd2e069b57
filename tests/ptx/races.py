"""Race detection on memory: shadow state of each granule (the smallest access of the kernel) against the clocks.

A conflict is two accesses to one granule, at least one of them a write, not both atomic, where the later agent does not
know of the earlier access. Two lanes of one warp conflict unless the warp synchronised in between (bar.warp.sync; the
shuffles and votes order no memory, PTX ISA 9.7.13). Writes that leave the same value are not reported.

Reads are logged and entered into the tables only when a write comes that cannot be proven ordered by the cheap
watermarks, so read-only buffers and barrier-phased shared memory cost next to nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from .machine import Machine

i4, i8 = np.int32, np.int64
Benign = Callable[[], np.ndarray] | None


class Table:
    """An int32 per granule, with aligned groups of granules read and written at once."""

    def __init__(self, granules: int, fill: int):
        self.a = np.full(-(-granules // 4) * 4, fill, i4)
        self.views = {1: self.a, 2: self.a.view(i8), 4: self.a.view(np.complex128)}

    def get(self, g: np.ndarray, m: int) -> np.ndarray:
        """(n, m) values of the m granules from g (a multiple of m) on."""
        if m <= 4:
            return self.views[m].take(g // m).view(i4).reshape(-1, m)
        return self.views[4].take((g // 4)[:, None] + np.arange(m // 4)).view(i4).reshape(-1, m)

    def set(self, g: np.ndarray, m: int, v: np.ndarray) -> None:
        if m == 1:
            self.a[g] = v
        elif m <= 4:
            self.views[m][g // m] = np.repeat(v.astype(i4), m).view(i8 if m == 2 else np.complex128)
        else:
            self.a[g[:, None] + np.arange(m)] = v[:, None]


class Shadow:
    """Shadow of one region: last plain writer of every granule, last readers and atomic writers by warp."""

    def __init__(self, machine: Machine, space: str, size: int, granule: int, describe: Callable[[int], str]):
        self.m, self.space, self.granule, self.describe = machine, space, granule, describe
        self.granules = size // granule + 8
        self.clocks = machine.clocks
        self.columns = machine.clocks.width + 1  # one per warp, the async engine, and one from another CTA
        self.writer = Table(self.granules, -1)
        self.wtime = Table(self.granules, 0)
        self.readers: list[np.ndarray] | None = None  # [thread, time] tables of (granules, columns)
        self.atomics: list[np.ndarray] | None = None
        self.log: list[tuple[np.ndarray, np.ndarray, int, np.ndarray]] = []
        self.written = False
        ctas = machine.ctas
        self.last_write, self.last_read = np.zeros(ctas, i4), np.zeros(ctas, i4)
        self.shared = space == "shared" and machine.cluster_size == 1  # only its own CTA can reach it

    # ---- accesses. off: byte offsets; who: thread codes; all of `nbytes`, aligned
    def read(
        self, off: np.ndarray, who: np.ndarray, nbytes: int, idx: int, strong: bool = False, late: bool = False
    ) -> None:
        """A read. `late`: it was checked before and only lasts until now."""
        agents = self.m.agent_of[who]
        if not late and self.written and not self._passed(self.last_write, who, agents):
            g, m = off // self.granule, max(1, nbytes // self.granule)
            self._against_writer(g, m, who, agents, idx, "read", None)
            if not strong and self.atomics is not None:
                self._against(self.atomics, g, m, who, agents, idx, "read after unsynchronised atomic", None, True)
        if strong:
            return
        self.log.append((off, who, nbytes, self.clocks.time[agents]))
        self._mark(self.last_read, who)
        if len(self.log) > 4000 and (self.shared or self.written):
            self._flush()

    def write(
        self, off: np.ndarray, who: np.ndarray, nbytes: int, idx: int, benign: Benign = None,
        values: np.ndarray | None = None,
    ) -> None:  # fmt: skip
        """A plain write of `values` (n, k). `benign()` tells where they equal what is there already."""
        self.check_write(off, who, nbytes, idx, benign, values)
        self.record_write(off, who, nbytes)

    def check_write(
        self, off: np.ndarray, who: np.ndarray, nbytes: int, idx: int, benign: Benign = None,
        values: np.ndarray | None = None,
    ) -> None:  # fmt: skip
        """Would this write conflict? An asynchronous copy is checked when issued and recorded when it lands."""
        agents = self.m.agent_of[who]
        g, m = off // self.granule, max(1, nbytes // self.granule)
        if not (self._passed(self.last_write, who, agents) and self._passed(self.last_read, who, agents)):
            if self.written:
                self._against_writer(g, m, who, agents, idx, "write", benign)
                if self.atomics is not None:
                    kind = "write after unsynchronised atomic"
                    self._against(self.atomics, g, m, who, agents, idx, kind, benign, True)
            self._flush()
            if self.readers is not None:
                self._against(self.readers, g, m, who, agents, idx, "write after unsynchronised read", benign, False)
        if len(off) > 1 and not (off[1:] - off[:-1] >= nbytes).all():
            self._same_address(off, who, idx, values)

    def _same_address(self, off: np.ndarray, who: np.ndarray, idx: int, values: np.ndarray | None) -> None:
        """Two threads write one address in one instruction: fine only when they write the same."""
        _, first, group = np.unique(off, return_index=True, return_inverse=True)
        chosen = first[group]
        clash = who != who[chosen]
        if values is not None:
            clash &= (values != values[chosen]).any(1)
        if clash.any():
            i = int(np.nonzero(clash)[0][0])
            self._report("two threads write one address", idx, who[clash], int(off[i]), int(who[chosen[i]]))

    def record_write(self, off: np.ndarray, who: np.ndarray, nbytes: int) -> None:
        g, m = off // self.granule, max(1, nbytes // self.granule)
        self.writer.set(g, m, who)
        self.wtime.set(g, m, self.clocks.time[self.m.agent_of[who]])
        self._mark(self.last_write, who)
        self.written = True

    def atomic(self, off: np.ndarray, who: np.ndarray, nbytes: int, idx: int, returns: bool) -> None:
        """A strong write or read-modify-write: no conflict with other strong accesses."""
        agents = self.m.agent_of[who]
        g, m = off // self.granule, max(1, nbytes // self.granule)
        if returns:
            self.clocks.tick(agents)  # observation order needs times in order of execution
        if self.written:
            self._against_writer(g, m, who, agents, idx, "atomic", None)
        self._flush()
        if self.readers is not None:
            self._against(self.readers, g, m, who, agents, idx, "atomic after unsynchronised read", None, False)
        if self.atomics is None:
            self.atomics = self._tables()
        self._enter(self.atomics, g, m, who, self.clocks.time[agents], returns)
        self._mark(self.last_write, who)
        self.written = True

    def forget(self) -> None:
        """All earlier accesses are ordered before all later ones (start of a launch)."""
        self.__init__(self.m, self.space, (self.granules - 8) * self.granule, self.granule, self.describe)  # type: ignore[misc]

    def synchronised(self) -> None:
        """Every thread of the launch has passed one barrier: logged reads can no longer conflict."""
        if self.shared:
            self.log.clear()

    def touched(self) -> np.ndarray:
        """Mask over granules written or updated in this launch."""
        mask = self.wtime.a > 0
        if self.atomics is not None:
            mask[: self.granules] |= (self.atomics[1] != 0).any(1)  # negative: it returned the old value
        return mask

    # ---- internals
    def _tables(self) -> list[np.ndarray]:
        return [np.full((self.granules, self.columns), -1, i4), np.zeros((self.granules, self.columns), i4)]

    def _mark(self, mark: np.ndarray, who: np.ndarray) -> None:
        if len(who) == self.m.total:
            mark[:] = self.clocks.now
        else:
            mark[self.m.cta_of[who]] = self.clocks.now

    def _passed(self, mark: np.ndarray, who: np.ndarray, agents: np.ndarray) -> bool:
        """True when everything up to the watermark is known to all `agents`: nothing can conflict."""
        known = self.clocks.min_known[agents]
        if not self.shared:
            return bool(mark.max() == 0)
        return bool((mark[self.m.cta_of[who]] <= known).all())

    def _flush(self) -> None:
        if not self.log:
            return
        if self.readers is None:
            self.readers = self._tables()
        for off, who, nbytes, time in self.log:
            self._enter(self.readers, off // self.granule, max(1, nbytes // self.granule), who, time, False)
        self.log.clear()

    def _enter(
        self, tables: list[np.ndarray], g: np.ndarray, m: int, who: np.ndarray, time: np.ndarray, returns: bool
    ) -> None:
        threads, times = tables
        gi = (g[:, None] + np.arange(m)).ravel()
        t = np.repeat(who.astype(i4), m)
        col = self.m.agent_of[t] % self.clocks.width
        at = gi * self.columns + col
        flat, ftime = threads.ravel(), times.ravel()
        old = flat[at]
        before = np.where(old <= -2, -2 - old, old)  # a code below -1 stands for several lanes
        if not self.shared:
            foreign = (before >= 0) & (self.m.cta_of[np.maximum(before, 0)] != self.m.cta_of[t])
            if foreign.any():
                keep = gi[foreign] * self.columns + self.columns - 1
                flat[keep], ftime[keep] = old[foreign], ftime[at[foreign]]
        time = np.repeat(time, m)
        mixed = (old != -1) & (old != t) & (np.abs(ftime[at]) == time)  # several lanes since the last synchronisation
        flat[at] = np.where(mixed, -2 - t, t)
        ftime[at] = -time if returns else time
        winner = flat[at]
        winner = np.where(winner <= -2, -2 - winner, winner)
        lost = winner != t  # several threads of this instruction met in one place
        if lost.any():
            other = lost & (self.m.cta_of[winner] != self.m.cta_of[t])
            keep = gi[other] * self.columns + self.columns - 1
            flat[keep], ftime[keep] = t[other], (-time if returns else time)[other]
            same = lost & ~other
            flat[at[same]] = -2 - t[same]

    def _against_writer(
        self, g: np.ndarray, m: int, who: np.ndarray, agents: np.ndarray, idx: int, what: str, benign: Benign
    ) -> None:
        time = self.wtime.get(g, m)
        known = self.clocks.min_known[agents][:, None]
        if self.shared and (time <= known).all():
            return
        prev = self.writer.get(g, m)
        bad = (time > 0) & (prev != who[:, None])
        if not bad.any():
            return
        bad &= time > self.clocks.known("known", agents[:, None], self.m.agent_of[np.maximum(prev, 0)])
        self._conclude(bad, prev, time, who, agents, g, idx, f"{what} after unsynchronised write", benign)

    def _against(
        self, tables: list[np.ndarray], g: np.ndarray, m: int, who: np.ndarray, agents: np.ndarray, idx: int,
        kind: str, benign: Benign, atomics: bool,
    ) -> None:  # fmt: skip
        gi = g[:, None] + np.arange(m)
        time = np.abs(tables[1][gi])
        if not (time > 0).any():
            return
        prev = tables[0][gi]
        several = prev <= -2
        prev = np.where(several, -2 - prev, prev)
        bad = (time > 0) & ((prev != who[:, None, None]) | several)
        known = self.clocks.known("known", agents[:, None, None], self.m.agent_of[np.maximum(prev, 0)])
        bad &= time > known
        if atomics and bad.any():
            # an atomic that returned a value has seen every earlier atomic on that address (observation order)
            seen = np.where((tables[1][gi] < 0) & ~bad, time, 0).max(2, keepdims=True)
            own = np.where((tables[1][gi] < 0) & (prev == who[:, None, None]), time, 0).max(2, keepdims=True)
            bad &= time > np.maximum(seen, own)
        flat = bad.reshape(len(g), -1)
        columns = self.columns
        self._conclude(
            flat, prev.reshape(len(g), -1), time.reshape(len(g), -1), who, agents, g, idx, kind, benign, columns
        )

    def _conclude(
        self, bad: np.ndarray, prev: np.ndarray, time: np.ndarray, who: np.ndarray, agents: np.ndarray, g: np.ndarray,
        idx: int, kind: str, benign: Benign, columns: int = 1,
    ) -> None:  # fmt: skip
        """Drop what is excused (knowledge per thread, same value) and report the rest."""
        if not bad.any():
            return
        if self.clocks.extra:
            at = np.argwhere(bad)
            keys = np.stack([agents[at[:, 0]], prev[bad], time[bad]], 1)
            unique, inverse = np.unique(keys, axis=0, return_inverse=True)
            fine = np.array([self.clocks.excused("known", int(a), int(t), int(c)) for a, t, c in unique])
            bad[at[:, 0], at[:, 1]] = ~fine[inverse.ravel()]
        if bad.any() and benign is not None:
            bad &= ~benign()[:, None]
        if bad.any():
            i, j = np.argwhere(bad)[0]
            self._report(kind, idx, who[bad.any(1)], int(g[i] + j // columns) * self.granule, int(prev[i, j]))

    def _report(self, kind: str, idx: int, who: np.ndarray, off: int, other: int) -> None:
        name = self.m.thread_name(other)
        self.m.report(f"{self.space} race: {kind}", idx, who, f"{self.describe(int(off))}, the other access by {name}")
