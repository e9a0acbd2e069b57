"""c = a @ b.T (64 x 64 tiles, bf16) in the multistage form: cp.async into swizzled shared memory, ldmatrix, warp
MMA, and an
epilogue that goes through shared memory by stmatrix.

Four warps as 2 x 2. STAGES - 1 tiles are in flight while one is multiplied; one barrier per step.
"""

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
from cutlass import BFloat16, Float32
from cutlass.cute.nvgpu import cpasync, warp

from .compat import SmemAllocator

TILE, DEPTH, STAGES = 64, 64, 3


@cute.kernel
def _kernel(a: cute.Tensor, b: cute.Tensor, c: cute.Tensor, mma: cute.TiledMma, layout: cute.ComposedLayout):
    tid, _, _ = cute.arch.thread_idx()
    bm, bn, _ = cute.arch.block_idx()
    smem = SmemAllocator()
    sa = smem.allocate_tensor(BFloat16, layout.outer, 128, swizzle=layout.inner)
    sb = smem.allocate_tensor(BFloat16, layout.outer, 128, swizzle=layout.inner)
    ga = cute.local_tile(a, (TILE, DEPTH), (bm, None))
    gb = cute.local_tile(b, (TILE, DEPTH), (bn, None))
    gc = cute.local_tile(c, (TILE, TILE), (bm, bn))
    atom = cute.make_copy_atom(
        cpasync.CopyG2SOp(cache_mode=cute.nvgpu.LoadCacheMode.GLOBAL), BFloat16, num_bits_per_copy=128
    )
    load = cute.make_tiled_copy_tv(atom, cute.make_layout((16, 8), stride=(8, 1)), cute.make_layout((1, 8)))
    mine = load.get_slice(tid)
    ag, as_, bg, bs = mine.partition_S(ga), mine.partition_D(sa), mine.partition_S(gb), mine.partition_D(sb)
    steps = cute.size(ga, mode=[2])
    for s in cutlass.range_constexpr(STAGES - 1):
        if s < steps:
            cute.copy(load, ag[None, None, None, s], as_[None, None, None, s])
            cute.copy(load, bg[None, None, None, s], bs[None, None, None, s])
        cute.arch.cp_async_commit_group()
    thr = mma.get_slice(tid)
    ra = mma.make_fragment_A(thr.partition_A(sa)[None, None, None, 0])
    rb = mma.make_fragment_B(thr.partition_B(sb)[None, None, None, 0])
    copy_a = cute.make_tiled_copy_A(cute.make_copy_atom(warp.LdMatrix8x8x16bOp(False, 4), BFloat16), mma)
    copy_b = cute.make_tiled_copy_B(cute.make_copy_atom(warp.LdMatrix8x8x16bOp(False, 4), BFloat16), mma)
    ta, tb = copy_a.get_slice(tid), copy_b.get_slice(tid)
    acc = mma.make_fragment_C(thr.partition_C(gc))
    acc.fill(0.0)
    for step in cutlass.range(steps, unroll=1):
        cute.arch.cp_async_wait_group(STAGES - 2)
        cute.arch.sync_threads()
        ahead = step + STAGES - 1
        if ahead < steps:
            cute.copy(load, ag[None, None, None, ahead], as_[None, None, None, ahead % STAGES])
            cute.copy(load, bg[None, None, None, ahead], bs[None, None, None, ahead % STAGES])
        cute.arch.cp_async_commit_group()
        stage = step % STAGES
        cute.copy(copy_a, ta.partition_S(sa)[None, None, None, stage], ta.retile(ra))
        cute.copy(copy_b, tb.partition_S(sb)[None, None, None, stage], tb.retile(rb))
        cute.gemm(mma, acc, ra, rb, acc)
    cute.arch.sync_threads()
    sc = sa[None, None, 0]  # the first stage is free now
    rc = cute.make_fragment_like(acc, BFloat16)
    rc.store(acc.load().to(BFloat16))
    copy_c = cute.make_tiled_copy_C(cute.make_copy_atom(warp.StMatrix8x8x16bOp(False, 4), BFloat16), mma)
    tc = copy_c.get_slice(tid)
    cute.copy(copy_c, tc.retile(rc), tc.partition_D(sc))
    cute.arch.sync_threads()
    wide = cute.make_copy_atom(cute.nvgpu.CopyUniversalOp(), BFloat16, num_bits_per_copy=128)
    store = cute.make_tiled_copy_tv(wide, cute.make_layout((16, 8), stride=(8, 1)), cute.make_layout((1, 8)))
    out = store.get_slice(tid)
    cute.copy(store, out.partition_S(sc), out.partition_D(gc))


@cute.jit
def swizzled_gemm(a: cute.Tensor, b: cute.Tensor, c: cute.Tensor, stream: cuda.CUstream):
    op = warp.MmaF16BF16Op(BFloat16, Float32, (16, 8, 16))
    mma = cute.make_tiled_mma(op, cute.make_layout((2, 2, 1)), permutation_mnk=(32, 32, 16))
    rows = cute.make_layout((TILE, DEPTH, STAGES), stride=(DEPTH, 1, TILE * DEPTH))
    layout = cute.make_composed_layout(cute.make_swizzle(3, 4, 3), 0, rows)
    grid = (a.shape[0] // TILE, b.shape[0] // TILE, 1)
    _kernel(a, b, c, mma, layout).launch(grid=grid, block=(128, 1, 1), stream=stream)
