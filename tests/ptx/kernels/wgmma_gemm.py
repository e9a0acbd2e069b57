"""c = a @ b.T in f32 with wgmma from swizzled shared memory that cp.async fills, double or triple buffered.

Each step: wait for the stage, fence.proxy.async, barrier, start the next copies, wgmma.fence, four wgmma, commit, wait.
The swizzle (32, 64, 128 bytes) follows from the depth of a tile; either operand may be K-major or MN-major.
"""

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
import cutlass.utils.hopper_helpers as hopper
from cutlass import BFloat16, Float32
from cutlass.cute.nvgpu import cpasync
from cutlass.cute.nvgpu import warpgroup as wg

from .compat import LayoutEnum, SmemAllocator


class WgmmaGemm:
    """`groups` warpgroups of 64 rows, `tile_n` columns, `depth` k per stage; a_major / b_major "k" or "mn"."""

    def __init__(
        self, groups: int = 1, tile_n: int = 64, depth: int = 64, stages: int = 2,
        a_major: str = "k", b_major: str = "k",
        a_from_registers: bool = False,
    ):  # fmt: skip
        self.groups, self.tile_m, self.tile_n, self.depth, self.stages = groups, 64 * groups, tile_n, depth, stages
        self.a_major, self.b_major, self.a_from_registers = a_major, b_major, a_from_registers
        self.threads = 128 * groups

    @cute.jit
    def __call__(self, a: cute.Tensor, b: cute.Tensor, c: cute.Tensor, stream: cuda.CUstream):
        la = LayoutEnum.ROW_MAJOR if self.a_major == "k" else LayoutEnum.COL_MAJOR
        lb = LayoutEnum.ROW_MAJOR if self.b_major == "k" else LayoutEnum.COL_MAJOR
        source = wg.OperandSource.RMEM if self.a_from_registers else wg.OperandSource.SMEM
        mma = hopper.make_trivial_tiled_mma(
            BFloat16, BFloat16, la.sm90_mma_major_mode(), lb.sm90_mma_major_mode(), Float32,
            (self.groups, 1, 1), (64, self.tile_n), source,
        )  # fmt: skip
        tiler = (self.tile_m, self.tile_n, self.depth)
        sa = hopper.make_smem_layout_a(la, tiler, BFloat16, self.stages)
        sb = hopper.make_smem_layout_b(lb, tiler, BFloat16, self.stages)
        grid = (a.shape[0] // self.tile_m, b.shape[0] // self.tile_n, 1)
        self.kernel(a, b, c, mma, sa, sb).launch(grid=grid, block=(self.threads, 1, 1), stream=stream)

    def _tiled_copy(self, atom, major: str, rows: int):
        """16-byte copies along the contiguous extent, all threads side by side."""
        across = (self.depth if major == "k" else rows) // 8
        if major == "k":
            threads = cute.make_layout((self.threads // across, across), stride=(across, 1))
            return cute.make_tiled_copy_tv(atom, threads, cute.make_layout((1, 8)))
        threads = cute.make_layout((across, self.threads // across), stride=(1, across))
        return cute.make_tiled_copy_tv(atom, threads, cute.make_layout((8, 1)))

    @cute.kernel
    def kernel(
        self, a: cute.Tensor, b: cute.Tensor, c: cute.Tensor, mma: cute.TiledMma, layout_a: cute.ComposedLayout,
        layout_b: cute.ComposedLayout,
    ):  # fmt: skip
        tid, _, _ = cute.arch.thread_idx()
        bm, bn, _ = cute.arch.block_idx()
        smem = SmemAllocator()
        sa = smem.allocate_tensor(BFloat16, layout_a.outer, 1024, swizzle=layout_a.inner)
        sb = smem.allocate_tensor(BFloat16, layout_b.outer, 1024, swizzle=layout_b.inner)
        ga = cute.local_tile(a, (self.tile_m, self.depth), (bm, None))
        gb = cute.local_tile(b, (self.tile_n, self.depth), (bn, None))
        gc = cute.local_tile(c, (self.tile_m, self.tile_n), (bm, bn))
        atom = cute.make_copy_atom(
            cpasync.CopyG2SOp(cache_mode=cute.nvgpu.LoadCacheMode.GLOBAL), BFloat16, num_bits_per_copy=128
        )
        load_a = self._tiled_copy(atom, self.a_major, self.tile_m)
        load_b = self._tiled_copy(atom, self.b_major, self.tile_n)
        mine_a, mine_b = load_a.get_slice(tid), load_b.get_slice(tid)
        ag, as_ = mine_a.partition_S(ga), mine_a.partition_D(sa)
        bg, bs = mine_b.partition_S(gb), mine_b.partition_D(sb)
        steps = cute.size(ga, mode=[2])
        for s in cutlass.range_constexpr(self.stages - 1):
            if s < steps:
                cute.copy(load_a, ag[None, None, None, s], as_[None, None, None, s])
                cute.copy(load_b, bg[None, None, None, s], bs[None, None, None, s])
            cute.arch.cp_async_commit_group()
        thr = mma.get_slice(tid)
        ra, rb = mma.make_fragment_A(thr.partition_A(sa)), mma.make_fragment_B(thr.partition_B(sb))
        out = thr.partition_C(gc)
        acc = cute.make_rmem_tensor(out.shape, Float32)
        acc.fill(0.0)
        mma.set(wg.Field.ACCUMULATE, True)
        for step in cutlass.range(steps, unroll=1):
            cute.arch.cp_async_wait_group(self.stages - 2)
            cute.arch.fence_proxy("async.shared", space="cta")
            cute.arch.sync_threads()
            ahead = step + self.stages - 1
            if ahead < steps:
                cute.copy(load_a, ag[None, None, None, ahead], as_[None, None, None, ahead % self.stages])
                cute.copy(load_b, bg[None, None, None, ahead], bs[None, None, None, ahead % self.stages])
            cute.arch.cp_async_commit_group()
            stage = step % self.stages
            if cutlass.const_expr(self.a_from_registers):
                cute.autovec_copy(thr.partition_A(sa)[None, None, None, stage], ra[None, None, None, 0])
            wg.fence()
            for k in cutlass.range_constexpr(self.depth // 16):
                if cutlass.const_expr(self.a_from_registers):
                    cute.gemm(mma, acc, ra[None, None, k, 0], rb[None, None, k, stage], acc)
                else:
                    cute.gemm(mma, acc, ra[None, None, k, stage], rb[None, None, k, stage], acc)
            wg.commit_group()
            wg.wait_group(0)
        for i in cutlass.range_constexpr(cute.size(acc)):
            out[i] = acc[i]
