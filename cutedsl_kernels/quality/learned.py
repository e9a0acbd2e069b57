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
from .budgets import DEFAULT_CAP, Budget, cumulative_share, monotone
from .hf import Layer, MoEModel
from .metrics import kl_to_dense
from .scores import SCORES
from .search import Scored, spread_sequences

ANCHORS = (0.5, 0.7, 0.8, 0.9, 0.95)  # average sparsities trained for, in turn
STEPS = 200
BATCH_TOKENS = 2048
START_TOKENS = 8192  # for the moments and thresholds that training starts from
LEARNING_RATE = 0.05  # of log tau, each step
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
    """A layer in training: where log c starts, its change, log tau by anchor, and the active share of the last pass."""

    layer: Layer
    router_weighted: bool
    start: torch.Tensor
    change: torch.Tensor
    log_tau: torch.Tensor
    anchor: int = 0
    active: torch.Tensor = field(default_factory=lambda: torch.zeros(()))

    def forward(self, hidden_states: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor) -> torch.Tensor:
        """As Layer.forward, in the weights' dtype, differentiable by ``change`` and ``log_tau``."""
        weights, inter = self.layer.weights, self.layer.weights.intermediate_size
        result = torch.zeros(hidden_states.shape, dtype=torch.float32, device=hidden_states.device)
        flat = topk_ids.flatten()
        order = torch.argsort(flat, stable=True)
        start, active = 0, torch.zeros((), device=hidden_states.device)
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
            active = active + mask.sum()
            h = (a * u * mask).to(weights.w2_rows.dtype)
            result = result.index_add(0, token, (h @ weights.w2_rows[e]).float() * r)
        self.active = active / (flat.numel() * inter)
        return result.to(hidden_states.dtype)


def learn_thresholds(
    model: MoEModel,
    sequences: Sequence[Sequence[int]],
    *,
    router_weighted: bool = True,
    steps: int = STEPS,
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
    changes, taus = [t.change for t in training.values()], [t.log_tau for t in training.values()]
    optimizer = torch.optim.Adam([*changes, *taus], lr=LEARNING_RATE, betas=(0.9, 0.98))
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
            for group in optimizer.param_groups:
                group["lr"] = LEARNING_RATE * min(1.0, 2 * (steps - step) / steps)
            expected = dense(index)
            for trained in training.values():
                trained.anchor, trained.layer.override = anchor, trained.forward
            with torch.enable_grad():
                logits = model.model(input_ids=batches[index].to(model.device), use_cache=False).logits
                kl = kl_to_dense(expected, torch.log_softmax(logits.float(), dim=-1)).mean()
                share = torch.stack([trained.active for trained in training.values()]).mean() / kept
                loss = kl / first.setdefault(anchor, max(kl.item(), 1e-9))
                if anchor not in price:
                    price[anchor] = _price(loss, share, changes)
                (loss + price[anchor] * share).backward()
            optimizer.step()
            optimizer.zero_grad()
            excess = share.item() - 1
            price[anchor] *= math.exp(min(0.5, max(-0.5, 0.3 * excess)))
            with torch.no_grad():
                for trained in training.values():
                    trained.log_tau[anchor] += min(0.5, max(-0.5, 0.5 * excess))
                    trained.change.clamp_(-FARTHEST, FARTHEST)
            losses.append(loss.item())
            for trained in training.values():
                trained.layer.override = None
            progress(1)
    finally:
        for layer in model.layers.values():
            layer.override = None
    weights: dict[str, torch.Tensor | None] = {
        name: (t.start + t.change.detach()).exp() for name, t in training.items()
    }
    scored = Scored.with_weights(model, text, weights, router_weighted=router_weighted, capped=True)
    log_tau = {name: t.log_tau.detach().cpu().tolist() for name, t in training.items()}
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


def _price(loss: torch.Tensor, share: torch.Tensor, parameters: list[torch.Tensor]) -> float:
    """The multiplier of the active share that best cancels its gradient against the loss's."""
    of_loss = torch.autograd.grad(loss, parameters, retain_graph=True)
    of_share = torch.autograd.grad(share, parameters, retain_graph=True)
    cross = sum(float((x * y).sum()) for x, y in zip(of_loss, of_share, strict=True))
    square = sum(float(y.square().sum()) for y in of_share)
    return max(1e-3, -cross / square) if square else 1e-3


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
