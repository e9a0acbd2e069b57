"""Routing inside a kernel: from topk_ids to blocks of up to ``token_block`` pairs of one expert.

Every CTA reads all T*k pairs (T*k <= max_pairs), drops the ones that no one computes here (remote or out-of-range
expert, routing weight below the pair threshold), counts the rest by expert in shared memory, and numbers the token
blocks of all experts in order of expert id. Which CTA works on which block follows from that numbering alone, so the
grid depends on nothing but its size. The pairs of one block are found by ballots, in the order of topk_ids.
"""

from __future__ import annotations

import cutlass
import cutlass.cute as cute

from .compaction import lowest_lane, rank_in_warp
from .primitives import I32, U32


class PairTable:
    """Shared-memory view of the batch's pairs. Constructed inside the kernel; all methods are called by whole warps.

    pair_expert [max_pairs] int16: local expert of pair p = token * k + slot, -1 if dropped.
    first_block [E + 1] int32: number of the first block of each expert, and the number of blocks in all.
    """

    def __init__(self, num_experts: int, top_k: int, max_pairs: int, token_block: int, has_expert_map: bool):
        self.num_experts, self.top_k, self.token_block = num_experts, top_k, token_block
        self.max_pairs, self.has_expert_map = max_pairs, has_expert_map

    def allocate(self, smem):
        """(pair_expert, first_block) in shared memory."""
        pair_expert = smem.allocate_tensor(cutlass.Int16, cute.make_layout((self.max_pairs,)), 16)
        first_block = smem.allocate_tensor(I32, cute.make_layout((self.num_experts + 1,)), 16)
        return pair_expert, first_block

    @cute.jit
    def build(
        self,
        topk_ids: cute.Tensor,
        topk_weights: cute.Tensor,
        expert_map: cute.Tensor,
        pair_threshold: cutlass.Float32,
        pair_expert: cute.Tensor,
        first_block: cute.Tensor,
        thread: cutlass.Int32,
        num_threads: cutlass.Constexpr,
    ):
        """Fills the table. Called by all threads of the CTA; ends with a CTA barrier.

        Nothing before this call may read what an earlier launch wrote: it waits for that launch (dependent launch).
        """
        num_pairs = cute.size(topk_ids)
        for e in cutlass.range(thread, self.num_experts + 1, num_threads, unroll=1):
            first_block[e] = 0
        cute.arch.sync_threads()
        cute.arch.griddepcontrol_wait()  # what the launch before this one wrote is visible from here on
        ids = cute.make_tensor(topk_ids.iterator, cute.make_layout((num_pairs,)))
        routing = cute.make_tensor(topk_weights.iterator, cute.make_layout((num_pairs,)))
        for p in cutlass.range(thread, num_pairs, num_threads, unroll=1):
            expert = ids[p]
            weight = routing[p]
            if cutlass.const_expr(self.has_expert_map):
                local = I32(-1)
                if expert >= 0 and expert < cute.size(expert_map):
                    local = expert_map[expert]
                expert = local
            valid = expert >= 0 and expert < self.num_experts and not (weight < pair_threshold)
            pair_expert[p] = cutlass.Int16(expert) if valid else cutlass.Int16(-1)
            if valid:
                cute.arch.atomic_add(first_block.iterator + expert, I32(1), sem="relaxed", scope="cta")
        cute.arch.sync_threads()
        if thread < 32:
            self.number_blocks(first_block, thread)
        cute.arch.sync_threads()

    @cute.jit
    def number_blocks(self, first_block: cute.Tensor, lane: cutlass.Int32):
        """One warp turns pair counts by expert into block numbers: an exclusive prefix sum of ceil(count / block)."""
        chunk = (self.num_experts + 31) // 32
        mine = I32(0)
        for i in cutlass.range_constexpr(chunk):
            e = lane * chunk + i
            if e < self.num_experts:
                mine += self.blocks_of(first_block[e])
        total = mine
        for step in cutlass.range_constexpr(5):
            other = cute.arch.shuffle_sync_up(total, 1 << step, mask_and_clamp=0)
            total += other if lane >= (1 << step) else I32(0)
        running = total - mine
        for i in cutlass.range_constexpr(chunk):
            e = lane * chunk + i
            if e < self.num_experts:
                blocks = self.blocks_of(first_block[e])
                first_block[e] = running
                running += blocks
        if lane == 31:
            first_block[self.num_experts] = total

    def blocks_of(self, pairs):
        """ceil(pairs / token_block); unsigned, since a signed division costs nine instructions."""
        return I32((U32(pairs) + (self.token_block - 1)) // self.token_block)

    @cute.jit
    def expert_of_block(self, block: cutlass.Int32, first_block: cute.Tensor, lane: cutlass.Int32) -> cutlass.Int32:
        """The expert that owns a block: a warp finds the run of experts, one run a lane, then the expert inside it."""
        run = -(-self.num_experts // 32)
        end = I32(self.num_experts)
        low = first_block[cutlass.min(lane * run, end)]
        high = first_block[cutlass.min(lane * run + run, end)]
        owner = lowest_lane(U32(cute.arch.vote_ballot_sync(low <= block and block < high)))
        expert = owner * run
        for i in cutlass.range_constexpr(0, run, 32):
            e = owner * run + i + lane
            inside = i + lane < run and e < end
            e = cutlass.min(e, end - 1)
            owns = inside and first_block[e] <= block and block < first_block[e + 1]
            votes = U32(cute.arch.vote_ballot_sync(owns))
            if votes != 0:
                expert = owner * run + i + lowest_lane(votes)
        return expert

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
        for i in cutlass.range(cute.ceil_div(num_pairs, 32), unroll=2):
            p = i * 32 + lane
            hit = p < num_pairs
            if hit:
                hit = I32(pair_expert[p]) == expert
            before, hits = rank_in_warp(hit, lane, 1)
            position = found + before - rank
            if hit and position >= 0 and position < self.token_block:
                tokens[position] = I32(U32(p) // self.top_k)
                if cutlass.const_expr(with_weights):
                    weights[position] = routing[p]
            found += hits
        cute.arch.sync_warp()
        return cutlass.min(found - rank, I32(self.token_block))

    @cute.jit
    def pairs_of_token(self, token: cutlass.Int32, pair_expert: cute.Tensor) -> cutlass.Int32:
        """How many pairs of a token are computed here."""
        count = I32(0)
        for j in cutlass.range_constexpr(self.top_k):
            count += I32(1) if I32(pair_expert[token * self.top_k + j]) >= 0 else I32(0)
        return count
