"""Bulk copies from shared to global memory in groups (PTX ISA 9.7.9.25.4 cp.async.bulk with .bulk_group).

The source may not be written until wait_group.read, the destination is pending until wait_group (or the end of the
kernel). Shared memory written through the generic proxy needs fence.proxy.async first.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from .memory import INIT, PENDING, READING, VALID, Region

if TYPE_CHECKING:
    from .machine import Machine

u4, u8 = np.uint32, np.uint64


@dataclass
class _Store:
    thread: int
    group: int
    source: np.ndarray
    region: Region
    target: np.ndarray
    data: np.ndarray
    idx: int
    reading: bool = True


class BulkCopies:
    def __init__(self, machine: Machine):
        self.m = machine
        self.pending: list[_Store] = []
        self.groups = np.zeros(machine.total, np.int64)

    def copy_out(
        self, dst: np.ndarray, src: np.ndarray, size: np.ndarray, ids: np.ndarray, pm: np.ndarray | None, idx: int
    ) -> None:
        """cp.async.bulk.global.shared::cta.bulk_group: captured now, visible at the wait."""
        m, shared = self.m, self.m.memory.shared
        for i in range(len(ids)) if pm is None else np.nonzero(pm)[0].tolist():
            who, n = ids[i : i + 1], int(size[i])
            if n == 0 or n % 16:
                m.report("bulk copy size is no multiple of 16", idx, who, f"{n} bytes")
                n -= n % 16
            steps = np.arange(0, n, 16)
            many = np.repeat(who, len(steps))
            off = m.memory.shared_offsets(np.repeat(src[i : i + 1], len(steps)) + steps.astype(u4), many)
            (region, target, _), *rest = m.memory.resolve("global", dst[i] + steps.astype(u8), many)
            bad = m.memory.check(shared, off, many, 16, "load", idx)
            bad2 = m.memory.check(region, target, many, 16, "store", idx)
            if bad is not None or bad2 is not None or rest or not len(steps):
                continue
            data = shared.get(shared.d, off, 16)
            if shared.shadow is not None and region.shadow is not None:
                shared.shadow.read(off, many, 16, idx)
                m.wgmma.check_proxy(off, many, idx, "bulk copy")
                region.shadow.check_write(target, many, 16, idx, None, data)
            shared.mark(off, 16, READING)
            region.mark(target, 16, PENDING)
            self.pending.append(_Store(int(who[0]), int(self.groups[who[0]]), off, region, target, data, idx))

    def commit(self, ids: np.ndarray, pm: np.ndarray | None) -> None:
        self.groups[ids if pm is None else ids[pm]] += 1

    def wait(self, ids: np.ndarray, allowed: int, only_read: bool, pm: np.ndarray | None) -> None:
        """cp.async.bulk.wait_group(.read) N: all but the last N groups of these threads have read (and written)."""
        who = set((ids if pm is None else ids[pm]).tolist())
        keep = []
        for s in self.pending:
            if s.thread in who and s.group < self.groups[s.thread] - allowed:
                self._read(s)
                if not only_read:
                    self._land(s)
                    continue
            keep.append(s)
        self.pending = keep
        for s in keep:
            if s.reading:
                self.m.memory.shared.mark(s.source, 16, READING)

    def finish(self) -> None:
        """End of the launch: everything has landed."""
        for s in self.pending:
            self._read(s)
            self._land(s)
        self.pending = []

    def _read(self, s: _Store) -> None:
        shared = self.m.memory.shared
        if not s.reading:
            return
        s.reading = False
        shared.mark(s.source, 16, 0, READING)
        if shared.shadow is not None:
            shared.shadow.read(s.source, np.full(len(s.source), s.thread), 16, s.idx, late=True)

    def _land(self, s: _Store) -> None:
        s.region.mark(s.target, 16, 0, PENDING)
        if s.region.shadow is not None:
            s.region.shadow.record_write(s.target, np.full(len(s.target), s.thread), 16)
        s.region.put(s.region.d, s.target, 16, s.data)
        s.region.fill(s.target, 16, VALID | INIT)
