"""Budgets: which layer gives how much of an average sparsity.

Every layer has a cost curve over its own sparsity, measured with the other layers dense. ``greedy`` measures KL at a
few sparsities per layer; ``fisher`` measures one KL per layer and takes the curve's form from the recorded scores
(the squared error below the threshold). Both then raise, step by step, the layer whose next step costs least, up to a
cap.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..calibration import LayerHistogram, score_edges
from ..errors import UserError

BUDGETS = ("uniform", "shared", "greedy", "fisher")
GREEDY_GRID = (0.3, 0.5, 0.65, 0.8, 0.9, 0.95)
FISHER_POINT = 0.7
DEFAULT_CAP = 0.98
EXPERT_CAP, EXPERT_CAP_AT = 0.98, 0.9  # no expert is sparser than this where its layer's sparsity is 90 %
STEP = 0.005

Curve = tuple[np.ndarray, np.ndarray]  # sparsity, cost: fp64, increasing sparsity from 0, cost 0 at 0


def error_curve(histogram: LayerHistogram, *, router_weighted: bool, grid: Sequence[float]) -> Curve:
    """Squared score below the threshold of each sparsity in ``grid``: the output's expected squared error, up to a
    factor, for scores in units of a neuron's contribution (moments-routed)."""
    joint = (histogram.routed if router_weighted else histogram.gate).cpu().numpy().astype(np.float64)
    counts = joint.sum(0)
    edges = score_edges()
    share = np.concatenate([[0.0], np.cumsum(counts)]) / counts.sum()
    middle = np.sqrt(np.maximum(edges[:-1], 1e-300) * edges[1:])
    error = np.concatenate([[0.0], np.cumsum(counts * middle**2)]) / counts.sum()
    points = np.unique(np.concatenate([[0.0], np.asarray(grid, dtype=np.float64)]))
    return points, np.interp(points, share, error)


def cumulative_share(histogram: LayerHistogram, *, router_weighted: bool) -> np.ndarray:
    """Share of scores below each edge of score_edges(), fp64 [SCORE_BINS + 1]."""
    counts = (histogram.routed if router_weighted else histogram.gate).cpu().numpy().astype(np.float64).sum(0)
    return np.concatenate([[0.0], np.cumsum(counts)]) / counts.sum()


def shared_threshold(
    histograms: Mapping[str, LayerHistogram], averages: Iterable[float], *, router_weighted: bool
) -> dict[float, dict[str, float]]:
    """{average: {layer: sparsity}} that one threshold for all layers gives (the paper's rule, for the score gate)."""
    edges = score_edges()
    shares = {name: cumulative_share(h, router_weighted=router_weighted) for name, h in histograms.items()}
    mean = np.mean(list(shares.values()), axis=0)
    found = {}
    for average in averages:
        tau = float(np.interp(average, mean, edges))
        found[average] = {name: float(np.interp(tau, edges, share)) for name, share in shares.items()}
    return found


def expert_factors(histogram: LayerHistogram, *, router_weighted: bool) -> torch.Tensor:
    """Factor >= 1 on the scores of each expert, fp32 [E], with which none is sparser than EXPERT_CAP under the
    threshold that gives its layer a sparsity of EXPERT_CAP_AT. 1 for an expert that was never seen.

    A raised expert keeps more neurons, so the layer's threshold must be found again afterwards; it rises, and passes
    the cap by as little as the others then keep less.
    """
    tau = histogram.thresholds(EXPERT_CAP_AT, score="gate-routed" if router_weighted else "gate").threshold
    limits = histogram.expert_quantiles(EXPERT_CAP, router_weighted=router_weighted)
    return torch.from_numpy(np.maximum(1.0, tau / np.maximum(limits, 1e-300))).float()


class Budget:
    """Sparsity of every layer for any average, linear between the averages it was made for."""

    def __init__(self, allocation: Mapping[float, Mapping[str, float]]) -> None:
        self.averages = np.array([0.0, *sorted(allocation)])
        names = next(iter(allocation.values()))
        self.columns = {name: np.array([0.0, *(allocation[a][name] for a in sorted(allocation))]) for name in names}

    def at(self, average: float) -> dict[str, float]:
        return {name: float(np.interp(average, self.averages, column)) for name, column in self.columns.items()}

    def renamed(self, names: Sequence[str]) -> Budget:
        """The same for layers called ``names``, in order. ValueError if there are more or fewer."""
        columns = list(self.columns.values())
        rows = {
            float(a): {n: float(c[i]) for n, c in zip(names, columns, strict=True)} for i, a in enumerate(self.averages)
        }
        return Budget({average: row for average, row in rows.items() if average > 0})


def measured_curve(points: Mapping[float, float]) -> Curve:
    """From measured {sparsity: cost}: a parabola in the logarithm of the cost, made non-decreasing, 0 at 0.

    Straight lines between the points would have their kinks at the same sparsities in every layer, and every layer
    would then stop there. Fewer than three positive costs: straight lines all the same.
    """
    grid = np.array(sorted(points))
    cost = np.array([max(0.0, points[s]) for s in grid])
    if (cost > 0).sum() < 3:
        return np.array([0.0, *grid]), np.maximum.accumulate(np.array([0.0, *cost]))
    fine = np.linspace(0.0, float(grid[-1]), 100)
    fitted = np.exp(np.polyval(np.polyfit(grid[cost > 0], np.log(cost[cost > 0]), 2), fine))
    return fine, np.maximum.accumulate(fitted - fitted[0]).clip(min=0)


def allocate(
    curves: Mapping[str, Curve], averages: Iterable[float], *, cap: float = DEFAULT_CAP, step: float = STEP
) -> dict[float, dict[str, float]]:
    """{average: {layer: sparsity}}. Layers count equally; no layer passes ``cap`` (an average above it raises the cap
    to itself).

    Sparsities rise with the average in every layer. Beyond its last point a curve goes on with its last slope,
    doubled at every halving of the distance to 1, so that a layer is not driven to 1 by extrapolation.
    """
    names = list(curves)
    wanted = sorted(set(averages))
    if any(not 0 <= average <= 1 for average in wanted):
        raise ValueError(f"averages must lie in 0..1, got {wanted}")
    limit = max([cap, *wanted])
    levels = np.round(np.arange(0.0, limit + 1e-9, step), 6)
    if levels[-1] < limit:
        levels = np.append(levels, limit)
    costs = {name: _extended(curve, levels) for name, curve in curves.items()}
    at = dict.fromkeys(names, 0)
    found: dict[float, dict[str, float]] = {}
    for average in wanted:
        while sum(levels[i] for i in at.values()) / len(names) < average - 1e-9:
            open_layers = [name for name in names if at[name] + 1 < len(levels)]
            if not open_layers:
                break
            best = min(open_layers, key=lambda name: _slope(costs[name], levels, at[name]))
            at[best] += 1
        chosen = {name: float(levels[i]) for name, i in at.items()}
        excess = sum(chosen.values()) / len(names) - average
        last = max(chosen, key=lambda name: chosen[name])
        chosen[last] = max(0.0, chosen[last] - excess * len(names))
        found[average] = chosen
    return monotone(found)  # taking the excess back must not make a layer fall between two averages


def monotone(allocation: Mapping[float, Mapping[str, float]]) -> dict[float, dict[str, float]]:
    """The same with every layer's sparsity at least what it is at any smaller average."""
    floor: dict[str, float] = {}
    found = {}
    for average in sorted(allocation):
        floor = {name: max(floor.get(name, 0.0), value) for name, value in allocation[average].items()}
        found[average] = floor
    return found


def _extended(curve: Curve, levels: np.ndarray) -> np.ndarray:
    grid, cost = curve
    inside = np.interp(levels, grid, cost)
    if levels[-1] <= grid[-1]:
        return inside
    slope = (cost[-1] - cost[-2]) / (grid[-1] - grid[-2]) if len(grid) > 1 else 1.0
    left = max(1.0 - grid[-1], 1e-6)
    beyond = np.clip(levels - grid[-1], 0.0, 0.999 * left)
    return inside + slope * left * -np.log1p(-beyond / left)


def _slope(costs: np.ndarray, levels: np.ndarray, index: int) -> float:
    return float((costs[index + 1] - costs[index]) / (levels[index + 1] - levels[index]))


class Measurements:
    """Costs of single layers, {layer: {sparsity: cost}}, kept in a JSON file after each pass, so that a search can be
    resumed.

    ``key`` identifies what is measured (model, text, score); a file with another key is refused. path None: memory
    only.
    """

    def __init__(self, path: str | os.PathLike[str] | None, key: Mapping[str, Any]) -> None:
        self.path = None if path is None else Path(path)
        self.key = dict(key)
        self.costs: dict[str, dict[float, float]] = {}
        if self.path is None or not self.path.exists():
            return
        try:
            data = json.loads(self.path.read_text(encoding="utf-8"))
            stored = {name: {float(s): float(v) for s, v in row.items()} for name, row in data["costs"].items()}
        except (OSError, ValueError, KeyError, AttributeError, TypeError):
            raise UserError(f"{self.path}: not a file of budget measurements: remove it or name another") from None
        if data.get("key") != self.key:
            raise UserError(
                f"{self.path}: holds measurements of another model, text or score: remove it or name another"
            )
        self.costs = stored

    def measure(
        self, layers: Iterable[str], grid: Sequence[float], costs: Callable[[str, list[float]], Sequence[float]]
    ) -> int:
        """Calls costs(layer, sparsities) for the points of each layer that are not there yet. Returns how many those
        were.
        """
        measured = 0
        for name in layers:
            row = self.costs.setdefault(name, {})
            missing = [sparsity for sparsity in grid if sparsity not in row]
            if missing:
                row.update(zip(missing, costs(name, missing), strict=True))
                measured += len(missing)
                self._save()
        return measured

    def _save(self) -> None:
        if self.path is None:
            return
        temporary = self.path.with_name(self.path.name + ".tmp")
        temporary.write_text(json.dumps({"key": self.key, "costs": self.costs}, indent=1) + "\n", encoding="utf-8")
        os.replace(temporary, self.path)


def fisher_curves(
    histograms: Mapping[str, LayerHistogram], measured: Mapping[str, Mapping[float, float]], *, router_weighted: bool
) -> dict[str, Curve]:
    """Error curves scaled so that each passes through its layer's one measured cost."""
    grid = np.round(np.arange(0.01, 1.0, 0.01), 4).tolist()
    curves = {}
    for name, histogram in histograms.items():
        points, error = error_curve(histogram, router_weighted=router_weighted, grid=grid)
        ((sparsity, cost),) = measured[name].items()
        at = float(np.interp(sparsity, points, error))
        curves[name] = (points, error * (max(cost, 0.0) / at if at > 0 else 0.0))
    return curves
