"""Building blocks shared by the kernels: 16-byte vectors, fragments of mma.sync, bulk row copies, activations.

All functions run on the device. Fragment layouts: PTX ISA, "Matrix Fragments for
mma.m16n8k8 / m16n8k16" and "ldmatrix".
"""

from __future__ import annotations

import cutlass
import cutlass.cute as cute
from cutlass.cute.nvgpu import warp

try:
    from cutlass.memory import SmemAllocator  # CuTe DSL 4.7 and later
except ImportError:
    from cutlass.utils import SmemAllocator

BF16, F32, I32, U32 = cutlass.BFloat16, cutlass.Float32, cutlass.Int32, cutlass.Uint32
I64, U64 = cutlass.Int64, cutlass.Uint64
LOG2_E = 1.4426950408889634
# Weights are read once in a launch. L2 evicts them before all else, so that the sums, which every CTA adds to, are not
# written to memory in between: 1 to 3 % of a launch (docs/kernels-fused.md).
EVICT_FIRST = ".reg .b64 policy; createpolicy.fractional.L2::evict_first.b64 policy, 1.0;"

__all__ = [
    "BF16",
    "F32",
    "I32",
    "I64",
    "U32",
    "U64",
    "SmemAllocator",
    "activate_gate",
    "async_copy",
    "bulk_row_copy",
    "in_vector_register",
    "load_matrices",
    "mma_16x8x8",
    "mma_16x8x16",
    "opaque_zero",
    "reduce_add",
    "reduce_add_vector",
    "transform_up",
    "vector",
]


def vector(pointer, offset, length=8, divby=8):
    """``length`` contiguous elements at ``pointer + offset``; the offset is promised to divide by ``divby``."""
    return cute.make_tensor(pointer + cute.assume(offset, divby=divby), cute.make_layout((length,)))


def bulk_row_copy(source, target, nbytes, barrier):
    """This lane's cp.async.bulk of ``nbytes`` (a multiple of 16), global to shared memory, completing on ``barrier``.

    Written as PTX because the copy atom of CuTe DSL 4.6 elects one lane of the warp, and that of later releases none.
    For weights: L2 evicts first what it brings (EVICT_FIRST).
    """
    copy = "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint"
    cute.arch.inline_ptx(
        f"{{ {EVICT_FIRST} {copy} [{{$r0}}], [{{$r1}}], {{$r2}}, [{{$r3}}], policy; }}",
        read_only_args=[target.toint(), source.toint(), I32(nbytes), barrier.toint()],
    )


def async_copy(source, target, weights: bool):
    """This thread's cp.async of 16 bytes, global to shared memory, past L1; EVICT_FIRST for weights.

    ``target``: a shared address in bytes, made from what in_vector_register returned.
    """
    policy, copy, hint = (EVICT_FIRST, ".L2::cache_hint", ", policy") if weights else ("", "", "")
    cute.arch.inline_ptx(
        f"{{ {policy} cp.async.cg.shared.global{copy} [{{$r0}}], [{{$r1}}], 16{hint}; }}",
        read_only_args=[target, source.toint()],
    )


def in_vector_register(address):
    """``address`` again, through a shuffle of every lane with itself; by all lanes of the warp.

    The assembler makes what is uniform in a shared address an operand of its own. In a cp.async with an L2 policy that
    is an instruction that no GPU takes (cudaErrorIllegalInstruction on an H200, blocks of 64 tokens, CuTe DSL 4.8.1,
    2026-11-28). It cannot see through the shuffle. The compile tier looks for such instructions.
    """
    return I32(cute.arch.shuffle_sync(address, cute.arch.lane_idx()))


def opaque_zero():
    """0, as a number that the compiler does not know: a CTA's z coordinate, in a grid that is one CTA deep."""
    return cute.arch.block_idx()[2]


def load_matrices(transpose: bool):
    """Copy atom of ldmatrix.x4: every lane names a 16-byte row, lanes 8i..8i+7 those of the i-th 8x8 matrix."""
    return cute.make_copy_atom(warp.LdMatrix8x8x16bOp(transpose, 4), BF16)


def mma_16x8x16():
    return cute.make_mma_atom(warp.MmaF16BF16Op(BF16, F32, (16, 8, 16)))


def mma_16x8x8():
    return cute.make_mma_atom(warp.MmaF16BF16Op(BF16, F32, (16, 8, 8)))


def reduce_add(pointer, value):
    """red.global.add.f32: adds without returning the old value; order between CTAs is not defined."""
    cute.arch.inline_ptx("red.global.add.f32 [{$r0}], {$r1};", read_only_args=[pointer.toint(), value])


def reduce_add_vector(pointer, values):
    """reduce_add of four numbers, to 16 bytes that are aligned to 16."""
    cute.arch.inline_ptx(
        "red.global.add.v4.f32 [{$r0}], { {$r1}, {$r2}, {$r3}, {$r4} };", read_only_args=[pointer.toint(), *values]
    )


@cute.jit
def sigmoid(value: cutlass.Float32) -> cutlass.Float32:
    return cute.arch.rcp_approx(1.0 + cute.arch.exp2(value * (-LOG2_E)))


@cute.jit
def activate_gate(gate: cutlass.Float32, activation: cutlass.Constexpr) -> cutlass.Float32:
    """act(g) as defined by reference.gate_activation.

    gelu_tanh uses 0.5 * (1 + tanh z) = sigmoid(2 z); gelu uses erf by Abramowitz and Stegun 7.1.26 (error 1.5e-7).
    """
    result = F32(0.0)
    if cutlass.const_expr(activation == "silu"):
        result = gate * sigmoid(gate)
    elif cutlass.const_expr(activation == "gelu_tanh"):
        inner = 0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)
        result = gate * sigmoid(2.0 * inner)
    elif cutlass.const_expr(activation == "gelu"):
        z = gate * 0.7071067811865476
        size = cutlass.max(z, -z)
        t = cute.arch.rcp_approx(1.0 + 0.3275911 * size)
        series = 1.421413741 + t * (-1.453152027 + t * 1.061405429)
        series = t * (0.254829592 + t * (-0.284496736 + t * series))
        tail = series * cute.arch.exp2(size * size * (-LOG2_E))
        erf = 1.0 - tail
        result = 0.5 * gate * (1.0 + (erf if z >= 0.0 else -erf))
    else:
        clamped = cutlass.min(gate, F32(7.0))
        result = clamped * sigmoid(1.702 * clamped)
    return result


@cute.jit
def transform_up(up: cutlass.Float32, activation: cutlass.Constexpr) -> cutlass.Float32:
    """What multiplies act(g), as defined by reference.up_transform."""
    result = up
    if cutlass.const_expr(activation == "swigluoai"):
        result = cutlass.max(cutlass.min(up, F32(7.0)), F32(-7.0)) + 1.0
    return result
