"""Calibrating a running engine: record score histograms over a text, and make a SparsityProfile of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any

from ...calibration import DEFAULT_TARGETS, LayerHistograms
from ...sparsity import Calibration, Created, SparsityProfile
from .engine import SparseEngine

BATCH_TOKENS = 8192


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


def make_profile(
    engine: SparseEngine,
    histograms: LayerHistograms,
    *,
    text_sha256: str,
    max_len: int,
    score: str = "gate-routed",
    skip_pairs: float = 0.0,
    targets: Sequence[float] = DEFAULT_TARGETS,
) -> SparsityProfile:
    """The profile that follows from the histograms."""
    from ... import __version__

    return SparsityProfile(
        model=engine.identity,
        score=score,
        router_weighted=score == "gate-routed",
        calibration=Calibration(tokens=histograms.tokens, text_sha256=text_sha256, max_len=max_len),
        layers={
            name: histogram.table(targets, score=score, skip_pairs=skip_pairs)
            for name, histogram in histograms.layers.items()
        },
        created=Created(version=__version__, date=datetime.now(UTC).strftime("%Y-%m-%d")),
    )
