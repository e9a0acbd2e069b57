"""What the library asks of the machine: user folders, versions, the GPU. Only gpu_of touches CUDA."""

from __future__ import annotations

import functools
import os
import re
from importlib import metadata
from pathlib import Path
from typing import Literal

import torch

from .cost_model import Gpu

_VARIABLES = {"cache": "CUTEDSL_KERNELS_CACHE_DIR", "tuned": "CUTEDSL_KERNELS_TUNED_DIR"}
_DRIVER_FILE = Path("/proc/driver/nvidia/version")
COPY_SHARE_OF_PEAK = 0.86  # 4.2 TB/s measured of the 4.9 TB/s that an H200's memory clock and bus width give


def user_dir(kind: Literal["cache", "tuned"]) -> Path:
    """Folder of compiled kernels (``cache``) or of the user's tuned tables (``tuned``); not created here.

    CUTEDSL_KERNELS_CACHE_DIR and CUTEDSL_KERNELS_TUNED_DIR override the folders that platformdirs gives.
    """
    if override := os.environ.get(_VARIABLES[kind]):
        return Path(override).expanduser()
    try:
        import platformdirs
    except ImportError:  # run from a source tree without the dependencies installed
        return Path.home() / ".cache" / "cutedsl-kernels" / kind
    if kind == "cache":
        return Path(platformdirs.user_cache_dir("cutedsl-kernels")) / "compiled"
    return Path(platformdirs.user_data_dir("cutedsl-kernels")) / "tuned"


@functools.cache
def dsl_version() -> str:
    """Version of the installed CuTe DSL, ``""`` if there is none."""
    try:
        return metadata.version("nvidia-cutlass-dsl")
    except metadata.PackageNotFoundError:
        pass
    try:  # a copy without package metadata on the path
        import cutlass
    except ImportError:
        return ""
    return str(cutlass.__version__)


@functools.cache
def driver_version() -> str:
    """Version of the NVIDIA kernel driver such as ``580.95.05``, ``""`` where none is loaded."""
    try:
        found = re.search(r"\s(\d+\.\d+(?:\.\d+)?)\s", _DRIVER_FILE.read_text())
    except OSError:
        return ""
    return found.group(1) if found else ""


@functools.cache
def gpu_of(device: torch.device | str) -> Gpu:
    """The GPU behind ``device``; without CUDA (dry runs, tests) an H200, so that plans can still be made."""
    if not torch.cuda.is_available():
        return Gpu()
    properties = torch.cuda.get_device_properties(torch.device(device))
    default = Gpu()
    if properties.name == default.name:
        return Gpu(properties.name, properties.multi_processor_count, driver=driver_version())
    clock_khz, bus_bits = getattr(properties, "memory_clock_rate", 0), getattr(properties, "memory_bus_width", 0)
    copy_gbps = 2 * clock_khz * 1e3 * bus_bits / 8 / 1e9 * COPY_SHARE_OF_PEAK or default.copy_gbps
    tflops = default.dense_tflops * properties.multi_processor_count / default.num_sms
    return Gpu(properties.name, properties.multi_processor_count, copy_gbps, tflops, driver_version())
