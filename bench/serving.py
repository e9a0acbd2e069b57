"""What a layer runs inside vLLM: the plan chosen against vLLM's dense kernel, and that kernel where dense is chosen.

vLLM's dense path drops skipped pairs and computes every neuron of the others, so its result is that of the definition
with thresholds 0 and the same pair threshold.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import torch

import cutedsl_kernels
from cutedsl_kernels import MoEShape, Plan, plan_for
from cutedsl_kernels.environment import gpu_of
from cutedsl_kernels.launch import ASSUMED_PAIR_SKIP

from .problems import Batch, Cutoffs, LayerInputs
from .timing import Call


class NoServing(RuntimeError):
    """vLLM or the plugin cannot be imported; the message says why."""


def serving_plan(
    shape: MoEShape, num_tokens: int, sparsity: float, pair_skip: float, device: torch.device, activation: str = "silu"
) -> Plan:
    """The plan that a layer of the vLLM plugin runs (LayerState.choose_plans): that of the nearest bucket above, chosen
    without knowing the share of skipped pairs; dense beyond the last bucket. The CPU back end on a CPU."""
    if device.type != "cuda":
        return Plan("cpu")
    make_plugin_importable()
    from cutedsl_kernels.integration.vllm.state import BUCKETS

    bucket = next((size for size in sorted(BUCKETS) if size >= num_tokens), None)
    if sparsity == 0 or bucket is None:
        return Plan("dense")
    skipped = ASSUMED_PAIR_SKIP if pair_skip > 0 else 0.0
    return plan_for(shape, bucket, max(sparsity, skipped), gpu_of(device), skipped, activation)


def make_plugin_importable() -> None:
    """In a checkout that is not installed, integration/ lies beside the package instead of in it."""
    if find_spec("cutedsl_kernels.integration") is None:
        cutedsl_kernels.__path__.append(str(Path(__file__).resolve().parents[1]))


def vllm_dense_calls(batch: Batch, cutoffs: Cutoffs) -> list[Call]:
    """The plugin's dense path on every call of the batch. NoServing if it cannot be had here."""
    if batch.calls[0].hidden_states.device.type != "cuda":
        raise NoServing("vLLM's Triton kernels need a CUDA device")
    make_plugin_importable()
    try:
        from cutedsl_kernels.integration.vllm.dense import run_dense
        from cutedsl_kernels.integration.vllm.state import LayerState
    except Exception as error:  # a partly installed vLLM fails in many ways
        raise NoServing(f"cannot import the vLLM plugin ({type(error).__name__}: {error})") from None
    shape = batch.shape

    def bind(call: LayerInputs) -> Call:
        state = LayerState(
            name="bench",
            weights=call.weights,
            top_k=shape.top_k,
            activation=batch.activation,
            router_weight_on_input=batch.router_weight_on_input,
            tau=cutoffs.thresholds,
            rho=cutoffs.pair_threshold,
        )

        def run() -> torch.Tensor:
            inputs = (call.hidden_states, call.topk_weights, call.topk_ids)
            return run_dense(state, *inputs, None, shape.num_experts)

        return run

    return [bind(call) for call in batch.calls]
