"""The plugin's dense path on an sm_90 GPU: vLLM's Triton kernel on weights as this package lays them out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import check_close, random_problem

pytest.importorskip("vllm")
HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not HOPPER, reason="needs an sm_90 GPU")]


@pytest.mark.parametrize("num_tokens", [1, 5, 70, 1100])  # 1100: wide tiles, where columns are a multiple of 256
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"activation": "swigluoai"},
        {"activation": "swigluoai", "biases": True},
        {"activation": "swigluoai", "biases": True, "skip_pairs": 0.4},
        {"activation": "swigluoai", "biases": True, "skip_pairs": 0.4, "remote_experts": True},
        {"biases": True, "hidden_size": 576, "intermediate_size": 360},
    ],
    ids=str,
)
def test_dense_layers(num_tokens: int, changes: dict[str, Any], seed: int) -> None:
    from cutedsl_kernels.integration.vllm.dense import run_dense
    from cutedsl_kernels.integration.vllm.state import LayerState

    sizes = {"num_experts": 16, "top_k": 2, "hidden_size": 512, "intermediate_size": 128, "sparsity": 0.0}
    case = random_problem(seed, num_tokens=num_tokens, **(sizes | changes)).to("cuda")
    state = LayerState("layer", case.weights, 2, case.activation, False, case.thresholds, rho=case.pair_threshold)
    state.load_pair_kernels(case.expert_map)
    assert (state.pair_kernels is not None) == (case.pair_threshold > 0 or case.expert_map is not None)
    experts = 16 if case.expert_map is None else case.expert_map.numel()
    out = run_dense(state, case.hidden_states, case.topk_weights, case.topk_ids, case.expert_map, experts)
    check_close(out, case)
