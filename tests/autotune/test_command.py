"""`autotune` from the command line: simulated runs end to end, killed and resumed, raced, and bad input."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from cutedsl_kernels.autotune import regret, search
from cutedsl_kernels.autotune.command import build_parser, layer_of, main
from cutedsl_kernels.autotune.space import specs_of

from cutedsl_kernels import KNOWN_MODELS, MoEShape, Plan, plan_for
from cutedsl_kernels.configs import FusedConfig
from cutedsl_kernels.cost_model import Gpu
from cutedsl_kernels.plan import forget_plans
from cutedsl_kernels.tuned_table import TunedTable, table_path

pytestmark = pytest.mark.cpu
SHAPE = MoEShape(64, 8, 2048, 1024)
NAME = ["--shape", "64,2048,1024,8"]
SIMULATED = f"simulated {Gpu().name}"


def table_of(folder: Path) -> TunedTable:
    return TunedTable.from_json(json.loads(table_path(folder, SHAPE, SIMULATED).read_text()))


@pytest.fixture(autouse=True)
def own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUTEDSL_KERNELS_TUNED_DIR", str(tmp_path / "user"))
    monkeypatch.setenv("CUTEDSL_KERNELS_CACHE_DIR", str(tmp_path / "cache"))


def test_a_table_is_made_and_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [*NAME, "--simulate", "1", "--tokens", "1,3,8", "--sparsity", "0.5,0.9", "--pair-skip", "0,0.35"]
    assert main(words) == 0
    table = table_of(tmp_path / "user")
    assert len(table.entries) == 3 * 4
    assert table.metadata["timing"] == "simulated with seed 1"
    forget_plans()
    gpu = Gpu(name=SIMULATED)
    for entry in table.entries:
        assert plan_for(SHAPE, entry.num_tokens, entry.sparsity, gpu, entry.pair_skip) == entry.chosen
    (eight,) = [e for e in table.entries if (e.num_tokens, e.sparsity, e.pair_skip) == (8, 0.9, 0.0)]
    assert plan_for(SHAPE, 5, 0.88, gpu) == eight.chosen, "the bucket above, the nearest sparsity"
    forget_plans()
    assert "x dense" in capsys.readouterr().out


def test_a_sparsity_with_a_pair_skip_of_its_own(tmp_path: Path) -> None:
    assert main([*NAME, "--simulate", "1", "--tokens", "8", "--sparsity", "0.5,0.9:0.35"]) == 0
    assert {(e.sparsity, e.pair_skip) for e in table_of(tmp_path / "user").entries} == {(0.5, 0.0), (0.9, 0.35)}


def test_a_checkpoint_of_a_known_architecture(tmp_path: Path) -> None:
    """gpt-oss's config says silu; its layers have a clamped activation and biases, so other kernels."""
    config = {"num_local_experts": 32, "num_experts_per_tok": 4, "hidden_size": 2880, "intermediate_size": 2880}
    file = tmp_path / "config.json"
    file.write_text(json.dumps(config | {"hidden_act": "silu", "architectures": ["GptOssForCausalLM"]}))
    layer, _ = layer_of(build_parser("autotune").parse_args(["--model", str(file)]))
    assert (layer.activation, layer.has_bias, layer.weight_on_input) == ("swigluoai", True, False)
    assert all(spec.keywords["has_bias"] for spec in specs_of(layer, Plan("fused", FusedConfig()), every_use=True))
    file.write_text(json.dumps(config | {"architectures": ["SomeOtherForCausalLM"]}))
    layer, _ = layer_of(build_parser("autotune").parse_args(["--model", str(file)]))
    assert (layer.activation, layer.has_bias) == ("silu", False)


def test_json_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*NAME, "--simulate", "1", "--tokens", "8", "--json", "--out", str(tmp_path / "out")]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["table"].startswith(str(tmp_path / "out"))
    (entry,) = report["entries"]
    assert entry["ratio"] == pytest.approx(entry["dense_us"] / entry["us"], abs=0.01)
    assert report["not_reached"] == []


def test_dry_run_ranks_the_space(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["--model", "qwen3.5-35b-a3b", "--dry-run", "--tokens", "8", "--candidates", "4", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["bins"]
    assert row["legal"] > 100
    assert len(row["candidates"]) == 5
    assert row["sparsity"] == KNOWN_MODELS["qwen3.5-35b-a3b"].cutoff
    assert main(["--model", "qwen3.5-35b-a3b", "--dry-run", "--tokens", "8", "--candidates", "4"]) == 0
    text = capsys.readouterr().out
    assert "legal plans, 5 would be timed" in text
    assert "dense" in text
    assert not (tmp_path / "user").exists()


def start(words: list[str], **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "cutedsl_kernels.autotune", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a background shell ignores it
    )


@pytest.mark.parametrize("kind", [signal.SIGKILL, signal.SIGINT], ids=lambda s: s.name)
def test_killed_half_way_and_resumed(kind: signal.Signals, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [*NAME, "--simulate", "1", "--tokens", "1,2,4,8,16,32", "--out", str(tmp_path / "out")]
    process = start([*words, "--simulate-delay", "0.02"])
    path = table_path(tmp_path / "out", SHAPE, SIMULATED)
    journal = path.with_name(path.name + ".partial")
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not (journal.exists() and len(journal.read_text().splitlines()) > 60):
        time.sleep(0.02)
    process.send_signal(kind)
    _, err = process.communicate(timeout=30)
    assert process.returncode == (130 if kind == signal.SIGINT else -kind)
    if kind == signal.SIGINT:
        assert "nothing is lost" in err
        assert "Traceback" not in err
    before = {
        (r["num_tokens"], json.dumps(r["plan"])): r["us"] for r in map(json.loads, journal.read_text().splitlines())
    }
    assert main([*words, "--resume", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    after = table_of(tmp_path / "out")
    assert len(after.entries) == 6
    again = [where for where, us in before.items() if quick_time(after, *where) != us]
    assert len(again) <= 6 * (search.FINALISTS + 1), "only the best of a size, and dense, are timed again"
    assert report["measured"] < sum(len(entry.tried) for entry in after.entries)
    assert not journal.exists()


def quick_time(table: TunedTable, num_tokens: int, plan: str) -> float | None:
    (entry,) = (e for e in table.entries if e.num_tokens == num_tokens)
    return next(m.us for m in entry.tried if json.dumps(m.plan.to_json()) == plan)


def test_two_tuners_in_one_folder(tmp_path: Path) -> None:
    out = ["--out", str(tmp_path / "out"), "--simulate", "1"]
    both = [start([*NAME, *out, "--tokens", tokens]) for tokens in ("1,2,4,8", "16,32,64,128")]
    for process in both:
        _, err = process.communicate(timeout=60)
        assert process.returncode == 0, err
    assert [e.num_tokens for e in table_of(tmp_path / "out").entries] == [1, 2, 4, 8, 16, 32, 64, 128]


def test_a_table_damaged_between_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [*NAME, "--simulate", "1", "--tokens", "8", "--out", str(tmp_path / "out")]
    assert main(words) == 0
    path = table_path(tmp_path / "out", SHAPE, SIMULATED)
    path.write_text(path.read_text()[:200])
    assert main([*words, "--resume"]) == 0
    assert "damaged table" in capsys.readouterr().err
    assert len(table_of(tmp_path / "out").entries) == 1


def test_a_profile_gives_shape_and_sparsities(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from cutedsl_kernels import SparsityProfile

    model = {"name": "m", "architecture": "A", "num_layers": 1, "num_experts": 64, "top_k": 8}
    profile = SparsityProfile.from_dict(
        {
            "format": "intra-expert-sparsity/1",
            "model": {**model, "hidden_size": 2048, "intermediate_size": 1024},
            "score": "gate",
            "router_weighted": False,
            "calibration": {"tokens": 10, "text_sha256": "0" * 64, "max_len": 8},
            "layers": {"l": {"targets": [0.5, 0.8], "thresholds": [0.1, 0.2], "pair_thresholds": [0.0, 0.0]}},
            "created": {"version": "0", "date": "d"},
        }
    )
    profile.save(tmp_path / "p.json")
    assert main(["--profile", str(tmp_path / "p.json"), "--dry-run", "--tokens", "8", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["shape"] == SHAPE.key
    assert [row["sparsity"] for row in report["bins"]] == [0.5, 0.8]


def test_a_checkpoint_and_its_ranks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = {"num_experts": 64, "num_experts_per_tok": 8, "hidden_size": 2048, "moe_intermediate_size": 1024}
    (tmp_path / "config.json").write_text(json.dumps(config))
    for path in (tmp_path, tmp_path / "config.json"):
        assert main(["--model", str(path), "--tp", "2", "--ep", "4", "--dry-run", "--tokens", "8", "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["shape"] == "E=16,H=2048,I=512,k=8"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "say what to tune"),
        (["--model", "olmoe-1b-7b", *NAME], "not both"),
        (["--model", "/no/such/place"], "No such file"),
        ([*NAME, "--tp", "3"], "does not divide"),
        ([*NAME, "--sparsity", "1.2"], "must be numbers in 0..1"),
        ([*NAME, "--sparsity", "0.2", "--pair-skip", "0.5"], "must not exceed --sparsity"),
        ([*NAME, "--tokens", "a"], "must be positive integers"),
        (["--shape", "1,2,3"], "must be E,H,I,k"),
        (["--shape", "8,128,64,9"], "k at most E"),
        ([*NAME, "--tp", "0"], "--tp must be at least 1, got 0"),
        ([*NAME, "--dry-run", "--compile-only"], "give one of --dry-run"),
        ([*NAME, "--device", "tpu"], "--device must be cuda, cuda:N or cpu"),
        (["--model", __file__], "not JSON"),
        ([*NAME, "--simulate", "1", "--out", "/proc/nowhere"], "cannot keep tuned tables"),
        (["--profile", "/no/profile.json"], "cannot read sparsity profile"),
        ([*NAME, "--budget", "0"], "--budget must be positive"),
        ([*NAME, "--candidates", "0"], "--candidates must be positive"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code = main(words)
    except SystemExit as exit:  # argparse
        code = exit.code
    lines = capsys.readouterr().err.strip().splitlines()
    assert code == 2
    assert len(lines) == 1
    assert message in lines[0]


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what a machine without a GPU can do")
def test_without_a_gpu_it_says_what_can_be_done(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(NAME) == 2
    assert "use --dry-run or --compile-only here" in capsys.readouterr().err


def test_regret_script(capsys: pytest.CaptureFixture[str]) -> None:
    assert regret.main([*NAME, "--simulate", "1", "--tokens", "1,8", "--limit", "0.05"]) == 0
    assert "largest regret" in capsys.readouterr().out
    assert regret.main([*NAME, "--simulate", "1", "--tokens", "8", "--candidates", "1", "--limit", "-1"]) == 1
    assert regret.main([]) == 2


@pytest.mark.compile
def test_compile_only_fills_the_cache(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--shape", "8,512,128,2", "--tokens", "1", "--candidates", "1", "--compile-only", "--processes", "1"]
    assert main([*words, "--out", str(tmp_path / "out"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"compiled": 1, "failed": 0}
    (made,) = (tmp_path / "out" / "compiled").rglob("*.o")
    written = made.stat().st_mtime_ns
    assert main([*words, "--out", str(tmp_path / "out")]) == 0
    assert made.stat().st_mtime_ns == written, "the second time nothing is compiled"
