"""gate_compact: the dense gate product of the staged path, thresholding, and compaction into index buffers.

One CTA = one item (an expert and up to token_block of its tokens) and one tile of 64 neurons for each warp group:

    1  g[n, t] = W_gate[n, :] . x[t, :]                          64 * H weights through the ring, read once
    2  a = act(g); neuron n is active for t unless |a| * r < tau
    3  compaction over the union of the item's tokens: ballot, popc, cross-warp offsets; slots in order of neurons
    4  counts[item, tile], and for each slot its neuron and a * r of every token (0 where that token is inactive);
       tokens in groups of 8, groups without a token left out

The lists have 64 entries per tile, so they cannot overflow. Grid: (tiles / warp groups, max_items), fixed by T;
CTAs past the number of items leave at once.
"""

from __future__ import annotations

import cutlass
import cutlass.cute as cute

from .compaction import offset_of_warp
from .primitives import F32, I32, I64, U32, SmemAllocator, activate_gate
from .staged_common import LINE, ROWS, THREADS, StagedSpec, item_fields, load_item


class GateCompact:
    """counts [max_items, tiles], neurons [max_items, tiles * 64] int32, gates [max_items, tiles * 64, block] fp32."""

    def __init__(self, spec: StagedSpec):
        self.spec, self.ring = spec, spec.row_ring()

    @cute.jit
    def launch(self, tokens, w13, w13_bias, thresholds, routed, lists, stream):
        self.spec.launch(
            self.kernel(tokens, w13, thresholds, routed, lists, w13_bias),
            (self.spec.row_blocks, cute.size(routed[1], mode=[0]), 1),
            self.ring.threads,
            stream,
        )

    @cute.kernel
    def kernel(
        self,
        tokens: cute.Tensor,
        w13: cute.Tensor,
        thresholds: cute.Tensor,
        routed: tuple,
        lists: tuple,
        w13_bias: cute.Tensor | None,
    ):
        spec = self.spec
        topk_weights, items, sorted_pairs = routed
        thread, _, _ = cute.arch.thread_idx()
        block, item, _ = cute.arch.block_idx()
        self.spec.begin()
        smem = SmemAllocator()
        ring = self.ring.allocate(smem)
        weights = smem.allocate_tensor(F32, cute.make_layout((spec.token_block,)), 16)
        warp_counts = smem.allocate_tensor(I32, cute.make_layout((4, spec.config.row_groups)), 16)
        expert, start, num_tokens = item_fields(items, item)
        if num_tokens > 0:
            b_rows = load_item(spec, self.ring, topk_weights, sorted_pairs, start, num_tokens, weights, thread)
            a_rows = cute.make_rmem_tensor((4,), I32)
            for i in cutlass.range_constexpr(4):
                row = block * self.ring.lines + (thread // 8 + i * self.ring.line_step)
                a_rows[i] = row if row < spec.intermediate_size else I32(-1)
            lane, warp = thread % 32, thread // 32
            first = block * self.ring.lines + warp * 16 + lane // 4
            tau = cute.make_rmem_tensor((2,), F32)
            for h in cutlass.range_constexpr(2):
                tau[h] = thresholds[expert, cutlass.min(first + 8 * h, I32(spec.intermediate_size - 1))]
            bias = self.load_bias(w13_bias, expert, first) if cutlass.const_expr(spec.has_bias) else None
            base = I64(expert) * (2 * spec.intermediate_size * spec.hidden_size)
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
            active = cute.make_rmem_tensor((2,), cutlass.Boolean)
            active.fill(False)
            for j in cutlass.range_constexpr(spec.token_block // 8):
                if 8 * j < num_tokens:
                    self.activate(acc, active, weights, bias, tau, first, num_tokens, j, lane)
            self.write_lists(active, acc, num_tokens, warp_counts, item, block, thread, lists)
            spec.end_item(items, item, thread)

    @cute.jit
    def load_bias(self, w13_bias, expert, first):
        """Gate biases of the two rows of this thread's accumulators."""
        bias = cute.make_rmem_tensor((2,), F32)
        for h in cutlass.range_constexpr(2):
            bias[h] = F32(w13_bias[expert, cutlass.min(first + 8 * h, I32(self.spec.intermediate_size - 1))])
        return bias

    @cute.jit
    def activate(self, acc, active, weights, bias, tau, first, num_tokens, j: cutlass.Constexpr, lane):
        """Tokens 8 j .. 8 j + 7: acc becomes a * r, 0 where inactive; active [2] |= this lane's rows with any."""
        spec = self.spec
        for c in cutlass.range_constexpr(2):
            t = 8 * j + 2 * (lane % 4) + c
            weight = weights[t]
            for h in cutlass.range_constexpr(2):
                gate = acc[(c, h, j), 0]
                if cutlass.const_expr(spec.has_bias):
                    gate = gate + bias[h]
                a = activate_gate(gate, spec.activation)
                score = cutlass.max(a, -a)
                if cutlass.const_expr(spec.router_weighted):
                    score = score * weight
                keep = t < num_tokens and first + 8 * h < spec.intermediate_size and not (score < tau[h])
                if cutlass.const_expr(not spec.weight_on_input):
                    a = a * weight
                acc[(c, h, j), 0] = a if keep else F32(0.0)
                active[h] = active[h] or keep

    @cute.jit
    def write_lists(self, active, acc, num_tokens, warp_counts, item, block, thread, lists):
        """Compaction of the rows whose four lanes (one row of the accumulators) hold any active token."""
        counts, neurons, gates = lists
        lane, warp, group = thread % 32, (thread % THREADS) // 32, thread // THREADS
        tile = block * self.spec.config.row_groups + group
        row, quarter = lane // 4, lane % 4
        rows = cute.make_rmem_tensor((2,), U32)  # bit 4 r: row r of this half is active
        for h in cutlass.range_constexpr(2):
            votes = U32(cute.arch.vote_ballot_sync(active[h]))
            votes = votes | (votes >> 1)
            rows[h] = (votes | (votes >> 2)) & 0x11111111
        below = (U32(1) << U32(4 * row)) - 1
        low_half = I32(cute.arch.popc(rows[0]))
        if lane == 0:
            warp_counts[warp, group] = low_half + I32(cute.arch.popc(rows[1]))
        cute.arch.sync_threads()
        before, total = offset_of_warp(warp_counts[None, group], warp, 4)
        if thread % THREADS == 0 and tile < self.spec.tiles:
            counts[item, tile] = total
        slot_of_item = I64(item) * self.spec.capacity + tile * ROWS
        for h in cutlass.range_constexpr(2):
            if (rows[h] >> U32(4 * row)) & 1 == 1:
                slot = before + I32(cute.arch.popc(rows[h] & below))
                if cutlass.const_expr(h == 1):
                    slot += low_half
                position = slot_of_item + slot
                if quarter == 0:
                    (neurons.iterator + position).store(tile * ROWS + warp * 16 + 8 * h + row)
                target = gates.iterator + cute.assume(position * self.spec.token_block + 2 * quarter, divby=2)
                for j in cutlass.range_constexpr(self.spec.token_block // 8):
                    if 8 * j < num_tokens:
                        pair = cute.make_tensor(acc[(None, h, j), 0].iterator, cute.make_layout((2,)))
                        cute.autovec_copy(pair, cute.make_tensor(target + 8 * j, cute.make_layout((2,))))
