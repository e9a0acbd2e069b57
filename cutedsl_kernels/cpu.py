"""The CPU back end of sparse_moe: gate in full, then only the rows of up and down that a token of the expert needs.

Experts with up to FEW_TOKENS tokens, which in decoding are nearly all, go together, without a loop and without a copy
of weights; bytes as read from w13 and w2_rows per pair:

    gate    a dot product of x with each of the expert's I gate rows, read in place        I*H
    mask    |act(gate)| (times r) against tau: n active neurons                            -
    up      a dot product of x with each of the n rows, read in place                      n*H
    down    the weighted sum of n rows, read in place                                      n*H

The others follow one by one, an expert with m tokens at a time:

    gate    one product with the expert's I gate rows                                      I*H
    mask    the rows any of the m tokens needs: n                                          -
    up      those n rows copied together, one product                                      n*H
    down    up to BAG_TOKENS tokens: a weighted sum of rows read in place; else as up      n*H

An expert among these whose n exceeds GATHER_LIMIT of its I rows reads them all: copying rows together costs more than
it saves there. So does an expert of at most SMALL_EXPERT weights in gate, or with more than MANY_TOKENS tokens.

Measured on 2026-11-23 (AVX-512 without AMX; I = 512, H = 2048, 15 % of the rows, eight experts of one token; two
threads, other load on the machine, minima; us in bf16 / fp32): gate by dot products 522 / 904, by F.linear 1013 / 1909;
up by dot products 249 / 337, by copying and one F.linear 264 / 458; down in place 141 / 229, in full by matmul
1209 / 1480.
FEW_TOKENS of 2 to 8 differ by no more than the noise for T up to 64; 1 is slower.
Tried on the same day and slower: torch.bmm over the gates of two experts (bf16: fifty times); torch.mv; up as product
and sum over copied rows; one product of all tokens with all copied rows (fp32, T = 4: slower than dense).
fp16 products with down take 16 ms where bf16's take 0.7, hence the widening.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .plan import Plan
from .reference import expand_thresholds, gate_activation, local_experts, up_transform
from .weights import ExpertWeights

FEW_TOKENS = 4
BAG_TOKENS = 8
GATHER_LIMIT = 0.45
SMALL_EXPERT = 1 << 18  # I * H up to which skipping rows costs more in calls than it saves in reading
MANY_TOKENS = 32  # m above which nearly every row is needed by some token at any sparsity worth running

_BAG_SUM = 0  # embedding_bag's mode "sum" in torch.ops

# tau [I] of the expert (or [m, I], a row for each pair), and the routing weights r [m, 1] of its pairs if they count.
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
    weight_on_output = not apply_router_weight_on_input
    result = torch.zeros(hidden_states.shape, dtype=torch.float32)

    def add(y: torch.Tensor, pairs: torch.Tensor | slice, of: torch.Tensor | int) -> None:
        """Adds y, one row for each of ``pairs`` of the experts ``of``, to the tokens of those pairs."""
        if weights.w2_bias is not None:
            y += weights.w2_bias[of].float()
        if weight_on_output:
            y *= routing[pairs]
        result.index_add_(0, token[pairs], y)

    experts, group, counts = torch.unique_consecutive(expert, return_inverse=True, return_counts=True)
    together = counts <= (0 if dense else FEW_TOKENS)
    pairs = torch.nonzero(together[group]).squeeze(1)
    if len(pairs):
        rule = (tau[expert[pairs]], routing[pairs] if router_weighted else None)
        add(_few_tokens(inputs[pairs], weights, expert[pairs], activation, rule), pairs, expert[pairs])
    start = 0
    for e, m, done in zip(experts.tolist(), counts.tolist(), together.tolist(), strict=True):
        rest = slice(start, start + m)
        start += m
        if done:
            continue
        rule = (tau[e], routing[rest] if router_weighted else None)
        if dense or small or m > MANY_TOKENS:
            add(_all_rows(inputs[rest], weights, e, activation, None if dense else rule), rest, e)
        else:
            add(_needed_rows(inputs[rest], weights, e, activation, rule), rest, e)
    if out is None:
        return result.to(dtype)
    return out.copy_(result)


def _few_tokens(
    x: torch.Tensor, weights: ExpertWeights, expert: torch.Tensor, activation: str, rule: _Rule
) -> torch.Tensor:
    """Pairs of x [P, H] with expert [P]: [P, H] fp32, before the down bias and the routing weight."""
    inter, hidden = weights.intermediate_size, weights.hidden_size
    first = expert * inter  # row of the expert's first neuron in w2_rows; twice that in w13
    gate_rows = 2 * first.unsqueeze(1) + torch.arange(inter)
    w13 = weights.w13.view(-1, hidden)
    pair = torch.arange(len(x)).repeat_interleave(inter)
    gate = _dot_rows(x, pair, w13, gate_rows.view(-1)).view(-1, inter)
    if weights.w13_bias is not None:
        gate += weights.w13_bias[expert, :inter].float()
    a = gate_activation(gate, activation)
    active = ~_inactive(a, rule)
    pair, neuron = torch.nonzero(active, as_tuple=True)
    rows = gate_rows[active]
    up = _dot_rows(x, pair, w13, rows + inter)
    if weights.w13_bias is not None:
        up += weights.w13_bias.view(-1)[rows + inter].float()
    h = (a[active] * up_transform(up, activation)).to(x.dtype)
    numbers = active.sum(1)
    return F.embedding_bag(
        first[pair] + neuron,
        weights.w2_rows.view(-1, hidden),
        numbers.cumsum(0) - numbers,
        mode="sum",
        per_sample_weights=h,
    ).float()


def _dot_rows(x: torch.Tensor, which: torch.Tensor, matrix: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """x[which[i]] . matrix[rows[i]] for every i, x [P, H] and matrix [N, H]: fp32 [len(rows)]; both read in place.

    It is what the gradient of embedding_bag for its per_sample_weights consists of, hence the name of the operation.
    """
    dots = torch.ops.aten._embedding_bag_per_sample_weights_backward(x, matrix, rows, rows[:0], which, _BAG_SUM)
    return dots.float()


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
    rows = torch.nonzero(~inactive.all(0)).squeeze(1)
    if len(rows) == 0:
        return torch.zeros(x.shape, dtype=torch.float32)
    a = a.masked_fill(inactive, 0.0)
    bias = None if weights.w13_bias is None else weights.w13_bias[e, inter:]
    few = len(rows) <= GATHER_LIMIT * inter
    if few:
        a, w_up = a.index_select(1, rows), w_up.index_select(0, rows)
        bias = None if bias is None else bias.index_select(0, rows)
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
