"""The experts inside vLLM's modular kernel, on the CPU: the definition, whatever prepare and finalize do around them.
No engine; a data-parallel one is in test_data_parallel.py.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import Problem, check_close, random_problem, set_thresholds

from cutedsl_kernels import ExpertWeights

pytestmark = pytest.mark.engine

SHAPE = {"num_experts": 6, "hidden_size": 64, "intermediate_size": 88}
NAME = "model.layers.0.mlp.experts"


def make_layer(problem: Problem) -> Any:
    """What the experts look at of a RoutedExperts whose weights are loaded; ``dispatched``, so x comes weighted."""
    from cutedsl_kernels.integration.vllm.method import STATE
    from cutedsl_kernels.integration.vllm.state import LayerState
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation
    from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig, FusedMoEParallelConfig, RoutingMethodType

    weights, total = problem.weights, SHAPE["num_experts"] if problem.expert_map is None else len(problem.expert_map)
    config = FusedMoEConfig(
        num_experts=total,
        experts_per_token=problem.topk_ids.shape[1],
        hidden_dim=weights.hidden_size,
        intermediate_size=weights.intermediate_size,
        num_local_experts=weights.num_experts,
        num_logical_experts=total,
        activation=MoEActivation.from_str(problem.activation),
        device="cpu",
        routing_method=RoutingMethodType.Renormalize,
        moe_parallel_config=FusedMoEParallelConfig.make_no_parallel(),
        in_dtype=weights.dtype,
    )
    state = LayerState(
        name=NAME,
        weights=weights,
        top_k=problem.topk_ids.shape[1],
        activation=problem.activation,
        router_weight_on_input=False,
        tau=torch.zeros(1, 1),
    )
    state.set(problem.thresholds, problem.pair_threshold, problem.router_weighted, "test", 0.8)
    layer = SimpleNamespace(
        moe_config=config,
        activation=config.activation,
        expert_map=problem.expert_map,
        global_num_experts=total,
        apply_router_weight_on_input=problem.apply_router_weight_on_input,
        w13_weight=weights.w13,
        w2_weight=weights.w2_rows,
        quant_method=SimpleNamespace(config=SimpleNamespace(stats=None)),
    )
    setattr(layer, STATE, state)
    return layer


def run(problem: Problem, prepare_finalize: Any, monkeypatch: pytest.MonkeyPatch) -> torch.Tensor:
    """The problem as a data-parallel layer runs it: the method's apply, its kernel around ``prepare_finalize``."""
    from cutedsl_kernels.integration.vllm import compat
    from cutedsl_kernels.integration.vllm.method import IntraExpertSparseMethod
    from cutedsl_kernels.integration.vllm.modular import IntraExpertSparseExperts
    from vllm.model_executor.layers.fused_moe import all2all_utils

    layer = make_layer(problem)
    layer._expert_routing_tables = lambda: None
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(
        all2all_utils, "maybe_make_prepare_finalize", lambda **given: asked.append(given) or prepare_finalize
    )
    monkeypatch.setattr(compat, "layer_by_name", {NAME: layer}.__getitem__)
    method = IntraExpertSparseMethod(layer.moe_config, layer.quant_method.config, NAME)
    quant_config = method.get_fused_moe_quant_config(layer)
    method.moe_kernel = compat.modular_kernel(layer, quant_config, IntraExpertSparseExperts(layer, quant_config))
    assert asked[0]["moe"] is layer.moe_config
    return method.apply(layer, problem.hidden_states, problem.topk_weights, problem.topk_ids)


def no_exchange() -> Any:
    from vllm.model_executor.layers.fused_moe.prepare_finalize.no_dp_ep import MoEPrepareAndFinalizeNoDPEPModular

    return MoEPrepareAndFinalizeNoDPEPModular()


def exchange(seed: int) -> Any:
    """Hands this rank the tokens that have a pair here, in another order, ids of other ranks' experts as -1, among rows
    that hold nothing: what DeepEP and FlashInfer do with the tokens of all ranks.
    """
    import vllm.model_executor.layers.fused_moe.modular_kernel as mk

    class Exchange(mk.FusedMoEPrepareAndFinalizeModular):
        activation_format = mk.FusedMoEActivationFormat.Standard

        def topk_indices_dtype(self) -> torch.dtype:
            return torch.int64

        def max_num_tokens_per_rank(self) -> None:
            return None

        def num_dispatchers(self) -> int:
            return 2

        def output_is_reduced(self) -> bool:
            return True

        def prepare(  # type: ignore[no-untyped-def]
            self, a1, topk_weights, topk_ids, num_experts, expert_map, apply_router_weight_on_input, *args, **kwargs
        ):
            if apply_router_weight_on_input:
                a1 = a1 * topk_weights.to(a1.dtype)
            here = expert_map[topk_ids.long()] >= 0
            rows = torch.nonzero(here.any(dim=1)).flatten()
            self.rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))]
            ids = torch.where(here, topk_ids.long(), -1)[self.rows]
            top_k = ids.shape[1]
            return (
                torch.cat([a1[self.rows], a1.new_full((3, a1.shape[1]), float("nan"))]),
                None,
                None,
                torch.cat([ids, ids.new_full((3, top_k), -1)]),
                torch.cat([topk_weights[self.rows], topk_weights.new_full((3, top_k), float("nan"))]),
            )

        def finalize(  # type: ignore[no-untyped-def]
            self, output, fused_expert_output, topk_weights, topk_ids, on_input, weight_and_reduce_impl
        ):
            reduced = weight_and_reduce_impl.apply(None, fused_expert_output, topk_weights, topk_ids, on_input)
            rows = reduced[: len(self.rows)].clone()  # in vLLM's output buffer itself where the sizes agree
            output.zero_().index_copy_(0, self.rows, rows)

    return Exchange()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("sparsity", "skip_pairs", "router_weighted"),
    [(0.0, 0.0, True), (0.5, 0.0, False), (0.8, 0.25, True), (0.95, 0.25, False), (1.0, 0.0, True)],
)
def test_the_kernel_computes_the_definition(
    sparsity: float, skip_pairs: float, router_weighted: bool, dtype: torch.dtype, seed: int, monkeypatch: Any
) -> None:
    problem = random_problem(
        seed,
        num_tokens=19,
        top_k=3,
        dtype=dtype,
        sparsity=sparsity,
        skip_pairs=skip_pairs,
        router_weighted=router_weighted,
        **SHAPE,
    )
    check_close(run(problem, no_exchange(), monkeypatch), problem)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("router_weighted", [False, True], ids=["gate", "weighted"])
@pytest.mark.parametrize("skip_pairs", [0.0, 0.3])
def test_a_weight_on_the_input_is_applied_once(
    skip_pairs: float, router_weighted: bool, dtype: torch.dtype, seed: int, monkeypatch: Any
) -> None:
    """Llama-4: prepare multiplies x, the experts must not; the rule still sees the routing weight."""
    problem = random_problem(
        seed,
        num_tokens=19,
        top_k=1,
        dtype=dtype,
        skip_pairs=0.0,
        router_weighted=router_weighted,
        apply_router_weight_on_input=True,
        **SHAPE,
    )
    # What bf16 holds exactly, since prepare rounds r to x's dtype; and thresholds for these routing weights.
    generator = torch.Generator().manual_seed(seed)
    problem.topk_weights = (
        torch.sigmoid(torch.randn(problem.topk_weights.shape, generator=generator)).bfloat16().float()
    )
    problem.pair_threshold = float(problem.topk_weights.flatten().sort().values[int(19 * skip_pairs)])
    set_thresholds(problem, generator, 0.7)
    # Where the rule sees the weight it is multiplied in and divided out again, so the result is rounded twice.
    check_close(run(problem, no_exchange(), monkeypatch), problem, 3.0 if router_weighted else 2.0)


@pytest.mark.parametrize("on_input", [False, True], ids=["output", "input"])
def test_an_expert_map_is_followed(on_input: bool, seed: int, monkeypatch: Any) -> None:
    problem = random_problem(
        seed,
        num_tokens=19,
        top_k=1 if on_input else 3,
        dtype=torch.float32,
        router_weighted=not on_input,
        remote_experts=True,
        invalid_ids=True,
        apply_router_weight_on_input=on_input,
        **SHAPE,
    )
    check_close(run(problem, no_exchange(), monkeypatch), problem)


@pytest.mark.parametrize("on_input", [False, True], ids=["output", "input"])
@pytest.mark.parametrize("placement", ["linear", "round_robin"])
def test_two_ranks_that_exchange_tokens_add_up(placement: str, on_input: bool, seed: int, monkeypatch: Any) -> None:
    """Every rank computes the pairs of its experts, of all ranks' tokens; the sum is the single process's result."""
    problem = random_problem(
        seed,
        num_tokens=23,
        top_k=1 if on_input else 3,
        dtype=torch.float32,
        skip_pairs=0.0 if on_input else 0.2,
        router_weighted=not on_input,
        apply_router_weight_on_input=on_input,
        **SHAPE,
    )
    ids = torch.arange(SHAPE["num_experts"])
    total = torch.zeros_like(problem.hidden_states)
    for rank in range(2):
        owned = ids[rank::2] if placement == "round_robin" else ids.chunk(2)[rank]
        expert_map = torch.full((len(ids),), -1, dtype=torch.int32)
        expert_map[owned] = torch.arange(len(owned), dtype=torch.int32)
        part = Problem(
            **{
                **problem.arguments,
                "weights": ExpertWeights(problem.weights.w13[owned], problem.weights.w2_rows[owned]),
                "thresholds": problem.thresholds[owned],
                "expert_map": expert_map,
            }
        )
        total += run(part, exchange(seed + rank), monkeypatch)
    check_close(total, problem)


def test_what_is_recorded_and_counted_is_what_a_single_process_sees(seed: int, monkeypatch: Any) -> None:
    from cutedsl_kernels.integration.vllm import compat, method, modular

    from cutedsl_kernels.calibration import LayerHistogram

    problem = random_problem(
        seed, num_tokens=19, top_k=1, dtype=torch.float32, apply_router_weight_on_input=True, **SHAPE
    )
    problem.topk_weights = torch.rand(problem.topk_weights.shape) + 0.1
    layers = [make_layer(problem), make_layer(problem)]
    for layer in layers:
        state = getattr(layer, method.STATE)
        state.recorder, state.counting = LayerHistogram(torch.device("cpu"), SHAPE["num_experts"]), True
    alone, dispatched = (getattr(layer, method.STATE) for layer in layers)
    alone.router_weight_on_input = True
    given = (problem.topk_weights, problem.topk_ids)
    method.run_layer(layers[0], problem.hidden_states, *given)
    monkeypatch.setattr(compat, "layer_by_name", {NAME: layers[1]}.__getitem__)
    experts = modular.IntraExpertSparseExperts(layers[1], compat.empty_quant_config())
    x = problem.hidden_states * problem.topk_weights
    experts.apply(torch.empty_like(x), x, None, None, *given, None, 6, None, apply_router_weight_on_input=True)
    assert torch.equal(alone.counters["test"], dispatched.counters["test"])
    assert alone.recorder.thresholds(0.7, skip_pairs=0.1) == dispatched.recorder.thresholds(0.7, skip_pairs=0.1)


@pytest.mark.parametrize(
    ("back_end", "taken"),
    [
        ("allgather_reducescatter", True),
        ("deepep_high_throughput", True),
        ("deepep_v2", True),
        ("flashinfer_nvlink_one_sided", True),
        ("flashinfer_nvlink_two_sided", True),
        ("deepep_low_latency", False),
        ("nixl_ep", False),
        ("moonep", False),
        ("passthrough", False),
    ],
)
def test_back_ends_that_hand_over_rows_are_taken(back_end: str, taken: bool) -> None:
    """vLLM's own word for the others, batched, must agree."""
    from cutedsl_kernels.integration.vllm import compat
    from vllm.model_executor.layers.fused_moe.config import FusedMoEParallelConfig

    parallel = FusedMoEParallelConfig.make_no_parallel()
    parallel.use_ep, parallel.dp_size, parallel.all2all_backend = True, 2, back_end
    reason = compat.why_not_dispatched(parallel)
    assert (reason is None) == taken
    assert taken or (back_end in reason and "deepep_high_throughput" in reason)
    assert not (taken and parallel.use_batched_activation_format)
    assert compat.is_dispatched(parallel)


def test_a_layer_of_one_process_has_no_modular_kernel() -> None:
    from cutedsl_kernels.integration.vllm import compat
    from vllm.model_executor.layers.fused_moe.config import FusedMoEParallelConfig

    parallel = FusedMoEParallelConfig.make_no_parallel()
    assert not compat.is_dispatched(parallel)
    parallel.use_ep, parallel.ep_size, parallel.all2all_backend = True, 2, "deepep_low_latency"
    assert not compat.is_dispatched(parallel)
    assert compat.why_not_dispatched(parallel) is None
