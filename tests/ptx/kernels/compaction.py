"""Compaction of the large elements of each row: ballot, popc, shared-memory segments per warp, an atomic total.

One CTA of four warps per row. Each warp collects the indices of its quarter in its own segment, then all four quarters
are written one after the other.
"""

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Uint32

from .compat import SmemAllocator

SEGMENT = 256


@cute.kernel
def _kernel(x: cute.Tensor, limit: Float32, index: cute.Tensor, count: cute.Tensor, total: cute.Tensor):
    tid, _, _ = cute.arch.thread_idx()
    row, _, _ = cute.arch.block_idx()
    warp, lane = cute.arch.make_warp_uniform(cute.arch.warp_idx()), cute.arch.lane_idx()
    smem = SmemAllocator()
    found = smem.allocate_tensor(Int32, cute.make_layout((4, SEGMENT), stride=(SEGMENT, 1)), 16)
    counts = smem.allocate_tensor(Int32, cute.make_layout((4,)), 16)
    width = x.shape[1]
    quarter = ((width + 127) // 128) * 32
    n = Int32(0)
    for step in cutlass.range(quarter // 32, unroll=1):
        column = warp * quarter + step * 32 + lane
        keep = cutlass.Boolean(False)
        if column < width:
            value = x[row, column]
            keep = (value if value > 0.0 else -value) >= limit
        mask = Uint32(cute.arch.vote_ballot_sync(keep))
        if keep:
            found[warp, n + Int32(cute.arch.popc(mask & cute.arch.lanemask_lt()))] = column
        n = n + Int32(cute.arch.popc(mask))
    if lane == 0:
        counts[warp] = n
    cute.arch.sync_threads()
    offset = Int32(0)
    for w in cutlass.range_constexpr(4):
        if w < warp:
            offset = offset + counts[w]
    for i in cutlass.range(lane, n, 32, unroll=1):
        index[row, offset + i] = found[warp, i]
    if tid == 0:
        all_of_row = counts[0] + counts[1] + counts[2] + counts[3]
        count[row] = all_of_row
        cute.arch.atomic_add(total.iterator, all_of_row)


@cute.jit
def compact(
    x: cute.Tensor, limit: Float32, index: cute.Tensor, count: cute.Tensor, total: cute.Tensor, stream: cuda.CUstream
):
    _kernel(x, limit, index, count, total).launch(grid=(x.shape[0], 1, 1), block=(128, 1, 1), stream=stream)
