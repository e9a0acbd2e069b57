"""From a DSL function to a checked run: compile, capture, place buffers, execute every launch, collect reports."""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .capture import HostFunction
from .codegen import Program
from .machine import Launch, Machine, layout
from .memory import GLOBAL_BASE, GUARD, INIT, MAX_BUFFERS, PREVIOUS, READONLY, SLOT_BITS, Buffer
from .parser import Module, parse
from .reports import Report
from .scalars import PtxError
from .scheduler import execute

OPTIONS = "--gpu-arch sm_90a --keep-ptx --generate-line-info"


@dataclass(frozen=True)
class Uninit:
    """An argument whose contents are undefined on entry: reading it before writing is reported."""

    array: Any


@dataclass(frozen=True)
class ReadOnly:
    """An argument the kernels must not write."""

    array: Any


@dataclass
class Result:
    """Outcome of a run: what was launched, what was found, and how much work it was."""

    launches: list[Launch]
    reports: list[Report] = field(default_factory=list)
    thread_instructions: int = 0
    vector_instructions: int = 0
    seconds: float = 0.0

    def kinds(self) -> set[str]:
        return {r.kind for r in self.reports}

    def __str__(self) -> str:
        groups: dict[tuple[object, ...], list[Report]] = {}
        for r in self.reports:
            groups.setdefault((r.kind, r.kernel, r.source or r.line), []).append(r)
        out = [f"{len(self.launches)} launch(es), {len(self.reports)} report(s)"]
        for found in groups.values():
            more = f"\n    and at {len(found) - 1} more instruction(s) of that line" if len(found) > 1 else ""
            out.append(str(found[0]) + more)
        return "\n".join(out)


class _Storage:
    """Host memory behind one or several arguments that overlap."""

    def __init__(self, low: int, high: int):
        self.low, self.high = low, high
        self.views: list[tuple[str, np.ndarray, bool, bool]] = []


def as_numpy(value: Any) -> np.ndarray:
    """A NumPy view of an array or CPU tensor that shares its memory; 16-bit floats as uint16."""
    if isinstance(value, np.ndarray):
        return value
    import torch

    if isinstance(value, torch.Tensor):
        if value.device.type != "cpu":
            raise PtxError(f"tensors must be on the CPU, got {value.device}")
        value = value.detach()
        if value.dtype in (torch.bfloat16, torch.float16):
            return value.view(torch.int16).numpy().view(np.uint16)
        if value.element_size() == 1:
            return value.view(torch.uint8).numpy()
        return value.numpy()
    raise PtxError(f"expected a NumPy array or torch tensor, got {type(value).__name__}")


def _byte_range(a: np.ndarray) -> tuple[int, int]:
    low = high = a.__array_interface__["data"][0]
    for n, s in zip(a.shape, a.strides, strict=True):
        if n == 0:
            return low, low
        low, high = low + min(0, (n - 1) * s), high + max(0, (n - 1) * s)
    return low, high + a.itemsize


class DslProgram:
    """A compiled CuTe DSL function, ready to be run on arrays.

    `compiled` must keep its PTX (compile with `harness.OPTIONS` and a dump folder, as `compile_dsl` does);
    `example` are the arguments it was compiled with, the stream included; without them the dynamic extents and
    strides are taken from the exported header, which is enough where all or none of a tensor's extents are dynamic.
    """

    def __init__(self, compiled: Any, example: tuple[Any, ...] | None):
        text = compiled.__ptx__
        if text is None:
            raise PtxError("the function was compiled without --keep-ptx")
        if "\n" not in text:
            with open(text) as f:
                text = f.read()
        self.ptx: str = text
        self.module: Module = parse(text)
        self.host = HostFunction(compiled, self.module)
        self.parameters = self._bind(compiled, example)
        self._programs: dict[str, tuple[Program, int, int]] = {}

    @staticmethod
    def _bind(compiled: Any, example: tuple[Any, ...] | None) -> list[tuple[str, Any, Any]]:
        """-> (name, annotation, example) of the arguments that exist at run time; not those compiled as None."""
        signature = compiled.execution_args.original_signature
        kept = compiled.execution_args.signature.parameters
        names = [p for p in signature.parameters if p != "self"]
        absent = set() if example is None else {n for n, a in zip(names, example, strict=False) if a is None}
        if example is None:
            example = (None,) * len(names)
        if len(example) != len(names):
            raise PtxError(f"the function takes {names}, got {len(example)} example arguments")
        annotations = {n: p.annotation for n, p in signature.parameters.items()}
        return [(n, annotations[n], a) for n, a in zip(names, example, strict=True) if n in kept and n not in absent]

    def with_ptx(self, text: str) -> DslProgram:
        """The same host code with another PTX text (mutation tests)."""
        other = object.__new__(DslProgram)
        other.ptx, other.module, other.host, other.parameters = text, parse(text), self.host, self.parameters
        other._programs = {}
        return other

    # ---- running
    def run(
        self, *values: Any, check_races: bool = True, allow_local: bool = False, max_steps: int = 2_000_000
    ) -> Result:
        """Execute all launches of one call. `values`: one for each run-time argument but the stream. Arrays are
        updated in place. `allow_local` drops the report about local memory; after `max_steps` blocks a launch is
        given up."""
        start = time.perf_counter()
        wanted = [p for p in self.parameters if not _is_stream(p[1], p[2])]
        if len(values) != len(wanted):
            raise PtxError(f"the function takes {[p[0] for p in wanted]}, got {len(values)} values")
        given = dict(zip((p[0] for p in wanted), values, strict=True))
        buffers, addresses, storages = self._place(given)
        packed = [
            bytes(8) if name not in given else self._pack(name, annotation, example, given[name], addresses)
            for name, annotation, example in self.parameters
        ]
        self.host.module = self.module
        result = Result(self.host.run(packed))
        bases = self._module_variables(buffers)
        for launch in result.launches:
            self._execute(launch, buffers, bases, result, check_races, max_steps)
        for b, s in zip(buffers, storages, strict=False):
            self._copy_back(b, s)
        if allow_local:
            result.reports = [r for r in result.reports if r.kind != "local memory is used"]
        result.seconds = time.perf_counter() - start
        return result

    def _execute(
        self, launch: Launch, buffers: list[Buffer], bases: dict[str, int], result: Result, check_races: bool,
        max_steps: int,
    ) -> None:  # fmt: skip
        if launch.kernel not in self._programs:
            kernel = self.module.kernels[launch.kernel]
            symbols, static, local = layout(kernel, self.module, bases)
            self._programs[launch.kernel] = (Program(kernel, symbols), static, local)
        program, static, local = self._programs[launch.kernel]
        if not launch.dependent:
            for b in buffers:
                b.flags &= np.uint8(0xFF & ~PREVIOUS)
        machine = Machine(program, launch, buffers, (static, local), check_races)
        execute(machine, max_steps)
        result.reports += machine.reports.list()
        result.thread_instructions += machine.thread_instructions
        result.vector_instructions += machine.vector_instructions
        if check_races:
            for b in buffers:
                assert b.shadow is not None
                if b.shadow.written:
                    mask = np.repeat(b.shadow.touched(), program.global_granule)[: b.total]
                    b.flags[: len(mask)][mask] |= PREVIOUS
                b.shadow = None

    # ---- arguments
    def _place(self, given: dict[str, Any]) -> tuple[list[Buffer], dict[str, int], list[_Storage]]:
        """Give every group of overlapping arrays a buffer. -> buffers, address of each argument, storages."""
        storages: list[_Storage] = []
        arrays: dict[str, np.ndarray] = {}
        for name, value in given.items():
            undefined, readonly = isinstance(value, Uninit), isinstance(value, ReadOnly)
            raw = value.array if undefined or readonly else value
            if isinstance(raw, (int, float, bool, np.generic)):
                continue
            a = as_numpy(raw)
            arrays[name] = a
            low, high = _byte_range(a)
            hit = [s for s in storages if low < s.high and s.low < high]
            target = _Storage(low, high)
            for s in hit:
                target.low, target.high = min(target.low, s.low), max(target.high, s.high)
                target.views += s.views
                storages.remove(s)
            target.views.append((name, a, undefined, readonly))
            storages.append(target)
        if len(storages) > MAX_BUFFERS - 8:
            raise PtxError(f"{len(storages)} buffers, at most {MAX_BUFFERS - 8} are supported")
        buffers, addresses = [], {}
        for k, s in enumerate(storages):
            size, shift = s.high - s.low, s.low % 256 if len(s.views) > 1 else 0
            base = GLOBAL_BASE + (k << SLOT_BITS) + (1 << (SLOT_BITS - 1)) + shift // 256
            valid = np.zeros(size, bool)
            buffer = Buffer("+".join(v[0] for v in s.views), size, base, valid)
            for name, a, undefined, readonly in s.views:
                addresses[name] = base + a.__array_interface__["data"][0] - s.low
                where = _positions(a, s.low)
                mark = 1 | (0 if undefined else INIT) | (READONLY if readonly else 0)
                buffer.flags[GUARD + where] |= mark
                buffer.data[GUARD + where] = a.reshape(-1).view(np.uint8) if a.flags.c_contiguous else _bytes(a)
            buffers.append(buffer)
        return buffers, addresses, storages

    def _copy_back(self, b: Buffer, s: _Storage) -> None:
        for _, a, _, readonly in s.views:
            if readonly or not a.flags.writeable:
                continue
            raw = b.data[GUARD + _positions(a, s.low)].view(a.dtype).reshape(a.shape)
            a[...] = raw

    def _pack(self, name: str, annotation: Any, example: Any, value: Any, addresses: dict[str, int]) -> bytes:
        """The bytes of one argument in the layout of the exported header."""
        if name not in addresses:
            return _scalar(name, annotation, example, value)
        out = bytearray(int(addresses[name]).to_bytes(8, "little"))
        raw = value.array if isinstance(value, (Uninit, ReadOnly)) else value
        a = as_numpy(raw)
        shape = tuple(raw.shape)
        strides = [s // a.itemsize for s in a.strides]
        shapes, stride_count = self.host.structs.get(name, (0, 0))
        shape_mask, stride_mask = _dynamic(example, len(shape), shapes, stride_count, strides)
        if len(shape_mask) != len(shape):
            raise PtxError(f"argument {name!r} must have {len(shape_mask)} dimensions, has shape {shape}")
        for n, dynamic in zip(shape, shape_mask, strict=True):
            if dynamic:
                out += int(n).to_bytes(4, "little", signed=True)
        wide = 4 if getattr(example, "_use_32bit_stride", False) else 8
        out += bytes(-len(out) % wide) if any(stride_mask) else b""
        for s, dynamic in zip(strides, stride_mask, strict=True):
            if dynamic:
                out += int(s).to_bytes(wide, "little", signed=True)
        self._check_static(name, example, shape, strides, shape_mask, stride_mask)
        return bytes(out)

    @staticmethod
    def _check_static(
        name: str,
        example: Any,
        shape: tuple[int, ...],
        strides: list[int],
        shape_mask: list[bool],
        stride_mask: list[bool],
    ) -> None:
        """Static extents and strides are compiled in: an array that has others would be read wrongly."""
        for what, have, want, mask in (
            ("shape", shape, getattr(example, "shape", None), shape_mask),
            ("stride", strides, getattr(example, "stride", None), stride_mask),
        ):
            if not isinstance(want, tuple) or len(want) != len(have):
                continue
            for i, (h, w, dynamic) in enumerate(zip(have, want, mask, strict=True)):
                if not dynamic and isinstance(w, int) and h != w and not (what == "stride" and shape[i] == 1):
                    raise PtxError(f"argument {name!r}: {what} {tuple(have)}, compiled for {want}")

    def _module_variables(self, buffers: list[Buffer]) -> dict[str, int]:
        bases = {}
        for k, v in enumerate(self.module.globals):
            base = GLOBAL_BASE + ((MAX_BUFFERS - 1 - k) << SLOT_BITS) + (1 << (SLOT_BITS - 1))
            b = Buffer(v.name, v.size, base)
            b.data[b.inner] = np.frombuffer(v.data or bytes(v.size), np.uint8)
            b.flags[b.inner] |= INIT
            buffers.append(b)
            bases[v.name] = base
        return bases


def _positions(a: np.ndarray, low: int) -> np.ndarray:
    """Byte positions of all elements of `a`, in C order, relative to address `low`."""
    at = np.full((), a.__array_interface__["data"][0] - low, np.int64)
    for n, s in zip(a.shape, a.strides, strict=True):
        at = at[..., None] + np.arange(n) * s
    return (at.reshape(-1, 1) + np.arange(a.itemsize)).ravel()


def _bytes(a: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(a).reshape(-1).view(np.uint8)


def _is_stream(annotation: Any, example: Any) -> bool:
    return "Stream" in getattr(annotation, "__name__", str(annotation)) or "Stream" in type(example).__name__


def _dynamic(example: Any, rank: int, shapes: int, strides: int, values: list[int]) -> tuple[list[bool], list[bool]]:
    """Which extents and strides are passed at run time."""
    masks = getattr(example, "dynamic_shapes_mask", None), getattr(example, "dynamic_strides_mask", None)
    if masks[0] is not None and masks[1] is not None:
        return [bool(m) for m in masks[0]], [bool(m) for m in masks[1]]
    shape_mask = [True] * rank if shapes == rank else [False] * rank
    if shapes not in (0, rank) or strides not in (0, rank - 1, rank):
        raise PtxError("cannot tell which extents are dynamic: pass the fake tensor as example")
    stride_mask = [False] * rank if not strides else [strides == rank or v != 1 for v in values]
    return shape_mask, stride_mask


def _scalar(name: str, annotation: Any, example: Any, value: Any) -> bytes:
    for kind in (annotation, type(example)):
        width = getattr(kind, "width", None)
        if isinstance(width, int):
            if getattr(kind, "is_float", "Float" in kind.__name__):
                return np.array(value, {16: np.float16, 32: np.float32, 64: np.float64}[width]).tobytes()
            return (int(value) & ((1 << width) - 1)).to_bytes(max(width // 8, 1), "little")
    if isinstance(value, (bool, np.bool_)):
        return bytes([bool(value)])
    if isinstance(value, (int, np.integer)):
        return int(value).to_bytes(4, "little", signed=True)
    if isinstance(value, (float, np.floating)):
        return np.float32(value).tobytes()
    raise PtxError(f"argument {name!r}: cannot pass a {type(value).__name__}")


def compile_dsl(function: Any, *example: Any, options: str = "") -> DslProgram:
    """Compile a `@cute.jit` function for sm_90a, without a GPU, and make it runnable here."""
    import cutlass.cute as cute
    from cutlass.cutlass_dsl import CuTeDSL

    CuTeDSL._get_dsl().envar.arch = "sm_90a"  # without a GPU the option alone compiles, but the export fails
    with tempfile.TemporaryDirectory(prefix="ptx-dump-") as folder:
        compiled = cute.compile(function, *example, options=f"{OPTIONS} --dump-dir {folder} {options}")
        return DslProgram(compiled, example)
