"""How long a plan should take: bytes that must move, over what the memory delivers, plus what a launch costs.

Used where no tuned table covers a shape, and by the tuner to rank its search space. Masks and routing are taken as
independent and uniform; skipped pairs (pair_skip, a share of all pairs) cost nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from .configs import TOKEN_BLOCK, FusedConfig, Plan, StagedConfig
from .shapes import MoEShape

BYTES_PER_WEIGHT = 2  # bf16


@dataclass(frozen=True)
class DensePath:
    """A dense implementation: microseconds besides the transfer, share of the copy bandwidth, TFLOP/s it reaches.

    overlap: reading and computing overlap only in part; their times are added to this power, and the root taken. With
    infinity the longer one counts.
    """

    fixed_us: float
    copy_share: float
    tflops: float
    overlap: float

    def estimate_us(self, moved_us: float, computed_us: float) -> float:
        """Microseconds of a layer whose weights take ``moved_us`` to read and whose products ``computed_us``."""
        return self.fixed_us + overlapping_us(moved_us, computed_us, self.overlap)


def overlapping_us(moved_us: float, computed_us: float, overlap: float) -> float:
    """Time of reading and computing that overlap in part, as DensePath.overlap says."""
    longer, shorter = max(moved_us, computed_us), min(moved_us, computed_us)
    ratio = shorter / longer if longer else 0.0
    return longer * (1 + ratio**overlap) ** (1 / overlap)


# Fitted to an H200, bench/results: qwen3.5-35b-a3b, T = 1 to 16384.
# vLLM's Triton kernel under the block sizes of integration/vllm/dense.py: the dense path inside vLLM.
VLLM_DENSE = DensePath(12.0, 1.0, 330.0, 1.7)
# torch.nn.functional.grouped_mm with sorting and scattering: standalone
TORCH_DENSE = DensePath(170.0, 0.66, 115.0, math.inf)


@dataclass(frozen=True)
class Gpu:
    """What the model needs to know of a GPU. ``name``: as the driver gives it. ``copy_gbps``: a device-to-device copy,
    bytes read plus bytes written, GB/s. ``dense_tflops``: bf16, reached by a grouped GEMM on MoE shapes."""

    name: str = "NVIDIA H200"
    num_sms: int = 132
    copy_gbps: float = 4200.0
    dense_tflops: float = 320.0
    driver: str = ""
    dense: DensePath = VLLM_DENSE


@dataclass(frozen=True)
class LayerBytes:
    """Expected weight traffic of one layer, bytes, every row counted once however many tokens share it."""

    gate: float
    up_down: float
    tokens: float

    @property
    def total(self) -> float:
        return self.gate + self.up_down + self.tokens


def layer_bytes(shape: MoEShape, num_tokens: int, sparsity: float, pair_skip: float = 0.0) -> LayerBytes:
    """Bytes the sparse layer moves. sparsity: share of inactive neurons over all pairs, skipped pairs included."""
    share = shape.top_k / shape.num_experts
    row = shape.hidden_size * BYTES_PER_WEIGHT
    neurons = shape.num_experts * shape.intermediate_size
    gate = neurons * (1 - (1 - share * (1 - pair_skip)) ** num_tokens)
    active = neurons * (1 - (1 - share * (1 - sparsity)) ** num_tokens)
    return LayerBytes(gate * row, 2 * active * row, 2.0 * num_tokens * row)


def dense_bytes(shape: MoEShape, num_tokens: int, pair_skip: float = 0.0) -> LayerBytes:
    """The same for a dense layer without the skipped pairs: sparsity counts them, and nothing else."""
    return layer_bytes(shape, num_tokens, pair_skip, pair_skip)


def layer_flops(shape: MoEShape, num_tokens: int, inactive: float) -> float:
    """Floating-point operations of the dense layer with a share ``inactive`` of its pairs skipped."""
    return 6.0 * num_tokens * shape.top_k * (1 - inactive) * shape.hidden_size * shape.intermediate_size


# Measured on an H200, 2026-11-28 (E=256, H=2048, I=512, 84.5 %): 11.6 us at T=1, 45.4 at 8, 125 at 32, 188 at 64;
# kernels of 2026-11-23 took 5 and 13 % more at T=32 with 24 and 16 rows in the row ring instead of 32.
FUSED_FIXED_US = 5.5  # launch, routing scan, first and last latencies
FUSED_BLOCK_US = 1.5  # a CTA's way from one block of tokens to the next: additions, counter, x
FUSED_COPY_SHARE = 1.17  # share of the copy with rings of any size
FUSED_MOST = 1.02  # and at most
FUSED_TILE_SHARE = 0.2  # of the time a tile's gate rows take, nothing overlaps: tiles of 32 instead of 16, whose rows
# take 2.1 us longer, cost 0.4 us at T=1, 0.8 at 8 (docs/kernels-fused.md)
# Without keep_sums (E=256, H=3072, I=1024, 87.4 %, 1 to 256 tokens, H200, 2026-11-29) every chunk's sums are added to
# memory, at this share of the copy bandwidth and beside nothing else.
FUSED_ADDED_SHARE = 0.7
FUSED_ADDING_US = 3.0  # and besides
# Fitted to the best staged plan of each token block in the tuned tables of four shapes, H200, 2026-11-29. Of 79 rows of
# bench/results that the fit had not seen (50 to 90 %, both rules, 4 to 512 tokens) all are within 3 %.
STAGED_FIXED_US = {0: 11.0, 1: 10.0, 2: 4.0}  # by overlap: five launches
STAGED_RAMP_US = 18.0  # and what they wait for one another where a kernel has few CTAs
STAGED_COPY_SHARES = {16: 1.08, 32: 1.04, 64: 0.9}  # by token block; more than a copy, which the ramp takes back
STAGED_TFLOPS_SHARE = 1.07  # of dense_tflops: gathered rows, short N
STAGED_OVERLAP = 1.65  # of reading and computing, as in DensePath
STAGED_REREAD = 0.37  # of the time of its rows that a further block of an expert's tokens takes, mostly from L2
IN_FLIGHT_BYTES = 45 * 1024  # per SM; less than this in flight does not cover the DRAM latency


def estimate_us(
    plan: Plan, shape: MoEShape, num_tokens: int, sparsity: float, gpu: Gpu, pair_skip: float = 0.0
) -> float:
    """Expected microseconds of one layer under ``plan``; float('inf') for a CPU plan."""
    if plan.kind == "dense":
        moved = dense_bytes(shape, num_tokens, pair_skip).total / (gpu.copy_gbps * 1e3 * gpu.dense.copy_share)
        computed = layer_flops(shape, num_tokens, pair_skip) / (gpu.dense.tflops * 1e6)
        return gpu.dense.estimate_us(moved, computed)
    if isinstance(plan.config, FusedConfig):
        return _fused_us(plan.config, shape, num_tokens, sparsity, gpu, pair_skip)
    if isinstance(plan.config, StagedConfig):
        return _staged_us(plan.config, shape, num_tokens, sparsity, gpu, pair_skip)
    return float("inf")


def blocks_per_expert(mean_tokens: float, token_block: int) -> float:
    """Expected blocks of ``token_block`` tokens of an expert that has any, its tokens being Poisson distributed."""
    if mean_tokens <= 0:
        return 1.0
    if mean_tokens > 8 * token_block:
        return mean_tokens / token_block + 0.5
    expected, chance = 0.0, math.exp(-mean_tokens)
    some = 1.0 - chance
    for tokens in range(1, 12 * token_block):
        chance *= mean_tokens / tokens
        expected += chance * -(-tokens // token_block)
    return max(1.0, expected / some)


def _inactive(sparsity: float, pair_skip: float) -> float:
    """Share of inactive neurons of the pairs that are computed."""
    return max(0.0, 1 - (1 - sparsity) / (1 - pair_skip)) if pair_skip < 1 else 1.0


def _fused_us(
    config: FusedConfig, shape: MoEShape, num_tokens: int, sparsity: float, gpu: Gpu, pair_skip: float
) -> float:
    share = shape.top_k * (1 - pair_skip) / shape.num_experts
    experts = shape.num_experts * (1 - (1 - share) ** num_tokens)
    items = experts * -(-shape.intermediate_size // config.tile_neurons)
    waves = items / gpu.num_sms
    # One token's experts are distinct, so the items are known; else their number varies, and half a wave is lost.
    busy = -(-items // gpu.num_sms) if num_tokens == 1 else max(1.0, waves + 0.5)
    balance = min(1.0, waves / busy) if waves > 0 else 1.0
    row = 2 * shape.hidden_size / IN_FLIGHT_BYTES
    gate_ring, row_ring = row * config.stage_rows * config.gate_stages, row * config.chunk_rows * config.row_stages
    covered = gate_ring / (gate_ring + 0.03) * row_ring / (row_ring + 0.35)  # of the latencies; fitted, see above
    moved = layer_bytes(shape, num_tokens, sparsity, pair_skip)
    blocks = blocks_per_expert(num_tokens * share, TOKEN_BLOCK)  # every further block of tokens reads the rows again
    seconds_us = (moved.gate + moved.up_down) * blocks + moved.tokens
    # Barriers and list: what a work item costs beside its bytes; tiles of 8 as measured, docs/kernels-fused.md.
    per_item_us = 0.05 if config.tile_neurons > 8 else 0.15
    transfer = seconds_us / (gpu.copy_gbps * 1e3 * min(FUSED_MOST, FUSED_COPY_SHARE * covered) * balance)
    first_tile_us = gpu.num_sms * config.tile_neurons * 2 * shape.hidden_size / (gpu.copy_gbps * 1e3)
    per_cta_us = per_item_us * max(1.0, waves) + FUSED_BLOCK_US * experts * blocks / gpu.num_sms
    adding_us = 0.0
    if not config.keep_sums:
        pairs, inactive = num_tokens * share * shape.num_experts, _inactive(sparsity, pair_skip)
        added = _added_bytes(config, shape, experts * blocks, pairs, inactive)
        adding_us = FUSED_ADDING_US + added / (gpu.copy_gbps * 1e3 * FUSED_ADDED_SHARE)
    return FUSED_FIXED_US + transfer + per_cta_us + FUSED_TILE_SHARE * first_tile_us + adding_us


def _added_bytes(config: FusedConfig, shape: MoEShape, blocks: float, pairs: float, inactive: float) -> float:
    """Bytes of fp32 sums that go to memory where each chunk's do. inactive: share of the computed pairs' neurons."""
    if not blocks:
        return 0.0
    tile, chunk, tokens = config.tile_neurons, config.chunk_rows, pairs / blocks
    idle = inactive**tokens  # neurons that no token of a block wants
    # A tile's last chunk is half full in the mean, where it has one.
    chunks = tile * (1 - idle) / chunk + (chunk - 1) / (2 * chunk) * (1 - idle**tile)
    return blocks * -(-shape.intermediate_size // tile) * chunks * tokens * shape.hidden_size * 4


def _staged_us(
    config: StagedConfig, shape: MoEShape, num_tokens: int, sparsity: float, gpu: Gpu, pair_skip: float
) -> float:
    share = shape.top_k * (1 - pair_skip) / shape.num_experts
    experts = shape.num_experts * (1 - (1 - share) ** num_tokens)
    per_expert = num_tokens * share * shape.num_experts / experts if experts else 0.0
    in_block = min(per_expert, config.token_block)
    blocks = blocks_per_expert(num_tokens * share, config.token_block)
    union = 1 - _inactive(sparsity, pair_skip) ** in_block  # of a block's tokens, whose every product is computed
    moved = layer_bytes(shape, num_tokens, sparsity, pair_skip)
    weights = (moved.gate + moved.up_down) * (1 + STAGED_REREAD * (blocks - 1)) + moved.tokens
    flops = layer_flops(shape, num_tokens, pair_skip) * (1 + 2 * union) / 3 * max(1.0, 16 / max(in_block, 1.0))
    memory_us = weights / (gpu.copy_gbps * 1e3 * STAGED_COPY_SHARES[config.token_block])
    compute_us = flops / (gpu.dense_tflops * 1e6 * STAGED_TFLOPS_SHARE)
    ctas = experts * blocks * -(-shape.intermediate_size // 64)
    launches_us = STAGED_FIXED_US[config.overlap] + STAGED_RAMP_US * min(1.0, 4 * gpu.num_sms / max(1.0, ctas))
    return launches_us + overlapping_us(memory_us, compute_us, STAGED_OVERLAP)
