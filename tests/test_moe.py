"""sparse_moe: every bad argument is named, and the good ones reach the CPU back end and the public names."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from helpers import Problem, check_close, random_problem

from cutedsl_kernels import MoEShape, Plan, UserError, sparse_moe

pytestmark = pytest.mark.cpu

T, E, K, H, I = 6, 5, 2, 32, 24


def problem(seed: int, **changes: Any) -> Problem:
    sizes = {"num_tokens": T, "num_experts": E, "top_k": K, "hidden_size": H, "intermediate_size": I}
    return random_problem(seed, **{**sizes, "dtype": torch.float32, **changes})


@pytest.mark.parametrize(
    ("name", "value", "error", "message"),
    [
        ("weights", torch.zeros(2), TypeError, "weights must be ExpertWeights .*got Tensor"),
        ("hidden_states", torch.zeros(T, H + 1), ValueError, r"hidden_states must be \[T, H\] with H = 32"),
        ("hidden_states", torch.zeros(H), ValueError, r"hidden_states must be \[T, H\]"),
        ("hidden_states", torch.zeros(T, H).bfloat16(), TypeError, "hidden_states must have the weights' dtype"),
        ("topk_ids", torch.zeros(T + 1, K).int(), ValueError, r"topk_ids must be \[T, k\] with T = 6"),
        ("topk_ids", torch.zeros(T, 0).int(), ValueError, r"topk_ids must be \[T, k\]"),
        ("topk_ids", torch.zeros(T, K), TypeError, "topk_ids must be int32 or int64, got torch.float32"),
        ("topk_weights", torch.zeros(T, K + 1), ValueError, r"topk_weights must be \(6, 2\) like topk_ids"),
        ("topk_weights", torch.zeros(T, K).int(), TypeError, "topk_weights must be a float tensor"),
        ("thresholds", torch.zeros(E, I + 1), ValueError, r"thresholds must be a number or broadcast to \[E, I\]"),
        ("thresholds", torch.zeros(2, E, I), ValueError, r"thresholds must be a number or broadcast to \[E, I\]"),
        ("thresholds", None, TypeError, "thresholds must be a number or a tensor, got NoneType"),
        ("thresholds", [0.1], TypeError, "thresholds must be a number or a tensor, got list"),
        ("hidden_states", [[0.0]], TypeError, "hidden_states must be a torch.Tensor, got list"),
        ("topk_ids", None, TypeError, "topk_ids must be a torch.Tensor, got NoneType"),
        ("topk_weights", [1.0], TypeError, "topk_weights must be a torch.Tensor, got list"),
        ("expert_map", [0, 1], TypeError, "expert_map must be a torch.Tensor, got list"),
        ("plan", "dense", TypeError, "plan must be a Plan or None, got str"),
        ("plan", Plan("dense"), ValueError, "plan dense is for a CUDA device, hidden_states are on the CPU"),
        ("out", torch.zeros(1, H).expand(T, H), ValueError, "out must not be an expanded tensor"),
        ("pair_threshold", -0.1, ValueError, "pair_threshold must be a finite number >= 0, got -0.1"),
        ("pair_threshold", math.nan, ValueError, "pair_threshold must be a finite number >= 0, got nan"),
        ("activation", "relu2", ValueError, "activation must be one of silu, .*got 'relu2'"),
        ("expert_map", torch.zeros(E), ValueError, "expert_map must be a 1-D int32 or int64 tensor"),
        ("out", torch.zeros(T, H).bfloat16(), ValueError, r"out must be \(6, 32\) torch.float32"),
        ("out", torch.zeros(T, H + 1), ValueError, r"out must be \(6, 32\)"),
        ("topk_ids", torch.zeros(T, K, device="meta").int(), ValueError, "topk_ids must be on cpu"),
        ("expert_map", torch.zeros(E, device="meta").int(), ValueError, "expert_map must be on cpu"),
    ],
)
def test_errors_name_the_argument(name: str, value: Any, error: type[Exception], message: str, seed: int) -> None:
    arguments = {**problem(seed).arguments, name: value}
    with pytest.raises(error, match=message):
        sparse_moe(**arguments)


@pytest.mark.parametrize("shape", [(), (1,), (I,), (E, 1), (1, I), (E, I)])
def test_thresholds_broadcast(shape: tuple[int, ...], seed: int) -> None:
    call = problem(seed, sparsity=0.0, router_weighted=False)
    call.thresholds = torch.full(shape, 1e-9) if shape != (E, I) else torch.full((E, I), 0.0)
    check_close(sparse_moe(**call.arguments), call)


def test_an_empty_expert_map_knows_no_expert(seed: int) -> None:
    arguments = {**problem(seed).arguments, "expert_map": torch.zeros(0, dtype=torch.int32)}
    assert not sparse_moe(**arguments).any()


def test_thresholds_as_a_number(seed: int) -> None:
    call = problem(seed)
    zero = sparse_moe(**{**call.arguments, "thresholds": 0.0})
    assert torch.equal(zero, sparse_moe(**{**call.arguments, "thresholds": torch.zeros(())}))
    assert not sparse_moe(**{**call.arguments, "thresholds": 1e9}).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_result_is_written_to_out(dtype: torch.dtype, seed: int) -> None:
    call = problem(seed, dtype=dtype)
    out = torch.full((T, H), math.nan, dtype=dtype)
    assert sparse_moe(**call.arguments, out=out) is out
    check_close(out, call)


def test_nan_reaches_the_result(seed: int) -> None:
    call = problem(seed, sparsity=0.9)
    call.hidden_states[3, 0] = math.nan
    result = sparse_moe(**call.arguments)
    assert result[3].isnan().all()
    assert not result[[0, 1, 2, 4, 5]].isnan().any()


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"num_experts": 64, "num_experts_per_tok": 8, "hidden_size": 2048, "intermediate_size": 1024}, (64, 8)),
        ({"num_local_experts": 8, "num_experts_per_tok": 2, "hidden_size": 2048, "intermediate_size": 1024}, (8, 2)),
        ({"moe_num_experts": 64, "moe_k": 6, "hidden_size": 2048, "moe_intermediate_size": 1024}, (64, 6)),
        (
            {
                "text_config": {
                    "n_routed_experts": 256,
                    "num_experts_per_tok": 8,
                    "hidden_size": 2048,
                    "moe_intermediate_size": 1024,
                    "intermediate_size": 9999,
                }
            },
            (256, 8),
        ),
    ],
)
def test_shape_from_config(config: dict[str, Any], expected: tuple[int, int]) -> None:
    assert MoEShape.from_config(config) == MoEShape(*expected, 2048, 1024)


def test_config_without_experts() -> None:
    with pytest.raises(UserError, match=r"type llama is not a Mixture-of-Experts model: no value for experts"):
        MoEShape.from_config({"model_type": "llama", "hidden_size": 64, "intermediate_size": 128})


def test_shard() -> None:
    shape = MoEShape(64, 8, 2048, 1024)
    assert shape.shard(tensor_parallel=2, expert_parallel=4) == MoEShape(16, 8, 2048, 512)
    with pytest.raises(ValueError, match="intermediate_size 1024 does not divide by tensor_parallel 3"):
        shape.shard(tensor_parallel=3)
    with pytest.raises(ValueError, match="hidden_size must be a positive integer, got 0"):
        MoEShape(64, 8, 0, 1024)
