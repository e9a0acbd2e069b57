"""Plans by name, for the command line: auto, serving, dense, fused, fused:4, fused[tile_neurons=16]."""

from __future__ import annotations

import re
from dataclasses import asdict, fields
from typing import Any, cast

import torch

from cutedsl_kernels import MoEShape, Plan, UserError, plan_for
from cutedsl_kernels.configs import CONFIG_TYPES, PLAN_KINDS, TileConfig, illegal_reason, legal_plans
from cutedsl_kernels.cost_model import estimate_us
from cutedsl_kernels.environment import gpu_of

from .serving import serving_plan

_PATTERN = re.compile(r"(?P<kind>[a-z]+)(?::(?P<count>\d+)|\[(?P<fields>[^\]]*)\])?")


class NoPlan(UserError):
    """No plan of the name can run this shape at this number of tokens."""


def ranked_plans(
    shape: MoEShape,
    num_tokens: int,
    sparsity: float,
    pair_skip: float,
    device: torch.device,
    activation: str = "silu",
    kind: str | None = None,
) -> list[Plan]:
    """Legal plans (of one kind, or all), fastest by the cost model first."""
    gpu = gpu_of(device)
    plans = [
        plan
        for plan in legal_plans(shape, num_tokens)
        if kind in (None, plan.kind) and illegal_reason(plan, shape, num_tokens, activation) is None
    ]
    return sorted(plans, key=lambda plan: estimate_us(plan, shape, num_tokens, sparsity, gpu, pair_skip))


def resolve_plans(
    text: str,
    shape: MoEShape,
    num_tokens: int,
    sparsity: float,
    pair_skip: float,
    device: torch.device,
    activation: str = "silu",
) -> list[Plan]:
    """The plans that ``text`` names; on a CPU always the CPU back end. UserError for a name that is none, NoPlan if
    nothing of that name can run here."""
    match = _PATTERN.fullmatch(text.strip())
    kinds = [kind for kind in PLAN_KINDS if match is not None and kind == match["kind"]]
    auto = match is not None and match["kind"] in ("auto", "serving")
    if match is None or not (kinds or auto):
        choices = ", ".join(("auto", "serving", *PLAN_KINDS))
        raise UserError(f"plan must be one of {choices}, or KIND:COUNT or KIND[field=value,...], got {text!r}")
    if device.type == "cpu":
        return [Plan("cpu")]
    if match["kind"] == "serving":
        return [serving_plan(shape, num_tokens, sparsity, pair_skip, device, activation)]
    if auto:
        return [plan_for(shape, num_tokens, sparsity, device, pair_skip, activation)]
    kind = kinds[0]
    if kind not in CONFIG_TYPES:
        return [Plan(cast(Any, kind))]
    ranked = ranked_plans(shape, num_tokens, sparsity, pair_skip, device, activation, kind)
    if match["fields"] is not None:
        plan = Plan(cast(Any, kind), _config(kind, match["fields"], ranked))
        if reason := illegal_reason(plan, shape, num_tokens, activation):
            raise NoPlan(f"{plan} cannot run {shape.key} at {num_tokens} tokens: {reason}")
        return [plan]
    if not ranked:
        raise NoPlan(f"no {kind} plan can run {shape.key} at {num_tokens} tokens")
    return ranked[: int(match["count"] or 1)]


def _config(kind: str, text: str, ranked: list[Plan]) -> TileConfig:
    """The best config of the kind (its defaults where none is legal) with the given fields replaced."""
    start = (ranked[0].config if ranked else None) or CONFIG_TYPES[kind]()
    known = {f.name for f in fields(start)}
    values = {}
    for part in filter(None, text.split(",")):
        name, _, value = part.partition("=")
        if name.strip() not in known or not value.strip().isdigit():
            raise UserError(f"{kind}[...] takes field=integer with fields {', '.join(sorted(known))}, got {part!r}")
        values[name.strip()] = int(value)
    return type(start)(**asdict(start) | values)
