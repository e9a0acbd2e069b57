"""Scores: by what a neuron is judged active, and the per-neuron weights that fold into thresholds. docs/thresholds.md
derives them.

A score is |act(gate)| * c[e, i], with or without the routing weight r; a neuron is active when its score reaches tau.
Kernels see tau[e, i] = tau / c[e, i] only. c comes from weights alone (norms), or from weights and calibrated second
moments of the up projection.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from ..errors import UserError
from ..reference import local_experts, up_transform
from ..weights import ExpertWeights

WeightKind = Literal["none", "down", "up-down", "moments", "learned"]
CHECK_BLOCKS = 16
SMALLEST_WEIGHT = 1e-20  # keeps tau / c finite for a neuron whose weights are all zero
PRIOR_TOKENS = 16.0  # an expert's moments count as if so many tokens had shown the layer's average


@dataclass(frozen=True)
class Score:
    """name as in `calibrate --score`; weight: what c is; router_weighted: whether r multiplies the score."""

    name: str
    weight: WeightKind
    router_weighted: bool

    @property
    def calibrated(self) -> bool:
        """Whether c needs a factor per neuron from calibration text: recorded moments, or learned."""
        return self.weight in ("moments", "learned")


_KINDS: tuple[tuple[str, WeightKind], ...] = (
    ("gate", "none"),
    ("down", "down"),
    ("up-down", "up-down"),
    ("moments", "moments"),
    ("learned", "learned"),
)
SCORES = {
    name + suffix: Score(name + suffix, weight, routed)
    for name, weight in _KINDS
    for suffix, routed in (("", False), ("-routed", True))
}


def score_named(name: str) -> Score:
    """UserError for an unknown name."""
    if name not in SCORES:
        raise UserError(f"score must be one of {', '.join(SCORES)}, got {name!r}")
    return SCORES[name]


def row_norms(weights: ExpertWeights) -> tuple[torch.Tensor, torch.Tensor]:
    """Norms of the up rows and of the down rows of every neuron, fp32 [E, I] each; one expert in fp32 at a time."""
    inter = weights.intermediate_size
    up = torch.stack([rows[inter:].float().norm(dim=1) for rows in weights.w13])
    down = torch.stack([rows.float().norm(dim=1) for rows in weights.w2_rows])
    return up, down


class UpMoments:
    """Sums of u^2 per neuron over the tokens of each expert, fp64 [E, I], and token counts [E]. Add with ``observe``
    and ``merge``.
    """

    def __init__(self, num_experts: int, intermediate_size: int, device: torch.device | str = "cpu") -> None:
        self.squares = torch.zeros(num_experts, intermediate_size, dtype=torch.float64, device=device)
        self.tokens = torch.zeros(num_experts, dtype=torch.float64, device=device)

    def observe(self, expert: int, up: torch.Tensor) -> None:
        """up: W_up x of the tokens routed to ``expert``, [m, I]."""
        self.squares[expert] += up.double().square().sum(0)
        self.tokens[expert] += up.shape[0]

    def merge(self, other: UpMoments) -> None:
        self.squares += other.squares.to(self.squares.device)
        self.tokens += other.tokens.to(self.tokens.device)

    def rms(self, up_norms: torch.Tensor) -> torch.Tensor:
        """sqrt(E[u^2]) fp32 [E, I]. Experts with few tokens are drawn towards kappa * up_norms^2, kappa the layer's
        pooled ratio.

        UserError if no token was seen.
        """
        if not float(self.tokens.sum()):
            raise UserError("no token was routed to this layer's experts during calibration: use more text")
        norms = up_norms.double().square()
        seen = self.tokens.unsqueeze(1)
        kappa = self.squares.sum() / (seen * norms).sum().clamp(min=1e-300)
        return ((self.squares + PRIOR_TOKENS * kappa * norms) / (seen + PRIOR_TOKENS)).sqrt().float()


def up_projection(weights: ExpertWeights, expert: int, x: torch.Tensor, activation: str) -> torch.Tensor:
    """What multiplies act(gate) for tokens x [m, H] of a local expert: fp32 [m, I]."""
    inter = weights.intermediate_size
    up = x.float() @ weights.w13[expert, inter:].float().t()
    if weights.w13_bias is not None:
        up = up + weights.w13_bias[expert, inter:].float()
    return up_transform(up, activation)


def observe_up(
    moments: UpMoments,
    hidden_states: torch.Tensor,
    weights: ExpertWeights,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    *,
    activation: str = "silu",
    expert_map: torch.Tensor | None = None,
    apply_router_weight_on_input: bool = False,
) -> None:
    """Feeds ``moments`` with one layer's call; arguments as sparse_moe's. Synchronises the device."""
    ids = local_experts(topk_ids, expert_map, weights.num_experts)
    for e in torch.unique(ids[ids >= 0]).tolist():
        token, slot = torch.nonzero(ids == e, as_tuple=True)
        x = hidden_states[token]
        if apply_router_weight_on_input:
            x = (x.float() * topk_weights[token, slot].float().unsqueeze(1)).to(x.dtype)
        moments.observe(e, up_projection(weights, e, x, activation))


def neuron_weights(score: Score, weights: ExpertWeights, rms_up: torch.Tensor | None = None) -> torch.Tensor | None:
    """c fp32 [E, I] on the weights' device, at least SMALLEST_WEIGHT; None where c is 1. ``rms_up`` [E, I] for
    calibrated scores: sqrt(E[u^2]), or the learned factor on the down norm.

    It depends on one neuron's weights at a time, so a shard's c is the shard of the whole model's.
    """
    if score.weight == "none":
        return None
    up, down = row_norms(weights)
    if score.weight == "up-down":
        down = down * up
    elif score.calibrated:
        if rms_up is None or rms_up.shape != down.shape:
            found = None if rms_up is None else tuple(rms_up.shape)
            raise ValueError(f"rms_up must be [E, I] = {tuple(down.shape)} for the score {score.name}, got {found}")
        down = down * rms_up.to(down.device, torch.float32)
    return down.clamp(min=SMALLEST_WEIGHT)


def weight_check(weights: ExpertWeights) -> torch.Tensor:
    """Fingerprint of a layer: sums of the up and down norms over gcd(I, 16) equal blocks of neurons, fp32 [E, 2,
    blocks].
    """
    return check_of_norms(torch.stack(row_norms(weights), dim=1))


def check_of_norms(norms: torch.Tensor) -> torch.Tensor:
    """weight_check from norms of the up and down rows, fp32 [E, 2, I]."""
    return norms.unflatten(2, (math.gcd(norms.shape[2], CHECK_BLOCKS), -1)).sum(-1).cpu()


def matches_check(stored: torch.Tensor, weights: ExpertWeights, tp_rank: int = 0, tp_size: int = 1) -> bool:
    """Whether these weights (one of ``tp_size`` equal shards of the neurons; experts already selected) have the
    stored fingerprint.

    Relative tolerance 1e-3, so that another device or summation order agrees. Blocks that a shard cuts in two are not
    compared.
    """
    blocks = stored.shape[-1]
    norms = torch.stack(row_norms(weights), dim=1).cpu()
    local, whole = norms.shape[-1], norms.shape[-1] * tp_size
    if stored.shape[0] != norms.shape[0] or whole % blocks:
        return False
    width, start = whole // blocks, tp_rank * local
    compared = [b for b in range(blocks) if start <= b * width and (b + 1) * width <= start + local]
    mine = [norms[:, :, b * width - start : (b + 1) * width - start].sum(-1) for b in compared]
    if not compared:
        return True
    return torch.allclose(torch.stack(mine, dim=-1), stored[:, :, compared], rtol=1e-3, atol=1e-6)


@dataclass(frozen=True)
class NeuronParts:
    """A layer's per-neuron parts, of the whole model: check fp32 [E, 2, blocks]; rms_up fp16 [E, I] (calibrated
    scores: what the down norm is multiplied by) or None.
    """

    check: torch.Tensor
    rms_up: torch.Tensor | None = None


def save_neuron_parts(path: str | os.PathLike[str], layers: Mapping[str, NeuronParts]) -> tuple[str, int]:
    """Writes a safetensors file; returns its (sha256, size in bytes). OSError if the place cannot be written."""
    from safetensors.torch import save

    tensors: dict[str, torch.Tensor] = {}
    for name, parts in layers.items():
        tensors[f"{name}.check"] = parts.check.float().contiguous()
        if parts.rms_up is not None:
            tensors[f"{name}.rms_up"] = parts.rms_up.half().contiguous()
    data = save(tensors)
    Path(path).write_bytes(data)
    return hashlib.sha256(data).hexdigest(), len(data)


def load_neuron_parts(path: str | os.PathLike[str], sha256: str, layers: Iterable[str]) -> dict[str, NeuronParts]:
    """Reads what save_neuron_parts wrote. UserError, one line: missing, changed since the profile was made, or a
    layer short.
    """
    from safetensors.torch import load

    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise UserError(
            f"{path}: cannot read the profile's neuron weights: {error.strerror}: keep both files together"
        ) from None
    if hashlib.sha256(data).hexdigest() != sha256:
        raise UserError(f"{path}: does not belong to the profile beside it (sha256 differs): calibrate again")
    tensors = load(data)
    found = {}
    for name in layers:
        check = tensors.get(f"{name}.check")
        if check is None:
            raise UserError(f"{path}: has no layer {name!r}: calibrate again")
        found[name] = NeuronParts(check, tensors.get(f"{name}.rms_up"))
    return found
