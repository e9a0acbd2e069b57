"""The opened transformers model against the definition; thresholds, traffic and joint search on a small random
model.
"""

from __future__ import annotations

import pytest
import torch
from small_models import small_model, texts

from cutedsl_kernels import sparse_moe_ref
from cutedsl_kernels.quality.hf import Rule
from cutedsl_kernels.quality.scores import SCORES, row_norms
from cutedsl_kernels.quality.search import (
    Evaluator,
    Scored,
    expected_bytes,
    highest_within,
    joint_for_bytes,
    joint_for_kl,
    record_fisher,
    record_moments,
    sparsity_for_bytes,
    sparsity_for_expected_bytes,
)
from cutedsl_kernels.quality.traffic import LayerPairs, batch_bytes, overlap, record_pairs
from cutedsl_kernels.shapes import MoEShape

pytestmark = pytest.mark.cpu


@pytest.mark.parametrize("architecture", ["olmoe", "mixtral"])
def test_opened_model_equals_transformers_when_dense(architecture: str, seed: int) -> None:
    import transformers

    model = small_model(seed, architecture)
    batch = torch.tensor(texts(seed, 2))
    plain = type(model.model)(model.model.config).eval()
    plain.load_state_dict(model.model.state_dict())
    assert isinstance(plain, transformers.PreTrainedModel)
    with torch.no_grad():
        wanted = torch.log_softmax(plain(input_ids=batch).logits.float(), -1)
    torch.testing.assert_close(model.log_probs(batch), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("routed", [True, False])
def test_a_layer_follows_the_definition(routed: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    layer = next(iter(small_model(seed).layers.values()))
    x = torch.randn(20, 32, generator=generator)
    ids = torch.stack([torch.randperm(4, generator=generator)[:2] for _ in range(20)])
    r = torch.rand(20, 2, generator=generator)
    tau = torch.rand(4, 24, generator=generator) * 0.3
    layer.rule = Rule(tau, 0.4, routed)
    wanted = sparse_moe_ref(x, layer.weights, r, ids, tau, router_weighted=routed, pair_threshold=0.4)
    torch.testing.assert_close(layer.forward(x, ids, r), wanted, rtol=1e-4, atol=1e-5)
    assert layer.counters.pairs == 40
    assert layer.counters.skipped_pairs == int((r < 0.4).sum())


def test_every_score_realises_its_sparsity_and_the_oracle_is_best(seed: int) -> None:
    model = small_model(seed)
    sequences = texts(seed)
    evaluator = Evaluator(model, sequences)
    assert evaluator.quality(None).kl_mean < 1e-6
    moments = record_moments(model, sequences)
    errors = {}
    for name, score in SCORES.items():
        if score.weight == "learned":  # not recorded: tests of learned.py
            continue
        scored = Scored.record(model, sequences, score, moments)
        errors[name] = evaluator.quality(scored.rules(0.6)).kl_mean
        assert evaluator.realised()[0] == pytest.approx(0.6, abs=0.03), name
        assert evaluator.realised()[1] == 0
    best = evaluator.quality(Scored.record_oracle(model, sequences).rules(0.6)).kl_mean
    assert best < min(errors.values())
    per_layer = dict(zip(model.layers, (0.3, 0.9), strict=True))
    evaluator.quality(Scored.record(model, sequences, SCORES["gate"]).rules(per_layer))
    for layer, target in zip(model.layers.values(), (0.3, 0.9), strict=True):
        assert layer.counters.sparsity == pytest.approx(target, abs=0.04)


def test_skipping_pairs_leaves_every_token_one(seed: int) -> None:
    model = small_model(seed, "mixtral")  # renormalised top-2: the better pair has r >= 0.5
    sequences = texts(seed)
    evaluator = Evaluator(model, sequences)
    scored = Scored.record(model, sequences, SCORES["gate-routed"])
    evaluator.quality(scored.rules(0.8, 0.3))
    assert evaluator.realised()[1] == pytest.approx(0.3, abs=0.04)
    evaluator.quality(scored.rules(0.9, 0.9))
    assert evaluator.realised()[1] <= 0.53  # the sparse model routes a little differently from the calibrated one
    assert all(limits.pair_threshold <= scored.rho_caps[name] for name, limits in scored.thresholds(0.9, 0.9).items())


def test_label_gradients_predict_a_small_change(seed: int) -> None:
    """The probe is where it should be: moving a layer's output along -gradient raises the labels' likelihood."""
    model = small_model(seed)
    batch = torch.tensor(texts(seed, 1, 16))
    found = model.output_gradients(batch, torch.Generator().manual_seed(seed))
    assert set(found) == set(model.layers)
    assert all(g.shape == (16, 32) for g in found.values())
    assert all(float(g.norm()) > 0 for g in found.values())
    assert all(layer.probe is None for layer in model.layers.values())
    weights = record_fisher(model, texts(seed, 2, 16))
    assert all(bool((c > 0).all()) for c in weights.values())


def test_bytes_of_a_batch_equal_counting_rows(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    experts = {
        e: (torch.arange(6), torch.rand(6, generator=generator), torch.rand(6, 10, generator=generator)) for e in (0, 1)
    }
    pairs = LayerPairs(6, experts)
    masks = pairs.masks(0.5, 0.3)
    read = dense = 0
    for token, r, score in experts.values():
        dense += 30
        kept = r >= 0.3
        if kept.any():
            read += 10 + 2 * int((score[kept] >= 0.5).any(0).sum())
        assert token.numel() == 6
    assert batch_bytes(pairs, masks, 6, generator, samples=2) == pytest.approx(read / dense)
    same = LayerPairs(4, {0: (torch.arange(4), torch.ones(4), torch.tensor([[1.0, 0.0]] * 4))})
    found = overlap(same.masks(0.5, 0.0), 4, generator)
    assert found is not None
    assert (found.union, found.iou) == (0.5, 1.0)
    assert overlap(same.masks(0.5, 0.0), 5, generator) is None


def test_joint_search_meets_its_goals(seed: int) -> None:
    model = small_model(seed, "mixtral")
    sequences = texts(seed)
    evaluator = Evaluator(model, sequences)
    scored = Scored.record(model, sequences, SCORES["down-routed"])
    points = joint_for_bytes(evaluator, scored, 0.5, (0.0, 0.2))
    assert [p.quality.kl_mean for p in points] == sorted(p.quality.kl_mean for p in points)
    for point in points:
        assert ((1 - point.skip_pairs) + 2 * (1 - point.sparsity)) / 3 == pytest.approx(0.5)
    pairs = record_pairs(model, sequences[:4], scored.weights, router_weighted=True)
    generator = torch.Generator().manual_seed(0)
    for point in joint_for_bytes(evaluator, scored, 0.7, (0.0,), batch=8, pairs=pairs):
        limits = scored.thresholds(point.sparsity, point.skip_pairs)
        shares = [batch_bytes(p, p.masks(*limits[name]), 8, generator, samples=64) for name, p in pairs.items()]
        assert sum(shares) / len(shares) == pytest.approx(0.7, abs=0.06)
    bar = evaluator.quality(scored.rules(0.5)).kl_mean
    for point in joint_for_kl(evaluator, scored, bar, (0.0, 0.1), tolerance=0.02):
        assert point.quality.kl_mean <= bar
    with pytest.raises(ValueError, match="pairs must be given"):
        joint_for_bytes(evaluator, scored, 0.7, (0.0,), batch=8)
    assert sparsity_for_bytes(0.0, 0.2) is None


def test_bisection_finds_the_edge() -> None:
    assert highest_within(lambda v: v <= 0.613, 0.0, 0.99, 0.01) == pytest.approx(0.613, abs=0.01)
    assert highest_within(lambda v: True, 0.0, 0.99, 0.01) == 0.99
    assert highest_within(lambda v: False, 0.0, 0.99, 0.01) == 0.0


def test_layers_without_weights_per_neuron_use_one_number(seed: int) -> None:
    model = small_model(seed)
    scored = Scored.record(model, texts(seed, 2), SCORES["gate"])
    assert all(isinstance(rule.tau, float) for rule in scored.rules(0.5).values())
    assert row_norms(next(iter(model.layers.values())).weights)[0].shape == (4, 24)


@pytest.mark.parametrize("batch", [1, 64])
def test_expected_bytes_and_their_inverse(batch: int) -> None:
    shape = MoEShape(16, 4, 64, 64)
    for share in (0.0, 0.3):
        wanted = expected_bytes(shape, batch, share, 0.85)
        assert sparsity_for_expected_bytes(shape, batch, share, wanted) == pytest.approx(0.85, abs=1e-3)
        if batch == 1:
            assert wanted == pytest.approx(((1 - share) + 2 * 0.15) / 3)
            assert sparsity_for_bytes(share, wanted) == pytest.approx(0.85)
    assert expected_bytes(shape, 64, 0.0, 0.85) > expected_bytes(shape, 1, 0.0, 0.85)
    assert sparsity_for_expected_bytes(shape, batch, 0.0, 0.2) is None  # the gate alone is a third


def test_learned_weights_are_not_recorded(seed: int) -> None:
    with pytest.raises(ValueError, match="learn_thresholds gives a Scored"):
        Scored.record(small_model(seed), texts(seed, 2), SCORES["learned-routed"])
