"""A layer cut over ranks: the sum of what the ranks compute is what one process computes. No engine."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from helpers import random_problem

from cutedsl_kernels import ExpertWeights, sparse_moe
from cutedsl_kernels.calibration import LayerHistogram, LayerHistograms, expert_activations

pytestmark = pytest.mark.cpu

SHAPE = {"num_experts": 6, "top_k": 3, "hidden_size": 32, "intermediate_size": 88}


def experts_of(rank: int, ranks: int, placement: str) -> torch.Tensor:
    """Global ids of a rank's experts, as vLLM places them."""
    ids = torch.arange(SHAPE["num_experts"])
    return ids[rank::ranks] if placement == "round_robin" else ids.chunk(ranks)[rank]


def shards(
    weights: ExpertWeights, tp: int, ep: int, placement: str
) -> list[tuple[ExpertWeights, torch.Tensor, slice, torch.Tensor]]:
    """(weights, expert_map, neurons, experts) of every rank of a tp x ep grid."""
    found = []
    width = weights.intermediate_size // tp
    inter = weights.intermediate_size
    for rank in range(ep):
        owned = experts_of(rank, ep, placement)
        expert_map = torch.full((weights.num_experts,), -1, dtype=torch.int32)
        expert_map[owned] = torch.arange(len(owned), dtype=torch.int32)
        for part in range(tp):
            neurons = slice(part * width, (part + 1) * width)
            gate, up = weights.w13[owned, :inter][:, neurons], weights.w13[owned, inter:][:, neurons]
            local = ExpertWeights(torch.cat([gate, up], dim=1), weights.w2_rows[owned][:, neurons].contiguous())
            found.append((local, expert_map, neurons, owned))
    return found


@pytest.mark.parametrize("placement", ["linear", "round_robin"])
@pytest.mark.parametrize(("tp", "ep"), [(2, 1), (4, 1), (1, 2), (1, 3), (2, 2)])
def test_ranks_add_up_to_one_process(tp: int, ep: int, placement: str, seed: int) -> None:
    """Thresholds are per neuron; 88 neurons over 4 ranks are 22, a multiple of no tile."""
    problem = random_problem(seed, num_tokens=17, dtype=torch.float32, skip_pairs=0.2, **SHAPE)
    whole = sparse_moe(**problem.arguments)
    total = torch.zeros_like(whole)
    for weights, expert_map, neurons, owned in shards(problem.weights, tp, ep, placement):
        arguments = problem.arguments | {
            "weights": weights,
            "thresholds": problem.thresholds[owned][:, neurons],
            "expert_map": expert_map if ep > 1 else None,
        }
        total += sparse_moe(**arguments)
    torch.testing.assert_close(total, whole, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("tp", "ep"), [(4, 1), (1, 3)])
def test_histograms_of_the_ranks_add_up(tp: int, ep: int, seed: int) -> None:
    problem = random_problem(seed, num_tokens=64, dtype=torch.float32, **SHAPE)
    given = (problem.hidden_states, problem.topk_weights, problem.topk_ids)

    def histogram(weights: ExpertWeights, expert_map: torch.Tensor | None) -> LayerHistogram:
        found = LayerHistogram()
        for _, magnitude, routing in expert_activations(given[0], weights, *given[1:], expert_map=expert_map):
            found.observe(magnitude, routing)
        return found

    whole, merged = histogram(problem.weights, None), LayerHistograms()
    for weights, expert_map, _, _ in shards(problem.weights, tp, ep, "linear"):
        merged.merge_arrays({"layer": histogram(weights, expert_map if ep > 1 else None).arrays()})
    for target in (0.5, 0.85):
        assert merged.layers["layer"].thresholds(target, skip_pairs=0.25) == pytest.approx(
            whole.thresholds(target, skip_pairs=0.25), rel=1e-4
        )


@pytest.mark.engine  # imports vLLM
@pytest.mark.parametrize("placement", ["linear", "round_robin"])
def test_thresholds_are_cut_like_the_weights(placement: str, seed: int) -> None:
    from cutedsl_kernels.integration.vllm.neurons import shard

    tau = torch.rand(SHAPE["num_experts"], SHAPE["intermediate_size"], generator=torch.Generator().manual_seed(seed))
    weights = random_problem(seed, num_tokens=1, dtype=torch.float32, **SHAPE).weights
    for local, expert_map, _, owned in shards(weights, 1, 2, placement):
        layer, state = SimpleNamespace(expert_map=expert_map), SimpleNamespace(weights=local, tp_size=1, tp_rank=0)
        assert torch.equal(shard(tau, layer, state), tau[owned])
    for rank, (local, _, neurons, _) in enumerate(shards(weights, 4, 1, placement)):
        layer, state = SimpleNamespace(expert_map=None), SimpleNamespace(weights=local, tp_size=4, tp_rank=rank)
        assert torch.equal(shard(tau, layer, state), tau[:, neurons])
