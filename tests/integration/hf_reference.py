"""A transformers model whose routed experts run sparse_moe_ref: what an engine with thresholds must compute."""

from __future__ import annotations

from typing import Any

import torch
import transformers

from cutedsl_kernels import ExpertWeights, sparse_moe_ref

Setting = tuple[float | torch.Tensor, float, bool]  # tau, rho, router_weighted


def load(folder: str, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def log_probs(model: torch.nn.Module, tokens: list[int]) -> torch.Tensor:
    """fp32 [len(tokens) - 1, V]: the next token's log-probabilities at every position but the last."""
    with torch.no_grad():
        logits = model(torch.tensor([tokens])).logits[0, :-1]
    return torch.log_softmax(logits.float(), dim=-1)


def expert_modules(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The modules that hold a layer's experts as gate_up_proj [E, ., .] and down_proj [E, ., .], in layer order."""
    return [
        module
        for module in model.modules()
        if hasattr(module, "down_proj") and getattr(getattr(module, "gate_up_proj", None), "ndim", 0) == 3
    ]


def expert_weights(module: torch.nn.Module) -> tuple[ExpertWeights, str]:
    """A module's weights and activation. gpt-oss has them transposed, gate and up rows interleaved, and biases."""
    gate_up, down = (getattr(module, name).detach().clone() for name in ("gate_up_proj", "down_proj"))
    if not hasattr(module, "gate_up_proj_bias"):
        return ExpertWeights.from_w13_w2(gate_up, down), "silu"
    weights = ExpertWeights.from_w13_w2(
        gate_up.transpose(1, 2).contiguous(),
        down.transpose(1, 2).contiguous(),
        w13_bias=module.gate_up_proj_bias.detach(),
        w2_bias=module.down_proj_bias.detach(),
        interleaved=True,
    )
    return weights, "swigluoai"


def make_sparse(model: torch.nn.Module, settings: list[Setting]) -> None:
    """Replaces the forward of every experts module, in place: one setting per layer."""
    modules = expert_modules(model)
    assert len(modules) == len(settings)
    for module, (tau, rho, router_weighted) in zip(modules, settings, strict=True):
        weights, activation = expert_weights(module)

        def forward(
            hidden_states: torch.Tensor,
            topk_ids: torch.Tensor,
            topk_weights: torch.Tensor,
            weights: ExpertWeights = weights,
            tau: float | torch.Tensor = tau,
            options: Any = {"pair_threshold": rho, "router_weighted": router_weighted, "activation": activation},  # noqa: B006
        ) -> torch.Tensor:
            return sparse_moe_ref(hidden_states, weights, topk_weights, topk_ids, tau, **options)

        module.forward = forward  # type: ignore[method-assign]
