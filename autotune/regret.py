"""Regret of the search: the plan it chooses against the best of an exhaustive sweep, both timed precisely.

    python -m autotune.regret --shape 64,2048,1024,8 --tokens 1,8,64 --sparsity 0.85

Prints one line per bin and ends with 1 if a regret is above --limit.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from cutedsl_kernels import UserError
from cutedsl_kernels.compile import CompilerPool
from cutedsl_kernels.configs import legal_plans

from .command import build_parser, layer_of, make_timer
from .search import Tuner
from .space import Bin, TunedLayer, ordered_bins, specs_of
from .timers import PlanFailure, Timer

RECHECKED = 5  # plans of the sweep, best first, that are timed again precisely


def sweep_us(layer: TunedLayer, where: Bin, timer: Timer, compiler: CompilerPool | None) -> float:
    """Microseconds of the best of all legal plans."""
    times = []
    for plan in legal_plans(layer.shape, where.num_tokens, layer.activation):
        if compiler is not None and compiler.wait(specs_of(layer, plan)):
            continue
        try:
            times.append((timer.time(where, plan, False).us, str(plan), plan))
        except PlanFailure:
            continue
    best = sorted(times)[:RECHECKED]
    return min(timer.time(where, plan, True).us for _, _, plan in best)


def main(argv: Sequence[str] | None = None, prog: str = "python -m autotune.regret") -> int:
    """0; 1 when a regret is above the limit; 2 for bad input."""
    parser = build_parser(prog)
    parser.description = __doc__
    parser.add_argument("--limit", type=float, default=0.03, help="largest regret allowed (default 0.03)")
    options = parser.parse_args(argv)
    try:
        return _run(options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _run(options: argparse.Namespace) -> int:
    layer, cases = layer_of(options)
    bins = ordered_bins(options.tokens or [1, 8, 32, 128], [(s, p) for s, p in cases if p <= s])
    timer = make_timer(options, layer)
    compiling = options.simulate is None and options.device != "cpu"
    compiler, worst = None, 0.0
    try:
        tuner = Tuner(layer, bins, timer, compiling=compiling, count=options.candidates, budget_s=options.budget * 60)
        entries = tuner.run().entries
        if compiling:
            compiler = CompilerPool(options.processes)
            for where in bins:
                for plan in legal_plans(layer.shape, where.num_tokens, layer.activation):
                    compiler.request(specs_of(layer, plan))
        for where, entry in entries.items():
            best = sweep_us(layer, where, timer, compiler)
            chosen = timer.time(where, entry.chosen, True).us
            regret = max(0.0, chosen / best - 1)
            worst = max(worst, regret)
            print(f"{where!s:<28} chosen {chosen:9.2f} us  best {best:9.2f} us  regret {regret:6.2%}  {entry.chosen}")
    finally:
        timer.close()
        if compiler is not None:
            compiler.close()
    print(f"largest regret {worst:.2%}, limit {options.limit:.0%}")
    return 1 if worst > options.limit else 0


if __name__ == "__main__":
    raise SystemExit(main())
