"""A PTX interpreter for the kernels of this project: runs on the CPU what the CuTe DSL compiles for sm_90a, and checks
bounds, initialisation, asynchronous copies and races. docs/kernel-testing.md explains how to use it and what it proves.

    parser -> blocks, codegen (+ ops_*) -> machine (memory, races, clocks, atomics, barriers, ...) <- scheduler
    capture runs the DSL's host code; harness puts it together; plugin is the pytest fixture `run_ptx`.
"""

from .harness import DslProgram, ReadOnly, Result, Uninit, compile_dsl
from .scalars import PtxError, Unsupported

__all__ = ["DslProgram", "PtxError", "ReadOnly", "Result", "Uninit", "Unsupported", "compile_dsl"]
