"""The plugin in a real vLLM engine on the CPU, against stock vLLM and against the definition inside a transformers
model.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import hf_reference
import pytest
import torch
from support import ARCHITECTURES, DOCUMENT, Architecture, rendered

from cutedsl_kernels import sparse_moe_ref

pytestmark = pytest.mark.engine


def sequences(seed: int, count: int = 2, length: int = 48) -> list[list[int]]:
    source = random.Random(seed)
    return [[source.randrange(256) for _ in range(length)] for _ in range(count)]


def scores(engine: Any, texts: list[list[int]], settings: Any = None) -> list[list[torch.Tensor]]:
    """Per setting, per sequence: log-probabilities [length - 1, V]."""
    found: dict[int, list[list[torch.Tensor]]] = {}
    for chunk in engine.score(texts, settings=settings, chunk_tokens=20):
        per_setting = found.setdefault(chunk.sequence, [[] for _ in chunk.log_probs])
        for parts, part in zip(per_setting, chunk.log_probs, strict=True):
            parts.append(part)
    return [[torch.cat(found[i][slot]) for i in range(len(texts))] for slot in range(len(found[0]))]


def recorded_setting(engine: Any, texts: list[list[int]], target: float, skip: float) -> dict[str, Any]:
    engine.start_recording()
    engine.run(texts)
    histograms = engine.read_recording()
    engine.stop_recording()
    return {
        name: (*histogram.thresholds(target, skip_pairs=skip), True) for name, histogram in histograms.layers.items()
    }


@pytest.mark.parametrize(
    "architecture", [a for a in ARCHITECTURES if a.engine], ids=lambda architecture: architecture.checkpoint
)
def test_equals_stock_when_dense_and_the_definition_when_sparse(
    architecture: Architecture,
    checkpoint: Callable[[str], str],
    engine: Callable[..., Any],
    seed: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """fp32, so that nothing but an error makes a difference: routing and thresholds decide the same way everywhere."""
    from cutedsl_kernels.integration.vllm import method

    folder, texts = checkpoint(architecture.checkpoint), sequences(seed)
    exact = architecture.dtype == "float32"
    options = {"dtype": architecture.dtype, "max_model_len": 128}
    if architecture.attention is not None:
        options["attention_backend"] = architecture.attention
    stock = scores(engine(folder, dense=True, **options), texts)[0]
    ours = engine(folder, record=True, **options)
    top_k = ours.identity.top_k
    setting = recorded_setting(ours, texts, 0.7, 0.2 if top_k > 1 else 0.0)
    dense, sparse = scores(ours, texts, [0.0, setting])
    realised = ours.realised("setting 1")
    monkeypatch.setattr(method, "sparse_moe", sparse_moe_ref)
    defined = scores(ours, texts, [setting])[0]
    model = None
    if "transformers" in architecture.definition:
        model = hf_reference.load(folder)
        hf_reference.make_sparse(model, list(setting.values()))
    for i, text in enumerate(texts):
        assert_equal(dense[i], stock[i], exact)
        assert_equal(sparse[i], defined[i], exact)
        if model is not None:
            expected = hf_reference.log_probs(model, text)  # whose products are added in another order
            assert_equal_but_for_ties(sparse[i], expected) if exact else assert_equal(sparse[i], expected, exact)
        assert (sparse[i] - dense[i]).abs().max() > 0.05, "the thresholds changed nothing"
    for counters in realised.values():
        assert counters.pairs == sum(map(len, texts)) * top_k
        assert abs(counters.sparsity - 0.7) < 0.1
        assert abs(counters.skipped_share - (0.2 if top_k > 1 else 0.0)) < 0.1


def assert_equal(found: torch.Tensor, expected: torch.Tensor, exact: bool) -> None:
    """In fp32 everywhere; in bf16 in the median over positions, as rounding may send single tokens to other experts."""
    if exact:
        torch.testing.assert_close(found, expected, atol=2e-3, rtol=0)
    else:
        assert (found - expected).abs().amax(dim=1).median() < 0.1


def assert_equal_but_for_ties(found: torch.Tensor, expected: torch.Tensor) -> None:
    """log-probabilities [n, V] of a sparse model whose sums were added in another order: at single positions a neuron
    or a pair may lie within that rounding of its threshold and fall on the other side, which later positions see too.
    """
    error = (found - expected).abs().amax(dim=1)
    assert (error > 2e-3).float().mean() <= 0.25, f"{int((error > 2e-3).sum())} of {len(error)} positions differ"
    assert error.max() < 0.5


def test_target_zero_equals_stock_in_bf16(
    checkpoint: Callable[[str], str], engine: Callable[..., Any], seed: int
) -> None:
    """Both lose what bf16 loses: the error of ours is at most twice that of stock vLLM, in the median over positions.

    The median, since a router's rounding can send one token to other experts in either of them.
    """
    folder, texts = checkpoint("olmoe"), sequences(seed)
    stock = scores(engine(folder, dense=True, dtype="bfloat16"), texts)[0]
    ours = scores(engine(folder, record=True, dtype="bfloat16"), texts)[0]
    model = hf_reference.load(folder)
    for i, text in enumerate(texts):
        exact = hf_reference.log_probs(model, text)
        error, allowed = ((found[i] - exact).abs().amax(dim=1).median() for found in (ours, stock))
        assert error <= 2 * allowed + 1e-5, f"ours {error:.4f}, stock {allowed:.4f}"


@pytest.mark.parametrize("parallel", [{}, {"enable_expert_parallel": True}], ids=["tp2", "ep2"])
def test_two_ranks_equal_one(
    parallel: dict[str, Any], checkpoint: Callable[[str], str], engine: Callable[..., Any], seed: int
) -> None:
    """Thresholds, one per neuron, are cut for the ranks; histograms and counters are added over them."""
    folder, texts = checkpoint("qwen3-moe"), sequences(seed)
    one = engine(folder, record=True, dtype="float32")
    alone = recorded_setting(one, texts, 0.7, 0.2)
    identity = one.identity
    generator = torch.Generator().manual_seed(seed)
    shape = (identity.num_experts, identity.intermediate_size)
    settings = {
        name: (tau * (0.5 + torch.rand(shape, generator=generator)), rho, weighted)
        for name, (tau, rho, weighted) in alone.items()
    }
    expected = scores(one, texts, [settings])[0]
    counted = one.realised("setting 0")

    two = engine(folder, record=True, dtype="float32", tensor_parallel_size=2, **parallel)
    assert two.layer_names == list(settings)
    together = recorded_setting(two, texts, 0.7, 0.2)
    for name in alone:
        assert together[name][:2] == pytest.approx(alone[name][:2], rel=1e-3)
    found = scores(two, texts, [settings])[0]
    for i in range(len(texts)):
        assert_equal_but_for_ties(found[i], expected[i])
    for name, counters in two.realised("setting 0").items():
        assert counters.pairs == counted[name].pairs
        assert counters.neurons == counted[name].neurons
        assert abs(counters.active_neurons - counted[name].active_neurons) <= 0.001 * counters.neurons


def test_compiled_engine_equals_eager(
    checkpoint: Callable[[str], str], engine: Callable[..., Any], seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch.compile sees the layer as one opaque operator."""
    monkeypatch.setenv("VLLM_DISABLE_COMPILE_CACHE", "1")
    folder, texts = checkpoint("olmoe"), sequences(seed)
    eager = engine(folder, record=True, dtype="float32")
    setting = recorded_setting(eager, texts, 0.7, 0.2)
    expected = scores(eager, texts, [setting])[0]
    compiled = engine(folder, record=True, dtype="float32", enforce_eager=False)
    found = scores(compiled, texts, [setting])[0]
    assert_equal_but_for_ties(torch.cat([*found]), torch.cat([*expected]))


@pytest.mark.cpu
def test_the_documented_table_is_what_is_tested() -> None:
    text = DOCUMENT.read_text()
    assert rendered(text) == text, "run python tests/integration/support.py"
