"""The bundled model served: calibrated by the command line, with a profile, in batches."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cutedsl_kernels import SparsityProfile, UserError
from cutedsl_kernels.cli import main

pytestmark = pytest.mark.engine

ROOT = Path(__file__).resolve().parents[2]
MODEL = str(ROOT / "models" / "tiny-olmoe")
SKIP = 0.2


@pytest.fixture(scope="module")
def profile(tmp_path_factory: pytest.TempPathFactory, library_text: Callable[[str], Path]) -> Path:
    """Made by `cutedsl-kernels calibrate` from some files of the standard library."""
    out = tmp_path_factory.mktemp("profile") / "profile.json"
    texts = [
        part
        for name in ("argparse.py", "ast.py", "tarfile.py", "typing.py")
        for part in ("--text", str(library_text(name)))
    ]
    with pytest.raises(SystemExit) as ended:
        main(
            [
                "calibrate",
                MODEL,
                *texts,
                "--out",
                str(out),
                "--skip-pairs",
                str(SKIP),
                "--max-tokens",
                "24576",
                "--max-len",
                "256",
                "--learn-steps",
                "40",
            ]
        )
    assert ended.value.code == 0
    return out


def prompts(engine: Any, text: str, count: int, length: int) -> list[list[int]]:
    ids = engine.tokenizer.encode(text)
    return [ids[i * length : (i + 1) * length] for i in range(count)]


def test_calibrated_profile_gives_its_targets_on_other_text(
    profile: Path, engine: Callable[..., Any], library_text: Callable[[str], Path]
) -> None:
    """Mean over the layers within 1 point of the target, and of the share of pairs to skip, on other text."""
    found = SparsityProfile.load(profile)
    assert (found.score, found.model.num_layers, found.calibration.tokens) == ("learned-routed", 4, 24576)
    running = engine(MODEL, profile=profile, max_model_len=257)
    texts = prompts(running, library_text("subprocess.py").read_text(), 48, 256)
    running.set_counting(True)
    for target in (0.3, 0.5, 0.72, 0.9, 0.95):
        running.set_target(target)
        running.run(texts)
        layers = running.realised().values()
        assert abs(sum(layer.sparsity for layer in layers) / 4 - target) < 0.01
        assert abs(sum(layer.skipped_share for layer in layers) / 4 - SKIP) < 0.01


def generated(engine: Any, texts: list[list[int]]) -> list[list[int]]:
    from vllm import SamplingParams

    outputs = engine.generate(
        [{"prompt_token_ids": text} for text in texts], SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True)
    )
    return [list(output.outputs[0].token_ids) for output in outputs]


def test_an_engine_without_a_profile_does_not_start(
    checkpoint: Callable[[str], str], engine: Callable[..., Any]
) -> None:
    with pytest.raises(UserError, match="no sparsity profile"):
        engine(checkpoint("mixtral"))


def test_lora_switched_on_falls_back_and_says_so(
    checkpoint: Callable[[str], str], engine: Callable[..., Any], method_log: list[str]
) -> None:
    """Adapters may reach the experts, whose weights this method keeps in another layout: vLLM's own method runs."""
    with pytest.raises(UserError, match="no layer can use intra_expert_sparse"):
        engine(checkpoint("olmoe"), record=True, enable_lora=True)
    assert "LoRA adapters may apply to the experts" in "\n".join(method_log)


def test_every_stage_of_a_pipeline_loads_its_own_layers(
    checkpoint: Callable[[str], str], engine: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No further: two stages of vLLM's CPU build fail at the first batch, with its own method as well."""
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|0")
    folder = checkpoint("olmoe")
    alone = engine(folder, record=True).layer_names
    staged = engine(folder, record=True, pipeline_parallel_size=2)
    parts = staged.llm.collective_rpc("sparsity_layers")
    assert [name for part in parts for name in part] == alone
    assert len(parts) == 2
    assert all(parts)


def parameter_bytes(worker: Any) -> int:
    return sum(p.numel() * p.element_size() for p in worker.get_model().parameters())


def test_weights_take_the_memory_of_stock_vllm(checkpoint: Callable[[str], str], engine: Callable[..., Any]) -> None:
    """Re-laid in place: no second copy of w2 stays. (Loading needs one expert more: tests/test_weights.py.)"""
    folder = checkpoint("olmoe")  # stock vLLM pads I to a multiple of 32 on the CPU; here it is one
    stock = engine(folder, dense=True).llm.collective_rpc(parameter_bytes)
    ours = engine(folder, record=True).llm.collective_rpc(parameter_bytes)
    assert ours == stock


def test_random_batches_of_random_lengths(profile: Path, engine: Callable[..., Any], seed: int) -> None:
    """Chunked prefill, mixed with decoding: every request alone gives the tokens it gives in company."""
    running = engine(
        MODEL,
        profile=profile,
        target=0.8,
        dtype="float32",
        max_model_len=256,
        max_num_batched_tokens=64,
        max_num_seqs=6,
    )
    source = random.Random(seed)
    text = Path(random.__file__).read_text()
    ids = running.tokenizer.encode(text)
    texts = []
    for _ in range(8):
        start = source.randrange(len(ids) - 200)
        texts.append(ids[start : start + source.randrange(2, 200)])
    together = generated(running, texts)
    alone = [generated(running, [one])[0] for one in texts]
    assert together == alone
