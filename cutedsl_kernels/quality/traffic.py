"""Weight traffic of real masks: bytes that a batch of tokens reads, and how far masks of tokens on the same expert
overlap.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from .hf import Layer, MoEModel, Tap

Masks = dict[int, tuple[torch.Tensor, torch.Tensor]]  # expert: (token [m], active [m, I] bool)


@dataclass
class LayerPairs:
    """Recorded pairs of one layer: for each expert, token [m], r [m] and score [m, I] (with r in it where the score
    has it).
    """

    tokens: int
    experts: dict[int, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]

    def masks(self, tau: float, rho: float) -> Masks:
        """Kept pairs and their active neurons under a threshold on the score and a pair threshold."""
        found = {}
        for e, (token, r, score) in self.experts.items():
            keep = r >= rho
            if keep.any():
                found[e] = (token[keep], score[keep] >= tau)
        return found


def record_pairs(
    model: MoEModel,
    sequences: Sequence[Sequence[int]],
    weights: Mapping[str, torch.Tensor | None],
    *,
    router_weighted: bool,
) -> dict[str, LayerPairs]:
    """Every pair's score on the dense model; memory: 4 bytes * tokens * k * I for each layer, so keep the text
    short.
    """
    total = sum(map(len, sequences))
    found = {name: LayerPairs(total, {}) for name in model.layers}
    seen = 0

    def make(layer: Layer) -> Tap:
        c = weights[layer.name]

        def tap(
            e: int, token: torch.Tensor, r: torch.Tensor, a: torch.Tensor, u: torch.Tensor, active: torch.Tensor
        ) -> None:
            score = a.abs() if c is None else a.abs() * c[e]
            part = (token + seen, r, score * r.unsqueeze(1) if router_weighted else score)
            before = found[layer.name].experts.get(e)
            joined = part if before is None else tuple(torch.cat(pair) for pair in zip(before, part, strict=True))
            found[layer.name].experts[e] = (joined[0], joined[1], joined[2])

        return tap

    model.set_rules(None)
    model.set_taps(make)
    try:
        for batch in model.batches(sequences):
            model.log_probs(batch)
            seen += batch.numel()
    finally:
        model.set_taps(None)
    return found


def batch_bytes(pairs: LayerPairs, masks: Masks, batch: int, generator: torch.Generator, samples: int = 16) -> float:
    """Bytes read by ``batch`` random tokens over the dense layer's bytes for the same tokens, mean of ``samples``
    draws.

    Gate rows of every expert with a kept pair, two rows of every neuron that is active for at least one of its tokens.
    """
    total = 0.0
    for _ in range(samples):
        chosen = torch.zeros(pairs.tokens, dtype=torch.bool)
        chosen[torch.randperm(pairs.tokens, generator=generator)[:batch]] = True
        read = dense = 0
        for e, (token, _, score) in pairs.experts.items():
            if not chosen[token.cpu()].any():
                continue
            inter = score.shape[1]
            dense += 3 * inter
            if e in masks:
                kept, active = masks[e]
                rows = chosen[kept.cpu()].to(active.device)
                if rows.any():
                    read += inter + 2 * int(active[rows].any(0).sum())
        total += read / dense if dense else 1.0
    return total / samples


@dataclass(frozen=True)
class Overlap:
    """Of m tokens on one expert: share of neurons active for at least one, and intersection over union, means over
    draws.
    """

    union: float
    iou: float


def overlap(masks: Masks, m: int, generator: torch.Generator, draws: int = 200) -> Overlap | None:
    """None where no expert has m tokens. Experts are drawn in proportion to their tokens."""
    sizes = {e: active.shape[0] for e, (_, active) in masks.items() if active.shape[0] >= m}
    if not sizes:
        return None
    experts = list(sizes)
    share = torch.tensor([float(sizes[e]) for e in experts])
    unions, ious = [], []
    for index in torch.multinomial(share, draws, replacement=True, generator=generator).tolist():
        active = masks[experts[index]][1]
        rows = torch.randperm(active.shape[0], generator=generator)[:m].to(active.device)
        union, both = active[rows].any(0).sum().item(), active[rows].all(0).sum().item()
        unions.append(union / active.shape[1])
        if union:
            ious.append(both / union)
    return Overlap(sum(unions) / draws, sum(ious) / len(ious) if ious else 0.0)
