"""Layers and configurations the method cannot take: vLLM's own method with a reason, or a refusal in one line. Imports
vLLM, starts no engine.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.engine

PREFIX = "model.layers.0.mlp.experts"


def fake_layer(**changes: Any) -> Any:
    """A RoutedExperts that went through no constructor: only what the method looks at."""
    from vllm.model_executor.layers.fused_moe import RoutedExperts
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation

    layer = RoutedExperts.__new__(RoutedExperts)
    torch.nn.Module.__init__(layer)
    layer.activation = MoEActivation.from_str(changes.pop("activation", "silu"))
    layer.swiglu_limit = changes.pop("swiglu_limit", None)
    parallel = SimpleNamespace(
        enable_eplb=changes.pop("enable_eplb", False),
        use_all2all_kernels="all2all_backend" in changes,
        dp_size=2,
        all2all_backend=changes.pop("all2all_backend", ""),
    )
    layer.moe_config = SimpleNamespace(
        **{
            "in_dtype": torch.bfloat16,
            "has_bias": False,
            "is_lora_enabled": False,
            "moe_parallel_config": parallel,
            **changes,
        }
    )
    return layer


def config(**kwargs: Any) -> Any:
    from cutedsl_kernels.integration.vllm.config import IntraExpertSparseConfig

    return IntraExpertSparseConfig(**kwargs)


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        ({"activation": "relu2_no_mul"}, "activation relu2_no_mul is not supported"),
        ({"activation": "swiglustep"}, "activation swiglustep is not supported"),
        ({"swiglu_limit": 7.0}, "SwiGLU with a clamp"),
        ({"in_dtype": torch.float8_e4m3fn}, "activations of type float8_e4m3fn"),
        ({"is_lora_enabled": True}, "LoRA"),
        ({"all2all_backend": "deepep_low_latency"}, "all-to-all back end deepep_low_latency"),
    ],
)
def test_unsupported_layers_fall_back_with_the_reason(
    layer: dict[str, Any], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    chosen = config()
    with caplog.at_level("WARNING", logger="vllm.cutedsl_kernels"):
        assert chosen.get_quant_method(fake_layer(**layer), PREFIX) is None
    assert reason in chosen.fallbacks[PREFIX]
    assert chosen.expected == []


def test_batch_invariance_is_left_to_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    import vllm.envs
    from cutedsl_kernels.integration.vllm.method import why_unsupported

    monkeypatch.setattr(vllm.envs, "VLLM_BATCH_INVARIANT", True, raising=False)
    assert "VLLM_BATCH_INVARIANT" in str(why_unsupported(fake_layer()))


@pytest.mark.parametrize("cuda", [False, True])
@pytest.mark.parametrize(
    "layer",
    [{}, {"activation": "gelu"}, {"activation": "gelu_tanh"}, {"activation": "swigluoai", "has_bias": True}],
)
def test_supported_layers_do_not(layer: dict[str, Any], cuda: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from cutedsl_kernels.integration.vllm import compat
    from cutedsl_kernels.integration.vllm.method import why_unsupported

    monkeypatch.setattr(compat, "is_cuda", lambda: cuda)
    assert why_unsupported(fake_layer(**layer)) is None


def test_expert_load_balancing_is_refused() -> None:
    from cutedsl_kernels.integration.vllm.config import MethodError

    with pytest.raises(MethodError, match="enable-eplb") as caught:
        config().get_quant_method(fake_layer(enable_eplb=True), PREFIX)
    assert "\n" not in str(caught.value)


class InnerConfig:
    """The checkpoint's own quantization, as far as this method talks to it."""

    def __init__(self, method: Any) -> None:
        self.method = method

    def get_name(self) -> str:
        return "mxfp4"

    def get_quant_method(self, layer: Any, prefix: str) -> Any:
        return self.method


def test_quantized_experts_keep_their_own_method() -> None:
    own = object()
    chosen = config(inner=InnerConfig(own))
    assert chosen.get_quant_method(fake_layer(), PREFIX) is own
    assert chosen.fallbacks == {PREFIX: "experts quantized with mxfp4 are not supported"}
    linear = object.__new__(torch.nn.Linear)
    assert chosen.get_quant_method(linear, "model.layers.0.self_attn.q_proj") is own


@pytest.mark.parametrize(
    "checkpoint",
    [
        {"quant_method": "fp8", "activation_scheme": "dynamic"},
        {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True},
        {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True},
        {"quant_method": "mxfp4"},
    ],
    ids=lambda entry: entry["quant_method"],
)
def test_quantized_checkpoints_are_read_by_their_own_configuration(checkpoint: dict[str, Any]) -> None:
    """Asked for by name, the method takes a quantized checkpoint and hands every layer on."""
    from cutedsl_kernels.integration.vllm.config import IntraExpertSparseConfig

    name = "intra_expert_sparse"
    assert IntraExpertSparseConfig.override_quantization_method(checkpoint, name) == name
    assert IntraExpertSparseConfig.override_quantization_method(checkpoint, None) is None
    chosen = IntraExpertSparseConfig.from_config(dict(checkpoint))
    assert chosen.inner is not None
    assert type(chosen.inner).__module__.startswith("vllm.")


def test_registering_twice_is_harmless() -> None:
    from cutedsl_kernels.integration.vllm import register
    from cutedsl_kernels.integration.vllm.config import IntraExpertSparseConfig
    from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS, get_quantization_config

    register()
    register()
    assert QUANTIZATION_METHODS.count("intra_expert_sparse") == 1
    assert get_quantization_config("intra_expert_sparse") is IntraExpertSparseConfig


def test_an_unsupported_vllm_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from cutedsl_kernels.integration.vllm import compat

    monkeypatch.setattr(compat, "vllm_version", lambda: "0.21.0")
    assert "supports vLLM 0.26 to 0.33, found 0.21.0" in str(compat.unsupported_version())
    for version in ("0.26.0", "0.33.0+cu130", "dev"):
        monkeypatch.setattr(compat, "vllm_version", lambda version=version: version)
        assert compat.unsupported_version() is None


def test_a_missing_profile_is_one_line(tmp_path: Path) -> None:
    from cutedsl_kernels.integration.vllm.config import MethodError

    experts = {"num_experts": 8, "num_experts_per_tok": 2, "hidden_size": 64, "intermediate_size": 128}
    with pytest.raises(MethodError, match="cutedsl-kernels calibrate") as caught:
        config().maybe_update_config(str(tmp_path), hf_config={"architectures": ["OlmoeForCausalLM"], **experts})
    assert "\n" not in str(caught.value)
    (tmp_path / "intra_expert_sparsity.json").write_text(json.dumps({"format": "unknown"}))
    with pytest.raises(MethodError, match="format is 'unknown'"):
        config().maybe_update_config(str(tmp_path), hf_config={})
