"""What is tried: bins, candidates, plans suggested by what was measured."""

from __future__ import annotations

import math
from dataclasses import asdict

import pytest
from cutedsl_kernels.autotune.space import (
    Bin,
    TunedLayer,
    candidates,
    default_tokens,
    guided,
    inherited,
    ordered_bins,
    ranked,
    simplicity,
    specs_of,
)

from cutedsl_kernels import KNOWN_MODELS, MoEShape
from cutedsl_kernels.configs import FusedConfig, Plan, illegal_reason, legal_plans
from cutedsl_kernels.cost_model import Gpu, estimate_us
from cutedsl_kernels.tuned_table import Measurement

pytestmark = pytest.mark.cpu
LAYER = TunedLayer(KNOWN_MODELS["qwen3.5-35b-a3b"].shape)


def test_default_batch_sizes() -> None:
    tokens = default_tokens()
    assert tokens[:10] == [1, 2, 4, 8, 16, 32, 64, 128, 256, 512]
    assert {24, 40, 248, 272, 496} <= set(tokens)
    assert len(tokens) == len(set(tokens))
    assert default_tokens(8) == [1, 2, 4, 8]


def test_bins_start_with_powers_of_two() -> None:
    bins = ordered_bins([3, 8, 24, 1], [(0.9, 0.35), (0.8, 0.0)])
    assert [(b.num_tokens, b.sparsity) for b in bins] == [
        (1, 0.8), (8, 0.8), (1, 0.9), (8, 0.9), (3, 0.8), (24, 0.8), (3, 0.9), (24, 0.9)
    ]  # fmt: skip


@pytest.mark.parametrize("num_tokens", [1, 8, 100, 100_000])
def test_candidates_are_legal_and_cover_every_field(num_tokens: int) -> None:
    where = Bin(num_tokens, 0.845)
    plans = candidates(LAYER, where, Gpu(), 12)
    assert plans[0] == Plan("dense")
    assert len(plans) == len(set(plans)) <= 13
    assert all(illegal_reason(plan, LAYER.shape, num_tokens) is None for plan in plans)
    order = [plan for _, plan in ranked(LAYER, where, Gpu()) if plan.kind != "dense"]
    assert plans[1:] == sorted(plans[1:], key=order.index)
    if num_tokens == 8:
        for kind in {plan.kind for plan in order}:
            tiles = {plan.config.tile_neurons for plan in plans if isinstance(plan.config, FusedConfig)}
            assert kind != "fused" or len(tiles) >= 3, "the tile sizes must not all be alike"


def test_shape_without_kernels_has_dense_only() -> None:
    layer = TunedLayer(MoEShape(8, 2, 100, 64))
    assert candidates(layer, Bin(4, 0.8), Gpu(), 12) == [Plan("dense")]


def test_guided_finds_the_field_values_that_pay(seed: int) -> None:
    """A world in which one field is worth 30 %: after measurements that show it, such a plan is suggested first."""
    where = Bin(8, 0.845)
    plans = [plan for plan in legal_plans(LAYER.shape, 8) if plan.kind == "fused"]
    modelled = {p: estimate_us(p, LAYER.shape, 8, 0.845, Gpu()) for p in plans}
    near = [p for p in plans if modelled[p] < 1.1 * min(modelled.values())]
    good = lambda p: p.config.gate_warps == 8  # noqa: E731
    assert any(map(good, near))
    shown = [p for p in near if good(p)][:3] + [p for p in near if not good(p)][:6]
    measured = {p: Measurement(p, us=modelled[p] * (0.7 if good(p) else 1.0)) for p in shown}
    suggested = guided(LAYER, where, Gpu(), measured, 3)
    assert len(suggested) == 3
    assert not set(suggested) & set(measured)
    assert good(suggested[0])


def test_guided_without_a_time_goes_by_the_model() -> None:
    """Failures teach nothing about times; they are only not suggested again."""
    where = Bin(8, 0.8)
    failed = {plan: Measurement(plan, failure="no") for plan in candidates(LAYER, where, Gpu(), 3)}
    suggested = guided(LAYER, where, Gpu(), failed, 4)
    assert len(suggested) == 4
    assert not set(suggested) & set(failed)
    everything = {plan: Measurement(plan, us=1.0) for plan in legal_plans(LAYER.shape, 8)}
    assert guided(LAYER, where, Gpu(), everything, 4) == []


def test_inherited_plans_are_few_and_legal() -> None:
    above = candidates(LAYER, Bin(32, 0.845), Gpu(), 8)
    plans = inherited(LAYER, Bin(24, 0.845), above[1:])
    assert plans[0] == Plan("dense")
    assert plans[1:] == above[1:4]


def test_dense_is_the_simplest_and_defaults_before_others() -> None:
    default = FusedConfig()
    other = FusedConfig(**(asdict(default) | {"tile_neurons": 64}))
    plans = [Plan("fused", other), Plan("fused", default), Plan("dense")]
    assert sorted(plans, key=simplicity) == [Plan("dense"), Plan("fused", default), Plan("fused", other)]


def test_kernels_a_server_may_ask_for() -> None:
    plan = next(plan for plan in legal_plans(LAYER.shape, 8) if plan.kind == "fused")
    (one,) = specs_of(LAYER, plan)
    every = specs_of(LAYER, plan, every_use=True)
    assert one in every
    assert len(set(every)) == 4
    assert specs_of(LAYER, Plan("dense")) == []


def test_model_times_are_finite_where_plans_are_legal() -> None:
    assert all(math.isfinite(us) for us, _ in ranked(LAYER, Bin(8, 0.845), Gpu()))
