"""Mistakes on the command line of evaluate, generate and recommend: one line, exit code 2, before any engine
starts.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

from cutedsl_kernels.cli import main
from cutedsl_kernels.cli.calibrate import _learn_or_give_up
from cutedsl_kernels.cli.recommend import _within_tasks, expected_gains, tuned_gains
from cutedsl_kernels.configs import Plan
from cutedsl_kernels.shapes import MoEShape
from cutedsl_kernels.tuned_table import Entry, Measurement, TunedTable

pytestmark = pytest.mark.cpu

MODEL = Path(__file__).resolve().parents[2] / "models" / "tiny-olmoe"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("recommend {model} --text {text}", "no quality bar: give --max-kl"),
        ("recommend {model} --text {text} --max-kl 0", "--max-kl must be above 0, got 0"),
        ("recommend {model} --text {text} --min-tasks 1.5", "--min-tasks must lie in 0..1, got 1.5"),
        ("recommend {model} --text {text} --min-tasks 0.95 --tasks ,", "--tasks must name at least one"),
        ("recommend {model} --text {text} --max-flips 2", "--max-flips must lie between 0 and 1, got 2"),
        ("recommend {model} --text {text} --max-kl 1 --precision 0.9", "--precision must lie in 0.001..0.2"),
        ("recommend {model} --text {none} --max-kl 1", "none.txt: cannot be read"),
        ("recommend {model} --text {text} --max-kl 1 --profile {dir}/p.json --out /x.json", "must lie in the folder"),
        (
            "evaluate {model} --text {text} --plot {dir}/q.xyz",
            "--plot {dir}/q.xyz: must end in one of .png, .svg, .pdf",
        ),
        ("generate {model} --prompt x --temperature nan", "--temperature must be at least 0, got nan"),
        ("calibrate {model} --text {text} --skip-pairs 0.5 --target 0.3", "is more than the largest --target 0.3"),
        ("calibrate {model} --text {text} --batch 8", "--batch is for --skip-pairs auto only"),
        ("calibrate {model} --text {text} --score gate --learn-steps 9", "--learn-steps is for the scores learned"),
        ("serve-check {model} --tensor-parallel-size 0", "--tensor-parallel-size must be at least 1, got 0"),
        ("evaluate {model} --text {text} --max-tokens 2", "--max-tokens must be at least 16, got 2"),
        ("evaluate {model} --text {text} --plot {dir}", "--plot {dir}: cannot be written"),
        ("evaluate {model} --text {text} --tasks , ", "--tasks must name at least one"),
        ("generate {model} --prompt x --temperature -1", "--temperature must be at least 0"),
        ("generate {model} --prompt-file {none}", "none.txt: cannot be read"),
        (
            "calibrate {model} --text {text} --budget best",
            "--budget must be one of uniform, shared, greedy, fisher, learned",
        ),
        ("calibrate {model} --text {text} --budget learned", "--budget learned needs --score learned-routed"),
        ("calibrate {model} --text {text} --batch 0", "--batch must be at least 1, got 0"),
        (
            "calibrate {model} --text {text} --skip-pairs most",
            "--skip-pairs must be a share in 0..1, or auto, got most",
        ),
    ],
)
def test_one_line(line: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.txt").write_text("some words " * 200)
    (tmp_path / "p.json").write_text("{}")
    places = {"model": MODEL, "text": tmp_path / "text.txt", "none": tmp_path / "none.txt", "dir": tmp_path}
    with pytest.raises(SystemExit) as ended:
        main([word.format(**places) for word in line.split()])
    error = capsys.readouterr().err
    assert ended.value.code == 2
    assert message.format(**places) in error.replace("\n", " ")
    assert "Traceback" not in error


def test_auto_goes_on_where_learning_fails() -> None:
    """A model that transformers opens in another way, or that does not fit, is calibrated all the same."""

    def fails() -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 20 GiB")

    said: list[str] = []
    assert _learn_or_give_up("learned-routed", fails, True, said.append) == ("moments-routed", None)
    assert said == [
        "score moments-routed: learning failed (OutOfMemoryError: CUDA out of memory. Tried to allocate 20 GiB)"
    ]
    with pytest.raises(torch.OutOfMemoryError):
        _learn_or_give_up("learned-routed", fails, False, said.append)
    parts: Any = object()
    assert _learn_or_give_up("learned-routed", lambda: parts, True, said.append) == ("learned-routed", parts)


def test_recommend_says_what_the_tasks_need(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.txt").write_text("some words " * 200)
    if importlib.util.find_spec("lm_eval") is not None:
        pytest.skip("lm-eval is installed")
    with pytest.raises(SystemExit) as ended:
        main(["recommend", str(MODEL), "--text", str(tmp_path / "text.txt"), "--min-tasks", "0.95"])
    assert ended.value.code == 2
    assert "needs lm-eval, which is not installed" in capsys.readouterr().err.replace("\n", " ")


def test_a_task_bar_is_searched_by_bisection(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Tasks that lose half their accuracy linearly hold 95 % of it up to a sparsity of 10 %."""

    def simple_evaluate(model: str, model_args: dict[str, Any], tasks: list[str]) -> dict[str, Any]:
        target = model_args.get("hf_overrides", {}).get("intra_expert_sparsity", {}).get("target_sparsity", 0.0)
        return {"results": {task: {"acc,none": 0.8 * (1 - target / 2)} for task in tasks}}

    monkeypatch.setitem(sys.modules, "lm_eval", SimpleNamespace(simple_evaluate=simple_evaluate))
    figures: dict[str, float] = {}
    console = Console(file=(tmp_path / "out").open("w"))
    best = _within_tasks("m", tmp_path / "p.json", ["a", "b"], 0.95, 0.99, 0.01, figures, console)
    assert best == pytest.approx(0.1, abs=0.01)
    assert figures["tasks_dense"] == pytest.approx(0.8)
    assert figures["tasks_mean"] == pytest.approx(0.8 * (1 - best / 2))


def test_gains_come_from_a_tuned_table_where_one_matches(monkeypatch: pytest.MonkeyPatch) -> None:
    identity = SimpleNamespace(num_experts=64, top_k=8, hidden_size=2048, intermediate_size=1024)
    shape = MoEShape(64, 8, 2048, 1024)
    dense = Measurement(Plan("dense"), us=40.0)
    rows = [(1, 0.85, 20.0), (8, 0.85, 30.0), (8, 0.8, 32.0), (32, 0.5, 10.0), (16, 0.85, 10.0)]
    entries = tuple(Entry(tokens, sparsity, 0.0, Plan("dense"), us, (dense,)) for tokens, sparsity, us in rows)
    table = TunedTable(shape, "bf16", {}, entries)
    monkeypatch.setattr("cutedsl_kernels.tuned_table.find_table", lambda asked, gpu: table if asked == shape else None)
    assert tuned_gains(identity, 0.84, 0.0) == {1: 2.0, 8: 1.25}
    assert tuned_gains(identity, 0.84, 0.3) == {}
    identity.hidden_size = 1024
    assert tuned_gains(identity, 0.84, 0.0) == {}
    assert expected_gains(identity, 0.85, 0.0)[1] == pytest.approx(2.31, abs=0.01)
