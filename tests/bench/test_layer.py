"""`bench layer` end to end on the CPU back end: rows, their columns, what gets no number, and bad input."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cutedsl_kernels.bench import layer
from cutedsl_kernels.bench.plans import resolve_plans
from cutedsl_kernels.bench.problems import Rule, make_batch, make_weights
from cutedsl_kernels.bench.records import COLUMNS, CsvWriter, format_table, read_rows
from cutedsl_kernels.bench.serving import NoServing, serving_plan, vllm_dense_calls

from cutedsl_kernels import UserError
from cutedsl_kernels.cli import build_app
from cutedsl_kernels.launch import ASSUMED_PAIR_SKIP
from cutedsl_kernels.shapes import MoEShape

pytestmark = pytest.mark.cpu
SMALL = ["--shape", "8,128,64,2", "--replays", "3", "--device", "cpu"]


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_rows_hold_every_column(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "sub" / "out.csv"
    words = [*SMALL, "--tokens", "1,5", "--sparsity", "0,0.8", "--baselines", "torch-dense,torch-grouped-mm"]
    assert layer.main([*words, "--csv", str(path)]) == 0
    rows = rows_of(path)
    assert len(rows) == 2 * (2 + 2)
    assert tuple(rows[0]) == COLUMNS
    for row in rows:
        assert float(row["us"]) > 0
        assert float(row["error"]) < 0.02
        assert float(row["ratio"]) == pytest.approx(float(row["baseline_us"]) / float(row["us"]), rel=0.02, abs=1e-3)
        assert row["baseline"] == "torch-dense"
        assert json.loads(row["config"]) == {}
        empty = {name for name in COLUMNS if row[name] == ""}
        assert empty <= {"driver", "triton", "dsl", "vllm", "mask_iou", "iou_target"}, empty
    assert [row["plan"] for row in rows[:4]] == ["torch-dense", "torch-grouped-mm", "cpu", "cpu"]
    assert [row["choice"] for row in rows[:4]] == ["baseline", "baseline", "auto", "auto"]
    assert float(rows[3]["sparsity"]) == pytest.approx(0.8, abs=0.05)
    assert rows[4]["num_tokens"] == "5"
    assert "8 rows in" in capsys.readouterr().out
    assert layer.main([*words, "--csv", str(path)]) == 0
    assert len(rows_of(path)) == 16, "a second run appends"


def test_a_wrong_path_gets_no_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def twice(*args: object, out: torch.Tensor, **kwargs: object) -> torch.Tensor:
        return out.fill_(1.0)

    monkeypatch.setattr(layer, "sparse_moe", twice)
    path = tmp_path / "out.csv"
    assert layer.main([*SMALL, "--tokens", "3", "--csv", str(path)]) == 1
    assert [row["plan"] for row in rows_of(path)] == ["torch-dense"]
    assert "WRONG" in capsys.readouterr().err


def test_a_failing_path_gets_no_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*args: object, **kwargs: object) -> torch.Tensor:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(layer, "sparse_moe", fails)
    assert layer.main([*SMALL, "--tokens", "3"]) == 1
    assert "RuntimeError: no such kernel" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--shape", "1,2"], "must be E,H,I,k"),
        (["--shape", "8,128,64,9"], "k at most E"),
        (["--calls", "0"], "must be an integer of at least 1"),
        (["--copies", "-1"], "must be an integer of at least 1"),
        (["--replays", "1"], "must be an integer of at least 2"),
        (["--model", "gpt-9"], "--model must be one of"),
        (["--tokens", "0"], "must be positive integers"),
        (["--sparsity", "1.5"], "must be a number in 0..1"),
        (["--sparsity", "0.2", "--pair-skip", "0.3"], "sparsity must lie between pair_skip"),
        (["--baselines", "fast"], "baselines must be among"),
        (["--plans", "best"], "plan must be one of"),
        (["--device", "tpu"], "--device must be cuda"),
        (["--tp", "7"], "--tp must divide"),
        (["--iou", "0.01"], "iou must lie in"),
        (["--csv", "/proc/none/x.csv"], "cannot write the CSV"),
        (["--replay", "3"], "unrecognized arguments"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = words if words[0] in ("--shape", "--model") else ["--shape", "8,128,64,2", *words]
    if "--device" not in given:
        given = [*given, "--device", "cpu"]
    try:
        code = layer.main(given)
    except SystemExit as exit:  # argparse
        code = exit.code
    lines = capsys.readouterr().err.strip().splitlines()
    assert code == 2
    assert len(lines) == 1
    assert message in lines[0]


def test_plans_by_name() -> None:
    shape, gpu = MoEShape(64, 8, 2048, 1024), torch.device("cuda")
    ask = lambda text: resolve_plans(text, shape, 8, 0.85, 0.0, gpu)  # noqa: E731
    assert [plan.kind for plan in ask("dense")] == ["dense"]
    assert len(ask("auto")) == 1
    assert len(set(ask("fused:4"))) == 4
    (one,) = ask("fused[tile_neurons=64]")
    assert one.config.tile_neurons == 64
    for text, message in (
        ("fused[colour=1]", "fields"),
        ("fused[tile_neurons=7]", "cannot run"),
        ("quick", "plan must be one of"),
    ):
        with pytest.raises(UserError, match=message):
            ask(text)


def test_csv_of_other_columns_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.csv"
    path.write_text("a,b\n1,2\n")
    with pytest.raises(UserError, match="other columns"):
        CsvWriter(path)
    with pytest.raises(UserError, match="not a benchmark CSV"):
        read_rows([path])
    with pytest.raises(UserError, match="cannot read"):
        read_rows([tmp_path / "missing.csv"])


def test_table_text() -> None:
    assert format_table(["name", "us"], [["a", "1.5"], ["long", "10"]]) == "name   us\n----  ---\na     1.5\nlong   10"


def test_it_runs_from_a_checkout_that_is_not_installed(tmp_path: Path) -> None:
    """As on a host without typer and rich: `python -m bench.layer` with only the checkout and site-packages."""
    root = Path(__file__).parents[2]
    program = (
        "import sys, runpy\n"
        f"sys.path[:] = [{str(root)!r}] + [p for p in sys.path if p] + [{str(Path(torch.__file__).parents[1])!r}]\n"
        "for name in ('typer', 'rich', 'platformdirs'): sys.modules[name] = None\n"
        f"sys.argv = ['bench.layer'] + {[*SMALL, '--tokens', '2']!r}\n"
        "runpy.run_module('bench.layer', run_name='__main__', alter_sys=True)\n"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-S", "-c", program], cwd=tmp_path, capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert "torch-dense" in done.stdout


def test_the_command_line_forwards(capsys: pytest.CaptureFixture[str]) -> None:
    from typer.testing import CliRunner

    result = CliRunner().invoke(build_app(), ["bench", "layer", *SMALL, "--tokens", "2"])
    assert result.exit_code == 0, result.output
    assert "cpu*" in result.output
    assert CliRunner().invoke(build_app(), ["bench", "layer", "--tokens", "x"]).exit_code == 2


def test_the_serving_choice_on_a_cpu_is_the_back_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "out.csv"
    assert layer.main([*SMALL, "--tokens", "3", "--plans", "serving", "--csv", str(path)]) == 0
    assert [(row["plan"], row["choice"]) for row in rows_of(path)] == [("torch-dense", "baseline"), ("cpu", "serving")]
    assert "runs instead" not in capsys.readouterr().out
    assert layer.main([*SMALL, "--tokens", "3", "--plans", "fused"]) == 0
    assert "plan fused: on a CPU the CPU back end runs instead" in capsys.readouterr().out


def test_the_serving_plan_is_the_one_of_the_plugin(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against LayerState.choose_plans itself, with the warm-up of the kernels left out."""
    from cutedsl_kernels.integration.vllm import state as plugin

    from cutedsl_kernels import ExpertWeights

    shape = MoEShape(64, 8, 2048, 1024)
    weights = ExpertWeights(torch.empty(64, 2048, 2048, device="meta"), torch.empty(64, 1024, 2048, device="meta"))
    monkeypatch.setattr(plugin, "supports_kernels", lambda weights: True)
    monkeypatch.setattr(plugin, "warmup", lambda *args, **kwargs: 0)
    kinds = set()
    for sparsity, rho, skip in ((0.0, 0.0, None), (0.85, 0.0, None), (0.9, 0.1, None), (0.9, 0.1, 0.35)):
        tau = torch.zeros(1, 1)
        shares = {"sparsity": sparsity, "pair_skip": skip}
        layer_state = plugin.LayerState("l", weights, 8, "silu", False, tau, rho=rho, **shares)
        layer_state.choose_plans(None)
        one_by_one = plugin.LayerState("l", weights, 8, "silu", False, tau, rho=rho, **shares)
        for num_tokens in (5000, 512, 100, 8, 3, 1, 3):
            one_by_one.choose_plan(None, num_tokens)
            assert one_by_one.plan(num_tokens) == layer_state.plan(num_tokens)
        assert [bucket for bucket, _ in one_by_one.plans] == [1, 4, 8, 128, 512]
        for num_tokens in (1, 3, 8, 100, 512, 5000):
            known = skip or (ASSUMED_PAIR_SKIP if rho else 0.0)
            ours = serving_plan(shape, num_tokens, sparsity, known, torch.device("cuda"))
            assert ours == layer_state.plan(num_tokens), (num_tokens, sparsity, rho)
            kinds.add(ours.kind)
    assert {"dense", "fused"} <= kinds


def test_the_plugins_dense_path_needs_a_gpu(seed: int) -> None:
    batch = make_batch(make_weights(MoEShape(8, 2, 128, 64), 1, "cpu", torch.bfloat16, seed), 2, 4, calls=1, seed=seed)
    with pytest.raises(NoServing, match="CUDA"):
        vllm_dense_calls(batch, batch.cutoffs(Rule()))


def test_the_plugin_is_found_in_a_checkout_that_is_not_installed(tmp_path: Path) -> None:
    """Up to where it would touch a GPU: the imports that vllm_dense_calls makes."""
    root = Path(__file__).parents[2]
    program = (
        "import sys\n"
        f"sys.path[:] = [{str(root)!r}] + [p for p in sys.path if p] + [{str(Path(torch.__file__).parents[1])!r}]\n"
        "from importlib.util import find_spec\n"
        "assert find_spec('cutedsl_kernels.integration') is None\n"
        "from bench import serving\n"
        "serving.make_plugin_importable()\n"
        "from cutedsl_kernels.integration.vllm.dense import run_dense\n"
        "from cutedsl_kernels.integration.vllm.state import LayerState\n"
    )
    done = subprocess.run([sys.executable, "-S", "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
