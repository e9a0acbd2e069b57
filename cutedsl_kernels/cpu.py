"""The CPU back end of sparse_moe: gate in full, then only the rows of up and down that a token of the expert needs."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .plan import Plan
from .reference import expand_thresholds, gate_activation, local_experts, up_transform
from .weights import ExpertWeights


def sparse_moe_cpu(
    hidden_states: torch.Tensor,
    weights: ExpertWeights,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    thresholds: torch.Tensor | float,
    *,
    router_weighted: bool = True,
    pair_threshold: float = 0.0,
    activation: str = "silu",
    expert_map: torch.Tensor | None = None,
    apply_router_weight_on_input: bool = False,
    plan: Plan | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Same arguments, result and errors as sparse_moe (which validates them); weights and inputs on the CPU."""
    del plan
    inter = weights.intermediate_size
    tau = expand_thresholds(thresholds, weights.num_experts, inter, hidden_states.device)
    ids = local_experts(topk_ids, expert_map, weights.num_experts)
    routing = topk_weights.float()
    keep_pair = (ids >= 0) & ~(routing < pair_threshold)
    result = torch.zeros(hidden_states.shape, dtype=torch.float32)
    for e in torch.unique(ids[keep_pair]).tolist():
        token, slot = torch.nonzero(keep_pair & (ids == e), as_tuple=True)
        r = routing[token, slot].unsqueeze(1)
        x = hidden_states[token]
        if apply_router_weight_on_input:
            x = (x.float() * r).to(x.dtype)
        gate = F.linear(x, weights.w13[e, :inter]).float()
        if weights.w13_bias is not None:
            gate = gate + weights.w13_bias[e, :inter].float()
        a = gate_activation(gate, activation)
        inactive = (a.abs() * r if router_weighted else a.abs()) < tau[e]
        rows = torch.nonzero(~inactive.all(0)).squeeze(1)
        up = F.linear(x, weights.w13[e].index_select(0, rows + inter)).float()
        if weights.w13_bias is not None:
            up = up + weights.w13_bias[e, inter:].index_select(0, rows).float()
        h = a.index_select(1, rows) * up_transform(up, activation)
        h = h.masked_fill(inactive.index_select(1, rows), 0.0).to(x.dtype)
        y = (h @ weights.w2_rows[e].index_select(0, rows)).float()
        if weights.w2_bias is not None:
            y = y + weights.w2_bias[e].float()
        result.index_add_(0, token, y if apply_router_weight_on_input else y * r)
    if out is None:
        return result.to(hidden_states.dtype)
    out.copy_(result)
    return out
