"""Calibrating a running engine: record score histograms over a text, and make a SparsityProfile of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any

from ...calibration import DEFAULT_TARGETS, LayerHistograms, layer_table
from ...sparsity import Calibration, Created, LayerTable, SparsityProfile
from .engine import SparseEngine

BATCH_TOKENS = 8192
REFINE_FROM = 0.5  # below this target a sparse model's routing is close enough to the dense one's
REFINE_TOKENS = 8192


def record(
    engine: SparseEngine, sequences: Sequence[Sequence[int]], progress: Callable[[int], Any] = lambda tokens: None
) -> LayerHistograms:
    """Histograms of the model as it now runs, over ``sequences``; ``progress`` is told each batch's tokens."""
    engine.start_recording()
    tokens, batch, size = 0, [], 0
    for index, sequence in enumerate(sequences):
        batch.append(sequence)
        size += len(sequence)
        if size >= BATCH_TOKENS or index == len(sequences) - 1:
            engine.run(batch)
            progress(size)
            tokens += size
            batch, size = [], 0
    histograms = engine.read_recording()
    engine.stop_recording()
    histograms.tokens = tokens
    return histograms


def calibrate_profile(
    engine: SparseEngine,
    sequences: Sequence[Sequence[int]],
    *,
    text_sha256: str,
    max_len: int,
    score: str = "gate-routed",
    skip_pairs: float = 0.0,
    targets: Sequence[float] = DEFAULT_TARGETS,
    progress: Callable[[int], Any] = lambda tokens: None,
) -> SparsityProfile:
    """The profile of the engine's model from a text: ``sequences`` of token ids.

    First the dense model is recorded. A sparse model's layers see other inputs and routing weights than the dense
    one's, so every row from REFINE_FROM on is then recorded again under its own first thresholds, on a part of the
    text (refine_sequences). ``progress`` is told the tokens of each batch run; planned_tokens gives their sum.
    Leaves the engine dense.
    """
    engine.set_target(0.0)
    histograms = record(engine, sequences, progress)
    weighted = score == "gate-routed"
    names = list(histograms.layers)
    rows = []
    for target in targets:
        row = {n: histograms.layers[n].thresholds(target, score=score, skip_pairs=skip_pairs) for n in names}
        if target >= REFINE_FROM:
            engine.set_thresholds({n: (*row[n], weighted) for n in names}, sparsity=target)
            seen = record(engine, refine_sequences(sequences), progress).layers
            row = {n: seen[n].thresholds(target, score=score, skip_pairs=skip_pairs) for n in names}
        rows.append(row)
    engine.set_target(0.0)
    tables = {name: layer_table(targets, [row[name] for row in rows]) for name in names}
    return make_profile(engine, tables, tokens=histograms.tokens, text_sha256=text_sha256, max_len=max_len, score=score)


def refine_sequences(sequences: Sequence[Sequence[int]]) -> list[Sequence[int]]:
    """Sequences of about REFINE_TOKENS tokens in all, at even distances."""
    total = sum(map(len, sequences))
    wanted = max(1, min(len(sequences), round(len(sequences) * REFINE_TOKENS / total)))
    return [sequences[int((i + 0.5) * len(sequences) / wanted)] for i in range(wanted)]


def planned_tokens(sequences: Sequence[Sequence[int]], targets: Sequence[float]) -> int:
    """Tokens that calibrate_profile will run."""
    again = sum(map(len, refine_sequences(sequences)))
    return sum(map(len, sequences)) + again * sum(target >= REFINE_FROM for target in targets)


def make_profile(
    engine: SparseEngine,
    tables: dict[str, LayerTable],
    *,
    tokens: int,
    text_sha256: str,
    max_len: int,
    score: str,
) -> SparsityProfile:
    """A profile of the engine's model from its layers' tables."""
    from ... import __version__

    return SparsityProfile(
        model=engine.identity,
        score=score,
        router_weighted=score == "gate-routed",
        calibration=Calibration(tokens=tokens, text_sha256=text_sha256, max_len=max_len),
        layers=tables,
        created=Created(version=__version__, date=datetime.now(UTC).strftime("%Y-%m-%d")),
    )
