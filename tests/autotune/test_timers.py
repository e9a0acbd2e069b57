"""The device process, on the CPU back end: it times, checks, and can be lost."""

from __future__ import annotations

import os
import signal
import time

import pytest
from cutedsl_kernels.autotune.space import Bin, TunedLayer
from cutedsl_kernels.autotune.timers import DeviceSetup, DeviceTimer, PlanFailure, SimulatedTimer

from cutedsl_kernels import MoEShape
from cutedsl_kernels.configs import FusedConfig, Plan

pytestmark = pytest.mark.cpu
LAYER = TunedLayer(MoEShape(8, 2, 128, 64))
PLAN = Plan("fused", FusedConfig())


def test_simulated_times_are_those_of_their_seed(seed: int) -> None:
    where = Bin(8, 0.8)
    one, same, other = (SimulatedTimer(LAYER, s) for s in (seed, seed, seed + 1))
    assert one.time(where, PLAN, True) == same.time(where, PLAN, True)
    assert one.true_us(where, PLAN) != other.true_us(where, PLAN)
    assert "simulated" in one.gpu.name
    sample = one.time(where, PLAN, False)
    assert sample.us == pytest.approx(one.true_us(where, PLAN), rel=0.03)


def test_the_device_process_times_and_survives_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    timer = DeviceTimer(DeviceSetup("cpu", LAYER, "uniform", 0, "library", calls=2), hang_s=60)
    try:
        assert timer.gpu.name == "cpu"
        assert "host clock" in timer.timing
        first = timer.time(Bin(2, 0.8), PLAN, False)
        assert first.us > 0
        assert timer.time(Bin(2, 0.9, 0.35), Plan("dense"), True).us > 0
        os.kill(timer._process.pid, signal.SIGKILL)
        with pytest.raises(PlanFailure) as lost:
            timer.time(Bin(2, 0.8), PLAN, False)
        assert lost.value.cause == "lost"
        assert timer.time(Bin(3, 0.8), PLAN, False).us > 0, "the next plan gets a new process"
        os.kill(timer._process.pid, signal.SIGSTOP)
        timer._hang_s = 1.0
        began = time.monotonic()
        with pytest.raises(PlanFailure) as hung:
            timer.time(Bin(3, 0.8), PLAN, False)
        assert hung.value.cause == "hung"
        assert time.monotonic() - began < 5
    finally:
        timer.close()
