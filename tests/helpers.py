"""Random problems, the same-dtype reference and the tolerance that all tiers use.

Thresholds are placed in gaps of the problem's own scores, so wide that rounding the gate to the dtype cannot turn an
active neuron into an inactive one: results of different back ends then differ by rounding only.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch

from cutedsl_kernels import ExpertWeights, sparse_moe_ref
from cutedsl_kernels.reference import expand_thresholds, gate_activation, local_experts, up_transform

Routing = Literal["uniform", "zipf", "one-expert", "repeated"]

# Half a unit in the last place of bf16, relative, twice: what a gate rounded to any supported dtype may be off by.
GATE_ROUNDING = 2.0**-8


@dataclass
class Problem:
    """Arguments of one sparse_moe call. ``sparsity`` is the realised share of inactive neurons over all local pairs."""

    hidden_states: torch.Tensor
    weights: ExpertWeights
    topk_weights: torch.Tensor
    topk_ids: torch.Tensor
    thresholds: torch.Tensor
    router_weighted: bool = True
    pair_threshold: float = 0.0
    activation: str = "silu"
    expert_map: torch.Tensor | None = None
    apply_router_weight_on_input: bool = False
    sparsity: float = 0.0

    @property
    def arguments(self) -> dict[str, Any]:
        """Keyword arguments for sparse_moe and sparse_moe_ref."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        del fields["sparsity"]
        return fields

    def to(self, device: torch.device | str) -> Problem:
        moved = {
            f.name: value.to(device) if isinstance(value := getattr(self, f.name), torch.Tensor) else value
            for f in dataclasses.fields(self)
        }
        weights = [None if t is None else t.to(device) for t in dataclasses.astuple(self.weights)]
        return Problem(**{**moved, "weights": ExpertWeights(*weights)})


class ExpertTrace(NamedTuple):
    """One expert: ``token``, ``slot`` [m] of its pairs; r [m, 1], a and u [m, I], fp32; active [m, I], bool."""

    expert: int
    token: torch.Tensor
    slot: torch.Tensor
    r: torch.Tensor
    a: torch.Tensor
    u: torch.Tensor
    active: torch.Tensor


def random_problem(
    seed: int,
    *,
    num_tokens: int,
    num_experts: int,
    top_k: int,
    hidden_size: int,
    intermediate_size: int,
    dtype: torch.dtype = torch.bfloat16,
    routing: Routing = "uniform",
    sparsity: float = 0.8,
    skip_pairs: float = 0.0,
    router_weighted: bool = True,
    activation: str = "silu",
    biases: bool = False,
    remote_experts: bool = False,
    invalid_ids: bool = False,
    apply_router_weight_on_input: bool = False,
    ids_dtype: torch.dtype = torch.int32,
    device: torch.device | str = "cpu",
) -> Problem:
    """A random call: about ``skip_pairs`` of the pairs skipped, about ``sparsity`` of the others' neurons inactive.

    ``routing``: distinct experts uniformly, distinct experts by Zipf's law (exponent 1.2), every pair on one expert, or
    experts drawn with repetition. ``remote_experts``: ids run over 2E experts, half of them held elsewhere.
    ``invalid_ids``: about one id in eight is -1 or past the end. sparsity 0 gives thresholds 0, sparsity 1 none active.
    """
    gen = torch.Generator().manual_seed(seed)

    def randn(*size: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(size, generator=gen) * scale).to(dtype)

    weights = ExpertWeights(
        randn(num_experts, 2 * intermediate_size, hidden_size, scale=hidden_size**-0.5),
        randn(num_experts, intermediate_size, hidden_size, scale=intermediate_size**-0.5),
        randn(num_experts, 2 * intermediate_size, scale=0.5) if biases else None,
        randn(num_experts, hidden_size, scale=0.5) if biases else None,
    )
    total = 2 * num_experts if remote_experts else num_experts
    expert_map = None
    if remote_experts:
        expert_map = torch.full((total,), -1, dtype=torch.int32)
        expert_map[torch.randperm(total, generator=gen)[:num_experts]] = torch.arange(num_experts, dtype=torch.int32)
    ids = _route(gen, routing, num_tokens, total, top_k)
    if invalid_ids:
        wrong = torch.rand(ids.shape, generator=gen)
        ids = torch.where(wrong < 1 / 16, -1, torch.where(wrong < 1 / 8, total + 3, ids))
    problem = Problem(
        hidden_states=randn(num_tokens, hidden_size),
        weights=weights,
        topk_weights=torch.softmax(1.5 * torch.randn(num_tokens, top_k, generator=gen), dim=1),
        topk_ids=ids.to(ids_dtype),
        thresholds=torch.zeros(num_experts, intermediate_size),
        router_weighted=router_weighted,
        activation=activation,
        expert_map=expert_map,
        apply_router_weight_on_input=apply_router_weight_on_input,
    )
    problem.pair_threshold = _value_in_gap(problem.topk_weights, skip_pairs)
    if sparsity > 0:
        set_thresholds(problem, gen, sparsity)
    local = int((local_experts(problem.topk_ids, expert_map, num_experts) >= 0).sum())
    active = sum(int(trace.active.sum()) for trace in expert_traces(problem))
    problem.sparsity = 1 - active / (local * intermediate_size) if local else 0.0
    return problem.to(device)


def expert_traces(problem: Problem) -> Iterator[ExpertTrace]:
    """Intermediate values, fp32, by the definition, of every expert that has a pair left; experts ascending."""
    weights, inter = problem.weights, problem.weights.intermediate_size
    tau = expand_thresholds(problem.thresholds, weights.num_experts, inter, weights.device)
    ids = local_experts(problem.topk_ids, problem.expert_map, weights.num_experts)
    keep = (ids >= 0) & ~(problem.topk_weights < problem.pair_threshold)
    for e in torch.unique(ids[keep]).tolist():
        token, slot = torch.nonzero(keep & (ids == e), as_tuple=True)
        r = problem.topk_weights[token, slot].unsqueeze(1)
        gate, up = _gate_up(problem, e, token, r)
        a = gate_activation(gate, problem.activation)
        score = a.abs() * r if problem.router_weighted else a.abs()
        yield ExpertTrace(e, token, slot, r, a, up_transform(up, problem.activation), ~(score < tau[e]))


def fp32_reference(problem: Problem) -> torch.Tensor:
    """The definition without the final rounding to the dtype: [T, H] fp32."""
    out = torch.empty(problem.hidden_states.shape, dtype=torch.float32, device=problem.hidden_states.device)
    return sparse_moe_ref(**problem.arguments, out=out)


def same_dtype_reference(problem: Problem) -> torch.Tensor:
    """The computation as a plain torch model in the problem's dtype does it: gate, up, h and each pair's y rounded.

    The sum over pairs is fp32. [T, H] in the dtype. Its distance from fp32_reference is what the dtype costs anyway.
    """
    weights, dtype = problem.weights, problem.hidden_states.dtype
    result = torch.zeros(problem.hidden_states.shape, dtype=torch.float32, device=weights.device)
    for trace in expert_traces(problem):
        gate, up = _gate_up(problem, trace.expert, trace.token, trace.r)
        a = gate_activation(gate.to(dtype), problem.activation)
        h = torch.where(trace.active, a * up_transform(up.to(dtype), problem.activation), 0)
        y = h @ weights.w2_rows[trace.expert]
        if weights.w2_bias is not None:
            y = y + weights.w2_bias[trace.expert]
        result.index_add_(
            0, trace.token, (y if problem.apply_router_weight_on_input else y * trace.r).to(dtype).float()
        )
    return result.to(dtype)


def dtype_error(problem: Problem) -> float:
    """What the dtype costs anyway: the largest error of the same-dtype reference against the fp32 reference.

    Rounding the largest result alone may cost half a unit in its last place: the least that is returned. A problem with
    few active neurons has few roundings, and they may cancel by luck. There the largest error of eight more problems
    counts, with up and down scaled by numbers near 1 (which moves roundings, but no mask) and the error scaled back.
    """
    weights, inter = problem.weights, problem.weights.intermediate_size
    expected = fp32_reference(problem)
    error = (same_dtype_reference(problem).float() - expected).abs().max()
    exponent = torch.frexp(expected.abs().max()).exponent - 1
    error = torch.maximum(error, 2.0**exponent * torch.finfo(problem.hidden_states.dtype).eps / 2)
    few = problem.topk_ids.numel() * inter <= 4096
    if few or sum(int(trace.active.sum()) for trace in expert_traces(problem)) <= 1024:
        for up, down in zip(
            torch.linspace(0.7, 1.3, 8).tolist(), (0.9, 1.2, 0.8, 1.1, 0.7, 1.3, 1.0, 0.95), strict=True
        ):
            w13 = weights.w13.clone()
            w13[:, inter:] *= up
            scaled = dataclasses.replace(
                problem, weights=ExpertWeights(w13, weights.w2_rows * down, weights.w13_bias, weights.w2_bias)
            )
            change = (same_dtype_reference(scaled).float() - fp32_reference(scaled)).abs().max()
            error = torch.maximum(error, change / (up * down))
    return float(error)


def check_close(actual: torch.Tensor, problem: Problem, factor: float = 2.0) -> None:
    """Asserts shape, dtype, no NaN, and error <= factor * error of the same-dtype reference + 1e-5, against fp32."""
    assert actual.shape == problem.hidden_states.shape
    assert actual.dtype == problem.hidden_states.dtype
    assert not actual.isnan().any(), f"{int(actual.isnan().sum())} NaN in the result"
    if actual.numel() == 0:
        return
    expected = fp32_reference(problem)
    allowed = factor * dtype_error(problem) + 1e-5
    error = (actual.float() - expected).abs()
    token, column = divmod(int(error.argmax()), error.shape[1])
    assert error.max() <= allowed, (
        f"error {error.max():.3e} at token {token}, column {column} "
        f"({float(actual[token, column])} for {float(expected[token, column])}); allowed {allowed:.3e}"
    )


def _route(gen: torch.Generator, routing: Routing, tokens: int, experts: int, top_k: int) -> torch.Tensor:
    if routing == "one-expert":
        return torch.full((tokens, top_k), int(torch.randint(experts, (), generator=gen)))
    if routing == "repeated":
        return torch.randint(experts, (tokens, top_k), generator=gen)
    if tokens == 0:
        return torch.zeros(0, top_k, dtype=torch.int64)
    share = torch.arange(1, experts + 1, dtype=torch.float64) ** (-1.2 if routing == "zipf" else 0.0)
    share = share[torch.randperm(experts, generator=gen)]
    return torch.multinomial(share.expand(tokens, experts), top_k, replacement=False, generator=gen)


def _gate_up(problem: Problem, expert: int, token: torch.Tensor, r: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """g and u of an expert's pairs, fp32 [m, I] each."""
    x = problem.hidden_states[token]
    if problem.apply_router_weight_on_input:
        x = (x.float() * r).to(x.dtype)
    gate_up = x.float() @ problem.weights.w13[expert].float().t()
    if problem.weights.w13_bias is not None:
        gate_up = gate_up + problem.weights.w13_bias[expert].float()
    gate, up = gate_up.chunk(2, dim=1)
    return gate, up


def _value_in_gap(values: torch.Tensor, share: float) -> float:
    """A number below which about ``share`` of the values lie, half-way between two of them. share 0 gives 0."""
    if share <= 0 or values.numel() == 0:
        return 0.0
    ordered = values.flatten().double().unique()
    cut = min(max(round(share * len(ordered)), 1), len(ordered))
    return float((ordered[cut - 1] + ordered[cut]) / 2) if cut < len(ordered) else float(ordered[-1] * 1.01)


def set_thresholds(problem: Problem, gen: torch.Generator, sparsity: float) -> None:
    """Per-neuron thresholds with about ``sparsity`` of the scores below, none within rounding of its threshold."""
    for trace in expert_traces(problem):
        gate, _ = _gate_up(problem, trace.expert, trace.token, trace.r)
        rounded = gate.abs()
        if problem.weights.w13_bias is not None:  # a grouped product is rounded before the bias is added
            bias = problem.weights.w13_bias[trace.expert, : gate.shape[1]].float()
            rounded = rounded + (gate - bias).abs()
        reach = GATE_ROUNDING * rounded + 1e-5
        scores = torch.stack([gate_activation(gate + d, problem.activation).abs() for d in (-reach, 0 * reach, reach)])
        if problem.router_weighted:
            scores = scores * trace.r
        low, order = scores.min(0).values.sort(dim=0)
        low = low * 0.99
        high = scores.max(0).values.gather(0, order).cummax(0).values * 1.01
        m = len(low)
        zero = low.new_zeros(1, low.shape[1])
        below, above = torch.cat([zero, high]), torch.cat([low, 2 * high[-1:] + 1e-3])
        legal = above > below  # [m + 1, I]: cutting after j scores leaves a gap; j = m always does
        wanted = (torch.rand(m, low.shape[1], generator=gen, device=gen.device) < sparsity).sum(0).to(low.device)
        distance = (torch.arange(m + 1, device=low.device).unsqueeze(1) - wanted).abs() + (m + 2) * ~legal
        cut = distance.argmin(0, keepdim=True)
        problem.thresholds[trace.expert] = ((below.gather(0, cut) + above.gather(0, cut)) / 2)[0]
