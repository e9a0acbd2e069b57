"""What one routed-expert layer holds at run time: weights, thresholds, and what is being recorded. No vLLM in here."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from ...calibration import LayerHistogram, count_active, expert_activations
from ...reference import expand_thresholds
from ...weights import ExpertWeights


@dataclass
class LayerState:
    """One layer on one rank.

    tau: fp32 on the weights' device, [1, 1] or [E, I]; rho: pair threshold; tau and rho zero is the dense model.
    counters: int64 [4] per label (see count_active), filled while ``counting``. tp_size, tp_rank: how this layer's
    neurons are sharded (1 and 0 under expert parallelism); local_ids: global ids of the local experts, None if all
    are local.
    """

    name: str
    weights: ExpertWeights
    top_k: int
    activation: str
    router_weight_on_input: bool
    tau: torch.Tensor
    rho: float = 0.0
    router_weighted: bool = True
    label: str = "0"
    sparsity: float = 0.0
    tp_size: int = 1
    tp_rank: int = 0
    counting: bool = False
    recorder: LayerHistogram | None = None
    counters: dict[str, torch.Tensor] = field(default_factory=dict)

    def set(self, tau: float | torch.Tensor, rho: float, router_weighted: bool, label: str, sparsity: float) -> None:
        """New thresholds. ``tau`` a number, or broadcastable to this rank's [E, I]; ``sparsity``: what they aim at
        (0..1).
        """
        device = self.weights.device
        if isinstance(tau, torch.Tensor) and tau.numel() > 1:
            new = expand_thresholds(
                tau.to(device), self.weights.num_experts, self.weights.intermediate_size, device
            ).contiguous()
        else:
            new = torch.full((1, 1), float(tau), dtype=torch.float32, device=device)
        if new.shape == self.tau.shape:
            self.tau.copy_(new)
        else:
            self.tau = new
        self.rho, self.router_weighted, self.label, self.sparsity = float(rho), router_weighted, label, sparsity

    @property
    def dense(self) -> bool:
        return self.sparsity == 0.0

    def observe(
        self,
        hidden_states: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        expert_map: torch.Tensor | None,
    ) -> None:
        """Feeds the recorder and the counters; does nothing when neither is on. Synchronises the device."""
        if self.recorder is None and not self.counting:
            return
        counts = self.counters.setdefault(self.label, torch.zeros(4, dtype=torch.int64, device=self.weights.device))
        for expert, magnitude, routing in expert_activations(
            hidden_states,
            self.weights,
            topk_weights,
            topk_ids,
            activation=self.activation,
            expert_map=expert_map,
            apply_router_weight_on_input=self.router_weight_on_input,
        ):
            if self.recorder is not None:
                self.recorder.observe(magnitude, routing)
            if self.counting:
                tau = self.tau if self.tau.shape[0] == 1 else self.tau[expert]
                counts += count_active(
                    magnitude, routing, tau, router_weighted=self.router_weighted, pair_threshold=self.rho
                )
