"""How fast an sm_90 GPU reads rows of weights through a ring of bulk copies, with nothing computed on them.

    python tools/gpu_read_bandwidth.py                      a table: orders of rows, rings, L2 policies
    python tools/gpu_read_bandwidth.py --rows 8x2 16x4      these rings only (rows of a stage x stages)

What the fused kernel reads is gate rows in the order they lie in and single rows in between; what it reaches is told as
a share of a copy, and this tells how much of a copy reading alone can be. Each CTA (one an SM) takes an equal share of
a list of rows; one warp copies, one reads a word of every row and frees the stage. Prints GB/s and their share of a
device-to-device copy (bytes read plus written). Run in the repository's root; needs torch with CUDA and the CuTe DSL.
"""

from __future__ import annotations

import argparse
import itertools
import pathlib
import sys
from typing import Any

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
import torch

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from cutedsl_kernels.kernels.primitives import BF16, I32, I64, SmemAllocator

PAD = 8  # elements between two rows in shared memory, as in the kernels
POLICIES = ("none", "evict_first", "evict_unchanged")
ORDERS = ("in order", "in turn", "tiles of 16", "single rows")  # "in turn": neighbouring rows by neighbouring CTAs
CALLS, REPLAYS = 8, 12


class ReadRows:
    """One compiled instance: rows of ``hidden_size`` bf16, a ring of ``stages`` x ``stage_rows`` of them."""

    def __init__(self, hidden_size: int, stage_rows: int, stages: int, policy: str):
        self.H, self.stage_rows, self.stages, self.policy = hidden_size, stage_rows, stages, policy

    @cute.jit
    def __call__(
        self, weights: cute.Tensor, order: cute.Tensor, out: cute.Tensor, num_ctas: cutlass.Int32, stream: cuda.CUstream
    ):
        """weights [R, H] bf16; order [N] int32, rows to read; out [num_ctas, 32] int32, the sum of the words read."""
        self.kernel(weights, order, out).launch(grid=(num_ctas, 1, 1), block=(64, 1, 1), stream=stream)

    @cute.kernel
    def kernel(self, weights: cute.Tensor, order: cute.Tensor, out: cute.Tensor):
        thread, _, _ = cute.arch.thread_idx()
        cta, _, _ = cute.arch.block_idx()
        num_ctas, _, _ = cute.arch.grid_dim()
        lane, warp = thread % 32, cute.arch.make_warp_uniform(thread // 32)
        smem = SmemAllocator()
        pitch = self.H + PAD
        ring = smem.allocate_tensor(BF16, cute.make_layout((self.stages * self.stage_rows * pitch,)), 128)
        barriers = smem.allocate_tensor(I64, cute.make_layout((2 * self.stages,)), 16).iterator
        full, empty = barriers, barriers + self.stages
        if thread == 0:
            for s in cutlass.range_constexpr(self.stages):
                cute.arch.mbarrier_init(full + s, 1)
                cute.arch.mbarrier_init(empty + s, 1)
            cute.arch.mbarrier_init_fence()
        cute.arch.sync_threads()
        rows = cute.size(order)
        first, end = I32(I64(rows) * cta // num_ctas), I32(I64(rows) * (cta + 1) // num_ctas)
        total, stage, phase = I32(0), I32(0), I32(0)
        words = cute.make_tensor(cute.recast_ptr(ring.iterator, dtype=I32), cute.make_layout((cute.size(ring) // 2,)))
        row = I32(order[cutlass.min(first + lane, rows - 1)])
        for start in cutlass.range(first, end, self.stage_rows, unroll=1):
            count = cutlass.min(I32(self.stage_rows), end - start)
            place = stage * self.stage_rows + lane
            if warp == 0:
                cute.arch.mbarrier_wait(empty + stage, phase ^ 1)
                if lane == 0:
                    cute.arch.mbarrier_arrive_and_expect_tx(full + stage, count * (2 * self.H))
                cute.arch.sync_warp()
                if lane < count:
                    self.copy(weights.iterator + I64(row) * self.H, ring.iterator + place * pitch, full + stage)
                row = I32(order[cutlass.min(start + self.stage_rows + lane, rows - 1)])  # there when a stage is free
            else:
                cute.arch.mbarrier_wait(full + stage, phase)
                if lane < count:
                    total += words[place * (pitch // 2)]
                cute.arch.fence_proxy("async.shared", space="cta")  # behind the loads, before the next copy
                cute.arch.sync_warp()
                if lane == 0:
                    cute.arch.mbarrier_arrive(empty + stage)
            stage += 1
            if stage == self.stages:
                stage, phase = I32(0), phase ^ 1
        if warp == 1:
            out[cta, lane] = total

    @cute.jit
    def copy(self, source, target, barrier):
        """One row by cp.async.bulk, under the L2 policy."""
        copy = "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes"
        arguments = [target.toint(), source.toint(), I32(2 * self.H), barrier.toint()]
        if cutlass.const_expr(self.policy == "none"):
            cute.arch.inline_ptx(f"{copy} [{{$r0}}], [{{$r1}}], {{$r2}}, [{{$r3}}];", read_only_args=arguments)
        else:
            make = f"createpolicy.fractional.L2::{self.policy}.b64 p, 1.0;"
            hinted = f"{copy}.L2::cache_hint [{{$r0}}], [{{$r1}}], {{$r2}}, [{{$r3}}], p;"
            cute.arch.inline_ptx(f"{{ .reg .b64 p; {make} {hinted} }}", read_only_args=arguments)


def order_of(kind: str, rows: int, num_ctas: int, generator: torch.Generator) -> torch.Tensor:
    """``rows`` row numbers, each once."""
    if kind == "in turn":
        return torch.cat([torch.arange(cta, rows, num_ctas) for cta in range(num_ctas)]).int()
    group = {"in order": rows, "tiles of 16": 16, "single rows": 1}[kind]
    starts = torch.randperm(rows // group, generator=generator) * group
    return (starts[:, None] + torch.arange(group)).flatten().int()


def compile_reader(reader: ReadRows, weights: torch.Tensor, order: torch.Tensor, out: torch.Tensor) -> Any:
    """A function of (weights, order, out) that launches on torch's current stream."""
    from cutlass.cute.runtime import from_dlpack

    def stream() -> cuda.CUstream:
        return cuda.CUstream(torch.cuda.current_stream().cuda_stream)

    ctas = I32(out.shape[0])
    function = cute.compile(reader, from_dlpack(weights), from_dlpack(order), from_dlpack(out), ctas, stream())
    return lambda *tensors: function(*map(from_dlpack, tensors), ctas, stream())


def main() -> None:
    from bench.timing import copy_bandwidth, prepare

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--rows", nargs="+", default=["8x2", "8x4", "8x6", "16x2", "16x3", "4x8"])
    parser.add_argument("--policies", nargs="+", choices=POLICIES, default=list(POLICIES))
    parser.add_argument("--megabytes", type=int, default=1024, help="read by one launch (default 1024)")
    options = parser.parse_args()
    rows = options.megabytes * 2**20 // (2 * options.hidden) // 16 * 16
    generator = torch.Generator().manual_seed(0)
    weights = torch.randint(-1000, 1000, (CALLS, rows, options.hidden // 2), dtype=torch.int32, device="cuda")
    calls = weights.view(torch.bfloat16)
    copy = copy_bandwidth("cuda")
    print(f"{torch.cuda.get_device_name()}, copy {copy:.0f} GB/s, {options.megabytes} MB a launch", flush=True)
    num_ctas = torch.cuda.get_device_properties(0).multi_processor_count
    orders = {kind: order_of(kind, rows, num_ctas, generator).cuda() for kind in ORDERS}
    outs = [torch.empty(num_ctas, 32, dtype=torch.int32, device="cuda") for _ in range(CALLS)]
    for ring, policy in itertools.product(options.rows, options.policies):
        stage_rows, stages = map(int, ring.split("x"))
        reader = ReadRows(options.hidden, stage_rows, stages, policy)
        read = compile_reader(reader, calls[0], orders[ORDERS[0]], outs[0])
        for kind, order in orders.items():

            def run(number: int, order: torch.Tensor = order, read: Any = read) -> torch.Tensor:
                read(calls[number], order, outs[number])
                return outs[number]

            prepared = prepare([lambda number=number, run=run: run(number) for number in range(CALLS)], "cuda")
            prepared.run()
            for number, out in enumerate(outs):
                assert out.sum(dtype=torch.int64) == weights[number, :, 0].sum(dtype=torch.int64), (kind, ring, policy)
            gbps = rows * 2 * options.hidden / prepared.measure(REPLAYS).median_us / 1e3
            print(
                f"ring {ring:5} policy {policy:16} {kind:12} {gbps:6.0f} GB/s  {gbps / copy:.1%} of a copy", flush=True
            )


if __name__ == "__main__":
    main()
