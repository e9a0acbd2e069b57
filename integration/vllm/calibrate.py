"""Calibrating a running engine: record score histograms over a text, and make a SparsityProfile of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np

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
from ...quality.search import sparsity_for_bytes
from ...sparsity import FORMAT, FORMAT_2, Calibration, Created, LayerTable, NeuronFile, SparsityProfile
from .engine import SparseEngine
from .neurons import neuron_parts, rho_caps

BATCH_TOKENS = 8192
REFINE_FROM = 0.5  # below this target a sparse model's routing is close enough to the dense one's
REFINE_TOKENS = 8192
BUDGET_TOKENS = 4096
JOINT_GAINS = (1.5, 2.0, 2.5, 3.0, 3.5)
JOINT_SHARES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5)


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
) -> SparsityProfile:
    """The profile of the engine's model from a text: ``sequences`` of token ids.

    ``skip_pairs``: a share, or "auto": chosen together with the sparsity (joint_skip). ``out``: where the profile
    will be written. Scores with per-neuron parts write them beside it (neuron_file), and a budget that is measured
    keeps its measurements there until the profile is made, so that it can be resumed. First the dense model is
    recorded. A sparse model's layers see other inputs and routing weights than the dense one's, so every row from
    REFINE_FROM on is then recorded again under its own first thresholds, on a part of the text (refine_sequences).
    ``progress`` is told the tokens of each batch run; planned_tokens gives their sum. Leaves the engine dense.
    """
    definition = score_named(score)
    if definition.weight != "none" and out is None:
        raise ValueError(
            f"out must be given for the score {score}: its per-neuron parts are written beside the profile"
        )
    engine.set_target(0.0)
    parts = neuron_parts(engine, definition, _told_batches(sequences, progress))
    histograms = record(engine, sequences, progress)
    weighted, names = definition.router_weighted, list(histograms.layers)
    kind = "gate-routed" if weighted else "gate"
    key = {"text_sha256": text_sha256, "score": score, "tokens": histograms.tokens, **engine.identity.model_dump()}
    spread = layer_budget(engine, histograms.layers, budget, weighted, refine_sequences(sequences), out, key, progress)
    shares = {n: (np.array([0.0, 1.0]), np.array([skip_pairs, skip_pairs])) for n in names if skip_pairs != "auto"}
    if skip_pairs == "auto":
        shares = joint_skip(engine, histograms.layers, spread, weighted, refine_sequences(sequences), progress)
    rows = []
    for target in targets:
        wanted = spread.at(target)
        skip = {n: float(np.interp(target, *shares[n])) for n in names}
        row = {n: histograms.layers[n].thresholds(wanted[n], score=kind, skip_pairs=skip[n]) for n in names}
        if target >= REFINE_FROM:
            engine.set_thresholds({n: (*row[n], weighted) for n in names}, sparsity=target)
            seen = record(engine, refine_sequences(sequences), progress).layers
            row = {n: seen[n].thresholds(wanted[n], score=kind, skip_pairs=skip[n]) for n in names}
        rows.append(row)
    engine.set_target(0.0)
    tables = {name: layer_table(targets, [row[name] for row in rows]) for name in names}
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
    """The file of a profile's per-neuron parts, beside it."""
    return profile.with_name(f"{profile.stem}.neurons.safetensors")


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
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Per layer (sparsities, shares of pairs to skip), for numpy.interp over the average sparsity.

    For each of JOINT_GAINS (dense bytes over sparse bytes of one token) every share of JOINT_SHARES is tried with the
    sparsity that reads the same bytes, and the one of least KL taken. No share leaves a recorded token without an
    expert.
    """
    kind = "gate-routed" if router_weighted else "gate"
    caps = {name: histograms[name].skippable(cap) for name, cap in rho_caps(engine).items()}
    points = [
        (gain, share, sparsity)
        for gain in JOINT_GAINS
        for share in JOINT_SHARES
        if (sparsity := sparsity_for_bytes(share, 1 / gain)) is not None
    ]
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
    best: dict[float, tuple[float, float, float]] = {}
    for (gain, share, sparsity), quality in zip(points, setting_qualities(engine, text, settings), strict=True):
        if gain not in best or quality.kl_mean < best[gain][0]:
            best[gain] = (quality.kl_mean, sparsity, share)
    path = sorted((sparsity, share) for _, sparsity, share in best.values())
    grid = np.array([0.0, *(sparsity for sparsity, _ in path)])
    shares = np.maximum.accumulate(np.array([0.0, *(share for _, share in path)]))
    return {name: (grid, np.minimum(shares, caps[name])) for name in histograms}


def refine_sequences(sequences: Sequence[Sequence[int]]) -> list[Sequence[int]]:
    """Sequences of about REFINE_TOKENS tokens in all, at even distances."""
    total = sum(map(len, sequences))
    wanted = max(1, min(len(sequences), round(len(sequences) * REFINE_TOKENS / total)))
    return [sequences[int((i + 0.5) * len(sequences) / wanted)] for i in range(wanted)]


def planned_tokens(sequences: Sequence[Sequence[int]], targets: Sequence[float], score: str = "gate-routed") -> int:
    """Tokens that calibrate_profile will run, without those of a measured budget."""
    again = sum(map(len, refine_sequences(sequences)))
    passes = 2 if score_named(score).calibrated else 1
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

    return SparsityProfile(
        format=FORMAT if neurons is None and budget == "uniform" else FORMAT_2,
        model=engine.identity,
        score=score,
        router_weighted=score_named(score).router_weighted,
        budget=budget,
        neurons=neurons,
        calibration=Calibration(tokens=tokens, text_sha256=text_sha256, max_len=max_len),
        layers=tables,
        created=Created(version=__version__, date=datetime.now(UTC).strftime("%Y-%m-%d")),
    )
