"""The tuner with every candidate's PTX executed on the CPU before it gets a (simulated) time."""

from __future__ import annotations

from typing import Any

import pytest
from cutedsl_kernels.autotune import search
from cutedsl_kernels.autotune.search import Tuner
from cutedsl_kernels.autotune.space import Bin, TunedLayer, candidates
from cutedsl_kernels.autotune.timers import PlanFailure, Sample, SimulatedTimer

from cutedsl_kernels import MoEShape
from cutedsl_kernels.configs import FusedConfig, Plan
from tests.helpers import check_close, random_problem

execute = pytest.importorskip("tests.kernels.test_fused_execute").execute
pytestmark = pytest.mark.execute

LAYER = TunedLayer(MoEShape(num_experts=4, top_k=2, hidden_size=128, intermediate_size=32))
WHERE = Bin(3, 0.8)


class ExecutingTimer(SimulatedTimer):
    """Runs a fused plan's kernel on a random problem and compares, then simulates the time; ``broken`` gives a plan
    wrong results and the best time of all."""

    broken: Plan | None = None

    def __init__(self, run_ptx: Any, seed: int) -> None:
        super().__init__(LAYER, seed)
        self._run_ptx, self._problem_seed = run_ptx, seed
        self._right: set[Plan] = set()

    def time(self, where: Bin, plan: Plan, precise: bool) -> Sample:
        if isinstance(plan.config, FusedConfig) and plan not in self._right:
            shape = LAYER.shape
            problem = random_problem(
                self._problem_seed,
                num_tokens=where.num_tokens,
                num_experts=shape.num_experts,
                top_k=shape.top_k,
                hidden_size=shape.hidden_size,
                intermediate_size=shape.intermediate_size,
                sparsity=where.sparsity,
            )
            out = execute(self._run_ptx, problem, plan.config, 2)
            try:
                check_close(out * 1.5 if plan == self.broken else out, problem)
            except AssertionError as error:
                raise PlanFailure("wrong", str(error)) from None
            self._right.add(plan)
        sample = super().time(where, plan, precise)
        return Sample(sample.us / 100, sample.spread) if plan == self.broken else sample


def test_wrong_kernels_are_found_before_they_are_timed(run_ptx, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "GUIDED_ROUNDS", 0)
    monkeypatch.setattr(search, "candidates", lambda *_: plans)
    fused = [plan for plan in candidates(LAYER, WHERE, SimulatedTimer(LAYER, 0).gpu, 12) if plan.kind == "fused"]
    plans = [Plan("dense"), *fused[:2]]
    assert len(plans) == 3
    timer = ExecutingTimer(run_ptx, seed)
    timer.broken = plans[1]
    summary = Tuner(LAYER, [WHERE], timer, compiling=False).run()
    entry = summary.entries[WHERE]
    assert summary.failures == {"wrong": 1}
    assert entry.chosen != timer.broken
    outcome = {m.plan: m.failure for m in entry.tried}
    assert outcome[plans[1]].startswith("wrong: error")
    assert outcome[plans[2]] is None
