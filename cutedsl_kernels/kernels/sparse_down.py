"""sparse_down: the down product of the staged path over active neurons only, and the sum over a token's experts.

One CTA (one warp group) = one item, down_tiles tiles of 64 * down_atoms hidden columns, one of down_splits parts of the
item's active neurons:

    y[c, t] = sum over slots s of w2_rows[neuron of s, c] * h[t, s]    pieces of gathered rows through the ring

The weights of a tile are 64 slots by 64 * down_atoms columns with the columns contiguous (MN-major for wgmma, ldmatrix
with transposition for warp MMA). The result goes to the output in one of two ways:

    atomics         red.global.add.f32 into the zeroed fp32 sum [T, H]; the order of the additions is not defined
    deterministic   into partial [splits, T*k, H] fp32, one row for each pair and split, every element written once

Combine then rounds the sum to bf16, or adds a token's partial rows in order of splits and pairs first. Bitwise equal
results from run to run need the deterministic way. Grids: (H / columns of a CTA, max_items, splits) and
(T, H / 1024).
"""

from __future__ import annotations

import cutlass
import cutlass.cute as cute

from .primitives import BF16, F32, I32, I64, U32, SmemAllocator, reduce_add, vector
from .staged_common import LINE, ROWS, THREADS, StagedSpec, item_fields


class SparseDown:
    """total: the zeroed fp32 sum [T, H], or partial rows [splits * T*k, H]."""

    def __init__(self, spec: StagedSpec):
        self.spec, self.ring = spec, spec.down_ring()
        self.columns = LINE * spec.config.down_atoms
        self.column_tiles = spec.hidden_size // self.columns

    @cute.jit
    def launch(self, w2_rows, routed, active, total, stream):
        per_cta = self.spec.config.down_tiles
        self.spec.launch(
            self.kernel(w2_rows, routed[1:], active, total),
            (
                (self.column_tiles + per_cta - 1) // per_cta,
                cute.size(routed[1], mode=[0]),
                self.spec.config.down_splits,
            ),
            THREADS,
            stream,
        )

    @cute.kernel
    def kernel(
        self,
        w2_rows: cute.Tensor,
        routed: tuple,
        active: tuple,
        total: cute.Tensor,
    ):
        spec = self.spec
        items, sorted_pairs = routed
        numbers, slots, hidden = active
        thread, _, _ = cute.arch.thread_idx()
        part, item, split = cute.arch.block_idx()
        spec.begin_item(items, item, spec.row_blocks + spec.up_blocks, thread)
        smem = SmemAllocator()
        lines = self.ring.allocate(smem)
        pairs = smem.allocate_tensor(I32, cute.make_layout((spec.token_block,)), 16)
        expert, start, num_tokens = item_fields(items, item)
        if num_tokens > 0:
            count = numbers[item]
            tiles = (count + (ROWS - 1)) // ROWS
            per_split = (tiles + (spec.config.down_splits - 1)) // spec.config.down_splits
            begin = split * per_split
            end = cutlass.min(begin + per_split, tiles)
            if thread < spec.token_block:
                pair = I32(0)
                if thread < num_tokens:
                    pair = sorted_pairs[start + thread]
                pairs[thread] = pair
            first_column = part * (spec.config.down_tiles * self.columns)
            per_cta = cutlass.min(I32(spec.config.down_tiles), self.column_tiles - part * spec.config.down_tiles)
            # where the rows of this CTA's result start in `total`: its split's part, its first column
            base = I64(first_column)
            if cutlass.const_expr(spec.deterministic):
                base += I64(split * cute.size(sorted_pairs)) * spec.hidden_size
            result = total.iterator + base
            if begin < end:
                weights = I64(expert) * (spec.intermediate_size * spec.hidden_size) + first_column
                self.product(
                    lines,
                    w2_rows.iterator + cute.assume(weights, divby=LINE),
                    slots.iterator + I64(item) * spec.capacity,
                    hidden.iterator + cute.assume(I64(item) * (spec.token_block * spec.capacity), divby=LINE),
                    begin,
                    end,
                    per_cta,
                    count,
                    num_tokens,
                    pairs,
                    result,
                    thread,
                )
            elif cutlass.const_expr(spec.deterministic):
                cute.arch.sync_threads()
                acc = self.ring.accumulators()
                for column_tile in cutlass.range(per_cta, unroll=1):
                    self.write(acc, pairs, num_tokens, result + column_tile * self.columns, thread)
        spec.end()

    @cute.jit
    def product(self, lines, weights, slots, hidden, begin, end, per_cta, count, num_tokens, pairs, result, thread):
        """For ``per_cta`` column tiles: sum over tiles begin .. end of 64 slots, written when complete.

        The ring runs on from one column tile to the next. Rows of a tile are looked up one tile before they are loaded.
        """
        place = self.ring.place(thread)
        chunk = (thread % 8) * 8
        weights = weights + cute.assume(chunk, divby=8)
        hidden = hidden + cute.assume(chunk, divby=8)
        b_rows = cute.make_rmem_tensor((self.ring.b_loads,), I32)
        for i in cutlass.range_constexpr(self.ring.b_loads):
            t = thread // 8 + i * 16
            b_rows[i] = t if t < num_tokens else I32(-1)
        rows = cute.make_rmem_tensor((4,), I32)
        self.ring.clear(lines, rows, b_rows, thread)
        steps = (end - begin) * per_cta
        tile, column = begin, I32(0)  # the next to load
        for s in cutlass.range(self.ring.stages - 1, unroll=1):
            if s < steps:
                self.look_up(slots, tile, count, rows, thread)
                self.load_tile(
                    lines,
                    place + s * self.ring.stage_size,
                    weights + cute.assume(column, divby=LINE),
                    rows,
                    hidden,
                    b_rows,
                    tile,
                )
                tile += 1
                if tile == end:
                    tile = begin
                    column += self.columns
            cute.arch.cp_async_commit_group()
        self.look_up(slots, tile, count, rows, thread)
        acc = self.ring.accumulators()
        stage, fill = I32(0), I32(self.ring.stages - 1)
        left, done = end - begin, I32(0)  # tiles to add to this column tile; finished columns
        for step in cutlass.range(steps, unroll=1):
            self.ring.wait_for_tile()
            if step + (self.ring.stages - 1) < steps:
                offset = place + fill * self.ring.stage_size
                self.load_tile(lines, offset, weights + cute.assume(column, divby=LINE), rows, hidden, b_rows, tile)
                tile += 1
                if tile == end:
                    tile = begin
                    column += self.columns
            cute.arch.cp_async_commit_group()
            self.look_up(slots, tile, count, rows, thread)
            self.ring.multiply(lines, stage, acc, thread)
            stage = self.ring.next_stage(stage)
            fill = self.ring.next_stage(fill)
            left -= 1
            if left == 0:
                self.write(acc, pairs, num_tokens, result + done, thread)
                acc.fill(0.0)
                left = end - begin
                done += self.columns

    @cute.jit
    def look_up(self, slots, tile, count, rows, thread):
        """rows [4]: neurons of this thread's slots of a tile, -1 past the end of the list."""
        for i in cutlass.range_constexpr(4):
            slot = tile * ROWS + (thread // 8 + i * 16)
            rows[i] = I32(-1)
            if slot < count:
                rows[i] = (slots + slot).load()

    @cute.jit
    def load_tile(self, lines, offset, weights, rows, hidden, b_rows, tile):
        spec = self.spec
        target = self.ring.address(lines, offset)
        self.ring.load_lines(target, weights, rows, 4, spec.hidden_size, self.ring.atoms, ROWS, True)
        self.ring.zero_lines(lines, offset, rows, 4, self.ring.atoms, ROWS)
        source = hidden + cute.assume(tile * ROWS, divby=LINE)
        target += 2 * self.ring.a_size
        self.ring.load_lines(target, source, b_rows, self.ring.b_loads, spec.capacity, 1, spec.token_block, False)

    @cute.jit
    def write(self, acc, pairs, num_tokens, result, thread):
        """One column tile: stored to the pairs' rows (deterministic), or added to the tokens' rows."""
        lane, warp = thread % 32, thread // 32
        column = warp * 16 + lane // 4
        for j in cutlass.range_constexpr(self.spec.token_block // 8):
            for c in cutlass.range_constexpr(2):
                t = 8 * j + 2 * (lane % 4) + c
                if t < num_tokens:
                    row = pairs[t]
                    if cutlass.const_expr(not self.spec.deterministic):
                        row = I32(U32(row) // self.spec.top_k)
                    target = result + (I64(row) * self.spec.hidden_size + column)
                    for b in cutlass.range_constexpr(self.ring.blocks):
                        for h in cutlass.range_constexpr(2):
                            if cutlass.const_expr(self.spec.deterministic):
                                (target + (b * LINE + 8 * h)).store(acc[(c, h, j), b])
                            else:
                                reduce_add(target + (b * LINE + 8 * h), acc[(c, h, j), b])


class Combine:
    """out [T, H] bf16 from the fp32 sum, or from the partial rows of the kept pairs. One thread: 8 columns."""

    def __init__(self, spec: StagedSpec):
        self.spec = spec

    @cute.jit
    def launch(self, w2_bias, topk_weights, kept, total, out, stream):
        width = THREADS * 8
        weights = topk_weights if cutlass.const_expr(self.spec.has_bias) else None
        self.kernel(kept, total, out, weights, w2_bias).launch(
            grid=(cute.size(out, mode=[0]), (self.spec.hidden_size + width - 1) // width, 1),
            block=(THREADS, 1, 1),
            stream=stream,
            use_pdl=bool(self.spec.config.overlap),
        )

    @cute.kernel
    def kernel(
        self,
        kept: cute.Tensor,
        total: cute.Tensor,
        out: cute.Tensor,
        topk_weights: cute.Tensor | None,
        w2_bias: cute.Tensor | None,
    ):
        spec = self.spec
        thread, _, _ = cute.arch.thread_idx()
        token, part, _ = cute.arch.block_idx()
        column = (part * THREADS + thread) * 8
        self.spec.begin()
        if column < spec.hidden_size:
            result = cute.make_rmem_tensor((8,), F32)
            if cutlass.const_expr(spec.deterministic):
                result.fill(0.0)
                values = cute.make_rmem_tensor((8, spec.top_k), F32)
                for split in cutlass.range_constexpr(spec.config.down_splits):
                    values.fill(0.0)
                    for j in cutlass.range_constexpr(spec.top_k):  # all loads before the first use
                        pair = token * spec.top_k + j
                        if kept[pair] > 0 if cutlass.const_expr(spec.has_bias) else kept[pair] == 1:
                            row = I64(split * cute.size(kept) + pair) * spec.hidden_size + column
                            cute.autovec_copy(vector(total.iterator, row), values[None, j])
                    for j in cutlass.range_constexpr(spec.top_k):
                        for i in cutlass.range_constexpr(8):
                            result[i] = result[i] + values[i, j]
            else:
                cute.autovec_copy(vector(total.iterator, I64(token) * spec.hidden_size + column), result)
            if cutlass.const_expr(spec.has_bias):
                self.add_bias(result, token, column, kept, topk_weights, w2_bias)
            rounded = cute.make_rmem_tensor((8,), BF16)
            for i in cutlass.range_constexpr(8):
                rounded[i] = BF16(result[i])
            cute.autovec_copy(rounded, vector(out.iterator, I64(token) * spec.hidden_size + column))

    @cute.jit
    def add_bias(self, result, token, column, kept, topk_weights, w2_bias):
        """result [8] += the down biases of the token's kept pairs, times the routing weights unless x had them."""
        spec = self.spec
        weights = cute.make_rmem_tensor((spec.top_k,), F32)
        bias = cute.make_rmem_tensor((8, spec.top_k), BF16)
        bias.fill(0.0)
        for j in cutlass.range_constexpr(spec.top_k):  # all loads before the first use
            expert = kept[token * spec.top_k + j] - 1
            weights[j] = F32(1.0)
            if cutlass.const_expr(not spec.weight_on_input):
                weights[j] = topk_weights[token, j]
            if expert >= 0:
                row = I64(expert) * spec.hidden_size + column
                cute.autovec_copy(vector(w2_bias.iterator, row), bias[None, j])
            else:
                weights[j] = F32(0.0)
        for j in cutlass.range_constexpr(spec.top_k):
            for i in cutlass.range_constexpr(8):
                result[i] = result[i] + F32(bias[i, j]) * weights[j]
