"""Per-neuron parts of scores inside the engine: second moments and norms gathered from the ranks, weights c set on
them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ...calibration import LayerHistogram
from ...errors import UserError
from ...quality.budgets import expert_factors
from ...quality.scores import (
    NeuronParts,
    Score,
    UpMoments,
    check_of_norms,
    load_neuron_parts,
    matches_check,
    neuron_weights,
    row_norms,
    score_named,
)
from ...sparsity import SparsityProfile
from .state import LayerState

if TYPE_CHECKING:
    from .engine import SparseEngine


def owned_experts(layer: Any) -> torch.Tensor | None:
    """Global ids of this rank's experts in the order of its weights; None if it holds all."""
    if layer.expert_map is None:
        return None
    slots = layer.expert_map.cpu().long()
    owned = torch.nonzero(slots >= 0).squeeze(1)
    return owned[torch.argsort(slots[owned])]


def shard(whole: torch.Tensor, layer: Any, state: LayerState) -> torch.Tensor:
    """This rank's [E_local, I_local] of the whole model's [E or 1, I or 1]."""
    owned = owned_experts(layer)
    if whole.shape[0] > 1 and owned is not None:
        whole = whole[owned]
    if whole.shape[1] > 1 and state.tp_size > 1:
        local = state.weights.intermediate_size
        whole = whole[:, state.tp_rank * local : (state.tp_rank + 1) * local]
    return whole


def unshard(local: torch.Tensor, layer: Any, state: LayerState) -> torch.Tensor:
    """This rank's [E_local, ..., I_local] in a whole model's [E, ..., I] of zeros: the sum over ranks is the
    whole.
    """
    owned = owned_experts(layer)
    experts = local.shape[0] if owned is None else layer.expert_map.numel()
    rows = torch.arange(local.shape[0]) if owned is None else owned
    width = local.shape[-1]
    whole = torch.zeros(experts, *local.shape[1:-1], width * state.tp_size, dtype=local.dtype)
    whole[rows, ..., state.tp_rank * width : (state.tp_rank + 1) * width] = local.cpu()
    return whole


class NeuronMethods:
    """Methods of the worker extension, asked for through collective_rpc. ``_sparsity_states`` is the worker's."""

    _sparsity_states: Callable[[], dict[str, tuple[Any, LayerState]]]

    def sparsity_record_moments(self, on: bool) -> None:
        for _, state in self._sparsity_states().values():
            w = state.weights
            state.moments = UpMoments(w.num_experts, w.intermediate_size, w.device) if on else None

    def sparsity_moments(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """(sums of u^2 [E, I], tokens [E]) of the whole model per layer, zero where another rank holds the part."""
        found = {}
        for name, (layer, state) in self._sparsity_states().items():
            if state.moments is None:
                continue
            counted = state.moments.tokens if state.tp_rank == 0 else torch.zeros_like(state.moments.tokens)
            owned = owned_experts(layer)
            tokens = torch.zeros(counted.numel() if owned is None else layer.expert_map.numel(), dtype=torch.float64)
            tokens[torch.arange(counted.numel()) if owned is None else owned] = counted.cpu()
            found[name] = (unshard(state.moments.squares, layer, state).numpy(), tokens.numpy())
        return found

    def sparsity_least_best(self) -> dict[str, float]:
        """Per layer, the least routing weight that a token recorded so far gave its best expert."""
        return {name: state.least_best_weight for name, (_, state) in self._sparsity_states().items()}

    def sparsity_norms(self) -> dict[str, np.ndarray]:
        """Norms of up and down rows, [E, 2, I] per layer, zero where another rank holds the part."""
        return {
            name: unshard(torch.stack(row_norms(state.weights), dim=1), layer, state).numpy()
            for name, (layer, state) in self._sparsity_states().items()
        }

    def sparsity_score(self, score: str, rms_up: dict[str, torch.Tensor] | None) -> None:
        """From now on recorders and numeric thresholds count by ``score``; rms_up: the whole model's [E, I] per
        layer.
        """
        for name, (layer, state) in self._sparsity_states().items():
            set_score(layer, state, score_named(score), None if rms_up is None else rms_up[name])


def set_score(layer: Any, state: LayerState, score: Score, rms_up: torch.Tensor | None) -> None:
    local = None if rms_up is None else shard(rms_up.float(), layer, state)
    state.neuron_weights = neuron_weights(score, state.weights, local)


def record_moments(engine: SparseEngine, batches: Iterator[Sequence[Sequence[int]]]) -> dict[str, UpMoments]:
    """The whole model's moments per layer over ``batches`` of sequences, summed over ranks."""
    engine._call("sparsity_record_moments", True)
    for batch in batches:
        engine.run(batch)
    found: dict[str, UpMoments] = {}
    for part in engine._call("sparsity_moments"):
        for name, (squares, tokens) in part.items():
            moments = UpMoments(*squares.shape)
            moments.squares += torch.from_numpy(squares)
            moments.tokens += torch.from_numpy(tokens)
            if name in found:
                found[name].merge(moments)
            else:
                found[name] = moments
    engine._call("sparsity_record_moments", False)
    return found


def rho_caps(engine: SparseEngine) -> dict[str, float]:
    """Per layer, the largest pair threshold that left every recorded token an expert."""
    caps: dict[str, float] = {}
    for part in engine._call("sparsity_least_best"):
        for name, value in part.items():
            caps[name] = min(value, caps.get(name, value))
    return caps


def gather_norms(engine: SparseEngine) -> dict[str, torch.Tensor]:
    """Norms of up and down rows of the whole model, fp32 [E, 2, I] per layer."""
    found: dict[str, torch.Tensor] = {}
    for part in engine._call("sparsity_norms"):
        for name, norms in part.items():
            found[name] = found[name] + torch.from_numpy(norms) if name in found else torch.from_numpy(norms)
    return found


def neuron_parts(
    engine: SparseEngine,
    score: Score,
    batches: Iterator[Sequence[Sequence[int]]],
    learned: Sequence[torch.Tensor] | None = None,
) -> dict[str, NeuronParts] | None:
    """What the score needs per neuron, and the fingerprints of the weights; sets the score on all ranks. None: needs
    nothing. ``learned``: the factors [E, I] of every layer in order, for a learned score.

    rms_up is rounded to fp16 as the file will hold it, so that calibration and serving use the same numbers.
    """
    if score.weight == "none":
        engine._call("sparsity_score", score.name, None)
        return None
    norms = gather_norms(engine)
    rms: dict[str, torch.Tensor] | None = None
    if score.weight == "learned":
        if learned is None or [tuple(part.shape) for part in learned] != [
            (n.shape[0], n.shape[2]) for n in norms.values()
        ]:
            raise ValueError(
                f"learned must be the factors [E, I] of all {len(norms)} layers for the score {score.name}"
            )
        rms = {name: part.half() for name, part in zip(norms, learned, strict=True)}
    elif score.calibrated:
        moments = record_moments(engine, batches)
        rms = {name: moments[name].rms(norms[name][:, 0]).half() for name in norms}
    engine._call("sparsity_score", score.name, rms)
    return {name: NeuronParts(check_of_norms(norms[name]), None if rms is None else rms[name]) for name in norms}


def raise_experts(
    engine: SparseEngine, score: Score, parts: dict[str, NeuronParts], histograms: Mapping[str, LayerHistogram]
) -> dict[str, NeuronParts] | None:
    """``parts`` with the weights of experts raised that would be too sparse (budgets.expert_factors), set on all ranks.
    None: there are none.
    """
    factors = {name: expert_factors(h, router_weighted=score.router_weighted) for name, h in histograms.items()}
    if all(float(factor.max()) == 1 for factor in factors.values()):
        return None
    raised = {}
    for name, part in parts.items():
        if part.rms_up is None:
            return None  # c follows from the weights alone, and has no factor to raise
        rms = (part.rms_up.float() * factors[name].unsqueeze(1)).clamp(max=65504.0)
        raised[name] = NeuronParts(part.check, rms.half())
    engine._call("sparsity_score", score.name, {name: part.rms_up for name, part in raised.items()})
    return raised


def load_parts(profile: SparsityProfile, path: str | Path) -> dict[str, NeuronParts]:
    """Per-neuron parts of a profile read from ``path``; empty for a profile without. UserError, one line, if they do
    not fit.
    """
    if profile.neurons is None:
        return {}
    return load_neuron_parts(Path(path).parent / profile.neurons.file, profile.neurons.sha256, profile.layers)


def apply_parts(layer: Any, state: LayerState, score: str, parts: NeuronParts) -> None:
    """Checks the fingerprint of this rank's weights and sets c. UserError if the weights are not the calibrated
    ones.
    """
    owned = owned_experts(layer)
    stored = parts.check if owned is None else parts.check[owned]
    if not matches_check(stored, state.weights, state.tp_rank, state.tp_size):
        raise UserError(
            f"{state.name}: the weights are not those the sparsity profile was made for (norms of up and down rows "
            "differ): run `cutedsl-kernels calibrate` on this checkpoint"
        )
    set_score(layer, state, score_named(score), parts.rms_up)
