"""Benchmark problems: what is asked for is what the masks show, and the counts are those of a plain loop."""

from __future__ import annotations

import pytest
import torch
from cutedsl_kernels.bench.problems import (
    Batch,
    Cutoffs,
    Rule,
    copies_needed,
    correlation_for_iou,
    independent_iou,
    make_batch,
    make_weights,
    route,
)

from cutedsl_kernels import KNOWN_MODELS, MoEShape

pytestmark = pytest.mark.cpu
SHAPE = MoEShape(num_experts=8, top_k=2, hidden_size=128, intermediate_size=64)


def batch_of(seed: int, num_tokens: int = 24, **options: object) -> Batch:
    return make_batch(make_weights(SHAPE, 1, "cpu", torch.bfloat16, seed), 2, num_tokens, calls=3, seed=seed, **options)


def counted_by_loop(batch: Batch, cutoffs: Cutoffs) -> dict[str, float]:
    """Pairs, kept pairs, active neurons, experts and neurons read, mean over the counted calls, one pair at a time."""
    totals = dict.fromkeys(("pairs", "pairs_kept", "active", "experts_read", "neurons_read"), 0.0)
    for i in batch.counted:
        call = batch.calls[i]
        needed: dict[int, torch.Tensor] = {}
        for t in range(batch.num_tokens):
            for slot in range(SHAPE.top_k):
                e, r = int(call.topk_ids[t, slot]), float(call.topk_weights[t, slot])
                totals["pairs"] += 1
                if r < cutoffs.pair_threshold:
                    continue
                totals["pairs_kept"] += 1
                gate = call.weights.w13[e, : SHAPE.intermediate_size].float() @ call.hidden_states[t].float()
                score = torch.nn.functional.silu(gate).abs() * (r if cutoffs.rule.router_weighted else 1.0)
                active = score >= cutoffs.thresholds[e]
                totals["active"] += int(active.sum())
                needed[e] = needed.get(e, torch.zeros_like(active)) | active
        totals["experts_read"] += len(needed)
        totals["neurons_read"] += sum(int(mask.sum()) for mask in needed.values())
    return {name: value / len(batch.counted) for name, value in totals.items()}


@pytest.mark.parametrize("rule", [Rule(), Rule(0.5), Rule(0.9), Rule(0.9, 0.35, True), Rule(0.35, 0.35, True)], ids=str)
def test_sparsity_and_counts(rule: Rule, seed: int) -> None:
    batch = batch_of(seed)
    cutoffs = batch.cutoffs(rule)
    counts = batch.count(cutoffs)
    assert abs(counts.sparsity - rule.sparsity) < 0.01
    assert abs(counts.pairs_skipped - rule.pair_skip) < 0.01  # a pair of 144 is 0.007
    for name, value in counted_by_loop(batch, cutoffs).items():
        assert getattr(counts, name) == pytest.approx(value, abs=1.0), name  # one score may lie on its threshold
    rows = counts.experts_read * SHAPE.intermediate_size + 2 * counts.neurons_read + batch.num_tokens
    assert counts.bytes_read == rows * SHAPE.hidden_size * 2


@pytest.mark.parametrize(
    ("calls", "counted_calls", "counted"),
    [(1, 4, [0]), (3, 4, [0, 1, 2]), (4, 4, [0, 1, 2, 3]), (24, 4, [0, 8, 15, 23])],
)
def test_counted_calls_run_from_the_first_to_the_last(calls: int, counted_calls: int, counted: list[int]) -> None:
    weights = make_weights(SHAPE, 1, "cpu", torch.bfloat16, 0)
    assert make_batch(weights, 2, 1, calls=calls, seed=0, counted_calls=counted_calls).counted == counted


def test_no_checked_score_is_within_rounding_of_its_threshold(seed: int) -> None:
    batch = batch_of(seed)
    rule = Rule(0.8, 0.0, True)
    cutoffs = batch.cutoffs(rule)
    for i in batch.counted:
        call = batch.calls[i]
        for t in batch.checked_tokens:
            for slot in range(SHAPE.top_k):
                e, r = int(call.topk_ids[t, slot]), float(call.topk_weights[t, slot])
                gate = call.weights.w13[e, : SHAPE.intermediate_size].float() @ call.hidden_states[t].float()
                exact = torch.nn.functional.silu(gate).abs() * r
                rounded = torch.nn.functional.silu(gate.bfloat16().float()).abs() * r
                assert torch.equal(exact < cutoffs.thresholds[e], rounded < cutoffs.thresholds[e])


@pytest.mark.parametrize(("sparsity", "iou"), [(0.8, 0.3), (0.9, 0.17), (0.5, 0.6)])
def test_masks_overlap_as_asked(sparsity: float, iou: float, seed: int) -> None:
    shape = MoEShape(4, 2, 256, 256)
    weights = make_weights(shape, 1, "cpu", torch.bfloat16, seed)
    rule = Rule(sparsity)
    batch = make_batch(weights, 2, 32, calls=4, seed=seed, iou=iou, sparsity=sparsity)
    found = batch.count(batch.cutoffs(rule)).iou
    assert found is not None
    assert abs(found - iou) < 0.05
    free = make_batch(weights, 2, 32, calls=4, seed=seed)
    apart = free.count(free.cutoffs(rule)).iou
    assert apart is not None
    assert abs(apart - independent_iou(sparsity)) < 0.03


def test_overlap_below_independent_masks_is_refused() -> None:
    with pytest.raises(ValueError, match=r"iou must lie in 0\.333\.\.1"):
        correlation_for_iou(0.1, 0.5)


@pytest.mark.parametrize("routing", ["uniform", "zipf"])
def test_routing_gives_distinct_experts(routing: str, seed: int) -> None:
    gen = torch.Generator().manual_seed(seed)
    ids = route(gen, routing, 500, 32, 4)
    assert ids.dtype == torch.int32
    assert ids.shape == (500, 4)
    assert int(ids.min()) >= 0
    assert int(ids.max()) < 32
    assert all(len(set(row)) == 4 for row in ids.tolist())
    load = torch.bincount(ids.flatten().long(), minlength=32).sort(descending=True).values
    top = float(load[0] / load.sum())
    assert top > 0.1 if routing == "zipf" else top < 0.06


def test_weights_have_the_variance_that_gates_need(seed: int) -> None:
    first, second = make_weights(SHAPE, 2, "cpu", torch.float32, seed)
    assert first.shape(2) == SHAPE
    assert not torch.equal(first.w13, second.w13)
    assert not torch.equal(first.w13[0], first.w13[1])
    assert float(first.w13.std()) == pytest.approx(SHAPE.hidden_size**-0.5, rel=0.1)
    assert float(first.w2_rows.std()) == pytest.approx(SHAPE.intermediate_size**-0.5, rel=0.1)


def test_enough_weight_copies_to_leave_the_cache_cold() -> None:
    shape = KNOWN_MODELS["qwen3.5-35b-a3b"].shape
    one, many = (copies_needed(shape, t, 0.85, torch.bfloat16, 1e12) for t in (1, 256))
    assert one * 8 * 3 * 512 * 2048 * 2 > 4 * 60e6  # even if all of the experts hit were read
    assert many == 1
    assert copies_needed(shape, 1, 0.85, torch.bfloat16, 3.5e9) == 2  # the memory given holds two


@pytest.mark.parametrize("values", [(0.2, 0.3), (1.0, 0.0), (0.5, -0.1)])
def test_impossible_rules_are_refused(values: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="sparsity must lie between pair_skip"):
        Rule(*values)
