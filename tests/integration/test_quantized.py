"""Checkpoints with an fp8 part, written here from the bundled model and loaded by a real engine: layers whose experts
are quantized run vLLM's own method, with its result, and the log names them; layers whose experts are not run sparse.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_engine import recorded_setting, scores, sequences

pytestmark = pytest.mark.engine

BUNDLED = Path(__file__).resolve().parents[2] / "models" / "tiny-olmoe"
BLOCK = 128
METHOD = "intra_expert_sparse"


def quantized(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """weight [O, I], multiples of BLOCK, as fp8 (e4m3) and the fp32 scale of each block, as DeepSeek's checkpoints."""
    rows, columns = (size // BLOCK for size in weight.shape)
    blocks = weight.float().view(rows, BLOCK, columns, BLOCK)
    scales = blocks.abs().amax(dim=(1, 3)).clamp_min(1e-6) / torch.finfo(torch.float8_e4m3fn).max
    scaled = (blocks / scales[:, None, :, None]).view_as(weight)
    return scaled.to(torch.float8_e4m3fn).contiguous(), scales


@pytest.fixture(scope="module")
def fp8_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], str]:
    """The bundled model with the experts of its first so many layers in fp8, and everything else as it is."""
    config = json.loads((BUNDLED / "config.json").read_text())
    layers = config["num_hidden_layers"]

    def make(quantized_layers: int) -> str:
        folder = tmp_path_factory.mktemp(f"fp8-{quantized_layers}")
        for file in BUNDLED.glob("*.json"):
            shutil.copy(file, folder)
        kept = [
            f"model.layers.{i}.self_attn.{name}_proj" for i in range(layers) for name in ("q", "k", "v", "o", "qkv")
        ]
        kept += [f"model.layers.{i}.mlp.gate" for i in range(layers)] + ["lm_head"]
        tensors: dict[str, torch.Tensor] = {}
        for name, tensor in load_file(BUNDLED / "model.safetensors").items():
            layer = int(name.split(".")[2]) if name.startswith("model.layers.") else layers
            if ".mlp.experts." in name and layer < quantized_layers:
                tensors[name], tensors[f"{name}_scale_inv"] = quantized(tensor)
                continue
            if ".mlp.experts." in name:
                kept.append(name.removesuffix(".weight"))
            tensors[name] = tensor
        kept += [f"model.layers.{i}.mlp.experts" for i in range(quantized_layers, layers)]
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        entry = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [BLOCK, BLOCK]}
        (folder / "config.json").write_text(
            json.dumps({**config, "quantization_config": {**entry, "ignored_layers": kept}})
        )
        return str(folder)

    return make


@pytest.fixture
def fp8_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's fp8 experts on this CPU. It asks for AMX tiles; the kernel beneath runs with AVX-512 and bf16 as well."""
    from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUExpertsFp8

    if CPUExpertsFp8._supports_current_device():
        return
    if not torch.cpu._is_avx512_bf16_supported():
        pytest.skip("vLLM's fp8 experts need AVX-512 with bf16")
    monkeypatch.setattr(CPUExpertsFp8, "_supports_current_device", staticmethod(lambda: True))


def test_quantized_experts_run_as_in_stock_vllm(
    fp8_checkpoint: Callable[[int], str],
    fp8_kernel: None,
    engine: Callable[..., Any],
    seed: int,
    method_log: list[str],
) -> None:
    """No profile is asked for, as nothing could use it."""
    folder, texts = fp8_checkpoint(4), sequences(seed)
    stock = scores(engine(folder, dense=True, dtype="bfloat16"), texts)[0]
    ours = scores(engine(folder, dense=True, quantization=METHOD, dtype="bfloat16"), texts)[0]
    assert all(torch.equal(a, b) for a, b in zip(ours, stock, strict=True))
    for layer in range(4):
        assert (
            f"layer model.layers.{layer}.mlp.experts runs dense with vLLM's own method: "
            "experts quantized with fp8 are not supported"
        ) in "\n".join(method_log)
    plain = scores(engine(str(BUNDLED), dense=True, dtype="bfloat16"), texts)[0]
    assert (stock[0] - plain[0]).abs().mean() < 0.5, "the checkpoint is not the bundled model in fp8"
    assert not torch.equal(stock[0], plain[0])


def test_layers_that_are_not_quantized_run_sparse(
    fp8_checkpoint: Callable[[int], str], fp8_kernel: None, engine: Callable[..., Any], seed: int
) -> None:
    folder, texts = fp8_checkpoint(2), sequences(seed)
    stock = scores(engine(folder, dense=True, dtype="bfloat16"), texts)[0]
    ours = engine(folder, record=True, dtype="bfloat16")
    assert list(ours.report()["fallbacks"]) == [f"model.layers.{i}.mlp.experts" for i in range(2)]
    assert ours.layer_names == [f"model.layers.{i}.mlp.experts" for i in range(2, 4)]
    setting = recorded_setting(ours, texts, 0.7, 0.0)
    dense, sparse = scores(ours, texts, [0.0, setting])
    for i in range(len(texts)):
        assert (dense[i] - stock[i]).abs().amax(dim=1).median() < 0.1
        assert (sparse[i] - dense[i]).abs().max() > 0.05
    for counters in ours.realised("setting 1").values():
        assert abs(counters.sparsity - 0.7) < 0.1


def test_without_a_kernel_for_the_format_the_error_is_vllms(
    fp8_checkpoint: Callable[[int], str], engine: Callable[..., Any]
) -> None:
    from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUExpertsFp8

    if CPUExpertsFp8._supports_current_device():
        pytest.skip("this CPU has a kernel for the format")
    folder, found = fp8_checkpoint(4), []
    for options in ({}, {"quantization": METHOD}):
        with pytest.raises(ValueError, match="FP8") as caught:
            engine(folder, dense=True, dtype="bfloat16", **options)
        found.append(str(caught.value))
    assert found[0] == found[1]


def test_a_profile_is_asked_for_once_a_layer_could_use_it(tmp_path: Path) -> None:
    from cutedsl_kernels.integration.vllm.config import IntraExpertSparseConfig, MethodError
    from test_fallback import PREFIX, InnerConfig, fake_layer

    chosen = IntraExpertSparseConfig(inner=InnerConfig(object()))
    chosen.maybe_update_config(str(tmp_path), hf_config={})
    chosen.get_quant_method(fake_layer(), PREFIX)
    assert "mxfp4" in chosen.fallbacks[PREFIX]
    chosen.inner = InnerConfig(None)  # which leaves this layer's experts alone
    with pytest.raises(MethodError, match="cutedsl-kernels calibrate"):
        chosen.get_quant_method(fake_layer(), PREFIX)
    broken = IntraExpertSparseConfig({"sparsity_stats": "perhaps"}, inner=InnerConfig(object()))
    with pytest.raises(MethodError, match="sparsity_stats"):
        broken.maybe_update_config(str(tmp_path), hf_config={})
