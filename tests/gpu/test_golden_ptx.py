"""The interpreter of tests/ptx against an sm_90 GPU: the small kernels must give the same bits."""

from __future__ import annotations

import pytest
import torch
from ptx.cases import CASES
from ptx.golden import compare

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs an sm_90 GPU"
    ),
]


@pytest.mark.parametrize("name", CASES)
def test_device_and_interpreter_agree(name: str, seed: int) -> None:
    outcome = compare(name, seed)
    assert outcome.fine, str(outcome)
