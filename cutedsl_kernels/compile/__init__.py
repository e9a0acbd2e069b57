"""compile_kernel: a KernelSpec in, a launch function out; from memory, from the disk cache, or compiled now.

Compiling never touches a device: it works on machines without one and in processes that must not see one. T is
symbolic, so one compilation serves every number of tokens up to the config's max_pairs.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import as_completed
from typing import Any

from ..environment import dsl_version, user_dir
from .cache import CacheWarning, ObjectCache, exclusive
from .pool import CompilerPool
from .specs import KernelSpec, fused_spec, plan_spec, source_fingerprint

__all__ = [
    "CacheWarning",
    "CompilerPool",
    "KernelSpec",
    "compile_count",
    "compile_in_parallel",
    "compile_kernel",
    "fused_spec",
    "is_compiled",
    "plan_spec",
    "precompile",
]

Launch = Callable[..., Any]

_loaded: dict[KernelSpec, Launch] = {}
_lock = threading.Lock()
_compilations = 0
MOST_PROCESSES = 8  # that precompile starts; each takes 0.5 GB of memory


def compile_count() -> int:
    """How many kernels this process has compiled; loading from the cache does not count."""
    return _compilations


def compile_kernel(spec: KernelSpec) -> Launch:
    """The launch function of ``spec``; see compile.dsl.load_object for how to call it.

    A second call is a dictionary lookup; the first loads from the disk cache (2 ms once the CuTe DSL is imported) or
    compiles (0.1 to 3 s) and stores. Safe between threads and processes. RuntimeError with the spec's name if the DSL
    or its assembler refuses the kernel.
    """
    found = _loaded.get(spec)
    if found is None:
        with _lock:
            found = _loaded.get(spec)
            if found is None:
                found = _loaded[spec] = _load_or_compile(spec)
    return found


def _load_or_compile(spec: KernelSpec) -> Launch:
    global _compilations
    from . import dsl

    def build(path: Any) -> None:
        try:
            dsl.compile_object(spec, path)
        except OSError:
            raise
        except Exception as error:
            raise RuntimeError(f"{spec.name} does not compile with CuTe DSL {dsl_version()}: {error}") from error

    path, built = ObjectCache(user_dir("cache")).get(spec.name, _key(spec), build)
    _compilations += built
    return dsl.load_object(path, spec)


def _key(spec: KernelSpec) -> dict[str, str]:
    from . import dsl

    return {
        "arch": dsl.ARCH,
        "convention": "ffi" if dsl.has_tvm_ffi() else "c",
        "dsl": dsl_version(),
        "sources": source_fingerprint(),
        "factory": spec.factory,
        "arguments": repr(spec.arguments),
    }


def is_compiled(spec: KernelSpec) -> bool:
    """Whether ``spec`` can be had without compiling: in memory, or whole in the disk cache."""
    return spec in _loaded or ObjectCache(user_dir("cache")).contains(spec.name, _key(spec))


def compile_in_parallel(specs: Iterable[KernelSpec], processes: int | None = None) -> Iterator[tuple[KernelSpec, str]]:
    """Puts ``specs`` into the disk cache, in processes that see no GPU; yields (spec, "" or the failure) as they come.

    processes: default one per core, at most one per spec. Specs that are there already cost nothing.
    """
    missing = []
    for spec in dict.fromkeys(specs):
        if is_compiled(spec):
            yield spec, ""
        else:
            missing.append(spec)
    if not missing:
        return
    pool = CompilerPool(min(processes or os.cpu_count() or 1, len(missing)))
    try:
        futures = pool.request(missing)
        for future in as_completed(futures):
            yield futures[future], future.result()
    finally:  # a caller that stops early does not wait for what has not begun
        pool.close()


def precompile(specs: Iterable[KernelSpec]) -> int:
    """Where two or more of ``specs`` are missing in the disk cache: compiles them side by side. Returns how many.

    Processes that ask at the same time, such as a server's ranks, take turns, so that the first one compiles for all.
    Whatever goes wrong is left for compile_kernel to meet and to report.
    """
    specs = list(dict.fromkeys(specs))
    if sum(not is_compiled(spec) for spec in specs) < 2:
        return 0
    try:
        with exclusive(user_dir("cache") / "precompile.lock"):
            missing = [spec for spec in specs if not is_compiled(spec)]
            return sum(
                not failure for _, failure in compile_in_parallel(missing, min(os.cpu_count() or 1, MOST_PROCESSES))
            )
    except Exception:  # a cache that cannot be written, no more processes
        return 0
