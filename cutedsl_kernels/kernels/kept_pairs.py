"""ActivatePairs and SumPairs: what stands between and behind the two grouped products of a dense layer, for the pairs
that are computed here only.

A grouped GEMM that leaves out a pair (skipped whole, or its expert on another rank) leaves the pair's row of its output
as it was. Neither kernel reads such a row, so that nobody has to zero it, and its bytes are not moved:

    gate_up [P, 2I]  --ActivatePairs-->  h [P, I]            h = act(gate) * up
    y [T, k, H]      --SumPairs------->  out [T, H]          fp32 sum over a token's pairs in order, one rounding

Both are limited by memory; a thread has all its loads under way before it uses the first.
"""

from __future__ import annotations

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute

from .primitives import BF16, F32, I32, I64, U32, activate_gate, transform_up, vector
from .routing import local_expert

THREADS = 256
VECTORS = 2  # vectors of 8 columns that a thread of ActivatePairs handles


class ActivatePairs:
    """gate_up [P, 2I] bf16, gate columns first; topk_ids [P] int32; expert_map [E_global] int32; out [P, I] bf16. I
    must be a multiple of 8."""

    def __init__(self, intermediate_size: int, activation: str):
        self.I, self.activation = intermediate_size, activation

    @cute.jit
    def __call__(
        self,
        gate_up: cute.Tensor,
        topk_ids: cute.Tensor,
        expert_map: cute.Tensor,
        out: cute.Tensor,
        stream: cuda.CUstream,
    ):
        width = THREADS * VECTORS
        vectors = cute.size(topk_ids) * (self.I // 8)
        self.kernel(gate_up, topk_ids, expert_map, out).launch(
            grid=((vectors + (width - 1)) // width, 1, 1), block=(THREADS, 1, 1), stream=stream
        )

    @cute.kernel
    def kernel(self, gate_up: cute.Tensor, topk_ids: cute.Tensor, expert_map: cute.Tensor, out: cute.Tensor):
        thread, _, _ = cute.arch.thread_idx()
        cta, _, _ = cute.arch.block_idx()
        columns = self.I // 8
        vectors = cute.size(topk_ids) * columns
        gate, up = cute.make_rmem_tensor((8, VECTORS), BF16), cute.make_rmem_tensor((8, VECTORS), BF16)
        target = cute.make_rmem_tensor((VECTORS,), I64)
        for i in cutlass.range_constexpr(VECTORS):
            index = (cta * VECTORS + i) * THREADS + thread
            target[i] = I64(-1)
            if index < vectors:
                pair = I32(U32(index) // columns)
                column = (index - pair * columns) * 8
                if local_expert(topk_ids[pair], expert_map) >= 0:
                    target[i] = I64(pair) * self.I + column
                    source = I64(pair) * (2 * self.I) + column
                    cute.autovec_copy(vector(gate_up.iterator, source), gate[None, i])
                    cute.autovec_copy(vector(gate_up.iterator, source + self.I), up[None, i])
        h = cute.make_rmem_tensor((8,), BF16)
        for i in cutlass.range_constexpr(VECTORS):
            if target[i] >= 0:
                for c in cutlass.range_constexpr(8):
                    a = activate_gate(F32(gate[c, i]), self.activation)
                    h[c] = BF16(a * transform_up(F32(up[c, i]), self.activation))
                cute.autovec_copy(h, vector(out.iterator, target[i]))


class SumPairs:
    """pairs [T, k, H] bf16, routing weights already in; topk_ids [T, k] int32; expert_map as above; out [T, H] bf16,
    zero for a token without a pair. H must be a multiple of 8. One thread: 8 columns of a token."""

    def __init__(self, hidden_size: int, top_k: int):
        self.H, self.top_k = hidden_size, top_k

    @cute.jit
    def __call__(
        self,
        pairs: cute.Tensor,
        topk_ids: cute.Tensor,
        expert_map: cute.Tensor,
        out: cute.Tensor,
        stream: cuda.CUstream,
    ):
        vectors = cute.size(topk_ids, mode=[0]) * (self.H // 8)
        self.kernel(pairs, topk_ids, expert_map, out).launch(
            grid=((vectors + (THREADS - 1)) // THREADS, 1, 1), block=(THREADS, 1, 1), stream=stream
        )

    @cute.kernel
    def kernel(self, pairs: cute.Tensor, topk_ids: cute.Tensor, expert_map: cute.Tensor, out: cute.Tensor):
        thread, _, _ = cute.arch.thread_idx()
        cta, _, _ = cute.arch.block_idx()
        columns = self.H // 8
        index = cta * THREADS + thread
        if index < cute.size(topk_ids, mode=[0]) * columns:
            token = I32(U32(index) // columns)
            column = (index - token * columns) * 8
            values = cute.make_rmem_tensor((8, self.top_k), BF16)
            values.fill(0.0)
            for j in cutlass.range_constexpr(self.top_k):
                if local_expert(topk_ids[token, j], expert_map) >= 0:
                    row = (I64(token) * self.top_k + j) * self.H + column
                    cute.autovec_copy(vector(pairs.iterator, row), values[None, j])
            rounded = cute.make_rmem_tensor((8,), BF16)
            for c in cutlass.range_constexpr(8):
                total = F32(0.0)
                for j in cutlass.range_constexpr(self.top_k):
                    total += F32(values[c, j])
                rounded[c] = BF16(total)
            cute.autovec_copy(rounded, vector(out.iterator, I64(token) * self.H + column))
