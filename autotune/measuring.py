"""Timing on a device with the benchmarks' own routine: same inputs, same check, same CUDA graph, L2 cold."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from cutedsl_kernels.configs import Plan
from cutedsl_kernels.cost_model import Gpu
from cutedsl_kernels.environment import gpu_of

from .space import Bin
from .timers import DeviceSetup, PlanFailure, Sample

if TYPE_CHECKING:
    from cutedsl_kernels.bench import check, problems, serving, timing
    from cutedsl_kernels.bench import layer as bench_layer
else:
    try:
        from cutedsl_kernels.bench import check, problems, serving, timing
        from cutedsl_kernels.bench import layer as bench_layer
    except ModuleNotFoundError:  # a checkout that is not installed: bench/ lies beside autotune/
        from bench import check, problems, serving, timing
        from bench import layer as bench_layer

QUICK_REPLAYS, PRECISE_REPLAYS = 4, 12
MEMORY_SHARE = 0.45


class DeviceLost(RuntimeError):
    """A CUDA error after which this process cannot go on."""


class Measuring:
    """Inputs of the current bin, and the references they are checked against."""

    def __init__(self, setup: DeviceSetup) -> None:
        self._setup, self._device = setup, torch.device(setup.device)
        self.gpu = gpu_of(self._device) if self._device.type == "cuda" else Gpu(name="cpu")
        dense = "the library's grouped product"
        if setup.dense == "vllm":
            dense = "the plugin's, vLLM's Triton kernel under its own config"
        graph = "CUDA graph" if self._device.type == "cuda" else "host clock"
        self.timing = (
            f"{graph}, L2 cold, {setup.routing} routing, independent masks, median of {PRECISE_REPLAYS} replays; "
            f"dense: {dense}"
        )
        self._layers: list = []
        self._batches: dict[int, problems.Batch] = {}
        self._entered: dict[Bin, tuple] = {}

    def time(self, where: Bin, plan: Plan, precise: bool) -> Sample:
        try:
            self._enter(where)
            prepared = timing.prepare(self._calls(plan), self._device)
            check.check(prepared, self._expected_dense if self._is_vllm(plan) else self._expected)
            found = prepared.measure(PRECISE_REPLAYS if precise else QUICK_REPLAYS, 1.0 if precise else 0.3)
        except check.WrongResult as wrong:
            raise PlanFailure("wrong", str(wrong)) from None
        except Exception as error:  # what a plan raises is its result
            text = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            if self._device.type == "cuda":
                try:
                    torch.cuda.synchronize()
                except RuntimeError:
                    raise DeviceLost(text) from error
            raise PlanFailure("failed", text) from None
        return Sample(found.median_us, found.iqr_us / found.median_us)

    def _is_vllm(self, plan: Plan) -> bool:
        return plan.kind == "dense" and self._setup.dense == "vllm"

    def _calls(self, plan: Plan) -> list[timing.Call]:
        if self._is_vllm(plan):
            return serving.vllm_dense_calls(self._batch, self._cutoffs)
        on_cpu = self._device.type == "cpu"
        return bench_layer.sparse_calls(self._batch, self._cutoffs, Plan("cpu") if on_cpu else plan)

    def _enter(self, where: Bin) -> None:
        """Inputs and references of a bin; built once, since the search comes back to every bin."""
        if where not in self._entered:
            batch = self._batch_of(where.num_tokens)
            rule = problems.Rule(where.sparsity, where.pair_skip, self._setup.layer.router_weighted)
            cutoffs = batch.cutoffs(rule)
            expected = check.expectations(batch, cutoffs)
            vllm = self._setup.dense == "vllm"
            expected_dense = check.expectations(batch, cutoffs.without_neurons()) if vllm else expected
            self._entered[where] = batch, cutoffs, expected, expected_dense
        self._batch, self._cutoffs, self._expected, self._expected_dense = self._entered[where]

    def _batch_of(self, num_tokens: int) -> problems.Batch:
        if num_tokens in self._batches:
            return self._batches[num_tokens]
        layer, cpu = self._setup.layer, self._device.type == "cpu"
        memory = 0.0 if cpu else torch.cuda.get_device_properties(self._device).total_memory * MEMORY_SHARE
        copies = problems.copies_needed(layer.shape, num_tokens, 0.9, torch.bfloat16, memory)
        missing = copies - len(self._layers)
        if missing > 0:
            seed = self._setup.seed + 1000 * len(self._layers)
            made = problems.make_weights(layer.shape, missing, self._device, torch.bfloat16, seed, layer.has_bias)
            self._layers += made
        self._batches[num_tokens] = problems.make_batch(
            self._layers[:copies],
            layer.shape.top_k,
            num_tokens,
            calls=self._setup.calls or problems.calls_for(layer.shape, num_tokens, self._device),
            seed=self._setup.seed + num_tokens,
            routing=self._setup.routing,
            activation=layer.activation,
            router_weight_on_input=layer.weight_on_input,
            counted_calls=2,
        )
        return self._batches[num_tokens]
