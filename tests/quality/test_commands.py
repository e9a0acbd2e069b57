"""Mistakes on the command line of evaluate, generate and recommend: one line, exit code 2, before any engine
starts.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from cutedsl_kernels.cli import main

pytestmark = pytest.mark.cpu

MODEL = Path(__file__).resolve().parents[2] / "models" / "tiny-olmoe"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("recommend {model} --text {text}", "no quality bar: give --max-kl"),
        ("recommend {model} --text {text} --max-kl 0", "--max-kl must be above 0, got 0"),
        ("recommend {model} --text {text} --max-flips 2", "--max-flips must lie between 0 and 1, got 2"),
        ("recommend {model} --text {text} --max-kl 1 --precision 0.9", "--precision must lie in 0.001..0.2"),
        ("recommend {model} --text {none} --max-kl 1", "none.txt: cannot be read"),
        ("recommend {model} --text {text} --max-kl 1 --profile {dir}/p.json --out /x.json", "must lie in the folder"),
        ("evaluate {model} --text {text} --max-tokens 2", "--max-tokens must be at least 16, got 2"),
        ("evaluate {model} --text {text} --plot {dir}", "--plot {dir}: cannot be written"),
        ("evaluate {model} --text {text} --tasks , ", "--tasks must name at least one"),
        ("generate {model} --prompt x --temperature -1", "--temperature must be at least 0"),
        ("generate {model} --prompt-file {none}", "none.txt: cannot be read"),
        ("calibrate {model} --text {text} --budget best", "--budget must be one of uniform, shared, greedy, fisher"),
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
