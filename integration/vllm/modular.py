"""The experts of one layer for vLLM's modular kernel, which takes tokens to the ranks that hold their experts and back.

vLLM takes a MoE layer apart into prepare (dispatch over ranks), experts, and finalize (combine). Under data parallelism
the method builds such a kernel around its layer: prepare and finalize are vLLM's, for whichever all-to-all back end is
set; the experts are these. They take tokens in the Standard format, [M, K] rows with global expert ids, and return rows
that are weighted and summed over this rank's experts.

Where a layer puts the routing weight on its input (Llama-4, top-1), prepare has multiplied x by it already, so here it
is neither put on x nor on the output, and counts in the rule only:

* thresholds on |act(gate)|: exact, as the routing weights go in as 1, or 0 for pairs below the pair threshold;
* router-weighted thresholds: the kernels see r, which puts it on the output too, and the row is divided by it
  afterwards. Each row has one expert, so this is the definition but for one more rounding to x's dtype.
"""

from __future__ import annotations

from typing import Any

import torch

from . import compat
from .method import STATE, compute, watch
from .state import LayerState


class IntraExpertSparseExperts(compat.experts_base_class()):  # type: ignore[misc]
    """Needs no workspace: the kernels have their own. ``layer``: a RoutedExperts whose LayerState is set."""

    def __init__(self, layer: Any, quant_config: Any) -> None:
        super().__init__(moe_config=layer.moe_config, quant_config=quant_config)
        state: LayerState = getattr(layer, STATE)
        self.name = state.name
        expert_map = layer.expert_map
        remote = [] if expert_map is None else torch.nonzero(expert_map < 0).flatten().tolist()
        self.remote: int | None = remote[0] if remote else None  # the id of some expert that is not here

    @staticmethod
    def activation_format() -> Any:
        return compat.standard_format()

    # What vLLM asks before it chooses a kernel of its own; config.py and why_unsupported have answered for this one.

    @staticmethod
    def _supports_current_device() -> bool:
        return True

    @staticmethod
    def _supports_no_act_and_mul() -> bool:
        return False

    @staticmethod
    def _supports_quant_scheme(weight_key: Any, activation_key: Any) -> bool:
        return weight_key is None and activation_key is None

    @staticmethod
    def _supports_activation(activation: Any) -> bool:
        return compat.supports_activation(activation)

    @staticmethod
    def _supports_parallel_config(moe_parallel_config: Any) -> bool:
        return compat.why_not_dispatched(moe_parallel_config) is None

    def workspace_shapes(self, M: int, N: int, K: int, *args: Any, **kwargs: Any) -> tuple[tuple[int, ...], ...]:
        """Sizes of the two workspaces, none, and of the output [M, K]."""
        return (0,), (0,), (M, K)

    def finalize_weight_and_reduce_impl(self) -> Any:
        return compat.already_reduced()

    def apply(
        self,
        output: torch.Tensor,
        hidden_states: torch.Tensor,
        w1: torch.Tensor,
        w2: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        activation: Any,
        global_num_experts: int,
        expert_map: torch.Tensor | None,
        *args: Any,
        apply_router_weight_on_input: bool = False,
        **kwargs: Any,
    ) -> None:
        """hidden_states [M, K], topk_weights fp32 and topk_ids int [M, k], global ids, below 0 for no expert: the
        weighted sum over this rank's experts goes to ``output`` [M, K]. Weights and activation are the layer's own.
        """
        if self.remote is not None:  # vLLM's Triton kernel takes no id below 0
            topk_ids = torch.where(topk_ids < 0, self.remote, topk_ids)
        torch.ops.cutedsl_kernels.dispatched_experts(
            output, hidden_states, topk_weights, topk_ids, expert_map, apply_router_weight_on_input, self.name
        )


@torch.library.custom_op("cutedsl_kernels::dispatched_experts", mutates_args=("output",))
def _dispatched_experts(
    output: torch.Tensor,
    x: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    expert_map: torch.Tensor | None,
    weighted_input: bool,
    layer_name: str,
) -> None:
    layer = compat.layer_by_name(layer_name)
    state: LayerState = getattr(layer, STATE)
    watch(layer, x, topk_weights, topk_ids, expert_map)
    if not weighted_input:
        compute(layer, x, topk_weights, topk_ids, expert_map, output)
    elif state.router_weighted or state.rho > 1:
        compute(layer, x, topk_weights, topk_ids, expert_map, output)
        output.div_(topk_weights.clamp_min(torch.finfo(torch.float32).tiny))
    else:
        kept = (~(topk_weights < state.rho)).to(topk_weights.dtype)
        compute(layer, x, kept, topk_ids, expert_map, output)


@_dispatched_experts.register_fake
def _(
    output: torch.Tensor,
    x: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    expert_map: torch.Tensor | None,
    weighted_input: bool,
    layer_name: str,
) -> None:
    return None
