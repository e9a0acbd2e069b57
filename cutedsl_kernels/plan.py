"""Plan: which kernels run for a shape and a number of tokens, and with which tile config."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from .shapes import MoEShape


@dataclass(frozen=True)
class Plan:
    """``dense``: a dense grouped GEMM. ``cpu``: the CPU back end. ``fused``, ``staged``: with their kernel's config."""

    kind: Literal["fused", "staged", "dense", "cpu"]


def plan_for(shape: MoEShape, num_tokens: int, sparsity: float, device: torch.device | str) -> Plan:
    """The plan that is expected to be fastest for ``num_tokens`` tokens at ``sparsity`` on ``device``."""
    if torch.device(device).type == "cpu":
        return Plan("cpu")
    return Plan("dense")
