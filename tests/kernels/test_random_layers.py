"""Layers, routings and plans drawn at random, executed on the CPU with memory and race checks, against the definition.

A fresh seed for every run: what no list of cases thought of comes up sooner or later, and a failure prints its seed.
"""

from __future__ import annotations

import random

import pytest

from cutedsl_kernels.configs import legal_plans
from tests.helpers import check_close, random_problem

from . import test_fused_execute as fused
from . import test_staged_execute as staged

pytest.importorskip("cutlass")
pytestmark = pytest.mark.execute


@pytest.mark.parametrize("number", range(10))
@pytest.mark.parametrize("kind", ["fused", "staged"])
def test_random_layer(run_ptx, seed: int, kind: str, number: int) -> None:
    source = random.Random(seed + number)
    choose = source.choice
    num_experts, num_tokens = choose([1, 2, 3, 5, 8]), choose([1, 2, 3, 4, 7, 8, 9, 15, 17, 24, 33, 40])
    on_input = source.random() < 0.2
    arguments = {
        "num_tokens": num_tokens,
        "num_experts": num_experts,
        "top_k": source.randint(1, min(num_experts, 4)),
        "hidden_size": 64 * choose([1, 2, 3, 4, 5, 7, 8, 9]),
        "intermediate_size": choose([8, 16, 24, 40, 63, 64, 65, 72, 104, 130, 136]),
        "routing": choose(["uniform", "zipf", "one-expert", "repeated"]),
        "sparsity": choose([0.0, 0.3, 0.7, 0.85, 0.95, 1.0]),
        "skip_pairs": 0.0 if on_input else choose([0.0, 0.0, 0.35, 0.8, 1.0]),
        "router_weighted": source.random() < 0.5,
        "activation": choose(["silu", "gelu", "gelu_tanh", "swigluoai"]),
        "biases": source.random() < 0.35,
        "remote_experts": source.random() < 0.3,
        "invalid_ids": source.random() < 0.3,
        "apply_router_weight_on_input": on_input,
    }
    problem = random_problem(source.randrange(1 << 30), **arguments)
    shape = problem.weights.shape(arguments["top_k"])
    plans = [plan for plan in legal_plans(shape, num_tokens, problem.activation) if plan.kind == kind]
    assert plans, shape.key
    plan = choose(plans)
    print(arguments, plan)
    if kind == "fused":
        out = fused.execute(run_ptx, problem, plan.config, choose([1, 2, 3, 7]))
    else:
        out = staged.execute(run_ptx, problem, plan.config, source.random() < 0.5)["out"]
    check_close(out, problem)
