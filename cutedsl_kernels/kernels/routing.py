"""Routing inside a kernel: from topk_ids to blocks of up to ``token_block`` pairs of one expert.

Every CTA reads all T*k pairs (T*k <= max_pairs), drops the ones that no one computes here (remote or out-of-range
expert, routing weight below the pair threshold), counts the rest by expert in shared memory, and numbers the token
blocks of all experts in order of expert id (up to 32 pairs: in order of each expert's first pair, in one warp's
registers). All CTAs number alike, so which CTA works on which block follows from that alone, and the grid depends on
nothing but its size. Ballots find the pairs of a block, in the order of topk_ids.
"""

from __future__ import annotations

import cutlass
import cutlass.cute as cute

from ..configs import max_blocks
from .compaction import inclusive_sum, rank_in_group, same_in_warp
from .primitives import I32, U32, vector

LANE_PAIRS = 4  # pairs that one lane looks at at a time


@cute.jit
def local_expert(expert, expert_map):
    """The expert of this rank that a global id stands for, or -1; without a map (None) the id itself, whatever it is.

    No branch around the look-up, so that several can be under way at once: the map has at least one entry.
    """
    local = I32(expert)
    if cutlass.const_expr(expert_map is not None):
        last = cute.size(expert_map) - 1
        found = I32(expert_map[cutlass.max(cutlass.min(expert, last), I32(0))])
        local = found if expert >= 0 and expert <= last else I32(-1)
    return local


class PairTable:
    """Shared-memory view of the batch's pairs. Constructed inside the kernel; all methods are called by whole warps.

    pair_expert [max_pairs] int16: local expert of pair p = token * k + slot, -1 if dropped or past the end.
    first_block [E + 1] int32: number of the first block of each expert that has pairs, and the number of blocks in all.
    block_expert [max_blocks] int16: expert of each block.
    """

    def __init__(self, num_experts: int, top_k: int, max_pairs: int, token_block: int, has_expert_map: bool):
        self.num_experts, self.top_k, self.token_block = num_experts, top_k, token_block
        self.max_pairs, self.has_expert_map = max_pairs, has_expert_map

    def allocate(self, smem):
        """(pair_expert, first_block, block_expert) in shared memory."""
        pair_expert = smem.allocate_tensor(cutlass.Int16, cute.make_layout((self.max_pairs,)), 16)
        first_block = smem.allocate_tensor(I32, cute.make_layout((self.num_experts + 1,)), 16)
        blocks = cute.make_layout((max_blocks(self.max_pairs, self.num_experts),))
        return pair_expert, first_block, smem.allocate_tensor(cutlass.Int16, blocks, 16)

    @cute.jit
    def build(
        self,
        topk_ids: cute.Tensor,
        topk_weights: cute.Tensor,
        expert_map: cute.Tensor,
        pair_threshold: cutlass.Float32,
        pair_expert: cute.Tensor,
        first_block: cute.Tensor,
        block_expert: cute.Tensor,
        thread: cutlass.Int32,
        num_threads: cutlass.Constexpr,
    ):
        """Fills the table. Called by all threads of the CTA; ends with a CTA barrier.

        Nothing before this call may read what an earlier launch wrote: it waits for that launch (dependent launch).
        """
        if cute.size(topk_ids) <= 32:
            self.build_in_warp(
                topk_ids, topk_weights, expert_map, pair_threshold, pair_expert, first_block, block_expert, thread
            )
        else:
            num_pairs = cute.size(topk_ids)
            for e in cutlass.range(thread, self.num_experts + 1, num_threads, unroll=1):
                first_block[e] = 0
            looked_at = (U32(num_pairs) + (32 * LANE_PAIRS - 1)) // (32 * LANE_PAIRS) * (32 * LANE_PAIRS)
            for p in cutlass.range(num_pairs + thread, I32(looked_at), num_threads, unroll=1):
                pair_expert[p] = cutlass.Int16(-1)
            cute.arch.sync_threads()
            cute.arch.griddepcontrol_wait()  # what the launch before this one wrote is visible from here on
            for p in cutlass.range(thread, num_pairs, num_threads, unroll=1):
                expert = self.expert_of_pair(p, topk_ids, topk_weights, expert_map, pair_threshold)
                pair_expert[p] = cutlass.Int16(expert)
                if expert >= 0:
                    cute.arch.atomic_add(first_block.iterator + expert, I32(1), sem="relaxed", scope="cta")
            cute.arch.sync_threads()
            if thread < 32:
                self.number_blocks(first_block, block_expert, thread)
        cute.arch.sync_threads()

    @cute.jit
    def expert_of_pair(self, pair, topk_ids, topk_weights, expert_map, pair_threshold):
        """The local expert that computes a pair, or -1."""
        num_pairs = cute.size(topk_ids)
        expert = cute.make_tensor(topk_ids.iterator, cute.make_layout((num_pairs,)))[pair]
        expert = local_expert(expert, expert_map if self.has_expert_map else None)
        weight = cute.make_tensor(topk_weights.iterator, cute.make_layout((num_pairs,)))[pair]
        valid = expert >= 0 and expert < self.num_experts and not (weight < pair_threshold)
        return expert if valid else I32(-1)

    @cute.jit
    def build_in_warp(
        self, topk_ids, topk_weights, expert_map, pair_threshold, pair_expert, first_block, block_expert, thread
    ):
        """build for at most 32 pairs, one a lane of the first warp. Experts are numbered in the order of their first
        pair, and ``first_block`` is filled only for those that have one."""
        if thread < 32 * LANE_PAIRS:  # as many as pairs_of_block looks at
            pair_expert[thread] = cutlass.Int16(-1)
        cute.arch.griddepcontrol_wait()
        if thread < 32:
            cute.arch.sync_warp()
            expert = I32(-1)
            if thread < cute.size(topk_ids):
                expert = self.expert_of_pair(thread, topk_ids, topk_weights, expert_map, pair_threshold)
                pair_expert[thread] = cutlass.Int16(expert)
            same = same_in_warp(expert)
            leads = expert >= 0 and (same & cute.arch.lanemask_lt()) == 0
            blocks = self.blocks_of(cute.arch.popc(same)) if leads else I32(0)
            through = inclusive_sum(blocks, thread)
            if leads:
                first = through - blocks
                first_block[expert] = first
                for i in cutlass.range(blocks, unroll=1):
                    block_expert[first + i] = cutlass.Int16(expert)
            if thread == 31:
                first_block[self.num_experts] = through

    @cute.jit
    def number_blocks(self, first_block: cute.Tensor, block_expert: cute.Tensor, lane: cutlass.Int32):
        """One warp turns pair counts by expert into block numbers: an exclusive prefix sum of ceil(count / block)."""
        chunk = (self.num_experts + 31) // 32
        blocks = cute.make_rmem_tensor((chunk,), I32)
        mine = I32(0)
        for i in cutlass.range_constexpr(chunk):
            e = lane * chunk + i
            blocks[i] = I32(0)
            if e < self.num_experts:
                blocks[i] = self.blocks_of(first_block[e])
            mine += blocks[i]
        total = inclusive_sum(mine, lane)
        running = total - mine
        for i in cutlass.range_constexpr(chunk):
            e = lane * chunk + i
            if e < self.num_experts:
                first_block[e] = running
                for _ in cutlass.range(blocks[i], unroll=1):
                    block_expert[running] = cutlass.Int16(e)
                    running += 1
        if lane == 31:
            first_block[self.num_experts] = total

    def blocks_of(self, pairs):
        """ceil(pairs / token_block); unsigned, since a signed division costs nine instructions."""
        return I32((U32(pairs) + (self.token_block - 1)) // self.token_block)

    @cute.jit
    def pairs_of_block(
        self,
        expert: cutlass.Int32,
        rank: cutlass.Int32,
        num_pairs: cutlass.Int32,
        topk_weights: cute.Tensor,
        pair_expert: cute.Tensor,
        tokens: cute.Tensor,
        weights: cute.Tensor,
        lane: cutlass.Int32,
        with_weights: cutlass.Constexpr,
    ) -> cutlass.Int32:
        """Pairs number rank .. rank + token_block - 1 of an expert, in order of topk_ids.

        Writes their tokens and, if asked, routing weights to ``tokens`` and ``weights`` [token_block] (shared memory of
        this warp alone) and returns how many there are.
        """
        routing = cute.make_tensor(topk_weights.iterator, cute.make_layout((num_pairs,)))
        cute.arch.sync_warp()
        found = I32(0)
        for i in cutlass.range(cute.ceil_div(num_pairs, 32 * LANE_PAIRS), unroll=1):
            first = i * (32 * LANE_PAIRS) + lane * LANE_PAIRS
            experts = cute.make_rmem_tensor((LANE_PAIRS,), cutlass.Int16)
            cute.autovec_copy(vector(pair_expert.iterator, first, LANE_PAIRS, LANE_PAIRS), experts)
            hits = cute.make_rmem_tensor((LANE_PAIRS,), cutlass.Boolean)
            for j in cutlass.range_constexpr(LANE_PAIRS):
                hits[j] = I32(experts[j]) == expert
            before, in_warp = rank_in_group(hits, LANE_PAIRS)
            position = found + before - rank
            for j in cutlass.range_constexpr(LANE_PAIRS):
                if hits[j]:
                    if position >= 0 and position < self.token_block:
                        tokens[position] = I32(U32(first + j) // self.top_k)
                        if cutlass.const_expr(with_weights):
                            weights[position] = routing[first + j]
                    position += 1
            found += in_warp
        cute.arch.sync_warp()
        return cutlass.min(found - rank, I32(self.token_block))

    @cute.jit
    def pairs_of_token(self, token: cutlass.Int32, pair_expert: cute.Tensor) -> cutlass.Int32:
        """How many pairs of a token are computed here."""
        count = I32(0)
        for j in cutlass.range_constexpr(self.top_k):
            count += I32(1) if I32(pair_expert[token * self.top_k + j]) >= 0 else I32(0)
        return count
