"""sparse_up: the up product of the staged path over active neurons only.

One CTA = one item and one block of up to up_rows slots of its concatenated list (all tiles of the expert, in order of
neurons):

    1  prefix sum over the item's counts; the list is cut into blocks of equal size, as few as possible; others leave
    2  slot -> (tile, position) by binary search -> neuron; the list is also written out in one piece for sparse_down
    3  u[s, t] = W_up[neuron of s, :] . x[t, :]                  gathered rows through the ring, each read once
    4  h = a * r * transform(u), rounded to bf16, hidden[item, t, s]; 0 up to a multiple of 64 slots

Grid: (I / up_rows, max_items), fixed by T.
"""

from __future__ import annotations

import cutlass
import cutlass.cute as cute

from .compaction import inclusive_sum
from .primitives import BF16, F32, I32, I64, SmemAllocator, transform_up
from .staged_common import LINE, ROWS, StagedSpec, item_fields, load_item


class SparseUp:
    """numbers [max_items] int32 (active neurons of an item), slots [max_items, tiles * 64] int32 (their neurons),
    hidden [max_items, token_block, tiles * 64] bf16."""

    def __init__(self, spec: StagedSpec):
        self.spec, self.ring = spec, spec.row_ring()
        self.rows = spec.up_rows

    @cute.jit
    def launch(self, tokens, w13, w13_bias, routed, lists, active, stream):
        self.spec.launch(
            self.kernel(tokens, w13, routed, lists, active, w13_bias),
            (self.spec.up_blocks, cute.size(routed[1], mode=[0]), 1),
            self.ring.threads,
            stream,
        )

    @cute.kernel
    def kernel(
        self,
        tokens: cute.Tensor,
        w13: cute.Tensor,
        routed: tuple,
        lists: tuple,
        active: tuple,
        w13_bias: cute.Tensor | None,
    ):
        spec = self.spec
        topk_weights, items, sorted_pairs = routed
        counts, neurons, gates = lists
        numbers, slots, hidden = active
        thread, _, _ = cute.arch.thread_idx()
        block, item, _ = cute.arch.block_idx()
        spec.begin_item(items, item, spec.row_blocks, thread)
        smem = SmemAllocator()
        ring = self.ring.allocate(smem)
        weights = smem.allocate_tensor(F32, cute.make_layout((spec.token_block,)), 16)
        prefix = smem.allocate_tensor(I32, cute.make_layout((spec.tiles + 1,)), 16)
        slot_position = smem.allocate_tensor(I32, cute.make_layout((self.ring.lines,)), 16)
        slot_neuron = smem.allocate_tensor(I32, cute.make_layout((self.ring.lines,)), 16)
        expert, start, num_tokens = item_fields(items, item)
        if num_tokens > 0:
            if thread < 32:
                self.sum_counts(counts, item, prefix, thread)
            cute.arch.sync_threads()
            total = prefix[spec.tiles]
            if block == 0 and thread == 0:
                numbers[item] = total
            blocks = (total + (self.rows - 1)) // self.rows
            if block < blocks:
                size = (total + blocks - 1) // blocks
                first = block * size
                last = cutlass.min(first + size, total)
                b_rows = load_item(spec, self.ring, topk_weights, sorted_pairs, start, num_tokens, weights, thread)
                list_base = I64(item) * spec.capacity
                if thread < self.ring.lines:
                    slot = first + thread
                    neuron = I32(-1)
                    position = I32(0)
                    if slot < last:
                        position = self.position_of_slot(prefix, slot)
                        neuron = (neurons.iterator + (list_base + position)).load()
                        (slots.iterator + (list_base + slot)).store(neuron)
                    slot_position[thread] = position
                    slot_neuron[thread] = neuron
                cute.arch.sync_threads()
                a_rows = cute.make_rmem_tensor((4,), I32)
                for i in cutlass.range_constexpr(4):
                    a_rows[i] = slot_neuron[thread // 8 + i * self.ring.line_step]
                bias = None
                if cutlass.const_expr(spec.has_bias):
                    bias = self.load_bias(w13_bias, expert, slot_neuron, thread)
                base = (I64(expert) * 2 + 1) * (spec.intermediate_size * spec.hidden_size)
                acc = self.ring.accumulators()
                self.ring.product_of_rows(
                    ring,
                    w13.iterator + cute.assume(base, divby=LINE),
                    a_rows,
                    tokens.iterator,
                    b_rows,
                    acc,
                    thread,
                    spec.hidden_size,
                )
                self.write_hidden(acc, bias, slot_position, gates, hidden, item, first, last, num_tokens, thread)
                if last == total:
                    self.write_padding(hidden, item, total, num_tokens, thread)
            spec.end_item(items, item, thread)
        spec.end()

    @cute.jit
    def load_bias(self, w13_bias, expert, slot_neuron, thread):
        """Up biases of the two rows of this thread's accumulators; any number for a row without a neuron."""
        lane, warp = thread % 32, thread // 32
        bias = cute.make_rmem_tensor((2,), F32)
        for h in cutlass.range_constexpr(2):
            neuron = cutlass.max(slot_neuron[warp * 16 + lane // 4 + 8 * h], I32(0))
            bias[h] = F32(w13_bias[expert, self.spec.intermediate_size + neuron])
        return bias

    @cute.jit
    def write_hidden(self, acc, bias, slot_position, gates, hidden, item, first, last, num_tokens, thread):
        spec = self.spec
        lane, warp = thread % 32, thread // 32
        gate = cute.make_rmem_tensor((2,), F32)
        for h in cutlass.range_constexpr(2):
            row = warp * 16 + lane // 4 + 8 * h
            slot = first + row
            if slot < last:
                source = (I64(item) * spec.capacity + slot_position[row]) * spec.token_block + 2 * (lane % 4)
                source = gates.iterator + cute.assume(source, divby=2)
                for j in cutlass.range_constexpr(spec.token_block // 8):
                    if 8 * j < num_tokens:
                        cute.autovec_copy(cute.make_tensor(source + 8 * j, cute.make_layout((2,))), gate)
                        for c in cutlass.range_constexpr(2):
                            t = 8 * j + 2 * (lane % 4) + c
                            u = acc[(c, h, j), 0]
                            if cutlass.const_expr(spec.has_bias):
                                u = u + bias[h]
                            u = transform_up(u, spec.activation)
                            if t < num_tokens:
                                target = (I64(item) * spec.token_block + t) * spec.capacity + slot
                                (hidden.iterator + target).store(BF16(gate[c] * u))

    @cute.jit
    def write_padding(self, hidden, item, total, num_tokens, thread):
        """Zeroes the slots from the end of the list to the next multiple of 64, which sparse_down reads."""
        slot = total + thread % ROWS
        if slot < (total + (ROWS - 1)) // ROWS * ROWS:
            for t in cutlass.range(thread // ROWS, num_tokens, self.ring.threads // ROWS, unroll=1):
                target = (I64(item) * self.spec.token_block + t) * self.spec.capacity + slot
                (hidden.iterator + target).store(BF16(0.0))

    @cute.jit
    def sum_counts(self, counts, item, prefix, lane):
        """One warp: prefix[tile] = active neurons before the tile, prefix[tiles] = all."""
        tiles = self.spec.tiles
        carried = I32(0)
        for i in cutlass.range_constexpr((tiles + 31) // 32):
            tile = i * 32 + lane
            count = I32(0)
            if tile < tiles:
                count = counts[item, tile]
            total = inclusive_sum(count, lane)
            if tile < tiles:
                prefix[tile + 1] = carried + total
            carried += cute.arch.shuffle_sync(total, 31)
        if lane == 0:
            prefix[0] = 0

    @cute.jit
    def position_of_slot(self, prefix, slot):
        """Position in the per-tile lists: the last tile with prefix <= slot, found by halving."""
        tiles = self.spec.tiles
        tile = I32(0)
        for bit in cutlass.range_constexpr((tiles - 1).bit_length()):
            step = 1 << ((tiles - 1).bit_length() - 1 - bit)
            candidate = cutlass.min(tile + step, I32(tiles))  # prefix[tiles] is more than any slot
            if prefix[candidate] <= slot:
                tile = candidate
        return tile * ROWS + (slot - prefix[tile])
