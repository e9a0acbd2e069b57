"""Runs the DSL's own host code on the CPU and records what it would launch.

The ahead-of-time object of a compiled function imports a few CUDA entry points. Linked against `capture_stubs.c` they
call back here with the real cudaLaunchConfig_t and parameter pointers, so grid, block, shared memory, attributes and
parameter bytes are those of a real launch. Nothing is packed by hand.
"""

from __future__ import annotations

import ctypes
import functools
import re
import struct
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from .machine import Launch
from .parser import Module
from .scalars import PtxError

_STUBS = Path(__file__).with_name("capture_stubs.c")
_CALLBACK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_char_p, ctypes.POINTER(ctypes.c_void_p))

# cudaLaunchConfig_t: gridDim, blockDim (3 u32 each), dynamicSmemBytes, stream, attrs, numAttrs; attributes of 72 bytes
_CONFIG = struct.Struct("<6IQQQI")
_ATTRIBUTE_BYTES = 72
_CLUSTER_DIMENSION, _PROGRAMMATIC_SERIALIZATION = 4, 6
_HARMLESS = {2: "cooperative", 8: "priority", 11: "preferred cluster dimension", 14: "shared memory carveout"}
_TENSOR_STRUCT = re.compile(
    r"typedef struct \{\s*void \*data;\s*(?:int32_t dynamic_shapes\[(\d+)\];\s*)?"
    r"(?:int(?:32|64)_t dynamic_strides\[(\d+)\];\s*)?\} host_Tensor_(\w+)_t;"
)


@functools.cache
def _stub_object() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="ptx-stubs-"))
    out = folder / "stubs.o"
    _compile(["-c", "-fPIC", "-O1", "-o", str(out), str(_STUBS)])
    return out


def _compile(args: list[str]) -> None:
    try:
        subprocess.run(["gcc", *args], check=True, capture_output=True, text=True)
    except FileNotFoundError:
        raise PtxError("capturing launches needs a C compiler: install gcc") from None
    except subprocess.CalledProcessError as e:
        raise PtxError(f"linking the host code failed: {e.stderr[-800:]}") from None


class HostFunction:
    """The host entry point of a compiled DSL function, callable without CUDA."""

    def __init__(self, compiled: Any, module: Module):
        self.module = module
        folder = Path(tempfile.mkdtemp(prefix="ptx-host-"))
        compiled.export_to_c(file_path=str(folder), file_name="host", function_prefix="host")
        header = (folder / "host.h").read_text()
        names = re.findall(r"void (_mlir_host__mlir_ciface_\w+)\(", header)
        if len(names) != 1:
            raise PtxError(f"expected one host entry point in the exported header, found {names}")
        library = folder / "host.so"
        _compile(["-shared", "-Wl,-Bsymbolic", "-o", str(library), str(folder / "host.o"), str(_stub_object())])
        self.library = ctypes.CDLL(str(library))
        self.entry = getattr(self.library, names[0])
        self._load()
        #: name -> (dynamic shapes, dynamic strides) of the tensor arguments
        self.structs = {m[3]: (int(m[1] or 0), int(m[2] or 0)) for m in _TENSOR_STRUCT.finditer(header)}

    def _load(self) -> None:
        """Look up the kernels, as the loader in the exported header does."""
        module, result, device = ctypes.c_void_p(0), ctypes.c_int32(0), ctypes.c_int32(0)
        library = ctypes.pointer(module)
        at = [ctypes.addressof(v) for v in (library, result, device)]
        self.library._mlir_host_cuda_init((ctypes.c_void_p * 2)(at[0], at[1]))
        self.library._mlir_host_cuda_load_to_device((ctypes.c_void_p * 3)(at[0], at[2], at[1]))
        if result.value:
            raise PtxError(f"loading the module into the stubs returned {result.value}")

    def run(self, args: list[bytes]) -> list[Launch]:
        """Call the host code with one byte string per argument; returns its launches in order."""
        launches: list[Launch] = []
        trouble: list[BaseException] = []

        def on_launch(config: int, name: bytes, params: Any) -> int:
            try:
                launches.append(self._launch(config, name.decode(), params))
            except BaseException as e:  # must not cross the C frame
                trouble.append(e)
            return 0

        callback = _CALLBACK(on_launch)
        self.library.capture_set_callback(callback)
        keep = [ctypes.create_string_buffer(a, len(a) + 16) for a in args]
        result = ctypes.c_int32(0)
        pointers = [ctypes.addressof(k) for k in keep] + [ctypes.addressof(result)]
        array = (ctypes.c_void_p * len(pointers))(*pointers)
        self.entry(array, ctypes.c_int32(len(pointers)))
        if trouble:
            raise trouble[0]
        if result.value:
            raise PtxError(f"the host function returned error {result.value}")
        if not launches:
            raise PtxError("the host function launched nothing")
        return launches

    def _launch(self, config: int, name: str, params: Any) -> Launch:
        if name not in self.module.kernels:
            raise PtxError(f"launch of {name!r}, which is not in the PTX")
        gx, gy, gz, bx, by, bz, smem, _, attrs, count = _CONFIG.unpack(ctypes.string_at(config, _CONFIG.size))
        raw = [ctypes.string_at(params[i], p.size) for i, p in enumerate(self.module.kernels[name].params)]
        launch = Launch(name, (gx, gy, gz), (bx, by, bz), smem, raw)
        for i in range(count):
            a = ctypes.string_at(attrs + _ATTRIBUTE_BYTES * i, _ATTRIBUTE_BYTES)
            kind, x, y, z = struct.unpack_from("<I4x3I", a)
            launch.attributes.append(kind)
            if kind == _CLUSTER_DIMENSION:
                launch.cluster = (max(x, 1), max(y, 1), max(z, 1))
            elif kind == _PROGRAMMATIC_SERIALIZATION:
                launch.dependent = bool(x)
            elif kind not in _HARMLESS:
                raise PtxError(f"launch attribute {kind} of {name} is not supported")
        return launch
