"""TokenSums: how the fused kernel's up/down warps bring their results to the output.

``accum`` [T, H] fp32 holds the sums of all CTAs, ``counters`` [T] how many items of each token are in them. Whoever
completes a token rounds its row to ``out`` and leaves both zero.
"""

from __future__ import annotations

import cutlass
import cutlass.cute as cute

from .primitives import BF16, F32, I32, I64, reduce_add, vector
from .routing import PairTable
from .row_ring import RowRing

ROW_BARRIER = 2  # named barrier of the up/down warps


class TokenSums(RowRing):
    """table: of the batch's pairs; tiles: items of one block; row_warps: the up/down warps; row_units: units of 32
    columns that one of them sums. ``thread`` counts the up/down warps' threads from 0."""

    table: PairTable
    tiles: int
    row_warps: int
    row_units: int

    @cute.jit
    def clear_unrouted(self, pair_expert, out, thread, cta, num_ctas):
        """Zeros for tokens that no pair computes here."""
        for token in cutlass.range(cta, cute.size(out, mode=[0]), num_ctas, unroll=1):
            if self.table.pairs_of_token(token, pair_expert) == 0:
                for column in cutlass.range(thread, self.H, 32 * self.row_warps, unroll=1):
                    out[token, column] = BF16(0.0)

    @cute.jit
    def add_to_output(
        self, sums, first_unit: cutlass.Constexpr, units: cutlass.Constexpr, tokens, count, warp, lane, accum
    ):
        """Adds units of sums to accum and clears them. Lane: tokens 2(lane % 4) + c, columns lane // 4 + 8h."""
        for c in cutlass.range_constexpr(2):
            slot = (lane % 4) * 2 + c
            if slot < count:
                row = accum.iterator + I64(tokens[slot]) * self.H
                for u in cutlass.range_constexpr(units):
                    unit = warp * self.row_units + first_unit + u
                    if unit < self.units:
                        for half in cutlass.range_constexpr(2):
                            for h in cutlass.range_constexpr(2):
                                column = unit * 32 + half * 16 + h * 8 + lane // 4
                                reduce_add(row + column, sums[2 * h + c, half, u])
        sums.fill(0.0)

    @cute.jit
    def add_down_bias(self, w2_bias, tile, expert, tokens, weights, count, thread, accum):
        """With a block's first item: adds the expert's down bias, times the routing weight unless x had it.

        So it is added once for every pair, whatever neurons are active. All loads go before the first addition.
        """
        threads, vectors = 32 * self.row_warps, self.H // 8
        rounds = -(-vectors // threads)
        if tile == 0:
            bias = cute.make_rmem_tensor((8, rounds), BF16)
            for i in cutlass.range_constexpr(rounds):
                group = cutlass.min(thread + i * threads, I32(vectors - 1))
                cute.autovec_copy(vector(w2_bias.iterator, I64(expert) * self.H + group * 8), bias[None, i])
            for slot in cutlass.range(count, unroll=1):
                weight = F32(1.0)
                if cutlass.const_expr(not self.weight_on_input):
                    weight = weights[slot]
                row = accum.iterator + I64(tokens[slot]) * self.H
                for i in cutlass.range_constexpr(rounds):
                    group = thread + i * threads
                    if group < vectors:
                        for c in cutlass.range_constexpr(8):
                            reduce_add(row + (group * 8 + c), F32(bias[c, i]) * weight)

    @cute.jit
    def finish_tokens(self, tokens, count, tiles_done, pair_expert, thread, totals):
        """Counts the block's items for each of its tokens; whoever completes a token casts its row and clears it."""
        accum, counters, out, complete, _ = totals
        threads = 32 * self.row_warps
        token = tokens[cutlass.min(thread, count - 1)]
        expected = self.table.pairs_of_token(token, pair_expert) * self.tiles
        cute.arch.barrier(barrier_id=ROW_BARRIER, number_of_threads=threads)
        if thread < count:
            # Releases the additions of all threads that met at the barrier, and acquires those of other CTAs.
            done = cute.arch.atomic_add(counters.iterator + token, tiles_done, sem="acq_rel", scope="gpu")
            complete[thread] = I32(1) if done + tiles_done == expected else I32(0)
        cute.arch.barrier(barrier_id=ROW_BARRIER, number_of_threads=threads)
        for slot in cutlass.range(count, unroll=1):
            if complete[slot] != 0:
                token = tokens[slot]
                row = I64(token) * self.H
                for group in cutlass.range(thread, self.H // 4, threads, unroll=1):
                    values = cute.make_rmem_tensor((4,), F32)
                    source = vector(accum.iterator, row + group * 4, 4, 4)
                    cute.autovec_copy(source, values)
                    cast = cute.make_rmem_tensor((4,), BF16)
                    for c in cutlass.range_constexpr(4):
                        cast[c] = BF16(values[c])
                        values[c] = F32(0.0)
                    cute.autovec_copy(values, source)
                    cute.autovec_copy(cast, vector(out.iterator, row + group * 4, 4, 4))
                if thread == 0:
                    counters[token] = 0
