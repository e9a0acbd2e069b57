"""Per-neuron parts as the ranks of an engine hold them: cut for a rank, put together again, checked, applied."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from cutedsl_kernels import ExpertWeights, UserError
from cutedsl_kernels.quality.scores import NeuronParts, UpMoments, neuron_weights, score_named, weight_check

pytest.importorskip("vllm", reason="the package of the vLLM method imports vLLM")
from cutedsl_kernels.integration.vllm.neurons import apply_parts, shard, unshard
from cutedsl_kernels.integration.vllm.state import LayerState

pytestmark = pytest.mark.cpu


def rank_of(
    weights: ExpertWeights, tp: tuple[int, int] = (0, 1), ep: tuple[int, int] = (0, 1)
) -> tuple[object, LayerState]:
    """(layer, state) of one rank; tp and ep are (rank, size)."""
    inter, experts = weights.intermediate_size, weights.num_experts
    columns = slice(tp[0] * inter // tp[1], (tp[0] + 1) * inter // tp[1])
    rows = slice(ep[0] * experts // ep[1], (ep[0] + 1) * experts // ep[1])
    w13 = torch.cat([weights.w13[rows, :inter][:, columns], weights.w13[rows, inter:][:, columns]], dim=1)
    local = ExpertWeights(w13.contiguous(), weights.w2_rows[rows, columns].contiguous())
    expert_map = None
    if ep[1] > 1:
        expert_map = torch.full((experts,), -1, dtype=torch.int32)
        expert_map[rows] = torch.arange(local.num_experts, dtype=torch.int32)
    state = LayerState("layers.0", local, 2, "silu", False, torch.zeros(1, 1), tp_size=tp[1], tp_rank=tp[0])
    return SimpleNamespace(expert_map=expert_map), state


RANKS = [[((0, 1), (0, 1))], [((0, 2), (0, 1)), ((1, 2), (0, 1))], [((0, 1), (0, 2)), ((0, 1), (1, 2))]]


@pytest.mark.parametrize("ranks", RANKS, ids=["one", "tp2", "ep2"])
def test_ranks_together_are_the_whole(ranks: list, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weights = ExpertWeights(torch.randn(4, 64, 8, generator=generator), torch.randn(4, 32, 8, generator=generator))
    whole = torch.rand(4, 32, generator=generator)
    total = torch.zeros(4, 32)
    rms = torch.rand(4, 32, generator=generator).half()
    parts = NeuronParts(weight_check(weights), rms)
    expected = 0.3 / neuron_weights(score_named("moments-routed"), weights, rms.float())
    for tp, ep in ranks:
        layer, state = rank_of(weights, tp, ep)
        total += unshard(shard(whole, layer, state), layer, state)
        apply_parts(layer, state, "moments-routed", parts)
        state.set(0.3, 0.0, True, "x", 0.5)
        torch.testing.assert_close(state.tau, shard(expected, layer, state))
        state.set(0.0, 0.0, True, "0", 0.0)
        assert float(state.tau.abs().max()) == 0
    assert torch.equal(total, whole)


def test_other_weights_are_refused(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weights = ExpertWeights(torch.randn(4, 64, 8, generator=generator), torch.randn(4, 32, 8, generator=generator))
    layer, state = rank_of(weights)
    wrong = NeuronParts(weight_check(weights) * 1.1)
    with pytest.raises(UserError, match=r"layers\.0: the weights are not those the sparsity profile was made for"):
        apply_parts(layer, state, "down", wrong)


def test_a_layer_feeds_its_moments_and_weights_its_recorder(seed: int) -> None:
    from cutedsl_kernels.calibration import LayerHistogram

    generator = torch.Generator().manual_seed(seed)
    weights = ExpertWeights(torch.randn(4, 64, 8, generator=generator), torch.randn(4, 32, 8, generator=generator))
    layer, state = rank_of(weights)
    x, ids = torch.randn(30, 8, generator=generator), torch.randint(4, (30, 1), generator=generator)
    r = torch.ones(30, 1)
    state.moments = UpMoments(4, 32)
    state.observe(x, r, ids, None)
    assert float(state.moments.tokens.sum()) == 30
    state.moments, state.recorder = None, LayerHistogram()
    apply_parts(layer, state, "down-routed", NeuronParts(weight_check(weights)))
    state.observe(x, r, ids, None)
    limits = state.recorder.thresholds(0.5)
    gate = torch.nn.functional.silu(torch.einsum("tih,th->ti", weights.w13[ids[:, 0], :32], x)).abs()
    score = gate * weights.w2_rows.norm(dim=2)[ids[:, 0]]
    assert (score < limits.threshold).float().mean().item() == pytest.approx(0.5, abs=0.02)
