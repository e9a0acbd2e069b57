"""One kernel launch: registers, memories, clocks and the services that generated code calls."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from . import collectives
from .async_copy import AsyncCopies
from .atomics import Atomics
from .barriers import Barriers
from .bulk import BulkCopies
from .clocks import Clocks
from .codegen import Program
from .mbarriers import MBarriers
from .memory import CLUSTER_SHIFT, GENERIC_LOCAL, GENERIC_SHARED, SHARED_BASE, Buffer, Memory, Windows
from .parser import Instruction, Kernel, Module
from .races import Shadow
from .reports import Reports
from .scalars import PtxError, register_dtype
from .wgmma import WarpgroupMma

u4, u8, i8 = np.uint32, np.uint64, np.int64


@dataclass
class Launch:
    """What the host code asked for: one cudaLaunchKernelEx call."""

    kernel: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared_bytes: int
    params: list[bytes]
    cluster: tuple[int, int, int] = (1, 1, 1)
    dependent: bool = False  #: programmatic stream serialisation (PDL)
    attributes: list[int] = field(default_factory=list)


def layout(kernel: Kernel, module: Module, bases: dict[str, int]) -> tuple[dict[str, tuple[str, int]], int, int]:
    """Addresses of variables -> (symbols, offset of dynamic shared memory, bytes of local memory)."""
    symbols: dict[str, tuple[str, int]] = {name: ("global", base) for name, base in bases.items()}
    at = SHARED_BASE
    for v in kernel.shared:
        at = -(-at // v.align) * v.align
        symbols[v.name] = ("shared", at)
        at += v.size
    if kernel.dynamic_shared:
        at = -(-at // 1024) * 1024
        symbols[kernel.dynamic_shared] = ("shared", at)
    local = 0
    for v in kernel.local:
        local = -(-local // v.align) * v.align
        symbols[v.name] = ("local", local)
        local += v.size
    return symbols, at - SHARED_BASE, local


class Machine:
    """State of a running launch. `check_races=False` drops race detection (bounds and initialisation stay)."""

    def __init__(
        self, program: Program, launch: Launch, buffers: list[Buffer], static: tuple[int, int], check_races: bool
    ):
        self.program, self.launch = program, launch
        k = program.kernel
        block, grid = launch.block, launch.grid
        if k.reqntid is not None and (*k.reqntid, 1, 1)[:3] != block:
            raise PtxError(f"kernel {k.name} requires block {k.reqntid}, launched with {block}")
        if len(launch.params) != len(k.params):
            raise PtxError(f"kernel {k.name} takes {len(k.params)} parameters, got {len(launch.params)}")
        self.threads, self.ctas = int(np.prod(block)), int(np.prod(grid))
        if self.threads % 32:
            raise PtxError(f"{self.threads} threads a CTA: only whole warps are supported")
        self.total, self.warps = self.threads * self.ctas, self.threads // 32
        self.reports = Reports(k.name, program.instructions, grid, self.threads)
        self.clocks = Clocks(self.ctas, self.warps)
        self.cluster_size = int(np.prod(launch.cluster))
        self._numbering()
        shared = Windows("shared", self.ctas, SHARED_BASE, static[0] + launch.shared_bytes)
        local = Windows("local", self.total, 0, static[1]) if static[1] else None
        self.window_of = self.cta_of[: self.total].astype(i8) * shared.stride
        self.memory = Memory(self, buffers, shared, local)
        self.check_races = check_races
        if check_races:
            shared.shadow = Shadow(self, "shared", shared.total, program.shared_granule, shared.describe)
            for b in buffers:
                b.shadow = Shadow(self, "global", b.total, program.global_granule, b.describe)
        self.load, self.store = self.memory.load, self.memory.store
        self.atomics, self.copies = Atomics(self), AsyncCopies(self)
        self.barriers, self.mbarriers = Barriers(self), MBarriers(self)
        self.wgmma, self.bulk = WarpgroupMma(self), BulkCopies(self)
        self.special = self._special_registers()
        live = set().union(*(b.uses for b in program.blocks))
        self.registers: list[np.ndarray | None] = [None] * len(program.registers)
        for i in live:
            self.registers[i] = np.zeros(self.total, register_dtype(program.register_types[i] or "b32"))
        self.exited = np.zeros(self.total, bool)
        self.grid_waited = np.zeros(self.ctas * self.warps, bool)
        self.grid_waited[:] = not launch.dependent
        self.progress = self.steps = self.vector_instructions = self.thread_instructions = 0
        self.local_reported = False
        self.polling: np.ndarray | None = None  # set while the scheduler asks a try_wait whether it would succeed

    def _numbering(self) -> None:
        """Thread codes 0..total-1 are threads, total + 2c + e the asynchronous engines of CTA c: e = 0 for cp.async
        (generic proxy), 1 for bulk copies (async proxy)."""
        t = np.arange(self.total)
        cta, warp = t // self.threads, t % self.threads // 32
        engines = np.arange(2 * self.ctas) // 2
        width = self.clocks.width
        self.cta_of = np.concatenate([cta, engines])
        self.agent_of = np.concatenate(
            [cta * width + warp, engines * width + self.warps + np.arange(2 * self.ctas) % 2]
        ).astype(np.int32)
        cluster, rank = self._clusters()
        self.cluster_of = cluster
        self.cluster_members = np.zeros((self.ctas // self.cluster_size, self.cluster_size), np.int64)
        self.cluster_members[cluster, rank] = np.arange(self.ctas)

    def _clusters(self) -> tuple[np.ndarray, np.ndarray]:
        """-> for every CTA its cluster and its rank there."""
        (gx, gy, gz), (cx, cy, cz) = self.launch.grid, self.launch.cluster
        if gx % cx or gy % cy or gz % cz:
            raise PtxError(f"grid {self.launch.grid} is no multiple of the cluster {self.launch.cluster}")
        c = np.arange(self.ctas)
        x, y, z = c % gx, c // gx % gy, c // (gx * gy)
        cluster = x // cx + (gx // cx) * (y // cy + (gy // cy) * (z // cz))
        return cluster, x % cx + cx * (y % cy + cy * (z % cz))

    def _special_registers(self) -> dict[str, np.ndarray]:
        grid, block, cl = self.launch.grid, self.launch.block, self.launch.cluster
        t, c = np.arange(self.total) % self.threads, np.arange(self.total) // self.threads
        lane = (t % 32).astype(u8)
        tid = (t % block[0], t // block[0] % block[1], t // (block[0] * block[1]))
        cid = (c % grid[0], c // grid[0] % grid[1], c // (grid[0] * grid[1]))
        one = u8(1)
        out: dict[str, np.ndarray] = {
            "%laneid": lane, "%warpid": t // 32, "%nwarpid": t * 0 + self.warps,
            "%smid": c % 132, "%nsmid": t * 0 + 132,
            "%lanemask_eq": one << lane, "%lanemask_lt": (one << lane) - one, "%lanemask_le": (u8(2) << lane) - one,
            "%lanemask_gt": ~((u8(2) << lane) - one), "%lanemask_ge": ~((one << lane) - one),
            "%dynamic_smem_size": t * 0 + self.launch.shared_bytes,
            "%total_smem_size": t * 0 + self.memory.shared.size,
            "%is_explicit_cluster": t * 0 + (self.cluster_size > 1),
        }  # fmt: skip
        rank, scale = 0 * c, 1
        for i, d in enumerate("xyz"):
            inside = cid[i] % cl[i]
            out |= {
                f"%tid.{d}": tid[i], f"%ntid.{d}": t * 0 + block[i], f"%ctaid.{d}": cid[i],
                f"%nctaid.{d}": t * 0 + grid[i],
                f"%cluster_ctaid.{d}": inside, f"%cluster_nctaid.{d}": t * 0 + cl[i],
                f"%clusterid.{d}": cid[i] // cl[i], f"%nclusterid.{d}": t * 0 + grid[i] // cl[i],
            }  # fmt: skip
            rank, scale = rank + inside * scale, scale * cl[i]
        out |= {"%cluster_ctarank": rank, "%cluster_nctarank": t * 0 + self.cluster_size}
        return {name: v.astype(u4) for name, v in out.items()}

    # ---- services of generated code
    def report(self, kind: str, idx: int, who: np.ndarray, detail: str = "") -> None:
        first = int(who[0])
        if first >= self.total:
            first = (first - self.total) // 2 * self.threads
        self.reports.add(kind, idx, first, len(who), detail)

    def thread_name(self, code: int) -> str:
        if code >= self.total:
            return f"an asynchronous copy of CTA {(code - self.total) // 2}"
        t = code % self.threads
        return f"thread {t} (warp {t // 32}) of CTA {code // self.threads}"

    def is_bulk_engine(self, code: np.ndarray) -> np.ndarray:
        return (code >= self.total) & ((code - self.total) % 2 == 1)

    def instruction(self, idx: int) -> Instruction:
        return self.program.instructions[idx]

    def param(self, index: int, offset: int, dtype: type) -> np.generic:
        raw = self.launch.params[index]
        if offset + np.dtype(dtype).itemsize > len(raw):
            raise PtxError(f"parameter {index} has {len(raw)} bytes, read at {offset}")
        return np.frombuffer(raw, dtype, 1, offset)[0]

    def clock(self) -> int:
        return self.vector_instructions

    def to_generic(self, addr: np.ndarray, space: str) -> np.ndarray:
        base = {"global": 0, "shared": GENERIC_SHARED, "local": GENERIC_LOCAL}[space]
        return addr.astype(u8) + u8(base)

    def from_generic(self, addr: np.ndarray, space: str) -> np.ndarray:
        base = {"global": 0, "shared": GENERIC_SHARED, "local": GENERIC_LOCAL}[space]
        return addr.astype(u8) - u8(base)

    def map_to_rank(self, addr: np.ndarray, rank: np.ndarray) -> np.ndarray:
        """mapa: the shared::cluster address of the same place in another CTA of the cluster."""
        low = addr & addr.dtype.type((1 << CLUSTER_SHIFT) - 1)
        return low | ((rank.astype(addr.dtype) + addr.dtype.type(1)) << addr.dtype.type(CLUSTER_SHIFT))

    def local_access(self, ids: np.ndarray, idx: int) -> None:
        if not self.local_reported:
            self.local_reported = True
            self.report("local memory is used", idx, ids, "registers are spilled or indexed at run time")

    def warps_of(self, ids: np.ndarray) -> list[tuple[int, np.ndarray, bool]]:
        """-> (agent, its threads among ids, whether these are all live threads of the warp)."""
        out = []
        warp = ids // 32
        if len(ids) % 32 == 0 and (warp.reshape(-1, 32) == warp[::32, None]).all():
            rows = ids.reshape(-1, 32)
            return [(int(a), row, True) for a, row in zip(self.agent_of[rows[:, 0]], rows, strict=True)]
        for w in np.unique(warp):
            mine = ids[warp == w]
            live = 32 - int(self.exited[w * 32 : w * 32 + 32].sum())
            out.append((int(self.agent_of[mine[0]]), mine, len(mine) >= live))
        return out

    def warp_sync(self, ids: np.ndarray) -> None:
        if self.check_races:
            self.clocks.warp_sync(np.unique(self.agent_of[ids]))

    def fence(self, ids: np.ndarray, plane: str) -> None:
        if self.check_races:
            for agent, mine, _ in self.warps_of(ids):
                self.clocks.fence(plane, agent, mine.tolist())
            if plane == "released":
                self.atomics.fence_acquires(ids)

    def waited(self, ids: np.ndarray) -> np.ndarray:
        return self.grid_waited[ids // 32]

    def grid_wait(self, ids: np.ndarray) -> None:
        """griddepcontrol.wait, or an acquire of what the preceding launch wrote."""
        self.grid_waited[ids // 32] = True

    def share_wait(self, ids: np.ndarray) -> None:
        """After these threads waited at a barrier: if one of a CTA has waited for the preceding launch, all have."""
        if self.launch.dependent and not self.grid_waited.all():
            warps = np.unique(ids // 32)
            ctas = self.cta_of[warps * 32]
            self.grid_waited[warps] |= np.isin(ctas, ctas[self.grid_waited[warps]])

    shuffle = staticmethod(collectives.shuffle)
    vote = staticmethod(collectives.vote)
    match = staticmethod(collectives.match)
    reduce = staticmethod(collectives.reduce)
    elect = staticmethod(collectives.elect)
    mma = staticmethod(collectives.mma)

    def ldmatrix(
        self, addr: np.ndarray, ids: np.ndarray, count: int, trans: bool, pm: np.ndarray | None, idx: int
    ) -> list[np.ndarray]:
        return collectives.ldmatrix(self, addr, ids, count, trans, pm, idx)

    def stmatrix(
        self, addr: np.ndarray, ids: np.ndarray, regs: list[np.ndarray], trans: bool, pm: np.ndarray | None, idx: int
    ) -> None:
        collectives.stmatrix(self, addr, ids, regs, trans, pm, idx)
