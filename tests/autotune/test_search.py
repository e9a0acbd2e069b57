"""The search under a simulated timer: what it finds, how it ends, and that an interruption loses nothing."""

from __future__ import annotations

import statistics
from pathlib import Path
from types import SimpleNamespace

import pytest
from cutedsl_kernels.autotune import search
from cutedsl_kernels.autotune.search import Tuner, choose
from cutedsl_kernels.autotune.space import Bin, TunedLayer, ordered_bins, specs_of
from cutedsl_kernels.autotune.store import Store
from cutedsl_kernels.autotune.timers import PlanFailure, Sample, SimulatedTimer

from cutedsl_kernels import KNOWN_MODELS
from cutedsl_kernels.configs import FusedConfig, Plan, illegal_reason, legal_plans
from cutedsl_kernels.tuned_table import Measurement

pytestmark = pytest.mark.cpu
LAYER = TunedLayer(KNOWN_MODELS["qwen3.5-35b-a3b"].shape)
DENSE = Plan("dense")


def metadata(timer: SimulatedTimer) -> dict[str, str]:
    return {
        "gpu": timer.gpu.name,
        "driver": "",
        "library": "0",
        "dsl": "",
        "date": "d",
        "dense": "library",
        "timing": timer.timing,
    }


def tuner(timer: SimulatedTimer, bins: list[Bin], **options: object) -> Tuner:
    return Tuner(LAYER, bins, timer, compiling=False, **options)


@pytest.mark.parametrize("model", ["qwen3.5-35b-a3b", "olmoe-1b-7b"])
def test_regret_of_the_search_is_small(model: str, seed: int) -> None:
    """Over eight simulated GPUs: on one in some hundred the search misses the best value of a field."""
    layer = TunedLayer(KNOWN_MODELS[model].shape)
    bins = ordered_bins([1, 8, 64], [(0.85, 0.0)])
    regrets = []
    for number in range(8):
        timer = SimulatedTimer(layer, seed + number)
        entries = Tuner(layer, bins, timer, compiling=False).run().entries
        assert set(entries) == set(bins)
        measured, space = timer.calls, 0
        for where, entry in entries.items():
            plans = list(legal_plans(layer.shape, where.num_tokens))
            space += len(plans)
            best = min(timer.true_us(where, plan) for plan in plans)
            regrets.append(timer.true_us(where, entry.chosen) / best - 1)
            assert illegal_reason(entry.chosen, layer.shape, where.num_tokens) is None
        assert measured < space / 3
    assert statistics.mean(regrets) <= 0.02
    assert sum(regret > 0.05 for regret in regrets) <= 2


def test_never_slower_than_dense_in_its_own_data(seed: int) -> None:
    timer = SimulatedTimer(LAYER, seed, error=1.5)
    for entry in tuner(timer, ordered_bins([1, 16, 256], [(0.3, 0.0), (0.9, 0.0)])).run().entries.values():
        dense = next(m.us for m in entry.tried if m.plan == DENSE)
        assert dense is not None
        assert entry.us <= 1.02 * dense


def test_failing_plans_are_recorded_and_never_chosen(seed: int) -> None:
    timer = SimulatedTimer(LAYER, seed, failing=0.5)
    summary = tuner(timer, [Bin(8, 0.85)]).run()
    entry = summary.entries[Bin(8, 0.85)]
    failed = [m.plan for m in entry.tried if m.failure]
    assert failed
    assert summary.failures["wrong"] == len(failed)
    assert entry.chosen not in failed
    for plan in failed:
        with pytest.raises(PlanFailure):
            timer.time(Bin(8, 0.85), plan, False)


def test_all_but_dense_failing_leaves_dense(seed: int) -> None:
    entry = tuner(SimulatedTimer(LAYER, seed, failing=1.0), [Bin(8, 0.85)]).run().entries[Bin(8, 0.85)]
    assert entry.chosen == DENSE


def test_dense_failing_still_gives_an_entry(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    timer = SimulatedTimer(LAYER, seed)
    real = timer.time

    def time(where: Bin, plan: Plan, precise: bool) -> Sample:
        if plan == DENSE:
            raise PlanFailure("failed", "out of memory")
        return real(where, plan, precise)

    monkeypatch.setattr(timer, "time", time)
    entry = tuner(timer, [Bin(8, 0.85)]).run().entries[Bin(8, 0.85)]
    assert entry.chosen.kind != "dense"
    assert Measurement(DENSE, failure="failed: out of memory") in entry.tried


def test_sizes_between_take_over_from_the_next_power_of_two(seed: int) -> None:
    timer = SimulatedTimer(LAYER, seed)
    entries = tuner(timer, ordered_bins([32, 24], [(0.85, 0.0)])).run().entries
    above = {m.plan for m in entries[Bin(32, 0.85)].tried}
    between = {m.plan for m in entries[Bin(24, 0.85)].tried}
    assert between <= above
    assert len(between) <= 4


def test_the_budget_leaves_out_what_it_does_not_reach(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    timer = SimulatedTimer(LAYER, seed)
    monkeypatch.setattr(search, "time", SimpleNamespace(monotonic=lambda: float(timer.calls)))  # a second for each
    bins = ordered_bins([1, 2, 4, 8, 16, 32], [(0.85, 0.0)])
    summary = tuner(timer, bins, budget_s=50).run()
    assert summary.skipped
    assert summary.entries
    assert set(summary.entries) | set(summary.skipped) == set(bins)
    assert timer.calls <= 52
    for seconds in (1, 2, 7, 13, 29):  # wherever it ends, dense is never chosen for want of a rival
        timer = SimulatedTimer(LAYER, seed)
        entries = tuner(timer, bins, budget_s=seconds).run().entries
        assert all(len(entry.tried) > 1 for entry in entries.values())


class Interrupted(SimulatedTimer):
    """Ctrl-C after so many measurements; ``quick`` holds what was measured for the first time."""

    left = 20

    def __init__(self, layer: TunedLayer, seed: int) -> None:
        super().__init__(layer, seed)
        self.quick: set[tuple[Bin, Plan]] = set()

    def time(self, where: Bin, plan: Plan, precise: bool) -> Sample:
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt
        if not precise:
            self.quick.add((where, plan))
        return super().time(where, plan, precise)


def test_an_interruption_loses_nothing(seed: int, tmp_path: Path) -> None:
    bins = ordered_bins([1, 8], [(0.85, 0.0)])
    first = Interrupted(LAYER, seed)
    with pytest.raises(KeyboardInterrupt):
        tuner(first, bins, store=Store(tmp_path, LAYER.shape, metadata(first))).run()
    second = Interrupted(LAYER, seed)
    second.left = 1000
    store = Store(tmp_path, LAYER.shape, metadata(second))
    known = sum(map(len, store.started().values())) + sum(len(e.tried) for e in store.finished().values())
    assert known == len(first.quick) > 10
    summary = tuner(second, bins, store=store, resume=True).run()
    assert set(summary.entries) == set(bins)
    assert not first.quick & second.quick, "what was measured is not measured again"
    assert first.quick <= {(b, m.plan) for b, e in summary.entries.items() for m in e.tried}
    third = SimulatedTimer(LAYER, seed)
    again = tuner(third, bins, store=Store(tmp_path, LAYER.shape, metadata(third)), resume=True).run()
    assert third.calls == 0
    assert again.reused == 2


def test_without_resume_everything_is_measured_again(seed: int, tmp_path: Path) -> None:
    counts = []
    for _ in range(2):
        timer = SimulatedTimer(LAYER, seed)
        tuner(timer, [Bin(8, 0.85)], store=Store(tmp_path, LAYER.shape, metadata(timer))).run()
        counts.append(timer.calls)
    assert counts[0] == counts[1] > 0


def measured(**times: float) -> dict[Plan, Measurement]:
    plans = {"dense": DENSE, "plain": Plan("fused", FusedConfig()), "odd": Plan("fused", FusedConfig(tile_neurons=128))}
    return {plans[name]: Measurement(plans[name], us=us) for name, us in times.items()}


def test_ties_go_to_the_simpler_plan() -> None:
    kinds = lambda times, spread=0.0: choose(times, dict.fromkeys(times, spread))  # noqa: E731
    assert kinds(measured(dense=100.0, plain=99.5)) == DENSE
    assert kinds(measured(dense=100.0, plain=97.0)).kind == "fused"
    assert kinds(measured(plain=100.5, odd=100.0)).config == FusedConfig()
    assert kinds(measured(dense=101.8, plain=100.0), spread=0.05) == DENSE
    assert kinds(measured(dense=102.5, plain=100.0), spread=0.05).kind == "fused", "noise excuses 2 % at most"
    assert choose({}, {}) is None


def test_precise_times_count_before_quick_ones() -> None:
    times = measured(dense=100.0, plain=90.0)
    assert choose(times, {DENSE: 0.0}) == DENSE


def test_a_kernel_that_does_not_compile_is_a_failure_of_its_plan(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    class Broken:
        def __init__(self, processes: int | None) -> None:
            pass

        def request(self, specs: object) -> None:
            pass

        def wait(self, specs: object) -> str:
            return "ptxas ran out of registers"

        def close(self) -> None:
            pass

    monkeypatch.setattr(search, "CompilerPool", Broken)
    summary = Tuner(LAYER, [Bin(8, 0.85)], SimulatedTimer(LAYER, seed), compiling=True, count=3).run()
    entry = summary.entries[Bin(8, 0.85)]
    assert entry.chosen == DENSE
    assert summary.failures["compile"] == len(entry.tried) - 1


@pytest.mark.compile
def test_compile_processes_fill_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from cutedsl_kernels import MoEShape
    from cutedsl_kernels.compile import CompilerPool, is_compiled

    monkeypatch.setenv("CUTEDSL_KERNELS_CACHE_DIR", str(tmp_path))
    layer = TunedLayer(MoEShape(8, 2, 512, 128))
    plan = next(plan for plan in legal_plans(layer.shape, 1) if plan.kind == "fused")
    (spec,) = specs_of(layer, plan)
    assert not is_compiled(spec)
    compiler = CompilerPool(1)
    try:
        assert compiler.wait([spec]) == ""
    finally:
        compiler.close()
    assert is_compiled(spec)
