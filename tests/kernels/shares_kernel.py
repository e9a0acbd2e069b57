"""A kernel that builds the table of a batch's pairs, and writes which items each CTA works off."""

from __future__ import annotations

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute

from cutedsl_kernels.kernels.primitives import SmemAllocator
from cutedsl_kernels.kernels.routing import PairTable


class Shares:
    def __init__(self, experts: int, top_k: int, tiles: int, ctas: int, threads: int):
        self.ctas, self.threads = ctas, threads
        self.table = PairTable(experts, top_k, 4096, 8, tiles, threads, has_expert_map=False)

    @cute.jit
    def __call__(self, ids: cute.Tensor, weights: cute.Tensor, out: cute.Tensor, stream: cuda.CUstream):
        """ids [T, k] int32, weights [T, k] fp32, out [ctas, 4] int32: first, step, own, common."""
        launch = self.kernel(ids, weights, out)
        launch.launch(grid=(self.ctas, 1, 1), block=(self.threads, 1, 1), stream=stream, use_pdl=True)

    @cute.kernel
    def kernel(self, ids: cute.Tensor, weights: cute.Tensor, out: cute.Tensor):
        thread, _, _ = cute.arch.thread_idx()
        cta, _, _ = cute.arch.block_idx()
        table = self.table.allocate(SmemAllocator())
        self.table.build(ids, weights, ids, cutlass.Float32(0.0), table, thread)
        course = self.table.course(table[3])
        if thread == 0:
            for i in cutlass.range_constexpr(4):
                out[cta, i] = course[i]
