"""sparse_moe: the one entry point. Validates, chooses a plan, and hands over to the back end of the tensors' device."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from .plan import Plan
from .reference import ACTIVATIONS, check_thresholds
from .weights import ExpertWeights


def sparse_moe(
    hidden_states: torch.Tensor,
    weights: ExpertWeights,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    thresholds: torch.Tensor | float,
    *,
    router_weighted: bool = True,
    pair_threshold: float = 0.0,
    activation: str = "silu",
    expert_map: torch.Tensor | None = None,
    apply_router_weight_on_input: bool = False,
    plan: Plan | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """The routed experts of one MoE layer, inactive neurons skipped; sparse_moe_ref is the definition.

    hidden_states [T, H] in the weights' dtype; topk_weights [T, k] fp32; topk_ids [T, k] int32 or int64, global ids;
    thresholds: a number, or fp32 broadcastable to [E, I]; pair_threshold: pairs with a smaller routing weight are
    skipped whole; expert_map int32 [E_global], -1 for experts held elsewhere. ``plan`` None: chosen by plan_for.
    Returns the routing-weighted sum [T, H] over local experts in hidden_states' dtype, written to ``out`` if given.
    Nothing is synchronised with the host on a CUDA device. TypeError / ValueError name the argument.
    """
    _validate(hidden_states, weights, topk_weights, topk_ids, pair_threshold, activation, expert_map, out)
    check_thresholds(thresholds)
    if plan is not None and not isinstance(plan, Plan):
        raise TypeError(f"plan must be a Plan or None, got {type(plan).__name__}")
    back_end: Callable[..., torch.Tensor]
    if hidden_states.device.type == "cpu":
        from .cpu import sparse_moe_cpu

        if plan is not None and plan.kind != "cpu":
            raise ValueError(f"plan {plan} is for a CUDA device, hidden_states are on the CPU: leave plan out")
        back_end = sparse_moe_cpu
    elif hidden_states.device.type == "cuda":
        from .launch import sparse_moe_cuda

        back_end = sparse_moe_cuda
    else:
        raise ValueError(f"hidden_states must be on a cpu or cuda device, got {hidden_states.device}")
    return back_end(
        hidden_states,
        weights,
        topk_weights,
        topk_ids,
        thresholds,
        router_weighted=router_weighted,
        pair_threshold=pair_threshold,
        activation=activation,
        expert_map=expert_map,
        apply_router_weight_on_input=apply_router_weight_on_input,
        plan=plan,
        out=out,
    )


def _validate(
    hidden_states: torch.Tensor,
    weights: ExpertWeights,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    pair_threshold: float,
    activation: str,
    expert_map: torch.Tensor | None,
    out: torch.Tensor | None,
) -> None:
    if not isinstance(weights, ExpertWeights):
        raise TypeError(f"weights must be ExpertWeights (see ExpertWeights.from_w13_w2), got {type(weights).__name__}")
    for name, value, may_be_none in (
        ("hidden_states", hidden_states, False),
        ("topk_weights", topk_weights, False),
        ("topk_ids", topk_ids, False),
        ("expert_map", expert_map, True),
        ("out", out, True),
    ):
        if not (isinstance(value, torch.Tensor) or (value is None and may_be_none)):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if hidden_states.dim() != 2 or hidden_states.shape[1] != weights.hidden_size:
        raise ValueError(
            f"hidden_states must be [T, H] with H = {weights.hidden_size}, got {tuple(hidden_states.shape)}"
        )
    if hidden_states.dtype != weights.dtype:
        raise TypeError(f"hidden_states must have the weights' dtype {weights.dtype}, got {hidden_states.dtype}")
    num_tokens = hidden_states.shape[0]
    if topk_ids.dim() != 2 or topk_ids.shape[0] != num_tokens or topk_ids.shape[1] < 1:
        raise ValueError(f"topk_ids must be [T, k] with T = {num_tokens}, got {tuple(topk_ids.shape)}")
    if topk_ids.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"topk_ids must be int32 or int64, got {topk_ids.dtype}")
    if topk_weights.shape != topk_ids.shape:
        raise ValueError(f"topk_weights must be {tuple(topk_ids.shape)} like topk_ids, got {tuple(topk_weights.shape)}")
    if not topk_weights.dtype.is_floating_point:
        raise TypeError(f"topk_weights must be a float tensor (fp32), got {topk_weights.dtype}")
    if not (isinstance(pair_threshold, int | float) and math.isfinite(pair_threshold) and pair_threshold >= 0):
        raise ValueError(f"pair_threshold must be a finite number >= 0, got {pair_threshold!r}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    if expert_map is not None and (expert_map.dim() != 1 or expert_map.dtype not in (torch.int32, torch.int64)):
        raise ValueError(
            f"expert_map must be a 1-D int32 or int64 tensor, got {tuple(expert_map.shape)} {expert_map.dtype}"
        )
    if out is not None and (out.shape != hidden_states.shape or out.dtype != hidden_states.dtype):
        raise ValueError(
            f"out must be {tuple(hidden_states.shape)} {hidden_states.dtype} like hidden_states, "
            f"got {tuple(out.shape)} {out.dtype}"
        )
    if out is not None and any(step == 0 and size > 1 for step, size in zip(out.stride(), out.shape, strict=True)):
        raise ValueError(f"out must not be an expanded tensor, got strides {out.stride()}")
    for name, tensor in (
        ("weights", weights.w13),
        ("topk_weights", topk_weights),
        ("topk_ids", topk_ids),
        ("expert_map", expert_map),
        ("out", out),
    ):
        if tensor is not None and tensor.device != hidden_states.device:
            raise ValueError(f"{name} must be on {hidden_states.device} like hidden_states, got {tensor.device}")
