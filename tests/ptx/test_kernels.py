"""The small kernels: right results, no reports, and many reports when something is wrong with the arguments."""

from __future__ import annotations

import pytest
import torch

from .cases import CASES, GROUPED, clone, program

pytestmark = pytest.mark.execute


@pytest.mark.parametrize("name", GROUPED)
def test_result_is_right_and_clean(name: str, run_ptx, seed) -> None:
    case = CASES[name]
    before = case.make(torch.Generator().manual_seed(seed))
    after = clone(before)
    run_ptx(program(name), *(run_ptx.Uninit(v) if k in case.undefined else v for k, v in after.items()))
    case.compare(before, after)
