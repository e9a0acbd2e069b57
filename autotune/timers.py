"""How a candidate is timed: on a device in a process of its own, or simulated from the cost model.

The device process holds weights and inputs, checks every plan against the definition before it is timed, and can be
lost: a plan that faults or hangs costs that plan a failure, and the next one gets a new process.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import random
import time
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from typing import Any, NoReturn

from cutedsl_kernels.configs import Plan
from cutedsl_kernels.cost_model import Gpu, estimate_us

from .space import Bin, TunedLayer


@dataclass(frozen=True)
class Sample:
    """Microseconds of one call, and the relative spread of the replays (distance between quartiles over the median)."""

    us: float
    spread: float


class PlanFailure(Exception):
    """A plan that gave no time. cause: compile, wrong, failed, lost (with the device process) or hung."""

    def __init__(self, cause: str, text: str) -> None:
        super().__init__(text)
        self.cause = cause


class Timer:
    """gpu: what is timed on. dense: what a dense plan runs, ``vllm`` or ``library``. timing: one line about how."""

    gpu: Gpu
    dense: str = "library"
    timing: str

    def time(self, where: Bin, plan: Plan, precise: bool) -> Sample:
        """Checks and times one plan; ``precise`` takes more replays. PlanFailure if it has no time."""
        raise NotImplementedError

    def close(self) -> None:
        """Frees the device."""


class SimulatedTimer(Timer):
    """The cost model, off by up to ``error`` / 2 for each value of each field and a little for each plan (always the
    same for one seed), plus noise for each call.

    Its gpu is named ``simulated NVIDIA H200``, so no real GPU ever uses a table made with it. failing: share of the
    plans other than dense that fail. delay_s: how long a measurement takes.
    """

    def __init__(
        self,
        layer: TunedLayer,
        seed: int,
        *,
        error: float = 0.2,
        noise: float = 0.003,
        failing: float = 0.0,
        delay_s: float = 0.0,
    ) -> None:
        self.gpu = Gpu(name=f"simulated {Gpu().name}")
        self.timing = f"simulated with seed {seed}"
        self.calls = 0
        self._layer, self._seed = layer, seed
        self._error, self._noise, self._failing, self._delay = error, noise, failing, delay_s
        self._random = random.Random(seed)

    def true_us(self, where: Bin, plan: Plan) -> float:
        """The time without noise."""
        us = estimate_us(plan, self._layer.shape, where.num_tokens, where.sparsity, self.gpu, where.pair_skip)
        fields = asdict(plan.config) if plan.config is not None else {}
        for name, value in fields.items():  # what the model does not know depends on single fields, mostly
            us *= 1 + self._error / 2 * (2 * self._share(name, value, where.num_tokens) - 1)
        return us * (1 + self._error / 10 * (2 * self._share(plan, where) - 1))

    def time(self, where: Bin, plan: Plan, precise: bool) -> Sample:
        self.calls += 1
        time.sleep(self._delay)
        if plan.kind != "dense" and self._share(plan, "fails") < self._failing:
            raise PlanFailure("wrong", "simulated: relative error too large")
        noise = self._noise / (2 if precise else 1)
        return Sample(self.true_us(where, plan) * (1 + self._random.gauss(0, noise)), noise)

    def _share(self, *key: Any) -> float:
        """A number in 0..1 that depends on the key and the seed only."""
        text = "|".join(map(str, (*key, self._seed)))
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") / 2**32


@dataclass(frozen=True)
class DeviceSetup:
    """What the device process is told. dense: ``library`` (torch's grouped product) or ``vllm`` (its Triton kernel)."""

    device: str
    layer: TunedLayer
    routing: str
    seed: int
    dense: str
    calls: int | None = None


class DeviceTimer(Timer):
    """A process that owns the device. hang_s: how long one plan may take, loading and checking included."""

    def __init__(self, setup: DeviceSetup, hang_s: float = 120.0, start_s: float = 300.0) -> None:
        self._setup, self._hang_s, self._start_s = setup, hang_s, start_s
        self.dense = setup.dense
        self._process: Any = None
        self._start()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, self._setup), daemon=True)
        self._process.start()
        theirs.close()
        self.gpu, self.timing = self._answer(self._start_s)

    def time(self, where: Bin, plan: Plan, precise: bool) -> Sample:
        if self._process is None:
            self._start()
        self._connection.send((where, plan.to_json(), precise))
        us, spread = self._answer(self._hang_s)
        return Sample(us, spread)

    def _answer(self, timeout: float) -> tuple[Any, Any]:
        try:
            if not self._connection.poll(timeout):
                self._lost("hung", f"no result after {timeout:.0f} s")
            kind, *content = self._connection.recv()
        except (EOFError, OSError):
            self._lost("lost", "the device process ended")
        if kind == "failure":
            raise PlanFailure(content[0], content[1])
        if kind == "lost":
            self._lost("lost", content[0])
        return content[0], content[1]

    def _lost(self, cause: str, text: str) -> NoReturn:
        self.close()
        raise PlanFailure(cause, text)

    def close(self) -> None:
        if self._process is not None:
            self._connection.close()
            self._process.kill()
            self._process.join()
            self._process = None


def _serve(connection: Connection, setup: DeviceSetup) -> None:
    """The device process: one request after another until the connection closes."""
    from .measuring import DeviceLost, Measuring

    measuring = Measuring(setup)
    connection.send(("ready", measuring.gpu, measuring.timing))
    while True:
        try:
            where, plan, precise = connection.recv()
        except EOFError:
            return
        try:
            sample = measuring.time(where, Plan.from_json(plan), precise)
            connection.send(("sample", sample.us, sample.spread))
        except PlanFailure as failure:
            connection.send(("failure", failure.cause, str(failure)))
        except DeviceLost as lost:
            connection.send(("lost", str(lost)))
            return
