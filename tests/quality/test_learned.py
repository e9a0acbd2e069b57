"""Learned thresholds: the training pass computes what the rule computes, KL falls, averages and caps hold."""

from __future__ import annotations

import pytest
import torch
from small_models import small_model, texts

from cutedsl_kernels import UserError
from cutedsl_kernels.calibration import LayerCounters
from cutedsl_kernels.quality.budgets import EXPERT_CAP, EXPERT_CAP_AT, expert_factors
from cutedsl_kernels.quality.hf import Rule
from cutedsl_kernels.quality.learned import _prepare, learn_thresholds
from cutedsl_kernels.quality.scores import SCORES, neuron_weights
from cutedsl_kernels.quality.search import Evaluator, Scored, record_scores

pytestmark = pytest.mark.cpu


@pytest.mark.parametrize("routed", [True, False])
def test_the_training_pass_follows_the_rule(routed: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    model = small_model(seed)
    begin = Scored.record(model, texts(seed), SCORES["moments-routed" if routed else "moments"])
    trained = next(iter(_prepare(model, begin, routed, (0.5, 0.8)).values()))
    layer, x = trained.layer, torch.randn(30, 32, generator=generator)
    ids = torch.stack([torch.randperm(4, generator=generator)[:2] for _ in range(30)])
    r = torch.rand(30, 2, generator=generator)
    trained.anchor = 1
    c, tau = begin.weights[layer.name], begin.thresholds(0.8)[layer.name].threshold
    assert c is not None
    layer.rule, layer.counters = Rule(tau / c, 0.0, routed), LayerCounters()
    wanted = layer.forward(x, ids, r)
    layer.override = trained.forward
    torch.testing.assert_close(layer.forward(x, ids, r), wanted, rtol=1e-4, atol=1e-5)
    assert trained.active == pytest.approx(layer.counters.active_neurons / layer.counters.neurons, abs=1e-4)
    layer.forward(x, ids, r).square().sum().backward()
    for parameter in (trained.change, trained.log_tau):
        assert parameter.grad is not None
        assert float(parameter.grad.abs().sum()) > 0


def test_learning_lowers_kl_and_keeps_the_average(seed: int) -> None:
    model = small_model(seed)
    text = texts(seed, 16)
    told = []
    learned = learn_thresholds(model, text, steps=40, anchors=(0.6, 0.8), progress=told.append)
    assert sum(told) == len(learned.losses) == 40
    assert all(layer.override is None and layer.rule is None for layer in model.layers.values())
    evaluator = Evaluator(model, text)
    for average in (0.6, 0.8):
        wanted = learned.budget.at(average)
        assert sum(wanted.values()) / 2 == pytest.approx(average, abs=1e-3)
        before = evaluator.quality(Scored.record(model, text, SCORES["moments-routed"]).rules(average)).kl_mean
        after = evaluator.quality(learned.scored.rules(wanted)).kl_mean
        assert after < before
        assert evaluator.realised()[0] == pytest.approx(average, abs=0.05)
    assert set(learned.budget.at(1.0).values()) == {1.0}
    for layer, factor in zip(model.layers.values(), learned.factors(model.layers), strict=True):
        c = learned.scored.weights[layer.name]
        torch.testing.assert_close(
            neuron_weights(SCORES["learned-routed"], layer.weights, factor), c, rtol=2e-3, atol=0
        )


def test_wrong_arguments_are_refused(seed: int) -> None:
    model = small_model(seed)
    with pytest.raises(ValueError, match="anchors lie between 0 and 1"):
        learn_thresholds(model, texts(seed), steps=1, anchors=(0.5, 1.0))
    with pytest.raises(UserError, match="give more text"):
        learn_thresholds(model, [[3]], steps=1)


@pytest.mark.parametrize("routed", [True, False])
def test_no_expert_collapses(routed: bool, seed: int) -> None:
    """An expert whose scores are a hundredth of the others' would lose every neuron; with the cap it keeps some."""
    model = small_model(seed)
    sequences = texts(seed, 16)
    plain = Scored.record(model, sequences, SCORES["moments-routed" if routed else "moments"])
    weights: dict[str, torch.Tensor | None] = {}
    for name, c in plain.weights.items():
        assert c is not None
        weights[name] = c * torch.tensor([0.01, 1.0, 1.0, 1.0]).unsqueeze(1)

    def sparsities(capped: bool) -> dict[str, float]:
        scored = Scored.with_weights(model, sequences, weights, router_weighted=routed, capped=capped)
        tau = {name: limits.threshold for name, limits in scored.thresholds(EXPERT_CAP_AT).items()}
        found = {}
        for name, histogram in scored.histograms.items():
            kept = record_scores(model, sequences, scored.weights)[name].experts[int(routed), 0]
            assert torch.equal(kept, histogram.experts[int(routed), 0])
            levels = torch.linspace(0, 1, 1001)
            quantiles = [histogram.expert_quantiles(float(q), router_weighted=routed)[0] for q in levels]
            found[name] = float(levels[torch.tensor(quantiles) <= tau[name]].max())
        return found

    assert all(value > 0.995 for value in sparsities(False).values())
    assert all(value <= EXPERT_CAP + 0.006 for value in sparsities(True).values())
    histogram = next(iter(plain.histograms.values()))
    assert float(expert_factors(histogram, router_weighted=routed).min()) >= 1
