"""On a Hopper GPU: captured graphs are checked and timed, every kind of plan gives rows, the tuner makes a table."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch
from cutedsl_kernels.autotune.command import main as autotune
from cutedsl_kernels.bench import layer
from cutedsl_kernels.bench.baselines import TorchDense
from cutedsl_kernels.bench.check import check, expectations
from cutedsl_kernels.bench.problems import Rule, make_batch, make_weights
from cutedsl_kernels.bench.timing import copy_bandwidth, prepare

from cutedsl_kernels import MoEShape
from cutedsl_kernels.tuned_table import TunedTable

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs an sm_90 GPU"
    ),
]
SHAPE = ["--shape", "16,1024,256,4"]


def test_graph_replays_are_checked_and_timed(seed: int) -> None:
    weights = make_weights(MoEShape(16, 4, 1024, 256), 3, "cuda", torch.bfloat16, seed)
    batch = make_batch(weights, 4, 8, calls=6, seed=seed)
    prepared = prepare(TorchDense().calls(batch), "cuda")
    assert check(prepared, expectations(batch, batch.cutoffs(Rule()))) < 0.02
    timing = prepared.measure(replays=5)
    assert timing.calls == 6
    assert 1 < timing.median_us < 100_000
    assert copy_bandwidth("cuda") > 500


def test_layer_benchmark_measures_every_kind_of_plan(tmp_path: Path) -> None:
    path = tmp_path / "out.csv"
    words = [*SHAPE, "--tokens", "1,32", "--sparsity", "0.8", "--plans", "auto,fused,staged,dense", "--csv", str(path)]
    assert layer.main([*words, "--baselines", "torch-dense"]) == 0
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["plan"] for row in rows} >= {"torch-dense", "fused", "staged", "dense"}
    assert all(float(row["us"]) > 0 and row["driver"] for row in rows)


def test_tuner_makes_a_table_on_the_device(tmp_path: Path) -> None:
    words = [*SHAPE, "--tokens", "4", "--sparsity", "0.8", "--candidates", "3", "--dense", "library"]
    assert autotune([*words, "--out", str(tmp_path)]) == 0
    (path,) = [p for p in tmp_path.rglob("*.json") if "compiled" not in p.parts]
    table = TunedTable.from_json(json.loads(path.read_text()))
    assert table.metadata["gpu"] == torch.cuda.get_device_name()
    (entry,) = table.entries
    assert sum(m.us is not None for m in entry.tried) >= 3, [m.failure for m in entry.tried]
