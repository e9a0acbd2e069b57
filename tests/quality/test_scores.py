"""Scores against brute force, shards against the whole, per-neuron parts through their file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cutedsl_kernels import ExpertWeights, UserError, sparse_moe_ref
from cutedsl_kernels.quality.scores import (
    SCORES,
    NeuronParts,
    UpMoments,
    check_of_norms,
    load_neuron_parts,
    matches_check,
    neuron_weights,
    observe_up,
    row_norms,
    save_neuron_parts,
    score_named,
    weight_check,
)

pytestmark = pytest.mark.cpu


def random_weights(generator: torch.Generator, experts: int = 4, inter: int = 32, hidden: int = 12) -> ExpertWeights:
    return ExpertWeights(
        torch.randn(experts, 2 * inter, hidden, generator=generator),
        torch.randn(experts, inter, hidden, generator=generator),
    )


def rows_of(weights: ExpertWeights, ranks: int, rank: int) -> ExpertWeights:
    """The shard of the neurons that rank ``rank`` of ``ranks`` holds."""
    inter = weights.intermediate_size
    part = slice(rank * inter // ranks, (rank + 1) * inter // ranks)
    gate, up = weights.w13[:, :inter][:, part], weights.w13[:, inter:][:, part]
    return ExpertWeights(torch.cat([gate, up], dim=1).contiguous(), weights.w2_rows[:, part].contiguous())


@given(seed=st.integers(0, 2**31), tokens=st.integers(1, 9), top_k=st.integers(1, 3))
@settings(max_examples=20, deadline=None)
def test_moments_and_weights_equal_brute_force(seed: int, tokens: int, top_k: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weights = random_weights(generator)
    x = torch.randn(tokens, 12, generator=generator)
    ids = torch.stack([torch.randperm(4, generator=generator)[:top_k] for _ in range(tokens)])
    moments = UpMoments(4, 32)
    observe_up(moments, x, weights, torch.rand(tokens, top_k, generator=generator), ids)
    squares, counts = torch.zeros(4, 32, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)
    for t in range(tokens):
        for e in ids[t].tolist():
            counts[e] += 1
            squares[e] += (weights.w13[e, 32:] @ x[t]).double().square()
    torch.testing.assert_close(moments.squares, squares, rtol=1e-4, atol=1e-6)
    assert torch.equal(moments.tokens, counts)
    up, _ = row_norms(weights)
    rms = moments.rms(up)
    for e in range(4):
        for i in (0, 17):
            norm_up, norm_down = weights.w13[e, 32 + i].norm(), weights.w2_rows[e, i].norm()
            expected = {
                "none": None,
                "down": norm_down,
                "up-down": norm_up * norm_down,
                "moments": rms[e, i] * norm_down,
                "learned": rms[e, i] * norm_down,
            }
            for score in SCORES.values():
                c = neuron_weights(score, weights, rms if score.calibrated else None)
                assert (c is None) == (expected[score.weight] is None)
                if c is not None:
                    torch.testing.assert_close(c[e, i], expected[score.weight])


def test_many_tokens_decide_and_few_fall_back_on_the_norm(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    norms = torch.rand(2, 8, generator=generator) + 0.5
    moments = UpMoments(2, 8)
    scale = torch.rand(8, generator=generator) + 0.5
    moments.observe(0, torch.randn(100_000, 8, generator=generator) * scale)
    rms = moments.rms(norms)
    torch.testing.assert_close(rms[0], scale, rtol=0.03, atol=0)
    ratio = rms[1] / norms[1]  # expert 1 saw nothing: proportional to the norms of its own up rows
    torch.testing.assert_close(ratio, ratio[:1].expand(8))


def test_moments_of_nothing_are_refused() -> None:
    with pytest.raises(UserError, match="use more text"):
        UpMoments(2, 8).rms(torch.ones(2, 8))


def test_a_larger_score_is_active_and_a_smaller_is_not(seed: int) -> None:
    """tau / c through the definition selects exactly the neurons whose score reaches tau."""
    generator = torch.Generator().manual_seed(seed)
    weights = random_weights(generator, experts=1)
    x = torch.randn(1, 12, generator=generator)
    r = torch.tensor([[0.4]])
    c = neuron_weights(score_named("up-down-routed"), weights)
    a = torch.nn.functional.silu(x @ weights.w13[0, :32].t())
    score = (a.abs() * c * 0.4).flatten()
    tau = score.sort().values[16:18].mean()
    active = score >= tau
    u = x @ weights.w13[0, 32:].t()
    wanted = 0.4 * ((a * u).flatten() * active) @ weights.w2_rows[0]
    got = sparse_moe_ref(x, weights, r, torch.zeros(1, 1, dtype=torch.int64), tau / c)
    torch.testing.assert_close(got[0], wanted, rtol=1e-5, atol=1e-5)
    assert active.sum() == 15


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_shards_give_the_thresholds_of_one_process(ranks: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weights = random_weights(generator)
    rms = torch.rand(4, 32, generator=generator) + 0.1
    for score in SCORES.values():
        whole = neuron_weights(score, weights, rms)
        for rank in range(ranks):
            local = rms[:, rank * 32 // ranks : (rank + 1) * 32 // ranks]
            part = neuron_weights(score, rows_of(weights, ranks, rank), local)
            if whole is None:
                assert part is None
            else:
                torch.testing.assert_close(part, whole[:, rank * 32 // ranks : (rank + 1) * 32 // ranks])


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_fingerprint_accepts_its_weights_and_no_others(ranks: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weights = random_weights(generator)
    stored = weight_check(weights)
    torch.testing.assert_close(stored, check_of_norms(torch.stack(row_norms(weights), dim=1)))
    changed = ExpertWeights(weights.w13.clone(), weights.w2_rows.clone())
    changed.w2_rows[2, 5] *= 1.5
    for rank in range(ranks):
        assert matches_check(stored, rows_of(weights, ranks, rank), rank, ranks)
        holds_it = rank * 32 // ranks <= 5 < (rank + 1) * 32 // ranks
        assert matches_check(stored, rows_of(changed, ranks, rank), rank, ranks) == (not holds_it)
    other = random_weights(generator)
    assert not matches_check(stored, other)
    assert not matches_check(stored[:2], weights)


def test_parts_survive_their_file_and_damage_is_named(tmp_path: Path, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    path = tmp_path / "p.neurons"
    rms = torch.rand(4, 32, generator=generator)
    parts = {"layers.0": NeuronParts(weight_check(random_weights(generator)), rms)}
    digest, size = save_neuron_parts(path, parts)
    assert path.stat().st_size == size
    found = load_neuron_parts(path, digest, ["layers.0"])["layers.0"]
    assert found.rms_up is not None
    assert torch.equal(found.rms_up, rms.half())
    assert torch.equal(found.check, parts["layers.0"].check)
    with pytest.raises(UserError, match=r"has no layer 'layers.1'"):
        load_neuron_parts(path, digest, ["layers.1"])
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(UserError, match="does not belong to the profile"):
        load_neuron_parts(path, digest, ["layers.0"])
    path.unlink()
    with pytest.raises(UserError, match="keep both files together"):
        load_neuron_parts(path, digest, ["layers.0"])


def test_mistakes_are_named(seed: int) -> None:
    weights = random_weights(torch.Generator().manual_seed(seed))
    with pytest.raises(UserError, match="score must be one of gate, "):
        score_named("magnitude")
    with pytest.raises(ValueError, match=r"rms_up must be \[E, I\] = \(4, 32\).*got None"):
        neuron_weights(score_named("moments"), weights)
