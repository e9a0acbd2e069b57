"""run_dense around an imitation of vLLM's Triton pieces in torch: which rows, biases and weights they are given.

On an sm_90 GPU with vLLM, tests/gpu/test_vllm_dense.py runs the same layers through the real ones.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import check_close, random_problem

from cutedsl_kernels.reference import gate_activation, up_transform

pytestmark = pytest.mark.engine

BLOCK = 4


def align(
    topk_ids: torch.Tensor, block: int, num_experts: int, expert_map: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Pairs by expert, each expert's padded to whole blocks with the number of pairs; the expert of each block."""
    ids, pairs, experts = topk_ids.flatten(), [], []
    for wanted in range(num_experts):
        local = wanted if expert_map is None else int(expert_map[wanted])
        mine = (ids == wanted).nonzero().flatten().tolist()
        if local < 0 or not mine:
            continue
        pairs += mine + [ids.numel()] * (-len(mine) % block)
        experts += [local] * -(-len(mine) // block)
    return torch.tensor(pairs), torch.tensor(experts), torch.tensor([len(pairs)])


def gemm(
    a: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor,
    topk_weights: torch.Tensor,
    sorted_ids: torch.Tensor | None,
    expert_ids: torch.Tensor,
    padded: torch.Tensor,
    weighted: bool,
    top_k: int,
    config: dict[str, int],
    bias: torch.Tensor | None,
) -> None:
    rows = c.view(-1, c.shape[-1])
    for place in range(int(padded)):
        number = place // config["BLOCK_SIZE_M"]
        if sorted_ids is None and place % config["BLOCK_SIZE_M"]:
            continue
        pair = number if sorted_ids is None else int(sorted_ids[place])
        expert = int(expert_ids[number])
        if pair >= len(rows):
            continue
        product = torch.zeros(rows.shape[1])
        if expert >= 0:
            product = b[expert].float() @ a.view(-1, a.shape[-1])[pair // top_k].float()
            product += 0.0 if bias is None else bias[expert].float()
            product *= topk_weights.flatten()[pair] if weighted else 1.0
        rows[pair] = product


def activate(activation: str, out: torch.Tensor, gate_up: torch.Tensor) -> None:
    gate, up = gate_up.float().chunk(2, dim=1)
    out.copy_(gate_activation(gate, activation) * up_transform(up, activation))


class Kernels:
    """What pair_kernels.PairKernels computes; rows of other pairs hold NaN, as memory nobody wrote may."""

    def __init__(self, activation: str) -> None:
        self.activation = activation

    def here(self, topk_ids: torch.Tensor, expert_map: torch.Tensor) -> torch.Tensor:
        known = (topk_ids >= 0) & (topk_ids < len(expert_map))
        return known & (expert_map[topk_ids.clamp(0, len(expert_map) - 1).long()] >= 0)

    def activate(
        self, gate_up: torch.Tensor, topk_ids: torch.Tensor, expert_map: torch.Tensor, out: torch.Tensor
    ) -> None:
        activate(self.activation, out, gate_up)
        out[~self.here(topk_ids, expert_map)] = float("nan")

    def sum(self, pairs: torch.Tensor, topk_ids: torch.Tensor, expert_map: torch.Tensor, out: torch.Tensor) -> None:
        here = self.here(topk_ids, expert_map)
        out.copy_(torch.where(here.unsqueeze(2), pairs.float(), 0.0).sum(1))


@pytest.mark.parametrize("kernels", [False, True], ids=["vLLM's functions", "kernels"])
@pytest.mark.parametrize("num_tokens", [1, 9])
@pytest.mark.parametrize("changes", [{}, {"skip_pairs": 0.4}, {"remote_experts": True, "skip_pairs": 0.4}], ids=str)
@pytest.mark.parametrize("biases", [False, True])
def test_gpt_oss_layers(
    kernels: bool, num_tokens: int, changes: dict[str, Any], biases: bool, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cutedsl_kernels.integration.vllm import dense
    from cutedsl_kernels.integration.vllm.state import LayerState

    pieces = SimpleNamespace(
        config=lambda *sizes: {"BLOCK_SIZE_M": BLOCK, "BLOCK_SIZE_N": 32},
        has_default_config=lambda w2: False,
        align=align,
        gemm=gemm,
        activate=activate,
        sum=lambda pairs, out: out.copy_(pairs.float().sum(1)),
    )
    monkeypatch.setattr(dense.compat, "triton_experts", lambda: pieces)
    sizes = {"num_experts": 16, "top_k": 2, "hidden_size": 64, "intermediate_size": 24}
    options = {"activation": "swigluoai", "sparsity": 0.0, "biases": biases} | changes
    case = random_problem(seed, num_tokens=num_tokens, **sizes, **options)
    state = LayerState("layer", case.weights, 2, case.activation, False, case.thresholds, rho=case.pair_threshold)
    if kernels and changes:  # else nothing is left out, and none are loaded
        state.pair_kernels = Kernels(case.activation)  # type: ignore[assignment]
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *args, **options: empty(*args, **options).fill_(float("nan")))
    experts = 16 if case.expert_map is None else case.expert_map.numel()
    out = dense.run_dense(state, case.hidden_states, case.topk_weights, case.topk_ids, case.expert_map, experts)
    check_close(out, case)


def test_the_second_product_reads_wide_tiles_and_keeps_the_order_of_pairs() -> None:
    from cutedsl_kernels.integration.vllm.dense import product_config

    narrow = {"BLOCK_SIZE_M": 16, "BLOCK_SIZE_N": 32, "BLOCK_SIZE_K": 128, "GROUP_SIZE_M": 8, "num_warps": 2}
    found = product_config(narrow, of_w2_rows=True)
    assert (found["BLOCK_SIZE_M"], found["GROUP_SIZE_M"], found["BLOCK_SIZE_N"]) == (16, 8, 128)
    assert narrow["BLOCK_SIZE_N"] == 32  # vLLM remembers its configs
    assert product_config(narrow, of_w2_rows=False) == narrow
    for unchanged in (narrow | {"BLOCK_SIZE_N": 128}, narrow | {"BLOCK_SIZE_M": 128}):
        assert product_config(unchanged, of_w2_rows=True) == unchanged


@pytest.mark.parametrize(
    ("num_tokens", "skip", "tuned", "hopper", "hidden", "rows", "columns"),
    [
        (64, 0.0, False, True, 256, 16, 64),  # 8 pairs an expert
        (100, 0.2, False, True, 256, 32, 128),  # 10 of those that are left
        (384, 0.0, False, True, 256, 64, 128),
        (385, 0.0, False, True, 256, 128, 256),
        (385, 0.0, False, True, 128, 128, 128),  # 256 columns would be half empty
        (1, 0.0, False, True, 256, 99, 99),  # vLLM's own
        (64, 0.0, True, True, 256, 99, 99),
        (64, 0.0, False, False, 256, 99, 99),  # an A100 has too little shared memory
    ],
)
def test_own_block_sizes_where_vllm_has_tuned_nothing(
    num_tokens: int,
    skip: float,
    tuned: bool,
    hopper: bool,
    hidden: int,
    rows: int,
    columns: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from cutedsl_kernels.integration.vllm import dense
    from cutedsl_kernels.integration.vllm.state import LayerState

    seen = []
    pieces = SimpleNamespace(
        config=lambda *sizes: {"BLOCK_SIZE_M": 99, "BLOCK_SIZE_N": 99},
        has_default_config=lambda w2: not tuned,
        align=lambda ids, block, *others: seen.append(block) or (None, None, None),  # type: ignore[func-returns-value]
        gemm=lambda *arguments: seen.append(arguments[9]),
        activate=lambda *arguments: None,
        sum=lambda *arguments: None,
    )
    monkeypatch.setattr(dense.compat, "triton_experts", lambda: pieces)
    monkeypatch.setattr(dense, "supports_kernels", lambda weights: hopper)
    case = random_problem(0, num_tokens=num_tokens, num_experts=8, top_k=1, hidden_size=hidden, intermediate_size=128)
    state = LayerState("layer", case.weights, 1, case.activation, False, case.thresholds)
    state.rho, state.pair_skip = 1e-9 * skip, skip
    dense.run_dense(state, case.hidden_states, case.topk_weights, case.topk_ids, None, 8)
    *sorted_for, first, second = seen  # one token is not sorted
    assert sorted_for == [rows] * (num_tokens > 1)
    assert first["BLOCK_SIZE_M"] == second["BLOCK_SIZE_M"] == rows
    assert first["BLOCK_SIZE_N"] == columns
    assert second["BLOCK_SIZE_N"] == (128 if columns == 64 or (columns == 99 and rows <= 64) else columns)


def test_whether_vllm_has_tuned_sizes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against vLLM itself: its default, an override, and a file of the user's."""
    from cutedsl_kernels.integration.vllm import compat
    from vllm.model_executor.layers.fused_moe import fused_moe, override_config

    triton, w13, w2 = compat.triton_experts(), torch.Size((7, 192, 128)), torch.Size((7, 128, 96))
    sizes = {"BLOCK_SIZE_M": 16, "BLOCK_SIZE_N": 32}
    assert triton.has_default_config(w2)
    with override_config(sizes):
        assert not triton.has_default_config(w2)
        assert triton.config(w13, w2, 2, 9) == sizes
    (tmp_path / fused_moe.get_config_file_name(7, 96, None)).write_text(json.dumps({"1": sizes}))
    monkeypatch.setenv("VLLM_TUNED_CONFIG_FOLDER", str(tmp_path))
    fused_moe.get_moe_configs.cache_clear()
    try:
        assert not triton.has_default_config(w2)
        assert triton.config(w13, w2, 2, 9) == sizes
    finally:
        fused_moe.get_moe_configs.cache_clear()


def test_a_bias_is_not_scaled_with_the_input(seed: int) -> None:
    from cutedsl_kernels.integration.vllm.dense import dense_runs
    from cutedsl_kernels.integration.vllm.state import LayerState

    sizes = {"num_tokens": 1, "num_experts": 2, "top_k": 1, "hidden_size": 64, "intermediate_size": 8}
    for biases in (False, True):
        case = random_problem(seed, biases=biases, **sizes)
        for on_input in (False, True):
            state = LayerState("layer", case.weights, 1, case.activation, on_input, case.thresholds)
            assert dense_runs(state) == (not (biases and on_input))
