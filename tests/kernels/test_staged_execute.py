"""The staged path's PTX, executed on the CPU with memory and race checks, against the definition.

Every scratch buffer and the output start out undefined (and hold NaN or impossible indices): reading what no kernel
wrote is reported. Besides the result, every index list must be exactly the one that follows from the definition.
"""

from __future__ import annotations

import functools
import re
from dataclasses import replace
from typing import Any

import pytest
import torch

from cutedsl_kernels.compile.specs import fake_arguments, staged_spec
from cutedsl_kernels.configs import Plan, StagedConfig, illegal_reason
from cutedsl_kernels.shapes import MoEShape
from tests.helpers import Problem, check_close, expert_traces, random_problem

pytest.importorskip("cutlass")
pytestmark = pytest.mark.execute

SMALL = {"num_experts": 4, "top_k": 2, "hidden_size": 256, "intermediate_size": 136}
DTYPES = {"int32": torch.int32, "float32": torch.float32, "bfloat16": torch.bfloat16}
one_worker = pytest.mark.xdist_group("staged: same two compilations")
WARP = StagedConfig(wgmma=0, row_stages=3, down_stages=2)
LINES = replace(WARP, row_atoms=1, down_atoms=1)  # for any H that is a multiple of 64


@functools.cache
def build(run_ptx, spec):
    return run_ptx.compile(spec.build(), *fake_arguments(spec, env_stream=False))


def execute(run_ptx, problem: Problem, config: StagedConfig, deterministic: bool) -> dict[str, torch.Tensor]:
    """Runs the path; returns the scratch tensors by name, and ``out``."""
    weights, (tokens, top_k) = problem.weights, problem.topk_ids.shape
    shape = MoEShape(weights.num_experts, top_k, weights.hidden_size, weights.intermediate_size)
    assert illegal_reason(Plan("staged", config), shape, tokens, problem.activation) is None
    on_input = problem.apply_router_weight_on_input
    spec = staged_spec(
        shape,
        config,
        activation=problem.activation,
        router_weighted=problem.router_weighted,
        weight_on_input=on_input,
        has_expert_map=problem.expert_map is not None,
        has_bias=weights.w2_bias is not None,
        deterministic=deterministic,
    )
    tensors = {
        name: torch.full(size, 0x7FFFFFFF if dtype == "int32" else float("nan"), dtype=DTYPES[dtype])
        for name, (size, dtype) in config.workspace(shape, tokens, deterministic, on_input).items()
    }
    tensors["out"] = torch.full_like(problem.hidden_states, float("nan"))
    result = run_ptx(
        build(run_ptx, spec),
        run_ptx.ReadOnly(problem.hidden_states),
        run_ptx.ReadOnly(weights.w13),
        run_ptx.ReadOnly(weights.w2_rows),
        run_ptx.ReadOnly(problem.thresholds),
        run_ptx.ReadOnly(problem.topk_ids),
        run_ptx.ReadOnly(problem.topk_weights),
        run_ptx.ReadOnly(torch.zeros(1, dtype=torch.int32) if problem.expert_map is None else problem.expert_map),
        *(run_ptx.ReadOnly(bias) for bias in (weights.w13_bias, weights.w2_bias) if bias is not None),
        problem.pair_threshold,
        *(run_ptx.Uninit(tensor) for tensor in tensors.values()),
    )
    assert len(result.launches) == 5
    return tensors


def check_lists(problem: Problem, config: StagedConfig, tensors: dict[str, torch.Tensor]) -> None:
    """Items, sorted pairs and lists of active neurons, exactly."""
    top_k, inter = problem.topk_ids.shape[1], problem.weights.intermediate_size
    items, positions, kept = [], [], torch.zeros(problem.topk_ids.numel(), dtype=torch.int32)
    for trace in expert_traces(problem):
        pairs = trace.token * top_k + trace.slot
        kept[pairs] = 1 if problem.weights.w2_bias is None else trace.expert + 1
        for first in range(0, len(pairs), config.token_block):
            block = slice(first, first + config.token_block)
            items.append((trace.expert, len(positions), trace.active[block]))
            positions += pairs[block].tolist()
    rows = 64 * config.row_groups  # of a CTA of the gate product; with overlap 2 its and the up product's are counted
    done = -(-inter // rows) + -(-inter // min(rows, config.up_rows)) if config.overlap == 2 else 0
    assert tensors["sorted_pairs"][: len(positions)].tolist() == positions
    assert torch.equal(tensors["kept"], kept)
    for item, (expert, start, active) in enumerate(items):
        assert tensors["items"][item].tolist() == [expert, start, len(active), done]
        union = active.any(0).nonzero().flatten()
        assert tensors["active"][item] == len(union)
        assert tensors["slots"][item, : len(union)].tolist() == union.tolist()
        for tile, neurons in enumerate(torch.arange(inter).split(64)):
            here = union[(union >= neurons[0]) & (union <= neurons[-1])]
            assert tensors["counts"][item, tile] == len(here)
            assert tensors["neurons"][item, 64 * tile : 64 * tile + len(here)].tolist() == here.tolist()
    assert (tensors["items"][len(items) :, :3] == 0).all()
    assert (tensors["items"][len(items) :, 3] >= done).all(), "nobody has to wait for an item that is none"


def run(run_ptx, seed: int, config: StagedConfig = WARP, deterministic: bool = False, **arguments: Any) -> None:
    problem = random_problem(seed, **(SMALL | arguments))
    tensors = execute(run_ptx, problem, config, deterministic)
    check_lists(problem, config, tensors)
    check_close(tensors["out"], problem)


@one_worker
@pytest.mark.parametrize("deterministic", [False, True], ids=["atomics", "deterministic"])
@pytest.mark.parametrize("num_tokens", [1, 3, 16, 17, 40])
def test_numbers_of_tokens(run_ptx, seed: int, num_tokens: int, deterministic: bool) -> None:
    run(run_ptx, seed, deterministic=deterministic, num_tokens=num_tokens)


@one_worker
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.9, 1.0])
def test_sparsities(run_ptx, seed: int, sparsity: float) -> None:
    run(run_ptx, seed, num_tokens=11, sparsity=sparsity)


@one_worker
def test_no_active_neuron_gives_zeros_in_both_reductions(run_ptx, seed: int) -> None:
    for deterministic in (False, True):
        problem = random_problem(seed, num_tokens=5, sparsity=1.0, **SMALL)
        assert execute(run_ptx, problem, WARP, deterministic)["out"].eq(0).all()


@one_worker
@pytest.mark.parametrize("deterministic", [False, True], ids=["atomics", "deterministic"])
@pytest.mark.parametrize("skip_pairs", [0.3, 0.9, 1.0])
def test_pair_thresholds(run_ptx, seed: int, skip_pairs: float, deterministic: bool) -> None:
    run(run_ptx, seed, deterministic=deterministic, num_tokens=19, skip_pairs=skip_pairs)


@one_worker
@pytest.mark.parametrize("routing", ["one-expert", "repeated", "zipf"])
def test_routings(run_ptx, seed: int, routing: Any) -> None:
    run(run_ptx, seed, num_tokens=21, routing=routing)


def test_remote_and_invalid_experts(run_ptx, seed: int) -> None:
    run(run_ptx, seed, deterministic=True, num_tokens=23, remote_experts=True, invalid_ids=True)


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "swigluoai"])
def test_activations(run_ptx, seed: int, activation: str) -> None:
    run(run_ptx, seed, num_tokens=6, activation=activation, intermediate_size=72, hidden_size=128)


def test_routing_weight_on_the_input_and_thresholds_without_it(run_ptx, seed: int) -> None:
    options = {"apply_router_weight_on_input": True, "router_weighted": False, "top_k": 1}
    run(run_ptx, seed, num_tokens=18, **options)


SHAPES = {
    "one expert, one neuron tile, tail of 8": {"num_experts": 1, "top_k": 1, "intermediate_size": 8, "hidden_size": 64},
    "H odd number of lines, top-5": {"hidden_size": 320, "intermediate_size": 64, "num_experts": 8, "top_k": 5},
    "37 experts, most empty": {"num_experts": 37, "hidden_size": 64, "intermediate_size": 72},
    "more tiles than lanes": {"num_experts": 2, "hidden_size": 64, "intermediate_size": 33 * 64 + 8},
}


@pytest.mark.parametrize("name", SHAPES)
def test_shapes(run_ptx, seed: int, name: str) -> None:
    run(run_ptx, seed, LINES, num_tokens=7, **SHAPES[name])


CONFIGS = {
    "32 tokens": replace(WARP, token_block=32),
    "64 tokens, 2 stages": replace(WARP, token_block=64, row_stages=2),
    "128-byte pieces of rows": replace(WARP, row_atoms=1),
    "512-byte pieces of down rows": replace(WARP, down_atoms=4, down_stages=3),
    "two warp groups, up rows by 16": replace(WARP, row_groups=2, up_rows=16),
    "more stages than tiles": replace(WARP, row_stages=6, down_stages=5),
    "column tiles not divisible": replace(WARP, down_atoms=1, down_tiles=3),
    "more splits than tiles, no overlap": replace(WARP, down_splits=5, overlap=0),
    "waiting for the kernel before": replace(WARP, overlap=1),
}


@pytest.mark.parametrize("number", range(len(CONFIGS)), ids=list(CONFIGS))
def test_configs(run_ptx, seed: int, number: int) -> None:
    run(run_ptx, seed, list(CONFIGS.values())[number], deterministic=number % 2 == 0, num_tokens=37)


WGMMA = replace(WARP, wgmma=1)
WGMMA_CONFIGS = {
    "16 tokens": WGMMA,
    "32 tokens, 256-byte pieces of rows, 2 groups": replace(
        WGMMA, token_block=32, row_atoms=2, row_groups=2, down_atoms=4
    ),
    "64 tokens, column tiles not divisible": replace(WGMMA, token_block=64, down_atoms=1, down_tiles=3),
}


@pytest.mark.parametrize("number", range(len(WGMMA_CONFIGS)), ids=list(WGMMA_CONFIGS))
def test_wgmma(run_ptx, seed: int, number: int) -> None:
    config = list(WGMMA_CONFIGS.values())[number]
    for num_tokens, routing in ((5, "uniform"), (37, "zipf"), (33, "one-expert")):
        run(run_ptx, seed, config, number % 2 == 0, num_tokens=num_tokens, routing=routing, sparsity=0.7)


BIASED: dict[str, dict[str, Any]] = {
    "gpt-oss, most inactive": {"sparsity": 0.9},
    "gpt-oss, dense": {"sparsity": 0.0, "num_tokens": 17},
    "no active neuron": {"sparsity": 1.0, "num_tokens": 9},
    "silu, most pairs dropped": {"activation": "silu", "skip_pairs": 0.6, "routing": "zipf", "num_tokens": 19},
    "all pairs dropped": {"skip_pairs": 1.0},
    "repeated ids": {"routing": "repeated", "sparsity": 0.5, "num_tokens": 21},
    "expert map, wrong ids": {"remote_experts": True, "invalid_ids": True, "num_tokens": 19, "router_weighted": False},
    "weight on the input": {"apply_router_weight_on_input": True, "router_weighted": False, "sparsity": 0.6},
    "one expert, tail of 8": {"num_experts": 1, "top_k": 1, "intermediate_size": 8, "num_tokens": 20},
}


@pytest.mark.parametrize("hidden_size", [64, 128])
def test_a_hidden_dimension_of_one_tile(run_ptx, seed: int, hidden_size: int) -> None:
    """Zeroing what wgmma adds to must stay in front of its fence, though the loop over tiles has one turn only."""
    config = StagedConfig(row_atoms=hidden_size // 64, row_stages=2, down_atoms=1)
    run(run_ptx, seed, config, num_tokens=9, hidden_size=hidden_size, intermediate_size=72)


@pytest.mark.parametrize("name", BIASED)
def test_biases(run_ptx, seed: int, name: str) -> None:
    """Gate, up and down biases, in both reductions; the latter also of pairs without an active neuron."""
    for config, deterministic in ((WARP, False), (replace(WGMMA, down_splits=2), True)):
        options = {"num_tokens": 5, "activation": "swigluoai"} | BIASED[name]
        run(run_ptx, seed, config, deterministic, biases=True, **options)


def test_more_pairs_than_the_sort_keeps_in_registers(run_ptx, seed: int) -> None:
    shape = {"num_experts": 2, "top_k": 4, "hidden_size": 64, "intermediate_size": 8}
    run(run_ptx, seed, LINES, num_tokens=1100, routing="repeated", skip_pairs=0.98, **shape)


@one_worker
def test_deterministic_reduction_has_no_atomics(run_ptx) -> None:
    """But for the numbers by which a CTA waits for its item: integers."""
    for config, atomics in ((replace(WARP, overlap=1), r"\b(red|atom)\."), (WARP, r"\b(red|atom)\.\S*f32")):
        spec = staged_spec(MoEShape(4, 2, 256, 136), config, deterministic=True)
        assert not re.search(atomics, build(run_ptx, spec).ptx)
