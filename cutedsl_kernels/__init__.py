"""Intra-expert activation sparsity for Mixture-of-Experts inference.

Importing this needs no GPU, and loads neither the CuTe DSL nor vLLM.
"""

from .errors import UserError
from .moe import sparse_moe
from .plan import Plan, plan_for
from .reference import sparse_moe_ref
from .shapes import KNOWN_MODELS, MoEShape
from .sparsity import ProfileError, SparsityProfile
from .weights import ExpertWeights

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
