"""Calibration: histograms of activation scores and routing weights, and the thresholds that follow from them.

A layer is observed as a stream of pairs (token, expert) with routing weight r and gate activations |a_i|.
LayerHistogram keeps, in bounded memory and mergeable over batches and ranks,

    pairs   [28672]    pairs by r
    gate    [112, 800] neurons by (r, |a|)
    routed  [112, 800] neurons by (r, |a| * r)
    gate_fine, routed_fine [51200]   neurons by the same scores, whatever r

and, where the number of experts is given, ``experts`` [2, E, 200]: neurons of each expert by |a| and by |a| * r, in
quarter octaves. All in log-spaced bins: every octave is cut into a power of two of equal parts, so that a value's bin
is read off its fp32 bits. The second axis of the joint histograms is what makes pair skipping exact: neurons of pairs
below rho count as inactive, so tau is a quantile over the neurons of the *remaining* pairs only. Under tensor
parallelism every rank sees all pairs and its own neurons, under expert parallelism its own pairs: adding the ranks'
histograms gives right shares in both cases.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from .errors import UserError
from .reference import gate_activation, local_experts
from .sparsity import LayerTable, LayerThresholds
from .weights import ExpertWeights

SCORE_OCTAVES, SCORE_SPLIT = (-36, 14), 4  # bins from 2^-36 to 2^14, 2^4 to the octave
COMMON_SHARE = 0.02  # of all pairs in one bin of r, 0.1 % wide: these pairs have the same routing weight
# |silu(g)| piles up below its local maximum of 0.278 on the negative side: a bin there can hold 8 % of all neurons, and
# a straight line through it is 2 points off. The fine bins give the course inside a coarse one.
FINE_SPLIT = 10
ROUTING_OCTAVES, ROUTING_SPLIT, PAIR_SPLIT = (-24, 4), 2, 10
SCORE_BINS = (SCORE_OCTAVES[1] - SCORE_OCTAVES[0]) << SCORE_SPLIT
ROUTING_BINS = (ROUTING_OCTAVES[1] - ROUTING_OCTAVES[0]) << ROUTING_SPLIT
PAIR_BINS = (ROUTING_OCTAVES[1] - ROUTING_OCTAVES[0]) << PAIR_SPLIT  # every coarse bin of r is a run of fine ones
SCORES = ("gate", "gate-routed")
DEFAULT_TARGETS = (*(round(0.05 * i, 2) for i in range(1, 20)), 0.97, 0.98, 0.99)
EXPERT_SPLIT = 2
_CHUNK_ELEMENTS = 1 << 22


def expert_activations(
    hidden_states: torch.Tensor,
    weights: ExpertWeights,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    *,
    activation: str = "silu",
    expert_map: torch.Tensor | None = None,
    apply_router_weight_on_input: bool = False,
) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """For every local expert with tokens: (local expert, |act(gate)| fp32 [m, I], routing weights fp32 [m])."""
    inter = weights.intermediate_size
    ids = local_experts(topk_ids, expert_map, weights.num_experts)
    routing = topk_weights.float()
    for e in torch.unique(ids[ids >= 0]).tolist():
        token, slot = torch.nonzero(ids == e, as_tuple=True)
        gate_rows = weights.w13[e, :inter].float()
        step = max(1, _CHUNK_ELEMENTS // max(inter, weights.hidden_size))
        for at in range(0, token.numel(), step):
            r = routing[token[at : at + step], slot[at : at + step]]
            x = hidden_states[token[at : at + step]]
            if apply_router_weight_on_input:
                x = (x.float() * r.unsqueeze(1)).to(x.dtype)
            gate = x.float() @ gate_rows.t()
            if weights.w13_bias is not None:
                gate = gate + weights.w13_bias[e, :inter].float()
            yield e, gate_activation(gate, activation).abs(), r


def _bins(values: torch.Tensor, octaves: tuple[int, int], split: int) -> torch.Tensor:
    """Bin of each fp32 value >= 0, int32; bin 0 also takes what lies below, the last one what lies above (and
    NaN).
    """
    bits = values.contiguous().view(torch.int32) >> (23 - split)
    count = (octaves[1] - octaves[0]) << split
    return (bits - ((octaves[0] + 127) << split)).clamp_(0, count - 1)


def _edges(octaves: tuple[int, int], split: int) -> np.ndarray:
    """fp64 [bins + 1]; the first bin is taken to start at zero."""
    parts = 1 << split
    steps = np.arange(((octaves[1] - octaves[0]) << split) + 1)
    edges = np.exp2(octaves[0] + steps // parts) * (1 + (steps % parts) / parts)
    edges[0] = 0.0
    return edges


def score_edges() -> np.ndarray:
    """Limits of the score bins (second axis of the joint histograms), fp64 [SCORE_BINS + 1], ascending from 0."""
    return _edges(SCORE_OCTAVES, SCORE_SPLIT)


class LayerHistogram:
    """Counts of one layer; see the module's docstring. int64 on one device. Add with ``observe`` and ``merge``."""

    NAMES = ("pairs", "gate", "routed", "gate_fine", "routed_fine", "experts")

    def __init__(self, device: torch.device | str = "cpu", num_experts: int = 0) -> None:
        fine = (SCORE_OCTAVES[1] - SCORE_OCTAVES[0]) << FINE_SPLIT
        self.pairs = torch.zeros(PAIR_BINS, dtype=torch.int64, device=device)
        self.gate = torch.zeros(ROUTING_BINS, SCORE_BINS, dtype=torch.int64, device=device)
        self.routed = torch.zeros(ROUTING_BINS, SCORE_BINS, dtype=torch.int64, device=device)
        self.gate_fine = torch.zeros(fine, dtype=torch.int64, device=device)
        self.routed_fine = torch.zeros(fine, dtype=torch.int64, device=device)
        bins = (SCORE_OCTAVES[1] - SCORE_OCTAVES[0]) << EXPERT_SPLIT
        self.experts = torch.zeros(2, num_experts, bins, dtype=torch.int64, device=device)

    def observe(self, magnitude: torch.Tensor, routing: torch.Tensor, expert: int | None = None) -> None:
        """magnitude: |act(gate)| [m, I]; routing: r [m]; both fp32. ``expert``: whose they are, numbered over the whole
        model.
        """
        self.pairs += torch.bincount(_bins(routing, ROUTING_OCTAVES, PAIR_SPLIT), minlength=PAIR_BINS)
        row = _bins(routing, ROUTING_OCTAVES, ROUTING_SPLIT).unsqueeze(1) * SCORE_BINS
        for kind, (joint, fine, score) in enumerate(
            (
                (self.gate, self.gate_fine, magnitude),
                (self.routed, self.routed_fine, magnitude * routing.unsqueeze(1)),
            )
        ):
            bins = _bins(score, SCORE_OCTAVES, FINE_SPLIT)
            fine += torch.bincount(bins.flatten(), minlength=fine.numel())
            flat = (row + (bins >> (FINE_SPLIT - SCORE_SPLIT))).flatten()
            joint += torch.bincount(flat, minlength=joint.numel()).view_as(joint)
            if expert is not None and self.experts.shape[1]:
                row_of = self.experts[kind, expert]
                row_of += torch.bincount((bins >> (FINE_SPLIT - EXPERT_SPLIT)).flatten(), minlength=row_of.numel())

    def merge(self, other: LayerHistogram) -> None:
        for name in self.NAMES:
            mine = getattr(self, name)
            mine += getattr(other, name).to(mine.device)

    def arrays(self) -> dict[str, np.ndarray]:
        return {name: getattr(self, name).cpu().numpy() for name in self.NAMES}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> LayerHistogram:
        histogram = cls()
        for name in cls.NAMES:
            setattr(histogram, name, torch.from_numpy(np.array(arrays[name])))
        return histogram

    def expert_quantiles(self, share: float, *, router_weighted: bool) -> np.ndarray:
        """The score below which ``share`` of each expert's neurons lie, fp64 [E]; infinite for an expert never seen."""
        edges = _edges(SCORE_OCTAVES, EXPERT_SPLIT)
        counts = self.experts[int(router_weighted)].cpu().numpy().astype(np.float64)
        return np.array([_quantile(row, edges, share) if row.sum() else np.inf for row in counts])

    def pair_threshold(self, share: float) -> float:
        """rho: the routing weight below which ``share`` of all pairs lie. 0 for share = 0.

        Routing weights that many pairs have in common (a router that gives every expert the same, say) are never cut
        through: such pairs are all kept, and fewer than ``share`` are skipped. Where none lie below them rho is 0, not
        the weight itself, which a last bit could fall short of.
        """
        _check_share("share of skipped pairs", share)
        if share == 0:
            return 0.0
        counts, edges = self.pairs.cpu().numpy().astype(np.float64), _edges(ROUTING_OCTAVES, PAIR_SPLIT)
        rho = _quantile(counts, edges, share)
        index = min(int(np.searchsorted(edges, rho, side="right")) - 1, len(counts) - 1)
        if counts[index] <= COMMON_SHARE * counts.sum():
            return rho
        return float(edges[index]) if counts[:index].any() else 0.0

    def skippable(self, rho_cap: float | None) -> float:
        """Share of pairs with r below ``rho_cap``: what may be skipped without passing it. None: 1."""
        if rho_cap is None:
            return 1.0
        counts = self.pairs.cpu().numpy().astype(np.float64)
        cumulative = np.concatenate([[0.0], np.cumsum(counts)])
        total = cumulative[-1]
        return float(np.interp(rho_cap, _edges(ROUTING_OCTAVES, PAIR_SPLIT), cumulative) / total) if total else 1.0

    def thresholds(self, target: float, *, score: str = "gate-routed", skip_pairs: float = 0.0) -> LayerThresholds:
        """tau and rho for a target share of inactive neurons, neurons of skipped pairs counted as inactive.

        ``skip_pairs``: share of the pairs to skip; at a smaller target the target itself is taken instead, and tau is
        0. Raises ValueError for a share outside 0..1 or an unknown score, UserError if nothing was observed.
        """
        _check_share("target sparsity", target)
        if score not in SCORES:
            raise ValueError(f"score must be one of {', '.join(SCORES)}, got {score!r}")
        if not int(self.pairs.sum()):
            raise UserError("no token was routed to this layer's experts during calibration: use more text")
        if target == 0:
            return LayerThresholds(0.0, 0.0)
        rho = self.pair_threshold(min(skip_pairs, target))
        joint, fine = (
            tensor.cpu().numpy().astype(np.float64)
            for tensor in ((self.gate, self.gate_fine) if score == "gate" else (self.routed, self.routed_fine))
        )
        remaining = self._remaining(rho)[:, None] * joint
        total, left = joint.sum(), remaining.sum()
        inactive_wanted = target * total - (total - left)
        if inactive_wanted <= 0 or left <= 0:
            return LayerThresholds(0.0, rho)
        # The remaining pairs' counts by coarse bin, spread inside each bin as the fine counts of all pairs are.
        coarse = fine.reshape(SCORE_BINS, -1).sum(1)
        share = np.divide(remaining.sum(0), coarse, out=np.zeros(SCORE_BINS), where=coarse > 0)
        spread = (fine.reshape(SCORE_BINS, -1) * share[:, None]).ravel()
        edges = _edges(SCORE_OCTAVES, FINE_SPLIT)
        return LayerThresholds(_quantile(spread, edges, min(1.0, inactive_wanted / left)), rho)

    def _remaining(self, rho: float) -> np.ndarray:
        """Share of each coarse bin's pairs with r >= rho, fp64 [ROUTING_BINS]."""
        fine = self.pairs.cpu().numpy().astype(np.float64)
        edges = _edges(ROUTING_OCTAVES, PAIR_SPLIT)
        kept = np.clip((edges[1:] - rho) / (edges[1:] - edges[:-1]), 0.0, 1.0) * fine
        coarse = fine.reshape(ROUTING_BINS, -1).sum(1)
        return np.divide(kept.reshape(ROUTING_BINS, -1).sum(1), coarse, out=np.ones(ROUTING_BINS), where=coarse > 0)

    def table(
        self, targets: Sequence[float] = DEFAULT_TARGETS, *, score: str = "gate-routed", skip_pairs: float = 0.0
    ) -> LayerTable:
        """The profile's table of this layer."""
        rows = [self.thresholds(t, score=score, skip_pairs=skip_pairs) for t in targets]
        return layer_table(targets, rows, [self.skippable(row.pair_threshold) for row in rows])


def layer_table(
    targets: Sequence[float], rows: Sequence[LayerThresholds], pair_skips: Sequence[float] = ()
) -> LayerTable:
    """A profile's table from one row for each target; columns are made non-decreasing. pair_skips: the share of the
    pairs below each row's pair threshold, kept where any are."""
    skips = tuple(round(float(v), 4) for v in np.maximum.accumulate(pair_skips)) if any(pair_skips) else None
    return LayerTable(
        pair_skips=skips,
        targets=tuple(targets),
        thresholds=tuple(float(v) for v in np.maximum.accumulate([row.threshold for row in rows])),
        pair_thresholds=tuple(float(v) for v in np.maximum.accumulate([row.pair_threshold for row in rows])),
    )


def _check_share(name: str, value: float) -> None:
    if not (isinstance(value, int | float) and 0 <= value <= 1):
        raise ValueError(f"{name} must lie in 0..1, got {value!r}")


def _quantile(counts: np.ndarray, edges: np.ndarray, share: float) -> float:
    """The value below which ``share`` of the counts lie; linear inside a bin."""
    cumulative = np.cumsum(counts)
    wanted = share * cumulative[-1]
    index = min(int(np.searchsorted(cumulative, wanted)), len(counts) - 1)
    before = cumulative[index - 1] if index else 0.0
    inside = (wanted - before) / counts[index] if counts[index] else 1.0
    return float(edges[index] + min(max(inside, 0.0), 1.0) * (edges[index + 1] - edges[index]))


@dataclass
class LayerHistograms:
    """Histograms of a model's MoE layers by layer name, and the number of tokens they were made from."""

    layers: dict[str, LayerHistogram] = field(default_factory=dict)
    tokens: int = 0

    def merge_arrays(self, arrays: Mapping[str, Mapping[str, np.ndarray]]) -> None:
        """Adds what one rank saw, as given by LayerHistogram.arrays per layer."""
        for name, part in arrays.items():
            histogram = LayerHistogram.from_arrays(part)
            if name in self.layers:
                self.layers[name].merge(histogram)
            else:
                self.layers[name] = histogram


@dataclass
class LayerCounters:
    """What a layer really did: exact integer counts over all ranks.

    pairs: (token, expert) pairs; skipped_pairs: of those, below the pair threshold; neurons: pairs times neurons per
    expert; active_neurons: of those, the ones computed.
    """

    pairs: int = 0
    skipped_pairs: int = 0
    neurons: int = 0
    active_neurons: int = 0

    @property
    def sparsity(self) -> float:
        """Share of inactive neurons over all pairs, skipped pairs counted as inactive; 0 if nothing was counted."""
        return 1.0 - self.active_neurons / self.neurons if self.neurons else 0.0

    @property
    def skipped_share(self) -> float:
        return self.skipped_pairs / self.pairs if self.pairs else 0.0

    def add(self, other: Mapping[str, Any]) -> None:
        self.pairs += other["pairs"]
        self.skipped_pairs += other["skipped_pairs"]
        self.neurons += other["neurons"]
        self.active_neurons += other["active_neurons"]


def count_active(
    magnitude: torch.Tensor,
    routing: torch.Tensor,
    tau: torch.Tensor,
    *,
    router_weighted: bool,
    pair_threshold: float,
) -> torch.Tensor:
    """Counts of one expert's pairs by the rule of reference.py: int64 [4] = pairs, skipped, neurons, active.

    magnitude [m, I], routing [m] as from expert_activations; tau broadcasts to [m, I].
    """
    keep = ~(routing < pair_threshold)
    score = magnitude * routing.unsqueeze(1) if router_weighted else magnitude
    active = ~(score < tau) & keep.unsqueeze(1)
    pairs = torch.tensor([magnitude.shape[0]], device=magnitude.device)
    return torch.cat(
        [pairs, (~keep).sum().view(1), pairs * magnitude.shape[1], active.sum().view(1)],
    )
