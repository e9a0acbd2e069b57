"""Everything that differs between vLLM versions, or that reaches into vLLM by a name it may change. Nothing else in
this package imports from vllm.model_executor.layers.fused_moe.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from importlib import metadata
from typing import Any

import torch

from ...reference import SWIGLUOAI_ALPHA, SWIGLUOAI_LIMIT

# Checked against the sources of both ends. 0.26.0 is the newest release for torch 2.11, 0.33.0 the newest there is.
MINIMUM_VERSION = (0, 26)
MAXIMUM_VERSION = (0, 33)

# vLLM's name -> (name in reference.ACTIVATIONS, rows of w13 alternate gate and up)
_ACTIVATIONS = {
    "silu": ("silu", False),
    "gelu": ("gelu", False),
    "gelu_tanh": ("gelu_tanh", False),
    "swigluoai": ("swigluoai", True),
}


def vllm_version() -> str:
    """Version of the installed vLLM, under whichever distribution name it came."""
    import vllm

    return str(vllm.__version__)


def unsupported_version() -> str | None:
    """One line if this vLLM lies outside the supported range, else None."""
    version = vllm_version()
    try:
        major_minor = tuple(int(part) for part in version.split(".")[:2])
    except ValueError:
        return None  # a development build: let it try
    if MINIMUM_VERSION <= major_minor <= MAXIMUM_VERSION:
        return None
    low, high = (".".join(map(str, v)) for v in (MINIMUM_VERSION, MAXIMUM_VERSION))
    ours = metadata.version("cutedsl-kernels")
    return f"cutedsl-kernels {ours} supports vLLM {low} to {high}, found {version}: install a vLLM in that range"


def routed_experts_class() -> type[torch.nn.Module]:
    from vllm.model_executor.layers.fused_moe import RoutedExperts

    return RoutedExperts


def routed_experts_of(model: torch.nn.Module) -> Iterator[Any]:
    """The RoutedExperts modules of a model in module order."""
    kind = routed_experts_class()
    for module in model.modules():
        if isinstance(module, kind):
            yield module


def stock_method_class() -> Any:
    from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod

    return UnquantizedFusedMoEMethod


def method_base_class() -> type:
    from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase

    return FusedMoEMethodBase


# All-to-all back ends whose prepare hands tokens over as [M, K] rows with global expert ids, in vLLM's spelling of both
# ends of the range. deepep_low_latency, pplx and nixl_ep hand over [E, tokens, K]; moonep wants the weights in a layout
# of its own; mori is for ROCm, where no kernel of this package runs.
STANDARD_FORMAT_BACK_ENDS = (
    "allgather_reducescatter",
    "naive",
    "deepep_high_throughput",
    "deepep_v2",
    "flashinfer_all2allv",
    "flashinfer_nvlink_two_sided",
    "flashinfer_nvlink_one_sided",
)


def is_dispatched(parallel: Any) -> bool:
    """Whether a layer runs inside a modular kernel: under data parallelism, or with sequences cut over ranks."""
    return bool(parallel.use_all2all_kernels or parallel.dp_size > 1)


def why_not_dispatched(parallel: Any) -> str | None:
    """Why the all-to-all back end in use cannot bring tokens to this package's experts, or None."""
    back_end = parallel.all2all_backend
    used = parallel.use_all2all_kernels or back_end == "passthrough"  # which dispatches by itself everywhere
    if not used or back_end in STANDARD_FORMAT_BACK_ENDS:
        return None
    known = ", ".join(STANDARD_FORMAT_BACK_ENDS)
    return f"the all-to-all back end {back_end} does not hand over tokens as rows [M, K] (supported: {known})"


def is_batch_invariant() -> bool:
    """Whether vLLM is to give results that do not depend on what else is in a batch."""
    import vllm.envs

    return bool(vllm.envs.VLLM_BATCH_INVARIANT)


def why_weights_move() -> str | None:
    """Why the weights of the engine that is being built may leave the addresses they are loaded to, or None."""
    from vllm.config import get_current_vllm_config_or_none

    config = get_current_vllm_config_or_none()
    if config is None:
        return None
    if config.model_config is not None and config.model_config.enable_sleep_mode:
        return "sleep mode (--enable-sleep-mode) may discard the thresholds and the kernels' scratch memory"
    offload = config.offload_config
    if offload.uva.cpu_offload_gb > 0 or offload.prefetch.offload_group_size > 0:
        return "weights may be offloaded to the host (--cpu-offload-gb, --offload-group-size)"
    return None


def modular_kernel(layer: Any, quant_config: Any, experts: Any) -> Any:
    """vLLM's kernel around ``experts``, with prepare and finalize for the layer's all-to-all back end. Collective: all
    ranks make theirs.
    """
    from vllm.model_executor.layers.fused_moe.all2all_utils import maybe_make_prepare_finalize
    from vllm.model_executor.layers.fused_moe.modular_kernel import FusedMoEKernel

    prepare_finalize = maybe_make_prepare_finalize(
        moe=layer.moe_config,
        quant_config=quant_config,
        routing_tables=layer._expert_routing_tables(),
        allow_new_interface=True,
        use_monolithic=False,
    )
    return FusedMoEKernel(prepare_finalize, experts)


def experts_base_class() -> type:
    from vllm.model_executor.layers.fused_moe.modular_kernel import FusedMoEExpertsModular

    return FusedMoEExpertsModular


def standard_format() -> Any:
    from vllm.model_executor.layers.fused_moe.modular_kernel import FusedMoEActivationFormat

    return FusedMoEActivationFormat.Standard


def already_reduced() -> Any:
    """What tells finalize that rows are weighted and summed over a token's experts."""
    from vllm.model_executor.layers.fused_moe.topk_weight_and_reduce import TopKWeightAndReduceNoOP

    return TopKWeightAndReduceNoOP()


def empty_quant_config() -> Any:
    from vllm.model_executor.layers.fused_moe.config import FusedMoEQuantConfig

    return FusedMoEQuantConfig.make()


def activation_of(layer: Any) -> tuple[str, bool] | None:
    """(our name, interleaved rows) of a layer's activation, or None where it is not supported."""
    return _ACTIVATIONS.get(activation_name(layer))


def activation_name(layer: Any) -> str:
    activation = layer.activation
    return str(getattr(activation, "value", activation))


def supports_activation(activation: Any) -> bool:
    """Whether vLLM's ``activation`` (its enum) is one of ours."""
    return getattr(activation, "value", activation) in _ACTIVATIONS


def layer_by_name(layer_name: str) -> Any:
    """The RoutedExperts that runs under ``layer_name`` in the forward pass now going on."""
    from vllm.forward_context import get_forward_context

    return get_forward_context().no_compile_layers[layer_name].routed_experts


def is_cuda() -> bool:
    """Whether vLLM runs on CUDA devices here; asks vLLM, so it does not initialise CUDA."""
    from vllm.platforms import current_platform

    return bool(current_platform.is_cuda())


@functools.cache
def triton_experts() -> TritonExperts:
    return TritonExperts()


class TritonExperts:
    """The pieces of vLLM's Triton MoE that dense.py puts together, without the checks above them."""

    def __init__(self) -> None:
        from vllm import _custom_ops
        from vllm.model_executor.layers.fused_moe import fused_moe, get_config
        from vllm.model_executor.layers.fused_moe.activation import MoEActivation, apply_moe_activation
        from vllm.model_executor.layers.fused_moe.moe_align_block_size import moe_align_block_size

        self._gemm = fused_moe.invoke_fused_moe_triton_kernel
        self._config = fused_moe.try_get_optimal_moe_config
        self._overriding_config, self._tuned_configs = get_config, fused_moe.get_moe_configs
        self._types = fused_moe.tl  # Triton's language; a placeholder without types where there is no GPU
        self._align = moe_align_block_size
        self._activate = apply_moe_activation
        self._activations = {name: MoEActivation.from_str(name) for name in ("silu", "gelu", "gelu_tanh")}
        self._sum = _custom_ops.moe_sum

    def config(self, w13: torch.Size, w2: torch.Size, top_k: int, num_tokens: int) -> dict[str, int]:
        """Block sizes for w13 [E, 2I, H], w2 [E, H, I]: vLLM's tuned file for it, else its default."""
        return self._config(w13, w2, top_k, None, num_tokens)

    def has_default_config(self, w2: torch.Size) -> bool:
        """Whether ``config`` comes from vLLM's default: no tuned file for w2 [E, H, I], no override."""
        num_experts, _, inter = w2
        return self._overriding_config() is None and self._tuned_configs(num_experts, inter, None, 0, 0) is None

    def align(
        self, topk_ids: torch.Tensor, block: int, num_experts: int, expert_map: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Pairs sorted by expert, in blocks; ids that the map sends to -1 are left out."""
        return self._align(topk_ids, block, num_experts, expert_map, ignore_invalid_experts=True)

    def gemm(
        self,
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
        """c = a b^T per expert, times the routing weight if ``weighted``."""
        self._gemm(
            a,
            b,
            c,
            None,
            None,
            topk_weights,
            sorted_ids,
            expert_ids,
            padded,
            weighted,
            top_k,
            config,
            compute_type=getattr(self._types, str(a.dtype).removeprefix("torch.")),
            use_fp8_w8a8=False,
            use_int8_w8a8=False,
            use_int8_w8a16=False,
            use_int4_w4a16=False,
            per_channel_quant=False,
            B_bias=bias,
        )

    def activate(self, activation: str, out: torch.Tensor, gate_up: torch.Tensor) -> None:
        """gate_up [P, 2I], gate columns first -> out [P, I]."""
        if activation == "swigluoai":  # vLLM's function of that name takes alternating columns
            torch.ops._C.silu_and_mul_with_clamp(out, gate_up, SWIGLUOAI_LIMIT, SWIGLUOAI_ALPHA, 1.0)
            return
        self._activate(self._activations[activation], out, gate_up)

    def sum(self, pairs: torch.Tensor, out: torch.Tensor) -> None:
        """[T, k, H] -> [T, H]."""
        self._sum(pairs, out)
