"""Fixtures shared by all tiers."""

from __future__ import annotations

import os
import secrets

import pytest


@pytest.fixture
def seed() -> int:
    """A fresh seed for each test, printed with a failure. CUTEDSL_KERNELS_TEST_SEED repeats a run."""
    value = int(os.environ.get("CUTEDSL_KERNELS_TEST_SEED") or secrets.randbits(31))
    print(f"seed: {value} (repeat with CUTEDSL_KERNELS_TEST_SEED={value})")
    return value
