"""The fused kernel's PTX, executed on the CPU with memory and race checks, against the definition."""

from __future__ import annotations

import functools

import pytest
import torch

from cutedsl_kernels.configs import FusedConfig
from tests.helpers import Problem, check_close, random_problem

cutlass = pytest.importorskip("cutlass")
import cutlass.cute as cute  # noqa: E402
from cutlass.cute.runtime import make_fake_compact_tensor, make_fake_stream  # noqa: E402

from cutedsl_kernels.kernels.fused_decode import FusedDecode  # noqa: E402

pytestmark = pytest.mark.execute

WIDE = FusedConfig(tile_neurons=32, stage_rows=16, gate_stages=2, chunk_rows=8, row_stages=3)
NARROW = FusedConfig(tile_neurons=16, stage_rows=8, gate_stages=2, chunk_rows=4, row_stages=4, keep_sums=0)


@functools.cache
def build(run_ptx, config, hidden, inter, experts, top_k, activation, router_weighted, on_input, has_map):
    op = FusedDecode(
        hidden_size=hidden,
        intermediate_size=inter,
        num_experts=experts,
        top_k=top_k,
        config=config,
        activation=activation,
        router_weighted=router_weighted,
        weight_on_input=on_input,
        has_expert_map=has_map,
    )
    bf16, f32, i32 = cutlass.BFloat16, cutlass.Float32, cutlass.Int32

    def fake(dtype, *shape, align=16):
        order = tuple(range(len(shape) - 1, -1, -1))
        return make_fake_compact_tensor(dtype, shape, stride_order=order, assumed_align=align)

    tokens, rows, counts, known = (cute.sym_int() for _ in range(4))
    return run_ptx.compile(
        op,
        fake(bf16, tokens, hidden),
        fake(bf16, experts, 2 * inter, hidden),
        fake(bf16, experts, inter, hidden),
        fake(f32, experts, inter, align=4),
        fake(i32, tokens, top_k, align=4),
        fake(f32, tokens, top_k, align=4),
        fake(i32, known, align=4),
        fake(f32, rows, hidden),
        fake(i32, counts, align=4),
        fake(bf16, tokens, hidden),
        f32(0.0),
        i32(1),
        make_fake_stream(),
    )


def execute(run_ptx, problem: Problem, config: FusedConfig, num_ctas: int) -> torch.Tensor:
    weights, (tokens, top_k) = problem.weights, problem.topk_ids.shape
    program = build(
        run_ptx,
        config,
        weights.hidden_size,
        weights.intermediate_size,
        weights.num_experts,
        top_k,
        problem.activation,
        problem.router_weighted,
        problem.apply_router_weight_on_input,
        problem.expert_map is not None,
    )
    out = torch.full_like(problem.hidden_states, float("nan"))
    accum = torch.zeros(tokens, weights.hidden_size)
    counters = torch.zeros(tokens, dtype=torch.int32)
    expert_map = problem.expert_map if problem.expert_map is not None else torch.zeros(1, dtype=torch.int32)
    run_ptx(
        program,
        problem.hidden_states,
        weights.w13,
        weights.w2_rows,
        problem.thresholds.expand(weights.num_experts, weights.intermediate_size).contiguous(),
        problem.topk_ids,
        problem.topk_weights,
        expert_map,
        accum,
        counters,
        run_ptx.Uninit(out),
        problem.pair_threshold,
        num_ctas,
    )
    assert not accum.any(), "the sums must be zero again"
    assert not counters.any(), "the counters must be zero again"
    return out


@pytest.mark.parametrize("config", [WIDE, NARROW], ids=["wide", "narrow"])
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("tokens", [1, 5, 20])
def test_sparsity_and_tokens(run_ptx, seed, config, sparsity, tokens):
    problem = random_problem(
        seed, num_tokens=tokens, num_experts=4, top_k=2, hidden_size=128, intermediate_size=40, sparsity=sparsity
    )
    check_close(execute(run_ptx, problem, config, 3), problem)
