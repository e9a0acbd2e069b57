"""The CPU back end against the definition."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import check_close, random_problem
from hypothesis import given, settings
from hypothesis import strategies as st

from cutedsl_kernels import sparse_moe
from cutedsl_kernels.reference import ACTIVATIONS

pytestmark = pytest.mark.cpu


FLAGS = ("router_weighted", "biases", "remote_experts", "invalid_ids", "apply_router_weight_on_input")


@st.composite
def problems(draw: st.DrawFn) -> dict[str, Any]:
    """Arguments of random_problem (not the problem, whose printout would be pages of numbers)."""
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    # The tolerance compares maxima over many roundings: with 16-bit types a result of a few numbers has too few.
    least = 1 if dtype == torch.float32 else 24
    num_experts = draw(st.integers(1, 13))
    return {
        "seed": draw(st.integers(0, 2**31)),
        "num_tokens": draw(st.integers(0, 24)),
        "num_experts": num_experts,
        "top_k": draw(st.integers(1, min(num_experts, 8))),
        "hidden_size": draw(st.integers(least, 96)),
        "intermediate_size": draw(st.integers(least, 80)),
        "dtype": dtype,
        "routing": draw(st.sampled_from(["uniform", "zipf", "one-expert", "repeated"])),
        "sparsity": draw(st.sampled_from([0.0, 0.3, 0.85, 1.0])),
        "skip_pairs": draw(st.sampled_from([0.0, 0.35])),
        "activation": draw(st.sampled_from(ACTIVATIONS)),
        "ids_dtype": draw(st.sampled_from([torch.int32, torch.int64])),
        **{name: draw(st.booleans()) for name in FLAGS},
    }


@settings(max_examples=150, deadline=None)
@given(arguments=problems())
def test_matches_the_definition(arguments: dict[str, Any]) -> None:
    problem = random_problem(**arguments)
    check_close(sparse_moe(**problem.arguments), problem)
