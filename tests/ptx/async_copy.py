"""cp.async, its groups, and bulk copies (PTX ISA 9.7.9.25 asynchronous copies).

Data land at the latest legal time: at the wait, for cp.async, or when an mbarrier is tested, for bulk copies. From
issue
to landing the destination is marked pending, and every access to it is reported.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from .memory import INIT, PENDING, VALID

if TYPE_CHECKING:
    from .machine import Machine

u1, u8, i8 = np.uint8, np.uint64, np.int64


@dataclass
class _Copies:
    """cp.async of one instruction: per thread its destination, data and group."""

    ids: np.ndarray
    off: np.ndarray
    data: np.ndarray
    group: np.ndarray
    size: int
    idx: int

    def take(self, mask: np.ndarray) -> _Copies:
        return _Copies(self.ids[mask], self.off[mask], self.data[mask], self.group[mask], self.size, self.idx)


class AsyncCopies:
    def __init__(self, machine: Machine):
        self.m = machine
        self.pending: list[_Copies] = []
        self.groups = np.zeros(machine.total, np.int32)

    def issue(
        self, dst: np.ndarray, src: np.ndarray, ids: np.ndarray, size: int, source_size: np.ndarray | None,
        pm: np.ndarray | None, idx: int,
    ) -> None:  # fmt: skip
        """cp.async.{ca,cg}: `size` bytes, of which `source_size` are read and the rest are zero."""
        m = self.m
        if pm is not None:
            ids, dst, src = ids[pm], dst[pm], src[pm]
            source_size = None if source_size is None else source_size[pm]
        if not len(ids):
            return
        shared = m.memory.shared
        off = m.memory.shared_offsets(dst, ids)
        ok = m.memory.check(shared, off, ids, size, "store", idx)
        if ok is not None:
            ids, off, src = ids[ok], off[ok], src[ok]
            source_size = None if source_size is None else source_size[ok]
            if not len(ids):
                return
        data = self._fetch(src, ids, size, source_size, idx)
        if shared.shadow is not None:
            shared.shadow.check_write(off, ids, size, idx, None, data)
        shared.mark(off, size, PENDING)
        self.pending.append(_Copies(ids, off, data, self.groups[ids].copy(), size, idx))

    def _fetch(
        self, src: np.ndarray, ids: np.ndarray, size: int, source_size: np.ndarray | None, idx: int
    ) -> np.ndarray:
        """(n, k) words of min(size, 8) bytes."""
        word = min(size, 8)
        if source_size is None or (source_size == size).all():
            return np.ascontiguousarray(self.m.load("global", src, ids, word, size // word, None, idx).T)
        data = np.zeros((len(ids), size), u1)
        for want in np.unique(source_size).tolist():
            pick = np.nonzero(source_size == want)[0]
            if want > size:
                self.m.report("cp.async source size larger than the copy", idx, ids[pick])
                want = size
            done = 0
            while done < want:  # the bytes read, in the largest aligned pieces
                piece = 1 << ((want - done).bit_length() - 1)
                piece = min(piece, 8, (done & -done) or 8)
                v = self.m.load("global", src[pick] + u8(done), ids[pick], piece, 1, None, idx)
                data[pick[:, None], np.arange(done, done + piece)] = v[0][:, None].view(u1).reshape(len(pick), piece)
                done += piece
        return data.view(np.dtype(f"u{word}"))

    def commit(self, ids: np.ndarray, pm: np.ndarray | None) -> None:
        self.groups[ids if pm is None else ids[pm]] += 1

    def wait(self, ids: np.ndarray, allowed: int, pm: np.ndarray | None, idx: int) -> None:
        """cp.async.wait_group N: all but the last N committed groups of these threads land."""
        limit = np.full(self.m.total, -1, np.int64)
        who = ids if pm is None else ids[pm]
        limit[who] = self.groups[who] - allowed
        self._land(limit)

    def wait_all(self, ids: np.ndarray, pm: np.ndarray | None) -> None:
        """cp.async.wait_all: also what was never committed."""
        limit = np.full(self.m.total, -1, np.int64)
        limit[ids if pm is None else ids[pm]] = 1 << 40
        self._land(limit)

    def _land(self, limit: np.ndarray) -> None:
        keep = []
        for c in self.pending:
            done = c.group < limit[c.ids]
            if done.all():
                self.finish(c)
            elif not done.any():
                keep.append(c)
            else:
                self.finish(c.take(done))
                keep.append(c.take(~done))
        self.pending = keep

    def finish(self, c: _Copies) -> None:
        shared = self.m.memory.shared
        shared.mark(c.off, c.size, 0, PENDING)
        if shared.shadow is not None:
            shared.shadow.record_write(c.off, c.ids, c.size)
        shared.put(shared.d, c.off, c.size, c.data)
        shared.fill(c.off, c.size, VALID | INIT)
