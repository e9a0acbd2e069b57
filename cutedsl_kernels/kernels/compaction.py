"""Warp-level compaction: predicates -> ballot -> popc prefix -> a dense list of the active ones, in order.

The list has room for every candidate (capacity = tile size), so nothing can overflow, and slots follow the order of the
candidates, so the result does not depend on timing.
"""

from __future__ import annotations

import cutlass
import cutlass.cute as cute

from .primitives import I32, U32


@cute.jit
def any_in_group(predicate: cutlass.Boolean, lane: cutlass.Int32, group: cutlass.Constexpr) -> cutlass.Boolean:
    """True in all lanes of an aligned group of ``group`` (a power of two) lanes if any of them sets the predicate."""
    votes = U32(cute.arch.vote_ballot_sync(predicate))
    mask = U32((1 << group) - 1) << U32(lane & ~(group - 1))
    return (votes & mask) != 0


@cute.jit
def rank_in_warp(predicate: cutlass.Boolean, lane: cutlass.Int32, group: cutlass.Constexpr):
    """(lanes that set the predicate before this lane's aligned group of ``group`` lanes, lanes that set it in all)."""
    votes = U32(cute.arch.vote_ballot_sync(predicate))
    before = cute.arch.lanemask_lt() if cutlass.const_expr(group == 1) else (U32(1) << U32(lane & (32 - group))) - 1
    return I32(cute.arch.popc(votes & U32(before))), I32(cute.arch.popc(votes))


@cute.jit
def rank_in_group(predicates: cute.Tensor, each: cutlass.Constexpr):
    """rank_in_warp where every lane has ``each`` predicates, in registers, and those of a lane follow one another:
    (predicates set in the lanes before this one, those set in the warp)."""
    before, total = I32(0), I32(0)
    for j in cutlass.range_constexpr(each):
        in_front, in_warp = rank_in_warp(predicates[j], I32(0), 1)
        before += in_front
        total += in_warp
    return before, total


@cute.jit
def offset_of_warp(counts: cute.Tensor, warp: cutlass.Int32, num_warps: cutlass.Constexpr):
    """(entries of the warps before ``warp``, entries of all) from counts [num_warps] in shared memory."""
    before, total = I32(0), I32(0)
    for w in cutlass.range_constexpr(num_warps):
        count = counts[w]
        before += count if w < warp else I32(0)
        total += count
    return before, total


@cute.jit
def inclusive_sum(value: cutlass.Int32, lane: cutlass.Int32) -> cutlass.Int32:
    """Sum of the values of the lanes up to this one."""
    for step in cutlass.range_constexpr(5):
        other = cute.arch.shuffle_sync_up(value, 1 << step, mask_and_clamp=0)
        value += other if lane >= (1 << step) else I32(0)
    return value


@cute.jit
def same_in_warp(value: cutlass.Int32, bits: cutlass.Constexpr) -> cutlass.Uint32:
    """The lanes whose value is this lane's; values may differ in their lowest ``bits`` bits only.

    A vote for each bit: with match.any in its place route_sort took 1 us for every 512 pairs (H200, 2026-11-28).
    """
    same = U32(0xFFFFFFFF)
    for bit in cutlass.range_constexpr(bits):
        is_set = (value >> bit) & 1
        votes = U32(cute.arch.vote_ballot_sync(is_set != 0))
        same &= votes ^ U32(is_set - 1)
    return same
