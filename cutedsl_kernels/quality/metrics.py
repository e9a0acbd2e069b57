"""What sparsity does to a language model: perplexity, KL divergence to the dense model, changed predictions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch


def kl_to_dense(dense: torch.Tensor, sparse: torch.Tensor) -> torch.Tensor:
    """KL(dense || sparse) of each position in nats, fp32 [n]; both are log-probabilities [n, V]. Tokens of
    probability 0 add nothing.
    """
    probability = dense.exp()
    return torch.where(probability > 0, probability * (dense - sparse), 0.0).sum(-1).clamp(min=0)


@dataclass
class Comparison:
    """Running comparison of one setting with the dense model over chunks of positions. Holds one float per
    position.
    """

    nll: float = 0.0
    flips: int = 0
    positions: int = 0
    _kl: list[torch.Tensor] = field(default_factory=list)

    def add(self, next_tokens: torch.Tensor, dense: torch.Tensor, sparse: torch.Tensor) -> None:
        """next_tokens int64 [n]; dense, sparse: log-probabilities fp32 [n, V] of the same positions."""
        self.nll -= sparse.gather(1, next_tokens.unsqueeze(1)).double().sum().item()
        self.flips += int((dense.argmax(-1) != sparse.argmax(-1)).sum())
        self.positions += next_tokens.numel()
        self._kl.append(kl_to_dense(dense, sparse).cpu())

    def result(self) -> Quality:
        if not self.positions:
            raise ValueError("nothing was compared: add at least one position")
        kl = torch.cat(self._kl)
        mean_nll = self.nll / self.positions
        return Quality(
            positions=self.positions,
            perplexity=math.exp(mean_nll) if mean_nll < 700 else math.inf,
            kl_mean=kl.double().mean().item(),
            kl_p99=torch.quantile(kl, 0.99).item()
            if kl.numel() <= 1 << 24
            else kl.kthvalue(int(0.99 * kl.numel()))[0].item(),
            flip_rate=self.flips / self.positions,
        )


@dataclass(frozen=True)
class Quality:
    """positions compared; perplexity on the text; mean and 99th percentile of KL(dense || sparse) in nats; share of
    positions whose most likely token changed."""

    positions: int
    perplexity: float
    kl_mean: float
    kl_p99: float
    flip_rate: float


def agreement_length(dense: Sequence[int], sparse: Sequence[int]) -> int:
    """Number of tokens at the start on which two generations agree."""
    length = 0
    for a, b in zip(dense, sparse, strict=False):
        if a != b:
            break
        length += 1
    return length


def byte_gain_batch_1(sparsity: float, skipped_pairs: float) -> float:
    """Dense bytes over sparse bytes of one token's experts: the gate rows of kept pairs, two rows of each active
    neuron.

    sparsity: share of inactive neurons, skipped pairs counted as inactive; skipped_pairs: share of pairs skipped.
    Both in 0..1.
    """
    read = (1 - skipped_pairs) + 2 * (1 - sparsity)
    return 3 / read if read > 0 else math.inf
