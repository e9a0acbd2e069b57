"""The kernel of gpu_read_bandwidth.py reads every row of its list once, executed on the CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("cutlass")
pytestmark = pytest.mark.execute

TOOLS = Path(__file__).resolve().parents[2] / "tools"


@pytest.mark.parametrize(
    ("policy", "order"), [("none", "in order"), ("none", "in turn"), ("evict_first", "single rows")]
)
def test_every_row_is_read_once(run_ptx, monkeypatch: pytest.MonkeyPatch, policy: str, order: str) -> None:
    monkeypatch.setenv("CUTE_DSL_ARCH", "sm_90a")
    monkeypatch.syspath_prepend(str(TOOLS))
    import cuda.bindings.driver as cuda
    import cutlass
    import gpu_read_bandwidth
    from cutlass.cute.runtime import from_dlpack

    hidden_size, rows = 256, 100
    words = torch.randint(-1000, 1000, (rows, hidden_size // 2), dtype=torch.int32)
    numbers = gpu_read_bandwidth.order_of(order, rows, 3, torch.Generator().manual_seed(1))
    assert numbers.sort().values.equal(torch.arange(rows, dtype=torch.int32))
    weights, out = words.view(torch.bfloat16), torch.zeros(3, 32, dtype=torch.int32)
    reader = gpu_read_bandwidth.ReadRows(hidden_size, stage_rows=8, stages=2, policy=policy)
    tensors = [from_dlpack(tensor) for tensor in (weights, numbers, out)]
    program = run_ptx.compile(reader, *tensors, cutlass.Int32(3), cuda.CUstream(0))
    run_ptx(program, run_ptx.ReadOnly(weights), run_ptx.ReadOnly(numbers), run_ptx.Uninit(out), 3, 0)
    assert out.sum() == words[:, 0].sum()
