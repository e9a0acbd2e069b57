"""Kernels that can be built wrong on purpose: `fault` names what is wrong, "" builds the correct twin."""

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32
from cutlass.cute.nvgpu import cpasync

from .compat import SmemAllocator


class Reverse:
    """y[b, i] = x[b, n-1-i] through shared memory by cp.async, 128 columns; faults: barrier, wait, commit, end,
    start."""

    def __init__(self, fault: str = ""):
        self.fault = fault

    @cute.jit
    def __call__(self, x: cute.Tensor, y: cute.Tensor, stream: cuda.CUstream):
        self.kernel(x, y).launch(grid=(x.shape[0], 1, 1), block=(128, 1, 1), stream=stream)

    @cute.kernel
    def kernel(self, x: cute.Tensor, y: cute.Tensor):
        tid, _, _ = cute.arch.thread_idx()
        row, _, _ = cute.arch.block_idx()
        smem = SmemAllocator()
        line = smem.allocate_tensor(Float32, cute.make_layout((128,)), 16)
        one = cute.make_layout((1,))
        atom = cute.make_copy_atom(cpasync.CopyG2SOp(), Float32, num_bits_per_copy=32)
        shift = 1 if cutlass.const_expr(self.fault == "end") else 0
        source = cute.make_tensor(x.iterator + row * x.stride[0] + tid + shift, one)
        cute.copy(atom, source, cute.make_tensor(line.iterator + tid, one))
        if cutlass.const_expr(self.fault != "commit"):
            cute.arch.cp_async_commit_group()
        if cutlass.const_expr(self.fault != "wait"):
            cute.arch.cp_async_wait_group(0)
        if cutlass.const_expr(self.fault != "barrier"):
            cute.arch.sync_threads()
        if cutlass.const_expr(self.fault == "start"):
            y[row, tid] = line[126 - tid]
        else:
            y[row, tid] = line[127 - tid]


class RowSums:
    """y[b] = x[b, :].sum() by 4 warps; faults: barrier (between phases), reuse (of the buffer), lanes (no
    sync_warp)."""

    def __init__(self, fault: str = ""):
        self.fault = fault

    @cute.jit
    def __call__(self, x: cute.Tensor, y: cute.Tensor, stream: cuda.CUstream):
        self.kernel(x, y).launch(grid=(1, 1, 1), block=(128, 1, 1), stream=stream)

    @cute.kernel
    def kernel(self, x: cute.Tensor, y: cute.Tensor):
        tid, _, _ = cute.arch.thread_idx()
        warp, lane = cute.arch.make_warp_uniform(cute.arch.warp_idx()), cute.arch.lane_idx()
        smem = SmemAllocator()
        parts = smem.allocate_tensor(Float32, cute.make_layout((4, 32), stride=(32, 1)), 16)
        sums = smem.allocate_tensor(Float32, cute.make_layout((4,)), 16)
        for row in cutlass.range(x.shape[0], unroll=1):
            s = Float32(0.0)
            for i in cutlass.range(tid, x.shape[1], 128, unroll=1):
                s += x[row, i]
            parts[warp, lane] = s
            if cutlass.const_expr(self.fault != "lanes"):
                cute.arch.sync_warp()
            if lane == 0:
                t = Float32(0.0)
                for i in cutlass.range_constexpr(32):
                    t += parts[warp, i]
                sums[warp] = t
            if cutlass.const_expr(self.fault != "barrier"):
                cute.arch.sync_threads()
            if tid == 0:
                y[row] = sums[0] + sums[1] + sums[2] + sums[3]
            if cutlass.const_expr(self.fault != "reuse"):
                cute.arch.sync_threads()


class Scatter:
    """y[index[i]] += x[i] with atomics; faults: plain (no atomic), guard (one index too many), divergent (barrier)."""

    def __init__(self, fault: str = ""):
        self.fault = fault

    @cute.jit
    def __call__(self, x: cute.Tensor, index: cute.Tensor, y: cute.Tensor, stream: cuda.CUstream):
        grid = ((cute.size(x) + 63) // 64, 1, 1)
        self.kernel(x, index, y).launch(grid=grid, block=(64, 1, 1), stream=stream)

    @cute.kernel
    def kernel(self, x: cute.Tensor, index: cute.Tensor, y: cute.Tensor):
        tid, _, _ = cute.arch.thread_idx()
        block, _, _ = cute.arch.block_idx()
        i = block * 64 + tid
        n = cute.size(x)
        if cutlass.const_expr(self.fault == "guard"):
            n = n + 1
        if i < n:
            if cutlass.const_expr(self.fault == "plain"):
                y[index[i]] = y[index[i]] + x[i]
            else:
                cute.arch.atomic_add(y.iterator + index[i], x[i])
            if cutlass.const_expr(self.fault == "divergent"):
                cute.arch.sync_threads()


class TwoPhases:
    """Global scratch inside one CTA: warp w writes, after a barrier another warp reads. Faults: barrier, scratch
    (short)."""

    def __init__(self, fault: str = ""):
        self.fault = fault

    @cute.jit
    def __call__(self, x: cute.Tensor, scratch: cute.Tensor, y: cute.Tensor, stream: cuda.CUstream):
        self.kernel(x, scratch, y).launch(grid=(1, 1, 1), block=(128, 1, 1), stream=stream)

    @cute.kernel
    def kernel(self, x: cute.Tensor, scratch: cute.Tensor, y: cute.Tensor):
        tid, _, _ = cute.arch.thread_idx()
        scratch[tid] = x[tid] * 2.0
        if cutlass.const_expr(self.fault != "barrier"):
            cute.arch.sync_threads()
        other = (tid + 32) % 128
        if cutlass.const_expr(self.fault == "unwritten"):
            other = tid + Int32(1)
        y[tid] = scratch[other]


class Handover:
    """y[i] = 2 x[n-1-i]: one launch writes scratch, a dependent one reads it after acquiring what the first released.
    Faults: relaxed (no acquire, of the atomic or of the load), barrier (other warps than the one that acquires read at
    once)."""

    def __init__(self, fault: str = ""):
        self.fault = fault

    @cute.jit
    def __call__(
        self, x: cute.Tensor, scratch: cute.Tensor, counter: cute.Tensor, y: cute.Tensor, stream: cuda.CUstream
    ):
        self.first(x, scratch, counter).launch(grid=(1, 1, 1), block=(128, 1, 1), stream=stream)
        self.second(scratch, counter, y).launch(grid=(1, 1, 1), block=(128, 1, 1), stream=stream, use_pdl=True)

    @cute.kernel
    def first(self, x: cute.Tensor, scratch: cute.Tensor, counter: cute.Tensor):
        tid, _, _ = cute.arch.thread_idx()
        scratch[tid] = x[tid] * 2.0
        cute.arch.sync_threads()
        if tid == 0:
            cute.arch.atomic_add(counter.iterator, Int32(1), sem="release", scope="gpu")

    @cute.kernel
    def second(self, scratch: cute.Tensor, counter: cute.Tensor, y: cute.Tensor):
        tid, _, _ = cute.arch.thread_idx()
        order = "relaxed" if self.fault.startswith("relaxed") else "acquire"
        if tid == 0:
            done = Int32(0)
            while done < 1:
                if cutlass.const_expr(self.fault.endswith("load")):
                    done = cute.arch.load(counter.iterator, Int32, sem=order, scope="gpu")
                else:
                    done = cute.arch.atomic_add(counter.iterator, Int32(0), sem=order, scope="gpu")
        if cutlass.const_expr(self.fault != "barrier"):
            cute.arch.sync_threads()
        y[tid] = scratch[127 - tid]
