"""RowRing: rows that bulk copies bring into a ring of stages in shared memory, and the MMA fragments made of them."""

from __future__ import annotations

import cutlass
import cutlass.cute as cute

from .primitives import BF16, F32, I32, I64, bulk_row_copy, load_matrices, mma_16x8x16, vector


class RowRing:
    """Base of kernels whose warps share the hidden dimension of rows in a ring.

    H: elements of a row; pitch: elements from one row to the next in shared memory, 8 more than H; units: H / 32, the
    columns that one ldmatrix.x4 of x covers being a unit; ragged: whether some warp's share of units ends past H;
    weight_on_input: whether x is multiplied by the routing weight. A stage has an mbarrier that its bytes complete
    (full) and one on which its readers arrive (empty).
    """

    H: int
    pitch: int
    units: int
    ragged: bool
    weight_on_input: bool
    warp_arrivals = 1  # 32: every lane arrives on its own, for compute-sanitizer's racecheck, which does not see that
    # sync_warp orders the other lanes before the one that arrives

    @cute.jit
    def copy_rows(self, source, row, rows, ring, stage, stage_rows: cutlass.Constexpr, full, empty, phase, lane):
        """Waits until a stage is free, then copies ``rows`` rows into it; lane i has the element offset of the i-th.

        The stage is full when they are there and ``announce_rows`` was called for it. That comes after, so that nothing
        stands between a free stage and its copies.
        """
        cute.arch.mbarrier_wait(empty + stage, phase ^ 1)
        if lane < rows:
            target = ring.iterator + (stage * stage_rows + lane) * self.pitch
            bulk_row_copy(source + row, target, 2 * self.H, full + stage)

    @cute.jit
    def announce_rows(self, rows, full, stage, lane):
        """The one arrival at a stage's ``full`` barrier, with the bytes that copy_rows brings."""
        if lane == 0:
            cute.arch.mbarrier_arrive_and_expect_tx(full + stage, rows * (2 * self.H))

    @cute.jit
    def advance(self, stage, phase, stages: cutlass.Constexpr):
        following = stage + 1
        wrapped = following == stages
        return (I32(0) if wrapped else following), (phase ^ 1 if wrapped else phase)

    @cute.jit
    def release(self, barrier, lane):
        """One arrival for the whole warp, after all of its lanes are done (or one a lane, see warp_arrivals).

        A ring's stage is refilled through another proxy, and nothing by itself makes an arrival wait for an ldmatrix
        whose registers nobody has used yet: on an H100 rows of the next tile came first, in up to one of ten launches.
        So something computed from all that was read comes before: a store (arrivals stay behind it), or the barrier's
        address, so that the order can be read in the listing (compile.inspect.early_arrivals). fence.proxy.async would
        do too, and took as long.
        """
        cute.arch.sync_warp()
        if cutlass.const_expr(self.warp_arrivals == 32):
            cute.arch.mbarrier_arrive(barrier)
        else:
            if lane == 0:
                cute.arch.mbarrier_arrive(barrier)

    @cute.jit
    def load_x(self, x, tokens, count, warp, lane, units: cutlass.Constexpr, weights, fragments):
        """x rows -> B fragments [8, units]: 32 columns a unit, token lane // 4 (the last one again past ``count``)."""
        slot = cutlass.min(lane // 4, count - 1)
        row = I64(tokens[slot]) * self.H
        for u in cutlass.range_constexpr(units):
            unit = warp * units + u
            column = cutlass.min(unit, I32(self.units - 1)) * 32 + (lane % 4) * 2
            for j in cutlass.range_constexpr(4):
                part = cute.make_tensor(fragments.iterator + (8 * u + 2 * j), cute.make_layout((2,)))
                cute.autovec_copy(vector(x.iterator, row + column + 8 * j, 2, 2), part)
            if cutlass.const_expr(self.ragged):  # noqa: SIM102 (one is decided while compiling)
                if unit >= self.units:
                    for i in cutlass.range_constexpr(8):
                        fragments[i, u] = BF16(0.0)
        if cutlass.const_expr(self.weight_on_input):
            weight = weights[slot]
            for u in cutlass.range_constexpr(units):
                for i in cutlass.range_constexpr(8):
                    fragments[i, u] = BF16(F32(fragments[i, u]) * weight)

    @cute.jit
    def rows_times_x(
        self,
        ring,
        stage_row,
        row_of_lane,
        warp,
        lane,
        units: cutlass.Constexpr,
        rows: cutlass.Constexpr,
        chains: cutlass.Constexpr,
        x,
    ):
        """[4] sums of rows . x over the warp's share of the hidden dimension: an accumulator of the MMA.

        ``rows``: 16, or 8, which fill both halves of the MMA's 16 (the sums 2 and 3 are then 0 and 1 again).
        ``row_of_lane`` is the row of the stage whose address this lane gives to ldmatrix. ``chains``: 2 or 4 sums that
        depend on nothing but themselves; four hide the latency of an MMA better and take 8 more registers.
        """
        load, mma = load_matrices(False), mma_16x8x16()
        parts = cute.make_rmem_tensor((4, 1, chains), F32)
        parts.fill(0.0)
        once = rows == 8  # one ldmatrix.x4 brings 8 rows by 32 columns, else 16 by 16
        address = (stage_row + row_of_lane) * self.pitch + (lane >> (3 if once else 4)) * 8
        for u in cutlass.range_constexpr(units):
            unit = warp * units + u
            if cutlass.const_expr(self.ragged):
                unit = cutlass.min(unit, I32(self.units - 1))
            matrices = cute.make_rmem_tensor((8, 1 if once else 2), BF16)
            for half in cutlass.range_constexpr(1 if once else 2):
                cute.copy(load, vector(ring.iterator, address + unit * 32 + half * 16), matrices[None, half])
            for half in cutlass.range_constexpr(2):
                if cutlass.const_expr(once):
                    layout = cute.make_layout(((2, 2, 2), 1), stride=((1, 0, 2), 0))
                    a = cute.make_tensor(matrices.iterator + 4 * half, layout)
                else:
                    layout = cute.make_layout(((2, 2, 2), 1), stride=((1, 2, 4), 0))
                    a = cute.make_tensor(matrices.iterator + 8 * half, layout)
                b = cute.make_tensor(x[None, u].iterator + 4 * half, cute.make_layout((4, 1), stride=(1, 0)))
                chain = (2 * u + half) % chains
                c = cute.make_tensor(parts.iterator + 4 * chain, cute.make_layout((4, 1, 1), stride=(1, 0, 0)))
                cute.gemm(mma, c, a, b, c)
        sums = cute.make_rmem_tensor((4,), F32)
        for i in cutlass.range_constexpr(4):
            sums[i] = parts[i, 0, 0] + parts[i, 0, 1]
            if cutlass.const_expr(chains == 4):
                sums[i] = sums[i] + (parts[i, 0, 2] + parts[i, 0, 3])
        return sums
