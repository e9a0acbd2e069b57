"""Dense implementations to compare with. Each computes the dense layer (no threshold) on the same inputs and weights.

| name | what it is |
|---|---|
| torch-dense | a loop over the experts hit, three products each; which tokens go to which expert is known beforehand |
| torch-grouped-mm | torch's grouped_mm on pairs sorted by expert, sorting included |
| vllm-triton | vLLM's fused_experts: its shipped config for the shape, or one tuned in this run where it ships none |
| vllm-triton-default | the same under the config vLLM itself would choose; a row where vllm-triton was tuned |
| quack-dense | quack's grouped GEMM (variable-length M) on pairs sorted by expert, sorting included |
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from cutedsl_kernels import ExpertWeights
from cutedsl_kernels.reference import gate_activation

from .problems import Batch, LayerInputs
from .timing import Call, prepare

NAMES = ("vllm-triton", "torch-dense", "torch-grouped-mm", "quack-dense")

TRITON_FIELDS = ("BLOCK_SIZE_M", "BLOCK_SIZE_N", "BLOCK_SIZE_K", "GROUP_SIZE_M", "num_warps", "num_stages")
# Tried, most promising first, where vLLM ships no config; from what its shipped bf16 configs for the H200 choose.
_TRITON_SMALL = (
    (16, 64, 128, 1, 4, 4),
    (16, 128, 64, 1, 4, 4),
    (16, 64, 64, 1, 4, 5),
    (16, 32, 64, 1, 4, 4),
    (16, 128, 128, 1, 4, 3),
    (16, 32, 128, 1, 4, 5),
)
_TRITON_MEDIUM = (
    (16, 128, 64, 1, 4, 3),
    (16, 128, 128, 1, 8, 3),
    (32, 128, 64, 1, 4, 3),
    (64, 128, 64, 1, 4, 3),
    (16, 64, 128, 1, 4, 3),
    (32, 128, 128, 1, 4, 3),
)
_TRITON_LARGE = (
    (128, 128, 64, 16, 8, 3),
    (128, 256, 64, 16, 8, 4),
    (64, 128, 64, 1, 4, 3),
    (128, 256, 64, 1, 8, 4),
    (64, 256, 64, 16, 8, 4),
)


class Unavailable(RuntimeError):
    """This baseline cannot run here; the message says why."""


class Baseline:
    """One dense implementation. ``config`` describes the settings in use, as JSON, after ``calls``."""

    name: str
    config: str = "{}"

    def calls(self, batch: Batch) -> list[Call]:
        """One callable per call of the batch. Unavailable if it cannot run on this device or dtype."""
        raise NotImplementedError

    def release(self) -> None:
        """Drops what was built from a layer's weights."""


class TorchDense(Baseline):
    name = "torch-dense"

    def calls(self, batch: Batch) -> list[Call]:
        return [_expert_loop(batch, call) for call in batch.calls]


def _expert_loop(batch: Batch, call: LayerInputs) -> Call:
    inter, weights = batch.shape.intermediate_size, call.weights
    parts = []
    for e in torch.unique(call.topk_ids).tolist():
        token, slot = torch.nonzero(call.topk_ids == e, as_tuple=True)
        parts.append((e, token, call.topk_weights[token, slot].unsqueeze(1)))

    def run() -> torch.Tensor:
        total = torch.zeros(call.hidden_states.shape, dtype=torch.float32, device=call.hidden_states.device)
        for e, token, r in parts:
            x = call.hidden_states[token]
            if batch.router_weight_on_input:
                x = (x * r).to(x.dtype)
            gate_up = F.linear(x, weights.w13[e])
            h = gate_activation(gate_up[:, :inter], batch.activation) * gate_up[:, inter:]
            y = h @ weights.w2_rows[e]
            total.index_add_(0, token, y.float() if batch.router_weight_on_input else y * r)
        return total.to(call.hidden_states.dtype)

    return run


Product = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def _sorted_pairs(batch: Batch, call: LayerInputs, product: Product) -> Call:
    """Pairs sorted by expert, two grouped products, weighted sum. product(rows [P, K], [E, K, N], first pair of each
    expert int32 [E + 1]) -> [P, N]."""
    weights, top_k, inter = call.weights, batch.shape.top_k, batch.shape.intermediate_size
    bounds = torch.arange(batch.shape.num_experts + 1, device=call.topk_ids.device, dtype=torch.int32)

    def run() -> torch.Tensor:
        experts, order = call.topk_ids.flatten().sort()
        first = torch.searchsorted(experts, bounds).to(torch.int32)
        x = call.hidden_states[order // top_k]
        if batch.router_weight_on_input:
            x = (x * call.topk_weights.flatten()[order].unsqueeze(1)).to(x.dtype)
        gate_up = product(x, weights.w13.transpose(1, 2), first)
        h = gate_activation(gate_up[:, :inter], batch.activation) * gate_up[:, inter:]
        y = product(h, weights.w2_rows, first)
        pairs = torch.empty_like(y).index_copy_(0, order, y).view(-1, top_k, y.shape[1])
        if batch.router_weight_on_input:
            return pairs.sum(1)
        return torch.bmm(call.topk_weights.to(y.dtype).unsqueeze(1), pairs).squeeze(1)

    return run


class TorchGroupedMM(Baseline):
    name = "torch-grouped-mm"

    def calls(self, batch: Batch) -> list[Call]:
        grouped_mm = getattr(F, "grouped_mm", None) or getattr(torch, "_grouped_mm", None)
        if grouped_mm is None:
            raise Unavailable(f"torch {torch.__version__} has no grouped_mm")
        if batch.calls[0].hidden_states.dtype != torch.bfloat16:
            raise Unavailable("grouped_mm takes bfloat16 only")

        def product(rows: torch.Tensor, matrices: torch.Tensor, first: torch.Tensor) -> torch.Tensor:
            return grouped_mm(rows, matrices, offs=first[1:])

        return [_sorted_pairs(batch, call, product) for call in batch.calls]


class QuackDense(Baseline):
    name = "quack-dense"

    def calls(self, batch: Batch) -> list[Call]:
        if batch.calls[0].hidden_states.device.type != "cuda":
            raise Unavailable("quack needs a CUDA device")
        try:
            from quack.gemm_interface import gemm
        except ImportError as error:
            raise Unavailable(f"cannot import quack ({error})") from None

        def product(rows: torch.Tensor, matrices: torch.Tensor, first: torch.Tensor) -> torch.Tensor:
            return gemm(rows, matrices, cu_seqlens_m=first, tuned=False)

        return [_sorted_pairs(batch, call, product) for call in batch.calls]


class VllmTriton(Baseline):
    """Tunes where vLLM ships no config: each candidate for the batch's size is timed briefly, within ``tune_seconds``
    per batch (the first compilation of a candidate takes seconds), and the fastest is kept for that shape and T."""

    name = "vllm-triton"

    def __init__(self, tune_seconds: float = 20.0) -> None:
        self._tune_seconds = tune_seconds
        self._w2: dict[int, torch.Tensor] = {}
        self._chosen: dict[tuple[Any, int], dict[str, int] | None] = {}
        self._module: Any = None
        self.tuned = False

    def calls(self, batch: Batch) -> list[Call]:
        self._load(batch)
        key = (batch.shape, batch.num_tokens)
        shipped = self._shipped(batch)
        if shipped is None and self._tune_seconds > 0 and key not in self._chosen:
            self._chosen[key] = self._tune(batch)
        chosen = None if shipped is not None else self._chosen.get(key)
        self.tuned = chosen is not None
        self.config = _text(chosen, "tuned") if chosen else self.own_config(batch)
        return self._calls(batch, chosen)

    def own_calls(self, batch: Batch) -> list[Call]:
        """Calls under the config vLLM would choose by itself."""
        self._load(batch)
        return self._calls(batch, None)

    def own_config(self, batch: Batch) -> str:
        self._load(batch)
        shipped = self._shipped(batch)
        if shipped is not None:
            return _text(shipped[min(shipped, key=lambda tokens: abs(tokens - batch.num_tokens))], "shipped")
        shape = batch.shape
        sizes = (batch.num_tokens, shape.num_experts, shape.intermediate_size, shape.hidden_size, shape.top_k)
        return _text(self._module.get_default_config(*sizes, None), "default")

    def release(self) -> None:
        self._w2.clear()

    def _load(self, batch: Batch) -> None:
        if batch.calls[0].hidden_states.device.type != "cuda":
            raise Unavailable("vLLM's Triton kernels need a CUDA device")
        if self._module is None:
            try:
                import vllm.model_executor.layers.fused_moe.fused_moe as module
            except Exception as error:  # a partly installed vLLM fails in many ways
                raise Unavailable(f"cannot import vLLM's fused_moe ({type(error).__name__}: {error})") from None
            self._module = module
        try:
            for call in batch.calls:
                self._w2_of(call.weights)
        except torch.OutOfMemoryError:
            self.release()
            raise Unavailable("no memory for a second copy of w2, which fused_experts needs as [E, H, I]") from None

    def _w2_of(self, weights: ExpertWeights) -> torch.Tensor:
        if id(weights) not in self._w2:
            self._w2[id(weights)] = weights.w2_rows.transpose(1, 2).contiguous()
        return self._w2[id(weights)]

    def _shipped(self, batch: Batch) -> dict[int, dict[str, int]] | None:
        return self._module.get_moe_configs(batch.shape.num_experts, batch.shape.intermediate_size, None, 0, 0)

    def _calls(self, batch: Batch, config: dict[str, int] | None) -> list[Call]:
        from vllm.model_executor.layers.fused_moe import override_config
        from vllm.model_executor.layers.fused_moe.activation import MoEActivation

        activation = MoEActivation.from_str(batch.activation)

        def bind(call: LayerInputs) -> Call:
            w2 = self._w2_of(call.weights)

            def run() -> torch.Tensor:
                with override_config(config):
                    return self._module.fused_experts(
                        call.hidden_states,
                        call.weights.w13,
                        w2,
                        call.topk_weights,
                        call.topk_ids,
                        activation=activation,
                        apply_router_weight_on_input=batch.router_weight_on_input,
                    )

            return run

        return [bind(call) for call in batch.calls]

    def _tune(self, batch: Batch) -> dict[str, int] | None:
        """The fastest of vLLM's own choice (None) and the candidates."""
        device = batch.calls[0].hidden_states.device
        started = time.perf_counter()
        best: dict[str, int] | None = None
        best_us = prepare(self._calls(batch, None), device).measure(5, 0.3).median_us
        for values in _candidates(batch):
            if time.perf_counter() - started > self._tune_seconds:
                break
            config = dict(zip(TRITON_FIELDS, values, strict=True)) | {"SPLIT_K": 1}
            try:
                us = prepare(self._calls(batch, config), device).measure(5, 0.3).median_us
            except Exception as error:  # Triton: out of shared memory for this config, and the like
                if device.type == "cuda":
                    torch.cuda.synchronize()  # raises again if the device itself is lost
                print(f"vllm-triton config {values} left out: {type(error).__name__}")
                continue
            if us < best_us:
                best, best_us = config, us
        return best


def _candidates(batch: Batch) -> Sequence[tuple[int, ...]]:
    per_expert = batch.num_tokens * batch.shape.top_k / batch.shape.num_experts
    if batch.num_tokens <= 16:
        return _TRITON_SMALL
    return _TRITON_MEDIUM if per_expert <= 32 else _TRITON_LARGE


def _text(config: dict[str, int], source: str) -> str:
    return json.dumps({"source": source} | {name: config[name] for name in TRITON_FIELDS if name in config})


def make_baselines(names: Sequence[str], tune_seconds: float = 20.0) -> list[Baseline]:
    """ValueError for an unknown name."""
    known: dict[str, Callable[[], Baseline]] = {
        "vllm-triton": lambda: VllmTriton(tune_seconds),
        "torch-dense": TorchDense,
        "torch-grouped-mm": TorchGroupedMM,
        "quack-dense": QuackDense,
    }
    for name in names:
        if name not in known:
            raise ValueError(f"baselines must be among {', '.join(known)}, got {name!r}")
    return [known[name]() for name in names]
