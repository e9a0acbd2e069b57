"""Register fragments of mma, ldmatrix and stmatrix against CuTe's own layouts: tiles of distinct integers, exact
results.

wgmma's fragments (A in registers, accumulators) and its shared-memory layouts are compared the same way by the wgmma
kernels of test_kernels.py, whose operands CuTe lays out and partitions.
"""

from __future__ import annotations

import pytest
import torch

from .cases import _fake, _stream
from .harness import compile_dsl

pytestmark = pytest.mark.execute


def _dtype(name: str) -> tuple[object, torch.dtype]:
    import cutlass

    return {"bf16": (cutlass.BFloat16, torch.bfloat16), "f16": (cutlass.Float16, torch.float16)}[name]


@pytest.mark.parametrize("k", [8, 16])
@pytest.mark.parametrize("name", ["bf16", "f16"])
def test_mma_fragments(name: str, k: int, run_ptx, seed) -> None:
    import cutlass

    from .kernels.fragments import MmaTile

    dsl, dtype = _dtype(name)
    fakes = _fake(dsl, 16, k), _fake(dsl, 8, k), _fake(cutlass.Float32, 16, 8)
    g = torch.Generator().manual_seed(seed)
    a, b = (torch.randint(-100, 101, (n, k), generator=g).to(dtype) for n in (16, 8))
    c = torch.empty(16, 8)
    run_ptx(compile_dsl(MmaTile(dsl, k), *fakes, _stream()), a, b, run_ptx.Uninit(c))
    assert torch.equal(c, a.float() @ b.float().T)


def test_mma_with_f16_accumulators(run_ptx, seed) -> None:
    import cutlass

    from .kernels.fragments import MmaTile

    fakes = _fake(cutlass.Float16, 16, 16), _fake(cutlass.Float16, 8, 16), _fake(cutlass.Float16, 16, 8)
    g = torch.Generator().manual_seed(seed)
    a, b = (torch.randint(-8, 9, (n, 16), generator=g).half() for n in (16, 8))
    c = torch.empty(16, 8).half()
    program = compile_dsl(MmaTile(cutlass.Float16, 16, cutlass.Float16), *fakes, _stream())
    run_ptx(program, a, b, run_ptx.Uninit(c))
    assert torch.equal(c, (a.float() @ b.float().T).half())


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_ldmatrix_and_stmatrix(count: int, transposed: bool, run_ptx) -> None:
    from .kernels.fragments import MatrixCopies

    dsl, dtype = _dtype("bf16")
    a = torch.arange(256).reshape(16, 16).to(dtype)
    loaded, stored = torch.empty(16, 16, dtype=dtype), torch.empty(16, 16, dtype=dtype)
    program = compile_dsl(MatrixCopies(dsl, count, transposed), *([_fake(dsl, 16, 16)] * 3), _stream())
    assert f"ldmatrix.sync.aligned.m8n8.x{count}{'.trans' if transposed else ''}" in program.ptx
    assert "stmatrix" in program.ptx
    run_ptx(program, a, run_ptx.Uninit(loaded), run_ptx.Uninit(stored))
    assert torch.equal(loaded, a)
    assert torch.equal(stored, a)
