"""Thresholds from recorded scores, and the pair threshold chosen together with them, on a model opened by hf.py."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from ..calibration import LayerHistogram
from ..cost_model import dense_bytes, layer_bytes
from ..shapes import MoEShape
from ..sparsity import LayerThresholds
from .budgets import expert_factors
from .hf import Layer, MoEModel, Rule, Tap
from .metrics import Comparison, Quality
from .scores import Score, UpMoments, neuron_weights, row_norms
from .traffic import LayerPairs, batch_bytes

Sequences = Sequence[Sequence[int]]
CAP_ROUNDS = 3  # of raising experts and recording again


def record_moments(model: MoEModel, sequences: Sequences) -> dict[str, UpMoments]:
    """Second moments of the up projection of every neuron, over the dense model's own tokens."""
    found: dict[str, UpMoments] = {}

    def make(layer: Layer) -> Tap:
        moments = found[layer.name] = UpMoments(
            layer.weights.num_experts, layer.weights.intermediate_size, layer.weights.device
        )

        def tap(
            expert: int, token: torch.Tensor, r: torch.Tensor, a: torch.Tensor, u: torch.Tensor, active: torch.Tensor
        ) -> None:
            moments.observe(expert, u)

        return tap

    _run(model, sequences, make)
    return found


def record_weighted_moments(model: MoEModel, sequences: Sequences) -> dict[str, torch.Tensor]:
    """sqrt(E[a^2 u^2] / E[a^2]) of every neuron, fp32 [E, I]: the size of u where the gate is open."""
    products: dict[str, UpMoments] = {}
    gates: dict[str, UpMoments] = {}

    def make(layer: Layer) -> Tap:
        shape = (layer.weights.num_experts, layer.weights.intermediate_size)
        product = products[layer.name] = UpMoments(*shape, layer.weights.device)
        gate = gates[layer.name] = UpMoments(*shape, layer.weights.device)

        def tap(
            expert: int, token: torch.Tensor, r: torch.Tensor, a: torch.Tensor, u: torch.Tensor, active: torch.Tensor
        ) -> None:
            product.observe(expert, a * u)
            gate.observe(expert, a)

        return tap

    _run(model, sequences, make)
    found = {}
    for name, layer in model.layers.items():
        norms = row_norms(layer.weights)[0]
        found[name] = products[name].rms(norms) / gates[name].rms(torch.ones_like(norms)).clamp(min=1e-12)
    return found


def record_fisher(model: MoEModel, sequences: Sequences, seed: int = 0) -> dict[str, torch.Tensor]:
    """sqrt(E[(u * (w_down . g))^2]) of every neuron, fp32 [E, I], with g the gradient of
    MoEModel.output_gradients.
    """
    generator = torch.Generator().manual_seed(seed)
    found = {
        name: UpMoments(layer.weights.num_experts, layer.weights.intermediate_size, layer.weights.device)
        for name, layer in model.layers.items()
    }
    model.set_rules(None)
    for batch in model.batches(sequences):
        gradients = model.output_gradients(batch, generator)

        def make(layer: Layer, gradients: dict[str, torch.Tensor] = gradients) -> Tap:
            def tap(
                expert: int,
                token: torch.Tensor,
                r: torch.Tensor,
                a: torch.Tensor,
                u: torch.Tensor,
                active: torch.Tensor,
            ) -> None:
                effect = gradients[layer.name][token] @ layer.weights.w2_rows[expert].float().t()
                found[layer.name].observe(expert, u * effect)

            return tap

        model.set_taps(make)
        try:
            model.log_probs(batch)
        finally:
            model.set_taps(None)
    return {name: found[name].rms(torch.mul(*row_norms(layer.weights))) for name, layer in model.layers.items()}


def record_scores(
    model: MoEModel, sequences: Sequences, weights: Mapping[str, torch.Tensor | None], *, oracle: bool = False
) -> dict[str, LayerHistogram]:
    """Histograms of |act(gate)| * c (and of that times r) per layer; ``oracle``: of |act(gate) * up| * c."""
    found: dict[str, LayerHistogram] = {}

    def make(layer: Layer) -> Tap:
        histogram = found[layer.name] = LayerHistogram(layer.weights.device, layer.weights.num_experts)
        c = weights[layer.name]

        def tap(
            expert: int, token: torch.Tensor, r: torch.Tensor, a: torch.Tensor, u: torch.Tensor, active: torch.Tensor
        ) -> None:
            magnitude = (a * u).abs() if oracle else a.abs()
            histogram.observe(magnitude if c is None else magnitude * c[expert], r, expert)

        return tap

    _run(model, sequences, make)
    return found


def _run(model: MoEModel, sequences: Sequences, make: Callable[[Layer], Tap]) -> None:
    model.set_rules(None)
    model.set_taps(make)
    try:
        for batch in model.batches(sequences):
            model.log_probs(batch)
    finally:
        model.set_taps(None)


def _rho_caps(model: MoEModel) -> dict[str, float]:
    """Per layer, the least routing weight of a token's best expert since the rules were last set."""
    return {name: layer.least_best_weight for name, layer in model.layers.items()}


@dataclass
class Scored:
    """A score recorded on a model: what is needed to turn any sparsity into a rule for every layer."""

    router_weighted: bool
    weights: dict[str, torch.Tensor | None]
    histograms: dict[str, LayerHistogram]
    rho_caps: dict[str, float] = field(default_factory=dict)
    oracle: bool = False

    @classmethod
    def record(
        cls, model: MoEModel, sequences: Sequences, score: Score, moments: Mapping[str, UpMoments] | None = None
    ) -> Scored:
        """``moments`` are recorded here if the score needs them and they are not given. Not for learned scores."""
        if score.weight == "learned":
            raise ValueError(f"score {score.name} has no recorded weights: learn_thresholds gives a Scored")
        if score.calibrated and moments is None:
            moments = record_moments(model, sequences)
        weights: dict[str, torch.Tensor | None] = {}
        for name, layer in model.layers.items():
            rms = moments[name].rms(row_norms(layer.weights)[0]) if score.calibrated and moments else None
            weights[name] = neuron_weights(score, layer.weights, rms)
        return cls.with_weights(
            model, sequences, weights, router_weighted=score.router_weighted, capped=score.calibrated
        )

    @classmethod
    def with_weights(
        cls,
        model: MoEModel,
        sequences: Sequences,
        weights: dict[str, torch.Tensor | None],
        *,
        router_weighted: bool = True,
        capped: bool = False,
    ) -> Scored:
        """Any c, [E, I] per layer or None; raised, where ``capped``, for experts that would be too sparse
        (budgets.expert_factors).
        """
        histograms = record_scores(model, sequences, weights)
        for _ in range(CAP_ROUNDS if capped else 0):
            factors = {n: expert_factors(h, router_weighted=router_weighted) for n, h in histograms.items()}
            if all(float(factor.max()) == 1 for factor in factors.values()):
                break
            weights = {n: factors[n].to(c.device).unsqueeze(1) * c for n, c in weights.items() if c is not None}
            histograms = record_scores(model, sequences, weights)
        return cls(router_weighted, weights, histograms, _rho_caps(model))

    @classmethod
    def record_oracle(cls, model: MoEModel, sequences: Sequences, *, router_weighted: bool = True) -> Scored:
        """Selection by the true size of a neuron's contribution, |act(gate) * up| * norm(down row)."""
        weights: dict[str, torch.Tensor | None] = {name: layer.down_norms for name, layer in model.layers.items()}
        histograms = record_scores(model, sequences, weights, oracle=True)
        return cls(router_weighted, weights, histograms, _rho_caps(model), oracle=True)

    def thresholds(
        self, targets: float | Mapping[str, float], skip_pairs: float | Mapping[str, float] = 0.0
    ) -> dict[str, LayerThresholds]:
        """tau (on the score) and rho per layer, for a share of inactive neurons and a share of skipped pairs.

        Both are numbers, or one per layer. No rho is above ``rho_caps``, so every calibration token keeps a pair.
        """
        kind = "gate-routed" if self.router_weighted else "gate"
        found = {}
        for name, histogram in self.histograms.items():
            target = targets if isinstance(targets, float | int) else targets[name]
            share = skip_pairs if isinstance(skip_pairs, float | int) else skip_pairs[name]
            share = min(share, histogram.skippable(self.rho_caps.get(name)))
            found[name] = histogram.thresholds(target, score=kind, skip_pairs=share)
        return found

    def rules(
        self, targets: float | Mapping[str, float], skip_pairs: float | Mapping[str, float] = 0.0
    ) -> dict[str, Rule]:
        """What ``thresholds`` gives, as rules with a tau per neuron."""
        return self.as_rules(self.thresholds(targets, skip_pairs))

    def as_rules(self, thresholds: Mapping[str, LayerThresholds]) -> dict[str, Rule]:
        found = {}
        for name, (tau, rho) in thresholds.items():
            c = self.weights[name]
            found[name] = Rule(tau if c is None else tau / c, rho, self.router_weighted, self.oracle)
        return found


@dataclass
class Evaluator:
    """Compares rules with the dense model on fixed text; the dense model's log-probabilities are kept (bytes: 4 *
    tokens * V).
    """

    model: MoEModel
    sequences: Sequences
    passes: int = 0
    _dense: list[torch.Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.model.set_rules(None)
        self._batches = list(self.model.batches(self.sequences))
        self._dense = [self.model.log_probs(batch) for batch in self._batches]

    def quality(self, rules: dict[str, Rule] | None) -> Quality:
        """One pass over the text under ``rules``; realised sparsity is left in the layers' counters."""
        self.model.set_rules(rules)
        self.passes += 1
        comparison = Comparison()
        for batch, dense in zip(self._batches, self._dense, strict=True):
            sparse = self.model.log_probs(batch)
            following = batch[:, 1:].flatten().to(sparse.device)
            comparison.add(following, dense[:, :-1].flatten(0, 1), sparse[:, :-1].flatten(0, 1))
        return comparison.result()

    def realised(self) -> tuple[float, float]:
        """(sparsity, share of pairs skipped) of the last pass, averaged over layers."""
        counters = [layer.counters for layer in self.model.layers.values()]
        share = 1.0 / len(counters)
        return sum(c.sparsity for c in counters) * share, sum(c.skipped_share for c in counters) * share


@dataclass(frozen=True)
class JointPoint:
    """One way to reach a goal: share of pairs skipped, sparsity, bytes relative to dense, and the quality it has."""

    skip_pairs: float
    sparsity: float
    bytes_share: float
    quality: Quality


def sparsity_for_bytes(skip_pairs: float, bytes_share: float) -> float | None:
    """Sparsity s at which one token reads ``bytes_share`` of the dense bytes, (1 - q) / 3 + 2 (1 - s) / 3 with q the
    share of skipped pairs; None if s is not in q..1.
    """
    sparsity = 1 - (3 * bytes_share - (1 - skip_pairs)) / 2
    return sparsity if skip_pairs <= sparsity <= 1 else None


def expected_bytes(shape: MoEShape, batch: int, skip_pairs: float, sparsity: float) -> float:
    """Weight bytes that ``batch`` tokens read, over the dense ones: uniform routing, independent masks (cost_model)."""
    sparse, dense = layer_bytes(shape, batch, sparsity, skip_pairs), dense_bytes(shape, batch)
    return (sparse.gate + sparse.up_down) / (dense.gate + dense.up_down)


def sparsity_for_expected_bytes(shape: MoEShape, batch: int, skip_pairs: float, bytes_share: float) -> float | None:
    """As sparsity_for_bytes, for ``batch`` tokens at once by the cost model; bisection to 0.0005."""
    low, high = skip_pairs, 1.0
    if (
        not expected_bytes(shape, batch, skip_pairs, high)
        <= bytes_share
        <= expected_bytes(shape, batch, skip_pairs, low)
    ):
        return None
    while high - low > 0.0005:
        middle = (low + high) / 2
        more = expected_bytes(shape, batch, skip_pairs, middle) > bytes_share
        low, high = (middle, high) if more else (low, middle)
    return high


RulesFor = Callable[
    [float, float], dict[str, LayerThresholds]
]  # (average sparsity, share of pairs skipped) -> thresholds


def sparsity_for_batch_bytes(
    thresholds: RulesFor, pairs: Mapping[str, LayerPairs], skip_pairs: float, bytes_share: float, batch: int
) -> float | None:
    """As sparsity_for_bytes, for ``batch`` tokens at once, on recorded pairs; bisection to 0.002."""

    def share(sparsity: float) -> float:
        generator = torch.Generator().manual_seed(0)
        limits = thresholds(sparsity, skip_pairs)
        parts = [batch_bytes(p, p.masks(*limits[name]), batch, generator, samples=4) for name, p in pairs.items()]
        return sum(parts) / len(parts)

    low, high = skip_pairs, 0.995
    if share(high) > bytes_share or share(low) < bytes_share:
        return None
    while high - low > 0.002:
        middle = (low + high) / 2
        low, high = (middle, high) if share(middle) > bytes_share else (low, middle)
    return high


def joint_for_bytes(
    evaluator: Evaluator,
    scored: Scored,
    bytes_share: float,
    shares: Sequence[float],
    *,
    thresholds: RulesFor | None = None,
    batch: int = 1,
    pairs: Mapping[str, LayerPairs] | None = None,
) -> list[JointPoint]:
    """Quality of every share of skipped pairs at the same traffic, best first; empty if none can reach the goal.

    ``thresholds``: None for the same sparsity in every layer. ``pairs`` (record_pairs) is needed for ``batch`` > 1.
    Traffic is what the thresholds give on calibration text.
    """
    limits = thresholds or scored.thresholds
    found = []
    for share in shares:
        if batch == 1:
            sparsity = sparsity_for_bytes(share, bytes_share)
        elif pairs is None:
            raise ValueError("pairs must be given (record_pairs) for a batch of more than one token")
        else:
            sparsity = sparsity_for_batch_bytes(limits, pairs, share, bytes_share, batch)
        if sparsity is not None:
            quality = evaluator.quality(scored.as_rules(limits(sparsity, share)))
            found.append(JointPoint(share, sparsity, bytes_share, quality))
    return sorted(found, key=lambda point: point.quality.kl_mean)


def joint_for_kl(
    evaluator: Evaluator,
    scored: Scored,
    kl: float,
    shares: Sequence[float],
    *,
    thresholds: RulesFor | None = None,
    tolerance: float = 0.004,
) -> list[JointPoint]:
    """For each share of skipped pairs the highest sparsity whose mean KL stays within ``kl``, fewest bytes first."""
    limits = thresholds or scored.thresholds
    found = []
    for share in shares:
        point: JointPoint | None = None
        low, high = share, 0.995
        while high - low > tolerance:
            middle = (low + high) / 2
            quality = evaluator.quality(scored.as_rules(limits(middle, share)))
            if quality.kl_mean <= kl:
                low = middle
                point = JointPoint(share, middle, ((1 - share) + 2 * (1 - middle)) / 3, quality)
            else:
                high = middle
        if point is not None:
            found.append(point)
    return sorted(found, key=lambda point: point.bytes_share)


def spread_sequences(sequences: Sequences, tokens: int) -> list[Sequence[int]]:
    """Sequences of about ``tokens`` tokens in all, at even distances; at least one."""
    total = sum(map(len, sequences))
    wanted = max(1, min(len(sequences), round(len(sequences) * tokens / total)))
    return [sequences[int((i + 0.5) * len(sequences) / wanted)] for i in range(wanted)]


def highest_within(holds: Callable[[float], bool], low: float, high: float, precision: float) -> float:
    """Bisection for the highest value in low..high that holds, to ``precision``; ``low`` is taken to hold, and not
    tried.
    """
    if holds(high):
        return high
    while high - low > precision:
        middle = round((low + high) / 2, 4)
        if holds(middle):
            low = middle
        else:
            high = middle
    return low
