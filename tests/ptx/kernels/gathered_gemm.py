"""out[m, :] += x[rows[m], :] @ w.T with warp MMA: rows gathered by 16-byte loads straight into A fragments, w through a
two-stage cp.async pipeline, K split over the four warps, reduction in shared memory, red.global.add.

Eight consecutive k of a row are two k-permuted fragments, so both operands use 16-byte loads and no ldmatrix.
"""

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
from cutlass import BFloat16, Float32, Int32
from cutlass.cute.nvgpu import cpasync, warp

from .compat import SmemAllocator

TILE_N, TILE_K, PITCH = 64, 128, 136


@cute.jit
def _load_w(w: cute.Tensor, tile: cute.Tensor, depth: Int32, block: Int32, tid: Int32, step: Int32, stage: Int32):
    atom = cute.make_copy_atom(
        cpasync.CopyG2SOp(cache_mode=cute.nvgpu.LoadCacheMode.GLOBAL), BFloat16, num_bits_per_copy=128
    )
    eight = cute.make_layout((8,))
    for i in cutlass.range_constexpr(TILE_N * TILE_K // 8 // 128):
        chunk = tid + i * 128
        n, k = chunk // (TILE_K // 8), (chunk % (TILE_K // 8)) * 8
        source = w.iterator + cute.assume((block * TILE_N + n) * depth + step * TILE_K + k, divby=8)
        target = tile.iterator + cute.assume(n * PITCH + k + stage * (TILE_N * PITCH), divby=8)
        cute.copy(atom, cute.make_tensor(source, eight), cute.make_tensor(target, eight))


@cute.kernel
def _kernel(x: cute.Tensor, rows: cute.Tensor, w: cute.Tensor, out: cute.Tensor, mma: cute.TiledMma):
    tid, _, _ = cute.arch.thread_idx()
    bm, bn, _ = cute.arch.block_idx()
    wid, lane = cute.arch.make_warp_uniform(cute.arch.warp_idx()), cute.arch.lane_idx()
    group, quad = lane // 4, lane % 4
    smem = SmemAllocator()
    tile = smem.allocate_tensor(BFloat16, cute.make_layout((TILE_N, TILE_K, 2), stride=(PITCH, 1, TILE_N * PITCH)), 16)
    partial = smem.allocate_tensor(
        Float32, cute.make_layout((4, 16, TILE_N), stride=(16 * (TILE_N + 2), TILE_N + 2, 1)), 16
    )
    depth, count = x.shape[1], cute.size(rows)
    eight, steps = cute.make_layout((8,)), depth // TILE_K
    _load_w(w, tile, depth, bn, tid, Int32(0), Int32(0))
    cute.arch.cp_async_commit_group()
    row0, row1 = Int32(-1), Int32(-1)
    if bm * 16 + group < count:
        row0 = rows[bm * 16 + group]
    if bm * 16 + group + 8 < count:
        row1 = rows[bm * 16 + group + 8]
    fa = cute.make_rmem_tensor(mma.partition_shape_A((16, 16)), BFloat16)
    fb = cute.make_rmem_tensor(mma.partition_shape_B((8, 16)), BFloat16)
    acc = cute.make_rmem_tensor((4, TILE_N // 8), Float32)
    acc.fill(0.0)
    va, vb = cute.make_rmem_tensor((8, 2), BFloat16), cute.make_rmem_tensor((8,), BFloat16)
    wide = cute.make_copy_atom(cute.nvgpu.CopyUniversalOp(), BFloat16, num_bits_per_copy=128)
    for step in cutlass.range(steps, unroll=1):
        if step + 1 < steps:
            _load_w(w, tile, depth, bn, tid, step + 1, (step + 1) % 2)
        cute.arch.cp_async_commit_group()
        va.fill(0.0)
        at = step * TILE_K + wid * 32 + quad * 8
        if row0 >= 0:
            cute.copy(wide, cute.make_tensor(x.iterator + cute.assume(row0 * depth + at, divby=8), eight), va[None, 0])
        if row1 >= 0:
            cute.copy(wide, cute.make_tensor(x.iterator + cute.assume(row1 * depth + at, divby=8), eight), va[None, 1])
        cute.arch.cp_async_wait_group(1)
        cute.arch.sync_threads()
        for j in cutlass.range_constexpr(TILE_N // 8):
            source = (j * 8 + group) * PITCH + wid * 32 + quad * 8 + (step % 2) * (TILE_N * PITCH)
            cute.copy(wide, cute.make_tensor(tile.iterator + cute.assume(source, divby=8), eight), vb)
            for h in cutlass.range_constexpr(2):
                for e in cutlass.range_constexpr(2):
                    fa[e], fa[2 + e] = va[h * 4 + e, 0], va[h * 4 + e, 1]
                    fa[4 + e], fa[6 + e] = va[h * 4 + 2 + e, 0], va[h * 4 + 2 + e, 1]
                    fb[e], fb[2 + e] = vb[h * 4 + e], vb[h * 4 + 2 + e]
                d = cute.make_tensor(acc[None, j].iterator, cute.make_layout(((2, 2), 1, 1)))
                cute.gemm(mma, d, fa, fb, d)
        cute.arch.sync_threads()
    for j in cutlass.range_constexpr(TILE_N // 8):
        for e in cutlass.range_constexpr(4):
            partial[wid, group + 8 * (e // 2), j * 8 + quad * 2 + e % 2] = acc[e, j]
    cute.arch.barrier(barrier_id=1, number_of_threads=128)
    for i in cutlass.range_constexpr(8):
        m, n = (tid + i * 128) // TILE_N, (tid + i * 128) % TILE_N
        if bm * 16 + m < count:
            value = partial[0, m, n] + partial[1, m, n] + partial[2, m, n] + partial[3, m, n]
            target = out.iterator + (bm * 16 + m) * out.stride[0] + bn * TILE_N + n
            cute.arch.red(target, value, op="add", dtype="f32", sem="relaxed", scope="gpu")


@cute.jit
def gathered_gemm(x: cute.Tensor, rows: cute.Tensor, w: cute.Tensor, out: cute.Tensor, stream: cuda.CUstream):
    mma = cute.make_tiled_mma(warp.MmaF16BF16Op(BFloat16, Float32, (16, 8, 16)))
    grid = ((cute.size(rows) + 15) // 16, w.shape[0] // TILE_N, 1)
    _kernel(x, rows, w, out, mma).launch(grid=grid, block=(128, 1, 1), stream=stream)
