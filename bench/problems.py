"""Benchmark problems: random expert weights, token batches, thresholds that realise a sparsity, and real byte counts.

Weights are normal with variance 1/H, so the gate values are close to standard normal and a threshold at a quantile of
the scores gives masks that are independent between tokens. Masks that overlap come from tokens with a common component:
correlation c between two tokens is correlation c between their gate values, and c is chosen for the asked IoU.

Everything reported about a batch (sparsity, skipped pairs, IoU, bytes) is counted from its own masks, in fp32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch

from cutedsl_kernels import ExpertWeights, MoEShape
from cutedsl_kernels.reference import gate_activation

ROUTINGS = ("uniform", "zipf")
ZIPF_EXPONENT = 1.0
L2_BYTES = 60e6
CHECKED_TOKENS = 32  # per counted call
GATE_ROUNDING = 2.0**-8  # a unit in the last place of bf16, relative to a gate's terms (x.w, bias) and to act(g)
COLD_FACTOR = 4  # bytes touched between two uses of the same weight copy, in units of L2


@dataclass(frozen=True)
class Rule:
    """Which pairs and neurons are left out, as asked: ``sparsity`` is the share of inactive neurons over all pairs,
    skipped pairs counted as inactive; ``pair_skip`` the share of pairs skipped whole."""

    sparsity: float = 0.0
    pair_skip: float = 0.0
    router_weighted: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.pair_skip <= self.sparsity < 1:
            raise ValueError(
                f"sparsity must lie between pair_skip ({self.pair_skip}) and 1 (excluded), got {self.sparsity}"
            )

    @property
    def dense(self) -> bool:
        return self.sparsity == 0


@dataclass(frozen=True)
class Cutoffs:
    """Thresholds that realise a rule on a batch: tau, fp32 [E, I], and rho.

    tau is one number but for neurons with which a checked token would come within rounding of it: there it is moved
    a little, so that back ends that round the gate differently must agree about every neuron that is checked.
    """

    rule: Rule
    thresholds: torch.Tensor
    pair_threshold: float

    def without_neurons(self) -> Cutoffs:
        """The same pairs skipped, every neuron active."""
        return replace(self, thresholds=torch.zeros_like(self.thresholds))


@dataclass(frozen=True)
class MaskCounts:
    """What one call of a batch computes, mean over the counted calls.

    Experts and neurons are counted once per call however many tokens share them (``experts_read``, ``neurons_read``);
    pairs and their active neurons are counted per pair.
    """

    pairs: float
    pairs_kept: float
    active: float
    experts_read: float
    neurons_read: float
    iou: float | None
    shape: MoEShape
    num_tokens: int
    element_bytes: int

    @property
    def sparsity(self) -> float:
        return 1 - self.active / (self.pairs * self.shape.intermediate_size)

    @property
    def pairs_skipped(self) -> float:
        return 1 - self.pairs_kept / self.pairs

    @property
    def bytes_read(self) -> float:
        """Gate rows of the experts hit, up and down rows that any token of an expert needs, and the tokens once."""
        rows = self.experts_read * self.shape.intermediate_size + 2 * self.neurons_read + self.num_tokens
        return rows * self.shape.hidden_size * self.element_bytes

    @property
    def flops(self) -> float:
        return 2.0 * self.shape.hidden_size * (self.pairs_kept * self.shape.intermediate_size + 2 * self.active)


@dataclass
class LayerInputs:
    """Arguments of one call: hidden_states [T, H], topk_weights [T, k] fp32, topk_ids [T, k] int32, and its weights."""

    hidden_states: torch.Tensor
    topk_weights: torch.Tensor
    topk_ids: torch.Tensor
    weights: ExpertWeights


@dataclass
class Batch:
    """Several calls of one layer shape at one T: different tokens, routings and weight copies, to be run in turn."""

    shape: MoEShape
    num_tokens: int
    activation: str
    router_weight_on_input: bool
    calls: list[LayerInputs]
    counted: list[int]
    _gates: list[PairGates] = field(default_factory=list)

    @property
    def checked_tokens(self) -> list[int]:
        """Tokens of a counted call whose results are compared with the reference: CHECKED_TOKENS from first to last."""
        return _spread(CHECKED_TOKENS, self.num_tokens)

    def cutoffs(self, rule: Rule) -> Cutoffs:
        """Thresholds at quantiles of this batch's own routing weights and scores; 0 for what the rule does not use."""
        tau = torch.zeros(self.shape.num_experts, self.shape.intermediate_size, device=self.calls[0].topk_ids.device)
        if rule.dense:
            return Cutoffs(rule, tau, 0.0)
        rho = 0.0
        if rule.pair_skip > 0:
            rho = _quantile(torch.cat([c.topk_weights.flatten() for c in self.calls]), rule.pair_skip)
        kept_share = (rule.sparsity - rule.pair_skip) / (1 - rule.pair_skip)
        sample = []
        for pairs in self._pair_gates():
            kept = (pairs.r >= rho).nonzero().squeeze(1)
            sample.append(pairs.scores(self.activation, rule, kept[:: max(1, len(kept) // 1024)][:1024]).flatten())
        values = torch.cat(sample)
        if kept_share > 0 and values.numel():
            self._move_off(tau.fill_(_quantile(values, kept_share)), rule)
        return Cutoffs(rule, tau, rho)

    def _move_off(self, tau: torch.Tensor, rule: Rule) -> None:
        """Moves tau [E, I] in place, up or down, whichever is less, to where rounding the gate of a checked token
        cannot put its score on the other side."""
        above, below = self._moved(tau, rule, True), self._moved(tau, rule, False)
        tau.copy_(torch.where(above * below < tau * tau, above, below))

    def _moved(self, tau: torch.Tensor, rule: Rule, upwards: bool) -> torch.Tensor:
        moved = tau.clone()
        checked = torch.tensor(self.checked_tokens, device=tau.device)
        for _ in range(256):
            done = True
            for pairs in self._pair_gates():
                rows = torch.isin(pairs.token, checked).nonzero().squeeze(1)
                low, high = pairs.score_range(self.activation, rule, rows)
                index = pairs.expert[rows]
                inside = (low < moved[index]) & (moved[index] <= high)
                if inside.any():
                    done = False
                    goal = torch.where(inside, high * 1.0001 if upwards else low * 0.9999, moved[index])
                    index = index.unsqueeze(1).expand_as(goal)
                    moved.scatter_reduce_(0, index, goal, "amax" if upwards else "amin")
            if done:
                return moved
        raise RuntimeError("no thresholds apart from the checked scores were found in 256 rounds")

    def count(self, cutoffs: Cutoffs) -> MaskCounts:
        """Exact counts over the counted calls, from the scores in fp32."""
        totals = torch.zeros(5, dtype=torch.float64)
        shared, union = 0.0, 0.0
        for pairs in self._pair_gates():
            experts, r = pairs.expert, pairs.r
            kept = r >= cutoffs.pair_threshold
            score = pairs.scores(self.activation, cutoffs.rule)
            active = (score >= cutoffs.thresholds[experts]) & kept.unsqueeze(1)
            per_expert = torch.zeros(self.shape.num_experts, score.shape[1], device=r.device)
            per_expert.index_add_(0, experts, active.float())
            tokens = torch.zeros(self.shape.num_experts, device=r.device)
            tokens.index_add_(0, experts, kept.float())
            sums = [kept.sum(), active.sum(), (tokens > 0).sum(), (per_expert > 0).sum()]
            totals += torch.tensor([len(r), *(int(value) for value in sums)], dtype=torch.float64)
            both = float((per_expert * (per_expert - 1) / 2).sum(dtype=torch.float64))
            sizes = float(((tokens - 1).clamp(min=0).unsqueeze(1) * per_expert).sum(dtype=torch.float64))
            shared, union = shared + both, union + sizes - both
        pairs, pairs_kept, active_sum, experts_read, neurons_read = (totals / len(self.counted)).tolist()
        element = self.calls[0].hidden_states.element_size()
        return MaskCounts(
            pairs,
            pairs_kept,
            active_sum,
            experts_read,
            neurons_read,
            shared / union if union else None,
            self.shape,
            self.num_tokens,
            element,
        )

    def _pair_gates(self) -> list[PairGates]:
        if not self._gates:
            self._gates = [_gates_of(self, self.calls[i]) for i in self.counted]
        return self._gates


@dataclass(frozen=True)
class PairGates:
    """Gate values of one call's pairs, sorted by expert: expert, token [P] int64; r [P]; g [P, I] fp32, with the bias
    [E, I] of the weights' dtype already in it."""

    expert: torch.Tensor
    token: torch.Tensor
    r: torch.Tensor
    g: torch.Tensor
    bias: torch.Tensor | None

    def scores(self, activation: str, rule: Rule, rows: torch.Tensor | None = None) -> torch.Tensor:
        """What is compared with tau, [P, I] or the rows asked for."""
        g, r = (self.g, self.r) if rows is None else (self.g[rows], self.r[rows])
        a = gate_activation(g, activation).abs()
        return a * r.unsqueeze(1) if rule.router_weighted else a

    def score_range(self, activation: str, rule: Rule, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Smallest and largest score when g and act(g) are off by GATE_ROUNDING; [rows, I] each.

        A back end may round x.w before it adds the bias, and what is left of the two can be much smaller than either.
        """
        g, r = self.g[rows], self.r[rows].unsqueeze(1)
        terms = g.abs() if self.bias is None else g.abs() + self.bias[self.expert[rows]].abs().float()
        reach = GATE_ROUNDING * terms + 1e-5
        ends = torch.stack([gate_activation(g + d, activation).abs() for d in (-reach, 0 * reach, reach)])
        low, high = ends.amin(0) * (1 - GATE_ROUNDING), ends.amax(0) * (1 + GATE_ROUNDING)
        return (low * r, high * r) if rule.router_weighted else (low, high)


def _gates_of(batch: Batch, call: LayerInputs) -> PairGates:
    experts, order = call.topk_ids.flatten().long().sort(stable=True)
    token = order // batch.shape.top_k
    r = call.topk_weights.flatten()[order]
    inter = batch.shape.intermediate_size
    gate = torch.empty(len(experts), inter, dtype=torch.float32, device=r.device)
    bias = None if call.weights.w13_bias is None else call.weights.w13_bias[:, :inter]
    ids, sizes = torch.unique_consecutive(experts, return_counts=True)
    first = 0
    for e, size in zip(ids.tolist(), sizes.tolist(), strict=True):
        rows = slice(first, first + size)
        x = call.hidden_states[token[rows]]
        if batch.router_weight_on_input:
            x = (x.float() * r[rows].unsqueeze(1)).to(x.dtype)
        gate[rows] = x.float() @ call.weights.w13[e, :inter].float().t()
        if bias is not None:
            gate[rows] += bias[e].float()
        first += size
    return PairGates(experts, token, r, gate, bias)


def _spread(count: int, size: int) -> list[int]:
    """``count`` of the numbers 0 .. size - 1 at even distances, from first to last; all where there are no more."""
    steps = min(count, size)
    return [round(i * (size - 1) / max(1, steps - 1)) for i in range(steps)]


def _quantile(values: torch.Tensor, share: float) -> float:
    """The value below which ``share`` of ``values`` lies."""
    index = min(max(round(share * values.numel()), 1), values.numel() - 1) if values.numel() > 1 else 1
    return float(values.flatten().kthvalue(index + 1 if values.numel() > 1 else 1).values)


def make_weights(
    shape: MoEShape, copies: int, device: torch.device | str, dtype: torch.dtype, seed: int, biases: bool = False
) -> list[ExpertWeights]:
    """``copies`` random layers. Gate, up: variance 1/H; down: variance 1/I; biases, where asked for, 1/16.

    Every expert is a window at a random place of one random stretch twice its size: drawing each weight anew takes a
    minute for a real shape on a CPU, and a copy of it seconds. No two experts have a row in common in the same place.
    """
    device = torch.device(device)
    gen = torch.Generator(device).manual_seed(seed)
    experts, hidden, inter = shape.num_experts, shape.hidden_size, shape.intermediate_size
    layers = []
    n = inter * hidden
    stretch = torch.randn(4 * n, device=device, generator=gen)
    gate_up, down = (stretch * hidden**-0.5).to(dtype), (stretch * inter**-0.5).to(dtype)
    for _ in range(copies):
        starts = torch.randint(2 * n, (2 * experts,), device=device, generator=gen).tolist()
        w13 = torch.empty(experts, 2 * inter, hidden, dtype=dtype, device=device)
        w2_rows = torch.empty(experts, inter, hidden, dtype=dtype, device=device)
        for e in range(experts):
            w13[e].view(-1).copy_(gate_up[starts[2 * e] : starts[2 * e] + 2 * n])
            w2_rows[e].view(-1).copy_(down[starts[2 * e + 1] : starts[2 * e + 1] + n])
        sizes = ((experts, 2 * inter), (experts, hidden)) if biases else ()
        made = [(0.25 * torch.randn(size, device=device, generator=gen)).to(dtype) for size in sizes]
        layers.append(ExpertWeights(w13, w2_rows, *made))
    return layers


def layer_weight_bytes(shape: MoEShape, dtype: torch.dtype) -> int:
    return 3 * shape.num_experts * shape.intermediate_size * shape.hidden_size * dtype.itemsize


def copies_needed(shape: MoEShape, num_tokens: int, sparsity: float, dtype: torch.dtype, memory_bytes: float) -> int:
    """Weight copies so that COLD_FACTOR times L2 is read before a copy comes round again, within a memory limit."""
    hit = shape.num_experts * (1 - (1 - shape.top_k / shape.num_experts) ** num_tokens)
    touched = hit * shape.intermediate_size * shape.hidden_size * dtype.itemsize * (1 + 2 * (1 - sparsity))
    wanted = -(-COLD_FACTOR * L2_BYTES // touched)
    return int(max(1, min(wanted, memory_bytes // layer_weight_bytes(shape, dtype))))


def make_batch(
    layers: Sequence[ExpertWeights],
    top_k: int,
    num_tokens: int,
    *,
    calls: int,
    seed: int,
    routing: str = "uniform",
    iou: float | None = None,
    sparsity: float = 0.85,
    activation: str = "silu",
    router_weight_on_input: bool = False,
    counted_calls: int = 4,
) -> Batch:
    """``calls`` calls over the weight copies in turn.

    iou: mask overlap of two tokens of one expert at ``sparsity``, None for independent masks. counted_calls: how many
    of the calls the mask counts are taken from.
    """
    if routing not in ROUTINGS:
        raise ValueError(f"routing must be one of {', '.join(ROUTINGS)}, got {routing!r}")
    shape = layers[0].shape(top_k)
    device, dtype = layers[0].device, layers[0].dtype
    gen = torch.Generator(device).manual_seed(seed)
    common = correlation_for_iou(iou, sparsity, activation) if iou is not None else 0.0
    made = []
    for i in range(calls):
        own = torch.randn(num_tokens, shape.hidden_size, device=device, generator=gen)
        if common:
            shared = torch.randn(1, shape.hidden_size, device=device, generator=gen)
            own = common**0.5 * shared + (1 - common) ** 0.5 * own
        ids = route(gen, routing, num_tokens, shape.num_experts, top_k)
        if top_k == 1:
            r = torch.sigmoid(torch.randn(num_tokens, 1, device=device, generator=gen))
        else:
            r = torch.softmax(torch.randn(num_tokens, top_k, device=device, generator=gen), dim=1)
        made.append(LayerInputs(own.to(dtype), r, ids, layers[i % len(layers)]))
    return Batch(shape, num_tokens, activation, router_weight_on_input, made, _spread(counted_calls, calls))


def route(gen: torch.Generator, routing: str, num_tokens: int, num_experts: int, top_k: int) -> torch.Tensor:
    """topk_ids [T, k] int32, distinct experts per token: uniform, or by Zipf's law over a random order of experts."""
    noise = torch.rand(num_tokens, num_experts, device=gen.device, generator=gen)
    # Gumbel noise: the k largest are draws without replacement.
    scores = -torch.log(-torch.log(noise.clamp(1e-9, 1 - 1e-6)))
    if routing == "zipf":
        rank = torch.randperm(num_experts, device=gen.device, generator=gen) + 1
        scores = scores - ZIPF_EXPONENT * torch.log(rank.float())
    return scores.topk(top_k, dim=1).indices.to(torch.int32)


def independent_iou(sparsity: float) -> float:
    """Expected overlap of two independent masks: p / (2 - p) with p = 1 - sparsity."""
    return (1 - sparsity) / (1 + sparsity)


def correlation_for_iou(iou: float, sparsity: float, activation: str = "silu", samples: int = 200_000) -> float:
    """Correlation of two tokens at which their masks overlap by ``iou``; by bisection on a fixed normal sample."""
    low_iou = independent_iou(sparsity)
    if not low_iou - 0.01 <= iou < 1:
        raise ValueError(f"iou must lie in {low_iou:.3f}..1 (independent masks at sparsity {sparsity}), got {iou}")
    gen = torch.Generator().manual_seed(0)
    common, a, b = torch.randn(3, samples, generator=gen)

    def overlap(c: float) -> float:
        scores = [gate_activation(c**0.5 * common + (1 - c) ** 0.5 * own, activation).abs() for own in (a, b)]
        tau = _quantile(torch.cat(scores), sparsity)
        first, second = (s >= tau for s in scores)
        return float((first & second).sum() / (first | second).sum())

    low, high = 0.0, 1.0
    for _ in range(20):
        middle = (low + high) / 2
        low, high = (middle, high) if overlap(middle) < iou else (low, middle)
    return (low + high) / 2


def calls_for(shape: MoEShape, num_tokens: int, device: torch.device | str) -> int:
    """Calls per replay: 24 on a GPU, fewer where inputs and outputs would pass 2 GiB or a call takes milliseconds."""
    if torch.device(device).type == "cpu":
        return 4
    per_call = 4 * num_tokens * shape.hidden_size * 2
    return int(max(4, min(24, 2 * 2**30 // per_call, 24 * 4096 // max(1, num_tokens))))
