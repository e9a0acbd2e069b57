"""Kernels in the DSL that are wrong on purpose: each fault is reported, the correct twin gives the right numbers
cleanly."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from .cases import CASES, _build_specialised, _fake, _stream, _symbol
from .harness import compile_dsl

pytestmark = pytest.mark.execute


def _compiled(name: str, fault: str) -> Any:
    from cutlass import Float32, Int32

    from .kernels import faulty

    n = _symbol()
    fakes = {
        "Reverse": (_fake(Float32, _symbol(), 128), _fake(Float32, _symbol(), 128)),
        "RowSums": (_fake(Float32, _symbol(), _symbol()), _fake(Float32, _symbol())),
        "Scatter": (_fake(Float32, n), _fake(Int32, n), _fake(Float32, _symbol())),
        "TwoPhases": (_fake(Float32, 128), _fake(Float32, _symbol()), _fake(Float32, 128)),
        "Handover": (_fake(Float32, 128), _fake(Float32, 128), _fake(Int32, 1), _fake(Float32, 128)),
    }[name]
    return compile_dsl(getattr(faulty, name)(fault), *fakes, _stream())


def _arguments(name: str, g: torch.Generator) -> tuple[list[torch.Tensor], torch.Tensor]:
    """-> arguments, with the output last, and the expected output."""
    if name == "Reverse":
        x = torch.randn(3, 128, generator=g)
        return [x, torch.zeros(3, 128)], x.flip(1)
    if name == "RowSums":
        x = torch.randint(-9, 10, (4, 300), generator=g).float()
        return [x, torch.zeros(4)], x.sum(1)
    if name == "Scatter":
        x, index = torch.randint(1, 9, (150,), generator=g).float(), torch.randint(0, 5, (150,), generator=g).int()
        return [x, index, torch.zeros(5)], torch.zeros(5).index_add(0, index, x)
    x = torch.randn(128, generator=g)
    if name == "Handover":
        return [x, torch.zeros(128), torch.zeros(1, dtype=torch.int32), torch.zeros(128)], (2 * x).flip(0)
    return [x, torch.zeros(128), torch.zeros(128)], (2 * x).roll(-32)


FAULTS = [
    ("Reverse", "barrier", "shared race: read after unsynchronised write"),
    ("Reverse", "wait", "shared load overlaps an incomplete asynchronous copy"),
    ("Reverse", "commit", "shared load overlaps an incomplete asynchronous copy"),
    ("Reverse", "end", "out-of-bounds global load"),
    ("Reverse", "start", "shared load"),
    ("RowSums", "barrier", "shared race: read after unsynchronised write"),
    ("RowSums", "reuse", "shared race: write after unsynchronised read"),
    ("RowSums", "lanes", "shared race: read after unsynchronised write"),
    ("Scatter", "plain", "global race: two threads write one address"),
    ("Scatter", "guard", "out-of-bounds global load"),
    ("Scatter", "divergent", "barrier executed by part of a warp"),
    ("TwoPhases", "barrier", "global race: read after unsynchronised write"),
    ("TwoPhases", "unwritten", "out-of-bounds global load"),
    ("Handover", "relaxed", "before griddepcontrol.wait to data of the preceding launch"),
    ("Handover", "relaxed load", "before griddepcontrol.wait to data of the preceding launch"),
    ("Handover", "barrier", "global load before griddepcontrol.wait to data of the preceding launch"),
]


@pytest.mark.parametrize("name", ["Reverse", "RowSums", "Scatter", "TwoPhases", "Handover"])
def test_correct_twin_is_clean(name: str, run_ptx, seed) -> None:
    values, want = _arguments(name, torch.Generator().manual_seed(seed))
    run_ptx(_compiled(name, ""), *values)
    assert torch.equal(values[-1], want)


@pytest.mark.parametrize(("name", "fault", "kind"), FAULTS)
def test_fault_is_reported(name: str, fault: str, kind: str, run_ptx, seed) -> None:
    values, _ = _arguments(name, torch.Generator().manual_seed(seed))
    result = run_ptx.check(_compiled(name, fault), *values, max_steps=20_000)
    assert any(kind in k for k in result.kinds()), str(result)
    (first, *_) = result.reports
    assert first.source is not None
    assert first.source[0].endswith("faulty.py")


@pytest.mark.parametrize(
    ("fault", "kind"),
    [
        ("acquire", "shared race: write after unsynchronised"),
        ("wait", "shared race: read after unsynchronised write"),
        ("proxy", "wgmma reads shared memory without fence.proxy.async after the write"),
        ("early", "shared store to the source of an incomplete asynchronous operation"),
    ],
)
def test_faults_of_a_specialised_gemm_are_reported(fault: str, kind: str, run_ptx, seed) -> None:
    function, example = _build_specialised(fault)
    values = CASES["specialised_gemm"].make(torch.Generator().manual_seed(seed)).values()
    kinds = run_ptx.check(compile_dsl(function, *example), *values, max_steps=20_000).kinds()
    assert any(kind in k for k in kinds), kinds


def test_arguments_are_checked(run_ptx) -> None:
    program = _compiled("TwoPhases", "")
    good = torch.zeros(128)
    with pytest.raises(Exception, match="compiled for"):
        run_ptx(program, torch.zeros(64), good, torch.zeros(128))
    with pytest.raises(Exception, match="got 2 values"):
        run_ptx(program, good, good)
    kinds = run_ptx.check(program, good, torch.zeros(128), run_ptx.ReadOnly(torch.zeros(128))).kinds()
    assert kinds == {"global store to a read-only buffer"}
    kinds = run_ptx.check(program, run_ptx.Uninit(torch.zeros(128)), torch.zeros(128), torch.zeros(128)).kinds()
    assert kinds == {"uninitialised global load"}
    assert run_ptx.check(program, good, torch.zeros(100), torch.zeros(128)).kinds() == {
        "out-of-bounds global store", "out-of-bounds global load",
    }  # fmt: skip


def test_views_have_exact_bounds_and_share_memory(run_ptx) -> None:
    """A column view of a wider tensor: the gap between rows belongs to nobody; two views of one storage see each
    other."""
    program = _compiled("RowSums", "")
    wide = torch.arange(40.0).reshape(4, 10)
    y = torch.zeros(4)
    run_ptx(program, wide[:, :7], y)
    assert torch.equal(y, wide[:, :7].sum(1))
    both, out = torch.arange(256.0), torch.zeros(128)
    result = run_ptx.check(_compiled("TwoPhases", ""), both[:128], both[64:192], out)
    assert result.kinds() == {"global race: write after unsynchronised read"}
    assert "x+scratch" in str(result)
