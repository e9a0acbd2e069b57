"""The corpus and the training script: splits, trigram, tokenizer, checkpoints that load as what was trained."""

from __future__ import annotations

import collections
import copy
import json
import math
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

pytestmark = pytest.mark.cpu

TOOLS = Path(__file__).resolve().parents[2] / "tools"
BUNDLED = TOOLS.parent / "models" / "tiny-olmoe"


@pytest.fixture(scope="module")
def tools() -> tuple[ModuleType, ModuleType]:
    sys.path.insert(0, str(TOOLS))
    try:
        import corpus
        import train_tiny_moe
    finally:
        sys.path.remove(str(TOOLS))
    return corpus, train_tiny_moe


def test_splits_are_disjoint_and_do_not_move(tools: tuple[ModuleType, ModuleType]) -> None:
    corpus, _ = tools
    files = corpus.source_files()
    everything = [path for split in corpus.SPLITS for path in files[split]]
    assert len(everything) == len(set(everything))
    contents = [path.read_bytes() for path in everything]
    assert len(set(contents)) == len(contents)
    sizes = {split: sum(path.stat().st_size for path in files[split]) for split in corpus.SPLITS}
    assert sizes["train"] > 5_000_000
    assert min(sizes["calibration"], sizes["held-out"]) > 200_000
    assert corpus.split_of("json/decoder.py") == corpus.split_of("json/decoder.py")
    assert corpus.split_of("test/test_json.py") == "train"
    assert corpus.split_of("statistics.py") == "calibration"
    assert corpus.split_of("doctest.py") == "held-out"


def test_excerpt_takes_from_every_file(tools: tuple[ModuleType, ModuleType], tmp_path: Path) -> None:
    corpus, _ = tools
    for i in range(200):
        (tmp_path / f"m{i}.py").write_text(f"# file {i:03d}\n" * 40)
    text = corpus.excerpt("held-out", 3000, tmp_path)
    count = len(corpus.source_files(tmp_path)["held-out"])
    assert len({line for line in text.split("\n") if len(line) == 10}) == count
    assert abs(len(text) - 3000) < 200


def test_corpus_command(tools: tuple[ModuleType, ModuleType], tmp_path: Path) -> None:
    out = tmp_path / "new" / "text"
    command = [sys.executable, str(TOOLS / "corpus.py"), "--split", "calibration"]
    subprocess.run([*command, "--out", str(out), "--max-bytes", "5000"], check=True, capture_output=True)
    assert 4000 < out.stat().st_size < 6000
    failed = subprocess.run([*command, "--out", str(tmp_path)], capture_output=True, text=True)
    assert failed.returncode == 2
    assert "cannot write" in failed.stderr


def test_trigram_equals_the_formula(tools: tuple[ModuleType, ModuleType], seed: int) -> None:
    _, training = tools
    generator = np.random.default_rng(seed)
    train = generator.integers(0, 5, 400).astype(np.int16)
    test = generator.integers(0, 6, 60).astype(np.int16)
    counts = [collections.Counter(tuple(train[i : i + n]) for i in range(len(train) - n + 1)) for n in (1, 2, 3)]

    def probability(context: tuple, symbol: int) -> float:
        order = len(context)
        lower = probability(context[1:], symbol) if order else 1 / training.SYMBOLS
        table = {key: n for key, n in counts[order].items() if key[:-1] == context}
        seen, kinds = sum(table.values()), len(table)
        return lower if not seen else (table.get((*context, symbol), 0) + kinds * lower) / (seen + kinds)

    wanted = [-math.log2(probability(tuple(test[i - 2 : i]), test[i])) for i in range(2, len(test))]
    assert training.trigram_bits(train, test) == pytest.approx(np.mean(wanted), rel=1e-9)


@pytest.mark.parametrize("architecture", ["olmoe", "mixtral", "qwen2moe"])
def test_checkpoint_loads_as_trained(
    architecture: str, tools: tuple[ModuleType, ModuleType], tmp_path: Path, seed: int
) -> None:
    import transformers

    _, training = tools
    torch.manual_seed(seed)
    model = training.build_model(architecture, "ship", 64)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16())
    ids = torch.randint(256, (1, 24))
    every = copy.deepcopy(model)
    training.use_all_experts(every)
    losses = [m(input_ids=ids, labels=ids).loss for m in (model, every)]
    torch.testing.assert_close(losses[0], losses[1])
    for loss in losses:
        loss.backward()
    for a, b in zip(model.parameters(), every.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-5 + 1e-3 * a.grad.abs().max().item())
    training.save_checkpoint(model, tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert torch.equal(loaded(input_ids=ids).logits, model(input_ids=ids).logits)


def test_tokens_are_bytes(tools: tuple[ModuleType, ModuleType], tmp_path: Path) -> None:
    import transformers

    _, training = tools
    training.write_tokenizer(tmp_path, 64)
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    text = "".join(map(chr, range(300))) + "def f():\n\treturn 'é€😀'"
    assert tokenizer.encode(text) == list(text.encode())
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode("a<|endoftext|>") == [97, training.END_OF_TEXT]
    assert len(tokenizer) == training.VOCABULARY


def test_bundled_model_is_small_and_better_than_a_trigram(tools: tuple[ModuleType, ModuleType]) -> None:
    import transformers

    corpus, training = tools
    assert sum(path.stat().st_size for path in BUNDLED.iterdir()) < 8 * 2**20
    record = json.loads((BUNDLED / "training.json").read_text())
    assert record["held_out_bits_per_byte"] < record["trigram_bits_per_byte"]
    model = transformers.AutoModelForCausalLM.from_pretrained(BUNDLED, dtype=torch.float32)
    held_out = training.stream(corpus.read_split("held-out"))[:200_000:][-12_288:]
    bits = training.model_bits(model, held_out, 1024, torch.device("cpu"))
    trigram = training.trigram_bits(training.stream(corpus.read_split("calibration")), held_out)
    assert bits < 2.2
    assert bits < trigram


def test_a_short_run_writes_everything(
    tools: tuple[ModuleType, ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus, training = tools
    tiny = {split: [b"import os\nprint(os.name)\n" * 200] for split in corpus.SPLITS}
    monkeypatch.setattr(corpus, "read_split", lambda split: tiny[split])
    monkeypatch.setitem(
        training.SIZES, ("olmoe", "ship"), {"hidden": 32, "inter": 16, "experts": 4, "top_k": 2, "heads": 2}
    )
    out = tmp_path / "model"
    options = [
        "--steps",
        "30",
        "--context",
        "64",
        "--batch-tokens",
        "256",
        "--evaluate-symbols",
        "512",
        "--device",
        "cpu",
    ]
    monkeypatch.setattr(sys, "argv", ["train", *options, "--minutes", "1", "--out", str(out)])
    assert training.main() == 0
    record = json.loads((out / "training.json").read_text())
    assert record["steps"] == 30
    assert record["held_out_bits_per_byte"] < 7.5
    training.pack(out, tmp_path / "packed")
    assert [path.name for path in (tmp_path / "packed").iterdir()] == ["model.tar.0"]
