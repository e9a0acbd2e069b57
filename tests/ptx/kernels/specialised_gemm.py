"""c = a @ b.T with specialised warps: one warpgroup copies (cp.async, PipelineCpAsync), one multiplies (wgmma).

Per stage the producer waits for "empty", copies, and lets its copies arrive on "full"; the consumer waits for "full",
fences the async proxy, multiplies, waits for wgmma, and arrives on "empty". `fault` leaves out or misplaces one step:
acquire, wait, proxy (fence), early (release before the wgmma are complete).
"""

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
import cutlass.utils.hopper_helpers as hopper
from cutlass import BFloat16, Float32
from cutlass.cute.nvgpu import cpasync
from cutlass.cute.nvgpu import warpgroup as wg
from cutlass.pipeline import Agent, CooperativeGroup, PipelineCpAsync, PipelineUserType, make_pipeline_state

from .compat import LayoutEnum, SmemAllocator

TILE, DEPTH, STAGES = 64, 64, 3


class SpecialisedGemm:
    def __init__(self, fault: str = ""):
        self.fault = fault

    @cute.jit
    def __call__(self, a: cute.Tensor, b: cute.Tensor, c: cute.Tensor, stream: cuda.CUstream):
        rows = LayoutEnum.ROW_MAJOR
        major = rows.sm90_mma_major_mode()
        source = wg.OperandSource.SMEM
        mma = hopper.make_trivial_tiled_mma(BFloat16, BFloat16, major, major, Float32, (1, 1, 1), (64, TILE), source)
        layout_a = hopper.make_smem_layout_a(rows, (TILE, TILE, DEPTH), BFloat16, STAGES)
        layout_b = hopper.make_smem_layout_b(rows, (TILE, TILE, DEPTH), BFloat16, STAGES)
        grid = (a.shape[0] // TILE, b.shape[0] // TILE, 1)
        self.kernel(a, b, c, mma, layout_a, layout_b).launch(grid=grid, block=(256, 1, 1), stream=stream)

    @cute.kernel
    def kernel(
        self, a: cute.Tensor, b: cute.Tensor, c: cute.Tensor, mma: cute.TiledMma, layout_a: cute.ComposedLayout,
        layout_b: cute.ComposedLayout,
    ):  # fmt: skip
        tid, _, _ = cute.arch.thread_idx()
        bm, bn, _ = cute.arch.block_idx()
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        smem = SmemAllocator()
        barriers = smem.allocate_array(cutlass.Int64, 2 * STAGES)
        sa = smem.allocate_tensor(BFloat16, layout_a.outer, 1024, swizzle=layout_a.inner)
        sb = smem.allocate_tensor(BFloat16, layout_b.outer, 1024, swizzle=layout_b.inner)
        pipe = PipelineCpAsync.create(
            barrier_storage=barriers, num_stages=STAGES, producer_group=CooperativeGroup(Agent.Thread, 128),
            consumer_group=CooperativeGroup(Agent.Thread, 128),
        )  # fmt: skip
        ga = cute.local_tile(a, (TILE, DEPTH), (bm, None))
        gb = cute.local_tile(b, (TILE, DEPTH), (bn, None))
        gc = cute.local_tile(c, (TILE, TILE), (bm, bn))
        steps = cute.size(ga, mode=[2])
        if warp < 4:
            cute.arch.setmaxregister_decrease(40)
            atom = cute.make_copy_atom(
                cpasync.CopyG2SOp(cache_mode=cute.nvgpu.LoadCacheMode.GLOBAL), BFloat16, num_bits_per_copy=128
            )
            load = cute.make_tiled_copy_tv(atom, cute.make_layout((16, 8), stride=(8, 1)), cute.make_layout((1, 8)))
            mine = load.get_slice(tid)
            ag, as_, bg, bs = mine.partition_S(ga), mine.partition_D(sa), mine.partition_S(gb), mine.partition_D(sb)
            state = make_pipeline_state(PipelineUserType.Producer, STAGES)
            for step in cutlass.range(steps, unroll=1):
                if cutlass.const_expr(self.fault != "acquire"):
                    pipe.producer_acquire(state)
                cute.copy(load, ag[None, None, None, step], as_[None, None, None, state.index])
                cute.copy(load, bg[None, None, None, step], bs[None, None, None, state.index])
                pipe.producer_commit(state)
                state.advance()
            if cutlass.const_expr(self.fault != "acquire"):
                pipe.producer_tail(state)
        if warp >= 4:
            cute.arch.setmaxregister_increase(232)
            thr = mma.get_slice(tid - 128)
            ra, rb = mma.make_fragment_A(thr.partition_A(sa)), mma.make_fragment_B(thr.partition_B(sb))
            out = thr.partition_C(gc)
            acc = cute.make_rmem_tensor(out.shape, Float32)
            acc.fill(0.0)
            mma.set(wg.Field.ACCUMULATE, True)
            state = make_pipeline_state(PipelineUserType.Consumer, STAGES)
            for _ in cutlass.range(steps, unroll=1):
                if cutlass.const_expr(self.fault != "wait"):
                    pipe.consumer_wait(state)
                if cutlass.const_expr(self.fault != "proxy"):
                    cute.arch.fence_proxy("async.shared", space="cta")
                wg.fence()
                for k in cutlass.range_constexpr(DEPTH // 16):
                    cute.gemm(mma, acc, ra[None, None, k, state.index], rb[None, None, k, state.index], acc)
                wg.commit_group()
                if cutlass.const_expr(self.fault != "early"):
                    wg.wait_group(0)
                pipe.consumer_release(state)
                if cutlass.const_expr(self.fault == "early"):
                    wg.wait_group(0)
                state.advance()
            for i in cutlass.range(cute.size(acc), unroll_full=True):
                out[i] = acc[i]
