"""The compile layer: keys, the disk cache and its accidents, loading, counting. No GPU."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from kernels.tiny_kernel import tiny_spec

import cutedsl_kernels.compile as layer
from cutedsl_kernels import KNOWN_MODELS, MoEShape
from cutedsl_kernels.compile import (
    CacheWarning,
    CompilerPool,
    KernelSpec,
    compile_count,
    compile_in_parallel,
    compile_kernel,
    fused_spec,
    is_compiled,
    precompile,
)
from cutedsl_kernels.compile.cache import ObjectCache
from cutedsl_kernels.compile.dsl import as_compiled, compile_listing, has_tvm_ffi, load_object
from cutedsl_kernels.compile.specs import fake_arguments, staged_spec
from cutedsl_kernels.configs import FusedConfig, StagedConfig
from cutedsl_kernels.environment import dsl_version

pytestmark = pytest.mark.compile

KEY = {"arch": "sm_90a", "dsl": "4.8.1", "convention": "ffi", "arguments": "x"}


@pytest.fixture(autouse=True)
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CUTEDSL_KERNELS_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(layer, "_loaded", {})
    return tmp_path / "cache"


def new_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a new process starts with: nothing in memory."""
    monkeypatch.setattr(layer, "_loaded", {})


def objects(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.o"))


# ---- specs -----------------------------------------------------------------------------------------------------------


def test_specs_differ_exactly_when_the_code_does() -> None:
    shape, config = KNOWN_MODELS["qwen3.5-35b-a3b"].shape, FusedConfig()
    spec = fused_spec(shape, config)
    assert spec == fused_spec(shape, replace(config))
    others = [
        *(fused_spec(replace(shape, **{name: 2 * getattr(shape, name)}), config) for name in vars(shape)),
        *(fused_spec(shape, replace(config, **{name: 77})) for name in vars(config)),
        fused_spec(shape, config, activation="gelu"),
        fused_spec(shape, config, router_weighted=False),
        fused_spec(shape, config, weight_on_input=True),
        fused_spec(shape, config, has_expert_map=True),
        fused_spec(shape, config, has_bias=True),
    ]
    assert len({spec, *others}) == len(others) + 1
    assert len({s.name for s in (spec, *others)}) == len(others) + 1
    assert all(set(s.name) <= set("abcdefghijklmnopqrstuvwxyz_-0123456789") for s in (spec, *others))


# ---- the cache of objects, without the DSL ---------------------------------------------------------------------------


def writer(content: bytes, calls: list[Path]) -> Any:
    def build(path: Path) -> None:
        calls.append(path)
        path.write_bytes(content)

    return build


def test_an_entry_is_made_once_and_can_be_read_by_people(tmp_path: Path) -> None:
    cache, calls = ObjectCache(tmp_path), []
    assert not cache.contains("fused-tn32", KEY)
    path, built = cache.get("fused-tn32", KEY, writer(b"code", calls))
    assert built
    assert path.read_bytes() == b"code"
    assert path.parent == tmp_path / "sm_90a" / "4.8.1-ffi"
    assert path.name.startswith("fused-tn32-")
    assert json.loads(path.with_suffix(".json").read_text())["key"] == KEY
    assert cache.get("fused-tn32", KEY, writer(b"other", calls)) == (path, False)
    assert cache.contains("fused-tn32", KEY)
    assert len(calls) == 1
    assert {p.suffix for p in path.parent.iterdir()} == {".o", ".json", ".lock"}


def test_keys_do_not_share_entries(tmp_path: Path) -> None:
    cache, calls = ObjectCache(tmp_path), []
    paths = {cache.get("k", KEY | {"arguments": str(i)}, writer(b"%d" % i, calls))[0] for i in range(5)}
    assert len(paths) == len(calls) == 5


def damage(kind: str, path: Path) -> None:
    description = path.with_suffix(".json")
    if kind == "object cut short":
        path.write_bytes(path.read_bytes()[:-1])
    elif kind == "object changed":
        path.write_bytes(b"x" + path.read_bytes()[1:])
    elif kind == "object empty":
        path.write_bytes(b"")
    elif kind == "object gone":
        path.unlink()
    elif kind == "description gone":
        description.unlink()
    elif kind == "description cut short":
        description.write_text(description.read_text()[:20])
    elif kind == "description of another key":
        description.write_text(description.read_text().replace("4.8.1", "4.8.0"))
    else:
        raise AssertionError(kind)


DAMAGES = (
    "object cut short",
    "object changed",
    "object empty",
    "object gone",
    "description gone",
    "description cut short",
    "description of another key",
)


@pytest.mark.parametrize("kind", DAMAGES)
def test_damaged_entries_are_rebuilt(tmp_path: Path, kind: str) -> None:
    cache, calls = ObjectCache(tmp_path), []
    path, _ = cache.get("k", KEY, writer(b"code", calls))
    damage(kind, path)
    assert not cache.contains("k", KEY)
    assert cache.get("k", KEY, writer(b"code", calls)) == (path, True)
    assert path.read_bytes() == b"code"
    assert cache.get("k", KEY, writer(b"code", calls)) == (path, False)


def test_a_build_that_fails_leaves_nothing_and_frees_the_lock(tmp_path: Path) -> None:
    cache = ObjectCache(tmp_path)

    def fail(path: Path) -> None:
        path.write_bytes(b"half")
        raise RuntimeError("assembler")

    with pytest.raises(RuntimeError, match="assembler"):
        cache.get("k", KEY, fail)
    assert [p.suffix for p in (tmp_path / "sm_90a" / "4.8.1-ffi").iterdir()] == [".lock"]
    assert cache.get("k", KEY, writer(b"code", []))[1]


def test_a_folder_that_cannot_be_written_costs_only_the_cache(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    with pytest.warns(CacheWarning, match="CUTEDSL_KERNELS_CACHE_DIR"):
        path, built = ObjectCache(blocked).get("k", KEY, writer(b"code", []))
    assert built
    assert path.read_bytes() == b"code"


def _get_slowly(folder: str, log: str) -> None:
    def build(path: Path) -> None:
        with open(log, "a") as handle:
            handle.write("built\n")
        time.sleep(0.3)
        path.write_bytes(b"code")

    assert ObjectCache(Path(folder)).get("k", KEY, build)[0].read_bytes() == b"code"


def test_processes_wait_for_the_one_that_builds(tmp_path: Path) -> None:
    log = tmp_path / "log"
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_get_slowly, args=(str(tmp_path / "c"), str(log))) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0] * 4
    assert log.read_text() == "built\n"


# ---- with the DSL ----------------------------------------------------------------------------------------------------


def test_compiles_once_then_loads(cache_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, spec = compile_count(), tiny_spec()
    assert not is_compiled(spec)
    launch = compile_kernel(spec)
    assert compile_count() == before + 1
    assert compile_kernel(spec) is launch
    assert is_compiled(spec)
    new_process(monkeypatch)
    assert callable(compile_kernel(spec))
    assert compile_count() == before + 1
    assert [path.parent.parent.name for path in objects(cache_folder)] == ["sm_90a"]


def test_what_changes_the_code_changes_the_entry(cache_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = compile_count()
    compile_kernel(tiny_spec())
    compile_kernel(tiny_spec(warps=2))
    for module, name, value in (
        ("cutedsl_kernels.compile", "source_fingerprint", lambda: "edited"),
        ("cutedsl_kernels.compile", "dsl_version", lambda: "9.9.9"),
    ):
        new_process(monkeypatch)
        monkeypatch.setattr(f"{module}.{name}", value)
        compile_kernel(tiny_spec())
    assert compile_count() == before + 4
    assert len(objects(cache_folder)) == 4


def test_a_damaged_object_is_compiled_again(cache_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compile_kernel(tiny_spec())
    path, before = objects(cache_folder)[0], compile_count()
    path.write_bytes(os.urandom(100))
    new_process(monkeypatch)
    compile_kernel(tiny_spec())
    assert compile_count() == before + 1
    assert len(path.read_bytes()) > 1000


def test_loading_takes_at_most_ten_milliseconds(cache_folder: Path) -> None:
    """The object alone: the import of the DSL (once in a process) is not in it."""
    compile_kernel(tiny_spec())
    path, times = objects(cache_folder)[0], []
    for _ in range(10):
        start = time.perf_counter()
        load_object(path, tiny_spec())
        times.append(time.perf_counter() - start)
    assert min(times) < 0.010


def test_threads_compile_once(cache_folder: Path) -> None:
    before = compile_count()
    with ThreadPoolExecutor(8) as pool:
        launches = set(pool.map(compile_kernel, [tiny_spec(hidden_size=192)] * 16))
    assert len(launches) == 1
    assert compile_count() == before + 1


def test_a_refused_kernel_names_itself() -> None:
    spec = tiny_spec(warps=64)
    with pytest.raises(RuntimeError, match="tiny_kernel-hs64-w64 does not compile with CuTe DSL " + dsl_version()):
        compile_kernel(spec)
    assert not is_compiled(spec)


@pytest.mark.skipif(not has_tvm_ffi(), reason="apache-tvm-ffi is not installed")
def test_torch_tensors_are_taken_and_checked_as_they_are() -> None:
    """No GPU here, so the last thing seen is the launch function's own check of the device."""
    launch = compile_kernel(tiny_spec())
    x = torch.zeros(3, 64, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="cuda"):
        launch(x, x.clone(), 1.0, 1)


def test_parallel_compilation_fills_the_cache_and_reports_failures(cache_folder: Path) -> None:
    good, bad = [tiny_spec(), tiny_spec(warps=2)], tiny_spec(warps=64)
    before = compile_count()
    result = dict(compile_in_parallel([*good, bad, good[0]], processes=2))
    assert set(result) == {*good, bad}
    assert [result[spec] for spec in good] == ["", ""]
    assert "does not compile" in result[bad]
    assert all(map(is_compiled, good))
    assert compile_count() == before
    for spec in good:
        compile_kernel(spec)
    assert compile_count() == before


def test_a_compiling_process_that_dies_fails_its_kernel_alone(cache_folder: Path, tmp_path: Path) -> None:
    """The next kernel gets a new process."""
    (tmp_path / "dies.py").write_text("import os\nos._exit(7)\n")
    sys.path.insert(0, str(tmp_path))
    pool = CompilerPool(1)
    try:
        failure = pool.wait([KernelSpec.of("dies:Kernel", warps=1)])
        assert failure == "dies-w1: the compiling process ended with exit status 7"
        assert pool.wait([tiny_spec()]) == ""
    finally:
        pool.close()
        sys.path.remove(str(tmp_path))
    assert is_compiled(tiny_spec())


def _precompile_and_exit() -> None:
    sys.exit(precompile([tiny_spec(), tiny_spec(warps=2)]))


def test_ranks_compile_ahead_once(cache_folder: Path) -> None:
    """Two daemonic processes, as vLLM's workers are, at the same time: one compiles both kernels, the other none."""
    context = multiprocessing.get_context("spawn")
    ranks = [context.Process(target=_precompile_and_exit, daemon=True) for _ in range(2)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    assert sorted(rank.exitcode for rank in ranks) == [0, 2]
    assert is_compiled(tiny_spec())
    assert is_compiled(tiny_spec(warps=2))


def test_compiling_ahead_leaves_failures_and_single_kernels_to_the_launch(cache_folder: Path) -> None:
    assert precompile([tiny_spec()]) == 0
    assert not is_compiled(tiny_spec())
    assert precompile([tiny_spec(), tiny_spec(warps=64)]) == 1
    assert is_compiled(tiny_spec())


@pytest.mark.parametrize("num_tokens", [1, 5])
def test_without_tvm_ffi_tensors_get_the_layout_that_was_compiled(num_tokens: int) -> None:
    """Layouts, dtypes and sizes of every argument of the real kernels as MLIR types, all but the address space."""
    from cutlass._mlir import ir

    shape = MoEShape(8, 1, 128, 64)
    specs = [fused_spec(shape, FusedConfig(), has_bias=bias) for bias in (False, True)]
    specs += [staged_spec(shape, StagedConfig(), has_bias=bias) for bias in (False, True)]
    for spec in specs:
        names: dict[str, int] = {}
        for fake in fake_arguments(spec, env_stream=False):
            if not hasattr(fake, "shape"):
                continue
            sizes = [n if isinstance(n, int) else names.setdefault(str(id(n)), num_tokens) for n in fake.shape]
            dtype = {"BFloat16": torch.bfloat16, "Float32": torch.float32, "Int32": torch.int32}[fake.dtype.__name__]
            with ir.Context():
                made, wanted = (
                    re.search(r"<(\w+), .*(\".*\")", str(t.__get_mlir_types__()[0]))
                    for t in (as_compiled(torch.zeros(sizes, dtype=dtype), fake), fake)
                )
            assert made is not None
            assert wanted is not None
            assert made.groups() == wanted.groups()


def test_a_listing_holds_ptx_and_cubin() -> None:
    listing = compile_listing(tiny_spec())
    assert ".target sm_90a" in listing.ptx
    assert listing.cubin[:4] == b"\x7fELF"


def test_the_library_imports_no_cutlass_until_it_compiles() -> None:
    code = (
        "import sys, cutedsl_kernels, cutedsl_kernels.launch, cutedsl_kernels.compile;"
        "from cutedsl_kernels import plan_for, KNOWN_MODELS;"
        "plan_for(KNOWN_MODELS['olmoe-1b-7b'].shape, 8, 0.7, 'cuda');"
        "assert not [m for m in sys.modules if m.split('.')[0] in ('cutlass', 'tvm_ffi')]"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
