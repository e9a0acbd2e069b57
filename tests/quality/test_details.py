"""Details of an evaluation and the lm-eval adapter."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

from cutedsl_kernels import SparsityProfile, UserError
from cutedsl_kernels.quality import details, tasks
from cutedsl_kernels.quality.details import measure_details, profile_weights
from cutedsl_kernels.quality.hf import MoEModel
from cutedsl_kernels.quality.report import print_details
from cutedsl_kernels.quality.scores import SCORES, NeuronParts, row_norms, save_neuron_parts, weight_check
from cutedsl_kernels.quality.search import Scored, record_moments
from cutedsl_kernels.sparsity import FORMAT_2

pytestmark = pytest.mark.cpu


def opened(seed: int) -> MoEModel:
    import transformers

    torch.manual_seed(seed)
    config = transformers.OlmoeConfig(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_experts=4,
        num_experts_per_tok=2,
        initializer_range=0.3,
        pad_token_id=0,
        eos_token_id=None,
    )
    return MoEModel(transformers.OlmoeForCausalLM(config))


def profile_of(model: MoEModel, sequences: list[list[int]], path: Path) -> SparsityProfile:
    """A moments-routed profile of two targets, written with its per-neuron parts."""
    moments = record_moments(model, sequences)
    scored = Scored.record(model, sequences, SCORES["moments-routed"], moments)
    parts = {
        name: NeuronParts(weight_check(layer.weights), moments[name].rms(row_norms(layer.weights)[0]))
        for name, layer in model.layers.items()
    }
    digest, size = save_neuron_parts(path.with_name("p.neurons"), parts)
    rows = {target: scored.thresholds(target) for target in (0.4, 0.8)}
    data: dict[str, Any] = {
        "format": FORMAT_2,
        "model": {
            "name": "x",
            "architecture": "OlmoeForCausalLM",
            "num_layers": 2,
            "num_experts": 4,
            "top_k": 2,
            "hidden_size": 32,
            "intermediate_size": 16,
        },
        "score": "moments-routed",
        "router_weighted": True,
        "calibration": {"tokens": 100, "text_sha256": "0" * 64, "max_len": 64},
        "layers": {
            name: {
                "targets": list(rows),
                "thresholds": [row[name].threshold for row in rows.values()],
                "pair_thresholds": [0.0, 0.0],
            }
            for name in model.layers
        },
        "created": {"version": "0", "date": "2026-11-23"},
        "neurons": {"file": "p.neurons", "sha256": digest, "size": size},
    }
    profile = SparsityProfile.from_dict(data)
    profile.save(path)
    return SparsityProfile.load(path)


def test_details_of_a_profile(tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(details, "NEW_TOKENS", 6)
    model = opened(seed)
    sequences = torch.randint(40, (8, 96), generator=torch.Generator().manual_seed(seed)).tolist()
    path = tmp_path / "p.json"
    profile = profile_of(model, sequences, path)
    found = measure_details(model, profile, path, sequences, (0.4, 0.8), oracle=True)
    for one, target in zip(found, (0.4, 0.8), strict=True):
        assert one.sparsity == pytest.approx(target, abs=0.05)
        assert one.oracle_kl is not None
        assert 0 <= one.oracle_kl < one.kl_mean * 1.2 + 1e-6
        assert one.lost_tokens == 0
        assert 0 < one.spread_tokens < 0.5
        assert 0 <= one.agreement <= 6
        unions = list(one.union.values())
        assert unions == sorted(unions)
        assert one.iou[2] == max(one.iou.values())
        assert one.union[2] == pytest.approx(min(1, 2 * (1 - target)), abs=0.35)
    console = Console(width=80, record=True, file=(tmp_path / "out").open("w"))
    print_details(console, found)
    assert "…" not in console.export_text()
    next(iter(model.layers.values())).weights.w2_rows.mul_(1.2)
    with pytest.raises(UserError, match="made for other weights"):
        profile_weights(model, profile, path)


def test_missing_lm_eval_and_missing_data_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="needs lm-eval, which is not installed"):
        tasks.prepare_tasks("paper")
    monkeypatch.setattr(tasks.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    (tmp_path / "allenai___ai2_arc").mkdir()
    with pytest.raises(UserError, match="no cached data for hellaswag, winogrande, truthfulqa_mc2: fetch"):
        tasks.prepare_tasks("paper")
    assert tasks.prepare_tasks("arc_easy, arc_challenge") == ["arc_easy", "arc_challenge"]
    with pytest.raises(UserError, match="must name at least one"):
        tasks.prepare_tasks(" ,")


def test_tasks_run_at_every_target(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: list[dict[str, Any]] = []

    def simple_evaluate(model: str, model_args: dict[str, Any], tasks: list[str]) -> dict[str, Any]:
        assert model == "vllm"
        seen.append(model_args)
        value = 0.8 if "quantization" not in model_args else 0.6
        return {"results": {"arc_easy": {"acc,none": 0.1, "acc_norm,none": value}, "winogrande": {"acc,none": value}}}

    monkeypatch.setitem(sys.modules, "lm_eval", SimpleNamespace(simple_evaluate=simple_evaluate))
    console = Console(width=100, record=True, file=(tmp_path / "out").open("w"))
    found = tasks.run_tasks("m", Path("p.json"), [0.0, 0.7], ["arc_easy", "winogrande"], console)
    assert found["0.7"]["mean"] == pytest.approx(0.6)
    assert "75.0%" in console.export_text()
    assert "quantization" not in seen[0]
    assert seen[1]["hf_overrides"] == {"intra_expert_sparsity": {"target_sparsity": 0.7, "profile": "p.json"}}
