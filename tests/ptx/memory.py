"""The memories of a launch, with a flag byte beside every byte (PTX ISA 5.1 "State spaces").

Every global buffer has its own array and its own 128 GB stretch of addresses, so an index far outside is still
recognised as outside of *that* buffer. Shared memory of all CTAs is one array of windows; local memory likewise per
thread. Arrays have guards on both sides: addresses outside are clipped into them, and their flags say "not yours".
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .scalars import UNSIGNED, PtxError

if TYPE_CHECKING:
    from .machine import Machine
    from .races import Shadow

VALID = 1  #: belongs to a buffer
INIT = 2  #: has been written
PENDING = 4  #: target of an asynchronous copy that has not completed
READONLY = 8
READING = 16  #: source of an asynchronous operation that has not completed
PREVIOUS = 32  #: written by the preceding launch of a dependent (PDL) pair

GUARD = 1024
GLOBAL_BASE = 0x7000_0000_0000
SLOT_BITS = 37
GENERIC_SHARED = 0x6000_0000_0000
GENERIC_LOCAL = 0x5000_0000_0000
SHARED_BASE = 1024  #: first shared address a kernel may use; below lies what the system keeps for itself
CLUSTER_SHIFT = 24  #: shared::cluster addresses carry 1 + the CTA's rank above this bit
MAX_BUFFERS = 1 << 7

i8, u1, u4, u8 = np.int64, np.uint8, np.uint32, np.uint64
_WIDE = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64, 16: np.complex128}


def pattern(flag: int, size: int) -> np.unsignedinteger:
    """`flag` in every byte of an integer of min(size, 8) bytes."""
    size = min(size, 8)
    return UNSIGNED[size](int.from_bytes(bytes([flag]) * size, "little"))


class Region:
    """A byte array with flags, readable in aligned units of 1 to 16 bytes."""

    def __init__(self, space: str, size: int):
        total = -(-size // 64) * 64
        self.space, self.total = space, total
        self.data, self.flags = np.full(total, 0xCB, u1), np.zeros(total, u1)
        self.d = {n: self.data.view(t) for n, t in _WIDE.items()}
        self.f = {n: self.flags.view(t) for n, t in _WIDE.items()}
        self.shadow: Shadow | None = None

    def describe(self, off: int) -> str:
        return f"{self.space}+{off}"

    def get(self, table: dict[int, np.ndarray], off: np.ndarray, size: int) -> np.ndarray:
        """(n, k) integers of min(size, 8) bytes."""
        if size <= 8:
            return table[size].take(off // size, mode="clip")[:, None]
        if size == 16:
            return table[16].take(off // 16, mode="clip").view(u8).reshape(-1, 2)
        units = (off // 16)[:, None] + np.arange(size // 16)
        return table[16].take(units, mode="clip").view(u8).reshape(len(off), -1)

    def put(self, table: dict[int, np.ndarray], off: np.ndarray, size: int, values: np.ndarray) -> None:
        """Inverse of get: values (n, k) integers of min(size, 8) bytes."""
        if size <= 8:
            table[size][off // size] = values[:, 0]
        else:
            units = (off // 16)[:, None] + np.arange(size // 16)
            table[16][units] = np.ascontiguousarray(values).view(np.complex128).reshape(units.shape)

    def mark(self, off: np.ndarray, size: int, set_: int, clear: int = 0) -> None:
        """Change flag bits of `size` bytes from each offset on."""
        f = self.get(self.f, off, size)
        self.put(self.f, off, size, (f | pattern(set_, size)) & pattern(0xFF & ~clear, size))

    def fill(self, off: np.ndarray, size: int, flag: int) -> None:
        """Give `size` bytes from each offset on exactly these flags."""
        if size <= 8:
            self.f[size][off // size] = pattern(flag, size)
        else:
            value = np.full(2, pattern(flag, 8)).view(np.complex128)[0]
            for k in range(size // 16):
                self.f[16][off // 16 + k] = value


class Buffer(Region):
    """A global buffer: one argument of the host function, or a module variable."""

    def __init__(self, name: str, size: int, base: int, valid: np.ndarray | None = None):
        super().__init__("global", size + 2 * GUARD)
        self.name, self.size, self.base = name, size, base
        self.inner = slice(GUARD, GUARD + size)
        self.flags[self.inner] = VALID if valid is None else np.where(valid, VALID, 0)

    def describe(self, off: int) -> str:
        return f"buffer {self.name!r}, byte offset {off - GUARD} of {self.size}"


class Windows(Region):
    """Shared (or local) memory: one window per CTA (or thread) in one array."""

    def __init__(self, space: str, count: int, base: int, size: int):
        self.base, self.size, self.stride = base, size, -(-(base + size + GUARD) // 1024) * 1024
        super().__init__(space, self.stride * count)
        windows = self.flags.reshape(count, self.stride)
        windows[:, base : base + size] = VALID

    def describe(self, off: int) -> str:
        return f"{self.space} memory, byte {off % self.stride - self.base} of {self.size}"


class Memory:
    """Address resolution and checked access for one machine."""

    def __init__(self, machine: Machine, buffers: list[Buffer], shared: Windows, local: Windows | None):
        self.m, self.buffers, self.shared, self.local = machine, buffers, shared, local
        self.by_slot = {int(b.base - GLOBAL_BASE) >> SLOT_BITS: b for b in buffers}
        self.nowhere = Region("global", 2 * GUARD)

    # ---- addresses
    def shared_offsets(self, addr: np.ndarray, ids: np.ndarray) -> np.ndarray:
        w = self.shared
        if (addr >= u4(w.stride)).any():
            cta, low = self.m.cta_of[ids], addr & u4((1 << CLUSTER_SHIFT) - 1)
            rank = (addr >> u4(CLUSTER_SHIFT)).astype(i8)
            ok = (low < w.stride) & (rank <= self.m.cluster_size)
            other = self.m.cluster_members[self.m.cluster_of[cta], np.where(ok, rank, 1) - 1]
            window = np.where(rank == 0, cta, other)
            return np.where(ok, low.astype(i8) + window * w.stride, 0)
        return addr.astype(i8) + self.m.window_of[ids]

    def resolve(
        self, space: str, addr: np.ndarray, ids: np.ndarray
    ) -> list[tuple[Region, np.ndarray, np.ndarray | None]]:
        """-> (region, byte offsets, positions of the accesses or None for all)."""
        if space == "shared":
            return [(self.shared, self.shared_offsets(addr, ids), None)]
        if space == "global":
            slots = (addr - u8(GLOBAL_BASE)) >> u8(SLOT_BITS)
            first = int(slots[0])
            if (slots == slots[0]).all():
                return [self._buffer(first, addr, None)]
            return [self._buffer(int(k), addr, np.nonzero(slots == k)[0]) for k in np.unique(slots)]
        if space == "local":
            return self._local(addr, ids, None)
        out: list[tuple[Region, np.ndarray, np.ndarray | None]] = []
        top = addr >> u8(44)
        for k in np.unique(top):
            sel = np.nonzero(top == k)[0]
            if k == GENERIC_SHARED >> 44:
                low = (addr[sel] - u8(GENERIC_SHARED)).astype(u4)
                out.append((self.shared, self.shared_offsets(low, ids[sel]), sel))
            elif k == GENERIC_LOCAL >> 44:
                out += self._local(addr[sel] - u8(GENERIC_LOCAL), ids[sel], sel)
            else:
                for region, off, inner in self.resolve("global", addr[sel], ids[sel]):
                    out.append((region, off, sel if inner is None else sel[inner]))
        return out

    def _buffer(
        self, slot: int, addr: np.ndarray, sel: np.ndarray | None
    ) -> tuple[Region, np.ndarray, np.ndarray | None]:
        part = addr if sel is None else addr[sel]
        buf = self.by_slot.get(slot)
        if buf is None:
            return self.nowhere, np.zeros(len(part), i8), sel
        return buf, (part - u8(buf.base - GUARD)).view(i8), sel

    def _local(
        self, addr: np.ndarray, ids: np.ndarray, sel: np.ndarray | None
    ) -> list[tuple[Region, np.ndarray, np.ndarray | None]]:
        if self.local is None:
            raise PtxError("access to local memory, but the kernel declares none")
        a = addr.astype(i8)
        return [(self.local, np.where(a < self.local.stride, a + ids * i8(self.local.stride), 0), sel)]

    # ---- checks
    def check(self, r: Region, off: np.ndarray, ids: np.ndarray, size: int, what: str, idx: int) -> np.ndarray | None:
        """Bounds, alignment, initialisation, asynchronous copies in flight. `what`: load, store or atomic.
        Returns None when all is well, else the mask of accesses that may go on."""
        f = r.get(r.f, off, size)
        if what == "load":
            fine = f == pattern(VALID | INIT, size)
        else:
            fine = (f & pattern(VALID | PENDING | READONLY | READING, size)) == pattern(VALID, size)
            if what == "atomic":
                fine &= (f & pattern(INIT, size)) == pattern(INIT, size)
        if fine.all() and not (np.bitwise_or.reduce(off) & (size - 1)):
            return None
        return self._explain(r, f, off, ids, size, what, idx)

    def _explain(
        self, r: Region, f: np.ndarray, off: np.ndarray, ids: np.ndarray, size: int, what: str, idx: int
    ) -> np.ndarray | None:
        def lacking(flag: int) -> np.ndarray:
            return ((f & pattern(flag, size)) != pattern(flag, size)).any(1)

        def having(flag: int) -> np.ndarray:
            return ((f & pattern(flag, size)) != 0).any(1)

        def tell(kind: str, mask: np.ndarray, extra: str = "") -> None:
            if mask.any():
                i = np.nonzero(mask)[0][0]
                self.m.report(kind, idx, ids[mask], r.describe(int(off[i])) + extra)

        inside = ~lacking(VALID) & (off >= 0) & (off <= r.total - size)
        aligned = off & (size - 1) == 0
        tell(f"misaligned {r.space} {what}", ~aligned, f", {size} bytes")
        outside = aligned & ~inside
        detail = ", an address in no buffer" if r is self.nowhere else f", {size} bytes"
        tell(f"out-of-bounds {r.space} {what}", outside, detail)
        ok = inside & aligned
        pending = ok & having(PENDING)
        tell(f"{r.space} {what} overlaps an incomplete asynchronous copy", pending)
        if what != "store":
            tell(f"uninitialised {r.space} {what}", ok & lacking(INIT) & ~pending)
        if what != "load":
            tell(f"{r.space} {what} to a read-only buffer", ok & having(READONLY))
            tell(f"{r.space} {what} to the source of an incomplete asynchronous operation", ok & having(READING))
        early = ok & having(PREVIOUS)
        if early.any():
            tell(
                f"{r.space} {what} before griddepcontrol.wait to data of the preceding launch",
                early & ~self.m.waited(ids),
            )
        return None if ok.all() else ok

    def of_preceding_launch(self, r: Region, off: np.ndarray, size: int) -> np.ndarray:
        """Which of these accesses touch what the preceding launch of a dependent pair wrote."""
        inside = (off >= 0) & (off <= r.total - size)
        found = np.zeros(len(off), bool)
        found[inside] = ((r.get(r.f, off[inside], size) & pattern(PREVIOUS, size)) != 0).any(1)
        return found

    def check_alignment(self, addr: np.ndarray, ids: np.ndarray, size: int, pm: np.ndarray | None, idx: int) -> None:
        bad = (addr & addr.dtype.type(size - 1)) != 0
        if pm is not None:
            bad &= pm
        if bad.any():
            self.m.report("misaligned vector load", idx, ids[bad], f"{size} bytes")

    # ---- plain accesses, called from generated code
    def load(
        self, space: str, addr: np.ndarray, ids: np.ndarray, size: int, count: int, pm: np.ndarray | None, idx: int,
        strong: bool = False,
    ) -> np.ndarray:  # fmt: skip
        """-> (count, n) unsigned integers of `size` bytes; 0 for lanes that are predicated off."""
        n, sub = len(ids), None
        if pm is not None:
            sub = np.nonzero(pm)[0]
            if not len(sub):
                return np.zeros((count, n), UNSIGNED[size])
            addr, ids = addr[sub], ids[sub]
        parts = self.resolve(space, addr, ids)
        if len(parts) == 1 and parts[0][2] is None:
            v = self._load_part(parts[0][0], parts[0][1], ids, size, count, idx, strong)
        else:
            v = np.zeros((len(ids), count), UNSIGNED[size])
            for region, off, sel in parts:
                assert sel is not None
                v[sel] = self._load_part(region, off, ids[sel], size, count, idx, strong)
        out = v.T if count == 1 else np.ascontiguousarray(v.T)
        if sub is not None:
            full = np.zeros((count, n), out.dtype)
            full[:, sub] = out
            return full
        return out

    def _load_part(
        self, r: Region, off: np.ndarray, ids: np.ndarray, size: int, count: int, idx: int, strong: bool
    ) -> np.ndarray:
        total = size * count
        ok = self.check(r, off, ids, total, "load", idx)
        if ok is not None:
            off = np.where(ok, off, 0)
        v = r.get(r.d, off, total).view(UNSIGNED[size])
        if ok is not None:
            v = np.where(ok[:, None], v, UNSIGNED[size](0x7FFFCBCB7FFFCBCB & ((1 << 8 * size) - 1)))
            off, ids = off[ok], ids[ok]
        if r.shadow is not None and len(off):
            r.shadow.read(off, ids, total, idx, strong)
        return v

    def store(
        self, space: str, addr: np.ndarray, ids: np.ndarray, size: int, values: list[np.ndarray],
        pm: np.ndarray | None, idx: int, strong: bool = False,
    ) -> None:  # fmt: skip
        v = np.stack(values, 1) if len(values) > 1 else values[0][:, None]
        if pm is not None:
            sub = np.nonzero(pm)[0]
            if not len(sub):
                return
            addr, ids, v = addr[sub], ids[sub], v[sub]
        self.m.progress += 1
        for region, off, sel in self.resolve(space, addr, ids):
            part = (ids, v) if sel is None else (ids[sel], v[sel])
            self._store_part(region, off, part[0], part[1], size * v.shape[1], idx, strong)

    def _store_part(
        self, r: Region, off: np.ndarray, ids: np.ndarray, v: np.ndarray, total: int, idx: int, strong: bool
    ) -> None:
        ok = self.check(r, off, ids, total, "store", idx)
        if ok is not None:
            off, ids, v = off[ok], ids[ok], v[ok]
            if not len(off):
                return
        packed = np.ascontiguousarray(v).view(UNSIGNED[min(total, 8)]).reshape(len(off), -1)
        if r.shadow is not None:
            if strong:
                r.shadow.atomic(off, ids, total, idx, False)
            else:
                same = lambda: (r.get(r.d, off, total) == packed).all(1) & ~self._fresh(r, off, total)  # noqa: E731
                r.shadow.write(off, ids, total, idx, same, packed)
        r.put(r.d, off, total, packed)
        r.fill(off, total, VALID | INIT)

    @staticmethod
    def _fresh(r: Region, off: np.ndarray, total: int) -> np.ndarray:
        """True where the bytes have never been written."""
        return ((r.get(r.f, off, total) & pattern(INIT, total)) == 0).any(1)
