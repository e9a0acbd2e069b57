"""The pytest fixture `run_ptx`; tests/conftest.py makes it known to all tests. See docs/kernel-testing.md."""

from __future__ import annotations

from typing import Any

import pytest

from .harness import DslProgram, ReadOnly, Result, Uninit, compile_dsl


class PtxRunner:
    """Runs compiled DSL functions in the interpreter and fails the test on any report."""

    Uninit = Uninit
    ReadOnly = ReadOnly

    def __init__(self) -> None:
        self._wrapped: dict[int, tuple[Any, DslProgram]] = {}

    @staticmethod
    def compile(function: Any, *example: Any, options: str = "") -> DslProgram:
        """Compile a `@cute.jit` function with fake arguments (the stream included) for sm_90a."""
        return compile_dsl(function, *example, options=options)

    def program(self, compiled: Any, *example: Any) -> DslProgram:
        """Wrap what `cute.compile` returned; it must have kept its PTX. `example`: the compile-time arguments."""
        if isinstance(compiled, DslProgram):
            return compiled
        if id(compiled) not in self._wrapped:
            self._wrapped[id(compiled)] = (compiled, DslProgram(compiled, example or None))
        return self._wrapped[id(compiled)][1]

    def check(self, compiled: Any, *values: Any, **options: Any) -> Result:
        """Run and return the result, reports included, without asserting."""
        return self.program(compiled).run(*values, **options)

    def __call__(self, compiled: Any, *values: Any, **options: Any) -> Result:
        """Run on `values` (torch tensors, NumPy arrays, numbers; the stream left out). Arrays are updated in place.
        Fails with all reports if there is any. Options: check_races, allow_local."""
        result = self.check(compiled, *values, **options)
        if result.reports:
            pytest.fail(f"the kernel is not clean:\n{result}", pytrace=False)
        return result


@pytest.fixture(scope="session")
def run_ptx() -> PtxRunner:
    """Runs CuTe DSL kernels on the CPU with memory and race checks."""
    return PtxRunner()
