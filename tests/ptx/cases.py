"""The small kernels with inputs and expected outputs, for the kernel tests, the mutation suite and the run on a GPU."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Case:
    """`make(generator)` -> the arguments in order (numbers stay numbers); `outputs` names what is compared with
    `expected(arguments before the run)`; `undefined` are the outputs whose old contents do not matter. `exact`: bit for
    bit the same on any correct machine; otherwise the relative error to the reference is at most `tolerance`."""

    name: str
    build: Callable[[], tuple[Any, tuple[Any, ...]]]
    make: Callable[[torch.Generator], dict[str, Any]]
    expected: Callable[[dict[str, Any]], Tensors]
    undefined: tuple[str, ...]
    exact: bool = False
    tolerance: float = 1e-5

    def compare(self, before: dict[str, Any], after: dict[str, Any]) -> None:
        """Assert that the outputs in `after` are right."""
        for name, want in self.expected(before).items():
            got = after[name]
            if self.exact:
                assert torch.equal(got, want), f"{self.name}: {name} differs"
            else:
                scale = want.float().abs().max().clamp_min(1e-30)
                error = ((got.float() - want.float()).abs().max() / scale).item()
                assert error <= self.tolerance, f"{self.name}: {name} has relative error {error:.3g}"


def clone(arguments: dict[str, Any]) -> dict[str, Any]:
    return {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}


def _fake(dtype: Any, *shape: Any, align: int | None = None, order: tuple[int, ...] | None = None) -> Any:
    from cutlass.cute.runtime import make_fake_compact_tensor

    order = order or tuple(range(len(shape) - 1, -1, -1))
    return make_fake_compact_tensor(dtype, shape, stride_order=order, assumed_align=align)


def _stream() -> Any:
    from cutlass.cute.runtime import make_fake_stream

    return make_fake_stream()


def _symbol(divisor: int = 1) -> Any:
    import cutlass.cute as cute

    return cute.sym_int(divisibility=divisor)


def _randn(g: torch.Generator, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=g).to(dtype)


def _small_integers(g: torch.Generator, *shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Values whose products and sums are exact in f32, in any order of summation."""
    return torch.randint(-4, 5, shape, generator=g).to(dtype)


# ------------------------------------------------------------------ builders
def _build_compact() -> tuple[Any, tuple[Any, ...]]:
    from cutlass import Float32, Int32

    from .kernels.compaction import compact

    t, h = _symbol(), _symbol()
    index = _fake(Int32, t, h)
    return compact, (_fake(Float32, t, h, align=16), Float32(0.0), index, _fake(Int32, t), _fake(Int32, 1), _stream())


def _expect_compact(a: dict[str, Any]) -> Tensors:
    keep = a["x"].abs() >= torch.tensor(a["limit"], dtype=torch.float32)
    index = a["index"].clone()
    for r in range(len(index)):
        found = keep[r].nonzero().ravel().int()
        index[r, : len(found)] = found
    return {"index": index, "count": keep.sum(1).int(), "total": (a["total"] + keep.sum()).int()}


def _build_gathered() -> tuple[Any, tuple[Any, ...]]:
    from cutlass import BFloat16, Float32, Int32

    from .kernels.gathered_gemm import gathered_gemm

    k, n, m, rows = _symbol(128), _symbol(64), _symbol(), _symbol()
    x, w = _fake(BFloat16, rows, k, align=16), _fake(BFloat16, n, k, align=16)
    return gathered_gemm, (x, _fake(Int32, m), w, _fake(Float32, m, n, align=16), _stream())


def _build_swizzled() -> tuple[Any, tuple[Any, ...]]:
    from cutlass import BFloat16

    from .kernels.swizzled_gemm import swizzled_gemm

    a, b, c = (_fake(BFloat16, _symbol(64), _symbol(64), align=16) for _ in range(3))
    return swizzled_gemm, (a, b, c, _stream())


def _build_wgmma(**config: Any) -> tuple[Any, tuple[Any, ...]]:
    from cutlass import BFloat16, Float32

    from .kernels.wgmma_gemm import WgmmaGemm

    order = {"k": (1, 0), "mn": (0, 1)}
    a = _fake(BFloat16, _symbol(128), _symbol(64), align=16, order=order[config.get("a_major", "k")])
    b = _fake(BFloat16, _symbol(128), _symbol(64), align=16, order=order[config.get("b_major", "k")])
    return WgmmaGemm(**config), (a, b, _fake(Float32, _symbol(128), _symbol(128), align=16), _stream())


def _build_specialised(fault: str = "") -> tuple[Any, tuple[Any, ...]]:
    from cutlass import BFloat16, Float32

    from .kernels.specialised_gemm import SpecialisedGemm

    a, b = (_fake(BFloat16, _symbol(64), _symbol(64), align=16) for _ in range(2))
    return SpecialisedGemm(fault), (a, b, _fake(Float32, _symbol(64), _symbol(64), align=16), _stream())


def _build_last_block() -> tuple[Any, tuple[Any, ...]]:
    from cutlass import Float32, Int32

    from .kernels.reductions import last_block_sum

    partial = _fake(Float32, _symbol(), 8, align=16)
    return last_block_sum, (_fake(Float32, _symbol()), partial, _fake(Int32, 1), _fake(Float32, 1), _stream())


def _build_column_sums() -> tuple[Any, tuple[Any, ...]]:
    from cutlass import BFloat16, Float32, Int32

    from .kernels.reductions import column_sums

    x, acc = _fake(Float32, _symbol(), 512, align=16), _fake(Float32, 512, align=16)
    return column_sums, (x, _fake(Int32, 1), acc, _fake(BFloat16, 512, align=16), _stream())


def _build_pipeline(name: str) -> tuple[Any, tuple[Any, ...]]:
    from cutlass import Float32

    from .kernels import pipelines

    x = _fake(Float32, _symbol(), _symbol(128), align=16)
    return getattr(pipelines, name), (x, _fake(Float32, _symbol(), 64), _stream())


def _build_elementwise(name: str, count: int, dtype: str) -> tuple[Any, tuple[Any, ...]]:
    import cutlass

    from .kernels import elementwise

    tensors = tuple(_fake(getattr(cutlass, dtype), _symbol(), _symbol()) for _ in range(count))
    return getattr(elementwise, name), (*tensors, _stream())


def _make_wgmma(g: torch.Generator, a_major: str = "k", b_major: str = "k", k: int = 256) -> dict[str, Any]:
    a, b = _small_integers(g, 128, k), _small_integers(g, 128, k)
    a = a if a_major == "k" else a.T.contiguous().T
    b = b if b_major == "k" else b.T.contiguous().T
    return {"a": a, "b": b, "c": torch.full((128, 128), float("nan"))}


def _sums(a: dict[str, Any]) -> Tensors:
    return {"y": a["x"].view(len(a["x"]), -1, 64).sum(1)}


def _wgmma(name: str, **config: Any) -> Case:
    majors = {k: v for k, v in config.items() if k.endswith("major")}
    return Case(
        name, functools.partial(_build_wgmma, **config), functools.partial(_make_wgmma, **majors),
        lambda a: {"c": a["a"].float() @ a["b"].float().T}, ("c",), exact=True,
    )  # fmt: skip


def _pipeline(name: str) -> Case:
    def make(g: torch.Generator) -> dict[str, Any]:
        return {"x": _small_integers(g, 3, 1280, dtype=torch.float32), "y": torch.full((3, 64), float("nan"))}

    return Case(name, functools.partial(_build_pipeline, name), make, _sums, ("y",), exact=True)


def _zeros(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.zeros(*shape, dtype=dtype)


CASES: dict[str, Case] = {
    c.name: c
    for c in (
        Case(
            "compaction", _build_compact,
            lambda g: {"x": _randn(g, 6, 1000), "limit": 0.7, "index": torch.full((6, 1000), -1, dtype=torch.int32),
                       "count": _zeros(6), "total": _zeros(1)},
            _expect_compact, ("count",), exact=True,
        ),
        Case(
            "gathered_gemm", _build_gathered,
            lambda g: {"x": _small_integers(g, 60, 512),
                       "rows": (torch.randperm(60, generator=g)[:40] * torch.arange(40).sign()).int(),
                       "w": _small_integers(g, 64, 512), "out": _small_integers(g, 40, 64, dtype=torch.float32)},
            lambda a: {"out": a["out"] + a["x"].float()[a["rows"].long()] @ a["w"].float().T}, (), exact=True,
        ),
        Case(
            "swizzled_gemm", _build_swizzled,
            lambda g: {"a": _small_integers(g, 128, 256), "b": _small_integers(g, 64, 256),
                       "c": torch.full((128, 64), float("nan")).bfloat16()},
            lambda a: {"c": (a["a"].float() @ a["b"].float().T).bfloat16()}, ("c",), exact=True,
        ),
        _wgmma("wgmma"),
        _wgmma("wgmma_two_groups", groups=2, tile_n=128, stages=3),
        _wgmma("wgmma_swizzle64", depth=32),
        _wgmma("wgmma_swizzle32", depth=16),
        _wgmma("wgmma_mn_major", a_major="mn", b_major="mn", tile_n=128),
        _wgmma("wgmma_registers", a_from_registers=True),
        Case(
            "specialised_gemm", _build_specialised,
            lambda g: {"a": _small_integers(g, 128, 384), "b": _small_integers(g, 64, 384),
                       "c": torch.full((128, 64), float("nan"))},
            lambda a: {"c": a["a"].float() @ a["b"].float().T}, ("c",), exact=True,
        ),
        Case(
            "last_block_sum", _build_last_block,
            lambda g: {"x": _small_integers(g, 10000, dtype=torch.float32), "partial": torch.full((6, 8), float("nan")),
                       "ticket": _zeros(1), "out": torch.full((1,), float("nan"))},
            lambda a: {"out": a["x"].sum().reshape(1), "ticket": a["ticket"]}, ("partial", "out"), exact=True,
        ),
        Case(
            "column_sums", _build_column_sums,
            lambda g: {"x": _small_integers(g, 23, 512, dtype=torch.float32), "counter": _zeros(1),
                       "acc": _zeros(512, dtype=torch.float32), "out": torch.full((512,), float("nan")).bfloat16()},
            lambda a: {"acc": a["x"].sum(0), "out": a["x"].sum(0).bfloat16()}, ("out",), exact=True,
        ),
        _pipeline("cp_async_pipeline"),
        _pipeline("named_barriers"),
        _pipeline("bulk_copies"),
        Case(
            "add", functools.partial(_build_elementwise, "add", 3, "Float32"),
            lambda g: {"a": _randn(g, 37, 61), "b": _randn(g, 37, 61), "c": torch.full((37, 61), float("nan"))},
            lambda a: {"c": a["a"] + a["b"]}, ("c",), exact=True,
        ),
        Case(
            "softmax", functools.partial(_build_elementwise, "softmax", 2, "BFloat16"),
            lambda g: {"x": _randn(g, 5, 300, dtype=torch.bfloat16),
                       "y": torch.full((5, 300), float("nan")).bfloat16()},
            lambda a: {"y": torch.softmax(a["x"].float(), 1)}, ("y",), tolerance=2.0**-8,
        ),
        Case(
            "transpose", functools.partial(_build_elementwise, "transpose", 2, "Float32"),
            lambda g: {"x": _randn(g, 70, 50), "y": torch.full((50, 70), float("nan"))},
            lambda a: {"y": a["x"].T.contiguous()}, ("y",), exact=True,
        ),
    )
}  # fmt: skip


#: Parameters for tests: with `--dist loadgroup` all tests of a case share a worker, so it is compiled once.
GROUPED = [pytest.param(name, marks=pytest.mark.xdist_group(f"ptx-{name}")) for name in CASES]


@functools.cache
def program(name: str) -> Any:
    """The compiled case, once per process."""
    from .harness import compile_dsl

    function, example = CASES[name].build()
    return compile_dsl(function, *example)
