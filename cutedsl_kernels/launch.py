"""sparse_moe on a CUDA device: chooses the plan, finds the compiled kernel, and launches it on torch's current stream.

Nothing here synchronises the host with the device. Scratch memory is allocated once for a device and stream and never
freed, because captured graphs hold its address. Two graphs captured on the same stream share it: do not replay them at
the same time on different streams.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from .compile import KernelSpec, compile_count, compile_kernel, plan_spec, precompile
from .configs import KERNEL_ACTIVATIONS, Plan, StagedConfig, TileConfig, illegal_reason
from .dense import sparse_moe_dense
from .environment import gpu_of
from .plan import plan_for
from .reference import expand_thresholds
from .shapes import MoEShape
from .weights import ExpertWeights

# What a plan is chosen for when the caller gives none and the thresholds cannot be looked at without a synchronisation.
ASSUMED_SPARSITY = 0.8
ASSUMED_PAIR_SKIP = 0.2
REMEMBERED_SCALARS = 256
COUNTERS = 1024  # beside one for each token: one for every two CTAs of a launch
ALIGNMENT = 256  # bytes, of every buffer in a workspace


_shape = functools.lru_cache(maxsize=4096)(MoEShape)  # one object each, which makes the look-ups below cheap


class NotWarm(RuntimeError):
    """A CUDA graph is being captured, and something had to be compiled or allocated for it first."""


def sparse_moe_cuda(
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
    """sparse_moe for validated CUDA tensors; bf16 only.

    plan None: plan_for at ASSUMED_SPARSITY (0 for the threshold 0.0), dense where no kernel can run the layer, staged
    under torch.use_deterministic_algorithms. A plan that cannot run is a ValueError that says why. NotWarm while a
    graph is captured without a warm-up.
    """
    if hidden_states.dtype != torch.bfloat16:
        raise TypeError(f"weights and hidden_states must be bfloat16 on a CUDA device, got {hidden_states.dtype}")
    num_tokens, top_k = topk_ids.shape
    shape = _shape(weights.num_experts, top_k, weights.hidden_size, weights.intermediate_size)
    if num_tokens == 0:
        return torch.empty_like(hidden_states) if out is None else out
    device = hidden_states.device
    if plan is None:
        dense = not isinstance(thresholds, torch.Tensor) and thresholds <= 0
        sparsity, pair_skip = 0.0 if dense else ASSUMED_SPARSITY, ASSUMED_PAIR_SKIP if pair_threshold > 0 else 0.0
        plan = _default_plan(weights, shape, num_tokens, sparsity, pair_skip, activation)
    else:
        _check_plan(plan, weights, shape, num_tokens, activation)
    if plan.kind == "dense":
        return sparse_moe_dense(
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
            out=out,
        )
    config = plan.config
    assert config is not None
    deterministic = isinstance(config, StagedConfig) and torch.are_deterministic_algorithms_enabled()
    biases = tuple(None if bias is None else _aligned(bias) for bias in (weights.w13_bias, weights.w2_bias))
    flags = (expert_map is not None, biases[0] is not None, deterministic)
    launch = _kernel(shape, config, activation, router_weighted, apply_router_weight_on_input, *flags)
    x, ids = _aligned(hidden_states), _plain(topk_ids, torch.int32)
    y = torch.empty_like(x) if out is None or not _writable(out, x) else out
    inputs = (
        x,
        weights.w13,
        weights.w2_rows,
        threshold_table(thresholds, shape, device),
        ids,
        _plain(topk_weights, torch.float32),
        ids.view(-1) if expert_map is None else _map(expert_map),  # without a map: never read
        *biases,
    )
    if isinstance(config, StagedConfig):
        launch(
            *inputs,
            pair_threshold,
            *workspace_for(device, config, shape, num_tokens, deterministic, apply_router_weight_on_input),
            y,
        )
    else:
        scratch = scratch_for(device, num_tokens, shape.hidden_size)
        launch(*inputs, scratch.accum, scratch.counters, y, pair_threshold, gpu_of(device).num_sms)
    return y if out is None or out is y else out.copy_(y)


def _writable(out: torch.Tensor, hidden_states: torch.Tensor) -> bool:
    """Not over x, which other CTAs still read, and in the layout that the kernel was compiled for."""
    return out.data_ptr() not in (0, hidden_states.data_ptr()) and out.is_contiguous() and out.data_ptr() % 16 == 0


@functools.lru_cache(maxsize=4096)
def _kernel(*key: Any) -> Callable[..., Any]:
    """The launch function for the arguments of _spec. Its body runs once for each kernel, which is when a graph capture
    has to be refused."""
    _refuse_capture("a kernel to load")
    return compile_kernel(_spec(*key))


def _spec(
    shape: MoEShape,
    config: TileConfig,
    activation: str,
    router_weighted: bool,
    weight_on_input: bool,
    has_expert_map: bool,
    has_bias: bool,
    deterministic: bool,
) -> KernelSpec:
    staged = isinstance(config, StagedConfig)
    flags: dict[str, Any] = {"deterministic": deterministic} if staged else {}
    return plan_spec(
        Plan("staged" if staged else "fused", config),
        shape,
        activation=activation,
        router_weighted=router_weighted,
        weight_on_input=weight_on_input,
        has_expert_map=has_expert_map,
        has_bias=has_bias,
        **flags,
    )


def kernels_of(
    plans: Iterable[Plan],
    weights: ExpertWeights,
    top_k: int,
    *,
    router_weighted: bool = True,
    activation: str = "silu",
    expert_map: torch.Tensor | None = None,
    apply_router_weight_on_input: bool = False,
) -> list[KernelSpec]:
    """The kernels that sparse_moe_cuda launches for ``plans``, for compile.precompile; none for a dense plan."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    flags = (activation, router_weighted, apply_router_weight_on_input, expert_map is not None)
    return [
        _spec(weights.shape(top_k), plan.config, *flags, weights.w13_bias is not None, deterministic)
        for plan in plans
        if plan.config is not None
    ]


def _default_plan(
    weights: ExpertWeights,
    shape: MoEShape,
    num_tokens: int,
    sparsity: float,
    pair_skip: float,
    activation: str,
) -> Plan:
    if why_no_kernels(weights) or activation not in KERNEL_ACTIVATIONS:
        return Plan("dense")
    if torch.are_deterministic_algorithms_enabled():
        plan = Plan("staged", StagedConfig())
        return plan if _cannot_run(plan, shape, num_tokens, activation) is None else Plan("dense")
    return plan_for(shape, num_tokens, max(sparsity, pair_skip), weights.device, pair_skip, activation)


def _check_plan(plan: Plan, weights: ExpertWeights, shape: MoEShape, num_tokens: int, activation: str) -> None:
    if plan.kind == "dense":
        return
    reason = why_no_kernels(weights) or _cannot_run(plan, shape, num_tokens, activation)
    if plan.kind == "cpu":
        reason = "it is for tensors on the CPU"
    elif plan.kind == "fused" and torch.are_deterministic_algorithms_enabled():
        reason = "it adds in no fixed order, and torch.use_deterministic_algorithms is on"
    if reason:
        raise ValueError(f"plan {plan} cannot run {shape.key} at {num_tokens} tokens: {reason}: leave plan out")


_cannot_run = functools.lru_cache(maxsize=65536)(illegal_reason)


def why_no_kernels(weights: ExpertWeights) -> str | None:
    """Why no kernel of ours can run these weights, whatever the plan."""
    biases = [None if bias is None else bias.dtype for bias in (weights.w13_bias, weights.w2_bias)]
    if biases not in ([None, None], [torch.bfloat16, torch.bfloat16]):
        return f"the kernels take w13_bias and w2_bias in bfloat16 or neither, these are {biases[0]} and {biases[1]}"
    return None if _is_hopper(weights.device) else f"the kernels need an sm_90 GPU, {weights.device} is not one"


@functools.cache
def _is_hopper(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) == (9, 0)


def _plain(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``tensor`` as a contiguous one of ``dtype``; itself if it is."""
    return tensor.to(dtype).contiguous()


def _map(expert_map: torch.Tensor) -> torch.Tensor:
    """``expert_map`` as the kernels take it: int32, and never empty, since they look up the nearest entry of any id."""
    return _plain(expert_map if expert_map.numel() > 0 else expert_map.new_full((1,), -1), torch.int32)


def _aligned(tensor: torch.Tensor) -> torch.Tensor:
    """``tensor``, or a copy, contiguous and starting at a multiple of 16 bytes."""
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


_scalar_thresholds: dict[tuple[float, int, int, torch.device], torch.Tensor] = {}


def threshold_table(thresholds: torch.Tensor | float, shape: MoEShape, device: torch.device) -> torch.Tensor:
    """fp32 [E, I], contiguous, for a number or a tensor that broadcasts. Numbers are remembered; so pass [E, I] or a
    number, since any other tensor is expanded by a copy on every call."""
    if isinstance(thresholds, torch.Tensor):
        table = thresholds.dtype == torch.float32 and thresholds.shape == (shape.num_experts, shape.intermediate_size)
        if table and thresholds.is_contiguous() and thresholds.device == device:
            return thresholds
        return expand_thresholds(thresholds, shape.num_experts, shape.intermediate_size, device).contiguous()
    key = (float(thresholds), shape.num_experts, shape.intermediate_size, device)
    made = _scalar_thresholds.get(key)
    if made is None:
        size = (shape.num_experts, shape.intermediate_size)
        made = torch.full(size, float(thresholds), dtype=torch.float32, device=device)
        if not torch.cuda.is_available() or not torch.cuda.is_current_stream_capturing():
            if len(_scalar_thresholds) >= REMEMBERED_SCALARS:
                _scalar_thresholds.pop(next(iter(_scalar_thresholds)))
            _scalar_thresholds[key] = made  # made while capturing, it would belong to that graph's memory
    return made


@dataclass(frozen=True)
class Scratch:
    """accum [rows, H] fp32, counters [rows + COUNTERS] int32. Zero between launches: kernels clean up behind them."""

    accum: torch.Tensor
    counters: torch.Tensor


_scratch: dict[tuple[torch.device, int, int], Scratch] = {}
_pools: dict[tuple[torch.device, int], torch.Tensor] = {}
_workspaces: dict[tuple[Any, ...], tuple[torch.Tensor, ...]] = {}
_retired: list[Scratch | torch.Tensor] = []  # captured graphs may still write to these


def _stream_of(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def scratch_for(device: torch.device, num_tokens: int, hidden_size: int) -> Scratch:
    """Scratch of the current stream for ``num_tokens`` tokens or more; NotWarm if a capture would have to make it."""
    key = (device, _stream_of(device), hidden_size)
    found = _scratch.get(key)
    if found is not None and found.accum.shape[0] >= num_tokens:
        return found
    _refuse_capture("scratch memory to allocate")
    rows = 1 << max(6, (num_tokens - 1).bit_length())
    if found is not None:
        _retired.append(found)
    _scratch[key] = Scratch(
        torch.zeros(rows, hidden_size, dtype=torch.float32, device=device),
        torch.zeros(rows + COUNTERS, dtype=torch.int32, device=device),
    )
    return _scratch[key]


def workspace_for(
    device: torch.device,
    config: StagedConfig,
    shape: MoEShape,
    num_tokens: int,
    deterministic: bool,
    weight_on_input: bool,
) -> tuple[torch.Tensor, ...]:
    """The buffers of StagedConfig.workspace, uninitialised, cut from one pool per stream that all layers share.

    NotWarm if a capture would have to enlarge the pool.
    """
    where = (device, _stream_of(device))
    key = (*where, config, shape, num_tokens, deterministic, weight_on_input)
    found = _workspaces.get(key)
    if found is not None:
        return found
    sizes = config.workspace(shape, num_tokens, deterministic, weight_on_input).values()
    dtypes = [getattr(torch, name) for _, name in sizes]
    lengths = [math.prod(size) * dtype.itemsize for (size, _), dtype in zip(sizes, dtypes, strict=True)]
    starts = [0, *itertools.accumulate(-(-length // ALIGNMENT) * ALIGNMENT for length in lengths)]
    pool = _pools.get(where)
    if pool is None or pool.numel() < starts[-1]:
        _refuse_capture("scratch memory to allocate")
        if pool is not None:
            _retired.append(pool)
            for stale in [k for k in _workspaces if k[:2] == where]:
                del _workspaces[stale]
        pool = _pools[where] = torch.empty(starts[-1], dtype=torch.uint8, device=device)
    _workspaces[key] = tuple(
        pool[start : start + length].view(dtype).view(size)
        for start, length, dtype, (size, _) in zip(starts, lengths, dtypes, sizes, strict=False)
    )
    return _workspaces[key]


def _refuse_capture(what: str) -> None:
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise NotWarm(
            f"there is {what} and a CUDA graph is being captured: call cutedsl_kernels.launch.warmup, or run the layer"
            " once with this many tokens, on the stream of the capture first"
        )


def warmup(
    weights: ExpertWeights,
    top_k: int,
    token_buckets: Iterable[int],
    *,
    sparsity: float = ASSUMED_SPARSITY,
    pair_skip: float = 0.0,
    plans: Iterable[Plan] = (),
    router_weighted: bool = True,
    activation: str = "silu",
    expert_map: torch.Tensor | None = None,
    apply_router_weight_on_input: bool = False,
) -> int:
    """Compiles, loads and launches once what these numbers of tokens need on the current stream, and allocates scratch.

    For each bucket the plan of plan_for at ``sparsity`` and ``pair_skip``, or every one of ``plans`` that can run it.
    The launches have no pair to compute, so they read no weights. Returns how many kernels were compiled: 0 when all
    were in the cache. Afterwards these calls compile nothing and can be captured.
    """
    before, device = compile_count(), weights.device
    shape, given = weights.shape(top_k), tuple(plans)
    flags: dict[str, Any] = {
        "router_weighted": router_weighted,
        "activation": activation,
        "expert_map": expert_map,
        "apply_router_weight_on_input": apply_router_weight_on_input,
    }
    runs: list[tuple[int, Plan]] = []
    for num_tokens in sorted(set(token_buckets), reverse=True):
        runnable = [p for p in given if illegal_reason(p, shape, num_tokens, activation) is None]
        default = [] if given else [_default_plan(weights, shape, num_tokens, sparsity, pair_skip, activation)]
        runs += [(num_tokens, plan) for plan in runnable + default]
    precompiled = precompile(kernels_of([plan for _, plan in runs], weights, top_k, **flags))
    for num_tokens, plan in runs:
        sparse_moe_cuda(
            torch.zeros(num_tokens, shape.hidden_size, dtype=weights.dtype, device=device),
            weights,
            torch.zeros(num_tokens, top_k, dtype=torch.float32, device=device),
            torch.full((num_tokens, top_k), -1, dtype=torch.int32, device=device),
            0.0,
            plan=plan,
            **flags,
        )
    return compile_count() - before + precompiled
