"""The fused kernel's PTX, executed on the CPU with memory and race checks, against the definition."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

from cutedsl_kernels import KNOWN_MODELS, plan_for
from cutedsl_kernels.compile.specs import fake_arguments, fused_spec
from cutedsl_kernels.configs import FusedConfig
from cutedsl_kernels.cost_model import Gpu
from tests.helpers import Problem, check_close, random_problem

pytest.importorskip("cutlass")
pytestmark = pytest.mark.execute

WIDE = FusedConfig(tile_neurons=32, stage_rows=16, gate_stages=2, chunk_rows=8, row_stages=3)
NARROW = FusedConfig(tile_neurons=16, stage_rows=8, gate_stages=2, chunk_rows=4, row_stages=4, keep_sums=0)


@functools.cache
def build(run_ptx, spec):
    return run_ptx.compile(spec.build(), *fake_arguments(spec, env_stream=False))


def execute(run_ptx, problem: Problem, config: FusedConfig, num_ctas: int) -> torch.Tensor:
    weights, (tokens, top_k) = problem.weights, problem.topk_ids.shape
    spec = fused_spec(
        weights.shape(top_k),
        config,
        activation=problem.activation,
        router_weighted=problem.router_weighted,
        weight_on_input=problem.apply_router_weight_on_input,
        has_expert_map=problem.expert_map is not None,
        has_bias=weights.w2_bias is not None,
    )
    out = torch.full_like(problem.hidden_states, float("nan"))
    accum = torch.zeros(tokens, weights.hidden_size)
    counters = torch.zeros(tokens + num_ctas // 2, dtype=torch.int32)
    expert_map = problem.expert_map if problem.expert_map is not None else torch.zeros(1, dtype=torch.int32)
    run_ptx(
        build(run_ptx, spec),
        problem.hidden_states,
        weights.w13,
        weights.w2_rows,
        problem.thresholds.expand(weights.num_experts, weights.intermediate_size).contiguous(),
        problem.topk_ids,
        problem.topk_weights,
        expert_map,
        *(bias for bias in (weights.w13_bias, weights.w2_bias) if bias is not None),
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
@pytest.mark.parametrize("num_tokens", [11, 16, 23])  # up to 32 pairs are put in order by one warp, more by the CTA
def test_routings_and_dropped_pairs(run_ptx, seed, routing, skip_pairs, num_tokens):
    problem = random_problem(
        seed,
        num_tokens=num_tokens,
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
@pytest.mark.parametrize("num_tokens", [9, 35])
def test_remote_experts_and_wrong_ids(run_ptx, seed, experts, num_tokens):
    """An expert map, ids past its end and negative ones; hidden units that do not divide evenly over the warps."""
    problem = random_problem(
        seed,
        num_tokens=num_tokens,
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


@pytest.mark.parametrize(("config", "biases", "num_ctas"), [(WIDE, False, 2), (NARROW, True, 3), (NARROW, False, 4)])
def test_neighbours_that_meet(run_ptx, seed, config, biases, num_ctas):
    """Eight items a CTA and more: two neighbours work towards each other, the last of an odd number alone."""
    problem = random_problem(
        seed,
        num_tokens=20,
        num_experts=6,
        top_k=3,
        hidden_size=128,
        intermediate_size=200,
        sparsity=0.8,
        biases=biases,
    )
    check_close(execute(run_ptx, problem, config, num_ctas), problem)


@pytest.mark.parametrize(
    ("tile_neurons", "biases", "num_tokens"), [(8, False, 1), (8, True, 5), (8, False, 21), (24, True, 21)]
)
def test_tiles_that_leave_lanes_idle(run_ptx, seed, num_tokens, tile_neurons, biases):
    """A gate warp finishes two neurons, or six, where its lanes could four at a time; the last tile is short."""
    config = FusedConfig(tile_neurons=tile_neurons, stage_rows=8, gate_stages=3, chunk_rows=8, row_stages=3)
    problem = random_problem(
        seed,
        num_tokens=num_tokens,
        num_experts=5,
        top_k=2,
        hidden_size=256,
        intermediate_size=68,
        sparsity=0.7,
        biases=biases,
    )
    check_close(execute(run_ptx, problem, config, 5), problem)


def test_forty_tokens_on_one_expert(run_ptx, seed):
    """Several blocks of one expert, the last one not full."""
    problem = random_problem(
        seed, num_tokens=40, num_experts=1, top_k=1, hidden_size=128, intermediate_size=40, sparsity=0.8
    )
    check_close(execute(run_ptx, problem, WIDE, 2), problem)


BIASED: dict[str, dict[str, Any]] = {
    "gpt-oss, most inactive": {"sparsity": 0.9},
    "gpt-oss, dense": {"sparsity": 0.0, "num_tokens": 13},
    "no active neuron": {"sparsity": 1.0, "num_tokens": 9},
    "silu, most pairs dropped": {"activation": "silu", "skip_pairs": 0.6, "routing": "zipf", "num_tokens": 11},
    "all pairs dropped": {"skip_pairs": 1.0},
    "repeated ids": {"routing": "repeated", "sparsity": 0.5, "num_tokens": 10},
    "expert map, wrong ids": {"remote_experts": True, "invalid_ids": True, "num_tokens": 9, "router_weighted": False},
    "weight on the input": {"apply_router_weight_on_input": True, "router_weighted": False, "sparsity": 0.6},
    "one expert, tail of 8": {"num_experts": 1, "top_k": 1, "intermediate_size": 24, "num_tokens": 20},
}


@pytest.mark.parametrize("name", BIASED)
def test_biases(run_ptx, seed, name):
    """Gate, up and down biases; the latter also of pairs without an active neuron."""
    sizes = {"num_tokens": 5, "num_experts": 4, "top_k": 2, "hidden_size": 128, "intermediate_size": 40}
    problem = random_problem(seed, biases=True, **(sizes | {"activation": "swigluoai"} | BIASED[name]))
    check_close(execute(run_ptx, problem, WIDE, 3), problem)
    check_close(execute(run_ptx, problem, NARROW, 2), problem)


def test_biases_at_the_width_of_gpt_oss(run_ptx, seed):
    """H = 2880, the plan of a single token: the warps' shares of H and of the down bias are not equal."""
    config = plan_for(KNOWN_MODELS["gpt-oss-20b"].shape, 1, 0.85, Gpu(), 0.0, "swigluoai").config
    assert isinstance(config, FusedConfig)
    sizes = {"num_tokens": 2, "num_experts": 2, "top_k": 2, "hidden_size": 2880, "intermediate_size": 24}
    problem = random_problem(seed, biases=True, activation="swigluoai", **sizes)
    check_close(execute(run_ptx, problem, config, 2), problem)
