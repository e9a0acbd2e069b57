"""Addition with thread-value layouts and predicates, a row softmax with shuffles, and a transpose through shared
memory."""

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
from cutlass import BFloat16, Float32

from .compat import SmemAllocator


@cute.kernel
def _add_kernel(
    ga: cute.Tensor, gb: cute.Tensor, gc: cute.Tensor, coordinates: cute.Tensor, shape: cute.Shape, tv: cute.Layout,
    tiler: cute.Shape,
):  # fmt: skip
    tid, _, _ = cute.arch.thread_idx()
    block, _, _ = cute.arch.block_idx()
    tile = ((None, None), block)
    atom = cute.make_copy_atom(cute.nvgpu.CopyUniversalOp(), ga.element_type)
    mine = cute.make_tiled_copy(atom, tv, tiler).get_slice(tid)
    a, b, c = mine.partition_S(ga[tile]), mine.partition_S(gb[tile]), mine.partition_S(gc[tile])
    fa, fb, fc = cute.make_fragment_like(a), cute.make_fragment_like(b), cute.make_fragment_like(c)
    where = mine.partition_S(coordinates[tile])
    inside = cute.make_rmem_tensor(where.shape, cutlass.Boolean)
    for i in range(0, cute.size(inside), 1):
        inside[i] = cute.elem_less(where[i], shape)
    cute.copy(atom, a, fa, pred=inside)
    cute.copy(atom, b, fb, pred=inside)
    fc.store(fa.load() + fb.load())
    cute.copy(atom, fc, c, pred=inside)


@cute.jit
def add(a: cute.Tensor, b: cute.Tensor, c: cute.Tensor, stream: cuda.CUstream):
    threads = cute.make_ordered_layout((4, 32), order=(1, 0))
    values = cute.make_ordered_layout((4, 4), order=(1, 0))
    tiler, tv = cute.make_layout_tv(threads, values)
    ga, gb, gc = cute.zipped_divide(a, tiler), cute.zipped_divide(b, tiler), cute.zipped_divide(c, tiler)
    coordinates = cute.zipped_divide(cute.make_identity_tensor(c.shape), tiler=tiler)
    kernel = _add_kernel(ga, gb, gc, coordinates, c.shape, tv, tiler)
    kernel.launch(grid=[cute.size(gc, mode=[1]), 1, 1], block=[cute.size(tv, mode=[0]), 1, 1], stream=stream)


@cute.kernel
def _softmax_kernel(x: cute.Tensor, y: cute.Tensor):
    tid, _, _ = cute.arch.thread_idx()
    row, _, _ = cute.arch.block_idx()
    lane, warp = cute.arch.lane_idx(), cute.arch.warp_idx()
    smem = SmemAllocator()
    shared = smem.allocate_tensor(Float32, cute.make_layout((4,)), 16)
    width = x.shape[1]
    top = -Float32.inf
    for i in cutlass.range(tid, width, 128, unroll=1):
        top = cute.arch.fmax(top, Float32(x[row, i]))
    for k in cutlass.range_constexpr(5):
        top = cute.arch.fmax(top, cute.arch.shuffle_sync_bfly(top, offset=1 << k))
    if lane == 0:
        shared[warp] = top
    cute.arch.sync_threads()
    for k in cutlass.range_constexpr(4):
        top = cute.arch.fmax(top, shared[k])
    cute.arch.sync_threads()
    s = Float32(0.0)
    for i in cutlass.range(tid, width, 128, unroll=1):
        s += cute.math.exp(Float32(x[row, i]) - top, fastmath=True)
    for k in cutlass.range_constexpr(5):
        s += cute.arch.shuffle_sync_bfly(s, offset=1 << k)
    if lane == 0:
        shared[warp] = s
    cute.arch.sync_threads()
    s = shared[0] + shared[1] + shared[2] + shared[3]
    for i in cutlass.range(tid, width, 128, unroll=1):
        y[row, i] = BFloat16(cute.math.exp(Float32(x[row, i]) - top) / s)


@cute.jit
def softmax(x: cute.Tensor, y: cute.Tensor, stream: cuda.CUstream):
    _softmax_kernel(x, y).launch(grid=(x.shape[0], 1, 1), block=(128, 1, 1), stream=stream)


@cute.kernel
def _transpose_kernel(x: cute.Tensor, y: cute.Tensor):
    tx, ty, _ = cute.arch.thread_idx()
    bx, by, _ = cute.arch.block_idx()
    smem = SmemAllocator()
    tile = smem.allocate_tensor(Float32, cute.make_layout((32, 32), stride=(33, 1)), 16)
    for j in cutlass.range_constexpr(0, 32, 8):
        r, c = by * 32 + ty + j, bx * 32 + tx
        if r < x.shape[0] and c < x.shape[1]:
            tile[ty + j, tx] = x[r, c]
    cute.arch.sync_threads()
    for j in cutlass.range_constexpr(0, 32, 8):
        r, c = bx * 32 + ty + j, by * 32 + tx
        if r < x.shape[1] and c < x.shape[0]:
            y[r, c] = tile[tx, ty + j]


@cute.jit
def transpose(x: cute.Tensor, y: cute.Tensor, stream: cuda.CUstream):
    grid = (cute.ceil_div(x.shape[1], 32), cute.ceil_div(x.shape[0], 32), 1)
    _transpose_kernel(x, y).launch(grid=grid, block=(32, 8, 1), stream=stream)
