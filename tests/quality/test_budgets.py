"""Allocation of sparsity to layers: averages met, caps kept, cheap layers first, measurements resumed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cutedsl_kernels import UserError
from cutedsl_kernels.calibration import LayerHistogram
from cutedsl_kernels.quality.budgets import (
    Budget,
    Measurements,
    allocate,
    error_curve,
    fisher_curves,
    measured_curve,
    shared_threshold,
)

pytestmark = pytest.mark.cpu

AVERAGES = [round(0.05 * i, 2) for i in range(1, 20)]


@given(seed=st.integers(0, 2**31), layers=st.integers(1, 6))
@settings(max_examples=25, deadline=None)
def test_averages_are_met_and_no_layer_falls(seed: int, layers: int) -> None:
    generator = np.random.default_rng(seed)
    grid = (0.3, 0.5, 0.8, 0.95)
    curves = {f"l{i}": measured_curve(dict(zip(grid, generator.random(4), strict=True))) for i in range(layers)}
    found = allocate(curves, AVERAGES, cap=0.98)
    previous = dict.fromkeys(curves, 0.0)
    for average in AVERAGES:
        chosen = found[average]
        assert abs(np.mean(list(chosen.values())) - average) < 0.01
        assert all(0 <= s <= 0.98 + 1e-9 for s in chosen.values())
        assert all(chosen[name] >= previous[name] for name in chosen)
        previous = chosen


def test_the_cheap_layer_gives_more_than_the_dear_one() -> None:
    curves = {"cheap": measured_curve({0.5: 0.1, 0.9: 0.3}), "dear": measured_curve({0.5: 1.0, 0.9: 3.0})}
    for average, chosen in allocate(curves, AVERAGES).items():
        assert chosen["cheap"] >= chosen["dear"], average
    assert allocate(curves, [0.5])[0.5]["cheap"] > 0.75
    dear = {0.3: 0.001, 0.5: 0.004, 0.65: 0.008, 0.8: 0.02, 0.9: 0.05, 0.95: 0.1}
    measured = {"dear": measured_curve(dear), "cheap": measured_curve({s: c / 2 for s, c in dear.items()})}
    for average in (0.5, 0.8, 0.9):  # at sparsities that were measured too
        chosen = allocate(measured, [average])[average]
        assert chosen["cheap"] > chosen["dear"] + 0.02


def test_a_cap_binds_and_equal_layers_share_equally() -> None:
    curves = {"free": measured_curve({0.9: 0.0}), "dear": measured_curve({0.9: 5.0})}
    assert allocate(curves, [0.5], cap=0.7)[0.5]["free"] == pytest.approx(0.7, abs=0.01)
    equal = {name: (np.linspace(0, 1, 11), np.linspace(0, 1, 11) ** 2) for name in "abc"}
    assert all(abs(s - 0.6) < 0.02 for s in allocate(equal, [0.6])[0.6].values())
    with pytest.raises(ValueError, match=r"averages must lie in 0\.\.1"):
        allocate(curves, [1.2])


def test_budget_interpolates() -> None:
    budget = Budget({0.5: {"a": 0.4, "b": 0.6}, 0.9: {"a": 0.85, "b": 0.95}})
    assert budget.at(0.7) == pytest.approx({"a": 0.625, "b": 0.775})
    assert budget.at(0.25) == pytest.approx({"a": 0.2, "b": 0.3})
    assert budget.renamed(["x", "y"]).at(0.7) == pytest.approx({"x": 0.625, "y": 0.775})
    with pytest.raises(ValueError, match=r"shorter|longer"):
        budget.renamed(["x"])


def histogram_of(scores: torch.Tensor) -> LayerHistogram:
    histogram = LayerHistogram()
    histogram.observe(scores, torch.ones(scores.shape[0]))
    return histogram


def test_one_threshold_and_error_curves_equal_brute_force(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = {"a": torch.rand(400, 64, generator=generator), "b": 3 * torch.rand(400, 64, generator=generator)}
    histograms = {name: histogram_of(values) for name, values in scores.items()}
    found = shared_threshold(histograms, [0.5], router_weighted=True)[0.5]
    both = torch.cat([v.flatten() for v in scores.values()])
    tau = both.sort().values[both.numel() // 2]
    for name, values in scores.items():
        assert found[name] == pytest.approx((values < tau).float().mean().item(), abs=0.02)
    for name, values in scores.items():
        points, error = error_curve(histograms[name], router_weighted=True, grid=(0.3, 0.7))
        ordered = values.flatten().double().sort().values
        for point, value in zip(points[1:], error[1:], strict=True):
            exact = ordered[: int(point * ordered.numel())].square().sum().item() / ordered.numel()
            assert value == pytest.approx(exact, rel=0.1)


def test_fisher_curves_pass_through_the_measured_cost(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    histograms = {"a": histogram_of(torch.rand(200, 32, generator=generator))}
    curve = fisher_curves(histograms, {"a": {0.7: 0.25}}, router_weighted=True)["a"]
    assert np.interp(0.7, *curve) == pytest.approx(0.25)
    assert np.all(np.diff(curve[1]) >= 0)


def test_measurements_resume_where_they_ended(tmp_path: Path) -> None:
    path, calls = tmp_path / "state.json", []

    def costs(layer: str, grid: list[float]) -> list[float]:
        calls.append((layer, tuple(grid)))
        if layer == "c":
            raise KeyboardInterrupt
        return [s * len(layer) for s in grid]

    with pytest.raises(KeyboardInterrupt):
        Measurements(path, {"text": "x"}).measure(["a", "b", "c"], (0.5, 0.9), costs)
    resumed = Measurements(path, {"text": "x"})
    assert resumed.measure(["a", "b"], (0.5, 0.8, 0.9), costs) == 2
    assert calls == [("a", (0.5, 0.9)), ("b", (0.5, 0.9)), ("c", (0.5, 0.9)), ("a", (0.8,)), ("b", (0.8,))]
    assert resumed.costs["b"] == {0.5: 0.5, 0.9: 0.9, 0.8: 0.8}
    with pytest.raises(UserError, match="another model, text or score"):
        Measurements(path, {"text": "y"})
    path.write_text("{")
    with pytest.raises(UserError, match="not a file of budget measurements"):
        Measurements(path, {"text": "x"})
