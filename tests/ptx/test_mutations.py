"""How much of what can go wrong is noticed: the mutation suite. Prints the share that is detected and each mutant
that is not.

A sample of the mutants of each case is drawn afresh in each run; CUTEDSL_KERNELS_ALL_MUTANTS=1 takes all.
"""

from __future__ import annotations

import collections
import linecache
import os
import random

import pytest
import torch

from .cases import CASES, GROUPED, Case, clone, program
from .harness import DslProgram, Uninit
from .mutation import Mutant, mutants
from .scalars import PtxError

pytestmark = pytest.mark.execute

SAMPLE = 12

#: Mutants that change nothing a program could observe: (cases, kind, part of the instruction, part of the source line,
#: reason).
EQUIVALENT = [
    (
        "named_barriers", "comparison shifted", "setp", "if i < chunks - 1",
        "one more arrival at the end, which nobody waits for",
    ),
    (
        "transpose", "comparison shifted", "setp", "if r < x.shape[0] and c < x.shape[1]",
        "reads the next row's first element, which the tensor owns",
    ),
    (
        "cp_async_pipeline specialised_gemm", "fence removed", "mbarrier_init", "",
        "only the async proxy and other CTAs need it, and none is there",
    ),
    (
        "cp_async_pipeline specialised_gemm", "wait removed", "try_wait", "producer_tail",
        "producer_tail: keeps the CTA alive for copies that have all been waited for",
    ),
]  # fmt: skip


def _run(case: Case, base: DslProgram, text: str, seed: int) -> tuple[set[str], bool]:
    """-> kinds of reports, and whether the numbers are right."""
    before = case.make(torch.Generator().manual_seed(seed))
    after = clone(before)
    values = (Uninit(v) if k in case.undefined else v for k, v in after.items())
    result = base.with_ptx(text).run(*values, max_steps=4_000)
    if result.reports:
        return result.kinds(), True
    try:
        case.compare(before, after)
    except AssertionError:
        return set(), False
    return set(), True


def _outcome(case: Case, base: DslProgram, mutant: Mutant, seed: int) -> str:
    """ "report", "error", "numbers", or "" when nothing was noticed."""
    try:
        kinds, right = _run(case, base, mutant.text, seed)
    except PtxError:
        return "error"
    return "report" if kinds else "" if right else "numbers"


def _reason(case: Case, base: DslProgram, mutant: Mutant, seed: int) -> str | None:
    """Why it is no fault that `mutant` was not noticed; None when that is not known."""
    if mutant.probe and not _run(case, base, mutant.probe, seed)[0]:
        return "no thread of this launch stands at the boundary"
    line = linecache.getline(*mutant.source) if mutant.source else ""
    for names, kind, instruction, source, reason in EQUIVALENT:
        if (
            case.name in names.split()
            and mutant.kind.startswith(kind)
            and instruction in mutant.instruction
            and source in line
        ):
            return reason
    return None


@pytest.mark.parametrize("name", GROUPED)
def test_mutants_are_detected(name: str, seed) -> None:
    case, base = CASES[name], program(name)
    chosen = mutants(base.ptx, base.module)
    total = len(chosen)
    if not os.environ.get("CUTEDSL_KERNELS_ALL_MUTANTS"):
        by_kind: dict[str, list[Mutant]] = collections.defaultdict(list)
        for m in random.Random(seed).sample(chosen, len(chosen)):
            by_kind[m.kind].append(m)
        ordered = [m for row in zip(*(v + [None] * total for v in by_kind.values()), strict=False) for m in row if m]
        chosen = ordered[:SAMPLE]
    outcomes = {m: _outcome(case, base, m, seed) for m in chosen}
    count = collections.Counter(outcomes.values())
    missed = [m for m, o in outcomes.items() if not o]
    reasons = {m: _reason(case, base, m, seed) for m in missed}
    faults = len(chosen) - sum(r is not None for r in reasons.values())
    share = 100 * (faults - len([r for r in reasons.values() if r is None])) / max(faults, 1)
    print(
        f"{name}: {len(chosen)} of {total} mutants, {len(chosen) - faults} of them change nothing; {share:.0f} % of "
        f"the others detected ({count['report']} by reports, {count['numbers']} by numbers, {count['error']} by errors)"
    )
    for m in missed:
        print(f"  not detected: {m} [{reasons[m] or 'unexplained'}]")
    assert not [m for m in missed if reasons[m] is None]
