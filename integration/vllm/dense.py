"""The dense path on a GPU: vLLM's own Triton kernel, tuned configs included, on the weights as this package lays them
out.

vLLM's fused_experts asserts that w2's last stride is 1, but the launcher beneath it passes strides through, so it takes
w2_rows [E, I, H] as the view w2_rows.transpose(1, 2) [E, H, I]: same results at the same speed, and no second copy of
w2. Pairs below the pair threshold are left out here too; inactive neurons are not: dense means every neuron. Where the
kernels of pair_kernels.py are loaded, the rows of pairs that are left out, or belong to other ranks, are never touched;
vLLM's own activation and sum go through all of them, which must be zeroed for it.

Biases go into the same kernel, which adds them in fp32 before the routing weight. gpt-oss's rows are no longer
interleaved when they get here, so its activation is the clamped one for gate rows first.
"""

from __future__ import annotations

from typing import Any, cast

import torch

from . import compat
from .state import LayerState, supports_kernels


def dense_runs(state: LayerState) -> bool:
    """Whether run_dense can compute the layer. Where the routing weight belongs on the input, vLLM's kernel puts it on
    the product instead, which is the same only without a bias: such a layer takes this package's own dense path."""
    return not (state.router_weight_on_input and state.weights.w13_bias is not None)


# Block sizes for experts of up to so many pairs; the last ones for any number. Measured on an H200, the last ones on an
# H100 too: vLLM's default takes up to 15 % longer, but for one token 5 % less (docs/dense-path.md).
FIELDS = ("BLOCK_SIZE_M", "BLOCK_SIZE_N", "BLOCK_SIZE_K", "num_warps", "num_stages")
OWN_SIZES = ((8, (16, 64, 128, 4, 3)), (24, (32, 128, 64, 4, 3)), (48, (64, 128, 64, 4, 3)))
LARGE_SIZES, LARGE_SIZES_NARROW = (128, 256, 64, 8, 4), (128, 128, 64, 8, 3)


def own_config(pairs: float, columns: tuple[int, int]) -> dict[str, int]:
    """Block sizes on an sm_90 GPU for a shape that vLLM has not tuned: experts of ``pairs`` pairs in the mean, products
    of so many columns. LARGE_SIZES take 192 KB of shared memory in bf16."""
    large = LARGE_SIZES if all(n % 256 == 0 for n in columns) else LARGE_SIZES_NARROW
    sizes = next((sizes for most, sizes in OWN_SIZES if pairs <= most), large)
    return dict(zip(FIELDS, sizes, strict=True)) | {"GROUP_SIZE_M": 1, "SPLIT_K": 1}


def product_config(config: dict[str, int], *, of_w2_rows: bool) -> dict[str, int]:
    """Block sizes for one of the two products, from those for both.

    The rows of a block stay as they are, since the pairs are sorted for them. The product with w2_rows reads a tile
    of weights along its columns: narrow tiles, which are chosen for few tokens, cut a row into pieces of 64 or 128
    bytes.
    """
    if of_w2_rows and config["BLOCK_SIZE_M"] <= 64 and config["BLOCK_SIZE_N"] < 128:
        return {**config, "BLOCK_SIZE_N": 128, "BLOCK_SIZE_K": 64, "num_warps": 4, "num_stages": 4}
    return config


def run_dense(
    state: LayerState,
    hidden_states: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    expert_map: torch.Tensor | None,
    global_num_experts: int,
) -> torch.Tensor:
    """hidden_states [T, H] on a CUDA device, T > 0; topk_weights fp32 and topk_ids int32 [T, k], global ids. Returns
    [T, H].

    Launches only; allocates from torch's caching allocator (a graph's pool while one is captured).
    """
    triton: Any = compat.triton_experts()
    weights = state.weights
    num_tokens, top_k = topk_ids.shape
    hidden, inter = weights.hidden_size, weights.intermediate_size
    w2 = weights.w2_rows.transpose(1, 2)
    x = hidden_states.contiguous()
    topk_weights, topk_ids = topk_weights.contiguous(), topk_ids.contiguous()
    # Block sizes follow from the pairs of an expert, so what is skipped does not count: 3 % faster at 2048 and at 4096
    # tokens with 35 % skipped (E=256, H=2048, I=512, H100, 2026-11-27).
    computed = max(1, round(num_tokens * (1 - state.expected_pair_skip)))
    if num_tokens > 1 and triton.has_default_config(w2.shape) and supports_kernels(weights):
        config = own_config(computed * top_k / global_num_experts, (2 * inter, hidden))
    else:
        config = triton.config(weights.w13.shape, w2.shape, top_k, computed)
    kernels = state.pair_kernels if top_k == state.top_k else None
    few = expert_map is None and num_tokens * top_k * 4 <= global_num_experts
    num_ids = global_num_experts
    if state.rho > 0:
        # One block per pair takes -1 as "write zeros"; the sorting kernel leaves out what the map sends to -1, so the
        # pairs to skip go to one expert more than there are.
        topk_ids = torch.where(topk_weights < state.rho, -1 if few else global_num_experts, topk_ids)
        if not few:
            num_ids, expert_map = num_ids + 1, state.map_with_nobody(expert_map, global_num_experts)
    if few:
        sorted_ids, expert_ids = None, topk_ids.reshape(-1)
        padded = torch.full((1,), topk_ids.numel() * config["BLOCK_SIZE_M"], dtype=torch.int32, device=x.device)
    else:
        sorted_ids, expert_ids, padded = triton.align(topk_ids, config["BLOCK_SIZE_M"], num_ids, expert_map)
    shared = torch.empty(num_tokens * top_k * max(2 * inter, hidden), dtype=x.dtype, device=x.device)
    gate_up = shared[: num_tokens * top_k * 2 * inter].view(num_tokens, top_k, 2 * inter)
    h = torch.empty(num_tokens * top_k, inter, dtype=x.dtype, device=x.device)
    y = shared[: num_tokens * top_k * hidden].view(num_tokens, top_k, hidden)
    out = torch.empty_like(x)
    on_input = state.router_weight_on_input
    sizes = product_config(config, of_w2_rows=False)
    triton.gemm(
        x, weights.w13, gate_up, topk_weights, sorted_ids, expert_ids, padded, on_input, top_k, sizes, weights.w13_bias
    )
    gate_up = gate_up.view(-1, 2 * inter)
    if kernels is not None:
        # Such kernels are loaded only where some pairs may be left out, so there is a map or one is made.
        pair_map = cast(torch.Tensor, state.map_with_nobody(expert_map, global_num_experts) if few else expert_map)
        kernels.activate(gate_up, topk_ids.view(-1), pair_map, h)
    else:
        triton.activate(state.activation, h, gate_up)
        if expert_map is not None:
            y.zero_()  # rows of pairs that nobody computes
    sizes = product_config(config, of_w2_rows=True)
    triton.gemm(h, w2, y, topk_weights, sorted_ids, expert_ids, padded, not on_input, 1, sizes, weights.w2_bias)
    if kernels is not None:
        kernels.sum(y, topk_ids, pair_map, out)
    else:
        triton.sum(y, out)
    return out
