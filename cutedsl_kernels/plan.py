"""plan_for: which kernels should run for a shape, a number of tokens and a sparsity."""

from __future__ import annotations

import functools
from dataclasses import replace

import torch

from .configs import FusedConfig, Plan, TileConfig, illegal_reason, legal_plans
from .cost_model import TORCH_DENSE, VLLM_DENSE, Gpu, estimate_us
from .environment import gpu_of
from .shapes import MoEShape
from .tuned_table import find_table, forget_tables

__all__ = ["FusedConfig", "Plan", "TileConfig", "forget_plans", "illegal_reason", "legal_plans", "plan_for"]

DENSE_MARGIN = 1.05  # the model is off by up to 5 %: a smaller gain may be none


@functools.lru_cache(maxsize=65536)
def plan_for(
    shape: MoEShape,
    num_tokens: int,
    sparsity: float,
    device: torch.device | str | Gpu,
    pair_skip: float = 0.0,
    activation: str = "silu",
) -> Plan:
    """The plan expected to be fastest for ``num_tokens`` tokens at ``sparsity`` on ``device``.

    sparsity: share of inactive neurons over all pairs, skipped ones included; pair_skip: share of pairs skipped whole.
    From the tuned table of the nearest bucket of tokens above where one has an entry near these shares, else by the
    cost model. Never fails for lack of a table or a GPU; ValueError for a number of tokens or a share out of range.
    Remembered: a repeated call is a dictionary lookup. forget_plans() makes it look at the files again. A ``Gpu``
    instead of a device says which dense path the plans compete with (``Gpu.dense``); for a device it is the library's
    own, torch's grouped_mm.
    """
    if num_tokens < 0:
        raise ValueError(f"num_tokens must be at least 0, got {num_tokens}")
    for name, value in (("sparsity", sparsity), ("pair_skip", pair_skip)):
        if not 0.0 <= value <= 1.0:
            raise ValueError(f"{name} must be a share between 0 and 1, got {value!r}")
    if isinstance(device, Gpu):
        gpu = device
    elif torch.device(device).type == "cpu":
        return Plan("cpu")
    else:
        gpu = replace(gpu_of(device), dense=TORCH_DENSE)
    table = find_table(shape, gpu)
    if table is not None:
        tuned = table.lookup(num_tokens, sparsity, pair_skip)
        other_dense = (table.metadata["dense"] == "vllm") != (gpu.dense == VLLM_DENSE)
        if tuned is not None and tuned.kind == "dense" and other_dense:
            tuned = None  # it lost to a dense path that does not run here
        if tuned is not None and illegal_reason(tuned, shape, num_tokens, activation) is None:
            return tuned
    return _modelled(shape, num_tokens, sparsity, gpu, pair_skip, activation)


def forget_plans() -> None:
    """Forgets every remembered plan and table, so that the next plan_for reads the tuned tables again."""
    plan_for.cache_clear()
    forget_tables()


def _modelled(shape: MoEShape, num_tokens: int, sparsity: float, gpu: Gpu, pair_skip: float, activation: str) -> Plan:
    plans = legal_plans(shape, num_tokens, activation)
    return min(plans, key=lambda plan: modelled_us(plan, shape, num_tokens, sparsity, gpu, pair_skip))


def modelled_us(
    plan: Plan, shape: MoEShape, num_tokens: int, sparsity: float, gpu: Gpu, pair_skip: float = 0.0
) -> float:
    """What plan_for compares where no table decides: the cost model's microseconds, of a sparse plan times
    DENSE_MARGIN."""
    us = estimate_us(plan, shape, num_tokens, sparsity, gpu, pair_skip)
    return us if plan.kind == "dense" else us * DENSE_MARGIN
