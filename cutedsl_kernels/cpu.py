"""The CPU back end of sparse_moe: gate in full, then only the rows of up and down that a token of the expert needs.

Per expert with m tokens, bytes as read from w13 and w2_rows:

    gate    one product with the expert's I gate rows                                      I*H
    mask    |act(gate)| (times r) against tau; the rows any of the m tokens needs: n       -
    up      those n rows copied together, one product                                      n*H
    down    up to BAG_TOKENS tokens: a weighted sum of rows read in place; else as up      n*H

An expert whose n exceeds GATHER_LIMIT of its I rows reads them all: copying rows together costs more than it saves
there. So does an expert of at most SMALL_EXPERT weights in gate, or with more than MANY_TOKENS tokens.

Tried on 2026-11-23 (AVX-512 without AMX, bf16, 15 % of 1024 rows of 2048, one token, one thread, us): reading down rows
in place 76 against 133 for copying them and 705 for all; up as product and sum over copied rows 192 against 149 for
copy and F.linear; torch.mv 822 for the gate against 473 for F.linear. fp16 products with down take 16 ms where bf16's
take 0.7, hence the widening. A token given twice, so that F.linear takes another path, changed nothing.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .plan import Plan
from .reference import expand_thresholds, gate_activation, local_experts, up_transform
from .weights import ExpertWeights

BAG_TOKENS = 8
GATHER_LIMIT = 0.45
SMALL_EXPERT = 1 << 18  # I * H up to which skipping rows costs more in calls than it saves in reading
MANY_TOKENS = 32  # m above which nearly every row is needed by some token at any sparsity worth running

# tau [I] of the expert, and the routing weights r [m, 1] of its pairs if they count.
_Rule = tuple[torch.Tensor, torch.Tensor | None]


@torch.no_grad()
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
    """Same arguments, result and errors as sparse_moe (which validates them); all tensors on the CPU. No gradients."""
    del plan
    inter = weights.intermediate_size
    dtype = hidden_states.dtype
    tau = expand_thresholds(thresholds, weights.num_experts, inter, hidden_states.device)
    dense = not torch.as_tensor(thresholds).any()
    small = inter * weights.hidden_size <= SMALL_EXPERT
    ids = local_experts(topk_ids, expert_map, weights.num_experts)
    token, slot = torch.nonzero((ids >= 0) & ~(topk_weights < pair_threshold), as_tuple=True)
    expert, order = ids[token, slot].sort(stable=True)
    token, slot = token[order], slot[order]
    routing = topk_weights[token, slot].float().unsqueeze(1)
    inputs = hidden_states[token]
    if apply_router_weight_on_input:
        inputs = (inputs.float() * routing).to(dtype)
    result = torch.zeros(hidden_states.shape, dtype=torch.float32)
    experts, counts = torch.unique_consecutive(expert, return_counts=True)
    start = 0
    for e, m in zip(experts.tolist(), counts.tolist(), strict=True):
        pairs = slice(start, start + m)
        start += m
        x, r = inputs[pairs], routing[pairs]
        rule = (tau[e], r if router_weighted else None)
        if dense or small or m > MANY_TOKENS:
            y = _all_rows(x, weights, e, activation, None if dense else rule)
        else:
            y = _needed_rows(x, weights, e, activation, rule)
        if weights.w2_bias is not None:
            y += weights.w2_bias[e].float()
        if not apply_router_weight_on_input:
            y *= r
        result.index_add_(0, token[pairs], y)
    if out is None:
        return result.to(dtype)
    return out.copy_(result)


def _all_rows(x: torch.Tensor, weights: ExpertWeights, e: int, activation: str, rule: _Rule | None) -> torch.Tensor:
    """Expert e on x [m, H] with every row read: [m, H] fp32, before the down bias and the routing weight."""
    gate_up = _times_rows(x, weights.w13[e])
    if weights.w13_bias is not None:
        gate_up += weights.w13_bias[e].float()
    gate, up = gate_up.chunk(2, dim=1)
    a = gate_activation(gate, activation)
    if rule is not None:
        a = a.masked_fill(_inactive(a, rule), 0.0)
    return _sum_rows(a * up_transform(up, activation), weights.w2_rows[e])


def _needed_rows(x: torch.Tensor, weights: ExpertWeights, e: int, activation: str, rule: _Rule) -> torch.Tensor:
    """As _all_rows, reading only the rows of up and down that one of the m tokens needs, where they are few enough."""
    m, inter = len(x), weights.intermediate_size
    w_gate, w_up = weights.w13[e].split(inter)
    w_down = weights.w2_rows[e]
    gate = _times_rows(x, w_gate)
    if weights.w13_bias is not None:
        gate += weights.w13_bias[e, :inter].float()
    a = gate_activation(gate, activation)
    inactive = _inactive(a, rule)
    rows = torch.nonzero(~(inactive.squeeze(0) if m == 1 else inactive.all(0))).squeeze(1)
    if len(rows) == 0:
        return torch.zeros(x.shape, dtype=torch.float32)
    if m > 1:
        a = a.masked_fill(inactive, 0.0)
    bias = None if weights.w13_bias is None else weights.w13_bias[e, inter:]
    few = len(rows) <= GATHER_LIMIT * inter
    if few:
        a, w_up = a.index_select(1, rows), w_up.index_select(0, rows)
        bias = None if bias is None else bias.index_select(0, rows)
    elif m == 1:
        a = a.masked_fill(inactive, 0.0)
    up = _times_rows(x, w_up)
    if bias is not None:
        up += bias.float()
    h = a * up_transform(up, activation)
    if few and m <= BAG_TOKENS:
        return F.embedding_bag(rows.expand(m, -1), w_down, mode="sum", per_sample_weights=h.to(x.dtype)).float()
    return _sum_rows(h, w_down.index_select(0, rows) if few else w_down)


def _inactive(a: torch.Tensor, rule: _Rule) -> torch.Tensor:
    """Which of a [m, I] fall below the threshold: bool [m, I]."""
    tau, r = rule
    return (a.abs() if r is None else a.abs() * r) < tau


def _times_rows(x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """x [m, H] times each of rows [n, H]: [m, n] fp32. fp16 is widened for m > 1: torch has no fast product."""
    if x.dtype == torch.float16 and len(x) > 1:
        return F.linear(x.float(), rows.float())
    return F.linear(x, rows).float()


def _sum_rows(h: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """h [m, n] fp32 times rows [n, H]: [m, H] fp32, h rounded to the rows' dtype unless that is fp16."""
    if rows.dtype == torch.float16:
        return h @ rows.float()
    return (h.to(rows.dtype) @ rows).float()
