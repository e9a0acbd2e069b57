"""Routing inside a kernel: from topk_ids to blocks of up to ``token_block`` pairs of one expert.

Every CTA reads all T*k pairs (T*k <= max_pairs), drops the ones that no one computes here (remote or out-of-range
expert, routing weight below the pair threshold), counts the rest by expert in shared memory, and numbers the token
blocks of all experts in order of expert id (up to 32 pairs: in order of each expert's first pair, in one warp's
registers). All CTAs number alike, so which CTA works on which tiles of which blocks follows from that alone, and the
grid depends on nothing but its size. Ballots find the pairs of a block, in the order of topk_ids.

Shares are equal in work, not in items: the work of an item is 1 + 0.8 (1 - 0.845^tokens). An item of a
block with more tokens has more active rows, but fetches most of them beside the gate rows of the next, so this grows
more slowly than its bytes (measured, docs/kernels-fused.md: no loss at 84.5 % inactive neurons, a gain of 2 % at 50 %).
Where the CTAs have many items, a share is that of two neighbours, who divide it while they work (course).
"""

from __future__ import annotations

import cutlass
import cutlass.cute as cute

from ..configs import max_blocks
from .compaction import inclusive_sum, offset_of_warp, rank_in_group, same_in_warp
from .primitives import F32, I32, U32, U64, vector

LANE_PAIRS = 4  # pairs that one lane looks at at a time
WORK_UNIT = 32  # of an item without active rows
PAIRED_ITEMS = 8  # for each CTA, from which on neighbours have a common share
BLOCK_BITS = 13  # of a number that holds blocks and, above them, their work: at most 4096 pairs, a block each


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
    first_block [E] int32: number of the first block of each expert that has pairs.
    block_expert [max_blocks] int16: expert of each block.
    share [3] int32: first and end of the items of this CTA, or of it and its neighbour, and whether of both; a block's
    ``tiles`` tiles are the items block * tiles + i.
    warp_sums [num_threads / 32] int32: for numbering the blocks.
    """

    def __init__(
        self,
        num_experts: int,
        top_k: int,
        max_pairs: int,
        token_block: int,
        tiles: int,
        num_threads: int,
        has_expert_map: bool,
    ):
        self.num_threads = num_threads
        self.num_experts, self.top_k, self.token_block = num_experts, top_k, token_block
        self.max_pairs, self.tiles, self.has_expert_map = max_pairs, tiles, has_expert_map
        # of an item by the tokens of its block
        self.works = [0, *(round(WORK_UNIT * (1 + 0.8 * (1 - 0.845**tokens))) for tokens in range(1, token_block + 1))]

    def allocate(self, smem):
        """(pair_expert, first_block, block_expert, share, warp_sums) in shared memory."""
        pair_expert = smem.allocate_tensor(cutlass.Int16, cute.make_layout((self.max_pairs,)), 16)
        first_block = smem.allocate_tensor(I32, cute.make_layout((self.num_experts,)), 16)
        blocks = cute.make_layout((max_blocks(self.max_pairs, self.num_experts),))
        block_expert = smem.allocate_tensor(cutlass.Int16, blocks, 16)
        share = smem.allocate_tensor(I32, cute.make_layout((3,)), 16)
        warp_sums = smem.allocate_tensor(I32, cute.make_layout((self.num_threads // 32,)), 4)
        return pair_expert, first_block, block_expert, share, warp_sums

    @cute.jit
    def build(
        self,
        topk_ids: cute.Tensor,
        topk_weights: cute.Tensor,
        expert_map: cute.Tensor,
        pair_threshold: cutlass.Float32,
        table,
        thread: cutlass.Int32,
    ):
        """Fills the table. Called by all threads of the CTA; ends with a CTA barrier.

        Nothing before this call may read what an earlier launch wrote: it waits for that launch (dependent launch).
        """
        pair_expert, first_block = table[:2]
        if cute.size(topk_ids) <= 32:
            self.build_in_warp(topk_ids, topk_weights, expert_map, pair_threshold, table, thread)
        else:
            num_pairs = cute.size(topk_ids)
            for e in cutlass.range(thread, self.num_experts, self.num_threads, unroll=1):
                first_block[e] = 0
            looked_at = (U32(num_pairs) + (32 * LANE_PAIRS - 1)) // (32 * LANE_PAIRS) * (32 * LANE_PAIRS)
            for p in cutlass.range(num_pairs + thread, I32(looked_at), self.num_threads, unroll=1):
                pair_expert[p] = cutlass.Int16(-1)
            cute.arch.sync_threads()
            cute.arch.griddepcontrol_wait()  # what the launch before this one wrote is visible from here on
            for p in cutlass.range(thread, num_pairs, self.num_threads, unroll=1):
                expert = self.expert_of_pair(p, topk_ids, topk_weights, expert_map, pair_threshold)
                pair_expert[p] = cutlass.Int16(expert)
                if expert >= 0:
                    cute.arch.atomic_add(first_block.iterator + expert, I32(1), sem="relaxed", scope="cta")
            cute.arch.sync_threads()
            self.number_blocks(table, thread)
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
    def build_in_warp(self, topk_ids, topk_weights, expert_map, pair_threshold, table, thread):
        """build for at most 32 pairs, one a lane of the first warp. Experts are numbered in the order of their first
        pair, and ``first_block`` is filled only for those that have one."""
        pair_expert, first_block, block_expert, share, _ = table
        if thread < 32 * LANE_PAIRS:  # as many as pairs_of_block looks at
            pair_expert[thread] = cutlass.Int16(-1)
        cute.arch.griddepcontrol_wait()
        if thread < 32:
            cute.arch.sync_warp()
            expert = I32(-1)
            if thread < cute.size(topk_ids):
                expert = self.expert_of_pair(thread, topk_ids, topk_weights, expert_map, pair_threshold)
                pair_expert[thread] = cutlass.Int16(expert)
            same = same_in_warp(expert, self.num_experts.bit_length())
            leads = expert >= 0 and (same & cute.arch.lanemask_lt()) == 0
            pairs = I32(cute.arch.popc(same)) if leads else I32(0)
            mine = self.blocks_and_work(pairs)
            through = inclusive_sum(mine, thread)
            ends = self.begin_shares(I32(cute.arch.shuffle_sync(through, 31)), share, thread)
            if leads:
                first_block[expert] = self.claim(expert, pairs, through - mine, ends, block_expert, share)

    @cute.jit
    def number_blocks(self, table, thread: cutlass.Int32):
        """All threads turn pair counts by expert into block numbers: an exclusive prefix sum of ceil(count / block)."""
        _, first_block, block_expert, share, warp_sums = table
        lane, warp = thread % 32, thread // 32
        each = -(-self.num_experts // self.num_threads)  # experts of a thread
        pairs = cute.make_rmem_tensor((each,), I32)
        mine = I32(0)
        for i in cutlass.range_constexpr(each):
            expert = thread * each + i
            counted = first_block[cutlass.min(expert, I32(self.num_experts - 1))]
            pairs[i] = counted if expert < self.num_experts else I32(0)
            mine += self.blocks_and_work(pairs[i])
        through = inclusive_sum(mine, lane)
        if lane == 31:
            warp_sums[warp] = through
        cute.arch.sync_threads()
        before, total = offset_of_warp(warp_sums, warp, self.num_threads // 32)
        ends = self.begin_shares(total, share, thread)
        running = before + through - mine
        for i in cutlass.range_constexpr(each):
            if pairs[i] > 0:
                first_block[thread * each + i] = self.claim(
                    thread * each + i, pairs[i], running, ends, block_expert, share
                )
                running += self.blocks_and_work(pairs[i])

    # ---- shares of the CTAs: sums of blocks and work of a tile of each, in one number

    @cute.jit
    def work_of(self, tokens: cutlass.Int32) -> cutlass.Int32:
        """Work of a tile whose block has so many tokens, fewer than a whole block; 0 for none."""
        packed = sum(work << 8 * tokens for tokens, work in enumerate(self.works[:-1]))
        return I32((U64(packed) >> U64(8 * tokens)) & U64(255))

    @cute.jit
    def blocks_and_work(self, pairs: cutlass.Int32) -> cutlass.Int32:
        """Of an expert with so many pairs: blocks in the low BLOCK_BITS, the sum of their work above."""
        block = self.token_block
        whole = U32(pairs) // block  # unsigned, since a signed division costs nine instructions
        blocks = (U32(pairs) + (block - 1)) // block
        work = I32(whole) * self.works[-1] + self.work_of(pairs - I32(whole) * block)
        return (work << BLOCK_BITS) + I32(blocks)

    def parts(self, number):
        """(blocks, work of all their items) of such a number."""
        return number & ((1 << BLOCK_BITS) - 1), (number >> BLOCK_BITS) * self.tiles

    @cute.jit
    def begin_shares(self, total, share, thread):
        """Where this share begins in all work and where it ends; ``total``: blocks and work of all experts.

        The end of all work lies in no block, so it is not for claim to find.
        """
        cta, num_ctas = cute.arch.block_idx()[0], cute.arch.grid_dim()[0]
        blocks, work = self.parts(total)
        both = blocks * self.tiles >= PAIRED_ITEMS * num_ctas
        if thread == 0:
            share[2] = I32(1) if both else I32(0)
        first_cta = cta & ~1 if both else I32(cta)
        size = I32(2) if both else I32(1)
        ends = cute.make_rmem_tensor((2,), I32)
        for i in cutlass.range_constexpr(2):  # in fp32, which is faster, and alike in all CTAs
            boundary = first_cta + i * size
            end = I32(F32(work) * F32(boundary) * cute.arch.rcp_approx(F32(num_ctas)))
            ends[i] = work if boundary >= num_ctas else cutlass.min(end, work)
            if thread == i and ends[i] == work:
                share[i] = blocks * self.tiles
        return ends

    @cute.jit
    def claim(self, expert, pairs, before, ends, block_expert, share):
        """Numbers the blocks of an expert and returns the first one; ``before``: blocks and work of the experts before.

        Where one of their items begins or ends the share, writes that.
        """
        first, work = self.parts(before)
        block = first
        for left in cutlass.range(pairs, 0, -self.token_block, unroll=1):
            block_expert[block] = cutlass.Int16(expert)
            each = I32(self.works[-1])
            if left < self.token_block:
                each = self.work_of(left)
            for i in cutlass.range_constexpr(2):
                offset = ends[i] - work
                if offset >= 0 and offset < each * self.tiles:
                    share[i] = block * self.tiles + I32(U32(offset) // U32(each))
            work += each * self.tiles
            block += 1
        return first

    @cute.jit
    def course(self, share):
        """The items that this CTA works off: (first, step, own, common).

        ``own`` items are the CTA's for certain. Of two neighbours the one of even number goes forward from the first
        item of their share, the other back from the last one; the ``common`` ones between go, one by one, to whoever is
        ready for one. (Two have 2 * PAIRED_ITEMS items in the mean, 8 at least, since no item is 1.8 times the work of
        another.)
        """
        cta, num_ctas = cute.arch.block_idx()[0], cute.arch.grid_dim()[0]
        items = share[1] - share[0]
        first, step, own, common = share[0], I32(1), items, I32(0)
        if share[2] != 0 and (cta | 1) < num_ctas:
            own = items * 3 // 8
            common = items - 2 * own
            if cta & 1 != 0:
                first, step = share[1] - 1, I32(-1)
        return first, step, own, common

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
