"""What an engine does not show: spread of sparsity, mask overlap, the oracle, agreement of generations. Plain torch
(hf.py).
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import UserError
from ..sparsity import LayerThresholds, SparsityProfile
from .hf import Layer, MoEModel, Rule, Tap
from .metrics import agreement_length
from .scores import load_neuron_parts, matches_check, neuron_weights, score_named
from .search import Evaluator, Scored
from .traffic import overlap, record_pairs

OVERLAP_TOKENS = (2, 4, 8, 16)
PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 4, 64, 64


@dataclass(frozen=True)
class Details:
    """Figures of one target, means over layers. spread_tokens, spread_experts: standard deviation of sparsity over
    tokens, and over experts. lost_tokens: share of (token, layer) left without any pair. union, iou: by number of
    tokens on an expert. agreement: mean tokens on which greedy generations agree, of NEW_TOKENS. oracle_kl: mean KL
    of selection by true contribution.
    """

    target: float
    kl_mean: float
    sparsity: float
    spread_tokens: float
    spread_experts: float
    lost_tokens: float
    union: dict[int, float]
    iou: dict[int, float]
    agreement: float
    oracle_kl: float | None = None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def profile_weights(
    model: MoEModel, profile: SparsityProfile, path: str | os.PathLike[str]
) -> dict[str, torch.Tensor | None]:
    """c of every layer for a profile read from ``path``; layers are matched in order. UserError if the weights do not
    fit.
    """
    if len(profile.layers) != len(model.layers):
        raise UserError(f"{path}: has {len(profile.layers)} layers, the model has {len(model.layers)}")
    score = score_named(profile.score)
    parts = None
    if profile.neurons is not None:
        parts = load_neuron_parts(Path(path).parent / profile.neurons.file, profile.neurons.sha256, profile.layers)
    found = {}
    for name, layer in zip(profile.layers, model.layers.values(), strict=True):
        rms = None
        if parts is not None:
            if not matches_check(parts[name].check, layer.weights):
                raise UserError(f"{path}: made for other weights (norms of {name} differ): calibrate this checkpoint")
            rms = parts[name].rms_up
        found[layer.name] = neuron_weights(score, layer.weights, None if rms is None else rms.float())
    return found


def measure_details(
    model: MoEModel,
    profile: SparsityProfile,
    path: str | os.PathLike[str],
    sequences: Sequence[Sequence[int]],
    targets: Sequence[float],
    *,
    oracle: bool = False,
) -> list[Details]:
    """Details for every target, on ``sequences`` of token ids; the dense model is run once."""
    weights = profile_weights(model, profile, path)
    evaluator = Evaluator(model, sequences)
    pairs = record_pairs(model, sequences[:4], weights, router_weighted=profile.router_weighted)
    best = Scored.record_oracle(model, sequences) if oracle else None
    prompts = torch.tensor([list(s[:PROMPT_TOKENS]) for s in sequences if len(s) >= PROMPT_TOKENS][:PROMPTS])
    dense = _continue(model, prompts, None)
    found = []
    for target in targets:
        limits = {
            layer: profile.thresholds(name, target) for name, layer in zip(profile.layers, model.layers, strict=True)
        }
        rules = _rules(limits, weights, profile.router_weighted)
        counts = _Counts(model)
        model.set_taps(counts.tap)
        try:
            quality = evaluator.quality(rules)
        finally:
            model.set_taps(None)
        sparsity = evaluator.realised()[0]
        spread_tokens, spread_experts, lost = counts.spreads()
        generator = torch.Generator().manual_seed(0)
        union, iou = {}, {}
        for m in OVERLAP_TOKENS:
            drawn = [overlap(p.masks(*limits[name]), m, generator) for name, p in pairs.items()]
            kept = [o for o in drawn if o is not None]
            if kept:
                union[m] = sum(o.union for o in kept) / len(kept)
                iou[m] = sum(o.iou for o in kept) / len(kept)
        agreed = [agreement_length(a, b) for a, b in zip(dense, _continue(model, prompts, rules), strict=True)]
        oracle_kl = None if best is None else evaluator.quality(best.rules(sparsity)).kl_mean
        mean_agreed = sum(agreed) / len(agreed) if agreed else 0.0
        found.append(
            Details(
                target,
                quality.kl_mean,
                sparsity,
                spread_tokens,
                spread_experts,
                lost,
                union,
                iou,
                mean_agreed,
                oracle_kl,
            )
        )
    return found


def _rules(
    limits: Mapping[str, LayerThresholds], weights: Mapping[str, torch.Tensor | None], router_weighted: bool
) -> dict[str, Rule]:
    found = {}
    for name, (tau, rho) in limits.items():
        c = weights[name]
        found[name] = Rule(tau if c is None else tau / c, rho, router_weighted)
    return found


class _Counts:
    """Active neurons per token and per expert of every layer, over a run. Batches are told apart by the layer's first
    expert.
    """

    def __init__(self, model: MoEModel) -> None:
        self.model = model
        self.tokens: dict[str, list[torch.Tensor]] = {name: [] for name in model.layers}
        self.experts = {name: torch.zeros(layer.weights.num_experts, 2) for name, layer in model.layers.items()}

    def tap(self, layer: Layer) -> Tap:
        def tap(
            expert: int, token: torch.Tensor, r: torch.Tensor, a: torch.Tensor, u: torch.Tensor, active: torch.Tensor
        ) -> None:
            parts = self.tokens[layer.name]
            if not parts or layer.new_call:
                parts.append(torch.zeros(layer.num_tokens, 2))
                layer.new_call = False
            share = active.float().sum(1).cpu()
            parts[-1].index_add_(0, token.cpu(), torch.stack([share, torch.ones_like(share)], dim=1))
            self.experts[layer.name][expert] += torch.tensor([float(share.sum()), float(active.numel())])

        return tap

    def spreads(self) -> tuple[float, float, float]:
        """(over tokens, over experts, share of tokens without a pair), means over layers."""
        over_tokens, over_experts, lost = [], [], []
        for name, layer in self.model.layers.items():
            rows = torch.cat(self.tokens[name])
            per_token = 1 - rows[:, 0] / (layer.top_k * layer.weights.intermediate_size)
            over_tokens.append(per_token.std().item())
            lost.append((rows[:, 1] == 0).float().mean().item())
            seen = self.experts[name][:, 1] > 0
            over_experts.append((1 - self.experts[name][seen, 0] / self.experts[name][seen, 1]).std().item())
        count = len(over_tokens)
        return sum(over_tokens) / count, sum(over_experts) / count, sum(lost) / count


def _continue(model: MoEModel, prompts: torch.Tensor, rules: dict[str, Rule] | None) -> list[list[int]]:
    """Greedy continuations of prompts [B, L]."""
    if not prompts.numel():
        return []
    model.set_rules(rules)
    with torch.no_grad():
        answer = model.model.generate(
            prompts.to(model.device),
            attention_mask=torch.ones_like(prompts).to(model.device),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            min_new_tokens=NEW_TOKENS,
            pad_token_id=0,
        )
    return answer[:, prompts.shape[1] :].tolist()
