"""The check before every number: right paths pass, wrong ones are found; the baselines compute the dense layer."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from cutedsl_kernels.bench.baselines import TorchDense, TorchGroupedMM, Unavailable, make_baselines
from cutedsl_kernels.bench.check import WrongResult, check, expectations
from cutedsl_kernels.bench.layer import sparse_calls
from cutedsl_kernels.bench.problems import Batch, Rule, make_batch, make_weights
from cutedsl_kernels.bench.timing import copy_bandwidth, prepare

from cutedsl_kernels import MoEShape, Plan

pytestmark = pytest.mark.cpu
SHAPE = MoEShape(num_experts=8, top_k=2, hidden_size=128, intermediate_size=64)


def batch_of(seed: int, biases: bool = False, **options: object) -> Batch:
    weights = make_weights(SHAPE, 2, "cpu", torch.bfloat16, seed, biases)
    return make_batch(weights, SHAPE.top_k, 9, calls=4, seed=seed, **options)


def back_end_error(rule: Rule, on_input: bool, biases: bool, seed: int) -> float:
    """Largest error of the CPU back end; WrongResult beyond tolerance."""
    batch = batch_of(seed, biases, router_weight_on_input=on_input, activation="swigluoai" if biases else "silu")
    cutoffs = batch.cutoffs(rule)
    return check(prepare(sparse_calls(batch, cutoffs, Plan("cpu")), "cpu"), expectations(batch, cutoffs))


@pytest.mark.parametrize("rule", [Rule(), Rule(0.85), Rule(0.9, 0.35, True)], ids=str)
@pytest.mark.parametrize("biases", [False, True], ids=["", "biases"])
@pytest.mark.parametrize("on_input", [False, True])
def test_the_back_end_passes(rule: Rule, on_input: bool, biases: bool, seed: int) -> None:
    assert 0 < back_end_error(rule, on_input, biases, seed) < 0.02


@pytest.mark.parametrize("seed", [22, 36, 138])  # where thresholds once lay between scores of two ways to round
def test_a_gate_may_be_rounded_before_its_bias_is_added(seed: int) -> None:
    for on_input in (False, True):
        back_end_error(Rule(0.9, 0.35, True), on_input, True, seed)


@pytest.mark.parametrize("baseline", [TorchDense(), TorchGroupedMM()], ids=lambda b: b.name)
@pytest.mark.parametrize("on_input", [False, True])
def test_baselines_compute_the_dense_layer(baseline: TorchDense, on_input: bool, seed: int) -> None:
    batch = batch_of(seed, router_weight_on_input=on_input)
    dense = batch.cutoffs(Rule())
    assert check(prepare(baseline.calls(batch), "cpu"), expectations(batch, dense)) < 0.02


def test_baselines_that_need_a_gpu_say_so(seed: int) -> None:
    for baseline in make_baselines(["vllm-triton", "quack-dense"]):
        with pytest.raises(Unavailable, match="CUDA"):
            baseline.calls(batch_of(seed))
    with pytest.raises(ValueError, match="baselines must be among"):
        make_baselines(["fastest"])


def scaled(value: torch.Tensor) -> torch.Tensor:
    return value * 1.05


def one_token_missing(value: torch.Tensor) -> torch.Tensor:
    value = value.clone()
    value[3] = 0
    return value


def one_token_unwritten(value: torch.Tensor) -> torch.Tensor:
    value = value.clone()
    value[8, -1] = float("nan")
    return value


def too_short(value: torch.Tensor) -> torch.Tensor:
    return value[:5]


@pytest.mark.parametrize("damage", [scaled, one_token_missing, one_token_unwritten, too_short])
def test_wrong_results_are_found(damage: Callable[[torch.Tensor], torch.Tensor], seed: int) -> None:
    batch = batch_of(seed)
    cutoffs = batch.cutoffs(Rule(0.8))
    right = sparse_calls(batch, cutoffs, Plan("cpu"))
    wrong = prepare([lambda call=call: damage(call()) for call in right], "cpu")
    with pytest.raises(WrongResult):
        check(wrong, expectations(batch, cutoffs))


def test_a_path_that_ignores_the_thresholds_is_found(seed: int) -> None:
    batch = batch_of(seed)
    cutoffs = batch.cutoffs(Rule(0.8))
    dense = prepare(sparse_calls(batch, cutoffs.without_neurons(), Plan("cpu")), "cpu")
    with pytest.raises(WrongResult, match="relative error"):
        check(dense, expectations(batch, cutoffs))


def test_an_output_left_alone_is_found_by_the_poison(seed: int) -> None:
    batch = batch_of(seed)
    cutoffs = batch.cutoffs(Rule(0.8))
    stale = [call().clone() for call in sparse_calls(batch, cutoffs, Plan("cpu"))]
    prepared = prepare([lambda value=value: value for value in stale], "cpu")
    with pytest.raises(WrongResult, match="NaN"):
        check(prepared, expectations(batch, cutoffs))


def test_timing_and_copy_on_the_host(seed: int) -> None:
    batch = batch_of(seed)
    prepared = prepare(TorchDense().calls(batch), "cpu")
    timing = prepared.measure(replays=5)
    assert timing.replays == 5
    assert timing.calls == 4
    assert 0 < timing.min_us <= timing.median_us
    assert prepared.measure(replays=1000, max_seconds=0.0).replays == 3
    with pytest.raises(ValueError, match="at least one call"):
        prepare([], "cpu")
    assert copy_bandwidth("cpu", megabytes=8) > 0
