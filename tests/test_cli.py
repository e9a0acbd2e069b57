"""The command line: every mistake is one line on stderr and exit code 2. Commands at work: tests of their packages."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cutedsl_kernels import UserError
from cutedsl_kernels.cli import COMMANDS, main

pytestmark = pytest.mark.cpu

ROOT = Path(__file__).resolve().parent.parent
MODEL = str(ROOT / "models" / "tiny-olmoe")


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with good text, bad text, a dense model's config, an empty folder and a profile of another model."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "text.txt").write_text("import os\n" * 4000)
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00\x01" * 100)
    (tmp_path / "nothing").mkdir()
    dense = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 64, "intermediate_size": 128}
    (tmp_path / "dense").mkdir()
    (tmp_path / "dense" / "config.json").write_text(json.dumps(dense))
    (tmp_path / "profile.json").write_text('{"format": "intra-expert-sparsity/1", "model": ')
    return tmp_path


def fails(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Runs the command line, expects exit code 2 and one line on stderr, and returns it."""
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    err = capsys.readouterr().err
    assert caught.value.code == 2
    assert err.startswith("error: ")
    assert err.count("\n") == 1, err
    return err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("nonsense", "No such command 'nonsense'"),
        ("doctor --nonsense", "No such option: --nonsense"),
        ("doctor now", "unexpected extra argument"),
        ("calibrate", "Missing argument"),
        ("calibrate {dir}/dense", "Missing option '--text'"),
        ("calibrate {dir}/none --text {dir}/text.txt", "{dir}/none: no such checkpoint folder"),
        ("calibrate {dir}/nothing --text {dir}/text.txt", "{dir}/nothing: no such checkpoint folder"),
        ("calibrate no-such/model --text {dir}/text.txt", "model no-such/model: no such folder"),
        ("calibrate {dir}/dense --text {dir}/text.txt", "not a Mixture-of-Experts model"),
        ("calibrate {model} --text {dir}/none.txt --out {dir}/o", "none.txt: cannot be read: No such file"),
        ("calibrate {model} --text {dir}/empty.txt --out {dir}/o", "empty.txt: is empty"),
        ("calibrate {model} --text {dir}/binary.txt --out {dir}/o", "binary.txt: cannot be read: not UTF-8"),
        ("calibrate {model} --text {dir}/text.txt --score best", "--score must be one of"),
        ("calibrate {model} --text {dir}/text.txt --target 1.5", "--target must lie between 0 and 1, got 1.5"),
        ("calibrate {model} --text {dir}/text.txt --skip-pairs -1", "--skip-pairs must be a share in 0..1"),
        ("calibrate {model} --text {dir}/text.txt --out {dir}", "is a folder"),
        ("calibrate {model} --text {dir}/text.txt --out /proc/o.json", "--out /proc/o.json: cannot"),
        ("calibrate {model} --text {dir}/text.txt --max-len many", "Invalid value for '--max-len'"),
        ("evaluate {dir}/dense --text {dir}/text.txt", "not a Mixture-of-Experts model"),
        ("evaluate {model} --text {dir}/text.txt --profile {dir}/none.json", "none.json: cannot read"),
        ("evaluate {model} --text {dir}/text.txt --profile {dir}/profile.json", "line 1: not valid JSON"),
        ("evaluate {model} --text {dir}/text.txt --target 2", "--target must lie between 0 and 1"),
        ("generate {model}", "no prompt given"),
        ("generate {model} --prompt x --target 2", "--target must lie between 0 and 1"),
        ("bench nonsense", "No such command 'nonsense'"),
        ("bench layer --model nonsense", "--model must be one of"),
        ("bench layer --tokens 0", "--tokens"),
    ],
)
def test_mistakes(arguments: str, message: str, files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    places = {"dir": files, "model": MODEL}
    line = fails(capsys, *(part.format(**places) for part in arguments.split()))
    assert message.format(**places) in line


def test_errors_of_commands_become_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from cutedsl_kernels.cli import doctor

    def raises(error: Exception) -> str:
        def system() -> list[doctor.Finding]:
            raise error

        monkeypatch.setattr(doctor, "_system", system)
        return fails(capsys, "doctor")

    assert raises(UserError("two\nlines")) == "error: two lines\n"
    assert raises(PermissionError(13, "Permission denied", "/somewhere")) == "error: /somewhere: Permission denied\n"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [str(Path(sys.executable).with_name("cutedsl-kernels")), *arguments]
    environment = {**os.environ, "COLUMNS": "200", "TERM": "dumb"}
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)


def test_installed_command_and_help() -> None:
    result = run()
    assert result.returncode == 0
    assert result.stderr == ""
    for command in COMMANDS:
        assert f" {command.replace('_', '-')} " in result.stdout


def test_installed_command_fails_in_one_line() -> None:
    result = run("calibrate", "/no/such/model", "--text", "README.md")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1


def test_doctor_says_which_path_and_why() -> None:
    import torch

    result = run("doctor")
    assert result.returncode == 0, result.stderr
    assert "cutedsl-kernels" in result.stdout
    assert torch.__version__ in result.stdout
    if not torch.cuda.is_available():
        assert "CPU back end: " in result.stdout
