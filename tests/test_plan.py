"""Plans: configs and legality, cost model, tuned tables and their lookup, plan_for."""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cutedsl_kernels import KNOWN_MODELS, MoEShape, Plan, plan_for
from cutedsl_kernels.configs import KERNEL_ACTIVATIONS, SMEM_LIMIT, FusedConfig, illegal_reason, legal_plans
from cutedsl_kernels.cost_model import Gpu, dense_bytes, estimate_us, layer_bytes
from cutedsl_kernels.environment import dsl_version, user_dir
from cutedsl_kernels.plan import forget_plans
from cutedsl_kernels.tuned_table import Entry, Measurement, TunedTable, TunedTableWarning, find_table, table_path

pytestmark = pytest.mark.cpu

SHAPE = KNOWN_MODELS["qwen3.5-35b-a3b"].shape
H200 = Gpu(driver="580.95.05")


@pytest.fixture(autouse=True)
def tuned_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The user's folder, empty; no table is shipped."""
    monkeypatch.setattr("cutedsl_kernels.tuned_table.SHIPPED_DIR", tmp_path / "nothing")
    monkeypatch.setenv("CUTEDSL_KERNELS_TUNED_DIR", str(tmp_path))
    forget_plans()
    yield tmp_path
    forget_plans()


def fused(**values: int) -> Plan:
    return Plan("fused", replace(FusedConfig(), **values))


# ---- plans and configs -----------------------------------------------------------------------------------------------


def test_plan_survives_json() -> None:
    for plan in (Plan("dense"), Plan("cpu"), *list(legal_plans(SHAPE, 8))[::37]):
        assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan


@pytest.mark.parametrize(
    "data",
    [
        "fused",
        {},
        {"kind": "sparse"},
        {"kind": "fused"},
        {"kind": "dense", "config": asdict(FusedConfig())},
        {"kind": "fused", "config": {"tile_neurons": 32}},
        {"kind": "fused", "config": asdict(FusedConfig()) | {"tile_neurons": "32"}},
        {"kind": "fused", "config": asdict(FusedConfig()) | {"warps": 8}},
    ],
)
def test_damaged_plans_are_refused(data: Any) -> None:
    with pytest.raises((ValueError, TypeError)):
        Plan.from_json(data)


@pytest.mark.parametrize(
    ("plan", "reason"),
    [
        (fused(tile_neurons=20), "tile_neurons is 20"),
        (fused(tile_neurons=256), "tile_neurons is 256"),
        (fused(gate_warps=3), "gate_warps is 3"),
        (fused(gate_stages=0), "gate_stages is 0"),
        (fused(gate_stages=9), "bytes of shared memory"),
        (fused(max_pairs=512), "max_pairs is 512"),
    ],
)
def test_illegal_configs_say_why(plan: Plan, reason: str) -> None:
    assert reason in str(illegal_reason(plan, SHAPE))


def test_legality_follows_shape_tokens_and_activation() -> None:
    plan = fused()
    assert illegal_reason(plan, SHAPE, 32) is None
    assert "exceed max_pairs 256" in str(illegal_reason(plan, SHAPE, 33))
    assert "hidden_size 2000" in str(illegal_reason(plan, replace(SHAPE, hidden_size=2000)))
    assert "activation relu" in str(illegal_reason(plan, SHAPE, 1, "relu"))
    assert "shared memory" in str(illegal_reason(fused(keep_sums=0), replace(SHAPE, hidden_size=4096)))
    assert "exceeds the registers" in str(illegal_reason(plan, replace(SHAPE, hidden_size=8192)))
    assert illegal_reason(Plan("dense"), replace(SHAPE, hidden_size=63), 10**6, "relu") is None


@pytest.mark.parametrize("model", KNOWN_MODELS.values(), ids=lambda model: model.name)
def test_the_search_space_is_legal_and_distinct(model: Any) -> None:
    for num_tokens in (1, 64, 400):
        plans = list(legal_plans(model.shape, num_tokens))
        assert plans[0] == Plan("dense")
        assert len(plans) == len(set(plans)) > 1
        for plan in plans[1:]:
            assert illegal_reason(plan, model.shape, num_tokens) is None
            if isinstance(plan.config, FusedConfig):
                assert plan.config.smem_bytes(model.shape.hidden_size, model.shape.num_experts) <= SMEM_LIMIT


# ---- bytes and cost --------------------------------------------------------------------------------------------------


def test_bytes_against_counting_by_hand() -> None:
    """T = 1: the gate of k experts, and the active share of up and down; dense is three times the gate."""
    row_bytes, neurons = 2 * SHAPE.hidden_size, SHAPE.top_k * SHAPE.intermediate_size
    counted = layer_bytes(SHAPE, 1, 0.75)
    assert counted.gate == pytest.approx(neurons * row_bytes)
    assert counted.up_down == pytest.approx(2 * neurons * row_bytes / 4)
    assert counted.tokens == 2 * row_bytes
    dense = dense_bytes(SHAPE, 1)
    assert dense.up_down == pytest.approx(2 * dense.gate)
    assert layer_bytes(SHAPE, 10**5, 0.5).total - layer_bytes(SHAPE, 10**5, 0.0).total == pytest.approx(0, abs=1)


@pytest.mark.parametrize(
    ("model", "num_tokens", "cap"),
    [
        ("qwen3.5-35b-a3b", 1, 2.29),
        ("qwen3.5-35b-a3b", 64, 1.86),
        ("llama-4-maverick", 512, 1.84),
        ("olmoe-1b-7b", 8, 1.69),
    ],
)
def test_byte_caps_of_the_method(model: str, num_tokens: int, cap: float) -> None:
    """The caps that follow from the paper's rule at each model's cutoff, uniform routing, independent masks."""
    known = KNOWN_MODELS[model]
    assert known.cutoff is not None
    sparse, dense = layer_bytes(known.shape, num_tokens, known.cutoff), dense_bytes(known.shape, num_tokens)
    assert (dense.gate + dense.up_down) / (sparse.gate + sparse.up_down) == pytest.approx(cap, abs=0.01)


def test_skipped_pairs_save_their_gate() -> None:
    routed = layer_bytes(SHAPE, 1, 0.9, pair_skip=0.35)
    assert dense_bytes(SHAPE, 1).gate * 0.65 == pytest.approx(routed.gate)
    dense = dense_bytes(SHAPE, 1)
    assert (dense.gate + dense.up_down) / (routed.gate + routed.up_down) == pytest.approx(3.53, abs=0.01)


def test_estimates_order_as_measured() -> None:
    """Dense layers measured on an H200: 25, 110, 260, 403, 730 us at T = 1, 8, 32, 128, 4096."""
    for num_tokens, us in ((1, 25), (8, 110), (32, 260), (128, 403), (4096, 730)):
        assert estimate_us(Plan("dense"), SHAPE, num_tokens, 0.0, H200) == pytest.approx(us, rel=0.25)


def test_sums_added_chunk_by_chunk_cost_as_measured() -> None:
    """A hidden dimension too wide for sums in registers: qwen3.5-122b-a10b on an H200 at 87.4 %, 2026-11-29."""
    shape = KNOWN_MODELS["qwen3.5-122b-a10b"].shape
    plan = fused(gate_stages=1, row_stages=3, keep_sums=0, max_pairs=1024)
    measured = {1: 30.9, 2: 45.8, 4: 75.8, 8: 132.6, 16: 229.1, 32: 381.8, 64: 647.0, 128: 1038.0}
    for num_tokens, us in measured.items():
        assert estimate_us(plan, shape, num_tokens, 0.874, H200) == pytest.approx(us, rel=0.2)
    for num_tokens, kind in ((1, "fused"), (2, "fused"), (16, "staged"), (128, "staged")):
        for sparsity in (0.7, 0.85):
            assert plan_for(shape, num_tokens, sparsity, H200).kind == kind


# ---- choice ----------------------------------------------------------------------------------------------------------


def test_default_choice() -> None:
    assert plan_for(SHAPE, 8, 0.85, "cpu") == Plan("cpu")
    assert plan_for(SHAPE, 1, 0.845, H200).kind == "fused"
    assert plan_for(SHAPE, 8, 0.845, H200).kind == "fused"
    assert plan_for(SHAPE, 16384, 0.845, H200) == Plan("dense")
    assert plan_for(SHAPE, 0, 0.845, H200).kind in ("fused", "dense")


@pytest.mark.parametrize("model", KNOWN_MODELS.values(), ids=lambda model: model.name)
def test_choice_is_legal_for_every_known_model(model: Any) -> None:
    for tensor_parallel in (1, 2, 4, 8):
        shape = model.shape.shard(tensor_parallel)
        for num_tokens in (1, 7, 32, 100, 512, 5000):
            plan = plan_for(shape, num_tokens, model.cutoff or 0.8, H200, activation=model.activation)
            assert plan.kind in ("fused", "staged", "dense")
            assert illegal_reason(plan, shape, num_tokens, model.activation) is None


@pytest.mark.parametrize("model", KNOWN_MODELS.values(), ids=lambda model: model.name)
def test_fewer_inactive_neurons_than_those_of_skipped_pairs(model: Any) -> None:
    """Thresholds of 0, and pairs skipped all the same."""
    for num_tokens in (1, 8, 64, 512):
        assert plan_for(model.shape, num_tokens, 0.0, H200, 0.35, model.activation).kind in ("fused", "staged", "dense")


def test_activations_without_kernel_take_the_dense_path() -> None:
    assert "relu" not in KERNEL_ACTIVATIONS
    assert plan_for(SHAPE, 1, 0.9, H200, 0.0, "relu") == Plan("dense")


@pytest.mark.parametrize("arguments", [(-1, 0.5, 0.0), (1, 1.5, 0.0), (1, float("nan"), 0.0), (1, 0.5, -0.1)])
def test_numbers_out_of_range_are_refused(arguments: tuple[int, float, float]) -> None:
    num_tokens, sparsity, pair_skip = arguments
    with pytest.raises(ValueError, match="must be"):
        plan_for(SHAPE, num_tokens, sparsity, H200, pair_skip)


def test_repeated_choice_is_a_lookup() -> None:
    device = torch.device("cuda", 0)
    plan_for(SHAPE, 8, 0.85, device)
    times = []
    for _ in range(20):  # the best of many short runs: other work on the machine only ever adds
        start = time.perf_counter()
        for _ in range(2000):
            plan_for(SHAPE, 8, 0.85, device)
        times.append((time.perf_counter() - start) / 2000)
    assert min(times) < 2e-6


# ---- tuned tables ----------------------------------------------------------------------------------------------------

BEST = {8: fused(tile_neurons=16), 32: fused(tile_neurons=64), 512: Plan("dense")}


def table(**metadata: str) -> TunedTable:
    known = {"gpu": H200.name, "driver": H200.driver, "library": "0.1.0", "dsl": dsl_version(), "date": "2026-11-23"}
    entries = [
        Entry(tokens, sparsity, 0.0, plan if sparsity else Plan("dense"), 10.0, (Measurement(plan, 10.0),))
        for tokens, plan in BEST.items()
        for sparsity in (0.0, 0.7, 0.9)
    ]
    return TunedTable(SHAPE, "bf16", known | {"dense": "vllm", "timing": "test"} | metadata, tuple(entries))


def write(folder: Path, content: TunedTable | str) -> Path:
    path = table_path(folder, SHAPE, H200.name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content.to_json()))
    return path


def test_table_survives_json_and_has_the_designed_name(tuned_folder: Path) -> None:
    made = replace(
        table(), entries=(*table().entries, replace(table().entries[0], tried=(Measurement(fused(), failure="x"),)))
    )
    assert TunedTable.from_json(json.loads(json.dumps(made.to_json()))) == made
    assert table_path(tuned_folder, SHAPE, H200.name) == (
        tuned_folder / "NVIDIA_H200" / "E=256,H=2048,I=512,k=8,bf16.json"
    )


@pytest.mark.parametrize(("num_tokens", "bucket"), [(1, 8), (8, 8), (9, 32), (32, 32), (33, 512), (512, 512)])
def test_nearest_bucket_above(tuned_folder: Path, num_tokens: int, bucket: int) -> None:
    write(tuned_folder, table())
    assert plan_for(SHAPE, num_tokens, 0.85, H200) == BEST[bucket]


def test_above_the_last_bucket_the_cost_model_decides(tuned_folder: Path) -> None:
    expected = plan_for(SHAPE, 513, 0.85, H200)
    forget_plans()
    write(tuned_folder, table())
    assert plan_for(SHAPE, 513, 0.85, H200) == expected


def test_nearest_sparsity(tuned_folder: Path) -> None:
    write(tuned_folder, table())
    assert plan_for(SHAPE, 8, 0.05, H200) == Plan("dense")
    assert plan_for(SHAPE, 8, 0.65, H200) == BEST[8]
    assert table().lookup(8, 0.8, 0.1) == BEST[8]


def test_entries_far_away_do_not_count(tuned_folder: Path) -> None:
    write(tuned_folder, table())
    for sparsity, pair_skip in ((0.3, 0.0), (0.55, 0.0), (0.9, 0.35)):
        assert table().lookup(8, sparsity, pair_skip) is None
        tuned = plan_for(SHAPE, 8, sparsity, H200, pair_skip)
        forget_plans()
        assert tuned == plan_for(SHAPE, 8, sparsity, replace(H200, name="untuned"), pair_skip)


def test_a_dense_verdict_holds_for_the_dense_path_it_was_found_with(tuned_folder: Path) -> None:
    write(tuned_folder, table())
    assert plan_for(SHAPE, 512, 0.9, H200) == Plan("dense")
    forget_plans()
    write(tuned_folder, table(dense="library"))
    modelled = plan_for(SHAPE, 512, 0.9, replace(H200, name="untuned"))
    assert plan_for(SHAPE, 512, 0.9, H200) == modelled != Plan("dense")


def test_memory_comes_first(tuned_folder: Path) -> None:
    path = write(tuned_folder, table())
    found = find_table(SHAPE, H200)
    path.unlink()
    assert find_table(SHAPE, H200) is found
    forget_plans()
    assert find_table(SHAPE, H200) is None


def test_user_folder_comes_before_shipped(tmp_path: Path, tuned_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shipped = tmp_path / "shipped"
    monkeypatch.setattr("cutedsl_kernels.tuned_table.SHIPPED_DIR", shipped)
    write(shipped, table(date="shipped"))
    assert dict(find_table(SHAPE, H200).metadata)["date"] == "shipped"  # type: ignore[union-attr]
    write(tuned_folder, table(date="user"))
    forget_plans()
    assert dict(find_table(SHAPE, H200).metadata)["date"] == "user"  # type: ignore[union-attr]
    write(tuned_folder, "{")
    forget_plans()
    with pytest.warns(TunedTableWarning, match="ignored"):
        assert dict(find_table(SHAPE, H200).metadata)["date"] == "shipped"  # type: ignore[union-attr]


def _without(name: str) -> str:
    data = table().to_json()
    del data["entries"][0][name]
    return json.dumps(data)


def _illegal() -> str:
    data = table().to_json()
    data["entries"][1]["chosen"] = fused(tile_neurons=16, gate_stages=99).to_json()
    return json.dumps(data)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "null",
        "[" * 100_000,
        '{"format": "cutedsl-kernels-tuned/9"}',
        *(_without(f.name) for f in fields(Entry)),
        _illegal(),
        json.dumps(table().to_json() | {"dtype": "fp8"}),
        json.dumps(table().to_json() | {"shape": asdict(replace(SHAPE, top_k=4))}),
        json.dumps(table().to_json() | {"entries": 3}),
        json.dumps(table().to_json() | {"metadata": {}}),
    ],
)
def test_damaged_tables_warn_once_and_are_ignored(tuned_folder: Path, content: str) -> None:
    expected = plan_for(SHAPE, 8, 0.85, H200)
    forget_plans()
    path = write(tuned_folder, content)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warnings.simplefilter("ignore", ResourceWarning)  # of files that other tests left open, whenever they are freed
        assert plan_for(SHAPE, 8, 0.85, H200) == expected
        plan_for(SHAPE, 9, 0.85, H200)
    assert [w.category for w in caught] == [TunedTableWarning]
    assert "tuned table ignored" in str(caught[0].message)
    assert str(path) in str(caught[0].message)


def test_a_folder_in_place_of_the_table_is_ignored(tuned_folder: Path) -> None:
    table_path(tuned_folder, SHAPE, H200.name).mkdir(parents=True)
    with pytest.warns(TunedTableWarning, match="ignored"):
        plan_for(SHAPE, 8, 0.85, H200)


def test_another_gpu_is_not_used(tuned_folder: Path) -> None:
    write(tuned_folder, table(gpu="NVIDIA H100"))
    with pytest.warns(TunedTableWarning, match="made on 'NVIDIA H100'"):
        assert find_table(SHAPE, H200) is None


@pytest.mark.parametrize("name", ["driver", "dsl"])
def test_another_version_is_used_with_one_warning(tuned_folder: Path, name: str) -> None:
    write(tuned_folder, table(**{name: "1.2.3"}))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warnings.simplefilter("ignore", ResourceWarning)  # of files that other tests left open, whenever they are freed
        assert plan_for(SHAPE, 8, 0.85, H200) == BEST[8]
        plan_for(SHAPE, 1, 0.85, H200)
    assert [w.category for w in caught] == [TunedTableWarning]
    assert f"{name} 1.2.3" in str(caught[0].message)


def test_a_good_table_is_silent(tuned_folder: Path) -> None:
    write(tuned_folder, table())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plan_for(SHAPE, 8, 0.85, H200)


def test_user_folders_follow_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUTEDSL_KERNELS_CACHE_DIR", str(tmp_path / "compiled"))
    assert user_dir("cache") == tmp_path / "compiled"
    monkeypatch.delenv("CUTEDSL_KERNELS_CACHE_DIR")
    assert "cutedsl-kernels" in str(user_dir("cache"))


def test_shape_of_one_neuron_and_one_expert_gets_a_plan() -> None:
    assert plan_for(MoEShape(1, 1, 64, 1), 1, 0.5, H200).kind in ("fused", "staged", "dense")
