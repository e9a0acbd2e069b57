"""What the staged kernels share: a ring of weight and token tiles in shared memory, and the product over it.

All three products of the path have the same form. Weights are the M side, tokens the N side of

    c[m, t] += sum over k of a[m, k] * b[t, k]        m: 64 rows of a block, t: up to token_block tokens

and both operands come through a ring of ``stages`` tiles in shared memory, filled by 16-byte cp.async, so that the
bytes in flight (stages - 1 tiles for each CTA) cost no registers. The same threads load and multiply:

    load tiles 0 .. stages-2
    for each tile:   wait for it | CTA barrier | load the tile stages-1 ahead | multiply

Every 64-element line of a tile is 128 bytes in shared memory, its 16-byte chunks exchanged by chunk ^ (line % 8): the
128-byte swizzle of wgmma (PTX ISA, "Asynchronous Warpgroup Level Matrix Shared Memory Layout"), which also keeps
ldmatrix free of bank conflicts. Two back ends multiply it: warp MMA (mma.m16n8k16 by ldmatrix) and wgmma (m64nNk16,
both operands from shared memory). Their accumulators have the same layout: thread (warp w, lane l) holds of every 8
tokens and 64 rows

    acc[c, h, j]:  row 16 w + l / 4 + 8 h,  token 8 j + 2 (l % 4) + c
"""

from __future__ import annotations

from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass.cute.nvgpu import OperandMajorMode, warpgroup
from cutlass.utils import hopper_helpers

from ..configs import StagedConfig
from .primitives import (
    BF16,
    F32,
    I32,
    U32,
    async_copy,
    in_vector_register,
    load_matrices,
    mma_16x8x16,
    opaque_zero,
    vector,
)

THREADS = 128  # one warp group
ROWS = 64  # rows of one block of weights: the M of wgmma
LINE = 64  # elements of one swizzled line of 128 bytes


@dataclass(frozen=True)
class StagedSpec:
    """Everything about a layer and its tiling that is fixed when the staged kernels are compiled.

    Vocabulary as in shapes.MoEShape and configs.StagedConfig. Weights, activations and output are bf16, index buffers
    int32, thresholds, routing weights and sums fp32. An *item* is one expert and up to token_block of its tokens.

    Tensors that several kernels take go together, in tuples:

        routed   topk_weights [T, k], items [max_items, 4], sorted_pairs [T*k]                      by route_sort
        lists    counts [max_items, tiles], neurons and gates [max_items, capacity (, block)]     by gate_compact
        active   numbers [max_items], slots [max_items, capacity], hidden [max_items, block, capacity]   by sparse_up
    """

    hidden_size: int
    intermediate_size: int
    num_experts: int
    top_k: int
    config: StagedConfig
    activation: str = "silu"
    router_weighted: bool = True
    weight_on_input: bool = False
    has_expert_map: bool = False
    has_bias: bool = False
    deterministic: bool = False

    @property
    def token_block(self) -> int:
        """Tokens of one item at most: the N side of the products."""
        return self.config.token_block

    @property
    def tiles(self) -> int:
        """Tiles of 64 neurons of one expert, the last one possibly short."""
        return -(-self.intermediate_size // ROWS)

    @property
    def capacity(self) -> int:
        """Slots of one item's lists: every neuron of the expert, rounded up to whole tiles."""
        return self.tiles * ROWS

    @property
    def row_blocks(self) -> int:
        """CTAs that share the gate or the up product of one item at most."""
        return -(-self.tiles // self.config.row_groups)

    @property
    def by_item(self) -> bool:
        """Whether up and down wait for their item alone instead of the whole kernel before them."""
        return self.config.overlap == 2

    @property
    def up_rows(self) -> int:
        """Active rows that one CTA of the up product takes at most."""
        return min(self.config.up_rows, ROWS * self.config.row_groups)

    @property
    def up_blocks(self) -> int:
        """CTAs of the up product of one item, those that find no neuron included."""
        return -(-self.intermediate_size // self.up_rows)

    def begin(self) -> None:
        """First thing in a kernel: waits for the kernel before it, and lets the next one get ready."""
        if self.config.overlap:
            cute.arch.griddepcontrol_wait()
            cute.arch.griddepcontrol_launch_dependents()

    def begin_item(self, items, item, arrivals: int, thread) -> None:
        """begin for a CTA that needs what the kernels before it wrote for its item, and nothing else.

        With by_item, waits until so many of their CTAs have called end_item. All of them run already: this grid starts
        after the last one of them has let it. What route_sort wrote can be read then too; for an item that is none, it
        has written a number that nobody waits for.
        """
        if not self.by_item:
            self.begin()
            return
        cute.arch.griddepcontrol_launch_dependents()
        await_arrivals(items, item, arrivals, thread)

    def end_item(self, items, item, thread) -> None:
        """Last thing in a CTA that worked on an item: what its threads wrote can be read by who waits for the item."""
        if self.by_item:
            cute.arch.sync_threads()
            arrive(items, item, thread)

    def end(self) -> None:
        """Last thing in a CTA that began with begin_item, whether its item is one or not.

        So combine, which waits for the last kernel of them, has waited for all: the next layer's items are not written
        while a CTA may still read these.
        """
        if self.by_item:
            cute.arch.griddepcontrol_wait()

    def launch(self, kernel, grid, threads: int, stream) -> None:
        """Launches a kernel that reads weights: as many CTAs of it on an SM as shared memory holds, at least two."""
        kernel.launch(
            grid=grid,
            block=(threads, 1, 1),
            stream=stream,
            min_blocks_per_mp=2,
            preferred_smem_carveout=100,
            use_pdl=bool(self.config.overlap),
        )

    def row_ring(self) -> TileRing:
        """Ring of the gate and up products."""
        config = self.config
        return TileRing(
            config.token_block, config.row_stages, config.row_atoms, bool(config.wgmma), True, config.row_groups
        )

    def down_ring(self) -> TileRing:
        """Ring of the down product."""
        config = self.config
        return TileRing(config.token_block, config.down_stages, config.down_atoms, bool(config.wgmma), False)


class TileRing:
    """Ring of ``stages`` tiles and the product over them.

    A tile holds ``lines`` = 64 * groups lines of weights, and ``token_block`` lines of tokens, ``atoms`` times
    (atom-major). row_major True: a line is 64 elements of one weight row, k runs along it, a tile covers 64 * atoms of
    k for weights and tokens alike (gate and up). Each of ``groups`` warp groups multiplies 64 of the rows. False: a
    line is 64 hidden columns of one gathered row, k runs over the lines; ``atoms`` blocks of 64 columns, the tokens'
    lines of 64 slots once (down, one group).
    """

    def __init__(self, token_block: int, stages: int, atoms: int, wgmma: bool, row_major: bool, groups: int = 1):
        self.token_block, self.stages, self.atoms = token_block, stages, atoms
        self.wgmma, self.row_major = wgmma, row_major
        self.threads, self.lines = THREADS * groups, ROWS * groups
        self.line_step = 16 * groups  # from one line of a thread to its next
        self.a_size = self.lines * LINE * atoms
        self.b_size = token_block * LINE * (atoms if row_major else 1)
        self.stage_size = self.a_size + self.b_size
        self.blocks = 1 if row_major else atoms  # blocks of 64 rows of c
        self.b_loads = max(1, token_block // self.line_step)

    def allocate(self, smem):
        """The ring, bf16 in shared memory, aligned for the swizzle."""
        return smem.allocate_tensor(BF16, cute.make_layout((self.stages * self.stage_size,)), 1024)

    def accumulators(self):
        """fp32 [(2, 2, token_block / 8), blocks], zeroed."""
        acc = cute.make_rmem_tensor(cute.make_layout(((2, 2, self.token_block // 8), self.blocks)), F32)
        acc.fill(0.0)
        return acc

    # ---- filling: thread t handles chunk t % 8 of lines t / 8 + line_step * i

    @cute.jit
    def place(self, thread: cutlass.Int32):
        """Offset of this thread's chunk of its first line in a block of lines."""
        line = thread // 8
        return line * LINE + ((thread % 8) ^ (line % 8)) * 8

    @cute.jit
    def clear(self, ring: cute.Tensor, a_rows: cute.Tensor, b_rows: cute.Tensor, thread: cutlass.Int32):
        """Zeroes, in every stage, the lines that will never be loaded (row -1), so that no product reads garbage."""
        place = self.place(thread)
        for s in cutlass.range(self.stages, unroll=1):
            offset = place + s * self.stage_size
            if cutlass.const_expr(self.row_major):
                self.zero_lines(ring, offset, a_rows, 4, self.atoms, self.lines)
            atoms = self.atoms if cutlass.const_expr(self.row_major) else 1
            self.zero_lines(ring, offset + self.a_size, b_rows, self.b_loads, atoms, self.token_block)

    def address(self, ring, offset):
        """Shared address of an element of the ring, for load_lines. By all lanes of the warp."""
        return in_vector_register(I32(ring.iterator.toint()) + 2 * offset)

    @cute.jit
    def load_lines(
        self,
        target: cutlass.Int32,
        source: cute.Pointer,
        rows: cute.Tensor,
        count: cutlass.Constexpr,
        pitch: cutlass.Constexpr,
        atoms: cutlass.Constexpr,
        lines: cutlass.Constexpr,
        weights: cutlass.Constexpr,
    ):
        """cp.async of ``count`` lines of this thread, ``atoms`` consecutive lines of 64 elements of each row.

        target: shared address of the first line, this thread's place included. source: address of row 0, this thread's
        chunk and the position along k included. rows: row index per line; negative: skipped. pitch: elements from row
        to row. lines: lines of the whole operand, the distance from atom to atom. weights: see primitives.async_copy.
        """
        for i in cutlass.range_constexpr(count):
            if rows[i] >= 0:
                for k in cutlass.range_constexpr(atoms):
                    line = i * self.line_step + k * lines
                    async_copy(source + (rows[i] * pitch + k * LINE), target + 2 * LINE * line, weights)

    @cute.jit
    def zero_lines(
        self,
        ring: cute.Tensor,
        offset: cutlass.Int32,
        rows: cute.Tensor,
        count: cutlass.Constexpr,
        atoms: cutlass.Constexpr,
        lines: cutlass.Constexpr,
    ):
        """Zeroes this thread's lines whose row is -1. offset: of its first one in the ring; the rest as load_lines."""
        zero = cute.make_rmem_tensor((8,), BF16)
        zero.fill(0.0)
        for i in cutlass.range_constexpr(count):
            if rows[i] == -1:
                for k in cutlass.range_constexpr(atoms):
                    line = i * self.line_step + k * lines
                    cute.autovec_copy(zero, vector(ring.iterator, offset + line * LINE))

    @cute.jit
    def wait_for_tile(self):
        """Returns when the oldest tile in flight has landed for all threads, and all have left the tile before it."""
        cute.arch.cp_async_wait_group(self.stages - 2)
        if cutlass.const_expr(self.wgmma):
            cute.arch.fence_proxy("async.shared", space="cta")
        cute.arch.sync_threads()

    @cute.jit
    def product_of_rows(
        self,
        ring: cute.Tensor,
        weights: cute.Pointer,
        a_rows: cute.Tensor,
        tokens: cute.Pointer,
        b_rows: cute.Tensor,
        acc: cute.Tensor,
        thread: cutlass.Int32,
        depth: cutlass.Constexpr,
    ):
        """acc[m, t] += weights[a_rows[m], :] . tokens[b_rows[t], :], both with rows of ``depth`` elements.

        a_rows [4], b_rows [b_loads]: rows of this thread's lines (thread / 8 + line_step * i); -1: a line of zeros,
        -2: no line at all.
        """
        step = LINE * self.atoms
        tiles = depth // step
        place = self.place(thread)
        chunk = (thread % 8) * 8
        source_a = weights + cute.assume(chunk, divby=8)
        source_b = tokens + cute.assume(chunk, divby=8)
        self.clear(ring, a_rows, b_rows, thread)
        for s in cutlass.range(self.stages - 1, unroll=1):
            if s < tiles:
                self.load_rows(ring, place + s * self.stage_size, source_a, a_rows, source_b, b_rows, s * step, depth)
            cute.arch.cp_async_commit_group()
        stage, fill = I32(0), I32(self.stages - 1)
        turns = I32(tiles)
        if cutlass.const_expr(self.wgmma and tiles == 1):
            # Of a loop of one turn the compiler makes no loop, and sets acc to zero behind the fence of the wgmma that
            # adds to it.
            turns += opaque_zero()
        for tile in cutlass.range(turns, unroll=1):
            self.wait_for_tile()
            ahead = tile + (self.stages - 1)
            if ahead < tiles:
                offset = place + fill * self.stage_size
                self.load_rows(ring, offset, source_a, a_rows, source_b, b_rows, ahead * step, depth)
            cute.arch.cp_async_commit_group()
            self.multiply(ring, stage, acc, thread)
            stage = self.next_stage(stage)
            fill = self.next_stage(fill)

    @cute.jit
    def next_stage(self, stage: cutlass.Int32) -> cutlass.Int32:
        following = stage + 1
        return I32(0) if following == self.stages else following

    @cute.jit
    def load_rows(self, ring, offset, source_a, a_rows, source_b, b_rows, k, depth: cutlass.Constexpr):
        """One tile of a row-major ring: the weight rows and token_block token rows from k on."""
        a = source_a + cute.assume(k, divby=LINE)
        b = source_b + cute.assume(k, divby=LINE)
        target = self.address(ring, offset)
        self.load_lines(target, a, a_rows, 4, depth, self.atoms, self.lines, True)
        target += 2 * self.a_size
        self.load_lines(target, b, b_rows, self.b_loads, depth, self.atoms, self.token_block, False)

    # ---- multiplying

    @cute.jit
    def multiply(self, ring: cute.Tensor, stage: cutlass.Int32, acc: cute.Tensor, thread: cutlass.Int32):
        """acc += the tile in ``stage``. Waits until this warp group's reads of it are over."""
        if cutlass.const_expr(self.wgmma):
            self.multiply_wgmma(ring, stage, acc, thread)
        else:
            self.multiply_warp(ring, stage, acc, thread)

    @cute.jit
    def multiply_warp(self, ring: cute.Tensor, stage: cutlass.Int32, acc: cute.Tensor, thread: cutlass.Int32):
        mma = mma_16x8x16()
        lane, warp, group = thread % 32, (thread % THREADS) // 32, thread // THREADS
        base = stage * self.stage_size + group * (ROWS * LINE)
        tokens = stage * self.stage_size + self.a_size
        a = cute.make_rmem_tensor((8,), BF16)
        b = cute.make_rmem_tensor((8, self.token_block // 16), BF16)
        # lane l addresses line l % 8 of matrix l / 8; which quarter of the fragment a matrix is, is chosen here
        low, quarter = lane % 8, lane // 8
        for k in cutlass.range_constexpr(4 * (self.atoms if self.row_major else 1)):
            atom, chunk = k // 4, (k % 4) * 2
            for n in cutlass.range_constexpr(self.token_block // 16):
                line = n * 16 + (quarter // 2) * 8 + low
                offset = atom * (self.token_block * LINE) + line * LINE + ((chunk + quarter % 2) ^ low) * 8
                self.matrices(ring, tokens + offset, b[None, n], False)
            for block in cutlass.range_constexpr(self.blocks):
                if cutlass.const_expr(self.row_major):
                    line = warp * 16 + (quarter % 2) * 8 + low
                    offset = atom * (self.lines * LINE) + line * LINE + ((chunk + quarter // 2) ^ low) * 8
                    self.matrices(ring, base + offset, a, False)
                else:
                    line = k * 16 + (quarter // 2) * 8 + low
                    offset = block * (ROWS * LINE) + line * LINE + ((warp * 2 + quarter % 2) ^ low) * 8
                    self.matrices(ring, base + offset, a, True)
                fa = cute.make_tensor(a.iterator, cute.make_layout(((2, 2, 2), 1), stride=((1, 2, 4), 0)))
                for j in cutlass.range_constexpr(self.token_block // 8):
                    fb = cute.make_tensor(b[None, j // 2].iterator + 4 * (j % 2), cute.make_layout((4, 1)))
                    c = cute.make_tensor(acc[(None, None, j), block].iterator, cute.make_layout((4, 1, 1)))
                    cute.gemm(mma, c, fa, fb, c)

    @cute.jit
    def matrices(self, ring: cute.Tensor, offset: cutlass.Int32, out: cute.Tensor, transpose: cutlass.Constexpr):
        source = cute.make_tensor(ring.iterator + cute.assume(offset, divby=8), cute.make_layout((8, 1)))
        cute.copy(load_matrices(transpose), source, cute.make_tensor(out.iterator, cute.make_layout((8, 1))))

    @cute.jit
    def multiply_wgmma(self, ring: cute.Tensor, stage: cutlass.Int32, acc: cute.Tensor, thread: cutlass.Int32):
        mma = hopper_helpers.make_trivial_tiled_mma(
            BF16,
            BF16,
            OperandMajorMode.K if self.row_major else OperandMajorMode.MN,
            OperandMajorMode.K,
            F32,
            (1, 1, 1),
            (ROWS, self.token_block),
        )
        group = cute.arch.make_warp_uniform(thread // THREADS)
        tile = ring.iterator + cute.assume(stage * self.stage_size, divby=512)
        base = tile + cute.assume(group * (ROWS * LINE), divby=512)
        thr = mma.get_slice(0)
        tokens = tile + self.a_size
        mma.set(warpgroup.Field.ACCUMULATE, True)
        warpgroup.fence()
        for k in cutlass.range_constexpr(4 * (self.atoms if self.row_major else 1)):
            atom = k // 4
            fb = self.operand(
                thr.partition_B, mma.make_fragment_B, tokens + atom * self.token_block * LINE, self.token_block, True
            )
            for block in cutlass.range_constexpr(self.blocks):
                lines = base + (atom if self.row_major else block) * self.lines * LINE
                fa = self.operand(thr.partition_A, mma.make_fragment_A, lines, ROWS, self.row_major)
                c = cute.make_tensor(acc[None, block].iterator, cute.make_layout(((2, 2, self.token_block // 8), 1, 1)))
                cute.gemm(mma, c, fa[None, None, k % 4], fb[None, None, k % 4], c)
        warpgroup.commit_group()
        warpgroup.wait_group(0)

    def operand(self, partition, make_fragment, pointer, lines: int, k_along_line: bool):
        """wgmma descriptors of a block of 64-element lines: [lines, k] if k runs along a line, else [64 columns, k]."""
        swizzle = cute.make_swizzle(3, 4, 3)
        if k_along_line:
            layout = cute.make_layout(((8, lines // 8), (LINE, 1)), stride=((LINE, 8 * LINE), (1, 0)))
        else:
            layout = cute.make_layout(((LINE, 1), (8, ROWS // 8)), stride=((1, 0), (LINE, 8 * LINE)))
        tile = cute.make_tensor(cute.recast_ptr(pointer, swizzle, dtype=BF16), layout)
        return make_fragment(partition(tile))


@cute.jit
def item_fields(items: cute.Tensor, item: cutlass.Int32):
    """(expert, first position, number of tokens) of an item; no tokens: past the last item."""
    fields = cute.make_rmem_tensor((4,), I32)
    cute.autovec_copy(vector(items.iterator, item * 4, 4, 4), fields)
    return fields[0], fields[1], fields[2]


@cute.jit
def arrive(items: cute.Tensor, item: cutlass.Int32, thread: cutlass.Int32):
    """One more CTA is done with an item; by all threads, after a barrier of theirs."""
    if thread == 0:
        cute.arch.atomic_add(items.iterator + (item * 4 + 3), I32(1), sem="release", scope="gpu")


@cute.jit
def await_arrivals(items: cute.Tensor, item: cutlass.Int32, arrivals: cutlass.Constexpr, thread: cutlass.Int32):
    """Until so many CTAs have arrived at an item; by all threads."""
    if thread == 0:
        arrived = I32(0)
        while arrived < arrivals:
            arrived = cute.arch.load(items.iterator + (item * 4 + 3), I32, sem="acquire", scope="gpu")
    cute.arch.sync_threads()


@cute.jit
def load_item(
    spec: cutlass.Constexpr,
    ring: cutlass.Constexpr,
    topk_weights: cute.Tensor,
    sorted_pairs: cute.Tensor,
    start: cutlass.Int32,
    num_tokens: cutlass.Int32,
    weights: cute.Tensor,
    thread: cutlass.Int32,
):
    """Rows of this thread's token lines (token, or pair where the tokens are scaled; -1 past the end, -2 no line).

    ``weights`` [token_block] in shared memory gets the routing weights, 0 past the end; visible after the next barrier.
    """
    rows = cute.make_rmem_tensor((ring.b_loads,), I32)
    for i in cutlass.range_constexpr(ring.b_loads):
        t = thread // 8 + i * ring.line_step
        rows[i] = I32(-1) if t < spec.token_block else I32(-2)
        if t < num_tokens:
            rows[i] = token_row(spec, sorted_pairs[start + t])
    if thread < spec.token_block:
        weight = F32(0.0)
        if thread < num_tokens:
            routing = cute.make_tensor(topk_weights.iterator, cute.make_layout((cute.size(topk_weights),)))
            weight = routing[sorted_pairs[start + thread]]
        weights[thread] = weight
    return rows


@cute.jit
def token_row(spec: cutlass.Constexpr, pair: cutlass.Int32) -> cutlass.Int32:
    """Row of the tokens tensor that belongs to a pair."""
    row = pair
    if cutlass.const_expr(not spec.weight_on_input):
        row = I32(U32(pair) // spec.top_k)
    return row
