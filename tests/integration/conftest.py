"""Tiny checkpoints, text, and engines that are shut down after the test."""

from __future__ import annotations

import gc
import logging
import os
import sys
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tools"), str(Path(__file__).parent)]
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
# Engines of one test process share it; an engine of two ranks brings two more.
os.environ["OMP_NUM_THREADS"] = "1"


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """Folder of an architecture's tiny checkpoint (a name of tools/make_tiny_checkpoints.py), made on first use."""
    from make_tiny_checkpoints import make

    folder = tmp_path_factory.mktemp("checkpoints")

    def get(name: str) -> str:
        return str(folder / name if (folder / name).is_dir() else make(name, folder, seed=0))

    return get


@pytest.fixture(scope="session")
def library_text() -> Callable[[str], Path]:
    """A source file of Python's standard library: text that every machine has."""
    return lambda name: Path(sysconfig.get_path("stdlib")) / name


@pytest.fixture
def method_log() -> Iterator[list[str]]:
    """Messages of this method. By a filter: every vLLM engine may configure logging anew, which removes handlers."""
    messages: list[str] = []

    def keep(record: logging.LogRecord) -> bool:
        messages.append(record.getMessage())
        return True

    logger = logging.getLogger("vllm.cutedsl_kernels")
    logger.addFilter(keep)
    yield messages
    logger.removeFilter(keep)


@pytest.fixture
def engine() -> Iterator[Callable[..., Any]]:
    """SparseEngine(...), shut down after the test. One at a time: a second call ends the first."""
    from cutedsl_kernels.integration.vllm.engine import SparseEngine

    running: list[SparseEngine] = []

    gc.collect()
    gc.freeze()  # vLLM collects garbage several times when an engine ends: not over all that was imported

    def start(model: str, **kwargs: Any) -> SparseEngine:
        while running:
            running.pop().shutdown()
        running.append(SparseEngine(model, **{"max_model_len": 128, "max_num_seqs": 8, **kwargs}))
        return running[-1]

    yield start
    while running:
        running.pop().shutdown()
