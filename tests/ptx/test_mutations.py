"""How much of what can go wrong is noticed: the mutation suite. Prints the share that is detected and each mutant that is not.

A sample of the mutants of each case is drawn afresh in each run; CUTEDSL_KERNELS_ALL_MUTANTS=1 takes all.
"""

from __future__ import annotations

import collections
import os
import random

import pytest
import torch

from .cases import CASES, Case, clone, program
from .harness import DslProgram, Uninit
from .mutation import Mutant, mutants
from .scalars import PtxError

pytestmark = pytest.mark.execute

SAMPLE = 16

#: Mutants that change nothing a program could observe, with the reason: (case, kind, part of the instruction).
EQUIVALENT: list[tuple[str, str, str, str]] = []


def _outcome(case: Case, base: DslProgram, mutant: Mutant, seed: int) -> str:
    """ "report", "error", "numbers", or "" when nothing was noticed."""
    before = case.make(torch.Generator().manual_seed(seed))
    after = clone(before)
    try:
        result = base.with_ptx(mutant.text).run(*(Uninit(v) if k in case.undefined else v for k, v in after.items()))
    except PtxError:
        return "error"
    if result.reports:
        return "report"
    try:
        case.compare(before, after)
    except AssertionError:
        return "numbers"
    return ""


def _reason(name: str, mutant: Mutant) -> str | None:
    return next((r for c, k, part, r in EQUIVALENT if c == name and k == mutant.kind and part in str(mutant)), None)


@pytest.mark.parametrize("name", CASES)
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
    unexplained = [m for m in missed if _reason(name, m) is None]
    share = 100 * (len(chosen) - len(missed)) / max(len(chosen), 1)
    print(f"{name}: {len(chosen)} of {total} mutants, {share:.0f} % detected ({count['report']} by reports, "
          f"{count['numbers']} by numbers only, {count['error']} by errors)")  # fmt: skip
    for m in missed:
        print(f"  not detected: {m} [{_reason(name, m) or 'unexplained'}]")
    assert not unexplained
