"""The small kernels on a real GPU and in the interpreter, side by side.

    python -m ptx.golden            (in tests/, on a machine with an sm_90 GPU; or: pytest -m gpu
    tests/gpu/test_golden_ptx.py)

Each case runs once on the device, compiled from the same source, and once in the interpreter on the same inputs. Cases
whose operations are exact must agree bit by bit in every output; the others are compared within twice their tolerance.
The interpreter must report nothing.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import torch

from .cases import CASES, Case, clone, program
from .harness import Uninit


@dataclass
class Comparison:
    """Outcome of one case: which outputs differ between device and interpreter, and by how much at most."""

    name: str
    exact: bool
    differences: dict[str, float]
    reports: int

    @property
    def fine(self) -> bool:
        tolerance = 0.0 if self.exact else 2 * CASES[self.name].tolerance
        return not self.reports and all(d <= tolerance for d in self.differences.values())

    def __str__(self) -> str:
        worst = max(self.differences.values(), default=0.0)
        how = "bit by bit" if self.exact else "relative"
        verdict = "ok  " if self.fine else "FAIL"
        return f"{verdict} {self.name:24s} {how}, largest difference {worst:.3g}, {self.reports} report(s)"


def compile_for_device(case: Case) -> Any:
    """The case as a function of torch tensors that launches on torch's current stream."""
    import cutlass.cute as cute
    from cutlass.cute.runtime import make_fake_stream

    function, example = case.build()
    stream = make_fake_stream(use_tvm_ffi_env_stream=True)
    return cute.compile(function, *example[:-1], stream, options="--gpu-arch sm_90a --enable-tvm-ffi")


def _on_device(case: Case, arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments after a run on the GPU, on the CPU again."""
    device = {k: _copy_to_device(v) if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
    compile_for_device(case)(*device.values())
    torch.cuda.synchronize()
    return {k: v.cpu() if isinstance(v, torch.Tensor) else v for k, v in device.items()}


def _copy_to_device(t: torch.Tensor) -> torch.Tensor:
    """A copy with the same strides."""
    out = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="cuda")
    out.copy_(t)
    return out


def compare(name: str, seed: int) -> Comparison:
    """Run case `name` on both and compare all tensor arguments afterwards."""
    case = CASES[name]
    before = case.make(torch.Generator().manual_seed(seed))
    here = clone(before)
    result = program(name).run(*(Uninit(v) if k in case.undefined else v for k, v in here.items()))
    there = _on_device(case, clone(before))
    differences = {}
    for k, v in here.items():
        if not isinstance(v, torch.Tensor):
            continue
        a, b = v.contiguous(), there[k].contiguous()
        if torch.equal(a.view(torch.uint8), b.view(torch.uint8)):
            differences[k] = 0.0
        else:
            gap = (a.double() - b.double()).abs().nan_to_num(nan=float("inf"))
            differences[k] = max((gap.max() / b.double().abs().nan_to_num(0.0).max().clamp_min(1e-30)).item(), 5e-324)
    return Comparison(name, case.exact, differences, len(result.reports))


def main() -> int:
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        print("needs a GPU of compute capability 9.0", file=sys.stderr)
        return 2
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    failed = 0
    for name in CASES:
        for seed in (1, 2, 3):
            outcome = compare(name, seed)
            failed += not outcome.fine
            print(outcome, flush=True)
    print(f"{failed} comparison(s) failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
