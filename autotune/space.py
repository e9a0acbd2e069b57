"""What is tuned: bins of (tokens, sparsity, skipped pairs) of a layer, and the plans worth trying for each."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from cutedsl_kernels.compile import KernelSpec
from cutedsl_kernels.compile.specs import plan_spec
from cutedsl_kernels.configs import (
    CONFIG_TYPES,
    Plan,
    illegal_reason,
    legal_plans,
)
from cutedsl_kernels.cost_model import Gpu, estimate_us
from cutedsl_kernels.shapes import MoEShape
from cutedsl_kernels.tuned_table import Measurement

SIMPLICITY = ("dense", "fused", "staged")  # of two plans equally fast the one named first is taken
WORTH_TRYING = 1.6  # times the fastest by the cost model
EFFECT, KIND_EFFECT, NOISE = 0.07, 0.3, 0.02  # standard deviations of logarithms of times
NEIGHBOURS = 3  # plans a size between two powers of two takes over from the next power of two


@dataclass(frozen=True)
class TunedLayer:
    """The layer that is tuned, with everything that changes a kernel's code."""

    shape: MoEShape
    activation: str = "silu"
    weight_on_input: bool = False
    router_weighted: bool = True
    has_bias: bool = False
    name: str = ""


@dataclass(frozen=True, order=True)
class Bin:
    """One row of a tuned table. sparsity: share of inactive neurons over all pairs; pair_skip: of pairs skipped."""

    num_tokens: int
    sparsity: float
    pair_skip: float = 0.0

    @property
    def is_power_of_two(self) -> bool:
        return self.num_tokens & (self.num_tokens - 1) == 0

    def __str__(self) -> str:
        skip = f" skip={self.pair_skip:g}" if self.pair_skip else ""
        return f"T={self.num_tokens} s={self.sparsity:g}{skip}"


def default_tokens(largest: int = 512) -> list[int]:
    """Powers of two, then the other batch sizes that vLLM captures CUDA graphs for by default, up to ``largest``."""
    powers = [2**i for i in range(largest.bit_length()) if 2**i <= largest]
    captured = [1, 2, 4, *range(8, 257, 8), *range(272, 513, 16)]
    return powers + [size for size in captured if size <= largest and size not in powers]


def ordered_bins(tokens: Iterable[int], cases: Iterable[tuple[float, float]]) -> list[Bin]:
    """Bins in the order they are tuned: powers of two, then the sizes between, which start from what those found."""
    made = {Bin(num_tokens, sparsity, skip) for sparsity, skip in cases for num_tokens in tokens}
    return sorted(made, key=lambda b: (not b.is_power_of_two, b.sparsity, b.pair_skip, b.num_tokens))


@functools.lru_cache(maxsize=1024)
def ranked(layer: TunedLayer, where: Bin, gpu: Gpu) -> tuple[tuple[float, Plan], ...]:
    """Every legal plan with its modelled microseconds, fastest first."""
    plans = [
        (estimate_us(plan, layer.shape, where.num_tokens, where.sparsity, gpu, where.pair_skip), plan)
        for plan in legal_plans(layer.shape, where.num_tokens, layer.activation)
    ]
    return tuple(sorted(plans, key=lambda pair: (pair[0], simplicity(pair[1]))))


def candidates(layer: TunedLayer, where: Bin, gpu: Gpu, count: int) -> list[Plan]:
    """Dense, then ``count`` other plans in the order of the cost model.

    The model does not tell all configs apart, so the first by rank alone would often differ in one field only. First
    come, therefore, the best plan for each value of each field that the model does not put beyond WORTH_TRYING times
    the best, then the others by rank.
    """
    order = [(us, plan) for us, plan in ranked(layer, where, gpu) if plan.kind != "dense"]
    if not order:
        return [Plan("dense")]
    limit = order[0][0] * WORTH_TRYING
    seen: set[tuple[str, str, int]] = set()
    chosen: list[Plan] = []
    for us, plan in order:
        values = {(plan.kind, name, value) for name, value in asdict(plan.config).items()} if plan.config else set()
        if us <= limit and not values <= seen:
            chosen.append(plan)
            seen |= values
    plans = [plan for _, plan in order]
    chosen += [plan for plan in plans if plan not in chosen]
    return [Plan("dense"), *sorted(chosen[:count], key=plans.index)]


def guided(layer: TunedLayer, where: Bin, gpu: Gpu, measured: Mapping[Plan, Measurement], count: int) -> list[Plan]:
    """``count`` plans not measured yet that may be fastest by what was measured, most promising first.

    The logarithm of measured over modelled time is taken for the sum of an effect of the kind and one of each value of
    each field, normally distributed around 0 (EFFECT, KIND_EFFECT) with normal noise (NOISE). What is left of a plan's
    uncertainty counts in its favour, so values that were not tried are, where they could still win.
    """
    chosen: list[tuple[float, Plan]] = []
    for kind in CONFIG_TYPES:
        order = [(us, plan) for us, plan in ranked(layer, where, gpu) if plan.kind == kind]
        if not order:
            continue
        modelled = np.log([us for us, _ in order])
        columns = {pair: i for i, pair in enumerate(dict.fromkeys(p for _, plan in order for p in _fields(plan)))}
        x = np.zeros((len(order), len(columns) + 1))
        for row, (_, plan) in zip(x, order, strict=True):
            row[[columns[pair] for pair in _fields(plan)]] = EFFECT
            row[-1] = KIND_EFFECT
        times = [m.us if (m := measured.get(plan)) is not None else None for _, plan in order]
        known = [i for i, us in enumerate(times) if us is not None]
        y = np.array([math.log(times[i] or 1.0) - modelled[i] for i in known])
        precision = np.eye(x.shape[1]) + x[known].T @ x[known] / NOISE**2
        mean = x @ np.linalg.solve(precision, x[known].T @ y / NOISE**2)
        open_plans = [i for i, (_, plan) in enumerate(order) if plan not in measured]
        for _ in range(min(count, len(open_plans))):
            deviation = np.sqrt(np.einsum("ij,ji->i", x[open_plans], np.linalg.solve(precision, x[open_plans].T)))
            hoped = modelled[open_plans] + mean[open_plans] - deviation
            best = open_plans.pop(int(np.argmin(hoped)))
            chosen.append((float(hoped.min()), order[best][1]))
            precision += np.outer(x[best], x[best]) / NOISE**2  # as if measured: the next pick should tell more
    return [plan for _, plan in sorted(chosen, key=lambda pair: (pair[0], simplicity(pair[1])))[:count]]


def _fields(plan: Plan) -> list[tuple[str, int]]:
    return list(asdict(plan.config).items()) if plan.config is not None else []


def inherited(layer: TunedLayer, where: Bin, above: Sequence[Plan]) -> list[Plan]:
    """Dense and the plans found best at the next power of two that can run here."""
    able = [plan for plan in above if illegal_reason(plan, layer.shape, where.num_tokens, layer.activation) is None]
    return [Plan("dense"), *[plan for plan in able if plan.kind != "dense"][:NEIGHBOURS]]


def simplicity(plan: Plan) -> tuple[int, int, str]:
    """Smaller is simpler: kind, then fields that differ from the kind's defaults, then the text, to be definite."""
    default = asdict(CONFIG_TYPES[plan.kind]()) if plan.kind in CONFIG_TYPES else {}
    differing = sum(default[name] != value for name, value in asdict(plan.config).items()) if plan.config else 0
    return SIMPLICITY.index(plan.kind), differing, str(plan)


def specs_of(layer: TunedLayer, plan: Plan, *, every_use: bool = False) -> list[KernelSpec]:
    """Kernels that ``plan`` launches for the layer. every_use: also for the other kind of threshold (weighted or not)
    and with an expert map, which is what a server may ask for."""
    if plan.config is None:
        return []
    uses = [(layer.router_weighted, False)]
    if every_use:
        uses = [(weighted, mapped) for weighted in (True, False) for mapped in (False, True)]
    common = {
        "activation": layer.activation,
        "weight_on_input": layer.weight_on_input,
        "has_bias": layer.has_bias,
    }
    return [
        plan_spec(plan, layer.shape, router_weighted=weighted, has_expert_map=mapped, **common)
        for weighted, mapped in uses
    ]
