"""Compiling in other processes, which see no GPU: many kernels at once, or while others are being timed.

The processes are programs of their own, not multiprocessing's: vLLM's workers are daemonic, so may have no children of
that kind, and a script without a main guard would be run again by each.
"""

from __future__ import annotations

import base64
import json
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .specs import KernelSpec

_PROGRAM = f"from {__name__} import answer_requests; answer_requests()"


class CompilerPool:
    """Puts kernels into the disk cache in up to ``processes`` processes (default: one per core), in the order they are
    asked for. Processes start when they are first needed."""

    def __init__(self, processes: int | None = None) -> None:
        self._threads = ThreadPoolExecutor(processes or os.cpu_count() or 1)
        self._own = threading.local()
        self._started: list[subprocess.Popen[bytes]] = []
        self._futures: dict[KernelSpec, Future[str]] = {}

    def request(self, specs: Iterable[KernelSpec]) -> dict[Future[str], KernelSpec]:
        """Queues what has not been asked for before. A future's result is "" or why its kernel does not compile."""
        specs = list(specs)
        for spec in specs:
            if spec not in self._futures:
                self._futures[spec] = self._threads.submit(self._compile, spec)
        return {self._futures[spec]: spec for spec in specs}

    def wait(self, specs: Iterable[KernelSpec]) -> str:
        """Blocks until all of ``specs`` are compiled; "" or the first failure."""
        return next(filter(None, (future.result() for future in self.request(specs))), "")

    def close(self) -> None:
        """Gives up what has not begun, and waits for what has."""
        self._threads.shutdown(wait=True, cancel_futures=True)
        for process in self._started:
            process.communicate()

    def _compile(self, spec: KernelSpec) -> str:
        """Runs in a thread, each of which has one process."""
        process: subprocess.Popen[bytes] | None = getattr(self._own, "process", None)
        if process is None:
            process = self._own.process = _start()
            self._started.append(process)
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(base64.b64encode(pickle.dumps(spec)) + b"\n")
            process.stdin.flush()
            answer = process.stdout.readline()
        except OSError:
            answer = b""
        if not answer:
            self._own.process = None
            return f"{spec.name}: the compiling process ended with exit status {process.wait()}"
        return str(json.loads(answer))


def _start() -> subprocess.Popen[bytes]:
    path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
    return subprocess.Popen(
        [sys.executable, "-P", "-c", _PROGRAM],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": path},
    )


def answer_requests() -> None:
    """What such a process does: compiles the specs that come on standard input, and answers each in a line of JSON."""
    from . import compile_kernel

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever the compiler prints is no answer
    for line in sys.stdin.buffer:
        try:
            compile_kernel(pickle.loads(base64.b64decode(line)))
            failure = ""
        except Exception as error:  # whatever the compiler raises is this kernel's result
            failure = str(error) or type(error).__name__
        print(json.dumps(failure), file=answers, flush=True)
