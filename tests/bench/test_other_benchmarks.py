"""roofline, launch, compaction and compile: figures where they are known, and that they run."""

from __future__ import annotations

import pytest
from cutedsl_kernels.bench import compaction, compile, e2e, launch, roofline

from cutedsl_kernels import KNOWN_MODELS

pytestmark = pytest.mark.cpu
SMALL = ["--shape", "8,128,64,2"]


def test_roofline_gives_the_figures_of_the_method() -> None:
    shape = KNOWN_MODELS["qwen3.5-35b-a3b"].shape
    rows = roofline.roofline_rows(shape, [1, 8, 128, 16384], 0.845, 0.0, 4300, 320)
    assert [row[3] for row in rows] == ["2.29x", "2.24x", "1.54x", "1.00x"]
    assert float(rows[0][4]) == pytest.approx(12, abs=0.5)
    assert float(rows[1][4]) == pytest.approx(84, abs=1)
    (routed,) = roofline.roofline_rows(shape, [16384], 0.9, 0.35, 4300, 320)
    assert routed[6] == "1.54x"


def test_roofline_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert roofline.main(["--device", "cpu", "--tokens", "1,8"]) == 0
    out = capsys.readouterr().out
    assert "assumed: an H200's" in out
    assert roofline.main(["--device", "cpu", "--sparsity", "0.3", "--pair-skip", "0.5"]) == 2
    assert roofline.main(["--device", "cpu", "--copy-gbps", "-1"]) == 2


def test_choosing_a_plan_costs_less_than_two_microseconds(capsys: pytest.CaptureFixture[str]) -> None:
    assert launch.main([*SMALL, "--device", "cpu", "--tokens", "1,64"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("plan_for")]
    assert len(lines) == 2
    for *_, fastest in lines:
        assert float(fastest) < 2.0


def test_compaction_runs_and_checks(capsys: pytest.CaptureFixture[str]) -> None:
    assert compaction.main([*SMALL, "--device", "cpu", "--tokens", "1,3", "--replays", "3"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in out[-2:]] == [["cpu", "1"], ["cpu", "3"]]


@pytest.mark.compile
def test_compile_cold_and_warm(capsys: pytest.CaptureFixture[str]) -> None:
    assert compile.main(["--shape", "8,512,128,2"]) == 0
    cold, warm = (line.split() for line in capsys.readouterr().out.splitlines()[-2:])
    assert cold[-1] == "1"
    assert warm[-1] == "0"
    assert float(warm[-2]) < float(cold[-2])


def test_decode_step_is_the_difference_of_two_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = 0.0

    def generate(prompts: list[list[int]], tokens: int) -> None:
        nonlocal clock
        assert len(prompts) == 4
        assert all(len(prompt) == 7 for prompt in prompts)
        clock += 5.0 + 0.003 * tokens  # five seconds of prompt, three milliseconds a token

    monkeypatch.setattr(e2e.time, "perf_counter", lambda: clock)
    assert e2e.decode_ms(generate, 4, 7, 32, 100, rounds=3) == pytest.approx(3.0)
