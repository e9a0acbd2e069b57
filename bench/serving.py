"""What a layer runs inside vLLM: the plan chosen against vLLM's dense kernel, and that kernel where dense is chosen.

vLLM's dense path drops skipped pairs and computes every neuron of the others, so its result is that of the definition
with thresholds 0 and the same pair threshold.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import torch

import cutedsl_kernels
from cutedsl_kernels import ExpertWeights, MoEShape, Plan, plan_for
from cutedsl_kernels.environment import gpu_of

from .problems import Batch, Cutoffs, LayerInputs
from .timing import Call

if TYPE_CHECKING:
    from cutedsl_kernels.integration.vllm.state import LayerState


class NoServing(RuntimeError):
    """vLLM or the plugin cannot be imported; the message says why."""


def serving_plan(
    shape: MoEShape, num_tokens: int, sparsity: float, pair_skip: float, device: torch.device, activation: str = "silu"
) -> Plan:
    """The plan that a layer of the vLLM plugin runs (LayerState.choose_plans): that of the nearest bucket above; dense
    beyond the last bucket. The CPU back end on a CPU."""
    if device.type != "cuda":
        return Plan("cpu")
    make_plugin_importable()
    from cutedsl_kernels.integration.vllm.state import BUCKETS

    bucket = next((size for size in sorted(BUCKETS) if size >= num_tokens), None)
    if sparsity == 0 or bucket is None:
        return Plan("dense")
    return plan_for(shape, bucket, max(sparsity, pair_skip), gpu_of(device), pair_skip, activation)


def make_plugin_importable() -> None:
    """In a checkout that is not installed, integration/ lies beside the package instead of in it."""
    if find_spec("cutedsl_kernels.integration") is None:
        cutedsl_kernels.__path__.append(str(Path(__file__).resolve().parents[1]))


def dense_state(batch: Batch, cutoffs: Cutoffs, weights: ExpertWeights) -> LayerState:
    """A layer of the plugin that holds ``weights``, as it is once loaded."""
    from cutedsl_kernels.integration.vllm.state import LayerState

    state = LayerState(
        name="bench",
        weights=weights,
        top_k=batch.shape.top_k,
        activation=batch.activation,
        router_weight_on_input=batch.router_weight_on_input,
        tau=cutoffs.thresholds,
        rho=cutoffs.pair_threshold,
        pair_skip=cutoffs.rule.pair_skip,
    )
    state.load_pair_kernels(None)
    return state


def vllm_dense_calls(batch: Batch, cutoffs: Cutoffs, pair_kernels: bool = True) -> list[Call]:
    """The plugin's dense path on every call of the batch; pair_kernels False: without its own kernels. NoServing if it
    cannot be had here."""
    if batch.calls[0].hidden_states.device.type != "cuda":
        raise NoServing("vLLM's Triton kernels need a CUDA device")
    make_plugin_importable()
    try:
        from cutedsl_kernels.integration.vllm.dense import run_dense
    except Exception as error:  # a partly installed vLLM fails in many ways
        raise NoServing(f"cannot import the vLLM plugin ({type(error).__name__}: {error})") from None

    def bind(call: LayerInputs) -> Call:
        state = dense_state(batch, cutoffs, call.weights)
        if not pair_kernels:
            state.pair_kernels = None

        def run() -> torch.Tensor:
            inputs = (call.hidden_states, call.topk_weights, call.topk_ids)
            return run_dense(state, *inputs, None, batch.shape.num_experts)

        return run

    return [bind(call) for call in batch.calls]
