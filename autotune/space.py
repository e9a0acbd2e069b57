"""What is tuned: bins of (tokens, sparsity, skipped pairs) of a layer, and the plans worth trying for each."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from cutedsl_kernels.compile import KernelSpec, fused_spec
from cutedsl_kernels.compile.specs import staged_spec
from cutedsl_kernels.configs import (
    CONFIG_TYPES,
    FusedConfig,
    Plan,
    TileConfig,
    illegal_reason,
    legal_plans,
)
from cutedsl_kernels.cost_model import Gpu, estimate_us
from cutedsl_kernels.shapes import MoEShape
from cutedsl_kernels.tuned_table import Measurement

SIMPLICITY = ("dense", "fused", "staged")  # of two plans equally fast the one named first is taken
WORTH_TRYING = 1.6  # times the fastest by the cost model
RIDGE = 0.1
NEIGHBOURS = 3  # plans a size between two powers of two takes over from the next power of two


@dataclass(frozen=True)
class TunedLayer:
    """The layer that is tuned, with everything that changes a kernel's code."""

    shape: MoEShape
    activation: str = "silu"
    weight_on_input: bool = False
    router_weighted: bool = True
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
    """``count`` plans not measured yet that should be fastest by what was measured.

    The logarithm of measured over modelled time is taken for a sum of one effect for each value of each field, fitted
    by ridge regression to all plans of the kind that have a time.
    """
    order = [(us, plan) for us, plan in ranked(layer, where, gpu) if plan.config is not None]
    modelled = {plan: us for us, plan in order}
    predicted: list[tuple[float, tuple[int, int, str], Plan]] = []
    for kind in CONFIG_TYPES:
        plans = [plan for _, plan in order if plan.kind == kind]
        known = [
            (plan, m.us) for plan, m in measured.items() if m.us is not None and plan in modelled and plan.kind == kind
        ]
        if not known:
            continue
        columns = {pair: i for i, pair in enumerate(sorted({pair for plan in plans for pair in _fields(plan)}))}

        def features(plan: Plan, columns: Mapping[tuple[str, int], int] = columns) -> np.ndarray:
            row = np.zeros(len(columns) + 1)
            row[[columns[pair] for pair in _fields(plan)]] = 1.0
            row[-1] = 1.0
            return row

        x = np.stack([features(plan) for plan, _ in known])
        y = np.array([math.log(us / modelled[plan]) for plan, us in known])
        ridge = RIDGE * np.eye(x.shape[1])
        ridge[-1, -1] = 0.0
        effects = np.linalg.solve(x.T @ x + ridge + 1e-9 * np.eye(len(ridge)), x.T @ y)
        for plan in plans:
            if plan not in measured:
                us = modelled[plan] * math.exp(float(features(plan) @ effects))
                predicted.append((us, simplicity(plan), plan))
    return [plan for _, _, plan in sorted(predicted, key=lambda row: row[:2])[:count]]


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
    return [_spec(layer, plan.config, weighted, mapped) for weighted, mapped in uses]


def _spec(layer: TunedLayer, config: TileConfig, weighted: bool, mapped: bool) -> KernelSpec:
    make: Callable[..., KernelSpec] = fused_spec if isinstance(config, FusedConfig) else staged_spec
    return make(
        layer.shape,
        config,
        activation=layer.activation,
        router_weighted=weighted,
        weight_on_input=layer.weight_on_input,
        has_expert_map=mapped,
    )
