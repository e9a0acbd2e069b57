"""KL, flips, perplexity, byte gain and text cutting against plain formulas."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path

import pytest
import torch
from rich.console import Console

from cutedsl_kernels import UserError
from cutedsl_kernels.quality.engine_eval import able_length
from cutedsl_kernels.quality.metrics import Comparison, agreement_length, byte_gain_batch_1, kl_to_dense
from cutedsl_kernels.quality.report import (
    LayerRealised,
    Row,
    check_writable,
    plot_quality,
    print_layers,
    print_rows,
    write_json,
)
from cutedsl_kernels.quality.text import cut_sequences, read_texts

pytestmark = pytest.mark.cpu


def test_comparison_in_chunks_equals_plain_formulas(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    dense, sparse = (torch.log_softmax(3 * torch.randn(301, 17, generator=generator), -1) for _ in range(2))
    following = torch.randint(17, (301,), generator=generator)
    comparison = Comparison()
    for start in range(0, 301, 64):
        part = slice(start, start + 64)
        comparison.add(following[part], dense[part], sparse[part])
    found = comparison.result()
    kl = torch.nn.functional.kl_div(sparse, dense, log_target=True, reduction="none").sum(-1)
    assert found.positions == 301
    assert found.kl_mean == pytest.approx(kl.mean().item(), rel=1e-5)
    assert found.kl_p99 == pytest.approx(kl.quantile(0.99).item(), rel=1e-5)
    assert found.flip_rate == pytest.approx((dense.argmax(-1) != sparse.argmax(-1)).float().mean().item())
    nll = torch.nn.functional.nll_loss(sparse, following)
    assert found.perplexity == pytest.approx(math.exp(nll.item()), rel=1e-5)


def test_impossible_tokens_add_no_kl() -> None:
    dense = torch.tensor([[0.0, -math.inf]])
    assert kl_to_dense(dense, torch.log(torch.tensor([[0.5, 0.5]]))).item() == pytest.approx(math.log(2))
    assert kl_to_dense(dense, dense).item() == 0


def test_nothing_compared_is_refused() -> None:
    with pytest.raises(ValueError, match="add at least one position"):
        Comparison().result()


@pytest.mark.parametrize(
    ("sparsity", "skipped", "gain"),
    [(0.0, 0.0, 1.0), (0.85, 0.0, 2.3077), (0.9, 0.35, 3.5294), (0.5, 0.5, 2.0), (1.0, 1.0, math.inf)],
)
def test_byte_gain(sparsity: float, skipped: float, gain: float) -> None:
    assert byte_gain_batch_1(sparsity, skipped) == pytest.approx(gain, rel=1e-4)


def test_agreement_length() -> None:
    assert agreement_length([1, 2, 3], [1, 2, 4]) == 2
    assert agreement_length([1], [1, 2]) == 1
    assert agreement_length([], [1]) == 0


def test_sequences_are_spread_and_bounded() -> None:
    text = "".join(chr(97 + i % 26) for i in range(10_000))
    found = cut_sequences(text, lambda t: list(t.encode()), max_tokens=1000, max_len=300)
    assert [len(s) for s in found] == [300, 300, 300, 100]
    starts = [text.find(bytes(s).decode()) for s in found]
    assert all(s >= 0 for s in starts)
    whole = cut_sequences(text, lambda t: list(range(len(t))), max_tokens=10**6, max_len=300)
    assert [s[0] for s in whole] == list(range(0, 10_000, 300))
    with pytest.raises(UserError, match="3 tokens, at least 64"):
        cut_sequences("abc", lambda t: list(t.encode()), max_tokens=10, max_len=10)


def test_texts_are_read_hashed_and_mistakes_named(tmp_path: Path) -> None:
    a, b = tmp_path / "a.txt", tmp_path / "b.txt"
    a.write_text("one")
    b.write_text("two")
    text, digest = read_texts([a, b])
    assert text == "one\ntwo"
    assert digest == hashlib.sha256(b"one\ntwo").hexdigest()
    b.write_bytes(b"\xff\xfe")
    for paths, message in (([], "no text given"), ([tmp_path / "c"], "cannot be read: No such"), ([b], "not UTF-8")):
        with pytest.raises(UserError, match=message):
            read_texts(paths)
    b.write_text(" \n")
    with pytest.raises(UserError, match="is empty"):
        read_texts([b])


def rows() -> list[Row]:
    generator = torch.Generator().manual_seed(0)
    found = []
    for target in (0.0, 0.5, 0.9):
        comparison = Comparison()
        dense = torch.log_softmax(torch.randn(50, 9, generator=generator), -1)
        sparse = torch.log_softmax(dense + target * torch.randn(50, 9, generator=generator), -1)
        comparison.add(torch.zeros(50, dtype=torch.int64), dense, sparse)
        layers = {f"model.layers.{i}.mlp.experts": LayerRealised(target + 0.01 * i, 0.1 * target) for i in range(3)}
        found.append(Row(target, comparison.result(), layers))
    return found


def test_report_fits_eighty_columns_and_says_what_it_must(tmp_path: Path) -> None:
    console = Console(width=80, record=True, file=(tmp_path / "out").open("w"))
    print_rows(console, "title", rows())
    print_layers(console, rows())
    text = console.export_text()
    assert "…" not in text
    for word in ("dense", "50.0%", "90.0%", "KL mean", "flips", "model.layers.*.mlp.experts", "92.0% (9%)"):
        assert word in text
    plot_quality(tmp_path / "plot.png", {"a": rows(), "b": rows()}, "title")
    assert (tmp_path / "plot.png").read_bytes()[:4] == b"\x89PNG"
    write_json(tmp_path / "new" / "x.json", {"rows": [row.as_dict() for row in rows()]})
    assert '"sparsity": 0.51' in (tmp_path / "new" / "x.json").read_text()


def test_unwritable_outputs_are_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--plot .*cannot be written"):
        check_writable("--plot", tmp_path)
    with pytest.raises(UserError, match="cannot make its folder"):
        check_writable("--json", tmp_path / "file" / "x.json")
    with pytest.raises(UserError, match="cannot be written"):
        write_json(tmp_path / "file" / "x.json", {})
    with pytest.raises(UserError, match=r"--plot .*cannot be written"):
        plot_quality(tmp_path / "x.unknown", {"a": rows()}, "title")


def test_sequences_longer_than_the_context_are_cut_with_a_word(capsys: pytest.CaptureFixture[str]) -> None:
    config = {"text_config": {"max_position_embeddings": 128}}
    assert able_length(config, 127) == 127
    assert able_length({}, 10**6) == 10**6
    assert capsys.readouterr().err == ""
    assert able_length(config, 512) == 127
    assert capsys.readouterr().err == "--max-len 512: cut to 127, the model's context is 128 tokens\n"
