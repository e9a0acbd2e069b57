"""Fixtures shared by all tiers, and which tests may run at the same time."""

from __future__ import annotations

import os
import secrets

import pytest
from ptx.plugin import run_ptx  # noqa: F401  (fixture: runs kernels in the PTX interpreter)


@pytest.fixture
def seed() -> int:
    """A fresh seed for each test, printed with a failure. CUTEDSL_KERNELS_TEST_SEED repeats a run."""
    value = int(os.environ.get("CUTEDSL_KERNELS_TEST_SEED") or secrets.randbits(31))
    print(f"seed: {value} (repeat with CUTEDSL_KERNELS_TEST_SEED={value})")
    return value


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """All engine tests go to one xdist worker: an engine takes two cores and several GiB."""
    for item in items:
        if item.get_closest_marker("engine") and not item.get_closest_marker("xdist_group"):
            item.add_marker(pytest.mark.xdist_group("engine"))
