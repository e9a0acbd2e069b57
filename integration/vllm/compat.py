"""Everything that differs between vLLM versions, or that reaches into vLLM by a name it may change. Nothing else in
this package imports from vllm.model_executor.layers.fused_moe.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib import metadata
from typing import Any

import torch

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


def routed_experts_of(model: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """The RoutedExperts modules of a model in module order."""
    kind = routed_experts_class()
    for module in model.modules():
        if isinstance(module, kind):
            yield module


def stock_method_class() -> type:
    from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod

    return UnquantizedFusedMoEMethod


def method_base_class() -> type:
    from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase

    return FusedMoEMethodBase


def empty_quant_config() -> Any:
    from vllm.model_executor.layers.fused_moe.config import FusedMoEQuantConfig

    return FusedMoEQuantConfig.make()


def activation_of(layer: torch.nn.Module) -> tuple[str, bool] | None:
    """(our name, interleaved rows) of a layer's activation, or None where it is not supported."""
    return _ACTIVATIONS.get(activation_name(layer))


def activation_name(layer: torch.nn.Module) -> str:
    activation = layer.activation
    return str(getattr(activation, "value", activation))


def layer_by_name(layer_name: str) -> torch.nn.Module:
    """The RoutedExperts that runs under ``layer_name`` in the forward pass now going on."""
    from vllm.forward_context import get_forward_context

    return get_forward_context().no_compile_layers[layer_name].routed_experts
