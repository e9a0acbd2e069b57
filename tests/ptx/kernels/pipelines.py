"""Warp-specialised row sums: chunks of a row go from producer warps to two consumer warps. Three ways to hand over:
cp.async with mbarriers (PipelineCpAsync), plain stores with named barriers, bulk copies with transaction counts."""

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32
from cutlass.cute.nvgpu import cpasync
from cutlass.pipeline import (
    Agent,
    CooperativeGroup,
    NamedBarrier,
    PipelineCpAsync,
    PipelineUserType,
    make_pipeline_state,
)

from .compat import SmemAllocator

STAGES, CHUNK = 3, 128


@cute.kernel
def _cp_async_kernel(x: cute.Tensor, y: cute.Tensor):
    tid, _, _ = cute.arch.thread_idx()
    row, _, _ = cute.arch.block_idx()
    warp, lane = cute.arch.make_warp_uniform(cute.arch.warp_idx()), cute.arch.lane_idx()
    smem = SmemAllocator()
    barriers = smem.allocate_array(cutlass.Int64, 2 * STAGES)
    tile = smem.allocate_tensor(Float32, cute.make_layout((CHUNK, STAGES)), 16)
    pipe = PipelineCpAsync.create(
        barrier_storage=barriers, num_stages=STAGES, producer_group=CooperativeGroup(Agent.Thread, 32),
        consumer_group=CooperativeGroup(Agent.Thread, 64),
    )  # fmt: skip
    chunks = x.shape[1] // CHUNK
    atom = cute.make_copy_atom(
        cpasync.CopyG2SOp(cache_mode=cute.nvgpu.LoadCacheMode.GLOBAL), Float32, num_bits_per_copy=128
    )
    four = cute.make_layout((4,))
    if warp == 0:
        state = make_pipeline_state(PipelineUserType.Producer, STAGES)
        for i in cutlass.range(chunks, unroll=1):
            pipe.producer_acquire(state)
            source = x.iterator + cute.assume(row * x.shape[1] + i * CHUNK + lane * 4, divby=4)
            target = tile.iterator + cute.assume(state.index * CHUNK + lane * 4, divby=4)
            cute.copy(atom, cute.make_tensor(source, four), cute.make_tensor(target, four))
            pipe.producer_commit(state)
            state.advance()
        pipe.producer_tail(state)
    if warp != 0:
        state = make_pipeline_state(PipelineUserType.Consumer, STAGES)
        s = Float32(0.0)
        for _ in cutlass.range(chunks, unroll=1):
            pipe.consumer_wait(state)
            s += tile[tid - 32, state.index] + tile[tid + 32, state.index]
            pipe.consumer_release(state)
            state.advance()
        y[row, tid - 32] = s


@cute.jit
def cp_async_pipeline(x: cute.Tensor, y: cute.Tensor, stream: cuda.CUstream):
    """y[r, j] = sum of x[r, j::64]; x has a multiple of 128 columns."""
    _cp_async_kernel(x, y).launch(grid=(x.shape[0], 1, 1), block=(96, 1, 1), stream=stream)


@cute.kernel
def _named_kernel(x: cute.Tensor, y: cute.Tensor):
    tid, _, _ = cute.arch.thread_idx()
    row, _, _ = cute.arch.block_idx()
    warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
    smem = SmemAllocator()
    tile = smem.allocate_tensor(Float32, cute.make_layout((64,)), 16)
    full, empty = NamedBarrier(1, 128), NamedBarrier(2, 128)
    chunks = x.shape[1] // 64
    if warp < 2:
        for i in cutlass.range(chunks, unroll=1):
            if i > 0:
                empty.arrive_and_wait()
            tile[tid] = x[row, i * 64 + tid]
            full.arrive()
    else:
        s = Float32(0.0)
        for i in cutlass.range(chunks, unroll=1):
            full.arrive_and_wait()
            s += tile[tid - 64]
            if i < chunks - 1:
                empty.arrive()
        y[row, tid - 64] = s


@cute.jit
def named_barriers(x: cute.Tensor, y: cute.Tensor, stream: cuda.CUstream):
    """y[r, j] = sum of x[r, j::64]; x has a multiple of 64 columns."""
    _named_kernel(x, y).launch(grid=(x.shape[0], 1, 1), block=(128, 1, 1), stream=stream)


@cute.kernel
def _bulk_kernel(x: cute.Tensor, y: cute.Tensor):
    tid, _, _ = cute.arch.thread_idx()
    row, _, _ = cute.arch.block_idx()
    warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
    smem = SmemAllocator()
    full = smem.allocate_array(cutlass.Int64, STAGES)
    tile = smem.allocate_tensor(Float32, cute.make_layout((CHUNK, STAGES)), 128)
    chunks = x.shape[1] // CHUNK
    if tid == 0:
        for s in cutlass.range_constexpr(STAGES):
            cute.arch.mbarrier_init(full + s, 1)
        cute.arch.mbarrier_init_fence()
    cute.arch.sync_threads()
    s = Float32(0.0)
    for i in cutlass.range(chunks, unroll=1):
        stage, phase = i % STAGES, (i // STAGES) % 2
        if tid == 0:
            cute.arch.mbarrier_arrive_and_expect_tx(full + stage, CHUNK * 4)
            source = x.iterator + (row * x.shape[1] + i * CHUNK)
            target = tile.iterator + stage * CHUNK
            # by hand: whether the copy atom elects a lane itself differs between releases of the DSL
            cute.arch.inline_ptx(
                "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [{$r0}], [{$r1}], {$r2}, [{$r3}];",
                read_only_args=[target.toint(), source.toint(), Int32(CHUNK * 4), (full + stage).toint()],
            )
        cute.arch.mbarrier_wait(full + stage, phase)
        if warp >= 1:
            s += tile[tid - 32, stage] + tile[tid + 32, stage]
        cute.arch.sync_threads()
    if warp >= 1:
        y[row, tid - 32] = s


@cute.jit
def bulk_copies(x: cute.Tensor, y: cute.Tensor, stream: cuda.CUstream):
    """y[r, j] = sum of x[r, j::64]; x has a multiple of 128 columns."""
    _bulk_kernel(x, y).launch(grid=(x.shape[0], 1, 1), block=(96, 1, 1), stream=stream)
