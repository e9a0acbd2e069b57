"""Histograms and the thresholds that follow from them, against the exact quantiles of the same data."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cutedsl_kernels import ExpertWeights, UserError
from cutedsl_kernels.calibration import (
    LayerCounters,
    LayerHistogram,
    LayerHistograms,
    count_active,
    expert_activations,
    layer_table,
)
from cutedsl_kernels.reference import gate_activation
from cutedsl_kernels.sparsity import LayerThresholds

pytestmark = pytest.mark.cpu


def pairs(seed: int, count: int = 600, neurons: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    """|silu(g)| [count, neurons] and r [count], both spread as in a real model: r over two decades, correlated with
    |a|.
    """
    gen = torch.Generator().manual_seed(seed)
    routing = torch.softmax(2 * torch.randn(count // 4, 4, generator=gen), dim=1).flatten()
    gate = torch.randn(count, neurons, generator=gen) * (0.5 + 2 * routing.unsqueeze(1)) - 0.7
    return gate_activation(gate, "silu").abs(), routing


def inactive_share(
    magnitude: torch.Tensor, routing: torch.Tensor, row: LayerThresholds, weighted: bool
) -> torch.Tensor:
    counts = count_active(
        magnitude, routing, torch.tensor(row.threshold), router_weighted=weighted, pair_threshold=row.pair_threshold
    )
    return 1 - counts[3] / counts[2]


@pytest.mark.parametrize("score", ["gate", "gate-routed"])
@pytest.mark.parametrize("skip", [0.0, 0.25, 0.35])
def test_thresholds_give_the_target(score: str, skip: float, seed: int) -> None:
    magnitude, routing = pairs(seed)
    histogram = LayerHistogram()
    histogram.observe(magnitude, routing)
    for target in (0.3, 0.5, 0.7, 0.85, 0.95):
        row = histogram.thresholds(target, score=score, skip_pairs=skip)
        assert abs(inactive_share(magnitude, routing, row, score == "gate-routed") - max(target, 0)) < 0.01
        skipped = (routing < row.pair_threshold).float().mean()
        assert abs(skipped - min(skip, target)) < 0.01


def test_silu_pile_is_resolved() -> None:
    """Gates around -1.278, where |silu| has its local maximum 0.278, fill a coarse bin with most of the neurons."""
    gate = torch.linspace(-2.0, -0.6, 200_000).view(100, 2000)
    magnitude, routing = gate_activation(gate, "silu").abs(), torch.full((100,), 0.25)
    histogram = LayerHistogram()
    histogram.observe(magnitude, routing)
    for target in (0.2, 0.5, 0.8, 0.95):
        row = histogram.thresholds(target, score="gate")
        assert abs(inactive_share(magnitude, routing, row, False) - target) < 0.01


def test_target_below_the_share_to_skip_skips_less_and_keeps_all_neurons() -> None:
    magnitude, routing = pairs(0)
    histogram = LayerHistogram()
    histogram.observe(magnitude, routing)
    row = histogram.thresholds(0.1, skip_pairs=0.35)
    assert row.threshold == 0
    assert abs((routing < row.pair_threshold).float().mean() - 0.1) < 0.01
    assert histogram.thresholds(0.0, skip_pairs=0.35) == (0.0, 0.0)


@pytest.mark.parametrize("weight", [0.125, 1.0])
def test_equal_routing_weights_are_all_kept(weight: float) -> None:
    """A router that has learnt nothing gives every pair 1/8; with one expert a token it may always give 1. No share of
    them can be skipped, so none is, however the weight is rounded."""
    histogram = LayerHistogram()
    magnitude, routing = torch.rand(400, 16), torch.full((400,), weight)
    histogram.observe(magnitude, routing)
    row = histogram.thresholds(0.8, skip_pairs=0.35)
    assert row.pair_threshold == 0
    assert abs(inactive_share(magnitude, routing, row, True) - 0.8) < 0.01
    assert histogram.table([0.5, 0.8], skip_pairs=0.35).pair_skips is None


def test_merging_parts_equals_observing_the_whole(seed: int) -> None:
    """Over batches (rows), and over tensor-parallel ranks (columns): the same thresholds."""
    magnitude, routing = pairs(seed)
    whole, rows, columns = LayerHistogram(), LayerHistogram(), LayerHistograms()
    whole.observe(magnitude, routing)
    for part in (slice(0, 100), slice(100, 600)):
        rows.observe(magnitude[part], routing[part])
    for rank in (slice(0, 24), slice(24, 64)):
        histogram = LayerHistogram()
        histogram.observe(magnitude[:, rank], routing)
        columns.merge_arrays({"layer": histogram.arrays()})
    assert all(torch.equal(getattr(whole, name), getattr(rows, name)) for name in LayerHistogram.NAMES)
    for target in (0.4, 0.8):
        expected = whole.thresholds(target, skip_pairs=0.2)
        assert columns.layers["layer"].thresholds(target, skip_pairs=0.2) == pytest.approx(expected)


def test_values_outside_the_bins_are_counted() -> None:
    histogram = LayerHistogram()
    magnitude = torch.tensor([[0.0, 1e-30, 1e30, float("inf"), float("nan")]])
    histogram.observe(magnitude, torch.tensor([1e-12]))
    assert int(histogram.gate.sum()) == 5
    assert int(histogram.gate[0, 0]) == 2
    assert int(histogram.gate[0, -1]) == 3
    assert int(histogram.pairs[0]) == 1


def test_empty_histogram_and_bad_shares_say_so() -> None:
    with pytest.raises(UserError, match="use more text"):
        LayerHistogram().thresholds(0.5)
    histogram = LayerHistogram()
    histogram.observe(*pairs(0))
    with pytest.raises(ValueError, match="target sparsity must lie in"):
        histogram.thresholds(1.5)
    with pytest.raises(ValueError, match="score must be one of"):
        histogram.thresholds(0.5, score="up")


def test_table_does_not_decrease() -> None:
    table = layer_table([0.3, 0.5, 0.7], [LayerThresholds(*row) for row in ((1.0, 0.2), (0.9, 0.1), (2.0, 0.3))])
    assert table.thresholds == (1.0, 1.0, 2.0)
    assert table.pair_thresholds == (0.2, 0.2, 0.3)
    assert table.pair_skips is None


def test_table_knows_its_skipped_pairs(seed: int) -> None:
    magnitude, routing = pairs(seed)
    histogram = LayerHistogram()
    histogram.observe(magnitude, routing)
    table = histogram.table([0.2, 0.7], skip_pairs=0.35)
    for target in (0.2, 0.7):
        below = float((routing < table.at(target).pair_threshold).float().mean())
        assert table.pair_skip(target) == pytest.approx(below, abs=0.02)
    assert histogram.table([0.2, 0.7]).pair_skips is None


def test_expert_activations_cover_every_local_pair_once(seed: int) -> None:
    gen = torch.Generator().manual_seed(seed)
    experts, inter, hidden, tokens, top_k = 5, 6, 8, 40, 3
    weights = ExpertWeights(
        torch.randn(experts, 2 * inter, hidden, generator=gen), torch.randn(experts, inter, hidden, generator=gen)
    )
    x = torch.randn(tokens, hidden, generator=gen)
    routing = torch.rand(tokens, top_k, generator=gen)
    ids = torch.randint(-1, 8, (tokens, top_k), generator=gen)  # -1 and 5..7: no expert
    seen = 0
    for expert, magnitude, r in expert_activations(x, weights, routing, ids):
        token, slot = torch.nonzero(ids == expert, as_tuple=True)
        expected = gate_activation(x[token] @ weights.w13[expert, :inter].t(), "silu").abs()
        torch.testing.assert_close(magnitude, expected)
        assert torch.equal(r, routing[token, slot])
        seen += len(r)
    assert seen == int(((ids >= 0) & (ids < experts)).sum())


def test_counters_add_up() -> None:
    counters = LayerCounters()
    counters.add({"pairs": 4, "skipped_pairs": 1, "neurons": 40, "active_neurons": 10})
    assert (counters.sparsity, counters.skipped_share) == (0.75, 0.25)
    assert (LayerCounters().sparsity, LayerCounters().skipped_share) == (0.0, 0.0)


def test_arrays_survive_a_round_trip() -> None:
    histogram = LayerHistogram()
    histogram.observe(*pairs(3))
    again = LayerHistogram.from_arrays({name: np.array(array) for name, array in histogram.arrays().items()})
    assert again.thresholds(0.8) == histogram.thresholds(0.8)
