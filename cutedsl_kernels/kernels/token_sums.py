"""TokenSums: how the fused kernel's up/down warps bring their results to the output.

``accum`` [T, H] fp32 holds the sums of all CTAs, ``counters`` [T] how many items of each token are in them. Whoever
completes a token rounds its row to ``out`` and leaves both zero.

Columns of accum are not in order: a lane of the down MMA holds columns 8 apart, and has its four of a unit of 32 side
by side here, so that it adds 16 bytes at a time. Column 8j + g of a unit is at 4g + j.
"""

from __future__ import annotations

import cutlass
import cutlass.cute as cute

from .primitives import BF16, F32, I32, I64, opaque_zero, reduce_add, reduce_add_vector, vector
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
        # Without adding this zero the compiler keeps the sums in the order in which they are added here, and moves them
        # for every MMA.
        zero = F32(opaque_zero())
        first_column = (warp * self.row_units + first_unit) * 32 + lane // 4 * 4
        for c in cutlass.range_constexpr(2):
            slot = (lane % 4) * 2 + c
            if slot < count:
                row = accum.iterator + (I64(tokens[slot]) * self.H + first_column)
                for u in cutlass.range_constexpr(units):
                    inside = True
                    if cutlass.const_expr(self.ragged):
                        inside = warp * self.row_units + first_unit + u < self.units
                    if inside:
                        values = [sums[2 * h + c, half, u] + zero for half in range(2) for h in range(2)]
                        reduce_add_vector(row + u * 32, values)
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
                            place = group // 4 * 32 + c * 4 + group % 4  # of column 8 * group + c
                            reduce_add(row + place, F32(bias[c, i]) * weight)

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
                    column = group // 8 * 32 + group % 8  # of the first of four, 8 apart
                    for c in cutlass.range_constexpr(4):
                        (out.iterator + (row + column + 8 * c)).store(BF16(values[c]))
                        values[c] = F32(0.0)
                    cute.autovec_copy(values, source)
                if thread == 0:
                    counters[token] = 0
