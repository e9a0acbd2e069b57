"""Evaluation through a vLLM engine: the dense model and several targets on the same text, in one pass over it."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import track

from ..errors import UserError
from .metrics import Comparison, Quality
from .report import LayerRealised, Row

if TYPE_CHECKING:
    from ..integration.vllm.engine import SparseEngine
    from ..sparsity import SparsityProfile


def open_profile(model: str, profile: str | os.PathLike[str] | None) -> tuple[Path, SparsityProfile]:
    """(path, contents) of ``profile``, or of the one a server would find for ``model``. UserError if there is no such
    model or profile.
    """
    from ..integration.vllm.engine import check_model
    from ..integration.vllm.options import Options, find_profile
    from ..sparsity import SparsityProfile

    check_model(model)
    path = Path(profile) if profile is not None else find_profile(Options.collect(None), model)
    return path, SparsityProfile.load(path)


def start_engine(
    model: str,
    profile: str | os.PathLike[str] | None,
    targets: Sequence[float],
    *,
    max_len: int | None,
    tensor_parallel_size: int = 1,
) -> SparseEngine:
    """An engine with ``profile`` (None: the one beside the checkpoint). UserError before the engine starts if a
    target lies beyond it.
    """
    from ..integration.vllm.engine import SparseEngine, check_model

    config = check_model(model)
    path, loaded = open_profile(model, profile)
    for target in targets:
        if target > loaded.max_target:
            raise UserError(
                f"--target must lie in 0..{loaded.max_target:g} (the largest target of {path}), got {target:g}"
            )
    limit = None if max_len is None else able_length(config, max_len) + 1
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    return SparseEngine(
        model,
        profile=path,
        target=0.0,
        max_model_len=limit,
        tensor_parallel_size=tensor_parallel_size,
        disable_log_stats=True,
    )


def able_length(config: Mapping[str, Any], max_len: int) -> int:
    """``max_len``, or the most tokens of a sequence that the model with ``config`` takes with one more to predict; says
    so where that is less."""
    longest = (config.get("text_config") or config).get("max_position_embeddings")
    if not isinstance(longest, int) or max_len < longest:
        return max_len
    print(f"--max-len {max_len}: cut to {longest - 1}, the model's context is {longest} tokens", file=sys.stderr)
    return longest - 1


def setting_qualities(
    engine: SparseEngine, sequences: Sequence[Sequence[int]], settings: Sequence[Any]
) -> list[Quality]:
    """Quality of each setting (targets, or thresholds per layer) against the dense model, on the same text."""
    comparisons = [Comparison() for _ in settings]
    for chunk in engine.score(sequences, settings=[0.0, *settings], count=False):
        for comparison, log_probs in zip(comparisons, chunk.log_probs[1:], strict=True):
            comparison.add(chunk.next_tokens, chunk.log_probs[0], log_probs)
    return [comparison.result() for comparison in comparisons]


def compare_targets(
    engine: SparseEngine, sequences: Sequence[Sequence[int]], targets: Sequence[float], console: Console | None = None
) -> list[Row]:
    """Rows for the dense model (first) and every target, on the same ``sequences`` of token ids."""
    settings = [0.0, *targets]
    comparisons = [Comparison() for _ in settings]
    engine.reset_realised()
    steps = track(
        range(len(sequences)), description="evaluating", console=console, transient=True, disable=console is None
    )
    for index in steps:
        for chunk in engine.score([sequences[index]], settings=settings):
            for comparison, log_probs in zip(comparisons, chunk.log_probs, strict=True):
                comparison.add(chunk.next_tokens, chunk.log_probs[0], log_probs)
    rows = []
    for setting, comparison in zip(settings, comparisons, strict=True):
        layers = {
            name: LayerRealised(counts.sparsity, counts.skipped_share)
            for name, counts in engine.realised(setting).items()
        }
        rows.append(Row(setting, comparison.result(), layers))
    return rows
