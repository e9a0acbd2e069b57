"""Communication between CTAs: a sum finished by the last CTA, and a persistent kernel with a work counter whose vector
reductions a dependent kernel converts to bf16."""

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
from cutlass import BFloat16, Float32, Int32

from .compat import SmemAllocator


@cute.kernel
def _sum_kernel(x: cute.Tensor, partial: cute.Tensor, ticket: cute.Tensor, out: cute.Tensor):
    tid, _, _ = cute.arch.thread_idx()
    block, _, _ = cute.arch.block_idx()
    blocks, _, _ = cute.arch.grid_dim()
    smem = SmemAllocator()
    sums = smem.allocate_tensor(Float32, cute.make_layout((8,)), 16)
    mine = smem.allocate_tensor(Int32, cute.make_layout((1,)), 16)
    s = Float32(0.0)
    for i in cutlass.range(block * 256 + tid, cute.size(x), blocks * 256, unroll=1):
        s += x[i]
    for k in cutlass.range_constexpr(5):
        s += cute.arch.shuffle_sync_bfly(s, offset=1 << k)
    warp = cute.arch.warp_idx()  # a shuffle: all lanes must take part
    if cute.arch.lane_idx() == 0:
        sums[warp] = s
    cute.arch.sync_threads()
    if tid < 8:
        partial[block, tid] = sums[tid]
    cute.arch.fence_acq_rel_gpu()
    cute.arch.sync_threads()
    if tid == 0:
        mine[0] = cute.arch.atomic_add(ticket.iterator, Int32(1))
    cute.arch.sync_threads()
    if mine[0] == blocks - 1 and tid == 0:
        total = Float32(0.0)
        for i in cutlass.range(blocks, unroll=1):
            for j in cutlass.range_constexpr(8):
                total += partial[i, j]
        out[0] = total
        ticket[0] = 0


@cute.jit
def last_block_sum(x: cute.Tensor, partial: cute.Tensor, ticket: cute.Tensor, out: cute.Tensor, stream: cuda.CUstream):
    """out[0] = sum(x); partial is [blocks, 8] scratch, ticket one zero that is zero again afterwards."""
    _sum_kernel(x, partial, ticket, out).launch(grid=(partial.shape[0], 1, 1), block=(256, 1, 1), stream=stream)


@cute.kernel
def _rows_kernel(x: cute.Tensor, counter: cute.Tensor, acc: cute.Tensor):
    tid, _, _ = cute.arch.thread_idx()
    smem = SmemAllocator()
    item = smem.allocate_tensor(Int32, cute.make_layout((1,)), 16)
    if tid == 0:
        item[0] = cute.arch.atomic_add(counter.iterator, Int32(1))
    cute.arch.sync_threads()
    row = item[0]
    while row < x.shape[0]:
        values = [x[row, tid * 4 + j] for j in range(4)]
        cute.arch.inline_ptx(
            "red.global.add.v4.f32 [{$r0}], {{$r1}, {$r2}, {$r3}, {$r4}};",
            read_only_args=[(acc.iterator + tid * 4).toint(), *values],
        )
        cute.arch.sync_threads()
        if tid == 0:
            item[0] = cute.arch.atomic_add(counter.iterator, Int32(1))
        cute.arch.sync_threads()
        row = item[0]
    cute.arch.griddepcontrol_launch_dependents()


@cute.kernel
def _cast_kernel(acc: cute.Tensor, out: cute.Tensor):
    tid, _, _ = cute.arch.thread_idx()
    cute.arch.griddepcontrol_wait()
    for j in cutlass.range_constexpr(4):
        out[tid * 4 + j] = BFloat16(acc[tid * 4 + j])


@cute.jit
def column_sums(x: cute.Tensor, counter: cute.Tensor, acc: cute.Tensor, out: cute.Tensor, stream: cuda.CUstream):
    """out = bf16(acc + x.sum(0)) for x of 512 columns; `acc` f32 keeps the sums, `counter` one zero."""
    _rows_kernel(x, counter, acc).launch(grid=(5, 1, 1), block=(128, 1, 1), stream=stream)
    _cast_kernel(acc, out).launch(grid=(1, 1, 1), block=(128, 1, 1), stream=stream, use_pdl=True)
