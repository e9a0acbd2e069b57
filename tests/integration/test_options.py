"""Options of the vLLM method, where they come from, and the one-line errors; nothing here starts an engine."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cutedsl_kernels.integration.vllm import options as o
from cutedsl_kernels.integration.vllm.state import LayerState

from cutedsl_kernels import SparsityProfile, UserError
from cutedsl_kernels.plan import Plan
from cutedsl_kernels.sparsity import PROFILE_FILENAME

pytestmark = pytest.mark.cpu

LAYERS = ["model.layers.0.mlp.experts", "model.layers.1.mlp.experts"]


def profile_dict(**model: Any) -> dict[str, Any]:
    identity = {
        "name": "olmoe",
        "architecture": "OlmoeForCausalLM",
        "num_layers": 2,
        "num_experts": 8,
        "top_k": 3,
        "hidden_size": 64,
        "intermediate_size": 96,
        **model,
    }
    table = {"targets": [0.5, 0.9], "thresholds": [0.1, 0.4], "pair_thresholds": [0.0, 0.0]}
    return {
        "format": "intra-expert-sparsity/1",
        "model": identity,
        "score": "gate-routed",
        "router_weighted": True,
        "calibration": {"tokens": 2048, "text_sha256": "0" * 64, "max_len": 128},
        "layers": dict.fromkeys(LAYERS, table),
        "created": {"version": "0.1.0", "date": "2026-11-23"},
    }


@pytest.fixture
def write_profile(tmp_path: Path) -> Callable[..., Path]:
    def write(**model: Any) -> Path:
        path = tmp_path / "profile.json"
        path.write_text(json.dumps(profile_dict(**model)))
        return path

    return write


def test_overrides_win_over_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(o.ENV_PROFILE, "from-environment.json")
    monkeypatch.setenv(o.ENV_TARGET, "0.6")
    assert o.Options.collect(None) == o.Options("from-environment.json", 0.6)
    given = o.Options.collect({"quant_method": "intra_expert_sparse", "profile": "mine.json", "target_sparsity": 0})
    assert given == o.Options("mine.json", 0.0)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"target": 0.5}, "target is not an option; known are"),
        ({"target_sparsity": 1.0}, "must be a number in 0..1"),
        ({"target_sparsity": "high"}, "must be a number in 0..1"),
        ({"target_sparsity": False}, "must be a number in 0..1"),
        ({"sparsity_stats": "often"}, "hf_overrides: intra_expert_sparsity.sparsity_stats must be true or false"),
        (0.8, 'must be an object such as {"target_sparsity": 0.8}, got 0.8'),
        ("0.8", "must be an object"),
        ([0.8], "must be an object"),
    ],
)
def test_bad_options_are_one_line(overrides: Any, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        o.Options.collect({"profile": "p.json"}, overrides)
    assert "\n" not in str(caught.value)


def test_bad_environment_names_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(o.ENV_TARGET, "-1")
    with pytest.raises(UserError, match=o.ENV_TARGET):
        o.Options.collect(None)
    monkeypatch.delenv(o.ENV_TARGET)
    monkeypatch.setenv(o.ENV_STATS, "yes please")
    with pytest.raises(UserError, match=o.ENV_STATS):
        o.Options.collect(None)


def test_a_dense_model_is_not_told_to_calibrate(tmp_path: Path) -> None:
    from cutedsl_kernels.integration.vllm.config import IntraExpertSparseConfig, MethodError

    config = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 128}
    with pytest.raises(MethodError, match="llama is not a Mixture-of-Experts model"):
        IntraExpertSparseConfig().maybe_update_config(str(tmp_path), SimpleNamespace(to_dict=lambda: config))


def test_what_lies_beside_a_checkpoint_is_not_taken_for_weights() -> None:
    """vLLM loads every file of a folder that one of these patterns matches; loaders that know no such names fail."""
    from cutedsl_kernels.integration.vllm.calibrate import neuron_file

    written = neuron_file(Path("checkpoint") / PROFILE_FILENAME)
    assert not any(written.match(pattern) for pattern in ("*.safetensors", "*.bin", "*.pt", "*.gguf"))


def test_no_profile_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cutedsl-kernels calibrate") as caught:
        o.find_profile(o.Options(), str(tmp_path))
    assert "\n" not in str(caught.value)


def test_profile_beside_the_checkpoint_is_found(tmp_path: Path) -> None:
    beside = tmp_path / "intra_expert_sparsity.json"
    beside.write_text("{}")
    assert o.find_profile(o.Options(), str(tmp_path)) == beside
    assert o.find_profile(o.Options(profile="other.json"), str(tmp_path)) == Path("other.json")


def hf_config(**changes: Any) -> dict[str, Any]:
    return {
        "architectures": ["OlmoeForCausalLM"],
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "hidden_size": 64,
        "intermediate_size": 96,
        **changes,
    }


def test_profile_of_another_model_is_refused(write_profile: Callable[..., Path]) -> None:
    options = o.Options(profile=str(write_profile()))
    assert isinstance(o.load_profile(options, "olmoe", hf_config()), SparsityProfile)
    with pytest.raises(UserError, match=r"num_experts is 8 but the model being served has 16"):
        o.load_profile(options, "olmoe", hf_config(num_experts=16))
    with pytest.raises(UserError, match="not a Mixture-of-Experts model"):
        o.load_profile(options, "llama", {"architectures": ["LlamaForCausalLM"], "hidden_size": 64})


def test_target_beyond_the_profile_is_refused(write_profile: Callable[..., Path]) -> None:
    profile = SparsityProfile.load(write_profile())
    assert o.choose_target(o.Options(), profile) == o.DEFAULT_TARGET
    assert o.choose_target(o.Options(target_sparsity=0.0), profile) == 0.0
    with pytest.raises(UserError, match=r"must lie in 0\.\.0\.9"):
        o.choose_target(o.Options(target_sparsity=0.95), profile)


def test_plan_summary_reads_as_ranges() -> None:
    from cutedsl_kernels import ExpertWeights

    weights = ExpertWeights(torch.zeros(2, 8, 4), torch.zeros(2, 4, 4))
    state = LayerState("layer", weights, 1, "silu", False, torch.zeros(1, 1))
    assert state.plan_summary() == "every batch on the CPU back end"
    fused, dense = Plan("cpu"), Plan("dense")  # any two kinds
    state.plans = [(1, fused), (8, fused), (32, dense), (64, fused), (128, dense)]
    assert state.plan_summary() == "1-8 tokens cpu, 9-32 tokens dense, 33-64 tokens cpu, 65 and more dense"
    assert [state.plan(n).kind for n in (1, 8, 9, 64, 65, 4096)] == ["cpu", "cpu", "dense", "cpu", "dense", "dense"]
