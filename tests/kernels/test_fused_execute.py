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


@pytest.mark.parametrize(
    ("routing", "skip_pairs"),
    [("one-expert", 0.0), ("repeated", 0.4), ("zipf", 0.9), ("uniform", 1.0)],
    ids=["all-on-one-expert", "repeated-ids", "most-pairs-dropped", "all-pairs-dropped"],
)
def test_routings_and_dropped_pairs(run_ptx, seed, routing, skip_pairs):
    problem = random_problem(
        seed,
        num_tokens=11,
        num_experts=4,
        top_k=2,
        hidden_size=128,
        intermediate_size=40,
        routing=routing,
        skip_pairs=skip_pairs,
        sparsity=0.7,
    )
    check_close(execute(run_ptx, problem, NARROW, 2), problem)


@pytest.mark.parametrize("experts", [1, 7])
def test_remote_experts_and_wrong_ids(run_ptx, seed, experts):
    """An expert map, ids past its end and negative ones; hidden units that do not divide evenly over the warps."""
    problem = random_problem(
        seed,
        num_tokens=9,
        num_experts=experts,
        top_k=1,
        hidden_size=192,
        intermediate_size=24,
        sparsity=0.5,
        remote_experts=True,
        invalid_ids=True,
        router_weighted=False,
    )
    check_close(execute(run_ptx, problem, NARROW, 3), problem)


@pytest.mark.parametrize(
    ("activation", "on_input"),
    [("gelu", False), ("gelu_tanh", True), ("swigluoai", False)],
    ids=lambda value: str(value),
)
def test_activations_and_weight_on_input(run_ptx, seed, activation, on_input):
    problem = random_problem(
        seed,
        num_tokens=6,
        num_experts=3,
        top_k=2,
        hidden_size=64,
        intermediate_size=16,
        sparsity=0.6,
        activation=activation,
        apply_router_weight_on_input=on_input,
    )
    check_close(execute(run_ptx, problem, NARROW, 2), problem)


def test_forty_tokens_on_one_expert(run_ptx, seed):
    """Several blocks of one expert, the last one not full."""
    problem = random_problem(
        seed, num_tokens=40, num_experts=1, top_k=1, hidden_size=128, intermediate_size=40, sparsity=0.8
    )
    check_close(execute(run_ptx, problem, WIDE, 2), problem)
