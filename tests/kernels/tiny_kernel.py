"""A kernel of ten lines for the tests of the compile layer; kernels must live in a file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute

from cutedsl_kernels.compile import KernelSpec
from cutedsl_kernels.compile.specs import SIGNATURES, Fakes

FACTORY = "kernels.tiny_kernel:Scale"


class Scale:
    """out [T, H] = x [T, H] * factor, bf16; grid of num_ctas."""

    def __init__(self, *, hidden_size: int, warps: int):
        if warps > 32:  # the DSL and its assembler (4.8.1) let this pass
            raise ValueError(f"a CTA has at most 32 warps, got {warps}")
        self.hidden_size, self.threads = hidden_size, 32 * warps

    @cute.jit
    def __call__(
        self, x: cute.Tensor, out: cute.Tensor, factor: cutlass.Float32, num_ctas: cutlass.Int32, stream: cuda.CUstream
    ):
        self.kernel(x, out, factor).launch(grid=(num_ctas, 1, 1), block=(self.threads, 1, 1), stream=stream)

    @cute.kernel
    def kernel(self, x: cute.Tensor, out: cute.Tensor, factor: cutlass.Float32):
        thread, _, _ = cute.arch.thread_idx()
        cta, _, _ = cute.arch.block_idx()
        ctas, _, _ = cute.arch.grid_dim()
        for token in cutlass.range(cta, cute.size(x, mode=[0]), ctas, unroll=1):
            for column in cutlass.range(thread, self.hidden_size, self.threads, unroll=1):
                out[token, column] = cutlass.BFloat16(x[token, column].to(cutlass.Float32) * factor)


def _arguments(fakes: Fakes, spec: Mapping[str, Any]) -> list[Any]:
    tokens, hidden = fakes.symbol("T"), spec["hidden_size"]
    tensors = [fakes.tensor(fakes.bf16, tokens, hidden), fakes.tensor(fakes.bf16, tokens, hidden)]
    return [*tensors, fakes.f32(0.0), fakes.i32(1)]


SIGNATURES[FACTORY] = _arguments


def tiny_spec(hidden_size: int = 64, warps: int = 1) -> KernelSpec:
    return KernelSpec.of(FACTORY, hidden_size=hidden_size, warps=warps)
