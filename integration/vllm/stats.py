"""Realised sparsity while serving (option sparsity_stats): a few tokens of a batch are counted now and then.

Counters for Prometheus, by layer: intra_expert_sparsity_{pairs,skipped_pairs,neurons,active_neurons}_total. The
server's /metrics shows them if PROMETHEUS_MULTIPROC_DIR is set (vLLM's engine is a process of its own). A line in the
log every LOG_SECONDS.

Counting synchronises the device and repeats a gate projection, so its share of the time is held below BUDGET: after a
sample that took c seconds the next one waits c / BUDGET. Batches replayed from a CUDA graph run no Python and are not
seen: on a GPU the samples come from prefill.
"""

from __future__ import annotations

import logging
import time
from typing import Any

import torch

from ...calibration import LayerCounters, count_active, expert_activations
from .state import LayerState

BUDGET = 0.005
SAMPLED_TOKENS = 32
LOG_SECONDS = 60.0
COUNTS = ("pairs", "skipped_pairs", "neurons", "active_neurons")

logger = logging.getLogger("vllm.cutedsl_kernels")


class SparsityStats:
    """One per model and process. Layers take turns."""

    def __init__(self) -> None:
        self.layers: list[str] = []
        self.turn = 0
        self.next_sample = 0.0
        self.next_log = time.monotonic() + LOG_SECONDS
        self.totals: dict[str, LayerCounters] = {}
        self.exported = _prometheus_counters()

    def add_layer(self, name: str) -> None:
        self.layers.append(name)
        self.totals[name] = LayerCounters()

    def sample(
        self,
        state: LayerState,
        hidden_states: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        expert_map: torch.Tensor | None,
    ) -> None:
        """Counts some tokens of this batch if it is this layer's turn and time has come."""
        begun = time.monotonic()
        if begun < self.next_sample or self.layers[self.turn] != state.name:
            return
        if hidden_states.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return
        step = max(1, hidden_states.shape[0] // SAMPLED_TOKENS)
        counts = torch.zeros(4, dtype=torch.int64, device=hidden_states.device)
        for expert, magnitude, routing in expert_activations(
            hidden_states[::step],
            state.weights,
            topk_weights[::step],
            topk_ids[::step],
            activation=state.activation,
            expert_map=expert_map,
            apply_router_weight_on_input=state.router_weight_on_input,
        ):
            tau = state.tau if state.tau.shape[0] == 1 else state.tau[expert]
            counts += count_active(
                magnitude, routing, tau, router_weighted=state.router_weighted, pair_threshold=state.rho
            )
        found = dict(zip(COUNTS, counts.tolist(), strict=True))
        self.totals[state.name].add(found)
        for name, counter in self.exported.items():
            counter.labels(layer=state.name).inc(found[name])
        self.turn = (self.turn + 1) % len(self.layers)
        now = time.monotonic()
        self.next_sample = now + (now - begun) / BUDGET
        if now >= self.next_log:
            self.next_log = now + LOG_SECONDS
            self.log()

    def log(self) -> None:
        seen = [counters for counters in self.totals.values() if counters.neurons]
        if seen:
            logger.info(
                "intra_expert_sparse: realised sparsity %.3f, skipped pairs %.3f (mean of %d layers, %d sampled pairs)",
                sum(counters.sparsity for counters in seen) / len(seen),
                sum(counters.skipped_share for counters in seen) / len(seen),
                len(seen),
                sum(counters.pairs for counters in seen),
            )


_counters: dict[str, Any] = {}


def _prometheus_counters() -> dict[str, Any]:
    """The four counters, made once per process; none without prometheus_client."""
    try:
        from prometheus_client import Counter
    except ImportError:
        return {}
    for name in COUNTS:
        if name not in _counters:
            text = f"Sampled {name.replace('_', ' ')} of the routed experts"
            _counters[name] = Counter(f"intra_expert_sparsity_{name}", text, ["layer"])
    return _counters
