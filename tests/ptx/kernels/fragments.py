"""One warp, one tile: fragments by CuTe's own partitions against what the instructions do with registers."""

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
from cutlass import Float32
from cutlass.cute.nvgpu import warp

from .compat import SmemAllocator


class MmaTile:
    """c (16 x 8) = a (16 x k) @ b (8 x k).T, every element loaded and stored by CuTe's partitions."""

    def __init__(self, dtype, k: int, acc=Float32):
        self.dtype, self.k, self.acc = dtype, k, acc

    @cute.jit
    def __call__(self, a: cute.Tensor, b: cute.Tensor, c: cute.Tensor, stream: cuda.CUstream):
        mma = cute.make_tiled_mma(warp.MmaF16BF16Op(self.dtype, self.acc, (16, 8, self.k)))
        self.kernel(a, b, c, mma).launch(grid=(1, 1, 1), block=(32, 1, 1), stream=stream)

    @cute.kernel
    def kernel(self, a: cute.Tensor, b: cute.Tensor, c: cute.Tensor, mma: cute.TiledMma):
        tid, _, _ = cute.arch.thread_idx()
        mine = mma.get_slice(tid)
        pa, pb, pc = mine.partition_A(a), mine.partition_B(b), mine.partition_C(c)
        ra, rb = mma.make_fragment_A(pa), mma.make_fragment_B(pb)
        acc = mma.make_fragment_C(pc)
        for i in cutlass.range_constexpr(cute.size(pa)):
            ra[i] = pa[i]
        for i in cutlass.range_constexpr(cute.size(pb)):
            rb[i] = pb[i]
        acc.fill(0.0)
        cute.gemm(mma, acc, ra, rb, acc)
        for i in cutlass.range_constexpr(cute.size(acc)):
            pc[i] = acc[i]


class MatrixCopies:
    """out = a (16 x 16) once through ldmatrix (by the layout of A fragments) and once through stmatrix (C fragments).

    `transposed`: shared memory holds a.T, so both instructions use .trans.
    """

    def __init__(self, dtype, count: int, transposed: bool):
        self.dtype, self.count, self.transposed = dtype, count, transposed

    @cute.jit
    def __call__(self, a: cute.Tensor, loaded: cute.Tensor, stored: cute.Tensor, stream: cuda.CUstream):
        mma = cute.make_tiled_mma(warp.MmaF16BF16Op(self.dtype, Float32, (16, 8, 16)), permutation_mnk=(16, 16, 16))
        self.kernel(a, loaded, stored, mma).launch(grid=(1, 1, 1), block=(32, 1, 1), stream=stream)

    @cute.kernel
    def kernel(self, a: cute.Tensor, loaded: cute.Tensor, stored: cute.Tensor, mma: cute.TiledMma):
        tid, _, _ = cute.arch.thread_idx()
        smem = SmemAllocator()
        stride = (1, 24) if cutlass.const_expr(self.transposed) else (24, 1)
        layout = cute.make_layout((16, 16), stride=stride)
        first, second = smem.allocate_tensor(self.dtype, layout, 16), smem.allocate_tensor(self.dtype, layout, 16)
        for i in cutlass.range_constexpr(8):
            e = tid * 8 + i
            first[e // 16, e % 16] = a[e // 16, e % 16]
        cute.arch.sync_warp()
        mine = mma.get_slice(tid)
        ra = mma.make_fragment_A(mine.partition_A(first))
        load = cute.make_tiled_copy_A(
            cute.make_copy_atom(warp.LdMatrix8x8x16bOp(self.transposed, self.count), self.dtype), mma
        )
        lane = load.get_slice(tid)
        cute.copy(load, lane.partition_S(first), lane.retile(ra))
        pa = mine.partition_A(loaded)
        for i in cutlass.range_constexpr(cute.size(ra)):
            pa[i] = ra[i]
        pc = mine.partition_C(a)
        rc = cute.make_fragment_like(pc, self.dtype)
        for i in cutlass.range_constexpr(cute.size(rc)):
            rc[i] = pc[i]
        store = cute.make_tiled_copy_C(
            cute.make_copy_atom(warp.StMatrix8x8x16bOp(self.transposed, self.count), self.dtype), mma
        )
        lane = store.get_slice(tid)
        cute.copy(store, lane.retile(rc), lane.partition_D(second))
        cute.arch.sync_warp()
        for i in cutlass.range_constexpr(8):
            e = tid * 8 + i
            stored[e // 16, e % 16] = second[e // 16, e % 16]
