"""Per-neuron parts as the ranks of an engine hold them: cut for a rank, put together again, checked, applied."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from cutedsl_kernels import ExpertWeights, UserError
from cutedsl_kernels.calibration import LayerHistogram, LayerHistograms
from cutedsl_kernels.quality.budgets import EXPERT_CAP, EXPERT_CAP_AT
from cutedsl_kernels.quality.scores import NeuronParts, UpMoments, neuron_weights, score_named, weight_check

pytest.importorskip("vllm", reason="the package of the vLLM method imports vLLM")
from cutedsl_kernels.integration.vllm.neurons import apply_parts, raise_experts, shard, unshard
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


@pytest.mark.parametrize("ranks", RANKS, ids=["one", "tp2", "ep2"])
def test_ranks_count_experts_of_the_whole_and_raise_those_too_sparse(ranks: list, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weights = ExpertWeights(torch.randn(4, 64, 8, generator=generator), torch.randn(4, 32, 8, generator=generator))
    x, r = torch.randn(200, 8, generator=generator), torch.rand(200, 1, generator=generator) + 0.1
    ids = torch.arange(200).unsqueeze(1) % 4
    rms = torch.tensor([1.0, 1.0, 0.003, 1.0]).unsqueeze(1).expand(4, 32).half()
    parts = {"layers.0": NeuronParts(weight_check(weights), rms)}
    score = score_named("moments-routed")
    merged = LayerHistograms()
    for tp, ep in ranks:
        layer, state = rank_of(weights, tp, ep)
        state.recorder = LayerHistogram(num_experts=4)
        apply_parts(layer, state, score.name, parts["layers.0"])
        state.observe(x, r, ids, layer.expert_map)
        merged.merge_arrays({"layers.0": state.recorder.arrays()})
    counts = merged.layers["layers.0"].experts
    assert counts.sum(dim=2).tolist() == [[50 * 32] * 4] * 2
    set_to: list[tuple[str, dict[str, torch.Tensor]]] = []
    engine = SimpleNamespace(_call=lambda name, *given: set_to.append(given))
    raised = raise_experts(engine, score, parts, merged.layers)
    assert raised is not None
    factors = raised["layers.0"].rms_up.float() / rms.float()
    assert float(factors[2].min()) > 5
    torch.testing.assert_close(factors[[0, 1, 3]], torch.ones(3, 32), rtol=1e-3, atol=0)
    assert set_to[0][0] == "moments-routed"
    assert set_to[0][1]["layers.0"] is raised["layers.0"].rms_up
    tau = merged.layers["layers.0"].thresholds(EXPERT_CAP_AT).threshold
    limits = merged.layers["layers.0"].expert_quantiles(EXPERT_CAP, router_weighted=True)
    assert [bool(limit < tau) for limit in limits] == [False, False, True, False]
    without = {"layers.0": NeuronParts(weight_check(weights))}  # a score whose c has no factor to raise
    assert raise_experts(engine, score_named("down-routed"), without, merged.layers) is None
