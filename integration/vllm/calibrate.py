"""Calibrating a running engine: record score histograms over a text, and make a SparsityProfile of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from ...calibration import DEFAULT_TARGETS, LayerHistogram, LayerHistograms, layer_table
from ...quality.budgets import (
    FISHER_POINT,
    GREEDY_GRID,
    Budget,
    Measurements,
    allocate,
    fisher_curves,
    measured_curve,
    shared_threshold,
)
from ...quality.engine_eval import setting_qualities
from ...quality.scores import save_neuron_parts, score_named
from ...quality.search import CAP_ROUNDS, expected_bytes, sparsity_for_expected_bytes, spread_sequences
from ...shapes import MoEShape
from ...sparsity import FORMAT, FORMAT_2, Calibration, Created, LayerTable, NeuronFile, SparsityProfile
from .engine import SparseEngine
from .neurons import neuron_parts, raise_experts, rho_caps

BATCH_TOKENS = 8192
REFINE_FROM = 0.5  # below this target a sparse model's routing is close enough to the dense one's
REFINE_TOKENS = 8192
BUDGET_TOKENS = 4096
JOINT_GOALS = ((0.0, 0.5), (0.1, 0.7), (0.2, 0.85), (0.3, 0.92), (0.4, 0.96))  # (skipped, sparsity): whose bytes
JOINT_SHARES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5)


@dataclass(frozen=True)
class LearnedParts:
    """What learn_thresholds found: the factors fp16 [E, I] of every layer in model order, and the budget."""

    factors: list[torch.Tensor]
    budget: Budget


def batches(sequences: Sequence[Sequence[int]]) -> Iterator[list[Sequence[int]]]:
    """Sequences in batches of about BATCH_TOKENS tokens."""
    batch: list[Sequence[int]] = []
    for sequence in sequences:
        batch.append(sequence)
        if sum(map(len, batch)) >= BATCH_TOKENS:
            yield batch
            batch = []
    if batch:
        yield batch


def _told_batches(sequences: Sequence[Sequence[int]], progress: Callable[[int], Any]) -> Iterator[list[Sequence[int]]]:
    for batch in batches(sequences):
        yield batch
        progress(sum(map(len, batch)))


def record(
    engine: SparseEngine, sequences: Sequence[Sequence[int]], progress: Callable[[int], Any] = lambda tokens: None
) -> LayerHistograms:
    """Histograms of the model as it now runs, over ``sequences``; ``progress`` is told each batch's tokens."""
    engine.start_recording()
    for batch in _told_batches(sequences, progress):
        engine.run(batch)
    histograms = engine.read_recording()
    engine.stop_recording()
    histograms.tokens = sum(map(len, sequences))
    return histograms


def calibrate_profile(
    engine: SparseEngine,
    sequences: Sequence[Sequence[int]],
    *,
    text_sha256: str,
    max_len: int,
    score: str = "gate-routed",
    skip_pairs: float | Literal["auto"] = 0.0,
    targets: Sequence[float] = DEFAULT_TARGETS,
    budget: str = "uniform",
    out: Path | None = None,
    progress: Callable[[int], Any] = lambda tokens: None,
    learned: LearnedParts | None = None,
    batch: int = 1,
) -> SparsityProfile:
    """The profile of the engine's model from a text: ``sequences`` of token ids.

    ``skip_pairs``: a share, or "auto": chosen together with the sparsity for ``batch`` tokens at once (joint_skip).
    ``learned``: for the scores `learned` (quality/learned.py), and for the budget of that name. ``out``: where the
    profile will be written. Scores with per-neuron parts write them beside it (neuron_file), and a budget that is
    measured keeps its measurements there until the profile is made, so that it can be resumed. First the dense model
    is recorded. A sparse model's layers see other inputs and routing weights than the dense one's, so every row from
    REFINE_FROM on is then recorded again under its own first thresholds, on a part of the text (refine_sequences).
    ``progress`` is told the tokens of each batch run; planned_tokens gives their sum. Leaves the engine dense.
    """
    definition = score_named(score)
    if definition.weight != "none" and out is None:
        raise ValueError(
            f"out must be given for the score {score}: its per-neuron parts are written beside the profile"
        )
    engine.set_target(0.0)
    factors = None if learned is None else learned.factors
    parts = neuron_parts(engine, definition, _told_batches(sequences, progress), factors)
    histograms = record(engine, sequences, progress)
    for _ in range(CAP_ROUNDS):
        raised = None if parts is None else raise_experts(engine, definition, parts, histograms.layers)
        if raised is None:
            break
        parts, histograms = raised, record(engine, sequences, progress)
    weighted, names = definition.router_weighted, list(histograms.layers)
    kind = "gate-routed" if weighted else "gate"
    key = {"text_sha256": text_sha256, "score": score, "tokens": histograms.tokens, **engine.identity.model_dump()}
    if budget == "learned":
        if learned is None:
            raise ValueError("learned must be given for the budget 'learned'")
        spread = learned.budget.renamed(names)
    else:
        text = refine_sequences(sequences)
        spread = layer_budget(engine, histograms.layers, budget, weighted, text, out, key, progress)
    shares = {n: (np.array([0.0, 1.0]), np.array([skip_pairs, skip_pairs])) for n in names if skip_pairs != "auto"}
    if skip_pairs == "auto":
        shares = joint_skip(engine, histograms.layers, spread, weighted, refine_sequences(sequences), progress, batch)
    rows, skipped = [], []
    for target in targets:
        wanted = spread.at(target)
        skip = {n: float(np.interp(target, *shares[n])) for n in names}
        seen = histograms.layers
        row = {n: seen[n].thresholds(wanted[n], score=kind, skip_pairs=skip[n]) for n in names}
        if target >= REFINE_FROM:
            engine.set_thresholds({n: (*row[n], weighted) for n in names}, sparsity=target)
            seen = record(engine, refine_sequences(sequences), progress).layers
            row = {n: seen[n].thresholds(wanted[n], score=kind, skip_pairs=skip[n]) for n in names}
        rows.append(row)
        skipped.append({n: seen[n].skippable(row[n].pair_threshold) for n in names})
    engine.set_target(0.0)
    tables = {name: layer_table(targets, [r[name] for r in rows], [s[name] for s in skipped]) for name in names}
    neurons = None
    if parts is not None and out is not None:
        digest, size = save_neuron_parts(neuron_file(out), parts)
        neurons = NeuronFile(file=neuron_file(out).name, sha256=digest, size=size)
    if out is not None:
        budget_file(out).unlink(missing_ok=True)
    return make_profile(
        engine,
        tables,
        tokens=histograms.tokens,
        text_sha256=text_sha256,
        max_len=max_len,
        score=score,
        budget=budget,
        neurons=neurons,
    )


def neuron_file(profile: Path) -> Path:
    """The file of a profile's per-neuron parts, beside it. Not named .safetensors, which it is: vLLM takes all such
    files of a folder for weights."""
    return profile.with_name(f"{profile.stem}.neurons")


def budget_file(profile: Path) -> Path:
    """Measurements of a budget search that has not ended, beside the profile to be."""
    return profile.with_name(f".{profile.name}.budget.json")


def layer_budget(
    engine: SparseEngine,
    histograms: Mapping[str, LayerHistogram],
    budget: str,
    router_weighted: bool,
    sequences: Sequence[Sequence[int]],
    out: Path | None,
    key: dict[str, Any],
    progress: Callable[[int], Any],
) -> Budget:
    """Sparsity per layer for any average. Measured budgets run the model with one layer sparse at a time."""
    if budget == "uniform":
        return Budget({1.0: dict.fromkeys(histograms, 1.0)})
    averages = [round(0.01 * i, 2) for i in range(1, 100)]
    if budget == "shared":
        return Budget(shared_threshold(histograms, averages, router_weighted=router_weighted))
    kind = "gate-routed" if router_weighted else "gate"
    text = sequences[: max(1, round(len(sequences) * BUDGET_TOKENS / sum(map(len, sequences))))]

    def costs(layer: str, grid: list[float]) -> list[float]:
        settings = [
            {
                name: (*(histogram.thresholds(s, score=kind) if name == layer else (0.0, 0.0)), router_weighted)
                for name, histogram in histograms.items()
            }
            for s in grid
        ]
        progress((len(grid) + 1) * sum(map(len, text)))
        return [quality.kl_mean for quality in setting_qualities(engine, text, settings)]

    measured = Measurements(None if out is None else budget_file(out), key)
    measured.measure(histograms, GREEDY_GRID if budget == "greedy" else (FISHER_POINT,), costs)
    if budget == "greedy":
        curves = {name: measured_curve(points) for name, points in measured.costs.items()}
    else:
        curves = fisher_curves(histograms, measured.costs, router_weighted=router_weighted)
    return Budget(allocate(curves, averages))


def joint_skip(
    engine: SparseEngine,
    histograms: Mapping[str, LayerHistogram],
    budget: Budget,
    router_weighted: bool,
    sequences: Sequence[Sequence[int]],
    progress: Callable[[int], Any],
    batch: int = 1,
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Per layer (sparsities, shares of pairs to skip), for numpy.interp over the average sparsity.

    For the bytes of each of JOINT_GOALS, every share of JOINT_SHARES is tried with the sparsity that reads the same
    bytes, and the one of least KL taken. Bytes are those of ``batch`` tokens by the cost model (uniform routing,
    independent masks). No share leaves a recorded token without an expert.
    """
    identity = engine.identity
    shape = MoEShape(identity.num_experts, identity.top_k, identity.hidden_size, identity.intermediate_size)
    kind = "gate-routed" if router_weighted else "gate"
    caps = {name: histograms[name].skippable(cap) for name, cap in rho_caps(engine).items()}
    points = []
    for goal in JOINT_GOALS:
        wanted_bytes = expected_bytes(shape, batch, *goal)
        for share in JOINT_SHARES:
            sparsity = sparsity_for_expected_bytes(shape, batch, share, wanted_bytes)
            if sparsity is not None:
                points.append((goal, share, sparsity))
    settings = []
    for _, share, sparsity in points:
        wanted = budget.at(sparsity)
        settings.append(
            {
                name: (*h.thresholds(wanted[name], score=kind, skip_pairs=min(share, caps[name])), router_weighted)
                for name, h in histograms.items()
            }
        )
    text = sequences[: max(1, round(len(sequences) * BUDGET_TOKENS / sum(map(len, sequences))))]
    progress((len(settings) + 1) * sum(map(len, text)))
    best: dict[tuple[float, float], tuple[float, float, float]] = {}
    for (goal, share, sparsity), quality in zip(points, setting_qualities(engine, text, settings), strict=True):
        if goal not in best or quality.kl_mean < best[goal][0]:
            best[goal] = (quality.kl_mean, sparsity, share)
    path = sorted((sparsity, share) for _, sparsity, share in best.values())
    grid = np.array([0.0, *(sparsity for sparsity, _ in path)])
    shares = np.maximum.accumulate(np.array([0.0, *(share for _, share in path)]))
    return {name: (grid, np.minimum(shares, caps[name])) for name in histograms}


def refine_sequences(sequences: Sequence[Sequence[int]]) -> list[Sequence[int]]:
    """Sequences of about REFINE_TOKENS tokens in all, at even distances."""
    return spread_sequences(sequences, REFINE_TOKENS)


def planned_tokens(sequences: Sequence[Sequence[int]], targets: Sequence[float], score: str = "gate-routed") -> int:
    """Tokens that calibrate_profile will run, without those of a measured budget."""
    again = sum(map(len, refine_sequences(sequences)))
    passes = 2 if score_named(score).weight == "moments" else 1
    return passes * sum(map(len, sequences)) + again * sum(target >= REFINE_FROM for target in targets)


def make_profile(
    engine: SparseEngine,
    tables: dict[str, LayerTable],
    *,
    tokens: int,
    text_sha256: str,
    max_len: int,
    score: str,
    budget: str = "uniform",
    neurons: NeuronFile | None = None,
) -> SparsityProfile:
    """A profile of the engine's model from its layers' tables."""
    from ... import __version__

    plain = neurons is None and budget == "uniform" and all(table.pair_skips is None for table in tables.values())
    return SparsityProfile(
        format=FORMAT if plain else FORMAT_2,
        model=engine.identity,
        score=score,
        router_weighted=score_named(score).router_weighted,
        budget=budget,
        neurons=neurons,
        calibration=Calibration(tokens=tokens, text_sha256=text_sha256, max_len=max_len),
        layers=tables,
        created=Created(version=__version__, date=datetime.now(UTC).strftime("%Y-%m-%d")),
    )
