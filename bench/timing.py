"""The one timing routine of this project, used by the benchmarks and by the autotuner.

A measurement is a list of calls with different inputs, routings and weight copies (problems.py), so that no call finds
its weights in L2. On a GPU all calls are captured into one CUDA graph and the graph is replayed between two events; on
a CPU the calls run in turn under a host clock. The result is the median over replays of the time per call.

The outputs of the captured calls stay reachable: they are poisoned with NaN and one replay is checked against the
reference before any number is taken (check.py), so what is checked is what is timed.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

Call = Callable[[], torch.Tensor]

DEFAULT_REPLAYS = 12
WARMUP_REPLAYS = 3


@dataclass(frozen=True)
class Timing:
    """Microseconds per call: median, fastest, and the distance between the quartiles over ``replays`` replays."""

    median_us: float
    min_us: float
    iqr_us: float
    calls: int
    replays: int

    @property
    def statistic(self) -> str:
        return f"median of {self.replays} x {self.calls} calls"


class PreparedCalls:
    """Calls that have run once and are ready to be replayed together. ``outputs[i]`` is what call i returned."""

    outputs: list[torch.Tensor]

    def run(self) -> None:
        """All calls once, finished when this returns."""
        raise NotImplementedError

    def _elapsed_us(self) -> float:
        raise NotImplementedError

    def poison(self) -> None:
        """Fills every output with NaN: a call that writes only a part is then found by the check."""
        for output in self.outputs:
            output.fill_(float("nan"))

    def measure(self, replays: int = DEFAULT_REPLAYS, max_seconds: float = 2.0) -> Timing:
        """Median over ``replays`` replays, or as many (at least three) as fit into ``max_seconds``."""
        started = time.perf_counter()
        for _ in range(WARMUP_REPLAYS):
            self._elapsed_us()
            if time.perf_counter() - started > max_seconds / 4:
                break
        samples: list[float] = []
        started = time.perf_counter()
        while len(samples) < replays and (len(samples) < 3 or time.perf_counter() - started < max_seconds):
            samples.append(self._elapsed_us() / len(self.outputs))
        quartiles = statistics.quantiles(samples, n=4)
        return Timing(
            statistics.median(samples), min(samples), quartiles[2] - quartiles[0], len(self.outputs), len(samples)
        )


@functools.cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """One stream for all captures: the library keeps scratch memory for every stream it is called on."""
    return torch.cuda.Stream(device)


class GraphCalls(PreparedCalls):
    """The calls as one CUDA graph. What compiles or allocates for good does so in the warm-up call before capture."""

    def __init__(self, calls: Sequence[Call], device: torch.device) -> None:
        self._calls = list(calls)  # the graph reads tensors that only they keep alive
        self._stream = _capture_stream(device)
        self._stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(self._stream):
            calls[0]()
            calls[-1]()
            self._stream.synchronize()
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph, stream=self._stream):
                self.outputs = [call() for call in calls]
        torch.cuda.current_stream(device).wait_stream(self._stream)
        self._begin = torch.cuda.Event(enable_timing=True)
        self._end = torch.cuda.Event(enable_timing=True)

    def run(self) -> None:
        self._graph.replay()
        torch.cuda.synchronize()

    def _elapsed_us(self) -> float:
        self._begin.record()
        self._graph.replay()
        self._end.record()
        self._end.synchronize()
        return self._begin.elapsed_time(self._end) * 1e3


class HostCalls(PreparedCalls):
    """The calls in turn on the CPU under time.perf_counter."""

    def __init__(self, calls: Sequence[Call]) -> None:
        self._calls = list(calls)
        self.outputs = [call() for call in self._calls]

    def run(self) -> None:
        self.outputs = [call() for call in self._calls]

    def _elapsed_us(self) -> float:
        begin = time.perf_counter_ns()
        for call in self._calls:
            call()
        return (time.perf_counter_ns() - begin) * 1e-3


def prepare(calls: Sequence[Call], device: torch.device | str) -> PreparedCalls:
    """Warm-up and capture. ``calls`` must not be empty and must not synchronise with the host on a CUDA device."""
    if not calls:
        raise ValueError("calls must hold at least one call, got an empty list")
    device = torch.device(device)
    return GraphCalls(calls, device) if device.type == "cuda" else HostCalls(calls)


def copy_bandwidth(device: torch.device | str, megabytes: int | None = None) -> float:
    """Measured copy bandwidth of ``device`` in GB/s, bytes read plus bytes written.

    A float copy outside a graph: captured as a memcpy node of uint8 the same copy ran at two thirds of the speed on an
    H200. The buffers (1 GiB on a GPU, 128 MiB on a CPU) are far larger than any cache.
    """
    device = torch.device(device)
    count = (megabytes or (1024 if device.type == "cuda" else 128)) * 2**20 // 4
    source = torch.ones(count, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    rounds, repeats = (7, 10) if device.type == "cuda" else (5, 1)
    samples = []
    for index in range(rounds + 1):
        if device.type == "cuda":
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            for _ in range(repeats):
                target.copy_(source)
            end.record()
            end.synchronize()
            seconds = begin.elapsed_time(end) * 1e-3
        else:
            started = time.perf_counter()
            target.copy_(source)
            seconds = time.perf_counter() - started
        if index:  # the first round warms up
            samples.append(2 * 4 * count * repeats / seconds * 1e-9)
    return statistics.median(samples)
