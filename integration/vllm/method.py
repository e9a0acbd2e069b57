"""IntraExpertSparseMethod: vLLM's hooks for one routed-expert layer, around one opaque custom op."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from ...errors import UserError
from ...moe import sparse_moe
from ...plan import Plan
from ...weights import SUPPORTED_DTYPES, ExpertWeights
from . import compat
from .dense import dense_runs, run_dense
from .neurons import apply_parts
from .state import LayerState

if TYPE_CHECKING:
    from .config import IntraExpertSparseConfig

STATE = "_intra_expert_sparsity"  # attribute of a RoutedExperts module that holds its LayerState


def why_unsupported(layer: Any) -> str | None:
    """The reason why a routed-expert layer cannot use this method, or None."""
    moe = layer.moe_config
    if compat.activation_of(layer) is None:
        return f"activation {compat.activation_name(layer)} is not supported"
    if moe.is_lora_enabled:
        return "LoRA adapters may apply to the experts"
    if getattr(layer, "swiglu_limit", None) is not None and compat.activation_name(layer) == "silu":
        return "SwiGLU with a clamp is not supported"
    if moe.in_dtype not in ((torch.bfloat16,) if compat.is_cuda() else SUPPORTED_DTYPES):
        return f"activations of type {str(moe.in_dtype).removeprefix('torch.')} are not supported"
    if compat.is_batch_invariant():
        return "plans depend on the batch size and sums on the order of arrival, VLLM_BATCH_INVARIANT forbids both"
    return compat.why_weights_move() or compat.why_not_dispatched(moe.moe_parallel_config)


class IntraExpertSparseMethod(compat.method_base_class()):  # type: ignore[misc]
    """One per layer. Weights are vLLM's own; w2 is re-laid in place once they are loaded."""

    def __init__(self, moe: Any, config: IntraExpertSparseConfig, prefix: str) -> None:
        super().__init__(moe)
        self.config = config
        self.prefix = prefix

    @property
    def supports_eplb(self) -> bool:
        return False  # vLLM moves experts between ranks as [E, H, I] blocks; ours are re-laid

    def create_weights(self, layer: Any, *args: Any, **kwargs: Any) -> None:
        compat.stock_method_class().create_weights(self, layer, *args, **kwargs)

    def get_fused_moe_quant_config(self, layer: Any) -> Any:
        return compat.empty_quant_config()

    def maybe_make_prepare_finalize(self, routing_tables: Any = None) -> None:
        """vLLM 0.26 asks layers that have no modular kernel of their own; ours have made it where they need one."""
        return None

    def process_weights_after_loading(self, layer: Any) -> None:
        """Re-lays w2 and makes the layer's state. After a reload of weights the state stays, and with it the addresses
        that kernels and captured graphs hold: the new weights are copied there."""
        state: LayerState | None = getattr(layer, STATE, None)
        if state is not None and layer.w2_weight.data_ptr() == state.weights.w2_rows.data_ptr():
            return  # nothing was loaded since
        found = compat.activation_of(layer)
        assert found is not None, "checked by why_unsupported"
        activation, interleaved = found
        weights = ExpertWeights.from_w13_w2(
            layer.w13_weight.data,
            layer.w2_weight.data,
            w13_bias=_data(layer, "w13_bias"),
            w2_bias=_data(layer, "w2_bias"),
            interleaved=interleaved,
        )
        if state is not None:
            state.weights.copy_(weights)
            layer.w2_weight = torch.nn.Parameter(state.weights.w2_rows, requires_grad=False)
            return
        layer.w2_weight = torch.nn.Parameter(weights.w2_rows, requires_grad=False)
        parallel = self.moe.moe_parallel_config
        dispatched = compat.is_dispatched(parallel)
        state = LayerState(
            name=self.prefix,
            weights=weights,
            top_k=self.moe.experts_per_token,
            activation=activation,
            router_weight_on_input=bool(layer.apply_router_weight_on_input) and not dispatched,  # see modular.py
            tau=torch.zeros(1, 1, dtype=torch.float32, device=weights.device),
            tp_size=parallel.tp_size,
            tp_rank=parallel.tp_rank,
        )
        if self.prefix in self.config.neurons and self.config.profile is not None:
            try:
                apply_parts(layer, state, self.config.profile.score, self.config.neurons[self.prefix])
            except UserError as error:
                from .config import MethodError

                raise MethodError(str(error)) from None
        if self.config.profile is not None:
            tau, rho = self.config.profile.thresholds(self.prefix, self.config.target)
            skip, target = self.config.profile.pair_skip(self.prefix, self.config.target), self.config.target
            state.set(tau, rho, self.config.profile.router_weighted, f"{target:g}", target, skip)
        if weights.device.type == "cuda":
            state.choose_plans(layer.expert_map)
        setattr(layer, STATE, state)
        if dispatched:
            from .modular import IntraExpertSparseExperts

            self.moe_quant_config = self.get_fused_moe_quant_config(layer)
            experts = IntraExpertSparseExperts(layer, self.moe_quant_config)
            self.moe_kernel = compat.modular_kernel(layer, self.moe_quant_config, experts)
        self.config.loaded(self.prefix, state)

    def apply(
        self,
        layer: Any,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        shared_experts: Any = None,
        shared_experts_input: Any = None,
    ) -> torch.Tensor:
        """x [T, H]; topk_weights fp32 and topk_ids int [T, k], global ids. The weighted sum over this rank's experts
        [T, H]; under data parallelism, over all ranks' experts.
        """
        if self.moe_kernel is not None:
            return self.moe_kernel.apply(
                hidden_states=x,
                w1=layer.w13_weight,
                w2=layer.w2_weight,
                topk_weights=topk_weights,
                topk_ids=topk_ids,
                activation=layer.activation,
                global_num_experts=layer.global_num_experts,
                expert_map=layer.expert_map,
                apply_router_weight_on_input=layer.apply_router_weight_on_input,
                shared_experts=shared_experts,
                shared_experts_input=shared_experts_input,
            )
        return torch.ops.cutedsl_kernels.routed_experts(x, topk_weights, topk_ids, self.prefix)


def _data(layer: Any, name: str) -> torch.Tensor | None:
    parameter = getattr(layer, name, None)
    return None if parameter is None else parameter.data


def run_layer(layer: Any, x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor) -> torch.Tensor:
    """What the custom op does once it knows its layer."""
    watch(layer, x, topk_weights, topk_ids, layer.expert_map)
    return compute(layer, x, topk_weights, topk_ids, layer.expert_map)


def watch(
    layer: Any, x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor, expert_map: torch.Tensor | None
) -> None:
    """Feeds a batch to whatever records or counts."""
    state: LayerState = getattr(layer, STATE)
    state.observe(x, topk_weights, topk_ids, expert_map)
    stats = layer.quant_method.config.stats
    if stats is not None:
        stats.sample(state, x, topk_weights, topk_ids, expert_map)


def compute(
    layer: Any,
    x: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    expert_map: torch.Tensor | None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """The weighted sum over this rank's experts [T, H], by the plan for T tokens; written to ``out`` if given."""
    state: LayerState = getattr(layer, STATE)
    plan = None
    if x.device.type == "cuda" and x.shape[0] > 0:
        # Kernels are compiled for the layer's k; DeepEP may hand over one row for each pair instead.
        if state.exact:
            state.choose_plan(expert_map, x.shape[0])
        plan = state.plan(x.shape[0]) if topk_ids.shape[1] == state.top_k else Plan("dense")
        if plan.kind == "dense" and not (state.exact and state.sparsity > 0) and dense_runs(state):
            found = run_dense(state, x, topk_weights, topk_ids, expert_map, layer.global_num_experts)
            return found if out is None else out.copy_(found)
    return sparse_moe(
        x,
        state.weights,
        topk_weights,
        topk_ids,
        state.tau,
        router_weighted=state.router_weighted,
        pair_threshold=state.rho,
        activation=state.activation,
        expert_map=expert_map,
        apply_router_weight_on_input=state.router_weight_on_input,
        plan=plan,
        out=out,
    )


@torch.library.custom_op("cutedsl_kernels::routed_experts", mutates_args=())
def _routed_experts(
    x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor, layer_name: str
) -> torch.Tensor:
    return run_layer(compat.layer_by_name(layer_name), x, topk_weights, topk_ids)


@_routed_experts.register_fake
def _(x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor, layer_name: str) -> torch.Tensor:
    return torch.empty_like(x)
