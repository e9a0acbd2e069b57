"""The search, for each bin: compile and time what the cost model ranks first; four times, learn from that which values
of which field pay, and time what they rank first; time the best again; keep the simplest of the equally fast.

Bins go through these steps side by side, a wave at a time: what one bin has asked for compiles while others are timed.
One bin after another, with inputs built anew for each, a measurement took 0.51 s; so it takes 0.10 s (H200, 16 cores,
2026-11-23).
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from cutedsl_kernels.compile import CompilerPool, compile_in_parallel
from cutedsl_kernels.configs import Plan
from cutedsl_kernels.tuned_table import Entry, Measurement

from .progress import Progress
from .space import NEIGHBOURS, Bin, TunedLayer, candidates, guided, inherited, simplicity, specs_of
from .store import Store
from .timers import PlanFailure, Timer

WAVE = 24  # bins that are tuned side by side
SEARCH_SHARE = 0.85  # of the budget, after which only the best are timed again
GUIDED_ROUNDS = 4  # after the first pass; each times half as many plans again
FINALISTS = 3  # plans timed precisely after the first pass, the simplest near them and dense besides
TIE = 0.015  # plans closer than this, or than the spread of their replays, count as equally fast: an H200 put one ring
# 0.8 % before the default in a tuning and 1.5 % behind it in the benchmark ten minutes later (2026-11-28)
LARGEST_TIE = 0.02  # a choice may never be slower than dense by more


@dataclass
class Summary:
    """What a run did. skipped: bins that the budget did not reach; failures: number of plans by cause;
    examples: the first message of each cause."""

    entries: dict[Bin, Entry] = field(default_factory=dict)
    skipped: list[Bin] = field(default_factory=list)
    failures: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)
    measured: int = 0
    reused: int = 0
    seconds: float = 0.0


class Tuner:
    """Tunes the bins of one layer. store None: nothing is kept. compiler None: plans are timed as they are.

    budget_s: no new measurement begins after it; a bin whose dense plan was not reached is left out.
    """

    def __init__(
        self,
        layer: TunedLayer,
        bins: Sequence[Bin],
        timer: Timer,
        *,
        store: Store | None = None,
        compile_processes: int | None = None,
        compiling: bool = True,
        count: int = 12,
        budget_s: float = 300.0,
        resume: bool = False,
        progress: Progress | None = None,
    ) -> None:
        self._layer, self._timer, self._store = layer, timer, store
        self._bins, self._count = list(bins), count
        self._budget_s, self._progress = budget_s, progress or Progress(quiet=True)
        self._compiling, self._processes = compiling, compile_processes
        self.summary = Summary()
        self._known: dict[Bin, dict[Plan, Measurement]] = {}
        if store is not None and resume:
            self.summary.entries.update({b: e for b, e in store.finished().items() if b in set(self._bins)})
            self._known = store.started()
        elif store is not None:
            store.forget()

    def run(self) -> Summary:
        """All bins, or as many as the budget allows. Safe to interrupt at any point."""
        started = time.monotonic()
        self._deadline = started + self._budget_s
        self._search_deadline = started + SEARCH_SHARE * self._budget_s
        todo = [where for where in self._bins if where not in self.summary.entries]
        self.summary.reused = len(self.summary.entries)
        first = {where: self._first_candidates(where) for where in todo}
        self._progress.start(sum(self._expected_measurements(plans) for plans in first.values()))
        compiler = CompilerPool(self._processes) if self._compiling else None
        try:
            for inherits in (False, True):
                bins = [where for where in todo if bool(first[where]) != inherits]
                for i in range(0, len(bins), WAVE):
                    wave = bins[i : i + WAVE]
                    self._tune({w: first[w] or inherited(self._layer, w, self._best_above(w)) for w in wave}, compiler)
        finally:
            if compiler is not None:
                compiler.close()
            self.summary.seconds = time.monotonic() - started
            self._progress.stop()
        return self.summary

    def _first_candidates(self, where: Bin) -> list[Plan]:
        """Empty for a size that takes its candidates from the next power of two."""
        if self._inherits_from(where) is not None:
            return []
        return candidates(self._layer, where, self._timer.gpu, self._count)

    def _inherits_from(self, where: Bin) -> Bin | None:
        above = Bin(1 << (where.num_tokens - 1).bit_length(), where.sparsity, where.pair_skip)
        return above if above != where and above in self._bins else None

    def _best_above(self, where: Bin) -> list[Plan]:
        above = self._inherits_from(where)
        entry = self.summary.entries.get(above) if above is not None else None
        timed = [(m.us, m.plan) for m in entry.tried if m.us is not None] if entry is not None else []
        return [plan for _, plan in sorted(timed, key=lambda pair: pair[0])]

    def _expected_measurements(self, first: Sequence[Plan]) -> int:
        if not first:
            return 2 * NEIGHBOURS + 2
        return len(first) + GUIDED_ROUNDS * self._guided_count + FINALISTS + 1

    @property
    def _guided_count(self) -> int:
        return self._count // 2

    def _tune(self, first: dict[Bin, list[Plan]], compiler: CompilerPool | None) -> None:
        """The bins of one wave, each with the plans it begins with: entries, or skipped where the budget ended before
        dense was timed, or dense failed and nothing else worked."""
        results = {where: dict(self._known.get(where, {})) for where in first}
        self._time_all(first, results, compiler)
        for _ in range(GUIDED_ROUNDS):
            if time.monotonic() > self._search_deadline:
                break
            more = {
                where: guided(self._layer, where, self._timer.gpu, results[where], self._guided_count)
                for where, plans in first.items()
                if len(plans) > 1 and self._inherits_from(where) is None and _timed(results[where])
            }
            self._time_all(more, results, compiler)
        for where, plans in first.items():
            entry = self._finish(where, plans, results[where])
            if entry is None:
                self.summary.skipped.append(where)
                continue
            self.summary.entries[where] = entry
            if self._store is not None:
                self._store.finish(entry)
            self._progress.finished(where, entry, _dense_us(entry))

    def _finish(self, where: Bin, wanted: Sequence[Plan], results: dict[Plan, Measurement]) -> Entry | None:
        """Times the best, the simplest of those that are nearly as fast, and dense again while the budget lasts, and
        chooses. None where the budget ended before dense and one of the other ``wanted`` plans had been tried: nothing
        follows from a plan without rival.
        """
        if not _timed(results) or Plan("dense") not in results or len(results) < min(2, len(wanted)):
            return None
        timed = sorted(_timed(results), key=lambda pair: (pair[1].us or 0.0, simplicity(pair[0])))
        spreads: dict[Plan, float] = {}
        finalists = [plan for plan, _ in timed[:FINALISTS]]
        near = choose(results, dict.fromkeys(results, LARGEST_TIE))
        assert near is not None  # some plan has a time
        for plan in dict.fromkeys([*finalists, near, Plan("dense")]):
            if results[plan].us is None or time.monotonic() > self._deadline:
                continue
            results[plan], spreads[plan] = self._measure(where, plan, None, precise=True)
            if self._store is not None:
                self._store.add(where, results[plan])
        chosen = choose(results, spreads)
        if chosen is None:
            return None
        us = results[chosen].us
        assert us is not None
        tried = sorted(results.values(), key=lambda m: (m.us is None, m.us or 0.0))
        return Entry(where.num_tokens, where.sparsity, where.pair_skip, chosen, us, tuple(tried))

    def _time_all(
        self, plans: dict[Bin, list[Plan]], results: dict[Bin, dict[Plan, Measurement]], compiler: CompilerPool | None
    ) -> None:
        """Adds quick measurements to ``results`` until the time for searching is over."""
        if time.monotonic() > self._search_deadline:
            return
        if compiler is not None:
            for where, some in plans.items():
                compiler.request(s for plan in some if plan not in results[where] for s in specs_of(self._layer, plan))
        for where, some in plans.items():
            for plan in some:
                if plan not in results[where] and time.monotonic() <= self._search_deadline:
                    results[where][plan] = self._measure(where, plan, compiler, precise=False)[0]
                    if self._store is not None:
                        self._store.add(where, results[where][plan])

    def _measure(
        self, where: Bin, plan: Plan, compiler: CompilerPool | None, precise: bool
    ) -> tuple[Measurement, float]:
        try:
            if compiler is not None and plan.config is not None:
                failure = compiler.wait(specs_of(self._layer, plan))
                if failure:
                    raise PlanFailure("compile", failure)
            sample = self._timer.time(where, plan, precise)
        except PlanFailure as error:
            self.summary.failures[error.cause] += 1
            self.summary.examples.setdefault(error.cause, " ".join(str(error).split())[:200])
            self._progress.failed(error.cause)
            return Measurement(plan, failure=f"{error.cause}: {error}"), 0.0
        self.summary.measured += 1
        self._progress.measured(where, plan, sample.us)
        return Measurement(plan, us=round(sample.us, 3)), sample.spread


def _timed(results: dict[Plan, Measurement]) -> list[tuple[Plan, Measurement]]:
    return [(plan, m) for plan, m in results.items() if m.us is not None]


def _dense_us(entry: Entry) -> float | None:
    return next((m.us for m in entry.tried if m.plan.kind == "dense"), None)


def choose(results: dict[Plan, Measurement], spreads: dict[Plan, float]) -> Plan | None:
    """The simplest plan within the noise of the fastest; plans timed precisely count before the others. None: no time.

    The noise is TIE, or the spread of the fastest's replays where larger, but at most LARGEST_TIE.
    """
    times = {plan: m.us for plan, m in results.items() if m.us is not None}
    pool = {plan: us for plan, us in times.items() if plan in spreads} or times
    if not pool:
        return None
    fastest = min(pool, key=lambda plan: pool[plan])
    limit = pool[fastest] * (1 + min(LARGEST_TIE, max(TIE, spreads.get(fastest, 0.0))))
    return min((plan for plan, us in pool.items() if us <= limit), key=simplicity)


def compile_all(
    layer: TunedLayer, plans: Iterable[Plan], progress: Progress, processes: int | None = None, every_use: bool = False
) -> Counter[str]:
    """Puts all kernels of ``plans`` into the cache: {"ok": n, "compile": m}."""
    specs = list(dict.fromkeys(s for plan in plans for s in specs_of(layer, plan, every_use=every_use)))
    progress.start(len(specs))
    outcome: Counter[str] = Counter()
    try:
        for spec, failure in compile_in_parallel(specs, processes):
            outcome["compile" if failure else "ok"] += 1
            if failure:
                progress.failed("compile")
                progress.note(f"{spec.name}: {failure.strip().splitlines()[0]}")
            else:
                progress.step()
    finally:
        progress.stop()
    return outcome
