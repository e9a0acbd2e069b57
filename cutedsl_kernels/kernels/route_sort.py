"""route_sort: sorts the pairs of a batch by expert and cuts them into items, in one launch.

CTA 0 does the sorting. Its warps own consecutive segments of the pairs:

    1  each warp counts its pairs by expert (votes find the lanes with the same expert)          counts[warp, expert]
    2  each expert's counts become offsets of the warps, and its total                            T*k ints from L2
    3  one warp numbers positions and items of all experts, in order of expert id
    4  each warp walks its segment again and writes every pair to its position

so the pairs of one expert stay in the order of topk_ids. Remote and out-of-range experts and pairs below the pair
threshold get no position. The other CTAs meanwhile zero the fp32 sum (reduction by atomics) and scale the tokens
(routing weight on the input).
"""

from __future__ import annotations

import cutlass
import cutlass.cute as cute

from .compaction import inclusive_sum, same_in_warp
from .primitives import BF16, F32, I32, U32, SmemAllocator, vector
from .routing import local_expert
from .staged_common import StagedSpec

HELPER_CTAS = 64
WARPS = 16
BATCH = 8  # pairs of one lane that are in registers at once: 4096 pairs are read once


class RouteSort:
    """items [max_items, 4] (expert, first position, tokens, CTAs that are done with it), sorted_pairs [T*k], kept
    [T*k], all int32.

    kept: 0 for a dropped pair, else 1, or with biases the local expert + 1, which combine needs.

    max_items is at least min(T*k, E + T*k / token_block): more items there cannot be. Unused ones get 0 tokens.
    """

    def __init__(self, spec: StagedSpec):
        self.spec = spec
        self.threads = 32 * WARPS
        self.id_bits = spec.num_experts.bit_length()  # of a local expert, or num_experts for a pair without one
        self.helpers = HELPER_CTAS if spec.weight_on_input or not spec.deterministic else 0

    @cute.jit
    def launch(
        self,
        x,
        topk_ids,
        topk_weights,
        expert_map,
        pair_threshold,
        items,
        sorted_pairs,
        kept,
        scaled,
        total,
        stream,
    ):
        self.kernel(
            x, topk_ids, topk_weights, expert_map, pair_threshold, items, sorted_pairs, kept, scaled, total
        ).launch(
            grid=(1 + self.helpers, 1, 1),
            block=(self.threads, 1, 1),
            stream=stream,
            min_blocks_per_mp=1,  # else: 40 registers, and spills
            use_pdl=bool(self.spec.config.overlap),
        )

    @cute.kernel
    def kernel(
        self,
        x: cute.Tensor,
        topk_ids: cute.Tensor,
        topk_weights: cute.Tensor,
        expert_map: cute.Tensor,
        pair_threshold: cutlass.Float32,
        items: cute.Tensor,
        sorted_pairs: cute.Tensor,
        kept: cute.Tensor,
        scaled: cute.Tensor,
        total: cute.Tensor,
    ):
        thread, _, _ = cute.arch.thread_idx()
        cta, _, _ = cute.arch.block_idx()
        self.spec.begin()
        if cta == 0:
            self.sort(topk_ids, topk_weights, expert_map, pair_threshold, items, sorted_pairs, kept, thread)
        elif cutlass.const_expr(self.helpers > 0):
            worker = (cta - 1) * self.threads + thread
            if cutlass.const_expr(not self.spec.deterministic):
                self.zero(total, worker)
            if cutlass.const_expr(self.spec.weight_on_input):
                self.scale(x, topk_weights, scaled, worker)

    @cute.jit
    def experts_of(self, begin, step, steps, num_pairs, ids, routing, expert_map, pair_threshold, lane, out, same):
        """Local experts of this lane's pairs of the next BATCH steps; num_experts: dropped, or past the end. same: the
        lanes that have the same one in a step.

        All loads are issued before the first is used: a batch costs one latency of L2.
        """
        experts = self.spec.num_experts
        weights = cute.make_rmem_tensor((BATCH,), F32)
        for i in cutlass.range_constexpr(BATCH):
            pair = cutlass.min(begin + (step + i) * 32 + lane, num_pairs - 1)
            out[i] = I32(ids[pair])
            weights[i] = routing[pair]
        for i in cutlass.range_constexpr(BATCH):
            out[i] = local_expert(out[i], expert_map if self.spec.has_expert_map else None)
        for i in cutlass.range_constexpr(BATCH):
            inside = begin + (step + i) * 32 + lane < num_pairs and step + i < steps
            here = out[i] >= 0 and out[i] < experts and inside and not (weights[i] < pair_threshold)
            out[i] = out[i] if here else I32(experts)
        for i in cutlass.range_constexpr(BATCH):
            if step + i < steps:
                same[i] = same_in_warp(out[i], self.id_bits)

    @cute.jit
    def sort(self, topk_ids, topk_weights, expert_map, pair_threshold, items, sorted_pairs, kept, thread):
        experts, warps, threads = self.spec.num_experts, WARPS, self.threads
        lane, warp = thread % 32, cute.arch.make_warp_uniform(thread // 32)
        smem = SmemAllocator()
        counts = smem.allocate_tensor(I32, cute.make_layout((warps, experts), stride=(experts, 1)), 16)
        totals = smem.allocate_tensor(I32, cute.make_layout((experts,)), 16)
        first_item = smem.allocate_tensor(I32, cute.make_layout((experts + 1,)), 16)
        start = smem.allocate_tensor(I32, cute.make_layout((experts,)), 16)
        num_pairs = cute.size(topk_ids)
        ids = cute.make_tensor(topk_ids.iterator, cute.make_layout((num_pairs,)))
        routing = cute.make_tensor(topk_weights.iterator, cute.make_layout((num_pairs,)))
        steps = (num_pairs + (threads - 1)) // threads
        begin = warp * steps * 32
        local = cute.make_rmem_tensor((BATCH,), I32)  # experts of this lane's pairs
        same = cute.make_rmem_tensor((BATCH,), U32)  # lanes of the warp whose pair has the same expert
        for i in cutlass.range(thread, warps * experts, threads, unroll=1):
            counts[i // experts, i % experts] = 0
        cute.arch.sync_threads()
        below = U32(cute.arch.lanemask_lt())
        for step in cutlass.range(0, steps, BATCH, unroll=1):
            self.experts_of(begin, step, steps, num_pairs, ids, routing, expert_map, pair_threshold, lane, local, same)
            for i in cutlass.range_constexpr(BATCH):
                if step + i < steps:
                    pair = begin + (step + i) * 32 + lane
                    expert = local[i]
                    if pair < num_pairs:
                        here = expert + 1 if cutlass.const_expr(self.spec.has_bias) else I32(1)
                        kept[pair] = here if expert < experts else I32(0)
                    if expert < experts and (same[i] & below) == 0:
                        counts[warp, expert] = counts[warp, expert] + I32(cute.arch.popc(same[i]))
                    cute.arch.sync_warp()
        cute.arch.sync_threads()
        for expert in cutlass.range(thread, experts, threads, unroll=1):
            of_warp = cute.make_rmem_tensor((warps,), I32)
            for w in cutlass.range_constexpr(warps):  # all loads before the first store
                of_warp[w] = counts[w, expert]
            running = I32(0)
            for w in cutlass.range_constexpr(warps):
                counts[w, expert] = running
                running += of_warp[w]
            totals[expert] = running
        cute.arch.sync_threads()
        if thread < 32:
            self.number(totals, start, first_item, lane)
        cute.arch.sync_threads()
        for expert in cutlass.range(thread, experts, threads, unroll=1):
            self.write_items(expert, totals[expert], start[expert], first_item[expert], items)
        for item in cutlass.range(first_item[experts] + thread, cute.size(items, mode=[0]), threads, unroll=1):
            self.write_item(items, item, I32(0), I32(0), I32(0))
        for step in cutlass.range(0, steps, BATCH, unroll=1):
            if steps > BATCH:  # else the experts of the first walk are still here
                self.experts_of(
                    begin, step, steps, num_pairs, ids, routing, expert_map, pair_threshold, lane, local, same
                )
            for i in cutlass.range_constexpr(BATCH):
                if step + i < steps:
                    expert = local[i]
                    if expert < experts:
                        position = start[expert] + counts[warp, expert] + I32(cute.arch.popc(same[i] & below))
                        sorted_pairs[position] = begin + (step + i) * 32 + lane
                    cute.arch.sync_warp()
                    if expert < experts and (same[i] & below) == 0:
                        counts[warp, expert] = counts[warp, expert] + I32(cute.arch.popc(same[i]))
                    cute.arch.sync_warp()

    @cute.jit
    def number(self, totals, start, first_item, lane):
        """One warp: exclusive prefix sums over the experts of pairs and of items (token blocks)."""
        experts = self.spec.num_experts
        chunk = (experts + 31) // 32
        pairs, blocks = I32(0), I32(0)
        for i in cutlass.range_constexpr(chunk):
            expert = lane * chunk + i
            if expert < experts:
                count = totals[expert]
                pairs += count
                blocks += self.items_of(count)
        all_blocks = inclusive_sum(blocks, lane)
        if lane == 31:
            first_item[experts] = all_blocks
        pairs = inclusive_sum(pairs, lane) - pairs
        blocks = all_blocks - blocks
        for i in cutlass.range_constexpr(chunk):
            expert = lane * chunk + i
            if expert < experts:
                count = totals[expert]
                start[expert] = pairs
                first_item[expert] = blocks
                pairs += count
                blocks += self.items_of(count)

    @cute.jit
    def items_of(self, pairs: cutlass.Int32) -> cutlass.Int32:
        """Items that an expert's pairs make. Unsigned, so that the division is a shift."""
        block = self.spec.token_block
        return I32(U32(pairs + (block - 1)) // block)

    @cute.jit
    def write_items(self, expert, count, start, first, items):
        block = self.spec.token_block
        for b in cutlass.range(self.items_of(count), unroll=1):
            self.write_item(items, first + b, expert, start + b * block, cutlass.min(count - b * block, I32(block)))

    @cute.jit
    def write_item(self, items, item, expert, start, num_tokens):
        fields = cute.make_rmem_tensor((4,), I32)
        fields[0], fields[1], fields[2], fields[3] = expert, start, num_tokens, I32(0)
        if cutlass.const_expr(self.spec.by_item):
            fields[3] = I32(0) if num_tokens > 0 else I32(1 << 30)
        cute.autovec_copy(fields, vector(items.iterator, item * 4, 4, 4))

    @cute.jit
    def zero(self, total, worker):
        zero = cute.make_rmem_tensor((4,), F32)
        zero.fill(0.0)
        for i in cutlass.range(worker, cute.size(total) // 4, self.helpers * self.threads, unroll=1):
            cute.autovec_copy(zero, vector(total.iterator, i * 4, 4, 4))

    @cute.jit
    def scale(self, x, topk_weights, scaled, worker):
        """scaled[p, :] = x[p / k, :] * routing weight of pair p, rounded to bf16, for every pair."""
        vectors = self.spec.hidden_size // 8
        routing = cute.make_tensor(topk_weights.iterator, cute.make_layout((cute.size(topk_weights),)))
        value = cute.make_rmem_tensor((8,), BF16)
        for i in cutlass.range(worker, cute.size(topk_weights) * vectors, self.helpers * self.threads, unroll=1):
            pair, column = i // vectors, (i % vectors) * 8
            token = I32(U32(pair) // self.spec.top_k)
            cute.autovec_copy(vector(x.iterator, token * self.spec.hidden_size + column), value)
            weight = routing[pair]
            for j in cutlass.range_constexpr(8):
                value[j] = BF16(F32(value[j]) * weight)
            cute.autovec_copy(value, vector(scaled.iterator, pair * self.spec.hidden_size + column))
