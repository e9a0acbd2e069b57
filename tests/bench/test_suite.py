"""The suite's supervisor: budget, continuing, and workers that crash or hang."""

from __future__ import annotations

import sys
import textwrap
from pathlib import Path

import pytest
from cutedsl_kernels.bench import suite
from cutedsl_kernels.bench.records import read_rows
from cutedsl_kernels.bench.suite import PRESETS, Journal, supervise

pytestmark = pytest.mark.cpu

# A worker with four steps; step "c" does what the first argument says the first time it comes to it.
WORKER = """
import json, os, signal, sys, time
trouble = sys.argv[1]
journal = sys.argv[sys.argv.index("--journal") + 1]

def write(event, step):
    with open(journal, "a") as file:
        file.write(json.dumps({"event": event, "step": step, "note": "", "time": time.time()}) + "\\n")

closed = set()
if os.path.exists(journal):
    closed = {e["step"] for e in map(json.loads, open(journal)) if e["event"] in ("done", "left out")}
for step in "abcd":
    if step in closed:
        continue
    write("begin", step)
    if step == "c":
        if trouble == "crash":
            os.kill(os.getpid(), signal.SIGSEGV)
        if trouble == "hang":
            time.sleep(600)
    write("done", step)
"""


@pytest.fixture
def worker(tmp_path: Path) -> list[str]:
    script = tmp_path / "worker.py"
    script.write_text(textwrap.dedent(WORKER))
    return [sys.executable, str(script)]


@pytest.mark.parametrize("trouble", ["crash", "hang"])
def test_a_lost_worker_costs_its_step_only(trouble: str, worker: list[str], tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal")
    assert supervise([*worker, trouble], budget_s=60, stall_s=1.5, journal=journal) == 1
    assert journal.left_out() == {"c"}
    assert journal.closed() == set("abcd")


def test_a_clean_run_and_nothing_left_to_do(worker: list[str], tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal")
    assert supervise([*worker, "none"], 60, 10, journal) == 0
    events = len(journal.events())
    assert supervise([*worker, "none"], 60, 10, journal) == 0
    assert len(journal.events()) == events


def test_the_budget_ends_a_run_without_blaming_the_step(worker: list[str], tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal")
    assert supervise([*worker, "hang"], suite.LEAST_BUDGET_S + 1.5, 600, journal) == 0
    assert journal.left_out() == set()
    assert journal.open_step() == "c"


def test_the_budget_ends_between_two_steps_as_well(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [sys.executable, "-c", "import time; time.sleep(600)"]
    assert supervise(command, suite.LEAST_BUDGET_S + 1.5, 600, Journal(tmp_path / "journal")) == 0
    assert "budget spent" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [(["--only", "nothing"], "names no point of short"), (["--budget-s", "-5"], "--budget-s must be positive")],
)
def test_bad_input_is_one_line(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert suite.main(words) == 2
    assert message in capsys.readouterr().err


def test_a_worker_that_cannot_start_is_not_started_for_ever(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "import os; os._exit(9)"]
    assert supervise(command, 60, 10, Journal(tmp_path / "journal")) == 3


def test_a_journal_cut_off_in_a_line_is_read(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal")
    journal.write("begin", "a")
    with journal.path.open("a") as file:
        file.write('{"event": "do')
    assert journal.open_step() == "a"


def test_the_self_test_preset_and_continuing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    path = tmp_path / "out.csv"
    words = ["--preset", "self-test", "--device", "cpu", "--csv", str(path), "--replays", "3"]
    assert suite.main([*words, "--only", "T=1 "]) == 0
    first = read_rows([path])
    assert {row["num_tokens"] for row in first} == {"1"}
    assert suite.main(words) == 0
    rows = read_rows([path])
    assert rows[: len(first)] == first
    assert {row["num_tokens"] for row in rows[len(first) :]} == {"4"}
    assert [row["plan"] for row in rows if row["num_tokens"] == "4"] == ["torch-dense", "cpu", "cpu"]
    assert suite.main(["--list", "--preset", "h200-first"]) == 0
    assert "T=16384" in capfd.readouterr().out


def test_presets_name_shapes_that_exist() -> None:
    for preset in PRESETS.values():
        points = list(preset())
        assert points
        for point in points:
            assert suite.layer_named(point.model).shape.num_experts > 0
        steps = [point.step(rule, "auto") for point in points for rule in point.rules]
        assert len(steps) == len(set(steps)), "a step that is named twice would be measured once"
