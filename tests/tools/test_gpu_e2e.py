"""What gpu_e2e.py writes, with the engines replaced by figures; the engines themselves run on a GPU only."""

from __future__ import annotations

import csv
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

pytestmark = pytest.mark.cpu

TOOLS = Path(__file__).resolve().parents[2] / "tools"
STEPS = {"stock": 9.0, "dense": 8.8, "paper": 6.0, "routed": 4.5}


@pytest.fixture
def e2e(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(TOOLS))
    import gpu_e2e

    monkeypatch.setattr(gpu_e2e, "facts", lambda: {"date": "2026-11-27", "gpu": "imaginary"})
    return gpu_e2e


def run(e2e: ModuleType, monkeypatch: pytest.MonkeyPatch, out: Path, *arguments: str) -> tuple[list[dict], list[str]]:
    """The rows of the CSV, and the stages that ran."""
    stages: list[str] = []

    def stage(args: Any, what: str, mode: str, folder: Path, environment: dict[str, str]) -> Any:
        stages.append(f"{what} {mode}")
        assert (folder / "config.json").is_file()
        if what == "calibrate":
            for name in ("paper.json", "routed.json"):
                (folder / name).write_text("{}")
            return {"realised": {"paper": (0.81, 0.0), "routed": (0.9, 0.34)}}
        assert mode not in e2e.CALIBRATED or (folder / f"{mode}.json").is_file()
        times = {"step_ms": STEPS[mode], "prefill_ms": 50.0, "prefill_fastest_ms": 40.0, "prefill_device_ms": 0.0}
        return {"times": {str(batch): times for batch in args.batches}}

    monkeypatch.setattr(e2e, "run_stage", stage)
    monkeypatch.setattr(sys, "argv", ["gpu_e2e.py", "--out", str(out), *arguments])
    assert e2e.main() == 0
    with out.open() as file:
        return list(csv.DictReader(file)), stages


def test_rows_of_every_mode_and_batch(e2e: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    rows, stages = run(e2e, monkeypatch, tmp_path / "out.csv", "--model", "qwen3.5-35b-a3b", "gpt-oss-20b")
    assert [(row["model"], row["mode"], row["batch"]) for row in rows] == [
        (model, mode, batch)
        for model in ("qwen3.5-35b-a3b", "gpt-oss-20b")
        for mode in e2e.MODES
        for batch in ("1", "8", "32", "128")
    ]
    assert stages.count("calibrate profiles") == 2
    routed = next(row for row in rows if row["mode"] == "routed" and row["batch"] == "8")
    assert (routed["ratio"], routed["prefill_ratio"], routed["prefill_device_ratio"]) == ("2.000", "1.000", "")
    assert (routed["sparsity"], routed["skipped_pairs"], routed["tokens_per_s"]) == ("0.9000", "0.3400", "1777.8")
    assert (routed["layers"], routed["architecture"]) == ("40", "Qwen3NextForCausalLM")


def test_only_what_needs_a_profile_is_calibrated(
    e2e: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    quick = ("--model", "qwen3-30b-a3b", "--quick")
    rows, stages = run(e2e, monkeypatch, tmp_path / "out.csv", *quick, "--modes", "dense")
    assert stages == ["measure dense"]
    assert {(row["baseline"], row["ratio"]) for row in rows} == {("", "")}
    kept = ("--profiles", str(tmp_path / "kept"), "--modes", "paper")
    for expected in (["calibrate profiles", "measure paper"], ["measure paper"]):
        rows, stages = run(e2e, monkeypatch, tmp_path / "out.csv", *quick, *kept)
        assert stages == expected
        assert {row["sparsity"] for row in rows} == {"0.8100"}
