"""fused_decode: the routed experts of a small batch in one launch: gate, threshold, compaction, up, down, sum, cast.

Work and order
--------------
A *block* is up to 8 pairs (tokens) of one expert; an *item* is one block times one tile of ``tile_neurons`` neurons.
Items are numbered block by block, and CTA c of a persistent grid (one CTA per SM) takes a contiguous share of them, as
much work as any other (routing.py): tiles of one block mostly stay on one CTA, which then adds to the output once per
block instead of once per tile. Some SMs are a tenth faster than others, and active neurons are not known beforehand:
two neighbours share a range of items, start at its ends, and meet where a counter says (gate_producer).

One CTA, four roles that run side by side and meet only at mbarriers. Each group of warps takes its own share of the
registers (setmaxnreg):

* gate producer (1 warp): one bulk copy for each of the tile's gate rows, into the gate ring (``gate_stages`` x
  ``stage_rows`` rows).
* gate warps: x as B fragments in registers, K split over the warps, mma.m16n8k16 with gate rows as M and 8 tokens as N;
  partial sums meet in shared memory; a = act(g), |a| * r against tau; ballot and prefix sums compact the union of the
  tokens' active neurons into a list, which goes to a short queue with a * r of every (slot, token).
* row producer (1 warp): one bulk copy per *active* row: up rows, then down rows, in chunks, into the row ring.
* up/down warps: hidden dimension split over the warps. u = x . up rows (as above), h = a * u * r in bf16, then
  y[column, token] += down rows^T . h by ldmatrix.trans and mma.m16n8k8, kept in registers until the block ends (or, for
  a wide hidden dimension, added chunk by chunk) and then added to the fp32 sums by red.global.add.v4.

So gate rows of later tiles stream in while earlier tiles' active rows are fetched and used: memory never waits for the
phases of one tile. Rows are padded by 16 bytes in shared memory, which makes every ldmatrix free of bank conflicts.

Sum and cast: ``accum`` [T, H] fp32 is zero on entry. After adding to a token's row a CTA adds the number of its items
to ``counters[token]``; the one that completes the count (pairs of the token x tiles) casts the row to bf16, and leaves
accum and counters zero for the next launch. No CTA ever waits for another one.

Biases, where the experts have them: the gate's is added with the partial sums, the up projection's goes through the
queue beside the list, the down projection's (times r) is added to accum by whoever has a block's first item.

Bytes from HBM: per block of m <= 8 tokens 2H (I + 2 |union of active neurons|), x and y besides. An expert with more
than 8 tokens has several blocks, each of which reads its gate rows again: from about 4 tokens an expert on, the staged
kernels are the faster ones.

Tried on an H200 (E=256, H=2048, I=512, 84.5 %), 2026-11-23, and slower or no gain:
* a gate ring deeper than 32 rows and a row ring of 16: T=32 takes 147 us instead of 130. Gate copies then queue in
  front of the row copies, whose latency is what the up/down warps wait for.
* the blocks of one expert taking turns every 64 neurons, so that the second finds the rows in L2: T=128 takes 327 us
  instead of 272, since the output is added four times as often.
* the sums spread over 4 copies of accum: T=1 12.9 us instead of 13.0, T=8 48.0 instead of 45.9.
* 8 gate warps (T=8: 65.6 us instead of 52.2), tiles of 64 or 128 neurons (a few per cent), chunks of 4 rows (3 %).
"""

from __future__ import annotations

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute

from ..configs import LIST_QUEUE, PRODUCER_REGISTERS, TOKEN_BLOCK, FusedConfig
from .compaction import any_in_group, offset_of_warp, rank_in_warp
from .primitives import (
    BF16,
    F32,
    I32,
    I64,
    U32,
    SmemAllocator,
    activate_gate,
    load_matrices,
    mma_16x8x8,
    opaque_zero,
    transform_up,
    vector,
)
from .routing import PairTable
from .token_sums import ROW_BARRIER, TokenSums

GATE_BARRIER = 1  # a named barrier; 0 is the CTA's
LAST = 1 << 16  # added to the size of a CTA's last list; more than any size
SLOTS = 8  # K of the down MMA: active rows that one pass of it takes at most
TOKENS = TOKEN_BLOCK  # the N of the MMAs


class FusedDecode(TokenSums):
    """One compiled instance: bf16 weights and activations, fp32 sums; hidden_size a multiple of 64, local experts."""

    def __init__(
        self,
        *,
        hidden_size: int,
        intermediate_size: int,
        num_experts: int,
        top_k: int,
        config: FusedConfig,
        activation: str = "silu",
        router_weighted: bool = True,
        weight_on_input: bool = False,
        has_expert_map: bool = False,
        has_bias: bool = False,
    ):
        self.H, self.I, self.E, self.top_k = hidden_size, intermediate_size, num_experts, top_k
        self.config, self.activation = config, activation
        self.router_weighted, self.weight_on_input, self.has_bias = router_weighted, weight_on_input, has_bias
        self.NT = config.tile_neurons
        self.tiles = -(-intermediate_size // self.NT)
        # A neuron in the queue's lists; its up bias beside it takes no more shared memory than a kernel without has.
        self.neuron_type = cutlass.Uint16 if has_bias else I32
        if has_bias and intermediate_size > 1 << 16:
            raise ValueError(
                f"intermediate_size must be at most 65536 for experts with biases, got {intermediate_size}"
            )
        self.gate_warps, self.row_warps = config.gate_warps, config.updown_warps
        self.gate_stages, self.stage_rows = config.gate_stages, config.stage_rows
        self.row_stages, self.chunk = config.row_stages, config.chunk_rows
        self.warps = self.gate_warps + self.row_warps + 4
        self.threads = 32 * self.warps
        self.table = PairTable(num_experts, top_k, config.max_pairs, TOKENS, self.tiles, self.threads, has_expert_map)
        self.units = hidden_size // 32  # one ldmatrix.x4 of x covers 32 columns
        self.gate_units = -(-self.units // self.gate_warps)
        self.row_units = -(-self.units // self.row_warps)
        shares = (self.gate_units * self.gate_warps, self.row_units * self.row_warps)
        self.ragged = shares != (self.units, self.units)  # some warp's share reaches past the hidden dimension
        self.pitch = hidden_size + 8  # elements of a padded row in shared memory
        self.keep_sums = bool(config.keep_sums)
        registers = config.registers(hidden_size)
        if registers is None:
            raise ValueError(f"{config} does not fit the register file at hidden_size {hidden_size}")
        self.gate_registers, self.row_registers = registers
        self.start_registers = config.start_registers

    @cute.jit
    def __call__(
        self,
        hidden_states: cute.Tensor,
        w13: cute.Tensor,
        w2_rows: cute.Tensor,
        thresholds: cute.Tensor,
        topk_ids: cute.Tensor,
        topk_weights: cute.Tensor,
        expert_map: cute.Tensor,
        w13_bias: cute.Tensor | None,
        w2_bias: cute.Tensor | None,
        accum: cute.Tensor,
        counters: cute.Tensor,
        out: cute.Tensor,
        pair_threshold: cutlass.Float32,
        num_ctas: cutlass.Int32,
        stream: cuda.CUstream,
    ):
        """hidden_states [T, H] bf16, w13 [E, 2I, H] bf16, w2_rows [E, I, H] bf16, thresholds [E, I] fp32, topk_ids
        [T, k] int32, topk_weights [T, k] fp32, expert_map [E_global] int32 (unused without has_expert_map), w13_bias
        [E, 2I] and w2_bias [E, H] bf16 (None without has_bias), accum [>= T, H] fp32 and counters [>= T + num_ctas / 2]
        int32 (of the tokens, then of each two CTAs), zero on entry and on exit, out [T, H] bf16."""
        self.kernel(
            hidden_states,
            w13,
            w2_rows,
            thresholds,
            topk_ids,
            topk_weights,
            expert_map,
            accum,
            counters,
            out,
            pair_threshold,
            w13_bias,
            w2_bias,
        ).launch(grid=(num_ctas, 1, 1), block=(self.threads, 1, 1), stream=stream, min_blocks_per_mp=1, use_pdl=True)

    # ---- one CTA -----------------------------------------------------------------------------------------------------

    @cute.kernel
    def kernel(
        self,
        x: cute.Tensor,
        w13: cute.Tensor,
        w2_rows: cute.Tensor,
        thresholds: cute.Tensor,
        topk_ids: cute.Tensor,
        topk_weights: cute.Tensor,
        expert_map: cute.Tensor,
        accum: cute.Tensor,
        counters: cute.Tensor,
        out: cute.Tensor,
        pair_threshold: cutlass.Float32,
        w13_bias: cute.Tensor | None,
        w2_bias: cute.Tensor | None,
    ):
        thread, _, _ = cute.arch.thread_idx()
        cta, _, _ = cute.arch.block_idx()
        num_ctas, _, _ = cute.arch.grid_dim()
        lane = thread % 32
        warp = cute.arch.make_warp_uniform(thread // 32)
        num_pairs = cute.size(topk_ids)

        smem = SmemAllocator()
        gate_ring = self.matrix(smem, BF16, self.gate_stages * self.stage_rows, self.pitch)
        row_ring = self.matrix(smem, BF16, self.row_stages * self.chunk, self.pitch)
        gate_sums = self.matrix(smem, F32, self.gate_warps * self.NT, TOKENS)
        up_sums = self.matrix(smem, F32, self.row_warps * SLOTS, TOKENS)
        coefficients = self.matrix(smem, F32, LIST_QUEUE * self.NT, TOKENS)  # a * r, 0 where inactive
        products = self.matrix(smem, BF16, TOKENS, SLOTS)  # h
        lists = self.matrix(smem, self.neuron_type, LIST_QUEUE, self.NT)
        list_size = smem.allocate_tensor(I32, cute.make_layout((LIST_QUEUE,)), 16)
        warp_counts = smem.allocate_tensor(I32, cute.make_layout((self.gate_warps,)), 16)
        complete = smem.allocate_tensor(I32, cute.make_layout((TOKENS,)), 16)
        last_item = smem.allocate_tensor(I32, cute.make_layout((self.gate_stages,)), 16)  # LAST with its rows, else 0
        all_tokens = self.matrix(smem, I32, self.warps, TOKENS)
        all_weights = self.matrix(smem, F32, self.warps, TOKENS)
        table = self.table.allocate(smem)
        pair_expert, _, block_expert, share, _ = table
        up_biases = None  # of the neurons in the queue's lists
        if cutlass.const_expr(self.has_bias):
            up_biases = self.matrix(smem, BF16, LIST_QUEUE, self.NT)
        barriers = smem.allocate_tensor(
            I64, cute.make_layout((2 * (self.gate_stages + self.row_stages + LIST_QUEUE),)), 16
        ).iterator
        gate_full, gate_empty = barriers, barriers + self.gate_stages
        row_full = gate_empty + self.gate_stages
        row_empty = row_full + self.row_stages
        list_full = row_empty + self.row_stages
        list_empty = list_full + LIST_QUEUE
        if thread == 0:
            for s in cutlass.range_constexpr(self.gate_stages):
                cute.arch.mbarrier_init(gate_full + s, 1)
                cute.arch.mbarrier_init(gate_empty + s, self.gate_warps * self.warp_arrivals)
            for s in cutlass.range_constexpr(self.row_stages):
                cute.arch.mbarrier_init(row_full + s, 1)
                cute.arch.mbarrier_init(row_empty + s, self.row_warps * self.warp_arrivals)
            for s in cutlass.range_constexpr(LIST_QUEUE):
                cute.arch.mbarrier_init(list_full + s, self.gate_warps * self.warp_arrivals)
                cute.arch.mbarrier_init(list_empty + s, (self.row_warps + 1) * self.warp_arrivals)
            cute.arch.mbarrier_init_fence()
        self.table.build(topk_ids, topk_weights, expert_map, pair_threshold, table, thread)
        cute.arch.griddepcontrol_launch_dependents()

        course = self.table.course(share)
        tokens = cute.make_tensor(all_tokens.iterator + warp * TOKENS, cute.make_layout((TOKENS,)))
        weights = cute.make_tensor(all_weights.iterator + warp * TOKENS, cute.make_layout((TOKENS,)))
        block_of = (num_pairs, topk_weights, table, tokens, weights, lane)
        gate, rows = (gate_ring, last_item, gate_full, gate_empty), (row_ring, row_full, row_empty)
        queue = (lists, list_size, coefficients, up_biases, list_full, list_empty)
        if warp >= self.gate_warps + self.row_warps:  # first, so that their code follows the table's without a jump
            self.set_registers(PRODUCER_REGISTERS)
            if warp == self.gate_warps + self.row_warps:
                claims = counters.iterator + (cute.size(out, mode=[0]) + cta // 2)
                self.gate_producer(course, claims, block_expert, w13, gate, lane)
            if warp == self.gate_warps + self.row_warps + 1:
                self.row_producer(course, block_expert, w13, w2_rows, rows, queue, lane)
        elif warp < self.gate_warps:
            self.set_registers(self.gate_registers)
            self.gate_role(course, block_of, x, thread, warp, gate, queue, gate_sums, thresholds, w13_bias, warp_counts)
        else:
            thread -= 32 * self.gate_warps
            self.set_registers(self.row_registers)
            self.clear_unrouted(pair_expert, out, thread, cta, num_ctas)
            totals = (accum, counters, out, complete, w2_bias)
            warp -= self.gate_warps
            self.up_down_role(course, block_of, x, thread, warp, rows, queue, up_sums, products, totals)

    def set_registers(self, count: int):
        """Registers of this warpgroup's threads from here on (setmaxnreg)."""
        if count > self.start_registers:
            cute.arch.setmaxregister_increase(count)
        elif count < self.start_registers:
            cute.arch.setmaxregister_decrease(count)

    def matrix(self, smem, dtype, rows: int, columns: int):
        return smem.allocate_tensor(dtype, cute.make_layout((rows, columns), stride=(columns, 1)), 128)

    @cute.jit
    def locate(self, item):
        """(block, tile) of an item."""
        block = I32(U32(item) // self.tiles)
        return block, item - block * self.tiles

    @cute.jit
    def enter_block(self, block, block_of, with_weights: cutlass.Constexpr):
        """Fills this warp's tokens and, if asked, weights; returns the expert and the number of pairs in the block."""
        num_pairs, topk_weights, table, tokens, weights, lane = block_of
        pair_expert, first_block, block_expert = table[:3]
        expert = I32(block_expert[block])
        rank = (block - first_block[expert]) * TOKENS
        return expert, self.table.pairs_of_block(
            expert, rank, num_pairs, topk_weights, pair_expert, tokens, weights, lane, with_weights
        )

    # ---- producers ---------------------------------------------------------------------------------------------------

    @cute.jit
    def gate_producer(self, course, claims, block_expert, w13, gate, lane):
        """Also decides how many items this CTA works off: its own ones, and of the common ones as many as it can claim.

        ``claims`` counts what both neighbours asked for. Each asks once in vain, and the second to do so leaves zero.
        The next item is asked for before the rows of one, and the answer looked at when all of them are under way.
        """
        ring, last_item, full, empty = gate
        item, step, own, common = course
        stage, phase = I32(0), I32(0)
        more = own > 0
        while more:
            own -= 1
            asks = own <= 0 and common > 0
            claimed = I32(0)
            if asks and lane == 0:
                claimed = cute.arch.atomic_add(claims, I32(1), sem="relaxed", scope="gpu")
            block, tile = self.locate(item)
            expert, neuron = I32(block_expert[block]), tile * self.NT
            stages = self.stages_of_tile(neuron)
            for s in cutlass.range(stages, unroll=1):
                rows = cutlass.min(I32(self.stage_rows), self.I - neuron)
                row = (I64(expert) * (2 * self.I) + I64(neuron + lane)) * self.H
                self.copy_rows(w13.iterator, row, rows, ring, stage, self.stage_rows, full, empty, phase, lane)
                if s == stages - 1:
                    more = own > 0
                    if asks:
                        claimed = cute.arch.shuffle_sync(claimed, 0)
                        more = claimed < common
                        if claimed == common + 1 and lane == 0:
                            cute.arch.atomic_add(claims, -2 - common, sem="relaxed", scope="gpu")
                if lane == 0:
                    last_item[stage] = I32(0) if more else I32(LAST)
                self.announce_rows(rows, full, stage, lane)
                stage, phase = self.advance(stage, phase, self.gate_stages)
                neuron += self.stage_rows
            item += step

    @cute.jit
    def row_producer(self, course, block_expert, w13, w2_rows, rows_ring, queue, lane):
        ring, full, empty = rows_ring
        lists, list_size, _, _, list_full, list_empty = queue
        stage, phase = I32(0), I32(0)
        slot, slot_phase = I32(0), I32(0)
        item, step, own, _ = course
        more = own > 0
        while more:
            block, _ = self.locate(item)
            expert = I32(block_expert[block])
            cute.arch.mbarrier_wait(list_full + slot, slot_phase)
            active = list_size[slot] & (LAST - 1)
            more = list_size[slot] < LAST
            for start in cutlass.range(0, active, self.chunk, unroll=1):
                rows = cutlass.min(I32(self.chunk), active - start)
                neuron = I32(lists[slot, start + cutlass.min(lane, rows - 1)])
                up = (I64(expert) * (2 * self.I) + I64(neuron + self.I)) * self.H
                self.copy_rows(w13.iterator, up, rows, ring, stage, self.chunk, full, empty, phase, lane)
                self.announce_rows(rows, full, stage, lane)
                stage, phase = self.advance(stage, phase, self.row_stages)
                down = (I64(expert) * self.I + I64(neuron)) * self.H
                self.copy_rows(w2_rows.iterator, down, rows, ring, stage, self.chunk, full, empty, phase, lane)
                self.announce_rows(rows, full, stage, lane)
                stage, phase = self.advance(stage, phase, self.row_stages)
            self.release(list_empty + slot, lane)
            slot, slot_phase = self.advance(slot, slot_phase, LIST_QUEUE)
            item += step

    @cute.jit
    def stages_of_tile(self, neuron):
        """Gate stages of the tile that starts at ``neuron``; the last tile may be short."""
        rows = cutlass.min(I32(self.NT), self.I - neuron)
        return (rows + (self.stage_rows - 1)) // self.stage_rows

    # ---- gate warps --------------------------------------------------------------------------------------------------

    @cute.jit
    def gate_role(
        self, course, block_of, x, thread, warp, gate_ring, queue, partial, thresholds, w13_bias, warp_counts
    ):
        ring, last_item, full, empty = gate_ring
        lists, list_size, coefficients, up_biases, list_full, list_empty = queue
        tokens, weights, lane = block_of[3:]
        threads = 32 * self.gate_warps
        per_warp = self.NT // self.gate_warps  # neurons whose sums one warp finishes
        rounds = -(-per_warp // 4)
        stage, phase = I32(0), I32(0)
        slot, slot_phase = I32(0), I32(0)
        current, expert, count = I32(-1), I32(0), I32(0)
        fragments = cute.make_rmem_tensor((8, self.gate_units), BF16)  # of x
        row_of_lane = lane % self.stage_rows if cutlass.const_expr(self.stage_rows == 16) else lane & 7
        token = lane % 8
        item, step, own, _ = course
        last = I32(0) if own > 0 else I32(LAST)
        while last == 0:
            block, tile = self.locate(item)
            if block != current:
                current = block
                expert, count = self.enter_block(block, block_of, True)
                self.load_x(x, tokens, count, warp, lane, self.gate_units, weights, fragments)
            neuron0 = tile * self.NT
            tau = cute.make_rmem_tensor((rounds,), F32)
            for i in cutlass.range_constexpr(rounds):
                neuron = neuron0 + warp * per_warp + i * 4 + lane // 8
                tau[i] = thresholds[expert, cutlass.min(neuron, I32(self.I - 1))]
            biases = cute.make_rmem_tensor((2, rounds), BF16)  # of gate and up
            if cutlass.const_expr(self.has_bias):
                for i in cutlass.range_constexpr(rounds):
                    neuron = neuron0 + warp * per_warp + i * 4 + lane // 8
                    for half in cutlass.range_constexpr(2):
                        biases[half, i] = w13_bias[expert, half * self.I + cutlass.min(neuron, I32(self.I - 1))]
            for g in cutlass.range(self.stages_of_tile(neuron0), unroll=1):
                rows = cutlass.min(I32(self.stage_rows), self.I - (neuron0 + g * self.stage_rows))
                cute.arch.mbarrier_wait(full + stage, phase)
                source_row = row_of_lane
                if cutlass.const_expr(self.I % self.stage_rows != 0):
                    source_row = cutlass.min(row_of_lane, rows - 1)
                first_row, chains = stage * self.stage_rows, 4 if self.gate_units <= 16 else 2
                sums = self.rows_times_x(
                    ring, first_row, source_row, warp, lane, self.gate_units, self.stage_rows, chains, fragments
                )
                for h in cutlass.range_constexpr(self.stage_rows // 8):
                    row = warp * self.NT + g * self.stage_rows + lane // 4 + 8 * h
                    for c in cutlass.range_constexpr(2):
                        partial[row, (lane % 4) * 2 + c] = sums[2 * h + c]
                last = last_item[stage]
                self.release(empty + stage, lane)
                stage, phase = self.advance(stage, phase, self.gate_stages)
            cute.arch.barrier(barrier_id=GATE_BARRIER, number_of_threads=threads)
            # Every warp finishes its own neurons: 4 neurons x 8 tokens a round.
            a = cute.make_rmem_tensor((rounds,), F32)
            leads = cute.make_rmem_tensor((rounds,), cutlass.Boolean)
            ranks = cute.make_rmem_tensor((rounds,), I32)
            in_warp = I32(0)
            weight = F32(0.0)
            if token < count:
                weight = weights[token]
            for i in cutlass.range_constexpr(rounds):
                row = warp * per_warp + i * 4 + lane // 8
                real = token < count and neuron0 + row < self.I
                if cutlass.const_expr(per_warp % 4 != 0):  # the warp's other lanes have no neuron in the last round
                    real = real and i * 4 + lane // 8 < per_warp
                gate = F32(0.0)
                if real:
                    for w in cutlass.range_constexpr(self.gate_warps):
                        gate += partial[w * self.NT + row, token]
                    if cutlass.const_expr(self.has_bias):
                        gate += F32(biases[0, i])
                value = activate_gate(gate, self.activation)
                score = cutlass.max(value, -value)
                if cutlass.const_expr(self.router_weighted):
                    score = score * weight
                keep = real and not (score < tau[i])
                if cutlass.const_expr(not self.weight_on_input):
                    value = value * weight
                a[i] = value if keep else F32(0.0)
                active = any_in_group(keep, lane, 8)
                leads[i] = active
                leader = active and token == 0
                rank, leaders = rank_in_warp(leader, lane, 8)
                ranks[i] = in_warp + rank
                in_warp += leaders
            if lane == 0:
                warp_counts[warp] = in_warp
            cute.arch.barrier(barrier_id=GATE_BARRIER, number_of_threads=threads)
            before, total = offset_of_warp(warp_counts, warp, self.gate_warps)
            cute.arch.mbarrier_wait(list_empty + slot, slot_phase ^ 1)
            for i in cutlass.range_constexpr(rounds):
                if leads[i]:
                    position = before + ranks[i]
                    coefficients[slot * self.NT + position, token] = a[i]
                    if token == 0:
                        lists[slot, position] = self.neuron_type(neuron0 + warp * per_warp + i * 4 + lane // 8)
                        if cutlass.const_expr(self.has_bias):
                            up_biases[slot, position] = biases[1, i]
            if thread == 0:
                list_size[slot] = total + last
            self.release(list_full + slot, lane)
            slot, slot_phase = self.advance(slot, slot_phase, LIST_QUEUE)
            item += step

    # ---- up and down warps -------------------------------------------------------------------------------------------

    @cute.jit
    def up_down_role(self, course, block_of, x, thread, warp, rows_ring, queue, up_sums, products, totals):
        ring, full, empty = rows_ring
        _, list_size, coefficients, up_biases, list_full, list_empty = queue
        accum, w2_bias = totals[0], totals[4]
        pair_expert, (tokens, weights, lane) = block_of[2][0], block_of[3:]
        zero = opaque_zero()
        stage, phase = I32(0), I32(0)
        slot, slot_phase = I32(0), I32(0)
        current, expert, count, tiles_done = I32(-1), I32(0), I32(0), I32(0)
        fragments = cute.make_rmem_tensor((8, self.row_units), BF16)  # of x
        sums = cute.make_rmem_tensor((4, 2, self.row_units if self.keep_sums else 1), F32)
        sums.fill(0.0)
        item, step, own, _ = course
        more = own > 0
        while more:
            block, tile = self.locate(item)
            if block != current:
                if tiles_done > 0:
                    if cutlass.const_expr(self.keep_sums):
                        self.add_to_output(sums, 0, self.row_units, tokens, count, warp, lane, accum)
                    self.finish_tokens(tokens, count, tiles_done, pair_expert, thread, totals)
                    tiles_done = I32(0)
                current = block
                expert, count = self.enter_block(block, block_of, self.weight_on_input or self.has_bias)
                self.load_x(x, tokens, count, warp, lane, self.row_units, weights, fragments)
            if cutlass.const_expr(self.has_bias):
                self.add_down_bias(w2_bias, tile, expert, tokens, weights, count, thread, accum)
            cute.arch.mbarrier_wait(list_full + slot, slot_phase)
            active = list_size[slot] & (LAST - 1)
            more = list_size[slot] < LAST
            for start in cutlass.range(0, active, self.chunk, unroll=1):
                rows = cutlass.min(I32(self.chunk), active - start)
                cute.arch.mbarrier_wait(full + stage, phase)
                self.up_chunk(ring, stage * self.chunk, rows, warp, lane, fragments, up_sums)
                self.release(empty + stage, lane)
                stage, phase = self.advance(stage, phase, self.row_stages)
                self.multiply(slot, start, rows, thread, up_sums, coefficients, up_biases, products)
                cute.arch.mbarrier_wait(full + stage, phase)
                seen = self.down_chunk(ring, stage * self.chunk, rows, warp, lane, products, sums, tokens, count, accum)
                if cutlass.const_expr(self.keep_sums):
                    self.release(empty + stage + (seen & zero), lane)
                else:  # every product was added to accum, but for those of a warp whose columns end before the unit
                    if cutlass.const_expr(self.ragged):
                        cute.arch.fence_proxy("async.shared", space="cta")
                    self.release(empty + stage, lane)
                stage, phase = self.advance(stage, phase, self.row_stages)
            self.release(list_empty + slot, lane)
            slot, slot_phase = self.advance(slot, slot_phase, LIST_QUEUE)
            tiles_done += 1
            item += step
        if tiles_done > 0:
            if cutlass.const_expr(self.keep_sums):
                self.add_to_output(sums, 0, self.row_units, tokens, count, warp, lane, accum)
            self.finish_tokens(tokens, count, tiles_done, pair_expert, thread, totals)

    @cute.jit
    def up_chunk(self, ring, stage_row, rows, warp, lane, x, up_sums):
        """Partial u [SLOTS, TOKENS] of this warp's share of the hidden dimension -> up_sums."""
        row_of_lane = cutlass.min(lane & 7, rows - 1)
        chains = 4 if self.row_units <= 8 else 2  # more would spill
        sums = self.rows_times_x(ring, stage_row, row_of_lane, warp, lane, self.row_units, SLOTS, chains, x)
        for c in cutlass.range_constexpr(2):
            up_sums[warp * SLOTS + lane // 4, (lane % 4) * 2 + c] = sums[c]

    @cute.jit
    def multiply(self, slot, start, rows, thread, up_sums, coefficients, up_biases, products):
        """h [token, slot] = bf16(a * r * u), zero past the last active row. Two barriers of the up/down warps."""
        threads, first_slot = 32 * self.row_warps, slot * self.NT + start
        cute.arch.barrier(barrier_id=ROW_BARRIER, number_of_threads=threads)
        if thread < SLOTS * TOKENS:
            position, token = thread // TOKENS, thread % TOKENS
            h = F32(0.0)
            if position < rows:
                up = F32(0.0)
                for w in cutlass.range_constexpr(self.row_warps):
                    up += up_sums[w * SLOTS + position, token]
                if cutlass.const_expr(self.has_bias):
                    up += F32(up_biases[slot, start + position])
                coefficient = coefficients[first_slot + position, token]
                if coefficient != 0.0:
                    h = coefficient * transform_up(up, self.activation)
            products[token, position] = BF16(h)
        cute.arch.barrier(barrier_id=ROW_BARRIER, number_of_threads=threads)

    @cute.jit
    def down_chunk(self, ring, stage_row, rows, warp, lane, products, sums, tokens, count, accum):
        """sums [4, 2, units] += down rows^T . h for the warp's columns; h of slots past ``rows`` is zero.

        Without keep_sums, sums has room for one unit, which is added to accum at once. With it, returns bits of every
        MMA's result: what is computed from them comes after all that was read of the stage (RowRing.release).
        """
        seen = I32(0)
        load, mma = load_matrices(True), mma_16x8x8()
        h = cute.make_rmem_tensor((2,), BF16)
        for c in cutlass.range_constexpr(2):
            h[c] = products[lane // 4, (lane % 4) * 2 + c]
        b = cute.make_tensor(h.iterator, cute.make_layout((2, 1), stride=(1, 0)))
        address = (stage_row + cutlass.min(lane & 7, rows - 1)) * self.pitch + (lane >> 3) * 8
        for u in cutlass.range_constexpr(self.row_units):
            unit = warp * self.row_units + u
            if cutlass.const_expr(self.ragged):
                unit = cutlass.min(unit, I32(self.units - 1))
            columns = cute.make_rmem_tensor((8,), BF16)
            cute.copy(load, vector(ring.iterator, address + unit * 32), columns)
            place = u if cutlass.const_expr(self.keep_sums) else 0
            for half in cutlass.range_constexpr(2):
                a = cute.make_tensor(columns.iterator + 4 * half, cute.make_layout(((2, 2), 1), stride=((1, 2), 0)))
                c = cute.make_tensor(sums[None, half, place].iterator, cute.make_layout((4, 1, 1), stride=(1, 0, 0)))
                cute.gemm(mma, c, a, b, c)
                if cutlass.const_expr(self.keep_sums):
                    seen |= cute.recast_tensor(sums[None, half, place], I32)[0]
            if cutlass.const_expr(not self.keep_sums):
                self.add_to_output(sums, u, 1, tokens, count, warp, lane, accum)
        return seen
