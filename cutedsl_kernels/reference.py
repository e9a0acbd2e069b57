"""sparse_moe_ref: the definition of what every back end of this package must compute.

For one token x [H] routed to expert e with routing weight r (a *pair*):

    the pair is skipped, gate included, when r < pair_threshold
    g = W_gate x          a = act(g)          u = W_up x
    neuron i is active unless |a_i| * r < tau[e, i]     (router_weighted; without it: unless |a_i| < tau[e, i])
    y += r * sum over active i of a_i * u_i * w2_rows[e, i, :]

"Unless ... <" instead of ">=" makes a difference for NaN only: a NaN activation counts as active and reaches the output
instead of vanishing. tau = 0 and pair_threshold = 0 is the dense model. With ``apply_router_weight_on_input`` (Llama-4)
x is multiplied by r before the gate, rounded to x's dtype, and y is not; the rule for active neurons is unchanged, so a
router-weighted threshold counts r twice there and ``router_weighted=False`` is the natural choice.

Source: arXiv 2605.08575 for the rule with one threshold; the routing weight, the pair threshold and per-neuron
thresholds are this project's generalisation.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .weights import ExpertWeights

SWIGLUOAI_LIMIT = 7.0
SWIGLUOAI_ALPHA = 1.702

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "swigluoai")


def gate_activation(gate: torch.Tensor, activation: str) -> torch.Tensor:
    """act(g), elementwise, in g's dtype. ``swigluoai`` clamps g from above at 7 and is g * sigmoid(1.702 g)."""
    if activation == "silu":
        return F.silu(gate)
    if activation == "gelu":
        return F.gelu(gate)
    if activation == "gelu_tanh":
        return F.gelu(gate, approximate="tanh")
    if activation == "swigluoai":
        clamped = gate.clamp(max=SWIGLUOAI_LIMIT)
        return clamped * torch.sigmoid(SWIGLUOAI_ALPHA * clamped)
    raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")


def up_transform(up: torch.Tensor, activation: str) -> torch.Tensor:
    """What multiplies act(g): u itself, or clamp(u, -7, 7) + 1 for ``swigluoai``."""
    return up.clamp(-SWIGLUOAI_LIMIT, SWIGLUOAI_LIMIT) + 1 if activation == "swigluoai" else up


def local_experts(topk_ids: torch.Tensor, expert_map: torch.Tensor | None, num_experts: int) -> torch.Tensor:
    """``topk_ids`` as rows of this rank's weights, int64; -1 where the expert is remote or the id out of range."""
    ids = topk_ids.long()
    if expert_map is not None:
        size = expert_map.numel()
        known = (ids >= 0) & (ids < size)
        ids = F.pad(expert_map.long(), (0, 1), value=-1)[torch.where(known, ids, size)]
    return torch.where((ids >= 0) & (ids < num_experts), ids, -1)


def check_thresholds(thresholds: object) -> None:
    """TypeError unless it is a number or a tensor."""
    if not isinstance(thresholds, torch.Tensor | int | float):
        raise TypeError(f"thresholds must be a number or a tensor, got {type(thresholds).__name__}")


def expand_thresholds(
    thresholds: torch.Tensor | float, num_experts: int, intermediate_size: int, device: torch.device
) -> torch.Tensor:
    """A scalar, or a tensor that broadcasts to [E, I], as fp32 [E, I] (a view where possible)."""
    check_thresholds(thresholds)
    tau = torch.as_tensor(thresholds, dtype=torch.float32, device=device)
    try:
        return tau.expand(num_experts, intermediate_size)
    except RuntimeError:
        raise ValueError(
            f"thresholds must be a number or broadcast to [E, I] = [{num_experts}, {intermediate_size}], "
            f"got shape {tuple(tau.shape)}"
        ) from None


def sparse_moe_ref(
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
    plan: object | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """The definition, on any device, in fp32 inside; slow.

    hidden_states [T, H] float; topk_weights [T, k] float; topk_ids [T, k] int, global ids (-1 or out of range: no
    expert); thresholds: number or broadcastable to [E, I]; expert_map int [E_global], -1 for experts held elsewhere.
    ``plan`` is accepted and ignored so that the signature equals sparse_moe's. Returns [T, H] in hidden_states' dtype,
    or ``out`` [T, H] filled in its own dtype (fp32 gives the sum unrounded). A token with
    no local or no remaining pair gets zeros.
    """
    del plan
    tau = expand_thresholds(thresholds, weights.num_experts, weights.intermediate_size, hidden_states.device)
    ids = local_experts(topk_ids, expert_map, weights.num_experts)
    routing = topk_weights.float()
    keep_pair = (ids >= 0) & ~(routing < pair_threshold)
    inter = weights.intermediate_size
    result = torch.zeros(hidden_states.shape, dtype=torch.float32, device=hidden_states.device)
    for e in torch.unique(ids[keep_pair]).tolist():
        token, slot = torch.nonzero(keep_pair & (ids == e), as_tuple=True)
        r = routing[token, slot].unsqueeze(1)
        x = hidden_states[token]
        if apply_router_weight_on_input:
            x = (x.float() * r).to(x.dtype)
        w13 = weights.w13[e].float()
        gate_up = x.float() @ w13.t()
        if weights.w13_bias is not None:
            gate_up = gate_up + weights.w13_bias[e].float()
        a = gate_activation(gate_up[:, :inter], activation)
        u = up_transform(gate_up[:, inter:], activation)
        score = a.abs() * r if router_weighted else a.abs()
        h = torch.where(score < tau[e], 0.0, a * u)
        y = h @ weights.w2_rows[e].float()
        if weights.w2_bias is not None:
            y = y + weights.w2_bias[e].float()
        result.index_add_(0, token, y if apply_router_weight_on_input else y * r)
    if out is None:
        return result.to(hidden_states.dtype)
    return out.copy_(result)
