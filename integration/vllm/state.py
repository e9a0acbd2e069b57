"""What one routed-expert layer holds at run time: weights, thresholds, and what is being recorded. No vLLM in
here.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ...calibration import LayerHistogram, count_active, expert_activations
from ...compile import precompile
from ...compile.specs import pair_specs
from ...environment import gpu_of
from ...launch import ASSUMED_PAIR_SKIP, kernels_of, warmup, why_no_kernels
from ...pair_kernels import PairKernels, why_no_pair_kernels
from ...plan import Plan, plan_for
from ...quality.scores import UpMoments, observe_up
from ...reference import expand_thresholds
from ...shapes import MoEShape
from ...weights import ExpertWeights

_reported: set[tuple[object, ...]] = set()  # shapes and batch sizes whose kernels were reported missing
logger = logging.getLogger("vllm.cutedsl_kernels")

# Numbers of tokens for which a plan is fixed when the layer is loaded; larger batches run dense.
BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096)


def supports_kernels(weights: ExpertWeights) -> bool:
    """Whether the GPU kernels can run these weights at all: bf16, biases included, and an sm_90 GPU."""
    return weights.dtype == torch.bfloat16 and why_no_kernels(weights) is None


@dataclass
class LayerState:
    """One layer on one rank.

    tau: fp32 on the weights' device, [1, 1] or [E, I]; rho: pair threshold; tau and rho zero is the dense model.
    sparsity, pair_skip: shares that tau and rho are expected to give; they guide the choice of plans.
    exact: apply the thresholds at every batch size, where a GPU would otherwise compute large batches in full; plans
    are then chosen as batches come.
    plans: (largest number of tokens, plan), ascending; CUDA only. pair_kernels: of the dense path, None where it
    runs vLLM's functions.
    counters: int64 [4] per label (see count_active), filled while ``counting``. tp_size, tp_rank: how this layer's
    neurons are sharded (1 and 0 under expert parallelism). neuron_weights: c [E, I] of the score, None where it is 1:
    recorders see |act(gate)| * c, and a tau given as a number is divided by it. moments: of the up projection, while
    they are being recorded. least_best_weight: least routing weight that a recorded token gave its best expert.
    """

    name: str
    weights: ExpertWeights
    top_k: int
    activation: str
    router_weight_on_input: bool
    tau: torch.Tensor
    rho: float = 0.0
    router_weighted: bool = True
    label: str = "0"
    sparsity: float = 0.0
    pair_skip: float | None = None
    exact: bool = False
    tp_size: int = 1
    tp_rank: int = 0
    counting: bool = False
    recorder: LayerHistogram | None = None
    neuron_weights: torch.Tensor | None = None
    moments: UpMoments | None = None
    least_best_weight: float = math.inf
    counters: dict[str, torch.Tensor] = field(default_factory=dict)
    plans: list[tuple[int, Plan]] = field(default_factory=list)
    nobody_map: torch.Tensor | None = None
    pair_kernels: PairKernels | None = None

    def set(
        self,
        tau: float | torch.Tensor,
        rho: float,
        router_weighted: bool,
        label: str,
        sparsity: float,
        pair_skip: float | None = None,
    ) -> None:
        """New thresholds. ``tau`` a number, or broadcastable to this rank's [E, I]; ``sparsity``: what they aim at
        (0..1); pair_skip: share of the pairs that rho skips, None if not known.
        """
        device = self.weights.device
        if isinstance(tau, torch.Tensor) and tau.numel() > 1:
            new = expand_thresholds(
                tau.to(device), self.weights.num_experts, self.weights.intermediate_size, device
            ).contiguous()
        elif self.neuron_weights is not None and float(tau) > 0:
            new = float(tau) / self.neuron_weights
        elif device.type == "cuda":  # the kernels read [E, I]
            shape = (self.weights.num_experts, self.weights.intermediate_size)
            new = torch.full(shape, float(tau), dtype=torch.float32, device=device)
        else:
            new = torch.full((1, 1), float(tau), dtype=torch.float32, device=device)
        if new.shape == self.tau.shape:
            self.tau.copy_(new)
        else:
            self.tau = new
        self.rho, self.router_weighted, self.label, self.sparsity = float(rho), router_weighted, label, sparsity
        self.pair_skip = pair_skip
        self.plans, self.pair_kernels = [], None

    @property
    def expected_pair_skip(self) -> float:
        """Share of the pairs that rho is expected to skip."""
        if self.rho <= 0:
            return 0.0
        return ASSUMED_PAIR_SKIP if self.pair_skip is None else self.pair_skip

    def choose_plans(self, expert_map: torch.Tensor | None, buckets: Sequence[int] = BUCKETS) -> None:
        """Fixes the plan of each bucket of token counts, and compiles and loads its kernel. CUDA only; not while
        capturing.

        A batch runs the plan of the nearest bucket above, so that nothing is chosen or compiled while serving; larger
        batches than the last bucket run dense.
        """
        plans = self._fastest(buckets)
        self._precompile(plans.values(), expert_map)
        self.plans = self._loaded(plans, expert_map)
        self.load_pair_kernels(expert_map)

    def choose_plan(self, expert_map: torch.Tensor | None, num_tokens: int) -> None:
        """The same for the one bucket of ``num_tokens``, unless it has a plan: where thresholds change often, as in
        calibration, most buckets are never asked for."""
        bucket = next((size for size in BUCKETS if size >= num_tokens), None)
        if bucket is not None and all(size != bucket for size, _ in self.plans):
            added = self._loaded(self._fastest([bucket]), expert_map)
            self.plans = sorted([*self.plans, *added], key=lambda pair: pair[0])

    def _fastest(self, buckets: Sequence[int]) -> dict[int, Plan]:
        """The plan of each bucket, as plan_for has it; ascending."""
        plans = dict.fromkeys(sorted(buckets), Plan("dense"))
        if self.sparsity > 0 and supports_kernels(self.weights):
            shape, skipped, gpu = self.weights.shape(self.top_k), self.expected_pair_skip, gpu_of(self.weights.device)
            aim = max(self.sparsity, skipped)
            plans = {bucket: plan_for(shape, bucket, aim, gpu, skipped, self.activation) for bucket in plans}
        return plans

    def _launch_flags(self, expert_map: torch.Tensor | None) -> dict[str, Any]:
        """Keywords of kernels_of and warmup."""
        return {
            "router_weighted": self.router_weighted,
            "activation": self.activation,
            "expert_map": expert_map,
            "apply_router_weight_on_input": self.router_weight_on_input,
        }

    def _loaded(self, plans: dict[int, Plan], expert_map: torch.Tensor | None) -> list[tuple[int, Plan]]:
        """``plans`` with kernels compiled and loaded, dense where one cannot be."""
        shape, flags = self.weights.shape(self.top_k), self._launch_flags(expert_map)
        plans = dict(plans)
        failed: dict[int, str] = {}
        for bucket, plan in plans.items():
            if plan.kind != "dense":
                try:
                    warmup(self.weights, self.top_k, [bucket], plans=[plan], **flags)
                except Exception as error:  # this CuTe DSL or GPU cannot take the kernel: serve all the same
                    failed[bucket] = " ".join(str(error).split())[:300]
                    plans[bucket] = Plan("dense")
        if failed and (shape.key, *failed) not in _reported:  # once, not for every layer of a model
            _reported.add((shape.key, *failed))
            sizes, reason = ", ".join(map(str, failed)), next(iter(failed.values()))
            logger.warning("%s and layers of its shape: batches of %s tokens run dense: %s", self.name, sizes, reason)
        return list(plans.items())

    def _precompile(self, plans: Iterable[Plan], expert_map: torch.Tensor | None) -> None:
        """All kernels that are missing, side by side; what fails will be met again one by one."""
        try:
            kernels = kernels_of(plans, self.weights, self.top_k, **self._launch_flags(expert_map))
            if kernels and self._runs_pair_kernels(expert_map):
                kernels += pair_specs(*self._pair_layer)
            begun = time.perf_counter()
            compiled = precompile(kernels)
        except Exception as error:
            logger.debug("%s: compiling ahead failed: %s", self.name, error)
            return
        if compiled:
            logger.info(
                "%d kernels for layers like %s compiled in %.0f s", compiled, self.name, time.perf_counter() - begun
            )

    def load_pair_kernels(self, expert_map: torch.Tensor | None) -> None:
        """Compiles or loads what the dense path runs beside vLLM's products, where it pays and can run here."""
        self.pair_kernels = None
        if self._runs_pair_kernels(expert_map):
            try:
                self.pair_kernels = PairKernels(*self._pair_layer)
            except Exception as error:  # no CuTe DSL, or one that refuses: vLLM's functions do it
                logger.debug("%s: no pair kernels: %s", self.name, error)

    def _runs_pair_kernels(self, expert_map: torch.Tensor | None) -> bool:
        """Only where some pairs may be left out: where all are computed, vLLM's functions are 0.4 us faster at one
        token, and 1 % of a layer at 1024."""
        some_left_out = self.rho > 0 or expert_map is not None
        return some_left_out and why_no_pair_kernels(self.weights, self.activation) is None

    @property
    def _pair_layer(self) -> tuple[MoEShape, str]:
        """Arguments of PairKernels and pair_specs."""
        return self.weights.shape(self.top_k), self.activation

    def plan(self, num_tokens: int) -> Plan:
        """The plan for a batch of ``num_tokens`` tokens."""
        for bucket, plan in self.plans:
            if num_tokens <= bucket:
                return plan
        return Plan("dense")

    def map_with_nobody(self, expert_map: torch.Tensor | None, global_num_experts: int) -> torch.Tensor:
        """expert_map (None: every expert is here) with one entry more, -1: int32 [global_num_experts + 1]. Made once,
        since captured graphs hold its address.
        """
        if self.nobody_map is None:
            device = self.weights.device
            known = torch.arange(global_num_experts, dtype=torch.int32, device=device)
            known = known if expert_map is None else expert_map.to(torch.int32)
            self.nobody_map = torch.cat([known, torch.full((1,), -1, dtype=torch.int32, device=device)])
        return self.nobody_map

    def plan_summary(self) -> str:
        """Such as "1-32 tokens fused, 33 and more dense"; the CPU has one plan."""
        if not self.plans:
            return "every batch on the CPU back end"
        ends: list[tuple[int, str]] = []
        for bucket, plan in self.plans:
            if ends and ends[-1][1] == plan.kind:
                ends.pop()
            ends.append((bucket, plan.kind))
        if ends[-1][1] == "dense":
            ends.pop()
        first, parts = 1, []
        for last, kind in ends:
            parts.append(f"{first}-{last} tokens {kind}")
            first = last + 1
        return ", ".join([*parts, f"{first} and more dense"])

    def observe(
        self,
        hidden_states: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        expert_map: torch.Tensor | None,
    ) -> None:
        """Feeds moments, recorder and counters; does nothing when none is on. Synchronises the device."""
        if self.moments is not None:
            observe_up(
                self.moments,
                hidden_states,
                self.weights,
                topk_weights,
                topk_ids,
                activation=self.activation,
                expert_map=expert_map,
                apply_router_weight_on_input=self.router_weight_on_input,
            )
        if self.recorder is None and not self.counting:
            return
        if self.recorder is not None and topk_weights.numel():
            self.least_best_weight = min(self.least_best_weight, float(topk_weights.amax(dim=1).min()))
        counts = self.counters.setdefault(self.label, torch.zeros(4, dtype=torch.int64, device=self.weights.device))
        for expert, magnitude, routing in expert_activations(
            hidden_states,
            self.weights,
            topk_weights,
            topk_ids,
            activation=self.activation,
            expert_map=expert_map,
            apply_router_weight_on_input=self.router_weight_on_input,
        ):
            if self.recorder is not None:
                c = self.neuron_weights
                whole = expert if expert_map is None else int(torch.nonzero(expert_map == expert)[0])
                self.recorder.observe(magnitude if c is None else magnitude * c[expert], routing, whole)
            if self.counting:
                tau = self.tau if self.tau.shape[0] == 1 else self.tau[expert]
                counts += count_active(
                    magnitude, routing, tau, router_weighted=self.router_weighted, pair_threshold=self.rho
                )
