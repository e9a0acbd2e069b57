"""Intra-expert activation sparsity for Mixture-of-Experts inference.

Importing this needs no GPU, and loads neither the CuTe DSL nor vLLM.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .errors import UserError
from .moe import sparse_moe
from .plan import Plan, plan_for
from .reference import sparse_moe_ref
from .shapes import KNOWN_MODELS, MoEShape
from .weights import ExpertWeights

if TYPE_CHECKING:
    from .sparsity import ProfileError, SparsityProfile

__version__ = "0.1.0"

__all__ = [
    "KNOWN_MODELS",
    "ExpertWeights",
    "MoEShape",
    "Plan",
    "ProfileError",
    "SparsityProfile",
    "UserError",
    "plan_for",
    "sparse_moe",
    "sparse_moe_ref",
]


def __getattr__(name: str) -> Any:
    """The profile's classes come when they are asked for: the kernels run on hosts that lack pydantic."""
    if name in ("ProfileError", "SparsityProfile"):
        return getattr(import_module(".sparsity", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
