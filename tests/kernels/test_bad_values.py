"""NaN and infinity of one token stay with that token, executed on the CPU.

Engines pad batches with rows that may hold anything, and tokens share blocks, weight rows and lists of neurons.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from tests.helpers import fp32_reference, random_problem

from . import test_fused_execute as fused
from . import test_staged_execute as staged

pytest.importorskip("cutlass")
pytestmark = [pytest.mark.execute, pytest.mark.xdist_group("bad values: same four compilations")]

PATHS = {
    "fused": lambda run_ptx, problem: fused.execute(run_ptx, problem, fused.WIDE, 2),
    "staged": lambda run_ptx, problem: staged.execute(run_ptx, problem, staged.WARP, False)["out"],
    "staged, wgmma": lambda run_ptx, problem: staged.execute(run_ptx, problem, staged.WGMMA, False)["out"],
    "staged, deterministic": lambda run_ptx, problem: staged.execute(
        run_ptx, problem, replace(staged.WARP, token_block=32), True
    )["out"],
}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 3e38])
@pytest.mark.parametrize("of", ["hidden state", "routing weight"])
@pytest.mark.parametrize("path", PATHS)
def test_bad_values_stay_with_their_token(run_ptx, seed: int, path: str, of: str, value: float) -> None:
    problem = random_problem(
        seed, num_tokens=11, num_experts=2, top_k=2, hidden_size=128, intermediate_size=72, sparsity=0.7
    )
    expected = fp32_reference(problem)
    bad, others = 3, [0, 1, 2, *range(4, 11)]
    if of == "hidden state":
        problem.hidden_states[bad, 5] = value
    else:
        problem.topk_weights[bad, 1] = value
    out = PATHS[path](run_ptx, problem).float()
    assert (out[others] - expected[others]).abs().max() < 0.02 * expected[others].abs().max()
    if math.isnan(value):
        assert out[bad].isnan().all()
