"""SparsityWorker: methods that SparseEngine calls on every worker (vLLM mixes them into its own worker class)."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from ...calibration import LayerHistogram
from . import compat
from .method import STATE
from .neurons import NeuronMethods, shard
from .state import LayerState

Setting = tuple[float | torch.Tensor, float, bool]  # tau, rho, router_weighted


class SparsityWorker(NeuronMethods):
    """Mixed into vLLM's worker: ``self.get_model()`` is the worker's model. Results must survive pickling."""

    def _sparsity_states(self) -> dict[str, tuple[Any, LayerState]]:
        layers = compat.routed_experts_of(self.get_model())  # type: ignore[attr-defined]
        return {
            layer._intra_expert_sparsity.name: (layer, layer._intra_expert_sparsity)
            for layer in layers
            if hasattr(layer, STATE)
        }

    def sparsity_layers(self) -> list[str]:
        return list(self._sparsity_states())

    def sparsity_report(self) -> dict[str, Any]:
        """For the operator: layers that fall back and why, the plans of the first layer, and how many kernels were
        compiled after loading (0, or a batch waited for a compiler).
        """
        states = [state for _, state in self._sparsity_states().values()]
        config = self.vllm_config.quant_config  # type: ignore[attr-defined]
        late = 0
        if states and states[0].weights.device.type == "cuda":
            from ...compile import compile_count

            late = compile_count() - config.compiled_at_load
        return {
            "fallbacks": dict(config.fallbacks),
            "plans": [(bucket, str(plan)) for bucket, plan in states[0].plans] if states else [],
            "summary": states[0].plan_summary() if states else "",
            "compiled_late": late,
        }

    def sparsity_set(self, settings: dict[str, Setting], label: str, sparsity: float) -> None:
        """Thresholds per layer: a number, or the whole model's [E, I], of which this rank takes its part."""
        for name, (layer, state) in self._sparsity_states().items():
            tau, rho, router_weighted = settings[name]
            if isinstance(tau, torch.Tensor) and tau.numel() > 1:
                tau = shard(tau, layer, state)
            state.set(tau, rho, router_weighted, label, sparsity)
            if state.weights.device.type == "cuda" and not state.exact:
                state.choose_plans(layer.expert_map)

    def sparsity_exact(self, on: bool) -> None:
        for _, state in self._sparsity_states().values():
            state.exact = on

    def sparsity_record(self, on: bool) -> None:
        for layer, state in self._sparsity_states().values():
            state.recorder = LayerHistogram(state.weights.device, layer.global_num_experts) if on else None

    def sparsity_histograms(self) -> dict[str, dict[str, np.ndarray]]:
        return {
            name: state.recorder.arrays()
            for name, (_, state) in self._sparsity_states().items()
            if state.recorder is not None
        }

    def sparsity_count(self, on: bool) -> None:
        for _, state in self._sparsity_states().values():
            state.counting = on

    def sparsity_reset_counters(self) -> None:
        for _, state in self._sparsity_states().values():
            state.counters.clear()

    def sparsity_counters(self) -> dict[str, dict[str, dict[str, int]]]:
        """{label: {layer: counts}}; pairs are divided by tp_size later (``copies``), as every rank of a shard sees
        all of them.
        """
        found: dict[str, dict[str, dict[str, int]]] = {}
        for name, (_, state) in self._sparsity_states().items():
            for label, counts in state.counters.items():
                pairs, skipped, neurons, active = counts.tolist()
                found.setdefault(label, {})[name] = {
                    "pairs": pairs,
                    "skipped_pairs": skipped,
                    "neurons": neurons,
                    "active_neurons": active,
                    "copies": state.tp_size,
                }
        return found

    # Hidden states of a prompt, kept per setting, from which log-probabilities are made chunk by chunk.

    def sparsity_capture(self, slot: int | None) -> None:
        """From now on keep the model's output (hidden states before the head) in ``slot``; None: stop keeping."""
        if not hasattr(self, "_sparsity_hidden"):
            self._sparsity_hidden: dict[int, list[torch.Tensor]] = {}
            self._sparsity_slot: int | None = None
            self.get_model().register_forward_hook(self._sparsity_keep)  # type: ignore[attr-defined]
        self._sparsity_slot = slot
        if slot is not None:
            self._sparsity_hidden[slot] = []

    def _sparsity_keep(self, module: torch.nn.Module, inputs: Any, output: Any) -> None:
        if self._sparsity_slot is not None and isinstance(output, torch.Tensor):
            self._sparsity_hidden[self._sparsity_slot].append(output.detach().clone())

    def sparsity_log_probs(self, slot: int, start: int, stop: int) -> torch.Tensor | None:
        """Log-probabilities of the next token after positions start..stop-1, fp32 [stop - start, vocabulary] on the
        CPU. All ranks must be asked; those that do not hold the whole vocabulary answer None."""
        pieces = self._sparsity_hidden[slot]
        if len(pieces) > 1:
            pieces = self._sparsity_hidden[slot] = [torch.cat(pieces)]
        with torch.inference_mode():
            logits = self.get_model().compute_logits(pieces[0][start:stop])  # type: ignore[attr-defined]
            return None if logits is None else torch.log_softmax(logits.float(), dim=-1).cpu()

    def sparsity_release(self) -> None:
        self._sparsity_hidden.clear()
