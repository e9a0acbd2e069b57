"""The dense path for large T: torch's grouped matrix product over pairs sorted by expert, on the same re-laid weights.

Every gate, up and down row of an expert that has a pair is read and multiplied; skipped pairs cost nothing. Inactive
neurons are set to zero between the products, so that the result is that of sparse_moe_ref up to the dtype: the gate is
rounded to it before it meets the threshold, where the kernels compare in fp32.
Nothing is synchronised with the host. Works on any device where torch has grouped_mm.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .reference import gate_activation, local_experts, up_transform
from .weights import ExpertWeights

ROWS_AT_ONCE = 16384  # pairs whose activations are in memory as fp32 at the same time


def sparse_moe_dense(
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
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Arguments, result and dtypes of sparse_moe, which has validated them."""
    num_tokens, top_k = topk_ids.shape
    num_experts = weights.num_experts
    routing = topk_weights.float()
    experts = local_experts(topk_ids, expert_map, num_experts)
    kept = (experts >= 0) & ~(routing < pair_threshold)
    # Pairs in the order of their experts; those nobody computes come last and belong to no group.
    group, order = torch.sort(torch.where(kept, experts, num_experts).flatten(), stable=True)
    ends = torch.searchsorted(group, torch.arange(num_experts, device=group.device), right=True, out_int32=True)
    expert = group.clamp(max=num_experts - 1)
    r = routing.flatten()[order].unsqueeze(1)
    x = hidden_states[order // top_k]
    if apply_router_weight_on_input:
        x = (x.float() * r).to(x.dtype)

    gate_up = F.grouped_mm(x, weights.w13.transpose(1, 2), offs=ends)
    h = _products(gate_up, weights, r, expert, thresholds, router_weighted, activation, apply_router_weight_on_input)
    y = F.grouped_mm(h, weights.w2_rows, offs=ends)

    place = torch.empty_like(order)
    place[order] = torch.arange(order.numel(), device=order.device)
    place = place.view(num_tokens, top_k)
    total = torch.zeros(hidden_states.shape, dtype=torch.float32, device=hidden_states.device)
    for j in range(top_k):
        part = y[place[:, j]].float()
        if weights.w2_bias is not None:
            bias = weights.w2_bias[experts[:, j].clamp(min=0)].float()
            part += bias if apply_router_weight_on_input else bias * routing[:, j : j + 1]
        total += torch.where(kept[:, j : j + 1], part, 0.0)  # rows outside the groups hold anything, NaN included
    if out is None:
        return total.to(hidden_states.dtype)
    return out.copy_(total)


def _products(
    gate_up: torch.Tensor,
    weights: ExpertWeights,
    r: torch.Tensor,
    expert: torch.Tensor,
    thresholds: torch.Tensor | float,
    router_weighted: bool,
    activation: str,
    weight_on_input: bool,
) -> torch.Tensor:
    """[P, 2I] -> [P, I]: a * u, times the routing weight unless x had it, zero where inactive."""
    inter = weights.intermediate_size
    h = torch.empty(gate_up.shape[0], inter, dtype=gate_up.dtype, device=gate_up.device)
    tau = thresholds
    if isinstance(tau, torch.Tensor):
        tau = tau.to(device=gate_up.device, dtype=torch.float32).expand(weights.num_experts, inter)
    for start in range(0, gate_up.shape[0], ROWS_AT_ONCE):
        rows = slice(start, start + ROWS_AT_ONCE)
        both = gate_up[rows].float()
        if weights.w13_bias is not None:
            both += weights.w13_bias[expert[rows]].float()
        a = gate_activation(both[:, :inter], activation)
        u = up_transform(both[:, inter:], activation)
        product = a * u if weight_on_input else a * u * r[rows]
        if isinstance(tau, torch.Tensor) or tau > 0:
            score = a.abs() * r[rows] if router_weighted else a.abs()
            limit = tau[expert[rows]] if isinstance(tau, torch.Tensor) else tau
            product = torch.where(score < limit, 0.0, product)
        h[rows] = product
    return h
