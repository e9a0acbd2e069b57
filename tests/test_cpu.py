"""The CPU back end against the definition."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import Problem, check_close, expert_traces, random_problem
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from cutedsl_kernels import cpu, sparse_moe
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
@given(arguments=problems(), few_tokens=st.sampled_from([0, 1, cpu.FEW_TOKENS]), every_row=st.booleans())
def test_matches_the_definition(arguments: dict[str, Any], few_tokens: int, every_row: bool) -> None:
    """All ways to compute an expert, mixed in one call or not; at these sizes the loop would always read every row."""
    problem = random_problem(**arguments)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "FEW_TOKENS", few_tokens)
        patch.setattr(cpu, "SMALL_EXPERT", 1 << 18 if every_row else 0)
        check_close(sparse_moe(**problem.arguments), problem)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("num_tokens", [1, 3, 40])
def test_expert_large_enough_to_skip_rows(dtype: torch.dtype, num_tokens: int, seed: int) -> None:
    """As it is, nothing patched: 3 tokens read rows in place, 40 copy them or read all."""
    problem = random_problem(
        seed,
        num_tokens=num_tokens,
        num_experts=4,
        top_k=2,
        hidden_size=1024,
        intermediate_size=320,
        dtype=dtype,
        sparsity=0.9,
    )
    assert cpu.SMALL_EXPERT < 1024 * 320
    check_close(sparse_moe(**problem.arguments), problem)


class RowsRead(TorchDispatchMode):
    """Which rows of w13 and w2_rows are read in place; how many rows are copied together; how many matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.w13: set[int] = set()
        self.w2_rows: set[int] = set()
        self.copied = self.products = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name == "_embedding_bag_per_sample_weights_backward":
            self.w13 |= set(args[2].tolist())
        elif "embedding_bag" in name:
            self.w2_rows |= set(args[1].tolist())
        elif name == "index_select" and args[0].dim() == 2 and args[1] == 0:
            self.copied += len(args[2])
        elif name in ("mm", "addmm", "bmm"):
            self.products += 1
        return func(*args, **(kwargs or {}))


def rows_needed(problem: Problem) -> tuple[int, int]:
    """Experts with a token, and rows of up (as many of down) that a token of their expert needs."""
    traces = list(expert_traces(problem))
    return len(traces), sum(int(trace.active.any(0).sum()) for trace in traces)


def test_rows_that_no_token_needs_are_not_read(seed: int) -> None:
    inter = 320
    problem = random_problem(
        seed, num_tokens=3, num_experts=4, top_k=2, hidden_size=1024, intermediate_size=inter, sparsity=0.85
    )
    with RowsRead() as read:
        sparse_moe(**problem.arguments)
    experts, needed = rows_needed(problem)
    up_rows = [row for row in read.w13 if row % (2 * inter) >= inter]
    assert len(up_rows) == len(read.w2_rows) == needed
    assert len(read.w13) - len(up_rows) == inter * experts
    assert read.copied == read.products == 0


def test_rows_that_no_token_needs_are_not_copied(seed: int) -> None:
    """Too many tokens of an expert for reading up in place: its rows are copied, those of down read in place."""
    problem = random_problem(
        seed,
        num_tokens=cpu.FEW_TOKENS + 1,
        num_experts=2,
        top_k=2,
        hidden_size=1024,
        intermediate_size=320,
        sparsity=0.95,
    )
    with RowsRead() as read:
        sparse_moe(**problem.arguments)
    experts, needed = rows_needed(problem)
    assert not read.w13
    assert read.copied == needed
    assert read.products == 2 * experts
