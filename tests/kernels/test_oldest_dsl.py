"""The compile layer and tier once more, with the oldest supported CuTe DSL (the other tests use the installed one)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cutedsl_kernels.environment import dsl_version

pytestmark = pytest.mark.compile

OLDEST = "4.6.0"
HERE = Path(__file__).resolve().parent
FOLDER = HERE.parents[1] / ".cache" / f"cutlass-dsl-{OLDEST}"


@pytest.mark.skipif(dsl_version() == OLDEST, reason=f"CuTe DSL {OLDEST} is the installed one")
@pytest.mark.skipif(not (FOLDER / ".done").exists(), reason=f"no {FOLDER}: `make test` installs it")
@pytest.mark.parametrize(
    "tests",
    [
        ("test_compile.py",),
        ("test_compile_tier.py",),
        ("test_fused_execute.py", "-k", "(test_sparsity_and_tokens and 5-0.5) or width_of_gpt_oss"),
    ],
    ids=lambda tests: tests[0],
)
def test_with_the_oldest_dsl(tests: tuple[str, ...]) -> None:
    folders = [str(FOLDER / "nvidia_cutlass_dsl" / "dsl_packages"), str(FOLDER), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(folders)}
    found = subprocess.run(
        [sys.executable, "-c", "import cutlass; print(cutlass.__version__)"],
        env=environment,
        check=True,
        capture_output=True,
        text=True,
    )
    assert found.stdout.strip() == OLDEST
    result = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            "-p",
            "no:xdist",
            str(HERE / tests[0]),
            *tests[1:],
        ],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
