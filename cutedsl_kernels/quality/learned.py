"""Thresholds learned by gradient descent on KL: a weight per neuron, and each layer's sparsity for any average.

A neuron's threshold is tau[t, layer] / c[e, i], t being the average sparsity asked for. Both factors are trained at
once, on calibration text, with the model's own weights fixed. The forward pass uses the hard mask of the kernels;
backwards the step is given the slope of a sigmoid in log(score / tau). docs/thresholds.md derives it. Plain torch
(hf.py), since it needs a backward pass, which a serving engine does not have.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from ..calibration import score_edges
from ..errors import UserError
from ..reference import gate_activation
from . import LEARN_STEPS
from .budgets import DEFAULT_CAP, Budget, cumulative_share, monotone
from .hf import Layer, MoEModel
from .metrics import kl_to_dense
from .scores import SCORES
from .search import Scored, spread_sequences

ANCHORS = (0.5, 0.7, 0.8, 0.9, 0.95)  # average sparsities trained for, in turn
BATCH_TOKENS = 2048
START_TOKENS = 8192  # for the moments and thresholds that training starts from
LEARNING_RATE = 0.03  # of log c, for a neuron whose keeping is worth twice its price
LARGEST_STEP = 3.0  # times the learning rate
MEMORY = 0.95  # of the running mean of densities, each step
SOFTNESS = 0.5  # width of the sigmoid, in units of log(score)
FARTHEST = 3.0  # no weight moves further than exp(3) from where it started
CACHE_BYTES = 1 << 30  # dense predictions kept between steps, at most


@dataclass
class Learned:
    """scored: c fp32 [E, I] by layer name, capped per expert, and its histograms; budget: sparsity of every layer for
    an average; losses: KL over the first one seen at the same sparsity, step by step.
    """

    scored: Scored
    budget: Budget
    losses: list[float]

    def factors(self, layers: Mapping[str, Layer]) -> list[torch.Tensor]:
        """What a profile's file of per-neuron parts holds, layer by layer: c over the down norm, fp16 [E, I], within
        the range of fp16.
        """
        found = []
        for name, c in self.scored.weights.items():
            if c is not None:
                found.append((c / layers[name].down_norms.clamp(min=1e-20)).clamp(2.0**-14, 2.0**15).half().cpu())
        return found


@dataclass
class _Trained:
    """A layer in training: where log c starts, its change, log tau by anchor; of the last pass the active share, and
    its derivatives by log c (``density`` [E, I]); their running mean.
    """

    layer: Layer
    router_weighted: bool
    start: torch.Tensor
    change: torch.Tensor
    log_tau: torch.Tensor
    anchor: int = 0
    active: float = 0.0
    density: torch.Tensor = field(init=False)
    usual: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.steps = 0
        self.density, self.usual = torch.zeros_like(self.start), torch.zeros_like(self.start)
        self.mean_change, self.mean_log_tau = self.change.detach().clone(), self.log_tau.detach().clone()

    def forward(self, hidden_states: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor) -> torch.Tensor:
        """As Layer.forward, in the weights' dtype, differentiable by ``change`` and ``log_tau``."""
        weights, inter = self.layer.weights, self.layer.weights.intermediate_size
        result = torch.zeros(hidden_states.shape, dtype=torch.float32, device=hidden_states.device)
        flat = topk_ids.flatten()
        order = torch.argsort(flat, stable=True)
        start, active, events = 0, torch.zeros((), device=hidden_states.device), flat.numel() * inter
        self.density.zero_()
        for e, count in enumerate(torch.bincount(flat, minlength=weights.num_experts).tolist()):
            chosen = order[start : start + count]
            start += count
            if not count:
                continue
            token = chosen // topk_ids.shape[1]
            r = topk_weights.flatten()[chosen].float().unsqueeze(1)
            gate_up = (hidden_states[token].to(weights.w13.dtype) @ weights.w13[e].t()).float()
            a, u = gate_activation(gate_up[:, :inter], self.layer.activation), gate_up[:, inter:]
            score = (a * r if self.router_weighted else a).abs().clamp(min=1e-20)
            distance = score.log() + self.start[e] + self.change[e] - self.log_tau[self.anchor]
            soft = torch.sigmoid(distance / SOFTNESS)
            mask = (distance >= 0).float() + soft - soft.detach()
            active += (distance >= 0).sum()
            kept = soft.detach()
            self.density[e] = (kept * (1 - kept)).sum(0) / (SOFTNESS * events)
            h = (a * u * mask).to(weights.w2_rows.dtype)
            result = result.index_add(0, token, (h @ weights.w2_rows[e]).float() * r)
        self.active = float(active) / events
        return result.to(hidden_states.dtype)

    @torch.no_grad()
    def step(self, rate: float, price: float, shift: float, share: float) -> None:
        """One step down the loss whose gradients are held, the active share costing ``price`` in every neuron; log tau
        also moves by ``shift``. ``share``: weight of the result in the running means.

        A neuron moves by how far its worth for its price lies from 1, drawn towards no move where it is seldom near its
        threshold.
        """
        self.steps += 1
        self.usual.mul_(MEMORY).add_(self.density, alpha=1 - MEMORY)
        scale = price * (self.usual + self.usual.mean() + 1e-20) / (1 - MEMORY**self.steps)
        if self.change.grad is not None and self.log_tau.grad is not None:
            move = -(self.change.grad + price * self.density) / scale
            self.change += rate * move.clamp(-LARGEST_STEP, LARGEST_STEP)
            total = self.density.sum()
            gain = -(self.log_tau.grad[self.anchor] - price * total) / (price * total + 1e-20)
            self.log_tau[self.anchor] += rate * gain.clamp(-LARGEST_STEP, LARGEST_STEP)
            self.change.grad = self.log_tau.grad = None
        self.log_tau[self.anchor] += shift
        self.change.clamp_(-FARTHEST, FARTHEST)
        self.mean_change.lerp_(self.change, share)
        self.mean_log_tau.lerp_(self.log_tau, share)


def learn_thresholds(
    model: MoEModel,
    sequences: Sequence[Sequence[int]],
    *,
    router_weighted: bool = True,
    steps: int = LEARN_STEPS,
    anchors: Sequence[float] = ANCHORS,
    seed: int = 0,
    progress: Callable[[int], Any] = lambda steps: None,
) -> Learned:
    """Trains on ``sequences`` of token ids; starts from the score `moments`, the same sparsity in every layer.

    Every step takes about BATCH_TOKENS tokens and one of ``anchors`` (averages in 0..1, ascending). Leaves the model
    dense. UserError if the sequences are too few to learn from.
    """
    if steps < 1 or not anchors or any(not 0 < anchor < 1 for anchor in anchors):
        raise ValueError(f"steps must be at least 1 and anchors lie between 0 and 1, got {steps} and {tuple(anchors)}")
    batches = [batch for batch in model.batches(sequences, BATCH_TOKENS) if batch.shape[1] > 1]
    if not batches:
        raise UserError("no sequence of two tokens or more to learn thresholds from: give more text")
    generator = torch.Generator().manual_seed(seed)
    text = spread_sequences(sequences, START_TOKENS)
    begin = Scored.record(model, text, SCORES["moments-routed" if router_weighted else "moments"])
    training = _prepare(model, begin, router_weighted, anchors)
    first: dict[int, float] = {}
    price: dict[int, float] = {}
    dense = _Dense(model, batches)
    losses: list[float] = []
    order: list[int] = []  # of batches, and of anchors: drawn again when used up
    turns: list[int] = []
    try:
        for step in range(steps):
            order = order or torch.randperm(len(batches), generator=generator).tolist()
            turns = turns or torch.randperm(len(anchors), generator=generator).tolist()
            index, anchor = order.pop(), turns.pop()
            kept = 1 - anchors[anchor]
            rate = LEARNING_RATE * min(1.0, 2 * (steps - step) / steps)
            expected = dense(index)
            for trained in training.values():
                trained.anchor, trained.layer.override = anchor, trained.forward
            with torch.enable_grad():
                logits = model.model(input_ids=batches[index].to(model.device), use_cache=False).logits
                kl = kl_to_dense(expected, torch.log_softmax(logits.float(), dim=-1)).mean()
                loss = kl / first.setdefault(anchor, max(kl.item(), 1e-9))
                loss.backward()
            excess = sum(trained.active for trained in training.values()) / len(training) / kept - 1
            if anchor not in price:
                price[anchor] = _price(list(training.values()), kept)
            for trained in training.values():
                trained.step(rate, price[anchor] / (kept * len(training)), 0.5 * _within(excess, 1.0), 2 / (step + 2))
            price[anchor] *= math.exp(0.3 * _within(excess, 1.5))
            losses.append(loss.item())
            for trained in training.values():
                trained.layer.override = None
            progress(1)
    finally:
        for layer in model.layers.values():
            layer.override = None
    weights: dict[str, torch.Tensor | None] = {name: (t.start + t.mean_change).exp() for name, t in training.items()}
    scored = Scored.with_weights(model, text, weights, router_weighted=router_weighted, capped=True)
    log_tau = {name: t.mean_log_tau.cpu().tolist() for name, t in training.items()}
    return Learned(scored, _budget(scored, log_tau, anchors), losses)


def _prepare(model: MoEModel, begin: Scored, router_weighted: bool, anchors: Sequence[float]) -> dict[str, _Trained]:
    rows = [begin.thresholds(anchor) for anchor in anchors]
    found = {}
    for name, layer in model.layers.items():
        c = begin.weights[name]
        if c is None:
            raise ValueError(f"layer {name} has no weights to start from")
        start = c.float().log()
        log_tau = torch.tensor([math.log(max(row[name].threshold, 1e-20)) for row in rows], device=c.device)
        found[name] = _Trained(
            layer, router_weighted, start, torch.zeros_like(start).requires_grad_(), log_tau.requires_grad_()
        )
    return found


def _price(training: Sequence[_Trained], kept: float) -> float:
    """The price of the active share (over ``kept``) that best cancels its gradient against the loss's."""
    cross = square = 0.0
    for trained in training:
        if trained.change.grad is not None:
            density = trained.density / (kept * len(training))
            cross -= float((trained.change.grad * density).sum())
            square += float(density.square().sum())
    return max(1e-3, cross / square) if square else 1e-3


def _within(value: float, limit: float) -> float:
    return min(limit, max(-limit, value))


class _Dense:
    """The dense model's log-probabilities for each batch, computed when first asked for; kept while they are small."""

    def __init__(self, model: MoEModel, batches: Sequence[torch.Tensor]) -> None:
        self.model, self.batches = model, batches
        self.kept: dict[int, torch.Tensor] = {}
        self.bytes = 0

    def __call__(self, index: int) -> torch.Tensor:
        found = self.kept.get(index)
        if found is None:
            self.model.set_rules(None)
            found = self.model.log_probs(self.batches[index])
            if self.bytes + 4 * found.numel() <= CACHE_BYTES:
                self.bytes += 4 * found.numel()
                self.kept[index] = found
        return found


def _budget(scored: Scored, log_tau: dict[str, list[float]], anchors: Sequence[float]) -> Budget:
    """Sparsity that each layer has at its own tau, all tau of an anchor shifted alike until the average is met; no
    layer beyond DEFAULT_CAP (or the anchor, if higher).
    """
    shares = {n: cumulative_share(h, router_weighted=scored.router_weighted) for n, h in scored.histograms.items()}
    edges = score_edges()
    allocation = {1.0: dict.fromkeys(shares, 1.0)}
    for index, anchor in enumerate(anchors):
        cap, row = max(DEFAULT_CAP, anchor), dict.fromkeys(shares, anchor)
        low, high = -20.0, 20.0
        for _ in range(50):
            shift = (low + high) / 2
            taus = {name: math.exp(log_tau[name][index] + shift) for name in shares}
            row = {name: min(cap, float(np.interp(taus[name], edges, share))) for name, share in shares.items()}
            low, high = (shift, high) if sum(row.values()) < anchor * len(row) else (low, shift)
        allocation[anchor] = row
    return Budget(monotone(allocation))
