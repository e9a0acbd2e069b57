"""Weights that are loaded again while the engine runs, as reinforcement learning does, and memory that may move."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_fallback import fake_layer

pytestmark = pytest.mark.engine


def reload_experts(worker: Any, scale: float) -> None:
    """vLLM's own reload, of the experts only: its CPU build cannot reload the layers it packs for itself."""
    from vllm.model_executor.model_loader import get_model_loader
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

    model, config = worker.get_model(), worker.vllm_config
    layers = [layer for layer, _ in worker._sparsity_states().values()]
    for layer in layers:
        initialize_layerwise_reload(layer)
    stored = get_model_loader(config.load_config).get_all_weights(config.model_config, model)
    model.load_weights((name, scale * weight) for name, weight in stored if ".experts." in name)
    for layer in layers:
        finalize_layerwise_reload(layer, config.model_config)


def places(worker: Any) -> list[int]:
    return [
        tensor.data_ptr()
        for layer, state in worker._sparsity_states().values()
        for tensor in (layer.w13_weight, layer.w2_weight, state.weights.w13, state.weights.w2_rows, state.tau)
    ]


def results(worker: Any) -> list[torch.Tensor]:
    """What every layer computes for the same tokens."""
    from cutedsl_kernels.integration.vllm.method import run_layer

    found = []
    for layer, state in worker._sparsity_states().values():
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(5, state.weights.hidden_size, generator=generator).to(state.weights.dtype)
        logits = torch.randn(5, state.weights.num_experts, generator=generator)
        weights, ids = logits.softmax(1).topk(state.top_k)
        found.append(run_layer(layer, x, weights, ids.int()))
    return found


@pytest.mark.parametrize("name", ["olmoe", "qwen3-moe"])
def test_reloaded_weights_come_to_the_old_addresses(
    name: str, checkpoint: Callable[[str], str], engine: Callable[..., Any]
) -> None:
    """Captured graphs and compiled plans hold them."""
    running = engine(checkpoint(name), record=True, dtype="float32")
    running.set_thresholds(dict.fromkeys(running.layer_names, (0.02, 0.0, True)))
    rpc = running.llm.collective_rpc
    before, where = rpc(results)[0], rpc(places)[0]
    rpc(reload_experts, args=(0.5,))
    for new, old in zip(rpc(results)[0], before, strict=True):
        assert not torch.allclose(new, old, rtol=0.1, atol=0)
    assert rpc(places)[0] == where
    rpc(reload_experts, args=(1.0,))
    for new, old in zip(rpc(results)[0], before, strict=True):
        torch.testing.assert_close(new, old, rtol=0, atol=0)
    assert rpc(places)[0] == where


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"sleep": True}, "sleep mode"),
        ({"uva": 4.0}, "offloaded to the host"),
        ({"group": 8}, "offloaded to the host"),
        ({}, None),
    ],
    ids=str,
)
def test_weights_that_may_move_are_left_to_vllm(
    changes: dict[str, Any], reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    import vllm.config
    from cutedsl_kernels.integration.vllm.method import why_unsupported

    offload = vllm.config.OffloadConfig()
    offload.uva.cpu_offload_gb = changes.get("uva", 0)
    offload.prefetch.offload_group_size = changes.get("group", 0)
    model = SimpleNamespace(enable_sleep_mode=changes.get("sleep", False))
    current = SimpleNamespace(model_config=model, offload_config=offload)
    monkeypatch.setattr(vllm.config, "get_current_vllm_config_or_none", lambda: current)
    found = why_unsupported(fake_layer())
    assert found == reason or (reason is not None and reason in str(found))
