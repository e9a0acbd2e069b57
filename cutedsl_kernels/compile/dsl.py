"""The only file besides kernels/ that calls the CuTe DSL: compile on fake tensors, export, load. Touches no device.

CuTe DSL 4.6.0 to 4.8.1 work. Two things were learnt the hard way (2026-11-23):

* Without a GPU the DSL takes sm_100a for the machine; an option ``--gpu-arch sm_90a`` alone then compiles, but the
  export fails with unresolved symbols as in any cross-compilation. ``envar.arch`` of its singleton
  decides, also after the import, so nothing has to be put in the environment.
* The object that export_to_c writes is loaded by the DSL's own linker in 1 to 2 ms; no C compiler is needed.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from .specs import KernelSpec, fake_arguments

ARCH = "sm_90a"
SYMBOL = "cutedsl_kernels_launch"


@dataclass(frozen=True)
class Listing:
    """What a compilation left behind, for inspection: PTX text, cubin (an ELF image), and the host code in MLIR."""

    ptx: str
    cubin: bytes
    host: str


@functools.cache
def _cute() -> ModuleType:
    try:
        from cutlass import cute
        from cutlass.cutlass_dsl import CuTeDSL
    except ImportError as error:
        raise ImportError(f"CuTe DSL cannot be imported ({error}): pip install 'nvidia-cutlass-dsl>=4.6,<5'") from error

    CuTeDSL._get_dsl().envar.arch = ARCH
    return cute


@functools.cache
def has_tvm_ffi() -> bool:
    """Whether kernels take torch tensors as they are; without apache-tvm-ffi each call converts them by DLPack."""
    try:
        import tvm_ffi  # noqa: F401
    except ImportError:
        return False
    return True


def compile_object(spec: KernelSpec, path: Path) -> None:
    """Compiles ``spec`` for sm_90a and writes the host object with the cubin in it to ``path`` (suffix ``.o``)."""
    _compile(spec, "--enable-tvm-ffi" if has_tvm_ffi() else "", functools.partial(_export, path=path))


def compile_listing(spec: KernelSpec) -> Listing:
    """Compiles ``spec`` for sm_90a and returns what there is to inspect, kept nowhere."""
    with tempfile.TemporaryDirectory() as folder:
        options = f"--keep-ptx --keep-cubin --dump-dir {folder}"
        return _compile(spec, options, lambda r: Listing(r.__ptx__, r.__cubin__, str(r.ir_module)))


def _compile(spec: KernelSpec, options: str, use: Callable[[Any], Any]) -> Any:
    cute = _cute()
    kernel, arguments = spec.build(), fake_arguments(spec, env_stream=has_tvm_ffi())
    return use(cute.compile(kernel, *arguments, options=f"--gpu-arch {ARCH} {options}"))


def _export(compiled: Any, path: Path) -> None:
    if has_tvm_ffi():
        compiled.export_to_c(str(path), function_name=SYMBOL)
        return
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:  # it also writes a header, which nobody needs
        compiled.export_to_c(file_path=folder, file_name="kernel", function_prefix=SYMBOL)
        (Path(folder) / "kernel.o").replace(path)


def load_object(path: Path, spec: KernelSpec) -> Callable[..., None]:
    """The launch function of the object that compile_object wrote for ``spec``.

    Called with torch tensors, numbers for Float32 and Int32, and no stream: it launches on torch's current one.
    """
    from cutlass.cute.runtime import load_module

    _cute()
    module = load_module(str(path), enable_tvm_ffi=has_tvm_ffi())
    function = getattr(module, SYMBOL)
    return function if has_tvm_ffi() else _convert_arguments(function, spec)


def as_compiled(tensor: Any, fake: Any) -> Any:
    """A torch tensor in the form the kernel was compiled for: sizes that were symbolic there are dynamic here."""
    from cutlass.cute.runtime import from_dlpack

    order = tuple(range(tensor.dim()))
    made = from_dlpack(tensor.detach(), assumed_align=16 if tensor.data_ptr() % 16 == 0 else None)
    symbolic = [mode for mode, size in enumerate(fake.shape) if not isinstance(size, int)]
    for mode in symbolic:
        made = made.mark_compact_shape_dynamic(mode=mode, stride_order=order)
    return made


def _convert_arguments(function: Callable[..., Any], spec: KernelSpec) -> Callable[..., None]:
    """Without apache-tvm-ffi: every tensor through DLPack, and the stream by hand."""
    import cuda.bindings.driver as cuda
    import torch

    fakes = fake_arguments(spec, env_stream=False)[:-1]

    def convert(argument: Any, fake: Any) -> Any:
        if fake is None:  # an argument that this kernel was compiled without
            return None
        return as_compiled(argument, fake) if isinstance(argument, torch.Tensor) else type(fake)(argument)

    def launch(*arguments: Any) -> None:
        device = arguments[0].device
        converted = [convert(argument, fake) for argument, fake in zip(arguments, fakes, strict=True)]
        with torch.cuda.device(device):
            function(*converted, cuda.CUstream(torch.cuda.current_stream(device).cuda_stream))

    return launch
